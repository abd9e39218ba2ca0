"""Processes that tests start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess

FORKS = multiprocessing.get_context("forkserver")  # so that what is slow to import is imported once
FORKS.set_forkserver_preload(["torch", "timm", "pandas", "sklearn", "torch.distributed.fsdp", "pathfm.pretrain"])


def heeding_ctrl_c() -> None:
    """For preexec_fn: Ctrl-C counts in the new process, also where the tests run in the background of a script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(ranks: int, function: Callable, *given) -> list[BaseProcess]:
    """Processes that run function(*given), as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=_as_rank, args=(rank, ranks, port, function, given)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def on_ranks(ranks: int, function: Callable, *given) -> list[int]:
    """The exit codes of `ranks` processes that run function(*given), in one that is alone without a launcher.

    None of one that does not end.
    """
    processes = started(ranks, function, *given)
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _as_rank(rank: int, ranks: int, port: int, function: Callable, given: tuple) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # as in a program that was started from a shell
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    function(*given)
