"""One whole-slide image: its size, microns per pixel and levels; any square of it at any mpp."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openslide
from PIL import Image

from pathfm.errors import InputError

MPP_TOLERANCE = 0.01  # a level this close to the mpp asked for is returned as it is
MAX_UPSAMPLE = 1.1  # many 40x slides are 0.2525 mpp: up to 10 % finer than the slide is interpolated
COARSEST_TAG_MPP = 20.0  # a TIFF resolution tag beyond this is meant for printers (72 dpi is 353 um/px)
CACHE_BYTES = 64 * 2**20  # of decoded tiles, for all open slides of a process together
BLOCK_PX = 4096 * 4096  # source pixels held at once while resampling
THREE_WAYS = "give it one: a column 'mpp' in the cohort, Slide.open(path, mpp=...), or mend the file's own metadata"


class ReadPlan(NamedTuple):
    """How a slide serves an mpp: the level read, the true mpp returned, the grid of whole positions."""

    level: int
    downsample: float  # level-0 pixels per pixel of that level
    mpp: float  # of the pixels returned
    grid: int  # g, in level-0 pixels; positions on it are whole
    resampled: bool  # False where the level's own pixels are returned


def plan_read(
    slide_mpp: float,
    downsamples: Sequence[float],
    mpp: float,
    max_upsample: float = MAX_UPSAMPLE,
    resample: str = "auto",
) -> ReadPlan | None:
    """The plan that serves `mpp`, or None where the slide is too coarse for it.

    A level within 1 % of `mpp` passes through with its own true mpp; otherwise the coarsest level that is
    at least as fine is resampled to exactly `mpp`. `resample="always"` never passes through.
    """
    if resample not in ("auto", "always"):
        raise InputError(f"resample={resample!r} is neither 'auto' nor 'always'")
    if not mpp > 0:
        raise InputError(f"mpp={mpp!r} is not a positive number of microns per pixel")
    scale = mpp / slide_mpp
    whole = round(scale)
    near = whole >= 1 and abs(scale - whole) <= MPP_TOLERANCE * whole
    if not near and scale * max_upsample < 1 - 1e-9:
        return None
    grid = whole if near else 1
    if resample == "auto" and near and whole in downsamples:
        return ReadPlan(list(downsamples).index(whole), float(whole), whole * slide_mpp, grid, False)
    fine = [level for level, down in enumerate(downsamples) if down <= scale * (1 + MPP_TOLERANCE)]
    level = max(fine, key=lambda k: downsamples[k], default=0)
    return ReadPlan(level, float(downsamples[level]), float(mpp), grid, True)


class Slide:
    """A slide on disk. `Slide.open` is the way in; the file is opened when first read, once per process.

    path                  as given
    width_px, height_px   of level 0
    mpp                   microns per level-0 pixel
    level_downsamples     level-0 pixels per pixel of each level; 4.0003 that edge truncation explains is 4
    """

    def __init__(self, path: str | Path, width_px: int, height_px: int, mpp: float, downsamples, vendor=""):
        self.path, self.vendor = str(path), vendor
        self.width_px, self.height_px, self.mpp = int(width_px), int(height_px), float(mpp)
        self.level_downsamples = tuple(float(d) for d in downsamples)
        self._handle = self._pid = None

    @classmethod
    def open(cls, path: str | Path, mpp: float | None = None) -> Slide:
        """The slide at `path`; `mpp` overrides a missing or wrong one.

        Raises InputError when the file is missing, is nothing OpenSlide reads, or has no usable mpp.
        """
        handle = _openslide(path)
        width, height = handle.dimensions
        downsamples = [_downsample(handle.dimensions, level) for level in handle.level_dimensions]
        vendor = handle.properties.get("openslide.vendor", "")
        try:
            mpp = _checked_mpp(mpp, path) if mpp is not None else _mpp_of(handle.properties, path)
        except InputError:
            handle.close()
            raise
        slide = cls(path, width, height, mpp, downsamples, vendor)
        slide._handle, slide._pid = handle, os.getpid()
        return slide

    def plan(self, mpp: float, max_upsample: float = MAX_UPSAMPLE, resample: str = "auto") -> ReadPlan:
        """How `mpp` is read. Raises InputError where that would upsample beyond `max_upsample`."""
        plan = plan_read(self.mpp, self.level_downsamples, mpp, max_upsample, resample)
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

        Outside the slide is white. Off the plan's grid a level that would pass through is shifted by
        interpolation at its own mpp.
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
        if self._handle is not None and self._pid == os.getpid():
            self._handle.close()
        self._handle = None

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None, "_pid": None}

    def __repr__(self) -> str:
        levels = "-".join(f"{d:g}" for d in self.level_downsamples)
        return f"Slide({Path(self.path).name}, {self.width_px}x{self.height_px} px, {self.mpp:g} um/px, {levels})"

    def _pixels(self, x: float, y: float, width: int, height: int, plan: ReadPlan) -> np.ndarray:
        """width x height pixels at plan.mpp from the corner (x, y)."""
        down = plan.downsample
        step = plan.mpp / self.mpp / down  # level pixels per output pixel
        left, top = x / down, y / down
        if not plan.resampled and left == int(left) and top == int(top):
            return np.array(self._level(int(left), int(top), width, height, plan)[0])
        if width * height * step * step > BLOCK_PX and max(width, height) > 1:
            return self._in_halves(x, y, width, height, plan)
        margin = math.ceil(2 * max(step, 1)) + 2  # the bicubic filter reaches two output pixels
        col, row = math.floor(left) - margin, math.floor(top) - margin
        size = [math.ceil(n * step) + 2 * margin + 1 for n in (width, height)]
        image, (at_col, at_row) = self._level(col, row, *size, plan)
        box = (
            left - at_col,
            top - at_row,
            left - at_col + width * step,
            top - at_row + height * step,
        )
        return np.array(image.resize((width, height), Image.Resampling.BICUBIC, box=box))

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

    def _level(
        self, col: int, row: int, width: int, height: int, plan: ReadPlan
    ) -> tuple[Image.Image, tuple[float, float]]:
        """Pixels of a level from (col, row) on white, and where that corner really lies, in level pixels.

        OpenSlide takes whole level-0 positions and divides them by its own downsample (4.0003), so that the
        corner it reads can be off by up to half a level-0 pixel.
        """
        handle = self._open()
        down = handle.level_downsamples[plan.level]
        x, y = round(col * down), round(row * down)
        try:
            image = handle.read_region((x, y), plan.level, (width, height))
        except openslide.OpenSlideError as error:
            self._handle = None  # OpenSlide refuses every read after a failed one
            raise InputError(
                f"{self.path} is damaged: reading level {plan.level} at ({x}, {y}) failed with '{error}'; "
                "fetch the file again"
            ) from None
        return _on_white(image), (x / down, y / down)

    def _open(self) -> openslide.OpenSlide:
        if self._handle is None or self._pid != os.getpid():
            self._handle, self._pid = _openslide(self.path), os.getpid()
        return self._handle


def _openslide(path: str | Path) -> openslide.OpenSlide:
    """An open handle, or an InputError that says what is wrong with the file."""
    if "://" in str(path):
        raise InputError(f"{path} is an address, and only local files are read; download it first")
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; correct its path")
    if path.is_dir() and not any(path.iterdir()):
        raise InputError(f"{path} is an empty folder; give the slide file")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes); fetch the file again")
    try:
        handle = openslide.OpenSlide(path)
        handle.set_cache(_tile_cache(os.getpid()))
        return handle
    except openslide.OpenSlideUnsupportedFormatError:
        raise InputError(f"{path} {_unsupported(path)}") from None
    except openslide.OpenSlideError as error:
        raise InputError(f"{path} is damaged ({error}); fetch the file again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


@lru_cache(maxsize=1)
def _tile_cache(pid: int) -> openslide.OpenSlideCache:
    """One cache of decoded tiles for all slides of a process, so that memory does not grow with open slides."""
    return openslide.OpenSlideCache(CACHE_BYTES)


def _unsupported(path: Path) -> str:
    """Why OpenSlide does not know the file, and what to do."""
    if path.is_dir():
        return "is a folder; give the slide file"
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:2] not in (b"II", b"MM"):
        return "is no slide format that OpenSlide knows; look at what it really is, or convert it to pyramidal TIFF"
    if path.name.lower().endswith((".ome.tif", ".ome.tiff")):
        return "is an OME-TIFF, which OpenSlide refuses; convert it to pyramidal TIFF, e.g. with `vips tiffsave`"
    return (
        "is a TIFF that OpenSlide refuses (not tiled, or cut short); fetch it again or convert it to "
        "a tiled pyramidal TIFF"
    )


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of an RGBA region composited on white; its colours are not premultiplied."""
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image.convert("RGB"), mask=alpha)
    return white


def _downsample(full: tuple[int, int], level: tuple[int, int]) -> float:
    """Level-0 pixels per level pixel: a whole number where cutting the last pixels off explains the rest."""
    ratio = (full[0] / level[0] + full[1] / level[1]) / 2
    whole = round(ratio)
    if all(abs(n - whole * k) < whole for n, k in zip(full, level, strict=True)):
        return float(whole)
    return ratio


def _mpp_of(properties, path) -> float:
    """Microns per level-0 pixel from the file's metadata."""
    x, y = (_positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if x is None or y is None:
        x, y = (_tag_mpp(properties, axis) for axis in "XY")
    if x is None or y is None or _printers(properties, x):
        raise InputError(f"{path} has no mpp (microns per pixel); {THREE_WAYS}")
    if abs(x - y) > MPP_TOLERANCE * min(x, y):
        raise InputError(f"{path} has pixels that are not square: {x:g} x {y:g} um. If the file is wrong, {THREE_WAYS}")
    return _checked_mpp((x + y) / 2, path)


def _printers(properties, mpp: float) -> bool:
    generic = properties.get("openslide.vendor", "generic-tiff") == "generic-tiff"
    return generic and mpp > COARSEST_TAG_MPP


def _tag_mpp(properties, axis: str) -> float | None:
    """um/px from a TIFF resolution tag, which counts pixels per centimetre or inch."""
    per_unit = _positive(properties.get(f"tiff.{axis}Resolution"))
    unit_um = {"centimeter": 10_000.0, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit"))
    if per_unit is None or unit_um is None or unit_um / per_unit > COARSEST_TAG_MPP:
        return None
    return unit_um / per_unit


def _positive(text) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _checked_mpp(mpp, path) -> float:
    value = _positive(mpp)
    if value is None or not 0.01 <= value <= 1000:
        raise InputError(f"{path} has mpp {mpp!r}; microns per pixel lie between 0.01 and 1000")
    return value
