"""A slide that OpenSlide reads, where its compressed tiles cannot be read from here."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from pathfm import stores
from pathfm.errors import InputError
from pathfm.source import DiskSource
from pathfm.tilemap import Wanted

CACHE_BYTES = 64 * 2**20  # of decoded tiles, for all slides that OpenSlide reads in a process together
LARGEST_TILE_PX = 8192 * 8192  # a tile that is said to be larger is damage


class Fallback:
    """A slide as OpenSlide reads it: opened when first used, anew in a process that was forked; picklable.

    why   its compressed tiles cannot be read from here; part of what is said where OpenSlide cannot either
    tag   of the version of the file that was opened or indexed, as `Source` has it; None: whichever there is

    OpenSlide itself does not notice that a file changes under it. So the file is looked at when it is opened, and
    before and after every window: a changed one is named, and pixels of another version are not returned. Of a slide
    in several files (MRXS, DICOM) this sees the one that is named.
    """

    def __init__(self, path: str, why: str, tag: str | None = None):
        self.path, self.why, self.tag = path, why, tag
        self._handle = self._pid = None

    @property
    def handle(self) -> openslide.OpenSlide:
        """Raises InputError that says what is wrong with the file, or that it has changed."""
        handle = self._handle  # another thread may let go of it meanwhile
        if handle is None or self._pid != os.getpid():
            handle = self._handle = _opened(self.path, self.why)
            self._pid = os.getpid()
            self.check()
        return handle

    def check(self) -> None:
        """Raises InputError where the file is another than the one of `tag`."""
        if self.tag is not None and DiskSource.look(self.path).tag != self.tag:
            self._handle = None  # closed when the last reader lets go of it
            raise InputError(stores.changed(self.path))

    def window(self, wanted: Wanted) -> tuple[np.ndarray, tuple[float, float]]:
        """Pixels of a level on white, and how far right and down of the corner they lie.

        OpenSlide takes whole level-0 positions and divides them by its own downsample (4.0003), so that the
        corner it reads can be off by up to half a level-0 pixel; the distance is in level pixels.
        """
        self.check()
        handle = self.handle
        down = handle.level_downsamples[wanted.level]
        x, y = round(wanted.left * down), round(wanted.top * down)
        try:
            image = handle.read_region((x, y), wanted.level, (wanted.width, wanted.height))
        except openslide.OpenSlideError as error:
            self._handle = None  # OpenSlide refuses every read after a failed one
            self.check()
            raise InputError(
                f"{self.path} is damaged: reading level {wanted.level} at ({x}, {y}) failed with '{error}'; "
                "fetch the file again"
            ) from None
        self.check()
        return np.array(on_white(image)), (wanted.left - x / down, wanted.top - y / down)

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""
        if self._handle is not None and self._pid == os.getpid():
            self._handle.close()
        self._handle = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None, "_pid": None}


def _opened(path: str | Path, why: str) -> openslide.OpenSlide:
    """An open handle, or an InputError that says what is wrong with the file; `why` it is OpenSlide that reads."""
    if stores.is_address(str(path)):
        raise InputError(
            f"{stores.shown(str(path))} cannot be read from there: {why}. Download it, where OpenSlide may read it, or "
            "convert it to tiled pyramidal TIFF (vips tiffsave --tile --pyramid)"
        )
    try:
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise InputError(f"{path} {_unsupported(Path(path), why)}") from None
    except openslide.OpenSlideError as error:
        raise InputError(f"{path} is damaged ({error}); fetch the file again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    _check_tile_sizes(handle, path)
    handle.set_cache(_tile_cache(os.getpid()))
    return handle


def _check_tile_sizes(handle: openslide.OpenSlide, path: str | Path) -> None:
    """OpenSlide ends the whole process where it finds no memory for a tile that a damaged file calls huge."""
    for level in range(handle.level_count):
        sides = (handle.properties.get(f"openslide.level[{level}].tile-{side}", "0") for side in ("width", "height"))
        width, height = map(int, sides)
        if width * height > LARGEST_TILE_PX:
            handle.close()
            raise InputError(f"{path} is damaged: level {level} has tiles of {width} x {height} px; fetch it again")


@lru_cache(maxsize=1)
def _tile_cache(pid: int) -> openslide.OpenSlideCache:
    """One cache of decoded tiles for all slides of a process, so that memory does not grow with open slides."""
    return openslide.OpenSlideCache(CACHE_BYTES)


def _unsupported(path: Path, why: str) -> str:
    """Why neither reader knows the file, and what to do."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:2] not in (b"II", b"MM"):
        return "is no slide format that OpenSlide knows; look at what it really is, or convert it to pyramidal TIFF"
    return (
        f"is a TIFF that cannot be read here ({why}) and that OpenSlide refuses; fetch it again or convert it to "
        "a tiled pyramidal TIFF, e.g. with `vips tiffsave`"
    )


def on_white(image: Image.Image) -> Image.Image:
    """RGB of an RGBA region composited on white; its colours are not premultiplied."""
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image.convert("RGB"), mask=alpha)
    return white
