"""One slide scanned for an index: its geometry, tissue mask, counts, and where its compressed tiles lie."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from pathfm import positions, stores, tilemap, tissue
from pathfm.errors import InputError
from pathfm.sampling import footprint
from pathfm.slide import Slide
from pathfm.tilemap import TileMap

VERSION = 6  # of what is stored and how masks are made; an index of another version is made anew
STANDARD_MPP = (0.25, 0.5, 1.0, 2.0)  # index.slides counts admissible positions at these,
STANDARD_TILE_PX, STANDARD_MIN_TISSUE = 256, 0.4  # for tiles of this size
LEAST_SIDE_PX = 64  # no tile fits a smaller slide
PICTURE_PX = 384  # longest side of the picture of a slide that its scan keeps
ARRAYS = ("mask", "picture", "spoilt", *tilemap.FILES)  # of a scan; all else in it is a column


def scan_or_reason(path: str, mpp, checksums: bool, part: str, version: int) -> tuple[str, dict] | str:
    """The name and content of the part, or why this slide is quarantined: whatever a file does, others go on.

    The part is named by the file as it was before: one that changes meanwhile is read again.
    """
    if version != VERSION:
        raise InputError(f"a worker makes indexes of version {VERSION}, not {version}; install the same pathfm there")
    try:
        return part, scan(path, None if mpp is None or pd.isna(mpp) else mpp, checksums)
    except InputError as error:
        return str(error).replace(str(path), shown_name(path))
    except Exception as error:
        return f"{shown_name(path)} cannot be indexed ({type(error).__name__}: {error}); look at it and leave it out"


def shown_name(path: str) -> str:
    """A slide's file as reasons give it: without folders, and without what is secret in an address."""
    return stores.shown(path) if stores.is_address(path) else Path(path).name


def scan(path: str, mpp: float | None, checksums: bool) -> dict:
    """A slide's geometry, packed mask and counts. Raises InputError with the reason where it is no use."""
    with Slide.open(path, mpp) as slide:
        size = slide.width_px, slide.height_px
        if min(size) < LEAST_SIDE_PX:
            raise InputError(f"{path} is {size[0]} x {size[1]} px, too small for any tile; leave it out")
        _touch_corners(slide)
        cell = max(1, round(tissue.UM_PER_PX / slide.mpp))
        um_per_px = cell * slide.mpp
        rgb = slide.thumbnail(um_per_px)
        fine = um_per_px / tissue.DETAIL >= slide.mpp
        mask, artefacts = tissue.segment(rgb, um_per_px, partial(_detail, slide, cell) if fine else None)
        if not mask.any():
            raise InputError(f"{path} shows no tissue; look at its thumbnail and leave it out")
        found = {
            "width_px": size[0],
            "height_px": size[1],
            "mpp": slide.mpp,
            "levels": " ".join(f"{d:.10g}" for d in slide.level_downsamples),
            "cell_px": cell,
            "tissue_mm2": round(tissue.area_mm2(mask, um_per_px), 4),
        }
        found |= {f"{kind}_mm2": round(tissue.area_mm2(m, um_per_px), 4) for kind, m in artefacts.items()}
        for asked in STANDARD_MPP:
            found[f"positions@{asked}"] = _standard_count(mask, cell, slide, asked)
        found |= {
            "reader": slide.reader,
            "fallback": slide.fallback,
            "codec": slide.codec,
            "scales": " ".join(map(str, slide.scales)),
            "tag": slide.version[0],
            "bytes": slide.version[1],
        }
        tiles = slide.tiles or tilemap.empty()
        if checksums and slide.tiles is not None:
            tiles = tiles._replace(checks=slide.checks())
        return found | {
            "mask": positions.pack(mask).reshape(-1),
            "mask_words": -(-mask.shape[1] // 64),
            "picture": picture(rgb),
            "spoilt": _flags(artefacts),
            **named(tiles),
        }


def picture(rgb: np.ndarray) -> np.ndarray:
    """A thumbnail as the bytes of a JPEG, PICTURE_PX on its longer side at most."""
    scale = min(PICTURE_PX / max(rgb.shape[:2]), 1)
    size = [max(round(side * scale), 1) for side in rgb.shape[1::-1]]
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]


def _flags(artefacts: dict[str, np.ndarray]) -> np.ndarray:
    """Masks as the bytes of a PNG, one bit a kind."""
    flags = sum(artefacts[kind].astype(np.uint8) << bit for bit, kind in enumerate(tissue.KINDS))
    return cv2.imencode(".png", flags)[1]


def _detail(slide: Slide, cell: int, mask: np.ndarray, glass: np.ndarray) -> np.ndarray:
    """`tissue.detail` of the whole slide, read in strips where there is tissue."""
    height, width = mask.shape
    found = np.zeros((2, height, width), np.float32)
    finer = cell * slide.mpp / tissue.DETAIL
    margin = 4  # mask pixels, so that strips agree where they meet
    for top in range(0, height, 256):
        bottom = min(top + 256, height)
        columns = np.flatnonzero(mask[top:bottom].any(axis=0))
        if not len(columns):
            continue
        left, right = columns[0], columns[-1] + 1
        rgb = slide.region(
            (left - margin) * cell,
            (top - margin) * cell,
            (right - left + 2 * margin) * tissue.DETAIL,
            (bottom - top + 2 * margin) * tissue.DETAIL,
            finer,
            resample="always",  # the same filter whichever levels there are: focus is judged by it
        )
        inner = tissue.detail(rgb, glass)[:, margin:-margin, margin:-margin]
        found[:, top:bottom, left:right] = inner
    return found


def _touch_corners(slide: Slide) -> None:
    """Read the last pixels of every level, which a file cut short no longer has."""
    for down in slide.level_downsamples:
        slide.read(slide.width_px - 8 * down, slide.height_px - 8 * down, 8, slide.mpp * down)


def _standard_count(mask: np.ndarray, cell: int, slide: Slide, mpp: float) -> int:
    found = footprint(slide.mpp, slide.level_downsamples, STANDARD_TILE_PX, mpp, scales=slide.scales)
    if found is None:
        return 0
    grid, side = found
    return positions.count(mask, cell, (slide.width_px, slide.height_px), side, grid, STANDARD_MIN_TISSUE)


def named(tiles: TileMap) -> dict[str, np.ndarray]:
    return {f"tilemap.{name}": array for name, array in tiles._asdict().items()}
