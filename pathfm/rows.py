"""Rows of features that pass through memory a block at a time, so that a set needs far less of it than it has bytes."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

import numpy as np

from pathfm.errors import InputError

BLOCK_BYTES = 2**22  # of float32 rows that are worked on at once; they stay in a processor's cache
HELD_BYTES = 2**25  # of a memory-mapped file that stay mapped before its pages are given back


class Rows:
    """Some rows of features (N, D), memory-mapped or in memory, of float16, float32 or wider; read as float32.

    which   numbers of the rows, or a mask (N,); None takes all
    change  (b, D) float32 to (b, D), what is done to the rows on their way

    Raises InputError where x is no matrix.
    """

    def __init__(
        self, x: np.ndarray, which: np.ndarray | None = None, change: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        self.x, self.change = x if isinstance(x, np.ndarray) else np.asarray(x, np.float32), change
        if self.x.ndim != 2 or 0 in self.x.shape:
            raise InputError(f"features must be a matrix (N tiles, D features), not of shape {self.x.shape}")
        self.which = np.arange(len(self.x)) if which is None else np.arange(len(self.x))[which]
        self._touched = 0  # bytes of the file, since its pages were given back

    @classmethod
    def of(cls, x: np.ndarray | Rows) -> Rows:
        """All rows of an array; Rows as they are."""
        return x if isinstance(x, Rows) else cls(x)

    def __len__(self) -> int:
        return len(self.which)

    @property
    def d(self) -> int:
        """How many features a row has."""
        return self.x.shape[1]

    def __getitem__(self, places: np.ndarray | slice) -> np.ndarray:
        """(b, D) float32, a copy, of places among these rows.

        The pages of a mapped file are given back on the way: they stay in the system's cache, not in this process.
        """
        which = self.which[places]
        found = self.x[which].astype(np.float32, copy=False)
        self._touched += int(np.ptp(which) + 1) * abs(self.x.strides[0])  # with what a system maps around a row
        if self._touched > HELD_BYTES:
            release(self.x)
            self._touched = 0
        return found if self.change is None else self.change(found)

    def take(self, places: np.ndarray) -> Rows:
        """Those of these rows that a mask or numbers say."""
        return Rows(self.x, self.which[places], self.change)

    def changed(self, change: Callable[[np.ndarray], np.ndarray]) -> Rows:
        """The same rows, with one more change."""
        before = self.change
        return Rows(self.x, self.which, change if before is None else lambda x: change(before(x)))

    def blocks(self, rows: int = 0) -> Iterator[tuple[slice, np.ndarray]]:
        """Places and float32 rows (b, D), until all had their turn; `rows` at once, 0: of BLOCK_BYTES."""
        rows = rows or max(1, BLOCK_BYTES // (4 * self.d))
        for start in range(0, len(self), rows):
            places = slice(start, min(start + rows, len(self)))
            yield places, self[places]
        release(self.x)

    def mean(self) -> np.ndarray:
        """(D,) float32, summed in float64."""
        return (sum(block.sum(axis=0, dtype=np.float64) for _, block in self.blocks()) / len(self)).astype(np.float32)

    def finite(self) -> Rows:
        """Itself. Raises InputError where a row holds NaN or infinity."""
        bad = np.concatenate([~np.isfinite(block).all(axis=1) for _, block in self.blocks()])
        if bad.any():
            first = self.which[bad.argmax()]
            raise InputError(f"{bad.sum()} of {len(self)} feature rows hold NaN or infinity, first row {first}")
        return self


def release(x: np.ndarray) -> None:
    """Gives back the pages of a mapped file that is only read; anything else is left as it is."""
    if isinstance(x, np.memmap) and x.mode == "r" and x._mmap is not None:
        x._mmap.madvise(mmap.MADV_DONTNEED)
