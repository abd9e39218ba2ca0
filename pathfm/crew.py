"""Threads that share work: some of their own, and the one that waits for it.

A thread that only waits is one more than there are cores when it wakes and asks for what comes next: others then wait
for a core, at times while one is idle.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any


class Share:
    """function(numbers), done once, by whoever is first; what it returns or raises is for all who ask."""

    def __init__(self, function: Callable[[range], Any], numbers: range):
        self._work: tuple | None = (function, numbers)
        self._mine, self._outcome = threading.Lock(), Future()

    def do(self) -> bool:
        """Do it unless somebody has begun it; whether it was done here."""
        if not self._mine.acquire(blocking=False):
            return False
        function, numbers = self._work
        self._work = None
        try:
            self._outcome.set_result(function(numbers))
        except BaseException as why:
            self._outcome.set_exception(why)
            if not isinstance(why, Exception):  # Ctrl-C is for this thread, whoever wanted the share
                raise
        return True

    def done(self) -> bool:
        return self._outcome.done()

    def result(self) -> Any:
        """What it came to; done here where nobody has begun it."""
        self.do()
        return self._outcome.result()


class Crew:
    """`threads` that share work, the caller's among them while it waits in `finish`."""

    def __init__(self, threads: int):
        self.threads, self._waiting = threads, deque()
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="pathfm-decode") if threads > 1 else None

    def begin(self, function: Callable[[range], Any], numbers: range) -> list[Share]:
        """function of consecutive numbers, a share for each thread; done when this returns where there is but one.

        A share may wait, by `result`, for others that wait for nothing in return.
        """
        size = max(1, -(-len(numbers) // self.threads))
        shares = [Share(function, numbers[at : at + size]) for at in range(0, len(numbers), size)]
        for share in shares:
            if self._pool is None:
                share.do()
            else:
                self._waiting.append(share)
                self._pool.submit(self._help)
        return shares

    def finish(self, shares: Iterable[Share]) -> list:
        """What they came to; while others are at them the caller does what else is waiting, which is wanted next."""
        for share in shares:
            while not share.done() and self._help():
                pass
        return [share.result() for share in shares]

    def _help(self) -> bool:
        """Do the share that has waited longest; whether there was one."""
        while self._waiting:
            try:
                share = self._waiting.popleft()
            except IndexError:  # another thread took it
                return False
            if share.do():
                return True
        return False


def crew(threads: int) -> Crew:
    """Of this process; one that was forked has its own."""
    return _crew(os.getpid(), threads)


@lru_cache(maxsize=8)
def _crew(pid: int, threads: int) -> Crew:
    return Crew(threads)
