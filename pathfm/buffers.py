"""Memory that is used again: of images that nobody holds any more, and of each thread's own work."""

from __future__ import annotations

import threading

import numpy as np

SPARE_BYTES = 32 * 2**20  # of each kind, kept for the next ones
LINE = 32  # bytes of an AVX2 register; see `decodable`

_SPARE: dict[str, list[np.ndarray]] = {"image": [], "read": [], "decoded": []}


class _Recycled:
    """Memory which goes back to where it is from when the last array on it is gone.

    Fresh memory costs a page fault every 4 kB, which adds a fifth to the time that decoding takes.
    """

    def __init__(self, size: int, spare: list[np.ndarray]):
        self.memory = None
        while self.memory is None or not size <= self.memory.size <= 4 * size:  # what does not fit is let go
            try:
                self.memory = spare.pop()
            except IndexError:
                self.memory = np.empty(size, np.uint8)
        self.spare, self.__array_interface__ = spare, self.memory.__array_interface__

    def __del__(self, most=SPARE_BYTES):
        if self.memory is not None and (len(self.spare) + 1) * self.memory.nbytes <= most:
            self.spare.append(self.memory)


def image(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 with anything in it."""
    size = height * width * 3
    return np.asarray(_Recycled(size, _SPARE["image"]))[:size].reshape(height, width, 3)


def room(purpose: str, size: int) -> np.ndarray:
    """(size,) uint8 with anything in it, for what a batch has "read" or "decoded"."""
    return np.asarray(_Recycled(size + size // 4, _SPARE[purpose]))[:size]  # so that another batch of its kind fits


def decodable(memory: np.ndarray) -> np.ndarray:
    """uint8 memory without its first bytes (31 at most), for libjpeg-turbo to decode into what is read again soon.

    What it writes to a multiple of 32 bytes it writes past the caches (jdcolext-avx2.asm, vmovntdq), and whoever reads
    it next waits for the memory (benchmarks/online_patching.py, addresses). From an odd address on, rows of an even
    number of bytes never lie there.
    """
    return memory[(1 - memory.ctypes.data) % LINE :]


class _Scratch(threading.local):
    """Memory of one thread that is used again, by what it is for."""

    def __init__(self):
        self._kept: dict[str, np.ndarray] = {}

    def of(self, purpose: str, size: int) -> np.ndarray:
        """At least `size` uint8 with anything in them."""
        if purpose not in self._kept or self._kept[purpose].size < size:
            self._kept[purpose] = np.empty(size, np.uint8)
        return self._kept[purpose]


SCRATCH = _Scratch()
