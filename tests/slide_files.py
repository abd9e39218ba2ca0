"""Small slides written for tests: exact pixels, any pyramid, any metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import tifffile

from pathfm.cohort import Cohort
from pathfm.synthetic import slides
from pathfm.synthetic.appearance import Origin


def shrink(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Mean over factor x factor blocks, the remainder cut off: float64."""
    height, width = (side // factor for side in pixels.shape[:2])
    blocks = pixels[: height * factor, : width * factor].astype(np.float64)
    return blocks.reshape(height, factor, width, factor, -1).mean(axis=(1, 3))


def write_slide(path: Path, pixels: np.ndarray, mpp=0.5, levels=(1,), **tiff) -> Path:
    """A tiled, uncompressed TIFF that OpenSlide opens as generic; mpp None leaves the resolution out."""
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    scale = {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"} if x else {}
    with tifffile.TiffWriter(path) as file:
        for level in levels:
            image = pixels if level == 1 else np.round(shrink(pixels, level)).astype(np.uint8)
            file.write(
                image, tile=(64, 64), photometric="rgb", subfiletype=int(level > 1), metadata=None, **scale, **tiff
            )
    return path


def halves(pixels: np.ndarray, *factors: int) -> list[np.ndarray]:
    """The pixels averaged by each factor."""
    return [np.round(shrink(pixels, factor)).astype(np.uint8) for factor in factors]


def write_ome(path: Path, pixels: np.ndarray, unit: str = "µm", size: float = 0.25) -> Path:
    """OME-TIFF whose upper levels are sub-images of the first page."""
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size}
    metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as file:
        file.write(pixels, subifds=2, metadata=metadata, compression="lzw", **TILED)
        for level in halves(pixels, 2, 4):
            file.write(level, subfiletype=1, compression="lzw", **TILED)
    return path


TILED = {"tile": (64, 64), "photometric": "rgb"}
PHILIPS = """<?xml version="1.0" encoding="UTF-8" ?>
<DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_SCANNED_IMAGES"><Array>
<DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>
<Attribute Name="DICOM_PIXEL_SPACING">"0.00025" "0.00025"</Attribute>
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{}</Array></Attribute></DataObject>
</Array></Attribute></DataObject>"""
PHILIPS_LEVEL = """<DataObject ObjectType="PixelDataRepresentation">
<Attribute Name="DICOM_PIXEL_SPACING">"{0:g}" "{0:g}"</Attribute></DataObject>"""


def write_philips(path: Path, pixels: np.ndarray) -> Path:
    """A TIFF as Philips exports it: 0.25 um/px, upper levels padded to whole tiles, which its XML tells apart."""
    spacings = "".join(PHILIPS_LEVEL.format(0.00025 * down) for down in (1, 2, 4))
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate([pixels, *halves(pixels, 2, 4)]):
            size = [-(-side // 64) * 64 for side in level.shape[:2]]
            padded = np.zeros((*size, 3), np.uint8)
            padded[: level.shape[0], : level.shape[1]] = level
            about = {"description": PHILIPS.format(spacings), "software": "Philips DP v1.0"} if not number else {}
            file.write(padded, subfiletype=int(number > 0), metadata=None, **about, **TILED)
    return path


def tissue_pixels(width: int = 512, height: int = 512, seed: int = 0) -> np.ndarray:
    """A pink square with purple dots in the middle of white."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 244, np.uint8)
    inner = pixels[height // 8 : -height // 8, width // 8 : -width // 8]
    inner[:] = (214, 150, 190)
    inner[rng.random(inner.shape[:2]) < 0.2] = (120, 70, 150)
    return pixels


def cohort_of(paths: dict[str, object], **columns) -> Cohort:
    """A Cohort of slide_id -> path."""
    return Cohort(pd.DataFrame({"slide_id": list(paths), "path": [str(p) for p in paths.values()], **columns}))


def small_spec(**changes) -> slides.SlideSpec:
    """A synthetic slide of 320 x 256 um."""
    fields = {"mpp": 0.5, "width_px": 640, "height_px": 512}
    return slides.SlideSpec("one", Origin(0, 0, 2, 0, 0), **{**fields, **changes})
