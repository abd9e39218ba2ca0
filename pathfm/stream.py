"""TileStream: the cohort as an endless dataset, addressed by number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from pathfm import balance as balances
from pathfm import scales, stores
from pathfm.errors import InputError
from pathfm.filters import HsvFilter
from pathfm.footprints import Listed, Ranged, Tiling, slides_of, spots, tissue_share
from pathfm.index import SlideIndex
from pathfm.prefetch import TILES, Prefetch
from pathfm.reading import Begun, Job, begin, finish, read
from pathfm.sampling import NO_HEAT, Heat, Sampler
from pathfm.slide import MAX_UPSAMPLE

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

    index             a SlideIndex; its usable slides, or a subset's
    tile_px           side of a tile in pixels
    mpp               microns per pixel: a value, several (equal weights), {value: weight}, a law of `pathfm.scales`
                      such as LogUniform(0.25, 2), or text that `scales.of` reads
    min_tissue        least share of the footprint's area that is tissue
    seed              another seed, another stream
    common_mpp        keep only slides that serve every mpp; otherwise weights are renormalised on each slide
    tiles_per_slide   draw among this many fixed (mpp, position) pairs per slide; fewer are a subset of more
    max_upsample      how much finer than the slide an mpp may be
    resample          "auto" returns a level, or a fraction of one, as it is where it is a whole multiple of level 0
                      within 1 % of the mpp; others are always resampled, for their pixels lie beside the whole level-0
                      pixels that tiles lie on. "always" filters every tile alike
    balance           columns whose classes share the tiles alike, outer to inner: "patient", ("label", "patient")
    slide_weights     of slides (within the innermost class): a column such as "tissue_mm2" for tissue area,
                      {slide_id: weight}, or one number for each of index.usable; None: all alike
    position_weights  of positions on a slide: {slide_id: map}, `balance.WeightMaps`, or a folder that they saved
    tile_filter       a `filters.HsvFilter`, or "midnight" for that of Midnight: positions whose pixels do not pass are
                      drawn anew, at the same slide and mpp, up to its `redraws` times; then the last one stays
    threads           that decode, the caller's among them; the others go on with the next batch of an even walk. They
                      change the speed and no pixel
    context_px        side of the image where it shows more than the tile: the tile lies in the image's middle, at
                      image[margin_px:-margin_px]; x, y, tissue and admissibility are the tile's. None: tile_px

    Order of draws: slide, then mpp given the slide, then position given both. Each round of N tiles sees each
    of the N slides once; slides weigh the same whatever their area, so a position on a biopsy is drawn more
    often than one on a resection. With balance or weights a slide's tiles in a round of N differ from N times its share
    by less than one (`balance.rounds`). Positions are uniform over the admissible ones, or in proportion to the weight
    at the tile's centre (`pathfm.sampling.Sampler`). A continuous law is cut off to what a slide serves.

    `slides` lists the slides in the stream, `share` the expected share of each, `left_out` the others with the
    reason, `mixture` the achieved mpp, `served` the range of each slide, `settings` all of the above as a record.
    """

    def __init__(
        self,
        index: SlideIndex,
        tile_px: int = 256,
        mpp: float | Sequence[float] | dict[float, float] | str | scales.Values | scales.Continuous = 0.5,
        min_tissue: float = 0.4,
        seed: int = 0,
        common_mpp: bool = False,
        tiles_per_slide: int | None = None,
        max_upsample: float = MAX_UPSAMPLE,
        resample: str = "auto",
        balance: str | Sequence[str] = (),
        slide_weights=None,
        position_weights=None,
        tile_filter: HsvFilter | str | None = None,
        context_px: int | None = None,
        threads: int = 1,
    ):
        _check(tile_px, min_tissue, tiles_per_slide, max_upsample, context_px, threads)
        self.index, self.tile_px, self.min_tissue, self.seed = index, int(tile_px), float(min_tissue), int(seed)
        self.common_mpp, self.tiles_per_slide = common_mpp, tiles_per_slide
        self.max_upsample, self.resample, self.threads = max_upsample, resample, int(threads)
        self.law, self.balance = scales.of(mpp), balances.columns_of(balance)
        self.slide_weights, self.tile_filter = slide_weights, HsvFilter.of(tile_filter)
        self.position_weights = None if position_weights is None else balances.WeightMaps.of(position_weights)
        self.context_px = int(context_px or tile_px)
        self._prefetch = Prefetch()
        usable = index.usable
        if usable.empty:
            raise InputError("the index has no usable slide; see index.slides for the reasons")
        self._keep(usable, balances.shares(usable, self.balance, slide_weights))
        if self.tile_filter:
            self._try_filter()

    def _keep(self, usable: pd.DataFrame, share: np.ndarray) -> None:
        """Leave out slides that serve nothing (with common_mpp: not all) or weigh nothing; weigh the others."""
        slides = slides_of(usable, self.index.words, [_hash(name) for name in usable["slide_id"]])
        heat = self._heat(usable)
        tiling = Tiling(self.tile_px, self.min_tissue, self.max_upsample, self.resample)
        law = (Listed if isinstance(self.law, scales.Values) else Ranged)(slides, self.law, tiling)
        keep = law.settle(Sampler(slides, law, self.min_tissue, self.seed, heat=heat).serves)
        keep = (law.whole if self.common_mpp else keep) & (share > 0)
        reasons = [
            f"no admissible position at {law.missing(s)}" if share[s] > 0 else "weight 0" for s in np.flatnonzero(~keep)
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
        self._far = any(map(stores.is_address, self.slides["path"]))
        weights = self.slide_weights
        if weights is not None and not isinstance(weights, str):
            weights = balances.slide_weights(usable, weights)[keep]
        share = balances.shares(self.slides, self.balance, weights)
        self.share = pd.Series(share, self.slides["slide_id"], name="share")
        rounds = balances.rounds(self.slides, share, self.balance)
        heat = heat._replace(rows=heat.rows[keep], tops=heat.tops[keep]) if len(heat.rows) else heat
        self._sampler = Sampler(
            slides.only(keep), law.only(keep), self.min_tissue, self.seed, self.tiles_per_slide, rounds, heat
        )

    def _heat(self, usable: pd.DataFrame) -> Heat:
        if self.position_weights is None:
            return NO_HEAT
        rows = self.position_weights.rows(usable)
        return Heat(self.position_weights.values, rows, self.position_weights.tops(rows))

    @property
    def weights(self) -> dict[float, float]:
        """mpp -> declared weight of a mixture; empty for a continuous law."""
        return dict(zip(self.law.mpp, self.law.share, strict=True)) if isinstance(self.law, scales.Values) else {}

    @property
    def margin_px(self) -> int:
        """Pixels of the image on each side of the tile."""
        return (self.context_px - self.tile_px) // 2

    @property
    def mixture(self) -> pd.DataFrame:
        """mpp, declared weight, achieved weight (expected over the stream), and how many slides serve it.

        For a continuous law a row a bin, from "low" to "high" um/px.
        """
        return self._sampler.scales.mixture(self.share.to_numpy())

    @property
    def served(self) -> pd.DataFrame:
        """slide_id, and the least and greatest mpp of the law that the slide serves: low, high."""
        return pd.DataFrame(self._sampler.scales.limits(), columns=["low", "high"]).assign(slide_id=self._ids)[
            ["slide_id", "low", "high"]
        ]

    @property
    def settings(self) -> dict:
        """Every setting and the index's content, as a record of a run holds them."""
        maps, own = self.position_weights, self.slide_weights
        if own is not None and not isinstance(own, str):
            own = hashlib.blake2b(self.share.to_numpy().tobytes(), digest_size=8).hexdigest()
        return {
            "slides": hashlib.blake2b("\n".join(self._ids).encode(), digest_size=8).hexdigest(),
            "tile_px": self.tile_px,
            "mpp": str(self.law),
            "min_tissue": self.min_tissue,
            "seed": self.seed,
            "common_mpp": bool(self.common_mpp),
            "tiles_per_slide": self.tiles_per_slide,
            "max_upsample": self.max_upsample,
            "resample": self.resample,
            "balance": list(self.balance),
            "slide_weights": own,
            "position_weights": maps and maps.digest(),
            "tile_filter": self.tile_filter and repr(self.tile_filter),
            "context_px": self.context_px,
            "same_place": False,  # see `places.Places`
        }

    def positions(self) -> pd.DataFrame:
        """The exact number of admissible positions, slide by mpp; for a continuous law at the middles of its bins."""
        asked = list(self.weights) or self.mixture["mpp"].tolist()
        slides, tiling = self._sampler.slides, Tiling(self.tile_px, self.min_tissue, self.max_upsample, self.resample)
        counts = [
            [self._sampler.count(s, spots(slides, np.array([s]), np.array([mpp]), tiling)) for mpp in asked]
            for s in range(len(self.slides))
        ]
        return pd.DataFrame(counts, index=self.slides["slide_id"], columns=asked)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Tile:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Tile]:
        """The tiles of these numbers: planned and fetched together, each compressed tile decoded once per scale.

        Of slides in a store or on a server, the bytes of the next numbers are asked for meanwhile (`Prefetch`).
        """
        if self.tile_filter:
            return self._filtered(numbers)[0]
        return [Tile(image, *name) for name, image in self._read(numbers, self._named)]

    def at_scales(self, i: int, mpps: Sequence[float]) -> list[Tile]:
        """The place of tile i at several mpp: tiles of tile_px pixels about the centre of tile i, in this order.

        As `placed` names them.
        """
        return self.tiles(self.placed(i, mpps))

    def placed(self, i: int, mpps: Sequence[float]) -> list[TileName]:
        """What the tiles of `at_scales` are, without reading them.

        Each corner is the one nearest to that on the grid of its own mpp, so that centres differ by at most half a
        grid step (one pixel of a tile that passes through). Tiles may reach over the slide's edge, where
        they are white; their `tissue` counts what lies beyond as none, and no least share is asked of them. Raises
        InputError for an mpp finer than the slide serves.
        """
        name = self.name(i)
        slide = self.index.slide(name.slide_id)
        middle = [at + self.tile_px * name.mpp / slide.mpp / 2 for at in (name.x, name.y)]
        names = []
        for mpp in mpps:
            plan = slide.plan(mpp, self.max_upsample, self.resample)
            side = self.tile_px * plan.mpp / slide.mpp
            x, y = (plan.grid * round((at - side / 2) / plan.grid) for at in middle)
            tissue = tissue_share(self._sampler.slides, int(self._sampler([i]).slide[0]), x, y, side)
            names.append(TileName(name.slide_id, x, y, plan.mpp, tissue, plan.resampled, name.i))
        return names

    def tiles(self, names: Sequence[TileName]) -> list[Tile]:
        """The tiles of these names, each compressed tile decoded once per scale."""
        images = read([self._job(name) for name in names], self.threads)
        return [Tile(image, *name) for image, name in zip(images, names, strict=True)]

    def name(self, i: int) -> TileName:
        """What tile i is, without reading it; with a `tile_filter` its pixels, and those it rejects, are read."""
        return self._named([i])[0]

    def names(self, numbers: Iterable[int]) -> pd.DataFrame:
        """One row a tile: slide_id, x, y, mpp, tissue, resampled, i. No pixel is touched.

        With a `tile_filter` pixels are read, and two more columns say how many positions were rejected
        before this one ("redraws") and whether this one passes ("passes"; False where redraws ran out).
        """
        if self.tile_filter:
            tiles, redraws, passes = self._filtered(numbers)
            names = pd.DataFrame([tile[1:] for tile in tiles], columns=TileName._fields)
            return names.assign(redraws=redraws, passes=passes)
        return pd.DataFrame(self._columns(numbers))

    def _named(self, numbers: Iterable[int]) -> list[TileName]:
        if self.tile_filter:
            return [TileName(*tile[1:]) for tile in self._filtered(numbers)[0]]
        return self._drawn(numbers)

    def _drawn(self, numbers: Iterable[int], redraw: int = 0) -> list[TileName]:
        return _rows(self._columns(numbers, redraw))

    def _columns(self, numbers: Iterable[int], redraw: int = 0) -> dict[str, np.ndarray]:
        numbers = np.fromiter(numbers, np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < ENDLESS):
            raise IndexError(f"tile numbers lie between 0 and {ENDLESS - 1}")
        drawn = self._sampler(numbers, redraw)
        return {
            "slide_id": self._ids[drawn.slide],
            "x": drawn.x,
            "y": drawn.y,
            "mpp": drawn.mpp,
            "tissue": drawn.tissue,
            "resampled": drawn.resampled,
            "i": numbers,
        }

    def _filtered(self, numbers: Iterable[int]) -> tuple[list[Tile], np.ndarray, np.ndarray]:
        """Tiles, how often each was redrawn, and whether it passes: redraw k of all that failed before, together."""
        numbers = np.fromiter(numbers, np.int64)
        tiles: list[Tile] = [None] * len(numbers)
        redraws, passes = np.zeros(len(numbers), np.int64), np.zeros(len(numbers), bool)
        for redraw in range(self.tile_filter.redraws + 1):
            left = np.flatnonzero(~passes)
            if not len(left):
                break
            named = partial(self._drawn, redraw=redraw)
            drawn = self._read(numbers[left], named, foresee=not redraw)
            for n, (name, image) in zip(left, drawn, strict=True):
                tiles[n] = Tile(image, *name)
                redraws[n], passes[n] = redraw, self.tile_filter(self._inner(image))
        return tiles, redraws, passes

    def _try_filter(self, first: int = 8) -> None:
        """Raises InputError where none of the first tiles passes, with all their redraws."""
        if not self._filtered(range(first))[2].any():
            raise InputError(
                f"{self.tile_filter} rejects all of {first * (self.tile_filter.redraws + 1)} positions tried for the "
                f"first {first} tiles; widen its ranges, lower its share, or look at the slides' colours"
            )

    def _inner(self, image: np.ndarray) -> np.ndarray:
        """The tile in an image that may show more."""
        margin = self.margin_px
        return image[margin : margin + self.tile_px, margin : margin + self.tile_px]

    def _read(
        self, numbers: Sequence[int], named: Callable[[Sequence[int]], list[TileName]], foresee: bool = True
    ) -> list[tuple[TileName, np.ndarray]]:
        """Tiles by their numbers; where they can be foreseen they are begun before, if others can do it meanwhile.

        Those of slides that lie elsewhere are fetched then; those on a disk are decoded, where there are other threads.
        """

        def under_way(some: Sequence[int]) -> tuple[tuple[list[TileName], Begun], int]:
            names = named(some)
            begun = begin([self._job(name) for name in names], self.threads)
            return (names, begun), begun.bytes

        if self._far:
            stores.same_process()  # what another process has begun does not arrive here
        if foresee and (self._far or self.threads > 1):
            names, begun = self._prefetch(numbers, under_way, TILES if self._far else 1)
        else:
            (names, begun), _ = under_way(numbers)
        try:
            return list(zip(names, finish(begun, self.threads), strict=True))
        except KeyboardInterrupt:  # may have been in the midst of what was begun for the next numbers
            self._prefetch = Prefetch()
            raise

    def _window(self, name: TileName, slide_mpp: float) -> tuple[float, float, int]:
        """x, y (level-0 px) and side (px) of what is read for a tile: itself, or its context."""
        if not self.margin_px:
            return name.x, name.y, self.tile_px
        step = name.mpp / slide_mpp
        if not name.resampled or abs(step - round(step)) < 1e-9:
            step = round(step)  # so that a level's own pixels pass through
        return name.x - self.margin_px * step, name.y - self.margin_px * step, self.context_px

    def _job(self, name: TileName) -> Job:
        slide = self.index.slide(name.slide_id)
        x, y, side = self._window(name, slide.mpp)
        return Job(slide, slide.plan(name.mpp, self.max_upsample, self.resample), x, y, side, side)

    def __setstate__(self, state: dict) -> None:
        """The sampler travels without masks and maps; here they are mapped anew."""
        self.__dict__.update(state)
        self._prefetch = Prefetch()  # also of a copy, which may be given other settings
        self._sampler.mapped(self.index.words, self.position_weights and self.position_weights.values)

    def __repr__(self) -> str:
        told = f"TileStream({len(self.slides)} slides, {self.tile_px} px at {self.law} um/px, seed {self.seed}"
        if self.balance:
            told += f", balanced by {', '.join(self.balance)}"
        for name in ("slide_weights", "position_weights"):
            told += f", {name}" if getattr(self, name) is not None else ""
        told += f", {self.tile_filter}" if self.tile_filter else ""
        return told + (f", {self.context_px} px of context" if self.margin_px else "") + ")"


def _rows(columns: dict[str, np.ndarray]) -> list[TileName]:
    return [TileName(*row) for row in zip(*(column.tolist() for column in columns.values()), strict=True)]


def _check(tile_px, min_tissue, tiles_per_slide, max_upsample, context_px, threads) -> None:
    if not (isinstance(threads, int) and threads > 0):
        raise InputError(f"threads={threads!r} is no positive whole number")
    if not (isinstance(tile_px, int | np.integer) and tile_px > 0):
        raise InputError(f"tile_px={tile_px!r} is no positive whole number of pixels")
    if not 0 <= min_tissue <= 1:
        raise InputError(f"min_tissue={min_tissue!r} is no share between 0 and 1")
    if tiles_per_slide is not None and not tiles_per_slide > 0:
        raise InputError(f"tiles_per_slide={tiles_per_slide!r} is not positive; None draws without a limit")
    if not max_upsample >= 1:
        raise InputError(f"max_upsample={max_upsample!r} is below 1; 1 allows no upsampling")
    if context_px is not None and not (context_px >= tile_px and (context_px - tile_px) % 2 == 0):
        raise InputError(
            f"context_px={context_px!r} must be tile_px={tile_px} plus an even number of pixels, half on each side"
        )


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
