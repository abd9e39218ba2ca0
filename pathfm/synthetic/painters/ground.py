"""The working canvas of a plan: maps on a 2 um grid, the cells and bodies placed so far, and how more are placed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from pathfm.synthetic import fields
from pathfm.synthetic.nuclei import NUCLEUS, Crowd, Look
from pathfm.synthetic.painters.params import CLASSES, TissueParams

GRID_UM = 2.0
# Smooth maps that the pixels interpolate. `depth` is the signed distance into the class's own structure: epithelium,
# fascicle, germinal centre, fibrous septum, ghost; `hollow` the same for lumina; `nx`, `ny` its upward direction.
ALONG, ACROSS, DEPTH, HOLLOW, NX, NY = range(6)
PIXEL_PARAMS = (
    *("fibre_um", "looseness", "eosin", "haematoxylin", "basophilia", "mucin", "fat_wall_um", "ghosts"),
    "cleft",
)


@dataclass
class Region:
    """One connected piece of one class, with its own parameters and random numbers."""

    cls: int  # what it is, whatever it is painted as
    number: int
    window: tuple[slice, slice]
    mask: np.ndarray
    inside: np.ndarray  # um from the region's border, positive inside
    params: TissueParams
    rng: np.random.Generator

    @property
    def origin(self) -> tuple[float, float]:
        """x, y in um of the window's corner."""
        return self.window[1].start * GRID_UM, self.window[0].start * GRID_UM

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape

    @property
    def mm2(self) -> float:
        return float(self.mask.sum()) * GRID_UM**2 / 1e6

    def xy(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates in um of every grid point of the window, (h, w) float32 each."""
        x0, y0 = self.origin
        x = (np.arange(self.shape[1], dtype=np.float32) + 0.5) * GRID_UM + x0
        y = (np.arange(self.shape[0], dtype=np.float32) + 0.5) * GRID_UM + y0
        return np.broadcast_to(x[None], self.shape), np.broadcast_to(y[:, None], self.shape)

    def noise(self, which: int, scale: float = 1.0) -> np.ndarray:
        """A fresh smooth field over the window, variance 1."""
        return fields.sheet(which, self.shape, GRID_UM, scale, tuple(self.rng.uniform(0, 9000, 2)))


@dataclass
class Ground:
    """Everything known about a slide while it is planned."""

    classes: np.ndarray  # (h, w) uint8 on GRID_UM
    params: dict[int, TissueParams]
    seed: int
    departure: float = 0.4  # of a region from its patient, as a share of the spread between patients
    painted_as: dict[int, int] = field(default_factory=dict)  # a class drawn by another one's painter
    maps: np.ndarray = field(init=False)
    region_of: np.ndarray = field(init=False)
    table: list = field(init=False)
    crowd: Crowd = field(init=False)
    taken: np.ndarray = field(init=False)  # by vessels: no cell starts there
    nuclei: list = field(default_factory=list)
    bodies: dict = field(default_factory=lambda: {0: [], 1: [], 2: []})

    def __post_init__(self):
        self.maps = np.zeros((*self.classes.shape, 6), np.float32)
        self.maps[..., DEPTH] = self.maps[..., HOLLOW] = -60
        self.taken = np.zeros(self.classes.shape, np.uint8)
        self.region_of = np.zeros(self.classes.shape, np.uint16)
        self.table = [_row(TissueParams(), 0.0)]
        self.shift = float(np.random.default_rng([self.seed, 5]).uniform(0, 8000))
        height, width = self.classes.shape
        self.size_um = (width * GRID_UM, height * GRID_UM)
        self.crowd = Crowd(*self.size_um)

    @property
    def painted(self) -> np.ndarray:
        """`classes` with those that another painter draws replaced by its own."""
        table = np.arange(len(CLASSES) + 1, dtype=np.uint8)
        for cls, painter in self.painted_as.items():
            table[cls] = painter
        return table[self.classes]

    def regions(self, painter: int) -> Iterator[Region]:
        """The connected pieces of the class that `painter` draws, and of those that look like it."""
        for cls in range(1, len(CLASSES) + 1):
            if self.painted_as.get(cls, cls) == painter:
                yield from self._pieces(cls)

    def _pieces(self, cls: int) -> Iterator[Region]:
        """In reading order, each with its own small departure from the patient."""
        count, labels, stats, _ = cv2.connectedComponentsWithStats(
            (self.classes == cls).astype(np.uint8), connectivity=4
        )
        for number in range(1, count):
            x, y, w, h, area = stats[number]
            if area * GRID_UM**2 < 400:
                continue
            margin = 8
            window = (
                slice(max(y - margin, 0), min(y + h + margin, self.classes.shape[0])),
                slice(max(x - margin, 0), min(x + w + margin, self.classes.shape[1])),
            )
            mask = labels[window] == number
            rng = np.random.default_rng([self.seed, cls, number])
            params = _departure(self.params[cls], rng, self.departure)
            region = Region(cls, len(self.table), window, mask, fields.signed_distance(mask, GRID_UM), params, rng)
            self.table.append(_row(params, rng.uniform(0, 1) ** 2))
            self.region_of[window][mask] = region.number
            yield region

    def scatter(
        self,
        region: Region,
        kind: str,
        look: Look,
        per_mm2: float,
        where: np.ndarray,
        angle: np.ndarray | None = None,
        turn: float = 0.2,
        squeeze: float = 0.9,
        tries: float = 2.5,
    ) -> np.ndarray:
        """Place nuclei of one look with probability `where` (0 to 1, the region's window); return their rows.

        per_mm2  wanted where `where` is 1
        angle    map of the long axis, random if None; turn  spread around it, radians
        squeeze  below 1, neighbours may overlap; tries  candidates per wanted nucleus
        """
        points = self.spots(region, where, per_mm2 * region.params.nuclear_density, tries)
        wanted = int(round(points.shape[0] / tries))
        rng, n = region.rng, len(points)
        varied = region.params.variation
        size = region.params.nuclear_size * np.exp(varied * look.spread * rng.standard_normal(n)) * look.major_um / 2
        ratio = np.clip(look.ratio * np.exp(varied * 0.12 * rng.standard_normal(n)), 0.12, 1.0)
        if angle is None:
            heading = rng.uniform(0, np.pi, n)
        else:
            heading = sample(angle, region, points) + turn * rng.standard_normal(n)
        rows = np.empty((n, len(NUCLEUS)), np.float32)
        rows[:, :5] = np.stack([points[:, 0], points[:, 1], size, size * ratio, heading], 1)
        rows[:, 5] = look.dark * np.exp(varied * look.dark_spread * rng.standard_normal(n)) * region.params.haematoxylin
        rows[:, 6] = np.clip(look.vesicle + varied * 0.12 * rng.standard_normal(n) * (look.vesicle > 0), 0, 1)
        rows[:, 7] = look.grain * region.params.chromatin
        rows[:, 8] = look.nucleoli * region.params.nucleoli
        rows[:, 9] = look.rough * region.params.outline * rng.uniform(0.5, 1.5, n)
        rows[:, 10] = look.halo
        rows[:, 11] = look.blur_um * rng.uniform(0.7, 1.5, n)
        rows[:, 12] = rng.uniform(0, 97, n)
        rows = rows[self.crowd.admit(np.ascontiguousarray(rows[:, :5]), squeeze, wanted)]
        self.nuclei.append((rows, region.cls, kind))
        return rows

    def spots(self, region: Region, where: np.ndarray, per_mm2: float, times: float = 1.0) -> np.ndarray:
        """Random points (n, 2) with density `per_mm2 * times * where`, none outside the region."""
        free = region.mask & (self.taken[region.window] == 0)
        weight = np.where(free, np.clip(where, 0, 1), 0).ravel()
        total = np.cumsum(weight, dtype=np.float64)
        n = region.rng.poisson(total[-1] * GRID_UM**2 / 1e6 * per_mm2 * times) if total[-1] > 0 else 0
        at = np.minimum(np.searchsorted(total, region.rng.random(n) * total[-1], side="right"), weight.size - 1)
        row, column = np.divmod(at, region.shape[1])
        x0, y0 = region.origin
        jitter = region.rng.random((n, 2))
        return np.stack([(column + jitter[:, 0]) * GRID_UM + x0, (row + jitter[:, 1]) * GRID_UM + y0], 1)

    def body(self, layer: int, region: Region, points, a, b, angle=0.0, h=0.0, e=0.0, **how) -> None:
        """Add bodies at points (n, 2); every other argument is a number or an array of n. See BODY."""
        n = len(points)
        options = {
            "cover": 1.0,
            "soft": 0.6,
            "rim_h": 0.0,
            "rim_e": 0.0,
            "rim": 0.0,
            "texture": 0.0,
            "rough": 0.1,
        }
        options |= {"pallor": 0.0} | how
        columns = [
            points[:, 0],
            points[:, 1],
            a,
            b,
            angle,
            h,
            e,
            *options.values(),
            region.rng.uniform(0, 97, n),
        ]
        rows = np.stack([np.broadcast_to(np.asarray(c, np.float32), (n,)) for c in columns], 1)
        self.bodies[layer].append(rows)


def _row(params: TissueParams, cleft: float) -> np.ndarray:
    return np.array([getattr(params, name, cleft) for name in PIXEL_PARAMS], np.float32)


def sample(field_map: np.ndarray, region: Region, points: np.ndarray) -> np.ndarray:
    """The nearest values of a window map at points (n, 2) in um."""
    x0, y0 = region.origin
    column = np.clip(((points[:, 0] - x0) / GRID_UM).astype(int), 0, region.shape[1] - 1)
    row = np.clip(((points[:, 1] - y0) / GRID_UM).astype(int), 0, region.shape[0] - 1)
    return field_map[row, column]


def _departure(params: TissueParams, rng: np.random.Generator, share: float) -> TissueParams:
    """The same patient elsewhere: `share` of the between-patient spread. Nuclei and dye are left alone."""
    changed = {}
    for name, spec in TissueParams.__dataclass_fields__.items():
        meta, value = spec.metadata, getattr(params, name)
        draw = rng.standard_normal() * meta["sd"] * share
        if meta["scale"] == "coarse" or name in ("inflammation", "looseness", "goblet"):
            value = value * np.exp(draw) if meta["log"] else value + draw
            low = -np.inf if meta["low"] is None else meta["low"]
            high = np.inf if meta["high"] is None else meta["high"]
            changed[name] = float(np.clip(value, low, high))
    return replace(params, **changed)


def by_class(params) -> dict[int, TissueParams]:
    """One TissueParams per class code, from one for all or from a mapping of class names."""
    if isinstance(params, TissueParams):
        return dict.fromkeys(range(1, len(CLASSES) + 1), params)
    return {code: params.get(name, TissueParams()) for code, name in enumerate(CLASSES, 1)}
