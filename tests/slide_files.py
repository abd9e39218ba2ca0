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
