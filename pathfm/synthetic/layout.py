"""Where each tissue lies on a slide: a natural outline on glass, layers, a tumour and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from scipy import ndimage

from pathfm.synthetic.painters import CLASSES

MAP_UM = 2.0  # grid of class maps and artefact masks, um
_COARSE_UM = 8.0  # the layout is decided on this grid and its borders drawn on MAP_UM
CODE = {name: index + 1 for index, name in enumerate(CLASSES)}  # value in a class map; 0 is glass
KINDS = ("section", "core", "fragments")

# Shares of the tissue area, before a slide's own variation. Ours: chosen so that labelled tiles of every class exist.
TYPICAL = {
    "tumour": 0.20,
    "normal": 0.19,
    "stroma": 0.15,
    "muscle": 0.14,
    "lymphocytes": 0.09,
    "adipose": 0.09,
    "mucus": 0.07,
    "necrosis": 0.07,
}


@dataclass(frozen=True)
class Plot:
    """What a slide's layout is drawn from.

    shares            wanted fraction of the tissue of each class, by name; a class left out or 0 is absent
    kind              "section" (layers of a bowel wall), "core" (no layers) or "fragments" (several pieces)
    lymphocytes_um    typical distance of lymphoid aggregates from the edge of the tumour
    """

    width_um: float
    height_um: float
    shares: dict[str, float] = field(default_factory=lambda: dict(TYPICAL))
    kind: str = "section"
    lymphocytes_um: float = 120.0


def class_map(plot: Plot, rng: np.random.Generator) -> np.ndarray:
    """The tissue of every MAP_UM square: (h, w) uint8, 0 glass, otherwise CODE[class]. Deterministic in `rng`."""
    grid = _Grid(plot.width_um, plot.height_um, rng)
    tissue = _outline(plot, grid)
    return _fine(_fill(plot, grid, tissue), grid)


class _Grid:
    """Coordinates and smooth noise on the coarse grid; lengths in um."""

    def __init__(self, width_um: float, height_um: float, rng: np.random.Generator):
        self.rng = rng
        self.fine = (round(height_um / MAP_UM), round(width_um / MAP_UM))
        self.shape = (round(height_um / _COARSE_UM), round(width_um / _COARSE_UM))
        y, x = np.mgrid[: self.shape[0], : self.shape[1]].astype(np.float32)
        self.x = (x + 0.5) * _COARSE_UM - width_um / 2
        self.y = (y + 0.5) * _COARSE_UM - height_um / 2
        self.side_um = min(width_um, height_um)
        # Small test slides keep a layout: structures shrink once a slide is under 1.6 mm.
        self.shrink = min(1.0, self.side_um / 1600)

    def noise(self, length_um: float, shape: tuple[int, int] | None = None, um: float = _COARSE_UM) -> np.ndarray:
        """A smooth field of zero mean and unit variance whose lumps are about `length_um` across."""
        return smooth_noise(self.rng, shape or self.shape, length_um * self.shrink / um)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Noise of zero mean and unit variance, (h, w) float32, smooth over about `cell` pixels."""
    cell = max(cell / 2, 1.0)
    height, width = (int(np.ceil(side / cell)) + 5 for side in shape)
    lattice = rng.standard_normal((height, width), dtype=np.float32)
    shift = rng.random(2) + 1.5
    affine = np.array([[1 / cell, 0, shift[0]], [0, 1 / cell, shift[1]]], np.float32)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    field_ = cv2.warpAffine(lattice, affine, shape[::-1], flags=flags, borderMode=cv2.BORDER_REFLECT)
    return (field_ - field_.mean()) / (field_.std() + 1e-6)


def _outline(plot: Plot, grid: _Grid) -> np.ndarray:
    """Where there is tissue at all: (h, w) bool on the coarse grid."""
    rng, half = grid.rng, grid.side_um / 2
    ragged = 0.13 * grid.noise(900) + 0.05 * grid.noise(260) + 0.02 * grid.noise(80)
    if plot.kind == "fragments":
        return _fragments(plot, grid, ragged)
    turn = rng.uniform(0, np.pi)
    u = (grid.x * np.cos(turn) + grid.y * np.sin(turn)) / (half * rng.uniform(0.82, 0.95))
    v = (-grid.x * np.sin(turn) + grid.y * np.cos(turn)) / (half * rng.uniform(0.74, 0.90))
    power = rng.uniform(2.3, 3.2)
    radius = (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power) + ragged
    inside = radius < 1
    if plot.kind == "section":  # the knife at grossing leaves one straight edge
        inside &= u + 0.01 * grid.noise(120) < rng.uniform(0.72, 0.95)
    edge = np.minimum(grid.shape[1] * 4.0 - np.abs(grid.x), grid.shape[0] * 4.0 - np.abs(grid.y))
    inside &= edge > 40 * grid.shrink
    pieces, count = ndimage.label(inside)
    if count == 0:
        return inside
    sizes = np.bincount(pieces.ravel())[1:]
    return ndimage.binary_fill_holes(np.isin(pieces, 1 + np.flatnonzero(sizes > 0.02 * sizes.sum())))


def _fragments(plot: Plot, grid: _Grid, ragged: np.ndarray) -> np.ndarray:
    """Three or four pieces, side by side and each at its own angle."""
    rng = grid.rng
    count = int(rng.integers(3, 5))
    turn = rng.uniform(-0.35, 0.35) + (np.pi / 2 if rng.random() < 0.5 else 0)
    along, across = np.cos(turn), np.sin(turn)
    pitch = 0.94 * grid.side_um / count
    inside = np.zeros(grid.shape, bool)
    for piece in range(count):
        offset = (piece - (count - 1) / 2) * pitch
        tilt = turn + rng.uniform(-0.12, 0.12)
        dx = grid.x + across * offset - along * rng.uniform(-0.08, 0.08) * grid.side_um
        dy = grid.y - along * offset
        u = (dx * np.cos(tilt) + dy * np.sin(tilt)) / (grid.side_um * rng.uniform(0.36, 0.44))
        v = (-dx * np.sin(tilt) + dy * np.cos(tilt)) / (pitch * rng.uniform(0.40, 0.46))
        inside |= (np.abs(u) ** 3.5 + np.abs(v) ** 3.5) ** (1 / 3.5) + 0.8 * ragged < 1
    edge = np.minimum(grid.shape[1] * 4.0 - np.abs(grid.x), grid.shape[0] * 4.0 - np.abs(grid.y))
    return ndimage.binary_fill_holes(inside & (edge > 40 * grid.shrink))


def _fill(plot: Plot, grid: _Grid, tissue: np.ndarray) -> np.ndarray:
    """Classes on the coarse grid. Areas follow `plot.shares` because every border is a quantile of a field."""
    share = {name: max(plot.shares.get(name, 0.0), 0.0) for name in CLASSES}
    total = sum(share.values())
    area = {name: value / total * tissue.sum() for name, value in share.items()}
    classes = np.zeros(grid.shape, np.uint8)
    if not tissue.any():
        return classes
    complex_ = _lowest(_tumour_field(plot, grid, tissue), tissue, area["tumour"] * 1.12 + area["necrosis"])
    base = tissue & ~complex_
    _layers(plot, grid, classes, base, area)
    classes[complex_] = CODE["tumour"] if share["tumour"] else CODE["stroma"]

    to_edge = (_distance(~complex_) - _distance(complex_)) if complex_.any() else grid.noise(700) * 300
    ring = np.abs(to_edge - 40 * grid.shrink) / (260 * grid.shrink)
    pools = grid.noise(380) + 0.25 * grid.noise(110) - 1.1 * ring
    inner = tissue & (_distance(tissue) > 60 * grid.shrink)
    classes[_lowest(-pools, inner, area["mucus"])] = CODE["mucus"]

    depth = -to_edge / (200 * grid.shrink)
    dead = grid.noise(420) + 0.3 * grid.noise(120) + 1.6 * np.minimum(depth, 1.2)
    classes[_lowest(-dead, complex_ & (classes == CODE["tumour"]), area["necrosis"])] = CODE["necrosis"]
    if share["stroma"]:  # septa of the tumour
        ridge = np.abs(grid.noise(420) + 0.2 * grid.noise(120))
        nests = classes == CODE["tumour"]
        classes[_lowest(ridge, nests, max(nests.sum() - area["tumour"], 0))] = CODE["stroma"]
    _aggregates(plot, grid, classes, to_edge, area["lymphocytes"])
    return classes


def _tumour_field(plot: Plot, grid: _Grid, tissue: np.ndarray) -> np.ndarray:
    """Small inside the tumour: a centre off the middle, an irregular front, a few islands ahead of it."""
    rng = grid.rng
    rows, cols = np.nonzero(tissue & (_distance(tissue) > 0.12 * grid.side_um))
    if len(rows) == 0:
        rows, cols = np.nonzero(tissue)
    pick = rng.integers(len(rows))
    dx, dy = grid.x - grid.x[rows[pick], cols[pick]], grid.y - grid.y[rows[pick], cols[pick]]
    turn, long = rng.uniform(0, np.pi), rng.uniform(1.0, 1.5)
    u, v = dx * np.cos(turn) + dy * np.sin(turn), -dx * np.sin(turn) + dy * np.cos(turn)
    radius = np.hypot(u / long, v * long) / (0.3 * grid.side_um)
    return radius + 0.24 * grid.noise(600) + 0.13 * grid.noise(200) + 0.06 * grid.noise(70)


def _layers(plot: Plot, grid: _Grid, classes: np.ndarray, base: np.ndarray, area: dict[str, float]) -> None:
    """Mucosa, submucosa, muscle and fat over `base`, by depth from the surface; written into `classes`."""
    rng = grid.rng
    turn = rng.uniform(0, 2 * np.pi)
    downward = -grid.x * np.sin(turn) + grid.y * np.cos(turn)
    if plot.kind == "section":
        glass_above = ~(classes.astype(bool) | ndimage.binary_dilation(base, iterations=2)) & (downward < 0)
        surface = _distance(~glass_above) if glass_above.any() else downward
        depth = 0.75 * surface + 0.25 * downward
        depth = depth + (70 * grid.noise(700) + 30 * grid.noise(180)) * grid.shrink
    else:
        depth = 0.35 * downward + (260 * grid.noise(800) + 60 * grid.noise(200)) * grid.shrink
    order = ("normal", "stroma", "muscle", "adipose")
    wanted = np.array([area[name] for name in order])
    cells = np.flatnonzero(base)
    if len(cells) == 0:
        return
    if wanted.sum() == 0:
        wanted[1] = 1
    ranked = cells[np.argsort(depth.ravel()[cells], kind="stable")]
    cuts = np.round(np.cumsum(wanted) / wanted.sum() * len(cells)).astype(int)
    for name, cut_from, cut_to in zip(order, [0, *cuts[:-1]], cuts, strict=True):
        classes.ravel()[ranked[cut_from:cut_to]] = CODE[name]
    if plot.kind == "section" and wanted[2] and 0 < cuts[0] < len(ranked):  # muscularis mucosae
        border = depth.ravel()[ranked[cuts[0]]]
        classes[base & (np.abs(depth - border) < 22 * grid.shrink)] = CODE["muscle"]


def _aggregates(plot: Plot, grid: _Grid, classes: np.ndarray, to_edge: np.ndarray, cells: float) -> None:
    """Round lymphoid aggregates at about `plot.lymphocytes_um` outside the tumour; written into `classes`."""
    if cells < 1:
        return
    rng = grid.rng
    host = np.isin(classes, [CODE["stroma"], CODE["normal"], CODE["muscle"], CODE["adipose"]])
    if not host.any():
        host = classes > 0
    host &= _distance(classes > 0) > min(110 * grid.shrink, 0.6 * _distance(classes > 0).max())
    wish = -(np.abs(to_edge - plot.lymphocytes_um * grid.shrink) / (90 * grid.shrink)) + 0.7 * grid.noise(300)
    wish = np.where(host, wish, -np.inf)
    radius = rng.uniform(130, 200) * grid.shrink
    count = max(1, round(cells * _COARSE_UM**2 / (np.pi * radius**2)))
    nearest = np.full(grid.shape, np.inf, np.float32)
    for _ in range(count):
        row, col = np.unravel_index(int(np.argmax(wish)), wish.shape)
        size, turn, long = rng.uniform(0.75, 1.3), rng.uniform(0, np.pi), rng.uniform(1.0, 1.25)
        dx, dy = grid.x - grid.x[row, col], grid.y - grid.y[row, col]
        u, v = dx * np.cos(turn) + dy * np.sin(turn), -dx * np.sin(turn) + dy * np.cos(turn)
        near = np.hypot(u / long, v * long) / (radius * size)
        nearest = np.minimum(nearest, near)
        wish = np.where(near < 2.4, -np.inf, wish)
        if not np.isfinite(wish).any():
            break
    lumps = nearest + 0.10 * grid.noise(160) + 0.05 * grid.noise(60)
    classes[_lowest(lumps, classes > 0, cells)] = CODE["lymphocytes"]


def _lowest(values: np.ndarray, where: np.ndarray, count: float) -> np.ndarray:
    """The mask of the `count` cells of `where` with the smallest values."""
    chosen = np.zeros(where.shape, bool)
    cells = np.flatnonzero(where)
    count = min(round(count), len(cells))
    if count > 0:
        order = np.argpartition(values.ravel()[cells], count - 1)[:count]
        chosen.ravel()[cells[order]] = True
    return chosen


def _distance(mask: np.ndarray) -> np.ndarray:
    """Distance of every cell of `mask` to the nearest cell outside it, um; the frame counts as outside."""
    padded = np.pad(mask, 1).astype(np.uint8)
    return cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1] * _COARSE_UM


def _fine(classes: np.ndarray, grid: _Grid) -> np.ndarray:
    """`classes` on the MAP_UM grid, its staircase replaced by borders that wander by a few um."""
    shape = grid.fine
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    scale = MAP_UM / _COARSE_UM
    sway = [sum(a * grid.noise(length, shape, MAP_UM) for a, length in ((5, 90), (3, 30))) for _ in range(2)]
    x, y = (x + 0.5 + sway[0] / MAP_UM) * scale - 0.5, (y + 0.5 + sway[1] / MAP_UM) * scale - 0.5
    best = np.full(shape, 0.0, np.float32)
    fine = np.zeros(shape, np.uint8)
    for code in np.unique(classes):
        soft = cv2.GaussianBlur((classes == code).astype(np.float32), (0, 0), 1.2)
        value = cv2.remap(soft, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        better = value > best
        fine[better], best[better] = code, value[better]
    return fine
