"""What lies between the nuclei: haematoxylin and eosin of one pixel of each material, and the loop over a window."""

from __future__ import annotations

import math

from numba import njit

from pathfm.synthetic.fields import FIBRE, FIBRIL, GRAIN, LOW, MID, look
from pathfm.synthetic.painters.ground import ACROSS, ALONG, DEPTH, GRID_UM, HOLLOW, NX, NY
from pathfm.synthetic.painters.params import (
    ADIPOSE,
    LYMPHOCYTES,
    MUCUS,
    MUSCLE,
    NECROSIS,
    NORMAL,
    STROMA,
    TUMOUR,
)

MIXED = 128  # flag of a grid square with another class within reach
FIBRE_UM, LOOSE, EOSIN, HAEM, BASO, MUCIN, WALL_UM, GHOSTS, CLEFT = range(9)
_GRID = float(GRID_UM)


@njit(inline="always")
def _ramp(value, width):
    """0 well below 0, 1 well above, smooth over +-width."""
    t = 0.5 + 0.5 * value / width
    t = min(max(t, 0.0), 1.0)
    return t * t * (3 - 2 * t)


@njit(nogil=True)
def _collagen(noise, p, x, y, along, across, depth, um, loose, size, curl):
    """Wavy bundles with clefts; within 12 um of epithelium they wrap around it."""
    s = size * p[FIBRE_UM]
    g = look(noise, GRAIN, x, y)
    m = look(noise, MID, x, y)
    low = look(noise, LOW, x, y)
    across += curl * m + 0.12 * g
    c = look(noise, FIBRE, along / s, across / s)
    f = look(noise, FIBRIL, along / (0.8 * s), across / (0.8 * s))
    if -11.0 < depth < 0.0:
        free = _ramp(-depth - 6.0, 4.0)
        sheath = look(noise, FIBRE, (x + y) * 0.35, -depth * 0.9 + 0.8 * m + 300.0)
        c = free * c + (1 - free) * (sheath + 0.1)
        loose = loose * free + (1 - free) * loose * 0.6
    loose += 0.22 * low
    k = look(noise, FIBRIL, (0.8 * along + 0.6 * across) / (1.4 * s), (0.8 * across - 0.6 * along) / (1.4 * s))
    t = c + 0.5 * f + 0.5 * m + 0.25 * k
    gap = _ramp(1.6 * loose - 2.1 - t, 0.3)
    dense = 1 - 0.20 * min(max(loose, 0.0), 1.2)
    e = (0.64 + 0.13 * math.tanh(c) + 0.11 * f + 0.07 * k + 0.075 * g + 0.06 * m + 0.03 * low) * dense
    h = 0.085 + 0.02 * math.tanh(c) + 0.025 * f + 0.015 * k + 0.02 * g
    return h * (1 - 0.9 * gap), max(e, 0.16) * (1 - 0.95 * gap)


@njit(nogil=True)
def _muscle(noise, p, x, y, along, across, depth, crosscut, um):
    """Long parallel fibres in fascicles; perimysium is pale and loose."""
    s = 1.9 * p[FIBRE_UM]
    g = look(noise, GRAIN, x, y)
    m = look(noise, MID, x, y)
    low = look(noise, LOW, x + 999.0, y)
    if crosscut:
        c = 0.9 * look(noise, MID, x * 1.9, y * 1.9)
        f = look(noise, GRAIN, x * 0.5, y * 0.5)
        q = (look(noise, MID, x * 2.3 + 77.0, y * 2.3) + 0.1 * g) / 0.22
        line = 1 / (1 + q * q)
    else:
        across += 0.8 * m + 0.1 * g
        c = look(noise, FIBRE, along / (1.5 * s), across / s)
        f = look(noise, FIBRIL, along / (0.8 * s), across / (0.65 * s))
        q = (look(noise, FIBRE, along / (2.4 * s) + 91.0, across / s) + 0.1 * f) / 0.16
        line = 1 / (1 + q * q)
    e = 0.61 + 0.08 * math.tanh(c) + 0.10 * f + 0.07 * g + 0.05 * m + 0.03 * low - (0.24 if crosscut else 0.15) * line
    h = 0.11 + 0.03 * f + 0.02 * g + 0.015 * m - 0.02 * line
    split = _ramp(-(c + 0.3 * f + 0.45 * m + 2.35 - 0.5 * low - 0.6 * p[LOOSE]), 0.25)
    width = max(1.9, 1.6 + 2.2 * low + 3.0 * (p[LOOSE] - 0.4))
    seam = _ramp(width + 1.0 * m - depth, 1.0)
    if seam > 0.02:
        t = look(noise, FIBRE, (x - y) * 0.6, 0.8 * depth + 0.8 * m) + 0.7 * m + 0.3 * g
        loose = _ramp(0.15 - t, 0.45)
        e = e * (1 - seam) + seam * (0.48 + 0.08 * g) * (1 - 0.93 * loose)
        h = h * (1 - seam) + seam * 0.06 * (1 - 0.9 * loose)
        split *= 1 - seam
    return h * (1 - 0.9 * split), e * (1 - 0.92 * split)


@njit(nogil=True)
def _lymphoid(noise, p, x, y, along, across, depth, um):
    """Scant cytoplasm, reticular threads, sinuses; paler and pinker in germinal centres."""
    g = look(noise, GRAIN, x, y)
    m = look(noise, MID, x, y)
    low = look(noise, LOW, x * 1.5, y * 1.5)
    c = look(noise, FIBRE, along * 0.9, across * 0.9)
    f = look(noise, FIBRIL, along, across)
    centre = _ramp(depth, 8.0)
    e = 0.26 + 0.06 * m + 0.06 * g + 0.10 * centre
    e += 0.28 * _ramp(c + 0.4 * f - 1.5, 0.3) * (1 - 0.7 * centre)
    h = 0.10 + 0.03 * m + 0.02 * g + 0.05 * centre
    open_ = _ramp(m + 0.35 * low + 0.25 * g - 1.35 + 0.7 * centre, 0.35)
    return max(h, 0.0) * (1 - 0.85 * open_), max(e, 0.05) * (1 - 0.85 * open_)


@njit(nogil=True)
def _mucus(noise, p, x, y, along, across, um):
    """Pale basophilic pools: broad veils, fine crossing strands, voids."""
    m = look(noise, MID, x, y)
    g = look(noise, GRAIN, x, y)
    low = look(noise, LOW, x * 1.3, y * 1.3)
    c = look(noise, FIBRE, along / 2.6, across / 2.6)
    f = look(noise, FIBRIL, along / 1.5, across / 1.5)
    k = look(noise, FIBRE, (0.7 * along + 0.7 * across) / 2.2, (0.7 * across - 0.7 * along) / 2.2)
    q = (c + 0.45 * f + 0.5 * m) / 0.2
    strand = 1 / (1 + q * q)
    q = (k + 0.6 * m - 0.3 * f) / 0.13
    strand = (strand + 0.8 / (1 + q * q)) * _ramp(low + 0.6, 0.9)
    body = p[MUCIN] * (0.25 + 0.09 * low + 0.04 * c + 0.05 * f + 0.06 * m + 0.035 * g)
    void = _ramp(look(noise, LOW, x * 2.1 + 500.0, y * 2.1) + 0.25 * m - 1.0, 0.5)
    h = max(body, 0.0) + 0.27 * strand * p[MUCIN]
    e = 0.05 + 0.40 * max(body, 0.0) + 0.22 * strand + 0.02 * g
    return h * (1 - 0.85 * void), e * (1 - 0.85 * void)


@njit(nogil=True)
def _dead(noise, p, x, y, depth, hollow, nx, ny, um):
    """Granular eosinophilic debris in which the dead glands are still felt."""
    g = look(noise, GRAIN, x, y)
    g2 = look(noise, GRAIN, x * 0.45 + 50.0, y * 0.45)
    m = look(noise, MID, x, y)
    low = look(noise, LOW, x, y)
    e = 0.47 + 0.09 * g + 0.08 * g2 + 0.08 * m + 0.06 * low
    h = 0.12 + 0.03 * g + 0.035 * m + 0.03 * g2
    ghost = p[GHOSTS] * min(1.0, 0.75 + 0.3 * low)
    wall = _ramp(depth + 1.5 * m, 2.0) * (1 - _ramp(hollow + 2.0 * m, 3.0))
    stripe = look(noise, GRAIN, (x - nx * depth) * 0.5, (y - ny * depth) * 0.5)
    q = (look(noise, MID, x * 1.5 + 61.0, y * 1.5) + 0.15 * g2) / 0.25
    between = 1 / (1 + q * q)
    e += ghost * (wall * (0.30 + 0.08 * stripe - 0.18 * between) - 0.17)
    h += ghost * (wall * (0.09 + 0.02 * stripe) - 0.03)
    q = (depth + 1.5 * m) / 1.2
    e += ghost * 0.10 / (1 + q * q)
    pit = _ramp(
        -(m + 0.25 * g2 + 1.75 + 0.4 * low)
        + ghost * (0.9 * _ramp(hollow, 4.0) + 0.25 * _ramp(-depth, 4.0)) * (1 - wall),
        0.45,
    )
    return max(h, 0.0) * (1 - 0.8 * pit), max(e, 0.05) * (1 - 0.85 * pit)


@njit(nogil=True)
def _cytoplasm(noise, p, x, y, depth, hollow, nx, ny, um, tumour):
    """Epithelial cytoplasm with the radial striation of columnar cells; lumen where hollow is positive."""
    g = look(noise, GRAIN, x, y)
    m = look(noise, MID, x, y)
    fx, fy = x - 0.93 * nx * depth, y - 0.93 * ny * depth
    stripe = look(noise, GRAIN, fx * 0.42, fy * 0.42)
    if tumour:
        e = 0.43 + 0.065 * g + 0.055 * m + 0.055 * stripe
        h = 0.22 * p[BASO] + 0.04 * m + 0.045 * g + 0.02 * stripe
    else:
        e = 0.45 + 0.07 * g + 0.05 * m + 0.05 * stripe
        h = 0.22 + 0.04 * m + 0.04 * g + 0.02 * stripe
    slit = _ramp(stripe + 0.5 * m - 1.7, 0.4) * _ramp(depth - 4.0, 3.0)
    e *= 1 - 0.5 * slit
    h *= 1 - 0.6 * slit
    q = (depth - 0.6) / 0.9
    e += 0.10 / (1 + q * q)
    edge = hollow + 0.35 * stripe + 0.6 * m + 0.15 * g
    if edge > -12.0:
        apical = _ramp(edge + 8.0, 5.0)
        e += 0.06 * apical
        h *= 1 - 0.35 * apical
        q = (edge + 0.8) / 0.9
        e += 0.20 / (1 + q * q * q * q)
        empty = _ramp(edge, 0.7 + 0.4 * um)
        film = _ramp(look(noise, LOW, x * 3.0, y * 3.0) + 0.5 * m - 0.9, 0.6)
        h = h * (1 - empty) + empty * film * (0.12 + 0.05 * m)
        e = e * (1 - empty) + empty * (0.015 + film * (0.14 + 0.05 * g + 0.05 * m))
    return max(h, 0.0), max(e, 0.0)


@njit(nogil=True)
def _fat(x, y, fat_cells, fat_seeds, block_um):
    """Distance in um from the wall between adipocytes (rounded power cells), and a number for the cell."""
    bi = min(max(int(y / block_um), 0), fat_cells.shape[0] - 1)
    bj = min(max(int(x / block_um), 0), fat_cells.shape[1] - 1)
    best, first = 1e12, -1
    for k in range(fat_cells.shape[2]):
        s = fat_cells[bi, bj, k]
        if s >= 0:
            d = (fat_seeds[s, 0] - x) ** 2 + (fat_seeds[s, 1] - y) ** 2 - fat_seeds[s, 2]
            if d < best:
                best, first = d, s
    if first < 0:
        return 50.0, 0
    total, nearest = 0.0, 1e9
    for k in range(fat_cells.shape[2]):
        s = fat_cells[bi, bj, k]
        if s >= 0 and s != first:
            d = (fat_seeds[s, 0] - x) ** 2 + (fat_seeds[s, 1] - y) ** 2 - fat_seeds[s, 2]
            apart = math.sqrt(
                (fat_seeds[s, 0] - fat_seeds[first, 0]) ** 2 + (fat_seeds[s, 1] - fat_seeds[first, 1]) ** 2
            )
            gap = (d - best) / (2 * apart)
            nearest = min(nearest, gap)
            if gap < 24.0:
                total += math.exp(-0.42 * gap)
    if total == 0.0:
        return 24.0, first
    return -math.log(total) / 0.42, first


@njit(nogil=True)
def _adipose(noise, p, x, y, depth, um, fat_cells, fat_seeds, block_um, shift):
    m = look(noise, MID, x, y)
    if depth > -4.0:
        septum = _ramp(depth + 2.0 * m, 0.8)
    else:
        septum = 0.0
    h, e = 0.0, 0.0
    if septum < 1.0:
        low = look(noise, LOW, x * 1.7, y * 1.7)
        wx, wy = (
            x + 2.2 * look(noise, LOW, x * 6.0, y * 6.0),
            y + 2.2 * look(noise, LOW, x * 6.0 + 540.0, y * 6.0),
        )
        gap, cell = _fat(wx - shift, wy - shift, fat_cells, fat_seeds, block_um)
        f = look(noise, FIBRIL, x * 0.8, y * 0.8)
        half = p[WALL_UM] * (0.56 + 0.28 * low + 0.16 * m)
        half = max(half, 0.28)
        wall = _ramp(half - gap, 0.45 + 0.35 * um)
        inner = gap - half
        tear = _ramp(look(noise, LOW, x * 2.3 + 40.0, y * 2.3) - 1.45, 0.12)
        e = wall * (0.52 + 0.14 * f + 0.09 * m + 0.10 * low) * (1 - 0.85 * tear)
        h = wall * (0.10 + 0.05 * low) * (1 - 0.85 * tear)
        if inner > 0:
            veil = _ramp(look(noise, LOW, x * 1.1 + 17.0 * (cell % 13), y * 1.1) + 0.06 * m - 1.5, 0.06)
            e += veil * (0.07 + 0.05 * low + 0.02 * f)
            h += veil * 0.02
    if septum > 0.0:
        sh, se = _collagen(noise, p, x, y, 0.5 * (x + y), 1.1 * depth, -30.0, um, 0.65, 1.0, 1.5)
        h = h * (1 - septum) + sh * septum
        e = e * (1 - septum) + se * septum
    return h, e


@njit(nogil=True)
def _pixel(cls, noise, p, x, y, q, um, fat_cells, fat_seeds, block_um, shift):
    """Haematoxylin and eosin of one point of one class; q holds the six interpolated maps."""
    along, across, depth, hollow, nx, ny = q
    if cls == ADIPOSE:
        h, e = _adipose(noise, p, x, y, depth, um, fat_cells, fat_seeds, block_um, shift)
    elif cls == MUSCLE:
        h, e = _muscle(noise, p, x, y, along, across, depth, hollow > 0, um)
    elif cls == LYMPHOCYTES:
        h, e = _lymphoid(noise, p, x, y, along, across, depth, um)
    elif cls == NECROSIS:
        h, e = _dead(noise, p, x, y, depth, hollow, nx, ny, um)
    elif cls == STROMA:
        h, e = _collagen(noise, p, x, y, along, across, depth, um, p[LOOSE], 1.15, 1.1)
    else:
        epithelium = 0.0
        rough = depth
        if depth > -4.0:
            rough = depth + 0.7 * look(noise, MID, x * 1.7, y * 1.7) + 0.2 * look(noise, GRAIN, x, y)
            epithelium = _ramp(rough, 0.6 + 0.4 * um)
        h, e = 0.0, 0.0
        if epithelium < 1.0:
            if cls == MUCUS:
                h, e = _mucus(noise, p, x, y, along, across, um)
            else:
                loose, size, curl = (0.5 * p[LOOSE] + 0.93, 0.8, 3.2) if cls == NORMAL else (p[LOOSE] + 0.1, 1.05, 1.3)
                h, e = _collagen(noise, p, x, y, along, across, depth, um, loose, size, curl)
                if depth > -16.0 and cls == TUMOUR:
                    low = look(noise, LOW, x * 1.6 + 333.0, y * 1.6)
                    reach = 11.0 * p[CLEFT] * max(low + 0.15, 0.0)
                    split = _ramp(reach + rough - 1.0, 0.9) * _ramp(reach - 1.5, 1.0)
                    h *= 1 - 0.93 * split
                    e *= 1 - 0.93 * split
        if epithelium > 0.0:
            eh, ee = _cytoplasm(noise, p, x, y, max(depth, 0.0), hollow, nx, ny, um, cls != NORMAL)
            h = h * (1 - epithelium) + eh * epithelium
            e = e * (1 - epithelium) + ee * epithelium
    return h * p[HAEM], e * p[EOSIN]


@njit(cache=True, nogil=True)
def paint(h, e, x0, y0, um, codes, shares, maps, region_of, table, fat_cells, fat_seeds, block_um, noise, shift):
    """Fill the window's haematoxylin h and eosin e, whose corner is (x0, y0) um, with everything but nuclei.

    `shift` (um) moves this slide to its own place in the noise.
    """
    rows, columns = codes.shape
    for i in range(h.shape[0]):
        y = y0 + (i + 0.5) * um
        gy = y / _GRID - 0.5
        iy = min(max(int(math.floor(gy)), 0), rows - 2)
        ty = min(max(gy - iy, 0.0), 1.0)
        near_y = min(max(int(y / _GRID), 0), rows - 1)
        for j in range(h.shape[1]):
            x = x0 + (j + 0.5) * um
            if x < 0 or y < 0 or x >= columns * _GRID or y >= rows * _GRID:
                h[i, j] = 0
                e[i, j] = 0
                continue
            near_x = min(int(x / _GRID), columns - 1)
            code = codes[near_y, near_x]
            if code == 0:
                h[i, j] = 0
                e[i, j] = 0
                continue
            gx = x / _GRID - 0.5
            ix = min(max(int(math.floor(gx)), 0), columns - 2)
            tx = min(max(gx - ix, 0.0), 1.0)
            a, b, c, d = (1 - tx) * (1 - ty), tx * (1 - ty), (1 - tx) * ty, tx * ty
            one, other, share = code, 0, 1.0
            if code >= MIXED:
                one, other, share = _border(shares, noise, x, y, ix, iy, um)
            m0, m1, m2, m3 = maps[iy, ix], maps[iy, ix + 1], maps[iy + 1, ix], maps[iy + 1, ix + 1]
            q = (
                a * m0[ALONG] + b * m1[ALONG] + c * m2[ALONG] + d * m3[ALONG],
                a * m0[ACROSS] + b * m1[ACROSS] + c * m2[ACROSS] + d * m3[ACROSS],
                a * m0[DEPTH] + b * m1[DEPTH] + c * m2[DEPTH] + d * m3[DEPTH],
                a * m0[HOLLOW] + b * m1[HOLLOW] + c * m2[HOLLOW] + d * m3[HOLLOW],
                a * m0[NX] + b * m1[NX] + c * m2[NX] + d * m3[NX],
                a * m0[NY] + b * m1[NY] + c * m2[NY] + d * m3[NY],
            )
            p = table[region_of[near_y, near_x]]
            oh, oe = 0.0, 0.0
            if one > 0:
                oh, oe = _pixel(one, noise, p, x + shift, y + shift, q, um, fat_cells, fat_seeds, block_um, shift)
            if share < 1.0:
                bh, be = 0.0, 0.0
                if other > 0:
                    bh, be = _pixel(other, noise, p, x + shift, y + shift, q, um, fat_cells, fat_seeds, block_um, shift)
                oh = share * oh + (1 - share) * bh
                oe = share * oe + (1 - share) * be
            h[i, j] = max(oh, 0.0)
            e[i, j] = max(oe, 0.0)


@njit(nogil=True)
def _border(shares, noise, x, y, ix, iy, um):
    """The two likeliest classes near a border and the cover of the first; the border is ragged at cell size."""
    bend_x = 0.5 * (2.6 * look(noise, MID, x, y) + 0.5 * look(noise, GRAIN, x * 0.5, y * 0.5))
    bend_y = 0.5 * (2.6 * look(noise, MID, y + 400.0, x) + 0.5 * look(noise, GRAIN, y * 0.5, x * 0.5))
    gx, gy = x / _GRID - 0.5 + bend_x, y / _GRID - 0.5 + bend_y
    jx = min(max(int(math.floor(gx)), 0), shares.shape[1] - 2)
    jy = min(max(int(math.floor(gy)), 0), shares.shape[0] - 2)
    tx, ty = min(max(gx - jx, 0.0), 1.0), min(max(gy - jy, 0.0), 1.0)
    best, second, one, other = -1.0, -1.0, 0, 0
    for k in range(shares.shape[2]):
        v = (1 - ty) * ((1 - tx) * shares[jy, jx, k] + tx * shares[jy, jx + 1, k]) + ty * (
            (1 - tx) * shares[jy + 1, jx, k] + tx * shares[jy + 1, jx + 1, k]
        )
        if v > best:
            second, other = best, one
            best, one = v, k
        elif v > second:
            second, other = v, k
    return one, other, 0.5 + 0.5 * min(max((best - second) / (35.0 * (0.4 + 0.4 * um)), 0.0), 1.0)
