"""The eight tissue classes, planned in um over a whole slide and drawn window by window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial import cKDTree

from pathfm.synthetic import fields
from pathfm.synthetic.nuclei import BODY, NUCLEUS, Layer, stamp_bodies, stamp_nuclei
from pathfm.synthetic.painters import connective, epithelium, materials
from pathfm.synthetic.painters.ground import DEPTH, GRID_UM, HOLLOW, NX, NY, Ground, by_class
from pathfm.synthetic.painters.params import CLASSES, TissueParams

__all__ = ["CLASSES", "Scene", "TissueParams", "plan", "raster"]

_TABLE = np.dtype(
    [
        *((name, "f4") for name in ("x_um", "y_um", "major_um", "minor_um", "angle")),
        *((name, "f2") for name in ("dark", "vesicle", "grain", "nucleoli", "rough")),
        ("cls", "u1"),
        ("kind", "U12"),
    ]
)
_BLOCK_UM = 16.0  # the adipocytes that can matter are listed per square of this side
_COARSEST_UM = 1.0  # larger pixels are averages of pixels no larger than this


@dataclass(frozen=True)
class Scene:
    """A slide before it is coloured: everything in um, nothing in pixels.

    class_map  (h, w) uint8, 0 glass, otherwise 1 + index into CLASSES; map_um is its grid in um
    nuclei     structured array: x_um, y_um, major_um, minor_um (whole axes), angle (radians), what fills them (dark to
               rough, see NUCLEUS), cls (1..8), kind
    The rest is what `raster` draws from.
    """

    class_map: np.ndarray
    map_um: float
    nuclei: np.ndarray
    seed: int
    shift: float
    codes: np.ndarray
    shares: np.ndarray
    maps: np.ndarray
    region_of: np.ndarray
    table: np.ndarray
    fat_cells: np.ndarray
    fat_seeds: np.ndarray
    bodies: tuple[Layer, ...]
    cells: Layer

    def structure(self) -> np.ndarray:
        """Depth into the class's own structure and into its lumina, um, on the class map: (h, w, 2) int8, within 60."""
        size = self.class_map.shape[1::-1]
        maps = [cv2.resize(self.maps[..., k], size, interpolation=cv2.INTER_AREA) for k in (DEPTH, HOLLOW)]
        return np.stack(maps, -1).clip(-60, 60).round().astype(np.int8)


def plan(
    class_map: np.ndarray, map_um: float, params, seed: int, departure: float = 0.4, painted_as: dict | None = None
) -> Scene:
    """Place glands, fibres, vessels, fat cells and nuclei over a slide.

    class_map  (h, w) uint8, 0 glass, otherwise 1 + index into CLASSES, one square every map_um
    params     a TissueParams, or one per class: a mapping from class name
    departure  of each connected region from those parameters, as a share of the spread between patients
    painted_as class name -> name of the class whose painter draws it, with the parameters of its own
    """
    code = {name: number for number, name in enumerate(CLASSES, 1)}
    painted_as = {code[name]: code[painter] for name, painter in (painted_as or {}).items()}
    ground = Ground(_on_grid(class_map, map_um), by_class(params), seed, departure, painted_as)
    connective.flows(ground)
    epithelium.plan_tumour(ground)
    epithelium.plan_normal(ground)
    _distance_to_glands(ground)
    connective.plan_mucus(ground)
    connective.plan_muscle(ground)
    connective.plan_stroma(ground)
    connective.plan_lymphocytes(ground)
    fat = connective.plan_adipose(ground)
    epithelium.plan_necrosis(ground)
    smooth = np.clip(ground.maps[..., DEPTH], -60, 60)
    ground.maps[..., NX], ground.maps[..., NY] = fields.gradient(smooth, 2.5)
    codes, shares = _borders(ground.painted)
    region_of = np.where(ground.region_of, ground.region_of, cv2.dilate(ground.region_of, np.ones((9, 9), np.uint8)))
    nuclei, cells = _nuclei(ground)
    return Scene(
        class_map,
        map_um,
        nuclei,
        seed,
        ground.shift,
        codes,
        shares,
        ground.maps,
        region_of,
        np.stack(ground.table),
        _fat_blocks(fat, ground.painted),
        fat,
        tuple(Layer(_rows(ground.bodies[k], len(BODY)), *ground.size_um) for k in sorted(ground.bodies)),
        cells,
    )


def raster(
    scene: Scene, x_um: float, y_um: float, width_px: int, height_px: int, um_per_px: float
) -> tuple[np.ndarray, np.ndarray]:
    """Haematoxylin and eosin, each (height_px, width_px) float32, of the window whose corner is (x_um, y_um).

    The unit is optical density at the stain's strongest wavelength for a typical section. Every pixel depends on
    its own place only, so windows fit together; beyond 1 um per pixel finer pixels are averaged.
    """
    parts = max(1, math.ceil(um_per_px / _COARSEST_UM - 1e-9))
    um = um_per_px / parts
    h = np.zeros((height_px * parts, width_px * parts), np.float32)
    e = np.zeros_like(h)
    noise = fields.bank(round(um, 2))
    materials.paint(
        *(
            h,
            e,
            float(x_um),
            float(y_um),
            um,
            scene.codes,
            scene.shares,
            scene.maps,
            scene.region_of,
            scene.table,
        ),
        *(scene.fat_cells, scene.fat_seeds, _BLOCK_UM, noise, scene.shift),
    )
    box = (x_um, y_um, x_um + width_px * um_per_px, y_um + height_px * um_per_px)
    for layer in scene.bodies:
        stamp_bodies(h, e, layer.within(*box), float(x_um), float(y_um), um, noise)
    stamp_nuclei(h, e, scene.cells.within(*box), float(x_um), float(y_um), um, noise)
    if parts > 1:
        h, e = (m.reshape(height_px, parts, width_px, parts).mean((1, 3)) for m in (h, e))
    return h, e


def _on_grid(class_map: np.ndarray, map_um: float) -> np.ndarray:
    """The class map on GRID_UM, nearest square."""
    if map_um == GRID_UM:
        return np.ascontiguousarray(class_map, dtype=np.uint8)
    shape = (round(class_map.shape[0] * map_um / GRID_UM), round(class_map.shape[1] * map_um / GRID_UM))
    row = np.minimum(((np.arange(shape[0]) + 0.5) * GRID_UM / map_um).astype(int), class_map.shape[0] - 1)
    column = np.minimum(((np.arange(shape[1]) + 0.5) * GRID_UM / map_um).astype(int), class_map.shape[1] - 1)
    return np.ascontiguousarray(class_map[row[:, None], column[None]], dtype=np.uint8)


def _borders(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes with MIXED set near a border, and the smoothed share of each class (h, w, 9) uint8, of 255."""
    shares = np.zeros((*classes.shape, 9), np.uint8)
    for code in np.unique(classes):
        shares[..., code] = fields.blur((classes == code).astype(np.float32) * 255, 5.0 / GRID_UM)
    reach = np.ones((9, 9), np.uint8)
    mixed = cv2.dilate(classes, reach) != cv2.erode(classes, reach)
    return classes | (mixed * np.uint8(materials.MIXED)), shares


def _distance_to_glands(ground: Ground) -> None:
    """Outside epithelium `depth` is minus the distance to it, in stroma too, so that fibres can wrap around."""
    depth = ground.maps[..., DEPTH]
    away = fields.signed_distance(depth > 0, GRID_UM) if (depth > 0).any() else np.full(depth.shape, -60, np.float32)
    ground.maps[..., DEPTH] = np.where(depth > 0, depth, np.clip(away, -60, 0))


def _fat_blocks(seeds: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The 8 adipocytes that can be nearest to any point of each block: (rows, columns, 8) int32, -1 where none."""
    rows, columns = (math.ceil(n * GRID_UM / _BLOCK_UM) + 1 for n in classes.shape)
    blocks = np.full((rows, columns, 8), -1, np.int32)
    if len(seeds) >= 8:
        y, x = np.mgrid[:rows, :columns].reshape(2, -1) * _BLOCK_UM + _BLOCK_UM / 2
        _, found = cKDTree(seeds[:, :2]).query(np.stack([x, y], 1), k=8, distance_upper_bound=400)
        blocks[:] = np.where(found < len(seeds), found, -1).reshape(rows, columns, 8)
    return blocks


def _rows(parts: list, width: int) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)


def _nuclei(ground: Ground) -> tuple[np.ndarray, Layer]:
    rows = _rows([rows for rows, _, _ in ground.nuclei], len(NUCLEUS))
    nuclei = np.zeros(len(rows), _TABLE)
    nuclei["x_um"], nuclei["y_um"] = rows[:, 0], rows[:, 1]
    nuclei["major_um"], nuclei["minor_um"], nuclei["angle"] = (
        2 * rows[:, 2],
        2 * rows[:, 3],
        rows[:, 4] % math.pi,
    )
    for name in ("dark", "vesicle", "grain", "nucleoli", "rough"):
        nuclei[name] = rows[:, NUCLEUS.index(name)]
    nuclei["cls"] = np.repeat([cls for _, cls, _ in ground.nuclei], [len(r) for r, _, _ in ground.nuclei])
    nuclei["kind"] = np.repeat([kind for _, _, kind in ground.nuclei], [len(r) for r, _, _ in ground.nuclei])
    return nuclei, Layer(rows, *ground.size_um)
