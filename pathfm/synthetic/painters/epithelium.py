"""Tumour and normal glands, and the necrosis that tumour leaves: architecture first, then the cells that line it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pathfm.synthetic import fields
from pathfm.synthetic.fields import LOW, MID
from pathfm.synthetic.nuclei import Look
from pathfm.synthetic.painters.connective import immune_cells, spindle_cells
from pathfm.synthetic.painters.ground import DEPTH, GRID_UM, HOLLOW, Ground, Region, sample

# Whole axes in um. Tumour nuclei 8 to 15 um, columnar and pencil-shaped in glands, round and vesicular in sheets.
COLUMNAR = Look(12.0, 0.50, 0.14, 0.88, 0.20, vesicle=0.40, grain=0.24, nucleoli=0.8, rough=0.10, halo=0.05)
VESICULAR = Look(11.5, 0.76, 0.18, 0.80, 0.22, vesicle=0.58, grain=0.26, nucleoli=1.4, rough=0.12, halo=0.05)
BIZARRE = Look(18.0, 0.70, 0.15, 1.05, 0.2, vesicle=0.35, grain=0.35, nucleoli=2.0, rough=0.22, halo=0.05)
CRYPT = Look(8.6, 0.62, 0.10, 1.08, 0.15, vesicle=0.35, grain=0.22, nucleoli=0.5, rough=0.06, halo=0.05)
GHOST = Look(9.0, 0.72, 0.2, 0.42, 0.35, vesicle=0.7, grain=0.5, rough=0.12, halo=0.0, blur_um=1.5)
PYKNOTIC = Look(4.4, 0.80, 0.28, 1.6, 0.2, grain=0.05, rough=0.15, halo=0.35)
DUST = Look(1.7, 0.80, 0.35, 1.4, 0.25, grain=0.0, rough=0.1, halo=0.0)
MITOSIS = Look(10.5, 0.32, 0.12, 1.75, 0.1, grain=0.12, rough=0.4, halo=0.55)


def glands(region: Region, form: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed glands and nests: depth into epithelium, depth into lumen (both um, signed), openness 0 to 1."""
    p, rng = region.params, region.rng
    x, y = region.xy()
    stretch, turn = rng.uniform(1.0, 1.7), rng.uniform(0, np.pi)
    bend = 0.16 * p.gland_um
    wx = x + bend * region.noise(LOW, 0.45) + 2.0 * region.noise(MID, 1.6)
    wy = y + bend * region.noise(LOW, 0.45) + 2.0 * region.noise(MID, 1.6)
    u = (np.cos(turn) * wx + np.sin(turn) * wy) / stretch
    v = np.cos(turn) * wy - np.sin(turn) * wx
    seeds = fields.lattice(rng, (u.min(), v.min()), (u.max(), v.max()), p.gland_um, 0.36)
    weight = (p.gland_um * 0.36) ** 2 * rng.uniform(-1, 1, len(seeds))
    near, border = fields.voronoi(u, v, seeds, p.gland_um, weight)
    septa = min(p.septa_um, 0.11 * p.gland_um) * np.exp(0.55 * region.noise(LOW, 0.7))
    shape = fields.blur(np.minimum(border, 60.0) - septa, 3.0)
    shape = np.minimum(shape, region.inside - 2.5)
    depth = fields.blur(fields.signed_distance(shape > 0, GRID_UM), 0.8)
    open_ = rng.random(len(seeds)) < form
    sieve = open_ & (rng.random(len(seeds)) < p.cribriform)
    lining = rng.uniform(29, 46, len(seeds))
    plain = fields.blur(depth - np.where(open_ & ~sieve, lining, 900.0)[near].astype(np.float32), 1.5)
    hollow = plain + 2.0 * region.noise(MID)
    if sieve.any():
        hollow = np.maximum(hollow, _punched(region, depth, sieve[near]))
    openness = fields.blur((open_ & ~sieve)[near].astype(np.float32), 2.0)
    return depth, np.minimum(hollow, depth - 9.0).astype(np.float32), openness


def _punched(region: Region, depth: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Round lumina of uneven size inside cribriform glands: signed depth in um."""
    x, y = region.xy()
    seeds = fields.lattice(region.rng, (x.min(), y.min()), (x.max(), y.max()), 46.0, 0.4)
    near, _ = fields.voronoi(x, y, seeds, 46.0)
    radius = (region.rng.uniform(4, 17, len(seeds)) * (region.rng.random(len(seeds)) < 0.85))[near]
    centre = seeds[near]
    away = np.hypot(centre[..., 0] - x, centre[..., 1] - y) * (1 + 0.12 * region.noise(MID, 2.0))
    holes = np.where(where & (radius > 0), radius - away, -60.0)
    return fields.blur(np.minimum(holes, depth - 13.0).astype(np.float32), 0.8)


def plan_tumour(ground: Ground) -> None:
    for region in ground.regions(1):
        p = region.params
        depth, hollow, openness = glands(region, p.gland_form)
        _write(ground, region, depth, hollow)
        radial = _outward(depth, hollow)
        _tumour_cells(ground, region, depth, hollow, openness, radial)
        beyond = (depth < -1.5).astype(np.float32)
        spindle_cells(ground, region, beyond, 1900)
        immune_cells(ground, region, beyond, 1.6)


def _tumour_cells(ground: Ground, region: Region, depth, hollow, openness, radial) -> None:
    p, rng = region.params, region.rng
    body = (depth > 2.5) & (hollow < -4.5)
    grade = np.clip(p.pleomorphism, 0, 3)
    ground.scatter(region, "mitosis", MITOSIS, p.mitoses, body * 1.0, radial, 1.0, 0.9, 4)
    varied = _pleomorphic(grade)
    ground.scatter(region, "epithelial", varied(BIZARRE), 90 * grade**2, body * 1.0, None, squeeze=0.85)
    crowded = np.clip(1.0 + 0.22 * region.noise(LOW, 0.6), 0.45, 1)
    apical = np.where(hollow > -30, np.clip((-hollow - 5.0) / 6.0, 0, 1), 1)
    base = openness * np.clip(1.3 - depth / 46.0, 0.25, 1) * apical * body * crowded
    long = _stretched(varied(COLUMNAR), p.elongation)
    ground.scatter(region, "epithelial", long, 14500, base, radial, 0.20, 0.62, 3.2)
    rows = _stretched(varied(COLUMNAR), 0.85 * p.elongation)
    rim = (1 - openness) * (depth < 11) * body
    ground.scatter(region, "epithelial", rows, 10000, rim, radial, 0.25, 0.70, 3)
    sheet = (1 - openness) * body * crowded
    ground.scatter(
        region,
        "epithelial",
        _stretched(varied(VESICULAR), p.elongation),
        8200,
        sheet,
        None,
        squeeze=0.72,
        tries=3,
    )
    dying = ground.spots(region, body * 1.0, 60)
    size = rng.uniform(3.5, 5.5, len(dying))
    ground.body(1, region, dying, size, size * 0.9, 0.0, 0.1, 0.75, soft=0.7, rough=0.15)
    _debris(ground, region, hollow)


def _debris(ground: Ground, region: Region, hollow: np.ndarray) -> None:
    """Dirty necrosis in some lumina: eosinophilic sludge with nuclear dust."""
    dirty = (hollow > 3) & (region.noise(LOW, 0.8) > 0.55)
    if dirty.any():
        at = ground.spots(region, dirty * 1.0, 9000)
        size = region.rng.uniform(2, 7, len(at))
        ground.body(
            1,
            region,
            at,
            size,
            size * region.rng.uniform(0.5, 1, len(at)),
            region.rng.uniform(0, 3, len(at)),
            0.12,
            0.5,
            cover=0.8,
            soft=1.2,
            rough=0.3,
            texture=0.25,
        )
        ground.scatter(region, "debris", PYKNOTIC, 2600, dirty * 1.0, None, squeeze=0.6)
        ground.scatter(region, "debris", DUST, 7000, dirty * 1.0, None, squeeze=0.4)


def _pleomorphic(grade: float):
    """A function that gives a look the spread of size and darkness of that grade; 1 is typical."""

    def vary(look: Look) -> Look:
        return replace(
            look,
            spread=look.spread * (0.5 + 0.5 * grade),
            dark_spread=look.dark_spread * (0.6 + 0.4 * grade),
        )

    return vary


def _stretched(look: Look, by: float) -> Look:
    """Longer at the same area."""
    return replace(look, major_um=look.major_um * by**0.5, ratio=min(look.ratio / by, 1.0))


def plan_normal(ground: Ground) -> None:
    edge = fields.signed_distance(ground.classes > 0, GRID_UM)
    for region in ground.regions(2):
        depth, hollow = _surface(
            region, edge[region.window], *(_packed(region) if region.params.crowding else _crypts(region))
        )
        _write(ground, region, depth, hollow)
        radial = _outward(depth, hollow)
        _crypt_cells(ground, region, depth, hollow, radial)
        lamina = np.clip((-1.0 - depth) / 2, 0, 1)
        spindle_cells(ground, region, lamina, 1200)
        immune_cells(ground, region, lamina * np.clip(0.9 + 0.4 * region.noise(LOW, 0.5), 0.3, 1), 12.0)


def _packed(region: Region) -> tuple[np.ndarray, np.ndarray]:
    """Glands of a crypt's size back to back, some of them cribriform: depth into epithelium and into lumen, um."""
    p = region.params
    packed = replace(p, gland_um=1.35 * p.crypt_um, septa_um=10.0, cribriform=min(0.8 * p.crowding, 1.0))
    return glands(replace(region, params=packed), 1.0)[:2]


def _crypts(region: Region) -> tuple[np.ndarray, np.ndarray]:
    """Test tubes side by side, cut across to along by `crypt_cut`: depth into epithelium and into lumen, um."""
    p, rng = region.params, region.rng
    x, y = region.xy()
    radius = p.crypt_um / 2
    length = 1 + 3.2 * max(0.0, p.crypt_cut + 0.25 * rng.standard_normal() - 0.3)
    turn = rng.uniform(0, np.pi)
    wx, wy = x + 0.22 * p.crypt_um * region.noise(LOW, 0.5), y + 0.22 * p.crypt_um * region.noise(LOW, 0.5)
    wx, wy = wx + 1.3 * region.noise(MID, 1.3), wy + 1.3 * region.noise(MID, 1.3)
    u, v = np.cos(turn) * wx + np.sin(turn) * wy, np.cos(turn) * wy - np.sin(turn) * wx
    pitch = p.crypt_um * rng.uniform(1.1, 1.26)
    seeds = fields.lattice(rng, (u.min() / length, v.min()), (u.max() / length, v.max()), pitch, 0.17)
    near, _ = fields.voronoi(u / length, v, seeds, pitch)
    size = radius * np.clip(1 + 0.10 * rng.standard_normal(len(seeds)), 0.75, 1.25)
    half = (length - 1) * pitch * 0.42 * rng.uniform(0.5, 1.0, len(seeds))
    du, dv = u - seeds[near, 0] * length, v - seeds[near, 1]
    du = np.sign(du) * np.maximum(np.abs(du) - half[near], 0)
    oval = rng.uniform(0.85, 1.18, len(seeds))[near]
    shape = size[near] - np.hypot(du * oval, dv / oval)
    centre = seeds * [length, 1]
    back = np.stack(
        [
            np.cos(turn) * centre[:, 0] - np.sin(turn) * centre[:, 1],
            np.sin(turn) * centre[:, 0] + np.cos(turn) * centre[:, 1],
        ],
        1,
    )
    whole = sample(region.inside, region, back) > 0.4 * radius
    x0, y0 = region.origin
    h, w = region.shape
    whole &= (back[:, 0] > x0) & (back[:, 1] > y0) & (back[:, 0] < x0 + w * GRID_UM) & (back[:, 1] < y0 + h * GRID_UM)
    shape = np.where(whole[near], shape, -60.0)
    shape = np.minimum(shape, region.inside - 2.0)
    depth = fields.blur(fields.signed_distance(shape > 0, GRID_UM), 0.7)
    bore = rng.uniform(0.12, 0.34, len(seeds)) * size
    wall = (size - bore)[near].astype(np.float32)
    hollow = fields.blur(np.where(whole[near], depth - wall, -60).astype(np.float32), 0.8)
    return depth, (hollow + 1.2 * region.noise(MID, 0.8)).astype(np.float32)


def _surface(region: Region, edge: np.ndarray, depth: np.ndarray, hollow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columnar epithelium along most of the free surface; `edge` is the distance to glass, um."""
    worn = 60 * np.clip(-region.noise(LOW, 0.7) - 0.7, 0, 1)
    band = np.where(region.mask, 23.0 - edge - worn, -60).astype(np.float32)
    skin = np.where(band > 0, 1.0 - edge, -60).astype(np.float32)
    return np.maximum(depth, band), np.maximum(hollow, skin)


def _crypt_cells(ground: Ground, region: Region, depth, hollow, radial) -> None:
    p, rng = region.params, region.rng
    inside = (depth > 0) & (hollow < -2)
    middle = inside * (depth > 12.5) * (hollow < -6)
    fertile = np.clip(0.85 + 0.25 * region.noise(LOW, 0.5), 0.2, 1)
    crowded = min(p.crowding, 1.0)  # packed glands have more epithelium: fewer goblet cells, more nuclei off the base
    at = ground.spots(region, middle * fertile, (6500 - 3600 * crowded) * min(p.goblet, 2.0), 3.0)
    heading = sample(radial, region, at) + 0.15 * rng.standard_normal(len(at))
    size = rng.uniform(5.4, 9.4, len(at))
    ellipses = np.stack([at[:, 0], at[:, 1], size * 1.15, size * rng.uniform(0.72, 0.92, len(at)), heading], 1)
    ellipses = ellipses.astype(np.float32)
    ellipses = ellipses[ground.crowd.admit(ellipses, 0.82, len(at) // 2)]
    n = len(ellipses)
    blue = rng.uniform(0, 1, n) ** 1.5 * rng.uniform(0.3, 1)
    ground.body(
        0,
        region,
        ellipses[:, :2],
        ellipses[:, 2],
        ellipses[:, 3],
        ellipses[:, 4],
        0.03 + 0.16 * blue,
        0.04 + 0.10 * blue,
        soft=0.7,
        rim_h=0.10,
        rim_e=0.16,
        rim=0.8,
        texture=-0.9,
        rough=0.10,
    )
    row = inside * np.clip((depth - 2.6) / 1.0, 0, 1) * np.clip((10.5 - depth) / 2.5, 0, 1)
    ground.scatter(region, "epithelial", _stretched(CRYPT, p.elongation), 19000, row, radial, 0.16, 0.80, 3)
    stray = inside * (depth > 9) * (hollow < -10)
    ground.scatter(
        region, "epithelial", _stretched(CRYPT, p.elongation), 700 + 2200 * crowded, stray * 1.0, radial, 0.3, 0.9
    )
    ground.scatter(region, "mitosis", MITOSIS, 8, stray * 1.0, radial, 1.0, 0.9, 4)


def plan_necrosis(ground: Ground) -> None:
    for region in ground.regions(8):
        p = region.params
        depth, hollow, _ = glands(replace(region, params=replace(p, septa_um=11.0, gland_um=0.85 * p.gland_um)), 0.85)
        _write(ground, region, depth, hollow)
        radial = _outward(depth, hollow)
        old = (depth > 2) & (hollow < -4)
        low, other = region.noise(LOW, 0.9), region.noise(LOW, 0.45)
        ground.scatter(region, "ghost", GHOST, 4200 * p.ghosts, old * np.clip(0.7 + 0.4 * low, 0, 1), radial, 0.3, 0.8)
        swarm = np.clip(0.12 + 0.75 * other, 0.02, 1)
        ground.scatter(region, "pyknotic", PYKNOTIC, 3000 * p.dust, swarm, None, squeeze=0.8)
        ground.scatter(region, "dust", DUST, 7000 * p.dust, swarm**1.5, None, squeeze=0.5)


def _outward(depth: np.ndarray, hollow: np.ndarray) -> np.ndarray:
    """Angle of columnar cells: from the basement membrane to the nearest lumen."""
    toward = np.where(hollow > -26, depth + 0.8 * np.maximum(hollow + 26, 0), depth).astype(np.float32)
    nx, ny = fields.gradient(toward, 2.0)
    return np.arctan2(ny, nx).astype(np.float32)


def _write(ground: Ground, region: Region, depth: np.ndarray, hollow: np.ndarray) -> None:
    target = ground.maps[region.window]
    target[..., DEPTH] = np.where(region.mask, np.maximum(depth, -60), target[..., DEPTH])
    target[..., HOLLOW] = np.where(region.mask, np.maximum(hollow, -60), target[..., HOLLOW])
