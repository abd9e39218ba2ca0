"""Stroma, muscle, lymphoid tissue, fat and mucus: which way the fibres run, vessels, and the cells between."""

from __future__ import annotations

import cv2
import numpy as np

from pathfm.synthetic import fields
from pathfm.synthetic.fields import LOW, MID
from pathfm.synthetic.nuclei import NUCLEUS, Look
from pathfm.synthetic.painters.ground import ACROSS, ALONG, DEPTH, GRID_UM, HOLLOW, Ground, Region, sample

FIBROBLAST = Look(13.5, 0.185, 0.26, 1.15, 0.28, vesicle=0.1, grain=0.2, rough=0.16, halo=0.10)
PLUMP = Look(10.5, 0.36, 0.22, 0.85, 0.25, vesicle=0.5, grain=0.2, nucleoli=0.6, rough=0.08, halo=0.10)
CIGAR = Look(14.5, 0.165, 0.24, 1.1, 0.25, vesicle=0.2, grain=0.22, nucleoli=0.2, rough=0.08, halo=0.22)
CUT_CIGAR = Look(4.3, 0.8, 0.25, 1.1, 0.2, vesicle=0.25, grain=0.22, rough=0.06, halo=0.25)
ENDOTHELIUM = Look(9.5, 0.24, 0.15, 1.15, 0.15, grain=0.2, rough=0.06, halo=0.0)
LYMPHOCYTE = Look(7.0, 0.87, 0.12, 1.22, 0.18, vesicle=0.15, grain=0.27, rough=0.13, halo=0.35)
PLASMA = Look(7.2, 0.86, 0.08, 1.2, 0.12, vesicle=0.35, grain=0.35, rough=0.05, halo=0.0)
CENTROBLAST = Look(10.0, 0.82, 0.12, 0.72, 0.2, vesicle=0.6, grain=0.28, nucleoli=1.5, rough=0.10, halo=0.0)
MACROPHAGE = Look(8.5, 0.70, 0.12, 0.75, 0.2, vesicle=0.45, grain=0.25, nucleoli=0.5, rough=0.10, halo=0.0)
EOSINOPHIL = Look(5.6, 0.62, 0.12, 1.3, 0.12, grain=0.15, rough=0.30, halo=0.0)
ADIPOCYTE = Look(9.5, 0.28, 0.2, 1.1, 0.15, grain=0.15, rough=0.08, halo=0.0)
FLOATING = Look(9.5, 0.75, 0.2, 1.05, 0.2, vesicle=0.3, grain=0.28, nucleoli=0.7, rough=0.14, halo=0.0)


def flows(ground: Ground) -> None:
    """Lay fibre coordinates over the slide: `along` and `across`, in um, one bend of collagen, one of fascicles."""
    shape = ground.classes.shape
    rng = np.random.default_rng([ground.seed, 77])
    x = ((np.arange(shape[1], dtype=np.float32) + 0.5) * GRID_UM)[None]
    y = ((np.arange(shape[0], dtype=np.float32) + 0.5) * GRID_UM)[:, None]
    wave = ground.params[3].fibre_wave
    turn = rng.uniform(0, np.pi)
    low = [fields.sheet(LOW, shape, GRID_UM, s, tuple(rng.uniform(0, 9000, 2))) for s in (1.2, 0.5, 0.9)]
    along = np.cos(turn) * x + np.sin(turn) * y + 25 * low[2]
    across = np.cos(turn) * y - np.sin(turn) * x + 95 * low[0] + 9 * wave * low[1]
    crimp = np.clip(0.6 + 0.6 * low[2], 0, 1.6) * wave
    across = across + 2.6 * crimp * np.sin(along / 9.5 + 2.2 * low[1] + 1.5 * low[0])
    ground.maps[..., ALONG], ground.maps[..., ACROSS] = along, across


def fibre_angle(ground: Ground, region: Region) -> np.ndarray:
    """The direction of the fibres over a region's window, radians."""
    nx, ny = fields.gradient(np.ascontiguousarray(ground.maps[region.window][..., ACROSS]), 1.5)
    return np.arctan2(-nx, ny).astype(np.float32)


def spindle_cells(ground: Ground, region: Region, where: np.ndarray, per_mm2: float) -> None:
    """Fibroblasts along the fibres, and around glands where they touch."""
    angle = fibre_angle(ground, region)
    depth = np.ascontiguousarray(ground.maps[region.window][..., DEPTH])
    if (depth > 0).any():
        nx, ny = fields.gradient(depth, 2.0)
        angle = np.where(depth > -10, np.arctan2(-nx, ny), angle).astype(np.float32)
    ground.scatter(region, "fibroblast", FIBROBLAST, 0.8 * per_mm2, where, angle, 0.18, 0.9)
    ground.scatter(region, "fibroblast", PLUMP, 0.25 * per_mm2, where, angle, 0.3, 0.9)


def immune_cells(ground: Ground, region: Region, where: np.ndarray, amount: float) -> None:
    """Lymphocytes in clusters, plasma cells with their cytoplasm, some eosinophils; `amount` times 300 per mm2."""
    amount = amount * region.params.inflammation
    swarm = where * np.clip(0.5 + 0.55 * region.noise(LOW, 0.35), 0.06, 1)
    ground.scatter(region, "lymphocyte", LYMPHOCYTE, 430 * amount, np.minimum(swarm, 1), None, squeeze=0.95)
    plasma = ground.scatter(region, "plasma cell", PLASMA, 230 * amount, np.minimum(swarm, 1), None, squeeze=1.2)
    if len(plasma):
        side = region.rng.uniform(0, 2 * np.pi, len(plasma))
        at = plasma[:, :2] + 2.0 * np.stack([np.cos(side), np.sin(side)], 1)
        ground.body(1, region, at, 6.0, 4.6, side, 0.22, 0.36, cover=0.75, soft=0.8, rough=0.08, texture=0.1)
    eosinophil = ground.scatter(region, "eosinophil", EOSINOPHIL, 30 * amount, where, None, squeeze=1.2)
    if len(eosinophil):
        ground.body(1, region, eosinophil[:, :2], 5.0, 4.7, 0.0, 0.05, 0.85, cover=0.85, soft=0.7, texture=0.2)


def vessels(ground: Ground, region: Region, where: np.ndarray, per_mm2: float) -> None:
    """Capillaries, venules and arterioles: cleared lumen, wall, endothelium, red cells."""
    rng = region.rng
    room = (where > 0.5) & (region.inside > 9)
    at = ground.spots(region, room * 1.0, per_mm2 * region.params.vessels)
    if not len(at):
        return
    clear = np.minimum(
        sample(region.inside, region, at),
        -sample(np.ascontiguousarray(ground.maps[region.window][..., DEPTH]), region, at),
    )
    a = np.minimum(np.exp(rng.normal(2.1, 0.6, len(at))), 0.75 * np.maximum(clear, 0))
    keep = a > 3.0
    at, a = at[keep], a[keep]
    ellipses = np.stack([at[:, 0], at[:, 1], a * 1.1, a * rng.uniform(0.45, 1, len(a)), np.zeros(len(a))], 1).astype(
        np.float32
    )
    angle = sample(fibre_angle(ground, region), region, at) + 0.4 * rng.standard_normal(len(at))
    ellipses[:, 4] = angle
    wall = np.where(rng.random(len(a)) < 0.3, 0.45 * a, 1.5).clip(1.2, 9)
    grown = ellipses + np.stack([0 * a, 0 * a, wall + 2, wall + 2, 0 * a], 1).astype(np.float32)
    fit = ground.crowd.admit(grown, 1.0, len(grown))
    ellipses, wall = ellipses[fit], wall[fit]
    xy, a, b, angle = ellipses[:, :2], ellipses[:, 2], ellipses[:, 3], ellipses[:, 4]
    ground.body(0, region, xy, a + wall, b + wall, angle, 0.08, 0.62, soft=1.2, rough=0.05, texture=0.12, cover=0.9)
    ground.body(0, region, xy, a, b, angle, 0.01, 0.03, soft=0.8, rim_e=0.15, rim_h=0.03, rim=0.8, rough=0.05)
    for x, y, major, minor, turn in np.column_stack([xy, a + wall, b + wall, np.degrees(angle)]) / GRID_UM:
        axes = (int(major + 1.5), int(minor + 1.5))
        cv2.ellipse(ground.taken, (int(x), int(y)), axes, turn * GRID_UM, 0, 360, 1, -1)
    full = rng.random(len(a)) < 0.65
    for one in ellipses[full]:
        _red_cells(ground, region, one)
    for one in ellipses:
        _endothelium(ground, region, one)


def _red_cells(ground: Ground, region: Region, vessel: np.ndarray) -> None:
    x, y, a, b, angle = vessel
    rng = region.rng
    n = rng.poisson(a * b * np.pi / 34 * rng.uniform(0.3, 1.3))
    r, t = np.sqrt(rng.random(n)) * 0.86, rng.uniform(0, 2 * np.pi, n)
    u, v = r * (a - 2.2) * np.cos(t), r * (b - 2.2) * np.sin(t)
    at = np.stack([x + np.cos(angle) * u - np.sin(angle) * v, y + np.sin(angle) * u + np.cos(angle) * v], 1)
    red_cells(ground, region, at)


def red_cells(ground: Ground, region: Region, at: np.ndarray) -> None:
    """Erythrocytes, 6 to 7 um, at points (n, 2)."""
    rng, n = region.rng, len(at)
    a = rng.uniform(2.9, 3.6, n)
    ground.body(
        2,
        region,
        at,
        a,
        a * rng.uniform(0.7, 1, n),
        rng.uniform(0, 3.1, n),
        0.03,
        rng.uniform(1.0, 1.35, n),
        soft=0.45,
        rough=0.08,
        pallor=0.22,
    )


def _endothelium(ground: Ground, region: Region, vessel: np.ndarray) -> None:
    x, y, a, b, angle = vessel
    rng = region.rng
    n = max(2, int(2 * np.pi * (a + b) / 2 / 17))
    t = np.sort(rng.uniform(0, 2 * np.pi, n))
    u, v = (a + 0.7) * np.cos(t), (b + 0.7) * np.sin(t)
    at = np.stack([x + np.cos(angle) * u - np.sin(angle) * v, y + np.sin(angle) * u + np.cos(angle) * v], 1)
    tangent = np.arctan2(b * np.cos(t), -a * np.sin(t)) + angle
    size = ENDOTHELIUM.major_um / 2 * np.exp(0.15 * rng.standard_normal(n)) * region.params.nuclear_size
    rows = np.zeros((n, len(NUCLEUS)), np.float32)
    rows[:, :5] = np.stack([at[:, 0], at[:, 1], size, size * 0.26, tangent], 1)
    rows[:, 5:12] = [1.1 * region.params.haematoxylin, 0.0, 0.2 * region.params.chromatin, 0, 0.06, 0, 0.5]
    rows[:, 12] = rng.uniform(0, 97, n)
    column = ((at[:, 0] - region.origin[0]) / GRID_UM).astype(int).clip(0, region.shape[1] - 1)
    row = ((at[:, 1] - region.origin[1]) / GRID_UM).astype(int).clip(0, region.shape[0] - 1)
    ground.nuclei.append((rows[region.mask[row, column]], region.cls, "endothelium"))


def plan_stroma(ground: Ground) -> None:
    for region in ground.regions(3):
        everywhere = np.ones(region.shape, np.float32)
        cellular = np.clip(0.6 + 0.4 * region.noise(LOW, 0.7), 0.15, 1)
        vessels(ground, region, everywhere, 42)
        spindle_cells(ground, region, cellular, 2700)
        immune_cells(ground, region, everywhere, 0.75)


def plan_muscle(ground: Ground) -> None:
    for region in ground.regions(4):
        crosscut = _fascicles(ground, region)
        vessels(ground, region, everywhere := np.ones(region.shape, np.float32), 9)
        angle = fibre_angle(ground, region)
        ground.scatter(region, "myocyte", CIGAR, 1500, everywhere * ~crosscut, angle, 0.07, 1.0)
        ground.scatter(region, "myocyte", CUT_CIGAR, 1700, everywhere * crosscut, None, squeeze=1.0)
        seam = np.clip(1 - ground.maps[region.window][..., DEPTH] / 4, 0, 1)
        spindle_cells(ground, region, seam, 1500)
        immune_cells(ground, region, seam, 0.8)
        immune_cells(ground, region, everywhere, 0.05)


def _fascicles(ground: Ground, region: Region) -> np.ndarray:
    """Divide muscle into fascicles that run their own way; where it is cut across: bool over the window."""
    p, rng = region.params, region.rng
    x, y = region.xy()
    turn = rng.uniform(0, np.pi)
    bend = 0.2 * p.fascicle_um
    wx, wy = x + bend * region.noise(LOW, 0.8), y + bend * region.noise(LOW, 0.8)
    u = (np.cos(turn) * wx + np.sin(turn) * wy) / 2.6
    v = np.cos(turn) * wy - np.sin(turn) * wx
    seeds = fields.lattice(rng, (u.min(), v.min()), (u.max(), v.max()), p.fascicle_um, 0.4)
    near, border = fields.voronoi(u, v, seeds, p.fascicle_um)
    lean = rng.normal(0, 0.12, len(seeds))[near]
    across_cut = (rng.random(len(seeds)) < 0.12)[near]
    bent_x, bent_y = x + 18 * region.noise(LOW, 1.3), y + 18 * region.noise(LOW, 1.3)
    heading = turn + lean
    along = np.cos(heading) * bent_x + np.sin(heading) * bent_y
    across = np.cos(heading) * bent_y - np.sin(heading) * bent_x + 7 * p.fibre_wave * region.noise(LOW, 0.45)
    shift = rng.uniform(0, 500, len(seeds))[near]
    target = ground.maps[region.window]
    target[..., ALONG] = np.where(region.mask, along + shift, target[..., ALONG])
    target[..., ACROSS] = np.where(region.mask, across, target[..., ACROSS])
    depth = fields.blur(np.minimum(np.minimum(border, 60), region.inside).astype(np.float32), 0.8)
    target[..., DEPTH] = np.where(region.mask, depth, target[..., DEPTH])
    target[..., HOLLOW] = np.where(region.mask, np.where(across_cut, 1.0, -1.0), target[..., HOLLOW])
    return across_cut


def plan_lymphocytes(ground: Ground) -> None:
    for region in ground.regions(5):
        p = region.params
        centre = _germinal_centres(region)
        target = ground.maps[region.window]
        target[..., DEPTH] = np.where(region.mask, centre, target[..., DEPTH])
        everywhere = np.ones(region.shape, np.float32)
        vessels(ground, region, centre < -15, 45)
        inner = np.clip(0.5 + centre / 10, 0, 1)
        ground.scatter(region, "centroblast", CENTROBLAST, 7200, inner, None, squeeze=0.9, tries=3)
        foam = ground.scatter(region, "macrophage", MACROPHAGE, 260, np.maximum(inner, 0.25), None, squeeze=0.8)
        ground.body(
            0,
            region,
            foam[:, :2] + 2,
            9.0,
            7.5,
            0.0,
            0.05,
            0.22,
            cover=0.85,
            soft=1.5,
            rough=0.25,
            texture=0.4,
        )
        mantle = np.exp(-(((centre + 22) / 20) ** 2))
        pack = np.clip(0.80 + 0.18 * region.noise(LOW, 0.8) + 0.35 * mantle, 0.3, 1) * np.clip(
            1.05 - 0.75 * inner, 0, 1
        )
        open_ = region.noise(MID, 2.0) + 0.4 * region.noise(LOW, 0.6)
        pack *= np.clip((1.5 - open_) / 0.4, 0.12, 1)
        ground.scatter(region, "lymphocyte", LYMPHOCYTE, 22000, pack, None, squeeze=0.74, tries=3.5)
        ground.scatter(region, "fibroblast", PLUMP, 260, everywhere, fibre_angle(ground, region), 0.3, 0.8)
        ground.scatter(region, "plasma cell", PLASMA, 300 * p.inflammation, everywhere, None, squeeze=0.9)


def _germinal_centres(region: Region) -> np.ndarray:
    """Depth into round pale centres, um."""
    rng, x, y = region.rng, *region.xy()
    spacing = 430.0
    seeds = fields.lattice(rng, (x.min(), y.min()), (x.max(), y.max()), spacing, 0.4)
    near, _ = fields.voronoi(x, y, seeds, spacing)
    room = sample(region.inside, region, seeds)
    radius = np.minimum(rng.uniform(60, 150, len(seeds)), 0.7 * room)
    keep = (rng.random(len(seeds)) < 0.6 * region.params.follicles) & (radius > 35)
    radius = np.where(keep, radius, -1e3)[near]
    away = np.hypot(seeds[near, 0] - x, seeds[near, 1] - y)
    away = away * (1 + 0.12 * region.noise(LOW, 0.6))
    return np.clip(fields.blur((radius - away).astype(np.float32), 1.0), -60, None)


def plan_adipose(ground: Ground) -> np.ndarray:
    """Septa, capillaries and peripheral nuclei; returns the adipocytes: x, y, weight (um, um, um2)."""
    found = []
    for region in ground.regions(6):
        p, rng = region.params, region.rng
        x, y = region.xy()
        ridge = np.abs(region.noise(LOW, 1.5) + 0.15 * region.noise(LOW, 0.4))
        septum = (0.035 + 0.02 * rng.standard_normal() - ridge) * 160
        depth = np.maximum(septum, 3.5 - region.inside + 3 * region.noise(LOW, 0.3)).astype(np.float32)
        target = ground.maps[region.window]
        target[..., DEPTH] = np.where(region.mask, np.maximum(depth, -60), target[..., DEPTH])
        seeds = _adipocytes(rng, (x.min(), y.min()), (x.max(), y.max()), p.fat_cell_um)
        row = ((seeds[:, 1] - region.origin[1]) / GRID_UM).astype(int)
        column = ((seeds[:, 0] - region.origin[0]) / GRID_UM).astype(int)
        ok = (row >= 0) & (column >= 0) & (row < region.shape[0]) & (column < region.shape[1])
        ok[ok] = region.inside[row[ok], column[ok]] > -p.fat_cell_um
        seeds = seeds[ok]
        found.append(seeds)
        fibrous = (depth > 1) * 1.0
        vessels(ground, region, fibrous, 120)
        spindle_cells(ground, region, fibrous, 900)
        immune_cells(ground, region, fibrous, 0.5)
        wx, wy = _bent(ground, region)
        near, border = fields.voronoi(wx, wy, seeds[:, :2], p.fat_cell_um, seeds[:, 2])
        wall = ((border < 1.8) & (depth < -3)) * 1.0
        nx, ny = fields.gradient(np.minimum(border, 30), 1.2)
        angle = np.arctan2(-nx, ny).astype(np.float32)
        ground.scatter(region, "adipocyte", ADIPOCYTE, 2200, wall, angle, 0.1, 1.0)
    return np.concatenate(found).astype(np.float32) if found else np.zeros((0, 3), np.float32)


def _bent(ground: Ground, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """The window's coordinates as `materials` bends them, so that nuclei lie on the walls it draws."""
    x, y = region.xy()
    x0, y0 = (origin + ground.shift for origin in region.origin)
    wx = x + 2.2 * fields.sheet(LOW, region.shape, GRID_UM, 1 / 6, (x0, y0))
    return wx, y + 2.2 * fields.sheet(LOW, region.shape, GRID_UM, 1 / 6, (x0 + 90.0, y0))


def _adipocytes(rng, low, high, diameter: float) -> np.ndarray:
    """Uneven cells: a loose lattice, some cells swollen, some shrunken; x, y, power weight."""
    seeds = fields.lattice(rng, low, high, diameter * 1.05, 0.30)
    size = np.clip(rng.standard_normal(len(seeds)), -1.8, 1.8)
    return np.column_stack([seeds, (0.33 * diameter) ** 2 * size])


def plan_mucus(ground: Ground) -> None:
    for region in ground.regions(7):
        rng = region.rng
        clusters = _clusters(region)
        target = ground.maps[region.window]
        target[..., DEPTH] = np.where(region.mask, clusters, target[..., DEPTH])
        inside = (clusters > 2) * 1.0
        nx, ny = fields.gradient(clusters, 2.0)
        ground.scatter(region, "epithelial", FLOATING, 7500, inside, np.arctan2(ny, nx), 0.5, 0.82, 3)
        free = (clusters < -8) * np.clip(0.25 + 0.6 * region.noise(LOW, 0.6), 0.03, 1)
        loners = ground.scatter(region, "epithelial", FLOATING, 190, free, None)
        _signets(ground, region, loners)
        immune_cells(ground, region, free, 1.0)
        spindle_cells(ground, region, free, 90)
        bleeding = (region.noise(LOW, 0.5) > 2.1) & (clusters < -5)
        red_cells(ground, region, ground.spots(region, bleeding * 1.0, 7000))
        if rng.random() < 0.7:
            red_cells(ground, region, ground.spots(region, np.ones(region.shape), 12))


def _clusters(region: Region) -> np.ndarray:
    """Depth into floating clusters and strips of epithelium, um."""
    rng, (x, y) = region.rng, region.xy()
    spacing = 210.0
    seeds = fields.lattice(rng, (x.min(), y.min()), (x.max(), y.max()), spacing, 0.45)
    wx, wy = x + 14 * region.noise(LOW, 0.3), y + 14 * region.noise(LOW, 0.3)
    near, _ = fields.voronoi(wx, wy, seeds, spacing)
    turn, a = rng.uniform(0, np.pi, len(seeds))[near], np.exp(rng.normal(3.0, 0.5, len(seeds)))[near]
    b = a * rng.uniform(0.3, 0.9, len(seeds))[near]
    keep = (rng.random(len(seeds)) < 0.45)[near]
    dx, dy = wx - seeds[near, 0], wy - seeds[near, 1]
    u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    shape = np.where(keep, (1 - np.hypot(u / a, v / b)) * b, -60.0)
    shape = np.minimum(shape + 1.2 * region.noise(MID), region.inside - 8)
    return np.maximum(fields.blur(shape.astype(np.float32), 1.0), -60)


def _signets(ground: Ground, region: Region, loners: np.ndarray) -> None:
    """Cytoplasm of single floating cells; every third is a signet ring, its nucleus pushed aside by mucin."""
    if not len(loners):
        return
    rng, n = region.rng, len(loners)
    ring = rng.random(n) < 0.35
    side = loners[:, 4] + np.pi / 2
    shift = np.where(ring, 6.5, 1.5)[:, None] * np.stack([np.cos(side), np.sin(side)], 1)
    at = loners[:, :2] + shift
    e, h = np.where(ring, 0.08, 0.34), np.where(ring, 0.10, 0.16)
    size = np.where(ring, 8.5, 6.5) * rng.uniform(0.85, 1.2, n)
    ground.body(
        1,
        region,
        at,
        size,
        size * 0.86,
        rng.uniform(0, 3, n),
        h,
        e,
        soft=0.8,
        rim_e=0.18,
        rim_h=0.05,
        rim=0.8,
        rough=0.14,
        texture=0.25,
    )
