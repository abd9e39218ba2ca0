"""A fixed grid of tiles over a cohort: what is cut to disk where tiles are not drawn online."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from pathfm import scales
from pathfm.errors import InputError
from pathfm.footprints import Tiling, slides_of, spots
from pathfm.index import SlideIndex
from pathfm.kernels import kernel
from pathfm.positions import SLACK, covered, span
from pathfm.slide import MAX_UPSAMPLE
from pathfm.stream import Tile, TileName, TileStream


class Grid:
    """Every tile of a grid that has enough tissue: slide after slide, mpp after mpp, row after row.

    stride_px   from one tile to the next, in pixels of the tile; tile_px (None) leaves neither gap nor overlap
    others      as in TileStream; mpp is one value or several

    The grid starts at the slide's upper-left corner. A corner off the positions that its mpp is read at (multiples of
    g level-0 pixels) goes to the nearest of them. `table` holds the names: some 200 bytes a tile in memory.
    """

    def __init__(
        self,
        index: SlideIndex,
        tile_px: int = 256,
        mpp: float | Sequence[float] | str = 0.5,
        stride_px: int | None = None,
        min_tissue: float = 0.4,
        max_upsample: float = MAX_UPSAMPLE,
        resample: str = "auto",
    ):
        self.stride_px = int(stride_px or tile_px)
        if self.stride_px < 1:
            raise InputError(f"stride_px={stride_px!r} must be at least one pixel")
        self.law = scales.of(mpp)
        if not isinstance(self.law, scales.Values):
            raise InputError(f"mpp={mpp!r} is no list of values; a grid has one mpp or several")
        self._stream = TileStream(index, tile_px, self.law, min_tissue, 0, False, None, max_upsample, resample)
        self.tile_px, self.min_tissue, self.slides = self._stream.tile_px, self._stream.min_tissue, self._stream.slides
        tiling = Tiling(self.tile_px, self.min_tissue, max_upsample, resample)
        parts = [part for s in range(len(self.slides)) for part in self._of_slide(s, tiling, index.words)]
        self.table = pd.concat(parts, ignore_index=True)
        if self.table.empty:
            raise InputError(f"no tile of the grid has {self.min_tissue:.0%} tissue; take a smaller stride_px")
        self.table["i"] = np.arange(len(self.table))

    def _of_slide(self, s: int, tiling: Tiling, words: np.ndarray) -> list[pd.DataFrame]:
        row = self.slides.iloc[[s]]
        slides = slides_of(row, words, [0])
        found = []
        for mpp in self.law.mpp:
            spot = spots(slides, np.zeros(1, np.int64), np.array([mpp]), tiling).at(0)
            if np.isnan(spot.mpp):
                continue
            step = self.stride_px * spot.mpp / slides.mpp[0]
            xs, ys = (self._corners(length, spot, step) for length in slides.size[0])
            x, y, tissue = _with_tissue(words, *slides.masks[0], xs, ys, spot.side, tiling.min_tissue)
            columns = {"slide_id": row["slide_id"].iloc[0], "x": x, "y": y, "mpp": spot.mpp, "tissue": tissue}
            found.append(pd.DataFrame({**columns, "resampled": bool(spot.resampled)}))
        return found

    @staticmethod
    def _corners(length: int, spot, step: float) -> np.ndarray:
        """Where the grid's tiles begin along one side of a slide."""
        most = span(int(length), float(spot.side), int(spot.grid))
        at = np.round(np.arange(int(length / step) + 1) * step / spot.grid).astype(np.int64)
        return at[at < most] * spot.grid

    @property
    def weights(self) -> dict[float, float]:
        return self._stream.weights

    @property
    def settings(self) -> dict:
        """Every setting, as a record of a run holds them."""
        told = self._stream.settings
        return {**{name: told[name] for name in GRID_SETTINGS}, "stride_px": self.stride_px}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Tile:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Tile]:
        return [Tile(image, *name) for name, image in self._stream._read(numbers, self._named)]

    def name(self, i: int) -> TileName:
        """What tile i is, without reading it."""
        return self._named([i])[0]

    def _named(self, numbers: Iterable[int]) -> list[TileName]:
        return [TileName(*row) for row in self.names(numbers).itertuples(index=False)]

    def names(self, numbers: Iterable[int]) -> pd.DataFrame:
        """One row a tile, as TileStream has them."""
        return self.table.iloc[np.fromiter(numbers, np.int64)]

    def __repr__(self) -> str:
        return f"Grid({len(self)} tiles of {self.tile_px} px at {self.law} um/px, every {self.stride_px} px)"


GRID_SETTINGS = ("slides", "tile_px", "mpp", "min_tissue", "max_upsample", "resample")


@kernel()
def _with_tissue(words, start, stride, cell, xs, ys, side, min_tissue):
    """x, y and tissue share of the squares at every (x, y) that have at least min_tissue."""
    most = len(xs) * len(ys)
    x, y, tissue = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most)
    n = 0
    for j in range(len(ys)):
        for k in range(len(xs)):
            area = covered(words, start, stride, cell, xs[k], ys[j], side)
            if area >= (min_tissue - SLACK) * side * side:
                x[n], y[n], tissue[n] = xs[k], ys[j], min(area / (side * side), 1.0)
                n += 1
    return x[:n], y[:n], tissue[:n]
