"""Processes that tests start."""

import signal


def heeding_ctrl_c() -> None:
    """For preexec_fn: Ctrl-C counts in the new process, also where the tests run in the background of a script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
