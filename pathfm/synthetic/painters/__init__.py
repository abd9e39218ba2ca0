"""The eight tissue classes, planned in um over a whole slide and drawn window by window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pathfm.synthetic.painters.params import CLASSES, TissueParams

__all__ = ["CLASSES", "Scene", "TissueParams", "plan", "raster"]


@dataclass(frozen=True)
class Scene:
    """A slide before it is coloured: everything in um, nothing in pixels.

    class_map  (h, w) uint8, 0 glass, otherwise 1 + index into CLASSES; map_um is its grid in um
    nuclei     structured array: x_um, y_um, major_um, minor_um (whole axes), angle, cls (1..8), kind
    """

    class_map: np.ndarray
    map_um: float
    nuclei: np.ndarray
    seed: int


_LEVELS = np.array(
    [[0, 0], [0.5, 0.5], [0.35, 0.45], [0.1, 0.6], [0.12, 0.75], [0.9, 0.2], [0.01, 0.06], [0.15, 0.1], [0.3, 0.5]], np.float32
)
_KIND = "U12"
NUCLEUS = np.dtype(
    [("x_um", "f4"), ("y_um", "f4"), ("major_um", "f4"), ("minor_um", "f4"), ("angle", "f4"), ("cls", "u1"), ("kind", _KIND)]
)


def plan(class_map, map_um: float, params, seed: int) -> Scene:
    """Place everything on a slide. `params` is a TissueParams, or a mapping from class name to one."""
    rng = np.random.default_rng(seed)
    cells = np.argwhere(class_map > 0)
    count = int(len(cells) * map_um**2 / 1e6 * 4000)
    at = cells[rng.integers(len(cells), size=count)] if count else np.zeros((0, 2), int)
    nuclei = np.zeros(count, NUCLEUS)
    nuclei["y_um"], nuclei["x_um"] = ((at + rng.random((count, 2))) * map_um).T
    nuclei["major_um"], nuclei["minor_um"] = 8, 6
    nuclei["cls"] = class_map[at[:, 0], at[:, 1]]
    nuclei["kind"] = "epithelial"
    return Scene(class_map, map_um, nuclei, seed)


def raster(scene: Scene, x_um: float, y_um: float, width_px: int, height_px: int, um_per_px: float):
    """Haematoxylin and eosin, two (height_px, width_px) float32, of the window whose corner is (x_um, y_um)."""
    x = ((x_um + (np.arange(width_px) + 0.5) * um_per_px) / scene.map_um).astype(int)
    y = ((y_um + (np.arange(height_px) + 0.5) * um_per_px) / scene.map_um).astype(int)
    height, width = scene.class_map.shape
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))[None]
    cls = scene.class_map[np.clip(y, 0, height - 1)[:, None], np.clip(x, 0, width - 1)[None]] * inside
    levels = _LEVELS[cls]
    return np.ascontiguousarray(levels[..., 0]), np.ascontiguousarray(levels[..., 1])
