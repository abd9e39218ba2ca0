"""One whole-slide image: its size, microns per pixel and levels; any square of it at any mpp."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from pathfm import reading
from pathfm.decode import Recipe, recipe
from pathfm.directory import read_directory
from pathfm.errors import InputError
from pathfm.fallback import Fallback
from pathfm.metadata import MPP_TOLERANCE, Unsupported, checked_mpp, mpp_of
from pathfm.reading import Job, ReadPlan
from pathfm.source import Source, open_source
from pathfm.tilemap import BLOCK, TileMap, tiles_of

MAX_UPSAMPLE = 1.1  # many 40x slides are 0.2525 mpp: up to 10 % finer than the slide is interpolated
BLOCK_PX = 4096 * 4096  # source pixels held at once while resampling


def plan_read(
    slide_mpp: float,
    downsamples: Sequence[float],
    mpp: float,
    max_upsample: float = MAX_UPSAMPLE,
    resample: str = "auto",
    scales: Sequence[int] = (1,),
) -> ReadPlan | None:
    """The plan that serves `mpp`, or None where the slide is too coarse for it.

    scales   the fractions 1/scale of its size that a level decodes to, 1 among them

    A level, or a fraction of one, passes through with its own true mpp where it is a whole multiple of level 0 and
    within 1 % of `mpp`; otherwise the coarsest that is at least as fine is resampled to exactly `mpp`. One at 3.7 times
    level 0 is always resampled: tiles lie on whole level-0 pixels, which are not whole pixels of such a level, so that
    its own pixels would lie up to half a pixel beside what the tile's name says. `resample="always"` never passes
    through, and resamples whole levels only, so that every tile has been through the same filter.
    """
    if resample not in ("auto", "always"):
        raise InputError(f"resample={resample!r} is neither 'auto' nor 'always'")
    if not mpp > 0:
        raise InputError(f"mpp={mpp!r} is not a positive number of microns per pixel")
    ratio = mpp / slide_mpp
    whole = round(ratio)
    near = whole >= 1 and abs(ratio - whole) <= MPP_TOLERANCE * whole
    if not near and ratio * max_upsample < 1 - 1e-9:
        return None
    grid = whole if near else 1
    scales = scales if resample == "auto" else (1,)
    # Coarser levels come later and decode fewer tiles, so they win where several serve alike.
    served = [(down * scale, level, scale) for level, down in enumerate(downsamples) for scale in scales]
    exact = [option for option in served if option[0] == whole] if near and resample == "auto" else []
    fine = [option for option in served if option[0] <= ratio * (1 + MPP_TOLERANCE)]
    down, level, scale = max(exact or fine, default=(float(downsamples[0]), 0, 1))
    return ReadPlan(level, float(down), whole * slide_mpp if exact else float(mpp), grid, not exact, scale)


_plan_read = lru_cache(maxsize=4096)(plan_read)  # most slides of a cohort are alike, and planned for every tile


class Slide:
    """A slide on a disk or elsewhere. `Slide.open` is the way in; its file is opened when first read.

    path                  as given
    width_px, height_px   of level 0
    mpp                   microns per level-0 pixel
    level_downsamples     level-0 pixels per pixel of each level; 4.0003 that edge truncation explains is 4
    scales                the fractions 1/scale of its size that a level decodes to: (1, 2, 4, 8) for JPEG
    reader                "ranges": compressed tiles are read by their byte ranges; "openslide": OpenSlide reads
    fallback              why OpenSlide reads; "" where it does not
    peer                  the Fallback through which it reads; None where it does not
    """

    def __init__(
        self,
        path: str | Path,
        width_px: int,
        height_px: int,
        mpp: float,
        downsamples: Sequence[float],
        tiles: TileMap | None = None,
        first_level: int = 0,
        scales: Sequence[int] = (1,),
        version: tuple[str, int] | None = None,
        vendor: str = "",
        fallback: str = "",
    ):
        self.path, self.vendor, self.fallback, self.version = str(path), vendor, fallback, version
        self.width_px, self.height_px, self.mpp = int(width_px), int(height_px), float(mpp)
        self.level_downsamples = tuple(map(float, downsamples))
        self.tiles, self.first_level, self.scales = tiles, int(first_level), tuple(scales)
        self.reader = "ranges" if tiles is not None else "openslide"
        self.codec = ""
        self.peer = None if tiles is not None else Fallback(self.path, fallback, version and version[0])
        self._source = None
        self._recipes: dict[int, Recipe] = {}

    @classmethod
    def open(cls, path: str | Path, mpp: float | None = None) -> Slide:
        """The slide at `path`; `mpp` overrides a missing or wrong one.

        Raises InputError when the file is missing, damaged, nothing that is read here, or has no usable mpp.
        """
        source = open_source(path)
        try:
            directory = read_directory(source)
        except Unsupported as why:
            source.close()
            return cls._by_openslide(source, mpp, str(why))
        mpp = checked_mpp(mpp, path) if mpp is not None else mpp_of(directory.properties, path)
        full = directory.sizes[0]
        downsamples = [_downsample(full, size) for size in directory.sizes]
        tiles, scales = directory.tiles.frozen(), directory.scales
        slide = cls(path, *full, mpp, downsamples, tiles, 0, scales, (source.tag, source.size), directory.vendor)
        slide.codec = directory.codec
        slide._source = source
        return slide

    @classmethod
    def _by_openslide(cls, source: Source, mpp: float | None, why: str) -> Slide:
        path, version = source.path, (source.tag, source.size)
        peer = Fallback(path, why, source.tag)
        handle = peer.handle
        width, height = handle.dimensions
        downsamples = [_downsample(handle.dimensions, size) for size in handle.level_dimensions]
        vendor = handle.properties.get("openslide.vendor", "")
        try:
            mpp = checked_mpp(mpp, path) if mpp is not None else mpp_of(handle.properties, path)
        except InputError:
            peer.close()
            raise
        slide = cls(path, width, height, mpp, downsamples, version=version, vendor=vendor, fallback=why)
        slide.peer = peer
        return slide

    def plan(self, mpp: float, max_upsample: float = MAX_UPSAMPLE, resample: str = "auto") -> ReadPlan:
        """How `mpp` is read. Raises InputError where that would upsample beyond `max_upsample`."""
        plan = _plan_read(self.mpp, self.level_downsamples, mpp, max_upsample, resample, self.scales)
        if plan is None:
            raise InputError(
                f"{self.path} has {self.mpp:g} um/px and cannot serve {mpp:g}: that is an upsampling by "
                f"{self.mpp / mpp:.2f}, more than max_upsample={max_upsample:g}. Ask for at least "
                f"{self.mpp / max_upsample:.4g} or raise max_upsample"
            )
        return plan

    def read(
        self,
        x: float,
        y: float,
        side_px: int,
        mpp: float,
        max_upsample: float = MAX_UPSAMPLE,
        resample: str = "auto",
    ) -> np.ndarray:
        """A square of side_px pixels at `mpp`, its upper-left corner at (x, y): (side_px, side_px, 3) uint8.

        x, y     level-0 pixels; the corner of a pixel, so that x=0 is the slide's edge at every mpp
        mpp      microns per pixel; `plan(mpp).mpp` says the true value where a level passes through:
                 one at a whole multiple of level 0 within 1 % of it

        Outside the slide is white, and so is a compressed tile of no bytes, which scanners leave where they saw
        nothing. Off the plan's grid a level that would pass through is shifted by interpolation at its own mpp.
        """
        return self.region(x, y, side_px, side_px, mpp, max_upsample, resample)

    def region(
        self,
        x: float,
        y: float,
        width_px: int,
        height_px: int,
        mpp: float,
        max_upsample: float = MAX_UPSAMPLE,
        resample: str = "auto",
    ) -> np.ndarray:
        """`read` for a rectangle: (height_px, width_px, 3) uint8."""
        if min(width_px, height_px) < 1:
            raise InputError(f"cannot read {width_px} x {height_px} px of {self.path}; ask for at least one")
        return self._pixels(x, y, width_px, height_px, self.plan(mpp, max_upsample, resample))

    def thumbnail(self, um_per_px: float = 8.0) -> np.ndarray:
        """The whole slide at exactly `um_per_px`: (ceil(height), ceil(width), 3) uint8, white beyond its edge."""
        plan = self.plan(um_per_px, resample="always")
        width, height = (math.ceil(side * self.mpp / um_per_px - 1e-6) for side in (self.width_px, self.height_px))
        return self._pixels(0, 0, width, height, plan)

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""
        if self.peer is not None:
            self.peer.close()
        if self._source is not None:
            self._source.close()
        self._source = None

    def source(self) -> Source:
        """The slide's bytes; reading them raises InputError where the file is another than the one that was indexed."""
        if self._source is None:
            tag, size = self.version or (None, None)
            self._source = open_source(self.path, size, tag)
        return self._source

    def checks(self) -> np.ndarray:
        """The CRC-32 of every compressed tile, level by level, (N,) uint32; the file is read whole."""
        found = []
        for level in range(self.first_level, self.first_level + len(self.level_downsamples)):
            number = tiles_of(self.tiles.levels[level])
            for at in range(0, number, BLOCK):
                starts, lengths = self.tiles.find(level, range(at, min(at + BLOCK, number)))
                found += [zlib.crc32(data) for data in self.source().read(starts.tolist(), lengths.tolist())]
        return np.array(found, np.uint32)

    def recipe(self, level: int) -> Recipe:
        """How compressed tiles of a level are decoded; `level` counts in the map."""
        if level not in self._recipes:
            facts = self.tiles.levels[level]
            tables = self.tiles.tables[facts["tables"] : facts["tables"] + facts["tables_length"]].tobytes()
            self._recipes[level] = recipe(facts, tables)
        return self._recipes[level]

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __getstate__(self) -> dict:
        """Without what is open, and with its own part of an index's map only."""
        state = {**self.__dict__, "_source": None, "_recipes": {}}
        if self.tiles is not None:
            own = self.tiles.part(self.first_level, self.first_level + len(self.level_downsamples))
            state |= {"tiles": own, "first_level": 0}
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.tiles = self.tiles and self.tiles.frozen()

    def __repr__(self) -> str:
        levels = "-".join(f"{d:g}" for d in self.level_downsamples)
        return f"Slide({Path(self.path).name}, {self.width_px}x{self.height_px} px, {self.mpp:g} um/px, {levels})"

    def _pixels(self, x: float, y: float, width: int, height: int, plan: ReadPlan) -> np.ndarray:
        """width x height pixels at plan.mpp from the corner (x, y)."""
        step = plan.mpp / self.mpp / plan.downsample
        if not plan.resampled or width * height * step * step <= BLOCK_PX or max(width, height) == 1:
            return reading.read([Job(self, plan, x, y, width, height)])[0]
        return self._in_halves(x, y, width, height, plan)

    def _in_halves(self, x: float, y: float, width: int, height: int, plan: ReadPlan) -> np.ndarray:
        """`_pixels` of a region too large to hold, in two parts that agree where they meet."""
        scale = plan.mpp / self.mpp
        if width >= height:
            half = width // 2
            rest = self._pixels(x + half * scale, y, width - half, height, plan)
            return np.concatenate([self._pixels(x, y, half, height, plan), rest], axis=1)
        half = height // 2
        rest = self._pixels(x, y + half * scale, width, height - half, plan)
        return np.concatenate([self._pixels(x, y, width, half, plan), rest], axis=0)


def _downsample(full: tuple[int, int], level: tuple[int, int]) -> float:
    """Level-0 pixels per level pixel: a whole number where cutting the last pixels off explains the rest."""
    ratio = (full[0] / level[0] + full[1] / level[1]) / 2
    whole = round(ratio)
    if all(abs(n - whole * k) < whole for n, k in zip(full, level, strict=True)):
        return float(whole)
    return ratio
