"""TileStream: the cohort as an endless dataset, addressed by number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from pathfm.errors import InputError
from pathfm.index import SlideIndex
from pathfm.positions import span
from pathfm.sampling import Sampler, Tables
from pathfm.slide import MAX_UPSAMPLE, ReadPlan, plan_read

ENDLESS = 2**53


class Tile(NamedTuple):
    """A tile and its name. The default collate of a DataLoader makes batches of it."""

    image: np.ndarray  # (tile_px, tile_px, 3) uint8
    slide_id: str
    x: int  # of the upper-left corner, level-0 px
    y: int
    mpp: float  # true microns per pixel
    tissue: float  # share of the footprint that is tissue
    resampled: bool  # False where a level's own pixels were returned
    i: int


class TileName(NamedTuple):
    """All of a Tile but its pixels."""

    slide_id: str
    x: int
    y: int
    mpp: float
    tissue: float
    resampled: bool
    i: int


class TileStream:
    """`stream[i]` is tile i: a pure function of the index, these settings and i.

    index            a SlideIndex; its usable slides, or a subset's
    tile_px          side of a tile in pixels
    mpp              microns per pixel: a value, several (equal weights), or {value: weight}
    min_tissue       least share of the footprint's area that is tissue
    seed             another seed, another stream
    common_mpp       keep only slides that serve every mpp; otherwise weights are renormalised on each slide
    tiles_per_slide  draw among this many fixed (mpp, position) pairs per slide; fewer are a subset of more
    max_upsample     how much finer than the slide an mpp may be
    resample         "auto" returns a level within 1 % of the mpp as it is; "always" filters every tile alike

    Order of draws: slide, then mpp given the slide, then position given both. Each round of N tiles sees each
    of the N slides once; slides weigh the same whatever their area, so a position on a biopsy is drawn more
    often than one on a resection. Positions are uniform over the admissible ones (`pathfm.sampling.Sampler`).

    `slides` lists the slides in the stream, `left_out` the others with the reason, `mixture` the achieved mpp.
    """

    def __init__(
        self,
        index: SlideIndex,
        tile_px: int = 256,
        mpp: float | Sequence[float] | dict[float, float] = 0.5,
        min_tissue: float = 0.4,
        seed: int = 0,
        common_mpp: bool = False,
        tiles_per_slide: int | None = None,
        max_upsample: float = MAX_UPSAMPLE,
        resample: str = "auto",
    ):
        _check(tile_px, min_tissue, tiles_per_slide, max_upsample)
        self.index, self.tile_px, self.min_tissue, self.seed = index, int(tile_px), float(min_tissue), int(seed)
        self.common_mpp, self.tiles_per_slide = common_mpp, tiles_per_slide
        self.max_upsample, self.resample = max_upsample, resample
        self.weights = _mixture(mpp)
        usable = index.usable
        if usable.empty:
            raise InputError("the index has no usable slide; see index.slides for the reasons")
        plans = [
            [plan_read(row.mpp, _downsamples(row), value, max_upsample, resample) for value in self.weights]
            for row in usable.itertuples()
        ]
        self._keep(usable, plans, self._tables(usable, plans))

    def _tables(self, usable: pd.DataFrame, plans: list[list[ReadPlan | None]]) -> Tables:
        """The draws' arrays for every usable slide, whether it turns out to serve or not."""
        shape = len(usable), len(self.weights)
        box, grid, side = np.zeros((*shape, 4), np.int64), np.ones(shape, np.int64), np.ones(shape)
        for s, row in enumerate(usable.itertuples()):
            extent = _extent(row, self.index)
            for m, plan in enumerate(plans[s]):
                if plan is not None:
                    grid[s, m], side[s, m] = plan.grid, self.tile_px * plan.mpp / row.mpp
                    box[s, m] = _box(row, extent, grid[s, m], side[s, m], self.min_tissue)
        return Tables(
            words=self.index.words,
            masks=usable[["mask_start", "mask_words", "cell_px"]].to_numpy(np.int64),
            size=usable[["width_px", "height_px"]].to_numpy(np.int64),
            box=box,
            grid=grid,
            side=side,
            share=np.zeros(shape),
            names=np.array([_hash(name) for name in usable["slide_id"]], np.uint64),
        )

    def _keep(self, usable: pd.DataFrame, plans: list[list[ReadPlan | None]], tables: Tables) -> None:
        """Leave out slides that serve nothing (with common_mpp: not all), and weigh what the others serve."""
        values, declared = list(self.weights), np.array(list(self.weights.values()))
        sampler = Sampler(tables, self.min_tissue, self.seed, self.tiles_per_slide)
        serves = np.array([[sampler.serves(s, m) for m in range(len(values))] for s in range(len(usable))])
        keep = serves.all(axis=1) if self.common_mpp else serves.any(axis=1)
        reasons = [
            "no admissible position at " + ", ".join(f"{values[m]:g}" for m in np.flatnonzero(~row)) + " um/px"
            for row in serves[~keep]
        ]
        self.left_out = usable.loc[~keep, ["slide_id"]].assign(reason=reasons).reset_index(drop=True)
        if not keep.any():
            raise InputError(
                f"no slide serves a tile of {self.tile_px} px with min_tissue={self.min_tissue:g}; the first: "
                f"slide '{self.left_out['slide_id'][0]}' has {reasons[0]}. Ask for smaller tiles, another mpp, "
                "less tissue, or a higher max_upsample"
            )
        self.slides = usable[keep].reset_index(drop=True)
        self._ids = self.slides["slide_id"].to_numpy(object)
        kept = [plans[s] for s in np.flatnonzero(keep)]
        self._true_mpp = np.array([[plan.mpp if plan else np.nan for plan in row] for row in kept])
        self._resampled = np.array([[plan.resampled if plan else False for plan in row] for row in kept])
        self._serves = serves[keep]
        by_slide = {name: getattr(tables, name)[keep] for name in Tables._fields if name != "words"}
        by_slide["share"] = np.cumsum(self._serves * declared, axis=1)
        tables = Tables(words=tables.words, **by_slide)
        self._sampler = Sampler(tables, self.min_tissue, self.seed, self.tiles_per_slide)

    @property
    def mixture(self) -> pd.DataFrame:
        """mpp, declared weight, achieved weight (expected over the stream), and how many slides serve it."""
        declared = np.array(list(self.weights.values()))
        own = self._serves * declared
        achieved = (own / own.sum(axis=1, keepdims=True)).mean(axis=0)
        return pd.DataFrame(
            {
                "mpp": list(self.weights),
                "declared": declared,
                "achieved": achieved,
                "slides": self._serves.sum(axis=0),
            }
        )

    def positions(self) -> pd.DataFrame:
        """The exact number of admissible positions, slide by mpp."""
        counts = [
            [self._sampler.count(s, m) if serves else 0 for m, serves in enumerate(row)]
            for s, row in enumerate(self._serves)
        ]
        return pd.DataFrame(counts, index=self.slides["slide_id"], columns=list(self.weights))

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Tile:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Tile]:
        """The tiles of these numbers, planned together."""
        return [Tile(self._read(name), *name) for name in self._named(numbers)]

    def name(self, i: int) -> TileName:
        """What tile i is, without reading it."""
        return self._named([i])[0]

    def names(self, numbers: Iterable[int]) -> pd.DataFrame:
        """One row a tile: slide_id, x, y, mpp, tissue, resampled, i. No pixel is touched."""
        return pd.DataFrame(self._columns(numbers))

    def _named(self, numbers: Iterable[int]) -> list[TileName]:
        columns = [column.tolist() for column in self._columns(numbers).values()]
        return [TileName(*row) for row in zip(*columns, strict=True)]

    def _columns(self, numbers: Iterable[int]) -> dict[str, np.ndarray]:
        numbers = np.fromiter(numbers, np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < ENDLESS):
            raise IndexError(f"tile numbers lie between 0 and {ENDLESS - 1}")
        drawn = self._sampler(numbers)
        return {
            "slide_id": self._ids[drawn.slide],
            "x": drawn.x,
            "y": drawn.y,
            "mpp": self._true_mpp[drawn.slide, drawn.mpp],
            "tissue": drawn.tissue,
            "resampled": self._resampled[drawn.slide, drawn.mpp],
            "i": numbers,
        }

    def _read(self, name: TileName) -> np.ndarray:
        slide = self.index.slide(name.slide_id)
        return slide.read(name.x, name.y, self.tile_px, name.mpp, self.max_upsample, self.resample)

    def __getstate__(self) -> dict:
        """Without the masks: another process maps them itself."""
        tables = self._sampler.tables._replace(words=None)
        sampler = Sampler(tables, self.min_tissue, self.seed, self.tiles_per_slide)
        return {**self.__dict__, "_sampler": sampler}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._sampler.tables = self._sampler.tables._replace(words=self.index.words)

    def __repr__(self) -> str:
        mpp = ", ".join(f"{value:g}" for value in self.weights)
        return f"TileStream({len(self.slides)} slides, {self.tile_px} px at {mpp} um/px, seed {self.seed})"


def _check(tile_px, min_tissue, tiles_per_slide, max_upsample) -> None:
    if not (isinstance(tile_px, int | np.integer) and tile_px > 0):
        raise InputError(f"tile_px={tile_px!r} is no positive whole number of pixels")
    if not 0 <= min_tissue <= 1:
        raise InputError(f"min_tissue={min_tissue!r} is no share between 0 and 1")
    if tiles_per_slide is not None and not tiles_per_slide > 0:
        raise InputError(f"tiles_per_slide={tiles_per_slide!r} is not positive; None draws without a limit")
    if not max_upsample >= 1:
        raise InputError(f"max_upsample={max_upsample!r} is below 1; 1 allows no upsampling")


def _mixture(mpp) -> dict[float, float]:
    """mpp -> weight, the weights summing to 1."""
    weights = mpp if isinstance(mpp, dict) else dict.fromkeys(np.atleast_1d(mpp).tolist(), 1.0)
    weights = {float(value): float(weight) for value, weight in weights.items()}
    if not weights or any(not (value > 0 and weight > 0) for value, weight in weights.items()):
        raise InputError(f"mpp={mpp!r}: give a positive number, several, or {{mpp: positive weight}}")
    total = sum(weights.values())
    return {value: weight / total for value, weight in weights.items()}


def _downsamples(row) -> list[float]:
    return [float(d) for d in row.levels.split()]


def _extent(row, index: SlideIndex) -> tuple[int, int, int, int]:
    """The box of a slide's tissue in level-0 px: left, top, right, bottom."""
    mask, _ = index.mask(row.slide_id)
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    cell = row.cell_px
    return columns[0] * cell, rows[0] * cell, (columns[-1] + 1) * cell, (rows[-1] + 1) * cell


def _box(row, extent, grid: int, side: float, min_tissue: float) -> list[int]:
    """First column, columns, first row, rows (grid steps) of a box that holds every admissible position."""
    box = []
    for low, high, length in (extent[0::2] + (row.width_px,), extent[1::2] + (row.height_px,)):
        last = span(length, side, grid) - 1
        first = 0
        if min_tissue > 0:  # the tissue must reach min_tissue of the way into the square, on either side
            overlap = min_tissue * side * (1 - 1e-6)
            first = max(0, int(np.ceil((low - side + overlap) / grid)))
            last = min(last, int(np.floor((high - overlap) / grid)))
        box += [first, last - first + 1]
    return box


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
