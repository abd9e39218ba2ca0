"""Signals that end a run once its step is done: SIGTERM, and SIGUSR1, which Slurm sends before the time is over."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Ear:
    """Inside its block a signal is remembered in `heard`, by name, in place of ending the process.

    Only the main thread can listen; in another the signals do what they did.
    """

    def __init__(self) -> None:
        self.heard = ""

    def __enter__(self) -> Ear:
        listening = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._hear) for number in listening}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.heard = signal.Signals(number).name


def deaf(_: int = 0) -> None:
    """For a DataLoader's workers: a signal to all processes of a job ends the run and not what feeds its last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
