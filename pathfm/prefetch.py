"""Reads begun before they are asked for, where what is asked for goes on evenly."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from pathfm.errors import InputError

TILES = 384  # on their way or waiting, at most: one or two windows each, so that 192 are in flight; or one batch
BYTES = 64 * 2**20  # compressed, of these tiles; or those of one batch

Begin = Callable[[Sequence[int]], tuple[Any, int]]  # numbers -> a read under way, the bytes it has asked for


class Prefetch:
    """What is begun for the numbers that are likely to be asked for next.

    A loader asks for batches of numbers that lie evenly apart, in a worker of four as in the only process: 0..63,
    256..319, ... After three such batches the next one is begun when one is handed out; then two, four, ... until TILES
    or BYTES are reached. Other numbers are begun when they are asked for, and what was begun for none is let go. So
    an even walk through a cohort that lies elsewhere waits for its bytes three times, and from then on they come while
    it decodes; where several threads decode what lies on a disk, all but one go on with a batch while another is used.

    This changes when bytes are asked for, and never what is returned: no number depends on what was asked before.
    """

    def __init__(self):
        self._begun: dict[tuple[int, ...], tuple[Any, int]] = {}
        self._last: tuple[int, ...] = ()
        self._step, self._depth, self._lock, self._process = 0, 0, threading.Lock(), os.getpid()

    def __call__(self, numbers: Sequence[int], begin: Begin, most: int = TILES) -> Any:
        """The read of these numbers, begun now or before; `most` batches ahead of it.

        What it raises for numbers that are only likely is raised when, and if, they are asked for.
        """
        numbers = tuple(int(i) for i in numbers)
        with self._lock:
            if self._process != os.getpid():  # the threads of a forked process's parent are not here
                self._begun.clear()
                self._process = os.getpid()
            found = self._begun.pop(numbers, None)
            if found is None:
                self._begun.clear()
                self._depth = 0
                found = begin(numbers)
            before, self._step = self._step, _step(self._last, numbers)
            self._last = numbers
            if self._step == before != 0:
                self._depth = min(max(1, 2 * self._depth), most)
                self._look(numbers, begin)
            return found[0]

    def _look(self, numbers: tuple[int, ...], begin: Begin) -> None:
        waiting = self._begun.values()
        for k in range(len(waiting) + 1, self._depth + 1):
            likely = tuple(i + k * self._step for i in numbers)
            if waiting and (len(waiting) * len(numbers) >= TILES or sum(size for _, size in waiting) >= BYTES):
                return
            try:
                self._begun[likely] = begin(likely)
            except (InputError, IndexError):
                return

    def __reduce__(self) -> tuple:
        """A copy, here or in another process, has begun nothing."""
        return Prefetch, ()


def _step(last: tuple[int, ...], numbers: tuple[int, ...]) -> int:
    """How far numbers lie beyond the last ones, if it is the same for all; else 0."""
    steps = {now - then for now, then in zip(numbers, last, strict=False)}
    return steps.pop() if len(steps) == 1 and len(last) == len(numbers) else 0
