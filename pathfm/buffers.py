"""Memory that is used again: of images that nobody holds any more, and of each thread's own work."""

from __future__ import annotations

import threading

import numpy as np

SPARE_BYTES = 32 * 2**20  # of images, kept for the next ones

_SPARE: list[np.ndarray] = []


class _Recycled:
    """Memory of one image, which goes back to `_SPARE` when the last array on it is gone.

    Fresh memory costs a page fault every 4 kB, which adds a fifth to the time that decoding takes.
    """

    def __init__(self, shape: tuple[int, int, int]):
        self.memory = None
        while self.memory is None or self.memory.shape != shape:  # an image of another size is let go
            try:
                self.memory = _SPARE.pop()
            except IndexError:
                self.memory = np.empty(shape, np.uint8)
        self.__array_interface__ = self.memory.__array_interface__

    def __del__(self, spare=_SPARE, most=SPARE_BYTES):
        if self.memory is not None and (len(spare) + 1) * self.memory.nbytes <= most:
            spare.append(self.memory)


def image(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 with anything in it."""
    return np.asarray(_Recycled((height, width, 3)))


class _Scratch(threading.local):
    """Memory of one thread that is used again: a decoded tile, and a canvas to resample from."""

    def __init__(self):
        self._tile = np.empty(0, np.uint8)
        self._canvas = np.empty(0, np.uint8)

    def tile(self, size: int) -> np.ndarray:
        if self._tile.size < size:
            self._tile = np.empty(size, np.uint8)
        return self._tile

    def canvas(self, size: int) -> np.ndarray:
        if self._canvas.size < size:
            self._canvas = np.empty(size, np.uint8)
        return self._canvas


SCRATCH = _Scratch()
