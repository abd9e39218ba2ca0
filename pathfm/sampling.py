"""Which tile is tile i: slide, then mpp given the slide, then position given both. No pixel is touched.

Every draw comes from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed
by the seed and counted by i, so that tile i needs nothing but the stored masks and a few numbers per slide.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numba import njit

from pathfm.cohort import patient_of
from pathfm.errors import InputError
from pathfm.positions import SLACK, covered, integral, least_area, search, unpack
from pathfm.slide import MAX_UPSAMPLE, plan_read

TRIES = 256  # proposals before the admissible set is enumerated instead; both are uniform over it
ROUNDS = 40  # of swap-or-not; each halves what is left of the order before
SLIDE, MPP, PLACE, RANK, PAIR = (np.uint64(k << 32) for k in range(5))  # purposes: upper half of the counter
_LOW, _HALF, _ONE = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(1)


@njit(cache=True, nogil=True)
def philox(key: np.uint64, low: np.uint64, high: np.uint64):
    """Two 64-bit random words for a 64-bit key and a 128-bit counter (low, high)."""
    c0, c1, c2, c3 = low & _LOW, low >> _HALF, high & _LOW, high >> _HALF
    k0, k1 = key & _LOW, key >> _HALF
    for _ in range(10):
        one, two = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (two >> _HALF) ^ c1 ^ k0, two & _LOW, (one >> _HALF) ^ c3 ^ k1, one & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return c0 | (c1 << _HALF), c2 | (c3 << _HALF)


@njit(cache=True, nogil=True)
def _fair(word: np.uint64, number: np.uint64) -> bool:
    """Whether word % number is unbiased: the first 2^64 mod number words are redrawn."""
    return word >= (np.uint64(0) - number) % number


@njit(cache=True, nogil=True)
def below(key, i, purpose, number):
    """A whole number in [0, number), every one equally likely."""
    counter, number = purpose, np.uint64(number)
    word, _ = philox(key, i, counter)
    while not _fair(word, number):
        counter += _ONE
        word, _ = philox(key, i, counter)
    return np.int64(word % number)


@njit(cache=True, nogil=True)
def unit(key, i, purpose) -> float:
    """A number in [0, 1) with 53 random bits."""
    word, _ = philox(key, i, purpose)
    return np.float64(np.int64(word >> np.uint64(11))) * 2.0**-53


@njit(cache=True, nogil=True)
def permuted(key, turn, j, number):
    """Where j goes in permutation number `turn` of range(number).

    Swap-or-not (Hoang, Morris, Rogaway 2012): any number of slides, no table, the same cost for 10 as for 30,000.
    """
    for k in range(ROUNDS):
        draw = SLIDE + np.uint64(2 * k)
        word, _ = philox(key, turn, draw)
        other = np.int64(word % np.uint64(number)) - j
        if other < 0:
            other += number
        pair = np.uint64(max(j, other))
        coin, _ = philox(key ^ (pair << _HALF) ^ pair, turn, draw + _ONE)
        if coin & _ONE:
            j = other
    return j


class Tables(NamedTuple):
    """What the draws need, as arrays: S slides, M values of mpp. Lengths in level-0 pixels."""

    words: np.ndarray  # (.,) uint64 packed masks of all slides
    masks: np.ndarray  # (S, 3) int64: first word, words per row, cell
    size: np.ndarray  # (S, 2) int64: width, height
    box: np.ndarray  # (S, M, 4) int64: first column, columns, first row, rows that proposals come from, in grid steps
    grid: np.ndarray  # (S, M) int64
    side: np.ndarray  # (S, M) float64: of the footprint
    share: np.ndarray  # (S, M) float64: cumulative weights of the mixture on this slide; 0 where it serves none
    names: np.ndarray  # (S,) uint64: hash of slide_id, which keys tiles_per_slide


@njit(cache=True, nogil=True)
def propose(key, i, words, masks, box, grid, side, min_tissue):
    """(x, y, tissue fraction) of the first admissible of TRIES uniform proposals, or x = -1."""
    start, stride, cell = masks
    x0, columns, y0, rows = box
    if columns <= 0 or rows <= 0:
        return -1, -1, 0.0
    need = (min_tissue - SLACK) * side * side
    for attempt in range(TRIES):
        one, two = philox(key, i, PLACE + np.uint64(attempt))
        if not (_fair(one, np.uint64(columns)) and _fair(two, np.uint64(rows))):
            continue
        x = grid * (x0 + np.int64(one % np.uint64(columns)))
        y = grid * (y0 + np.int64(two % np.uint64(rows)))
        area = covered(words, start, stride, cell, x, y, side)
        if area >= need:
            return x, y, min(area / (side * side), 1.0)
    return -1, -1, 0.0


@njit(cache=True, nogil=True)
def draw(numbers, key, words, masks, box, grid, side, share, names, min_tissue, tiles_per_slide, out, tissue):
    """Fill out (n, 4): slide, mpp number, x, y (-1 where proposals failed), keys (n, 2) and tissue (n,)."""
    slides = len(masks)
    for n in range(len(numbers)):
        i = numbers[n]
        turn = i // np.uint64(slides)
        s = permuted(key, turn, np.int64(i % np.uint64(slides)), slides)
        own, at = key, i
        if tiles_per_slide > 0:
            at = np.uint64(below(key, i, PAIR, tiles_per_slide))
            own, _ = philox(key, names[s], PAIR)
        u, m = unit(own, at, MPP) * share[s, -1], 0
        while share[s, m] <= u:
            m += 1
        x, y, fraction = propose(own, at, words, masks[s], box[s, m], grid[s, m], side[s, m], min_tissue)
        out[n, 0], out[n, 1], out[n, 2], out[n, 3] = s, m, x, y
        tissue[n] = fraction


class Draws(NamedTuple):
    """n tiles as arrays: slide and mpp as numbers into the stream's tables, x, y in level-0 px, tissue 0..1."""

    slide: np.ndarray
    mpp: np.ndarray
    x: np.ndarray
    y: np.ndarray
    tissue: np.ndarray


class Sampler:
    """Draws tiles from `Tables`; the same i gives the same tile in any order, process and batch.

    Slides come by a keyed permutation: each round of S tiles sees each of S slides once. Slides weigh the
    same whatever their area, so a position on a biopsy is drawn more often than one on a resection.
    Given slide and mpp, the position is uniform over the admissible set: a proposal uniform over a box that
    holds the set is accepted when admissible; after TRIES failures the set is counted exactly and one of it
    drawn by rank. Both are uniform, hence so is their mixture, also where a single position is admissible.
    """

    def __init__(self, tables: Tables, min_tissue: float, seed: int, tiles_per_slide: int | None):
        self.tables, self.min_tissue = tables, float(min_tissue)
        self.key = np.uint64(int(seed) % 2**64)
        self.tiles_per_slide = int(tiles_per_slide or 0)
        self._enumerated = lru_cache(8)(self._sums)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_enumerated"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._enumerated = lru_cache(8)(self._sums)

    def __call__(self, numbers) -> Draws:
        """The tiles of these i (each >= 0)."""
        numbers = np.asarray(numbers, np.uint64)
        out, tissue = np.empty((len(numbers), 4), np.int64), np.empty(len(numbers))
        t = self.tables
        draw(
            numbers, self.key, t.words, t.masks, t.box, t.grid, t.side, t.share, t.names,
            self.min_tissue, self.tiles_per_slide, out, tissue,
        )  # fmt: skip
        for n in np.flatnonzero(out[:, 2] < 0):
            out[n, 2:], tissue[n] = self._by_rank(numbers[n], *out[n, :2])
        return Draws(out[:, 0], out[:, 1], out[:, 2], out[:, 3], tissue)

    def count(self, slide: int, mpp: int) -> int:
        """The exact number of admissible positions."""
        return self._search(slide, mpp, -1)[0]

    def serves(self, slide: int, mpp: int) -> bool:
        """Whether there is any admissible position; a few proposals settle it for nearly every slide."""
        t = self.tables
        x, _, _ = propose(
            self.key, np.uint64(0), t.words, t.masks[slide], t.box[slide, mpp], t.grid[slide, mpp],
            t.side[slide, mpp], self.min_tissue,
        )  # fmt: skip
        return x >= 0 or self._search(slide, mpp, 0)[1] >= 0

    def _by_rank(self, i: np.uint64, s: int, m: int) -> tuple[tuple[int, int], float]:
        t, key = self.tables, self.key
        if self.tiles_per_slide:
            i = np.uint64(below(key, i, PAIR, self.tiles_per_slide))
            key = np.uint64(philox(key, t.names[s], PAIR)[0])
        rank = below(key, i, RANK, self.count(s, m))
        _, x, y = self._search(s, m, rank)
        start, stride, cell = t.masks[s]
        side = t.side[s, m]
        return (x, y), min(covered(t.words, start, stride, cell, x, y, side) / side**2, 1.0)

    def _search(self, s: int, m: int, wanted: int) -> tuple[int, int, int]:
        t = self.tables
        side, grid = t.side[s, m], int(t.grid[s, m])
        columns, rows = t.box[s, m, 1] + t.box[s, m, 0], t.box[s, m, 3] + t.box[s, m, 2]
        if min(t.box[s, m, 1], t.box[s, m, 3]) <= 0:
            return 0, -1, -1
        need = least_area(side, self.min_tissue)
        return search(self._enumerated(int(s)), int(t.masks[s, 2]), columns, rows, side, grid, need, wanted)

    def _sums(self, s: int) -> np.ndarray:
        start, stride, cell = self.tables.masks[s]
        width, height = -(-self.tables.size[s] // cell)
        words = self.tables.words[start : start + height * stride].reshape(height, stride)
        return integral(unpack(words, int(width)))


def footprint(
    slide_mpp: float,
    downsamples,
    tile_px: int,
    mpp: float,
    max_upsample: float = MAX_UPSAMPLE,
    resample: str = "auto",
) -> tuple[int, float] | None:
    """(grid, side) in level-0 px of a tile of tile_px pixels at `mpp`, or None where the slide is too coarse.

    The side is that of the tile returned: where a level within 1 % passes through, its own mpp counts.
    """
    plan = plan_read(slide_mpp, downsamples, mpp, max_upsample, resample)
    return plan and (plan.grid, tile_px * plan.mpp / slide_mpp)


def audit(stream, numbers) -> dict[str, pd.DataFrame]:
    """What a run that used these tile numbers (a range) saw; no pixel is read.

    "centre", "patient"   tiles, their share, and the share of slides: equal when every slide weighs the same
    "mpp"                 tiles and share beside the declared share
    "tissue"              tiles by share of tissue
    "slides"              per slide: tiles, tissue_mm2, coverage (share of its tissue seen at least once),
                          overlap (share of what was read that had been read before), disjoint_tiles (area seen
                          over the area of a tile)
    "class"               where synthetic truth lies beside the slides: share of the area seen, and of the tissue
    """
    tiles = stream.names(numbers)
    slides = stream.slides.set_index("slide_id", drop=False)
    facts = pd.DataFrame({"patient": patient_of(slides)})
    if "centre" in slides:
        facts["centre"] = slides["centre"].fillna("unknown")
    tables = {name: _shares(tiles["slide_id"].map(facts[name]), facts[name]) for name in facts}
    tables["mpp"] = _by_mpp(tiles, stream)
    steps = pd.cut(tiles["tissue"], [0, 0.4, 0.6, 0.8, 0.95, 1.0], include_lowest=True)
    tables["tissue"] = steps.value_counts(sort=False).rename("tiles").rename_axis("tissue").reset_index()
    groups = [(slides.loc[slide_id], group) for slide_id, group in tiles.groupby("slide_id", sort=True)]
    tables["slides"] = pd.DataFrame([_coverage(stream, row, group) for row, group in groups])
    classes = [found for found in (_classes(stream, row, group) for row, group in groups) if found is not None]
    if classes:
        seen, there = (pd.DataFrame(part).sum() for part in zip(*classes, strict=True))
        tables["class"] = pd.DataFrame({"seen": seen / seen.sum(), "tissue": there / there.sum()})
        tables["class"] = tables["class"].rename_axis("class").reset_index()
    return tables


def _shares(of_tiles: pd.Series, of_slides: pd.Series) -> pd.DataFrame:
    tiles = of_tiles.value_counts().reindex(sorted(of_slides.unique()), fill_value=0)
    return pd.DataFrame(
        {"tiles": tiles, "share": tiles / tiles.sum(), "of_slides": of_slides.value_counts(normalize=True)}
    ).rename_axis(of_slides.name).reset_index()  # fmt: skip


def _by_mpp(tiles: pd.DataFrame, stream) -> pd.DataFrame:
    """Each tile counted at the declared mpp nearest to its true one."""
    table = stream.mixture
    nearest = np.abs(np.log(tiles["mpp"].to_numpy()[:, None] / table["mpp"].to_numpy())).argmin(axis=1)
    tiles_at = np.bincount(nearest, minlength=len(table))
    return table.assign(tiles=tiles_at, share=tiles_at / max(tiles_at.sum(), 1))


def _coverage(stream, row, tiles: pd.DataFrame) -> dict:
    """How often each mask pixel's middle lay in a tile, summed up over a slide."""
    mask, um_per_px = stream.index.mask(row.slide_id)
    depth = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    low = np.ceil(tiles[["x", "y"]].to_numpy() / row.cell_px - 0.5).astype(int)
    side = stream.tile_px * tiles["mpp"].to_numpy()[:, None] / row.mpp
    high = np.ceil((tiles[["x", "y"]].to_numpy() + side) / row.cell_px - 0.5).astype(int)
    high = np.minimum(high, mask.shape[::-1])
    np.add.at(depth, (low[:, 1], low[:, 0]), 1)
    np.add.at(depth, (high[:, 1], high[:, 0]), 1)
    np.add.at(depth, (low[:, 1], high[:, 0]), -1)
    np.add.at(depth, (high[:, 1], low[:, 0]), -1)
    depth = depth.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
    tile_um2 = ((stream.tile_px * tiles["mpp"]) ** 2).mean()
    return {
        "slide_id": row.slide_id,
        "tiles": len(tiles),
        "tissue_mm2": row.tissue_mm2,
        "coverage": (depth > 0)[mask].mean(),
        "overlap": 1 - (depth > 0).sum() / max(depth.sum(), 1),
        "disjoint_tiles": (depth > 0).sum() * um_per_px**2 / tile_um2,
    }


def _classes(stream, row, tiles: pd.DataFrame) -> tuple[dict, dict] | None:
    """um2 of each class that the tiles showed, and that the slide has; None without truth."""
    from pathfm.synthetic import CLASSES, Truth

    try:
        truth = Truth.open(row.path)
    except InputError:
        return None
    scale = row.mpp / truth.map_um  # map pixels per level-0 pixel
    seen = np.zeros(len(CLASSES) + 1)
    for x, y, mpp in zip(tiles["x"], tiles["y"], tiles["mpp"], strict=True):
        left, top, side = round(x * scale), round(y * scale), round(stream.tile_px * mpp / truth.map_um)
        seen += np.bincount(truth.class_map[top : top + side, left : left + side].ravel(), minlength=len(seen))
    there = np.bincount(truth.class_map.ravel(), minlength=len(seen))
    return tuple(dict(zip(CLASSES, counts[1:] * truth.map_um**2, strict=True)) for counts in (seen, there))
