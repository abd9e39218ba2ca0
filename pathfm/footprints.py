"""The square of a slide that a tile covers at an mpp, and which mpp a slide gives: what positions are drawn from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from pathfm.kernels import kernel
from pathfm.positions import BLOCKS, covered_box, extent, summarise
from pathfm.scales import DECIMALS, Continuous, Values
from pathfm.slide import MAX_UPSAMPLE, MPP_TOLERANCE, plan_read

STEPS = 33  # mpp tried on a slide that does not serve either end of a continuous law
HALVINGS = 20  # of the step in which its range ends


class Slides(NamedTuple):
    """What the draws need of S slides. Lengths in level-0 pixels."""

    words: np.ndarray  # (.,) uint64 packed masks of all slides
    masks: np.ndarray  # (S, 3) int64: first word, words per row, cell
    size: np.ndarray  # (S, 2) int64: width, height
    extent: np.ndarray  # (S, 4) int64: left, top, right, bottom of the tissue
    blocks: np.ndarray  # (S, 64) uint64: `positions.summarise` of each mask
    reach: np.ndarray  # (S,) int64: the side of its blocks
    mpp: np.ndarray  # (S,) float64: of level 0
    downsamples: np.ndarray  # (S,) tuples of level-0 px per pixel of each level
    scales: np.ndarray  # (S,) tuples of the fractions 1/scale of its size that a level decodes to
    names: np.ndarray  # (S,) uint64: hash of slide_id, which keys tiles_per_slide

    def only(self, keep: np.ndarray) -> Slides:
        """Some of the slides: a mask or numbers."""
        return Slides(self.words, *(part[keep] for part in self[1:]))


class Spots(NamedTuple):
    """n squares to be placed. No columns or rows where the slide cannot serve."""

    mpp: np.ndarray  # (n,) float64: true um/px, NaN where the slide is too coarse
    resampled: np.ndarray  # (n,) bool
    grid: np.ndarray  # (n,) int64: positions are its multiples, level-0 px
    side: np.ndarray  # (n,) float64: of the footprint, level-0 px
    box: np.ndarray  # (n, 4) int64: first column, columns, first row, rows that proposals come from, in grid steps

    def at(self, n) -> Spots:
        return Spots(*(part[n] for part in self))


class Tiling(NamedTuple):
    """What is asked of every tile."""

    tile_px: int
    min_tissue: float
    max_upsample: float = MAX_UPSAMPLE
    resample: str = "auto"


def slides_of(table: pd.DataFrame, words: np.ndarray, names) -> Slides:
    """From the rows of an index and hashes of the slides' names."""
    masks = table[["mask_start", "mask_words", "cell_px"]].to_numpy(np.int64)
    size = table[["width_px", "height_px"]].to_numpy(np.int64)
    mpp, seen = table["mpp"].to_numpy(np.float64), _seen(words, masks, size)
    scales = table["scales"] if "scales" in table else pd.Series("1", table.index)
    downsamples, scales = _tuples(table["levels"], float), _tuples(scales, int)
    return Slides(words, masks, size, *seen, mpp, downsamples, scales, np.array(names, np.uint64))


def _tuples(column: pd.Series, kind: type) -> np.ndarray:
    """(S,) tuples of the numbers in each text."""
    found = np.empty(len(column), object)
    found[:] = [tuple(kind(part) for part in text.split()) for text in column]
    return found


@kernel()
def _seen(words, masks, size):
    """Extent, blocks and reach of every mask."""
    found, reach = np.empty((len(masks), 4), np.int64), np.empty(len(masks), np.int64)
    blocks = np.zeros((len(masks), BLOCKS), np.uint64)
    for s in range(len(masks)):
        start, stride, cell = masks[s]
        width, height = -(-size[s, 0] // cell), -(-size[s, 1] // cell)
        left, top, right, bottom = extent(words, start, stride, height)
        found[s, 0], found[s, 1], found[s, 2], found[s, 3] = left * cell, top * cell, right * cell, bottom * cell
        reach[s] = cell * summarise(words, start, stride, width, height, blocks[s])
    return found, blocks, reach


def footprint(
    slide_mpp: float,
    downsamples,
    tile_px: int,
    mpp: float,
    max_upsample: float = MAX_UPSAMPLE,
    resample: str = "auto",
    scales: tuple[int, ...] = (1,),
) -> tuple[int, float] | None:
    """(grid, side) in level-0 px of a tile of tile_px pixels at `mpp`, or None where the slide is too coarse.

    The side is that of the tile returned: where a level, or 1/scale of one, passes through, its own mpp counts.
    """
    plan = plan_read(slide_mpp, downsamples, mpp, max_upsample, resample, scales)
    return plan and (plan.grid, tile_px * plan.mpp / slide_mpp)


def spots(slides: Slides, chosen: np.ndarray, asked: np.ndarray, tiling: Tiling) -> Spots:
    """Where a tile at asked[n] um/px may lie on slide chosen[n], both (n,): planned as `Slide` reads it."""
    number = len(chosen)
    mpp, resampled = np.full(number, np.nan), np.zeros(number, bool)
    grid = np.ones(number, np.int64)
    own = slides.mpp[chosen]
    levels, scales = slides.downsamples[chosen], slides.scales[chosen]
    for n, (slide_mpp, value) in enumerate(zip(own.tolist(), asked.tolist(), strict=True)):
        plan = plan_read(slide_mpp, levels[n], value, tiling.max_upsample, tiling.resample, scales[n])
        if plan is not None:
            mpp[n], resampled[n], grid[n] = plan.mpp, plan.resampled, plan.grid
    there = ~np.isnan(mpp)
    side = np.where(there, tiling.tile_px * mpp / own, 1.0)
    box = _boxes(slides.extent[chosen], slides.size[chosen], grid, side, tiling.min_tissue)
    box[~there] = 0
    return Spots(mpp, resampled, grid, side, box)


def _boxes(extents: np.ndarray, size: np.ndarray, grid: np.ndarray, side: np.ndarray, min_tissue: float) -> np.ndarray:
    """(n, 4) first column, columns, first row, rows (grid steps) of a box that holds every admissible position."""
    low, high = extents[:, :2], extents[:, 2:]
    side, grid = side[:, None], grid[:, None]
    last = np.maximum(np.floor((size - side) / grid + 1e-9) + 1, 0) - 1
    first = np.zeros_like(last)
    if min_tissue > 0:  # the tissue must reach min_tissue of the way into the square, on either side
        overlap = min_tissue * side * (1 - 1e-6)
        first = np.maximum(0, np.ceil((low - side + overlap) / grid))
        last = np.minimum(last, np.floor((high - overlap) / grid))
    parts = first, last - first + 1
    return np.stack([parts[0][:, 0], parts[1][:, 0], parts[0][:, 1], parts[1][:, 1]], axis=1).astype(np.int64)


def tissue_share(slides: Slides, s: int, x: int, y: int, side: float) -> float:
    """The share of any square of slide number s that is tissue; what lies beyond the slide has none."""
    (width, height), left, top = slides.size[s], max(x, 0), max(y, 0)
    across, down = min(x + side, width) - left, min(y + side, height) - top
    if across <= 0 or down <= 0:
        return 0.0
    return min(covered_box(slides.words, *slides.masks[s], left, top, float(across), float(down)) / side**2, 1.0)


class Listed:
    """A mixture of M values: tables of S x M spots, and weights renormalised over what each slide serves."""

    def __init__(self, slides: Slides, law: Values, tiling: Tiling):
        self.law, number = law, len(slides.names)
        self.shape = number, len(law.mpp)
        chosen = np.repeat(np.arange(number), len(law.mpp))
        self.spots = spots(slides, chosen, np.tile(law.mpp, number), tiling)

    def settle(self, serves) -> np.ndarray:
        """(S,) whether a slide serves anything; serves(s, spot) says it of one spot."""
        values = self.shape[1]
        self.serves = np.array(
            [[serves(s, self.spots.at([s * values + m])) for m in range(values)] for s in range(self.shape[0])]
        )
        self.share = np.cumsum(self.serves * np.array(self.law.share), axis=1)
        return self.serves.any(axis=1)

    @property
    def whole(self) -> np.ndarray:
        """(S,) whether a slide serves all of the law."""
        return self.serves.all(axis=1)

    def only(self, keep: np.ndarray) -> Listed:
        """The tables of some of the slides."""
        found = object.__new__(Listed)
        found.law, found.serves, found.share = self.law, self.serves[keep], self.share[keep]
        found.shape = found.serves.shape
        found.spots = self.spots.at(np.repeat(keep, self.shape[1]))
        return found

    def __call__(self, slide: np.ndarray, u: np.ndarray) -> Spots:
        """(n,) spots of slides and numbers in [0, 1)."""
        share = self.share[slide]
        m = (share <= (u * share[:, -1])[:, None]).sum(axis=1)
        return self.spots.at(slide * self.shape[1] + m)

    def missing(self, s: int) -> str:
        """What a slide does not serve, in words."""
        return ", ".join(f"{self.law.mpp[m]:g}" for m in np.flatnonzero(~self.serves[s])) + " um/px"

    def limits(self) -> np.ndarray:
        """(S, 2) least and greatest mpp that each slide serves."""
        values = np.array(self.law.mpp)
        ends = np.where(self.serves, values, np.inf).min(axis=1), np.where(self.serves, values, 0).max(axis=1)
        return np.stack(ends, axis=1)

    def mixture(self, weight: np.ndarray) -> pd.DataFrame:
        """mpp, its declared and achieved share, and how many slides serve it; weight (S,) is each slide's share."""
        own = self.serves * np.array(self.law.share)
        achieved = weight @ (own / own.sum(axis=1, keepdims=True))
        columns = {"mpp": self.law.mpp, "declared": self.law.share, "achieved": achieved}
        return pd.DataFrame({**columns, "slides": self.serves.sum(axis=0)})


class Ranged:
    """A continuous law, on each slide the law given low[s] <= mpp <= high[s], the range that the slide serves.

    The range ends where the slide is too coarse, where a tile no longer fits, or where none has enough tissue: the
    least and the greatest of STEPS values (equal in log mpp) that serve, and then HALVINGS of the step beyond. Within
    it an mpp without an admissible position is drawn anew (`Sampler`). Drawn values have DECIMALS decimals; one that a
    level passes through within 1 % becomes that level's mpp, as everywhere, unless resample="always".
    """

    def __init__(self, slides: Slides, law: Continuous, tiling: Tiling):
        self.slides, self.law, self.tiling = slides._replace(words=None), law, tiling

    def settle(self, serves) -> np.ndarray:
        """(S,) whether a slide serves anything; serves(s, spot) says it of one spot."""
        number = len(self.slides.names)
        self.low, self.high = np.full(number, np.nan), np.full(number, np.nan)
        for s in range(number):
            found = self._range(s, serves)
            if found is not None:
                self.low[s], self.high[s] = found
        there = ~np.isnan(self.low)
        below, up_to = np.zeros(number), np.zeros(number)
        below[there], up_to[there] = self.law.before(self.low[there]), self.law.cdf(self.high[there])
        self.below, self.up_to = below, up_to
        return self.up_to > self.below

    def _range(self, s: int, serves) -> tuple[float, float] | None:
        own, unit = float(self.slides.mpp[s]), 10.0**-DECIMALS
        finest = own * min(1 / self.tiling.max_upsample, 1 - MPP_TOLERANCE)
        coarsest = own * float(self.slides.size[s].min()) / self.tiling.tile_px
        low = max(self.law.low, round(np.ceil(finest / unit) * unit, DECIMALS))
        high = min(self.law.high, round(np.floor(coarsest / unit) * unit, DECIMALS))
        if low > high:
            return None

        def there(mpp: float) -> bool:
            return serves(s, spots(self.slides, np.array([s]), np.array([mpp]), self.tiling))

        if there(low) and there(high):
            return low, high
        steps = np.geomspace(low, high, STEPS)
        steps[[0, -1]] = low, high
        good = np.flatnonzero([there(mpp) for mpp in steps])
        if not len(good):
            return None
        ends = []
        for inside, outside in ((good[0], good[0] - 1), (good[-1], good[-1] + 1)):
            yes, no = steps[inside], steps[np.clip(outside, 0, STEPS - 1)]
            for _ in range(HALVINGS if yes != no else 0):
                middle = (yes + no) / 2
                yes, no = (middle, no) if there(middle) else (yes, middle)
            ends.append(yes)
        return tuple(ends)

    @property
    def whole(self) -> np.ndarray:
        """(S,) whether a slide serves all of the law."""
        return (self.low == self.law.low) & (self.high == self.law.high)

    def only(self, keep: np.ndarray) -> Ranged:
        """The ranges of some of the slides."""
        found = Ranged(self.slides.only(keep), self.law, self.tiling)
        for name in ("low", "high", "below", "up_to"):
            setattr(found, name, getattr(self, name)[keep])
        return found

    def __call__(self, slide: np.ndarray, u: np.ndarray) -> Spots:
        """(n,) spots of slides and numbers in [0, 1)."""
        below = self.below[slide]
        drawn = self.law.quantile(below + u * (self.up_to[slide] - below))
        drawn = np.clip(np.round(drawn, DECIMALS), self.low[slide], self.high[slide])
        return spots(self.slides, slide, drawn, self.tiling)

    def missing(self, s: int) -> str:
        """What a slide does not serve, in words."""
        if np.isnan(self.low[s]):
            return f"{self.law.low:g} to {self.law.high:g} um/px"
        return f"{self.law.low:g} to {self.law.high:g} um/px but from {self.low[s]:g} to {self.high[s]:g}"

    def limits(self) -> np.ndarray:
        """(S, 2) least and greatest mpp that each slide serves."""
        return np.stack([self.low, self.high], axis=1)

    def mixture(self, weight: np.ndarray) -> pd.DataFrame:
        """Per bin of the law from "low" to "high": mpp (its middle), its declared and achieved share, slides in it.

        Achieved counts the mpp drawn, before a level passes through and without draws that were repeated.
        """
        edges, at = self.law.bins, self.law.at_bins
        inside = np.clip(at, self.below[:, None], self.up_to[:, None])
        own = np.diff(inside, axis=1) / (self.up_to - self.below)[:, None]
        columns = {"mpp": np.sqrt(edges[1:] * edges[:-1]), "low": edges[:-1], "high": edges[1:]}
        columns |= {"declared": np.diff(at), "achieved": weight @ own, "slides": (own > 0).sum(axis=0)}
        return pd.DataFrame(columns)
