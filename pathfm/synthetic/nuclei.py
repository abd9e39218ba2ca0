"""Nuclei and other small bodies: where they fit, and how they take up dye. Coordinates and lengths in um."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from pathfm.synthetic import fields
from pathfm.synthetic.fields import CHROMATIN, GRAIN, MID, look

# How a nucleus is drawn, beside its position and axes. All float32, so that a window's nuclei are one array.
NUCLEUS = (
    "x",
    "y",
    "a",
    "b",
    "angle",
    "dark",
    "vesicle",
    "grain",
    "nucleoli",
    "rough",
    "halo",
    "focus",
    "salt",
)
# A body is anything else with an outline: vacuole, red cell, lumen, cytoplasm. It replaces what lies below.
BODY = (
    "x",
    "y",
    "a",
    "b",
    "angle",
    "h",
    "e",
    "cover",
    "soft",
    "rim_h",
    "rim_e",
    "rim",
    "texture",
    "rough",
    "pallor",
    "salt",
)


@dataclass(frozen=True)
class Look:
    """A kind of nucleus: whole axes in um, optical density in haematoxylin, and what fills it."""

    major_um: float
    ratio: float  # minor over major axis
    spread: float = 0.12  # of the logarithm of the size
    dark: float = 1.1  # haematoxylin inside
    dark_spread: float = 0.15
    vesicle: float = 0.0  # 0 filled, 1 empty centre and chromatin at the membrane
    grain: float = 0.3  # chromatin clumps, as a share of `dark`
    nucleoli: float = 0.0  # expected number
    rough: float = 0.08  # outline, as a share of the radius
    halo: float = 0.15  # cleared cytoplasm around it
    blur_um: float = 0.6  # softness of the outline


class Crowd:
    """Ellipses already placed on a slide; a new one is accepted where it does not overlap them too much."""

    CELL_UM = 14.0

    def __init__(self, width_um: float, height_um: float):
        self.columns, self.rows = int(width_um / self.CELL_UM) + 1, int(height_um / self.CELL_UM) + 1
        self.head = np.full(self.columns * self.rows, -1, np.int32)
        self.next = np.empty(4096, np.int32)
        self.shapes = np.empty((4096, 5), np.float32)
        self.count = 0

    def admit(self, ellipses: np.ndarray, squeeze: float, wanted: int) -> np.ndarray:
        """Indices of the first `wanted` rows x, y, a, b, angle that fit; `squeeze` < 1 lets neighbours overlap."""
        need = self.count + min(wanted, len(ellipses))
        if need > len(self.shapes):
            grow = 2 * need
            self.next = np.concatenate([self.next, np.empty(grow, np.int32)])
            self.shapes = np.concatenate([self.shapes, np.empty((grow, 5), np.float32)])
        args = (self.head, self.next, self.shapes, self.count, self.CELL_UM, self.columns, self.rows)
        taken = _admit(ellipses, float(squeeze), int(wanted), *args)
        self.count += len(taken)
        return taken


@njit(cache=True, nogil=True)
def _admit(ellipses, squeeze, wanted, head, following, shapes, count, cell, columns, rows):
    taken = np.empty(min(wanted, ellipses.shape[0]), np.int64)
    n = 0
    for k in range(ellipses.shape[0]):
        if n == taken.shape[0]:
            break
        x, y, a, b, angle = ellipses[k]
        c, s = math.cos(angle), math.sin(angle)
        cx = min(max(int(x / cell), 0), columns - 1)
        cy = min(max(int(y / cell), 0), rows - 1)
        free = True
        for gy in range(max(cy - 1, 0), min(cy + 2, rows)):
            for gx in range(max(cx - 1, 0), min(cx + 2, columns)):
                j = head[gy * columns + gx]
                while j >= 0:
                    dx, dy = shapes[j, 0] - x, shapes[j, 1] - y
                    reach_a, reach_b = (a + shapes[j, 2]) * squeeze, (b + shapes[j, 3]) * squeeze
                    if dx * dx + dy * dy < reach_a * reach_a:
                        u, v = c * dx + s * dy, c * dy - s * dx
                        turn = abs(math.sin(angle - shapes[j, 4]))
                        across = reach_b + turn * (shapes[j, 2] - shapes[j, 3]) * squeeze
                        along = reach_a - turn * (shapes[j, 2] - shapes[j, 3]) * squeeze
                        if (u / along) ** 2 + (v / across) ** 2 < 1:
                            free = False
                            break
                    j = following[j]
                if not free:
                    break
            if not free:
                break
        if free:
            at = count + n
            shapes[at] = ellipses[k]
            home = cy * columns + cx
            following[at] = head[home]
            head[home] = at
            taken[n] = k
            n += 1
    return taken[:n]


class Layer:
    """Rows of NUCLEUS or BODY in drawing order, found by window. Order is by bin, the same for every window."""

    BIN_UM = 64.0

    def __init__(self, rows: np.ndarray, width_um: float, height_um: float):
        self.columns, self.lines = int(width_um / self.BIN_UM) + 1, int(height_um / self.BIN_UM) + 1
        self.start, member = fields.bins(rows[:, 0], rows[:, 1], self.BIN_UM, self.columns, self.lines)
        self.rows = np.ascontiguousarray(rows[member], dtype=np.float32)
        self.reach = float(rows[:, 2].max() * 1.35 + 4.0) if len(rows) else 0.0

    def within(self, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
        """The rows that may touch a window, (n, columns)."""
        left, right = (int(np.clip(v / self.BIN_UM, 0, self.columns - 1)) for v in (x0 - self.reach, x1 + self.reach))
        top, low = (int(np.clip(v / self.BIN_UM, 0, self.lines - 1)) for v in (y0 - self.reach, y1 + self.reach))
        parts = [
            self.rows[self.start[line * self.columns + left] : self.start[line * self.columns + right + 1]]
            for line in range(top, low + 1)
        ]
        return np.concatenate(parts) if parts else self.rows[:0]


@njit(inline="always")
def _hash(salt, k):
    """A number in [0, 1) that depends on the object and on k only."""
    v = math.sin(salt * 12.9898 + k * 78.233) * 43758.547
    return v - math.floor(v)


@njit(inline="always")
def _step(distance, width):
    """1 inside (negative distance), 0 outside, smooth over +-width."""
    t = 0.5 - 0.5 * distance / width
    t = min(max(t, 0.0), 1.0)
    return t * t * (3 - 2 * t)


@njit(inline="always")
def _slope(c1, s1, a, b):
    """Growth per um of an ellipse's relative radius in direction (c1, s1); at its very centre there is none."""
    return max(math.sqrt((c1 / a) ** 2 + (s1 / b) ** 2), 1 / max(a, b))


@njit(cache=True, nogil=True)
def stamp_bodies(h, e, rows, x0, y0, um, noise):
    """Draw BODY rows into the window's haematoxylin h and eosin e, in order."""
    height, width = h.shape
    for k in range(rows.shape[0]):
        x, y, a, b, angle = rows[k, 0], rows[k, 1], rows[k, 2], rows[k, 3], rows[k, 4]
        body_h, body_e, cover, soft = rows[k, 5], rows[k, 6], rows[k, 7], rows[k, 8]
        rim_h, rim_e, rim, texture, rough, pallor, salt = rows[k, 9:16]
        reach = a * (1 + rough) + 2 * rim + soft + um
        c, s = math.cos(angle), math.sin(angle)
        p2, p3, p5 = 6.283 * _hash(salt, 2), 6.283 * _hash(salt, 3), 6.283 * _hash(salt, 5)
        c2, s2, c3, s3, c5, s5 = (
            math.cos(p2),
            math.sin(p2),
            math.cos(p3),
            math.sin(p3),
            math.cos(p5),
            math.sin(p5),
        )
        shift = 977.0 * _hash(salt, 7)
        w = math.sqrt(soft * soft + 0.3 * um * um)
        for i in range(max(0, int((y - reach - y0) / um)), min(height, int((y + reach - y0) / um) + 1)):
            dy = y0 + (i + 0.5) * um - y
            for j in range(max(0, int((x - reach - x0) / um)), min(width, int((x + reach - x0) / um) + 1)):
                dx = x0 + (j + 0.5) * um - x
                u, v = c * dx + s * dy, c * dy - s * dx
                un, vn = u / a, v / b
                d = math.sqrt(un * un + vn * vn) + 1e-6
                if d > 1.5 + 6 / b:
                    continue
                c1, s1 = un / d, vn / d
                k2c, k2s = c1 * c1 - s1 * s1, 2 * c1 * s1
                k3c, k3s = k2c * c1 - k2s * s1, k2s * c1 + k2c * s1
                k5c, k5s = k2c * k3c - k2s * k3s, k2s * k3c + k2c * k3s
                r = 1 + rough * (
                    0.5 * (k2c * c2 + k2s * s2) + 0.4 * (k3c * c3 + k3s * s3) + 0.3 * (k5c * c5 + k5s * s5)
                )
                slope = _slope(c1, s1, a, b)
                sd = (d - r) / slope
                if sd > w + 2 * rim:
                    continue
                inside = _step(sd, w) * cover
                f = 1.0
                if texture < 0:
                    web = look(noise, MID, (dx + shift) * 2.2, (dy - shift) * 2.2) / 0.3
                    f -= texture * (2.2 / (1 + web * web) - 0.6)
                elif texture > 0:
                    f += texture * look(noise, GRAIN, (dx + shift) * 0.6, (dy - shift) * 0.6)
                f -= pallor * math.exp(-d * d * 5)
                eh, ee = max(body_h * f, 0.0), max(body_e * f, 0.0)
                h[i, j] += inside * (eh - h[i, j])
                e[i, j] += inside * (ee - e[i, j])
                if rim > 0:
                    q = sd / rim
                    line = cover / (1 + q * q * q * q * 4)
                    if line > 0.02:
                        h[i, j] += rim_h * line
                        e[i, j] += rim_e * line


@njit(cache=True, nogil=True)
def stamp_nuclei(h, e, rows, x0, y0, um, noise):
    """Draw NUCLEUS rows into the window's haematoxylin h and eosin e, in order."""
    height, width = h.shape
    spot = np.empty((4, 3), np.float32)
    for k in range(rows.shape[0]):
        x, y, a, b, angle = rows[k, 0], rows[k, 1], rows[k, 2], rows[k, 3], rows[k, 4]
        dark, vesicle, grain, nucleoli = rows[k, 5], rows[k, 6], rows[k, 7], rows[k, 8]
        rough, halo, focus, salt = rows[k, 9], rows[k, 10], rows[k, 11], rows[k, 12]
        reach = a * (1 + rough) + 2.2 + um
        c, s = math.cos(angle), math.sin(angle)
        p2, p3, p5 = 6.283 * _hash(salt, 2), 6.283 * _hash(salt, 3), 6.283 * _hash(salt, 5)
        c2, s2, c3, s3, c5, s5 = (
            math.cos(p2),
            math.sin(p2),
            math.cos(p3),
            math.sin(p3),
            math.cos(p5),
            math.sin(p5),
        )
        shift_x, shift_y = 131.0 * _hash(salt, 7), 127.0 * _hash(salt, 8)
        spots = min(4, int(nucleoli + _hash(salt, 9)))
        for m in range(spots):
            far, turn = 0.55 * math.sqrt(_hash(salt, 10 + m)), 6.283 * _hash(salt, 20 + m)
            spot[m, 0], spot[m, 1] = far * math.cos(turn) * a, far * math.sin(turn) * b
            spot[m, 2] = (0.16 + 0.13 * _hash(salt, 30 + m)) * b
        w = math.sqrt(focus * focus + 0.3 * um * um)
        clears = 0.8 * min(1.0, 1.3 * dark * dark)
        coarse = 0.75 + 0.6 * _hash(salt, 6)
        membrane = 0.35 + 0.06 * b + 0.3 * um
        for i in range(max(0, int((y - reach - y0) / um)), min(height, int((y + reach - y0) / um) + 1)):
            dy = y0 + (i + 0.5) * um - y
            for j in range(max(0, int((x - reach - x0) / um)), min(width, int((x + reach - x0) / um) + 1)):
                dx = x0 + (j + 0.5) * um - x
                u, v = c * dx + s * dy, c * dy - s * dx
                un, vn = u / a, v / b
                d = math.sqrt(un * un + vn * vn) + 1e-6
                if d > 1.4 + 2.5 / b:
                    continue
                c1, s1 = un / d, vn / d
                k2c, k2s = c1 * c1 - s1 * s1, 2 * c1 * s1
                k3c, k3s = k2c * c1 - k2s * s1, k2s * c1 + k2c * s1
                k5c, k5s = k2c * k3c - k2s * k3s, k2s * k3c + k2c * k3s
                r = 1 + rough * (
                    0.5 * (k2c * c2 + k2s * s2) + 0.4 * (k3c * c3 + k3s * s3) + 0.3 * (k5c * c5 + k5s * s5)
                )
                sd = (d - r) / _slope(c1, s1, a, b)
                clump = look(noise, CHROMATIN, (u + shift_x) * coarse, (v + shift_y) * coarse)
                sd += 0.16 * clump
                if sd > w:
                    if halo > 0 and sd < 2.2:
                        fade = 1 - sd / 2.2
                        e[i, j] *= 1 - halo * fade
                    continue
                cover = _step(sd, w)
                q = (sd + membrane) / membrane
                edge = 1 / (1 + q * q * q * q)
                clump += 0.3 * (clump * clump - 1)
                fill = 1 - vesicle + vesicle * (0.40 + 0.85 * edge * (1 + 0.3 * clump)) + grain * clump
                fill = max(fill, 0.12)
                red = 0.3
                for m in range(spots):
                    q = ((u - spot[m, 0]) ** 2 + (v - spot[m, 1]) ** 2) / (spot[m, 2] * spot[m, 2])
                    if q < 6:
                        q = math.exp(-q)
                        fill += 0.75 * q
                        red += 0.22 * q
                ink = dark * fill
                below = h[i, j]
                h[i, j] = below + cover * (ink + 0.15 * below - below)
                e[i, j] += cover * clears * (red - e[i, j])
