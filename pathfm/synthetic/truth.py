"""What is known of a synthetic slide because it was drawn: classes, nuclei, artefacts, latent variables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from pathfm.errors import InputError, nearest
from pathfm.storage import read_json
from pathfm.synthetic.artefacts import FLAG, KINDS
from pathfm.synthetic.painters import CLASSES
from pathfm.synthetic.slides import sidecar


@dataclass(frozen=True)
class Truth:
    """The truth of one slide; open it with `Truth.open`.

    class_map   (h, w) uint8 every `map_um` um: 0 glass, otherwise 1 + index into CLASSES
    artefacts   (h, w) uint8 on the same grid, bits of `artefacts.FLAG`
    nuclei      one row a nucleus: x_um, y_um from the slide's corner, diameter_um (of the disc of equal area),
                major_um, minor_um, angle, dark to rough (what fills them, see nuclei.NUCLEUS), class, kind
    structure   (h, w, 2) int8 on the class map's grid: depth in um, within +-60, into the class's own structure
                (epithelium, fascicle, germinal centre, septum) and into its lumina
    latents     what the slide was drawn from: tissue parameters by class, stain, scanner, labels
    """

    path: Path
    class_map: np.ndarray
    artefacts: np.ndarray
    map_um: float
    nuclei: pd.DataFrame
    structure: np.ndarray
    latents: dict

    @classmethod
    def open(cls, slide_path: str | Path) -> Truth:
        """The truth beside `slide_path`. Raises InputError where there is none: the slide is not synthetic."""
        file = sidecar(slide_path, ".truth.npz")
        if not file.is_file():
            raise InputError(f"{slide_path} has no truth beside it ({file.name}); only synthetic slides do")
        latents = read_json(sidecar(slide_path, ".latents.json"))
        with np.load(file) as stored:
            return cls(
                Path(slide_path),
                stored["class_map"],
                stored["artefacts"],
                float(stored["map_um"]),
                _nuclei(stored["nuclei"]),
                stored["structure"],
                latents,
            )

    @property
    def mpp(self) -> float:
        """Microns per level-0 pixel of the slide."""
        return float(self.latents["spec"]["mpp"])

    def class_fraction(self, x: float, y: float, side_um: float) -> pd.Series:
        """Share of glass and of each class in the square with corner (x, y), in level-0 px; sums to 1 inside."""
        rows, high = _cover(y * self.mpp / self.map_um, side_um / self.map_um, self.class_map.shape[0])
        columns, wide = _cover(x * self.mpp / self.map_um, side_um / self.map_um, self.class_map.shape[1])
        area = np.outer(high, wide).ravel()
        covered = np.bincount(self.class_map[rows, columns].ravel(), weights=area, minlength=1 + len(CLASSES))
        return pd.Series(covered * self.map_um**2 / side_um**2, index=["glass", *CLASSES])

    def tissue_mask(self, um_per_px: float, without: tuple[str, ...] = KINDS) -> np.ndarray:
        """Tissue, lumina and fat included, but no artefact of the kinds in `without`: (h, w) bool."""
        spoilt = sum(FLAG[_kind(kind)] for kind in without)
        return self._at((self.class_map > 0) & (self.artefacts & spoilt == 0), um_per_px)

    def artefact_mask(self, kind: str | None, um_per_px: float) -> np.ndarray:
        """Where there is an artefact of `kind` ("pen", "fold", "bubble", "blur"; None for any): (h, w) bool."""
        flags = 255 if kind is None else FLAG[_kind(kind)]
        return self._at(self.artefacts & flags != 0, um_per_px)

    def class_mask(self, name: str, um_per_px: float) -> np.ndarray:
        """Where the class `name` is: (h, w) bool."""
        if name not in CLASSES:
            raise InputError(f"no tissue class is called {name!r}.{nearest(name, CLASSES)}")
        return self._at(self.class_map == 1 + CLASSES.index(name), um_per_px)

    def _at(self, mask: np.ndarray, um_per_px: float) -> np.ndarray:
        """`mask` on a grid of `um_per_px`, by area; as large as `Slide.thumbnail(um_per_px)`."""
        spec = self.latents["spec"]
        shape = tuple(math.ceil(spec[side] * self.mpp / um_per_px - 1e-6) for side in ("height_px", "width_px"))
        scale = um_per_px / self.map_um
        y, x = (np.minimum(np.arange(n + 1) * scale, m) for n, m in zip(shape, mask.shape, strict=True))
        sums = _at_edges(integral(mask), y[:, None], x[None])
        covered = sums[1:, 1:] - sums[:-1, 1:] - sums[1:, :-1] + sums[:-1, :-1]
        return covered >= 0.5 * scale**2


def _cover(start: float, length: float, size: int) -> tuple[slice, np.ndarray]:
    """The cells of 0..size that an interval touches, and how much of each."""
    first, last = max(math.floor(start), 0), min(math.ceil(start + length), size)
    cells = np.arange(first, max(last, first))
    return slice(first, max(last, first)), np.minimum(cells + 1, start + length) - np.maximum(cells, start)


def integral(mask: np.ndarray) -> np.ndarray:
    """Sums of `mask` above and left of every corner: (h + 1, w + 1) float64."""
    return cv2.integral(mask.astype(np.uint8), sdepth=cv2.CV_64F)


def _at_edges(sums: np.ndarray, y, x) -> np.ndarray:
    """`sums` at fractional corners, bilinear: exact for masks that are constant within their cells."""
    y0, x0 = np.clip(np.floor(y), 0, sums.shape[0] - 2), np.clip(np.floor(x), 0, sums.shape[1] - 2)
    fy, fx = y - y0, x - x0
    y0, x0 = y0.astype(int), x0.astype(int)
    top = sums[y0, x0] * (1 - fx) + sums[y0, x0 + 1] * fx
    return top * (1 - fy) + (sums[y0 + 1, x0] * (1 - fx) + sums[y0 + 1, x0 + 1] * fx) * fy


def _window_sums(sums: np.ndarray, left_um, top_um, side_um: float, map_um: float):
    """Cells of the mask behind `sums` in squares of `side_um`; arrays of corners are welcome."""
    height, width = sums.shape[0] - 1, sums.shape[1] - 1
    x0, x1 = (np.clip(np.asarray(at) / map_um, 0, width) for at in (left_um, left_um + side_um))
    y0, y1 = (np.clip(np.asarray(at) / map_um, 0, height) for at in (top_um, top_um + side_um))
    corner = lambda y, x: _at_edges(sums, y, x)  # noqa: E731
    return corner(y1, x1) - corner(y0, x1) - corner(y1, x0) + corner(y0, x0)


def _kind(kind: str) -> str:
    if kind not in FLAG:
        raise InputError(f"no artefact is called {kind!r}.{nearest(kind, FLAG)}")
    return kind


def _nuclei(stored: np.ndarray) -> pd.DataFrame:
    table = pd.DataFrame({name: stored[name] for name in stored.dtype.names})
    table["diameter_um"] = np.sqrt(table["major_um"] * table["minor_um"])
    table["class"] = np.array(("glass", *CLASSES))[table.pop("cls").to_numpy()]
    return table
