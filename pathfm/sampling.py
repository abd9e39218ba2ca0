"""Which tile is tile i: slide, then mpp given the slide, then position given both. No pixel is touched.

Every draw comes from `pathfm.philox`, keyed by the seed and counted by i, so that tile i needs nothing but the stored
masks and a few numbers per slide.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pathfm.audit import audit
from pathfm.errors import InputError
from pathfm.footprints import Listed, Ranged, Slides, footprint
from pathfm.kernels import kernel
from pathfm.philox import KEEP, MPP, PAIR, PLACE, RANK, START, below, fair, permuted, philox, unit
from pathfm.positions import SLACK, at_most, covered, integral, least_area, search, unpack

__all__ = ["Draws", "Heat", "Sampler", "audit", "footprint", "permuted", "philox"]

TRIES = 256  # proposals before the admissible set is enumerated instead; both give the same distribution
SCALES = 1000  # draws of mpp from a continuous law before a slide counts as broken
_REDRAW = np.uint64(16)  # a redraw's number stands above the bits of a proposal's


class Heat(NamedTuple):
    """Weights of positions on a map of each slide; `rows` is empty where every admissible position weighs the same."""

    values: np.ndarray  # (.,) float32 maps of all slides
    rows: np.ndarray  # (S, 4) int64: start in values, height, width, side of a map's cell in level-0 px
    tops: np.ndarray  # (S,) float64: greatest weight


NO_HEAT = Heat(np.zeros(0, np.float32), np.zeros((0, 4), np.int64), np.zeros(0))


@kernel()
def choose(numbers, key, order, ends, names, tiles_per_slide, slide, keys):
    """Fill in slide (n,), and keys (n, 2): the key and counter from which the tile's mpp and position are drawn."""
    slides = len(names)
    for n in range(len(numbers)):
        i = numbers[n]
        turn = i // np.uint64(slides)
        s = permuted(key, turn, np.int64(i % np.uint64(slides)), slides)
        if len(ends):
            at = np.searchsorted(ends, s + unit(key, turn, START), "right")
            s = order[min(at, slides - 1)]
        own, at = key, i
        if tiles_per_slide > 0:
            at = np.uint64(below(key, i, PAIR, tiles_per_slide))
            own, _ = philox(key, names[s], PAIR)
        slide[n], keys[n, 0], keys[n, 1] = s, own, at


@kernel()
def chances(keys, purpose):
    """(n,) numbers in [0, 1), one of each key and counter."""
    u = np.empty(len(keys))
    for n in range(len(keys)):
        u[n] = unit(keys[n, 0], keys[n, 1], purpose)
    return u


@kernel()
def propose(key, i, redraw, words, masks, blocks, reach, box, grid, side, min_tissue, values, heat, top):
    """(x, y, tissue fraction) of the first of TRIES uniform proposals that is taken, or x = -1.

    An admissible one is taken with probability weight / top, always where there are no weights.
    """
    start, stride, cell = masks
    x0, columns, y0, rows = box
    if columns <= 0 or rows <= 0:
        return -1, -1, 0.0
    need = (min_tissue - SLACK) * side * side
    for attempt in range(TRIES):
        count = (redraw << _REDRAW) + np.uint64(attempt)
        one, two = philox(key, i, PLACE + count)
        if not (fair(one, np.uint64(columns)) and fair(two, np.uint64(rows))):
            continue
        x = grid * (x0 + np.int64(one % np.uint64(columns)))
        y = grid * (y0 + np.int64(two % np.uint64(rows)))
        if at_most(blocks, reach, x, y, side) < need - 1:  # a pixel for rounding
            continue
        area = covered(words, start, stride, cell, x, y, side)
        if area < need:
            continue
        if top > 0:
            j, k = np.int64((y + side / 2) // heat[3]), np.int64((x + side / 2) // heat[3])
            if unit(key, i, KEEP + count) * top >= values[heat[0] + j * heat[2] + k]:
                continue
        return x, y, min(area / (side * side), 1.0)
    return -1, -1, 0.0


@kernel()
def place(
    keys, redraw, slide, words, masks, blocks, reach, box, grid, side, min_tissue, values, heat, tops, x, y, tissue
):
    """Fill in x, y (-1 where proposals failed) and tissue, each (n,)."""
    for n in range(len(keys)):
        s = slide[n]
        row, top = (heat[s], tops[s]) if len(tops) else (masks[s], 0.0)
        x[n], y[n], tissue[n] = propose(
            keys[n, 0], keys[n, 1], redraw, words, masks[s], blocks[s], reach[s], box[n], grid[n], side[n], min_tissue,
            values, row, top,
        )  # fmt: skip


@kernel()
def _edge(centre, side, grid):
    """The first k >= 0 such that a square at grid * k has its centre at `centre` or beyond."""
    return max(0, np.int64(np.ceil((centre - side / 2) / grid)))


@kernel()
def weigh(sums, cell, columns, rows, side, grid, need, values, heat):
    """(h * w,) weight times number of admissible positions whose centre lies in each cell of a map."""
    start, height, width, block = heat
    found = np.zeros(height * width)
    for j in range(height):
        top, bottom = _edge(j * block, side, grid), min(rows, _edge((j + 1) * block, side, grid))
        for k in range(width):
            weight = values[start + j * width + k]
            left, right = _edge(k * block, side, grid), min(columns, _edge((k + 1) * block, side, grid))
            if weight > 0 and left < right and top < bottom:
                found[j * width + k] = weight * search(sums, cell, right, bottom, side, grid, need, -1, left, top)[0]
    return found


class Draws(NamedTuple):
    """n tiles as arrays: slide as its number in the stream, true mpp, whether it is resampled, x, y in level-0 px,
    tissue 0..1."""

    slide: np.ndarray
    mpp: np.ndarray
    resampled: np.ndarray
    x: np.ndarray
    y: np.ndarray
    tissue: np.ndarray


class Sampler:
    """Draws tiles; the same i gives the same tile in any order, process and batch.

    slides           what is known of S slides
    scales           which mpp a slide gives: a `Listed` mixture or a `Ranged` law
    tiles_per_slide  0 for no limit
    rounds           (order, ends) of `balance.rounds`; empty where slides weigh the same
    heat             weights of positions

    Slides come by a keyed permutation: each round of S tiles sees each of S slides once. Slides weigh the same whatever
    their area, so a position on a biopsy is drawn more often than one on a resection; unless weights are given, where
    a slide comes as often in a round as its share of S, rounded down or up (`balance.rounds`).
    Given slide and mpp, the position is uniform over the admissible set: a proposal uniform over a box that holds the
    set is accepted when admissible; after TRIES failures the set is counted exactly and one of it drawn by rank. Both
    are uniform, hence so is their mixture, also where a single position is admissible. With weights of positions
    both are in proportion to the weight at the tile's centre.
    """

    def __init__(
        self,
        slides: Slides,
        scales: Listed | Ranged,
        min_tissue: float,
        seed: int,
        tiles_per_slide: int | None = None,
        rounds: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int64), np.zeros(0)),
        heat: Heat = NO_HEAT,
    ):
        self.slides, self.scales, self.min_tissue = slides, scales, float(min_tissue)
        self.key = np.uint64(int(seed) % 2**64)
        self.tiles_per_slide, self.rounds, self.heat = int(tiles_per_slide or 0), rounds, heat
        self._remember()

    def _remember(self) -> None:
        self._enumerated, self._weighed = lru_cache(8)(self._sums), lru_cache(8)(self._weights)

    def __getstate__(self) -> dict:
        """Without what can be mapped or made again: masks, maps and sums."""
        own = {key: value for key, value in self.__dict__.items() if key not in ("_enumerated", "_weighed")}
        return own | {"slides": self.slides._replace(words=None), "heat": self.heat._replace(values=None)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._remember()

    def mapped(self, words: np.ndarray, values: np.ndarray | None) -> None:
        """Masks and maps again, after a journey to another process."""
        self.slides = self.slides._replace(words=words)
        self.heat = self.heat._replace(values=NO_HEAT.values if values is None else values)

    def __call__(self, numbers, redraw=0) -> Draws:
        """The tiles of these i (each >= 0); `redraw` > 0 draws other positions at the same scale."""
        numbers = np.asarray(numbers, np.uint64)
        slide, keys = np.empty(len(numbers), np.int64), np.empty((len(numbers), 2), np.uint64)
        choose(numbers, self.key, *self.rounds, self.slides.names, self.tiles_per_slide, slide, keys)
        spots = self.scales(slide, chances(keys, MPP))
        x, y, tissue = self._place(slide, keys, spots, redraw)
        for n in np.flatnonzero(x < 0):
            own, (x[n], y[n]), tissue[n] = self._one(slide[n : n + 1], keys[n : n + 1], redraw)
            for whole, one in zip(spots, own, strict=True):
                whole[n] = one[0]
        return Draws(slide, spots.mpp, spots.resampled, x, y, tissue)

    def count(self, slide: int, spot) -> int:
        """The exact number of admissible positions of one spot, whatever they weigh."""
        return self._search(slide, spot, -1)[0]

    def serves(self, slide: int, spot) -> bool:
        """Whether any position can be drawn; a few proposals settle it for nearly every slide."""
        own = np.array([[self.key, 0]], np.uint64)
        x, _, _ = self._place(np.array([slide]), own, spot, 0)
        if x[0] >= 0:
            return True
        return self._total(slide, spot) > 0 if len(self.heat.rows) else self._search(slide, spot, 0)[1] >= 0

    def _place(self, slide, keys, spots, redraw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, y, tissue = np.empty(len(slide), np.int64), np.empty(len(slide), np.int64), np.empty(len(slide))
        t = self.slides
        place(
            keys, np.uint64(redraw), slide, t.words, t.masks, t.blocks, t.reach,
            spots.box, spots.grid, spots.side, self.min_tissue, *self.heat, x, y, tissue,
        )  # fmt: skip
        return x, y, tissue

    def _one(self, slide, keys, redraw):
        """(spot, (x, y), tissue) of one tile whose proposals failed: by rank; at another mpp where there is no rank.

        A continuous law may name an mpp at which a slide has no admissible position, though it has at a finer and at a
        coarser one; such a draw is repeated, so that the law is that given what the slide serves.
        """
        s = int(slide[0])
        for attempt in range(SCALES):
            spot = self.scales(slide, chances(keys, MPP + np.uint64(attempt)))
            if attempt:
                x, y, tissue = self._place(slide, keys, spot, redraw)
                if x[0] >= 0:
                    return spot, (x[0], y[0]), tissue[0]
            where = self._by_rank(keys[0], s, spot, redraw)
            if where is not None:
                start, stride, cell = self.slides.masks[s]
                side = spot.side[0]
                area = covered(self.slides.words, start, stride, cell, *where, side)
                return spot, where, min(area / side**2, 1.0)
        raise InputError(f"slide number {s} serves next to nothing of the law of mpp; leave it out, or narrow the law")

    def _by_rank(self, key, s: int, spot, redraw=0) -> tuple[int, int] | None:
        """One position of all that can be drawn, by its number; None where there is none."""
        purpose = RANK + (np.uint64(redraw) << _REDRAW)
        if len(self.heat.rows):
            return self._by_weight(key, s, spot, purpose)
        total = self.count(s, spot)
        if not total:
            return None
        return self._search(s, spot, below(*key, purpose, total))[1:]

    def _by_weight(self, key, s: int, spot, purpose) -> tuple[int, int] | None:
        """A cell of the map in proportion to weight times positions, then one of the cell's positions."""
        ends = self._weighed(s, *self._where(spot))
        if not ends[-1] > 0:
            return None
        cell = int(np.searchsorted(ends, unit(*key, purpose) * ends[-1], "right"))
        cell = min(cell, int(np.searchsorted(ends, ends[-1])))
        _, _, width, block = self.heat.rows[s]
        side, grid, columns, rows = self._where(spot)
        left, top = (_edge(at * block, side, grid) for at in (cell % width, cell // width))
        columns = min(columns, _edge((cell % width + 1) * block, side, grid))
        rows = min(rows, _edge((cell // width + 1) * block, side, grid))
        inside = self._enumerated(s), int(self.slides.masks[s, 2]), columns, rows, side, grid
        need = least_area(side, self.min_tissue)
        rank = below(*key, purpose + np.uint64(1), search(*inside, need, -1, left, top)[0])
        return search(*inside, need, rank, left, top)[1:]

    def _total(self, s: int, spot) -> float:
        return self._weighed(s, *self._where(spot))[-1]

    def _weights(self, s: int, side: float, grid: int, columns: int, rows: int) -> np.ndarray:
        need, cell = least_area(side, self.min_tissue), int(self.slides.masks[s, 2])
        sums = self._enumerated(s)
        return np.cumsum(weigh(sums, cell, columns, rows, side, grid, need, self.heat.values, self.heat.rows[s]))

    @staticmethod
    def _where(spot) -> tuple[float, int, int, int]:
        """side, grid, one past the last column and row of one spot."""
        x0, columns, y0, rows = (int(n) for n in spot.box[0])
        empty = min(columns, rows) <= 0
        return float(spot.side[0]), int(spot.grid[0]), *((0, 0) if empty else (x0 + columns, y0 + rows))

    def _search(self, s: int, spot, wanted: int) -> tuple[int, int, int]:
        side, grid, columns, rows = self._where(spot)
        if not columns:
            return 0, -1, -1
        need = least_area(side, self.min_tissue)
        return search(self._enumerated(int(s)), int(self.slides.masks[s, 2]), columns, rows, side, grid, need, wanted)

    def _sums(self, s: int) -> np.ndarray:
        start, stride, cell = self.slides.masks[s]
        width, height = -(-self.slides.size[s] // cell)
        words = self.slides.words[start : start + height * stride].reshape(height, stride)
        return integral(unpack(words, int(width)))
