"""Random fields over a slide: noise made once and looked up at um coordinates, so that windows show no seam."""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np
from numba import njit

SIZE = 1024  # samples a side; a power of two, so that wrapping is a bit mask
LOW, MID, GRAIN, FIBRE, FIBRIL, CHROMATIN = range(6)
UM_PER_SAMPLE = np.array([8.0, 1.0, 0.25, 0.5, 0.25, 0.125], np.float32)
PER_UM = (1 / UM_PER_SAMPLE).astype(np.float32)


def _field(seed: int, amplitude, step_um: float) -> np.ndarray:
    """A tileable field, mean 0 and variance 1, with that spectral amplitude over (ky, kx) in cycles per um."""
    rng = np.random.default_rng([2404, seed])
    ky = np.fft.fftfreq(SIZE, step_um)[:, None]
    kx = np.fft.rfftfreq(SIZE, step_um)[None]
    noise = rng.standard_normal((2, SIZE, SIZE // 2 + 1))
    spectrum = amplitude(ky, kx) * (noise[0] + 1j * noise[1])
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(SIZE, SIZE))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _band(longest_um: float, shortest_um: float, slope: float):
    """Isotropic noise between two wavelengths, amplitude falling as k**-slope."""

    def amplitude(ky, kx):
        k = np.hypot(ky, kx) + 1e-9
        return k**-slope * np.exp(-((k * shortest_um) ** 2)) * (1 - np.exp(-((k * longest_um) ** 2)))

    return amplitude


def _threads(length_um: float, width_um: float):
    """Threads along x."""

    def amplitude(ky, kx):
        inner = np.exp(-6 * ((kx * length_um) ** 2 + (ky * width_um) ** 2))
        return inner * (1 - np.exp(-((np.hypot(ky, kx) * 60) ** 2)))

    return amplitude


@functools.cache
def _finest() -> np.ndarray:
    amplitudes = (
        _band(1500, 150, 1.7),
        _band(60, 7, 1.3),
        _band(5, 0.9, 0.5),
        _threads(26, 2.0),
        _threads(9, 0.75),
        _band(4.0, 0.5, 0.8),
    )
    steps = UM_PER_SAMPLE
    return np.stack([_field(i, a, float(s)) for i, (a, s) in enumerate(zip(amplitudes, steps, strict=True))])


@functools.cache
def bank(um_per_px: float) -> np.ndarray:
    """The fields as a pixel of that size averages them: (6, SIZE, SIZE) float32, sampled every UM_PER_SAMPLE."""
    fields = _finest()
    if um_per_px <= 0.25:
        return fields
    pad = 48
    smooth = fields.copy()
    for k, step in enumerate(UM_PER_SAMPLE):
        sigma = 0.32 * um_per_px / float(step)
        if sigma > 0.3:
            wide = np.pad(fields[k], pad, mode="wrap")
            smooth[k] = cv2.GaussianBlur(wide, (0, 0), sigma)[pad:-pad, pad:-pad]
    return smooth


@njit(inline="always")
def look(fields, k, x, y):
    """Field k at (x, y) um, bilinear, endless.

    Part of the kernels of `nuclei` and `painters.materials`, whose numba caches do not see a change made here:
    touch those files too. No fastmath anywhere: compiled afresh and read from the cache it rounds differently.
    """
    fx = x * PER_UM[k]
    fy = y * PER_UM[k]
    ix = math.floor(fx)
    iy = math.floor(fy)
    tx = np.float32(fx - ix)
    ty = np.float32(fy - iy)
    x0 = int(ix) & 1023
    y0 = int(iy) & 1023
    x1 = (x0 + 1) & 1023
    y1 = (y0 + 1) & 1023
    top = fields[k, y0, x0] + tx * (fields[k, y0, x1] - fields[k, y0, x0])
    low = fields[k, y1, x0] + tx * (fields[k, y1, x1] - fields[k, y1, x0])
    return top + ty * (low - top)


@njit(cache=True, nogil=True)
def _sheet(fields, k, x0, y0, height, width, step, scale, out):
    for i in range(height):
        y = (y0 + (i + 0.5) * step) / scale
        for j in range(width):
            out[i, j] = look(fields, k, (x0 + (j + 0.5) * step) / scale, y)


def sheet(k: int, shape: tuple[int, int], step_um: float, scale: float = 1.0, shift=(0.0, 0.0)) -> np.ndarray:
    """Field k magnified `scale` times on a grid of step_um, starting at `shift` (x, y) um: float32."""
    out = np.empty(shape, np.float32)
    _sheet(_finest(), k, float(shift[0]), float(shift[1]), shape[0], shape[1], float(step_um), float(scale), out)
    return out


def blur(field: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian smoothing by `sigma` samples."""
    return cv2.GaussianBlur(field, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


def signed_distance(mask: np.ndarray, step_um: float, edge: bool = False) -> np.ndarray:
    """Distance to the border of `mask` in um, positive inside; with `edge` the array's frame is a border too."""
    padded = np.pad(mask, 1, constant_values=False) if edge else np.pad(mask, 1, mode="edge")
    padded = padded.astype(np.uint8)
    inside = cv2.distanceTransform(padded, cv2.DIST_L2, 5)
    outside = cv2.distanceTransform(1 - padded, cv2.DIST_L2, 5)
    both = np.where(padded > 0, inside - 0.5, 0.5 - outside)
    far = 1e4 / step_um
    return (np.clip(both[1:-1, 1:-1], -far, far) * step_um).astype(np.float32)


def gradient(field: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """The unit direction of steepest ascent of the smoothed field, as (x, y) components."""
    smooth = blur(field, sigma)
    dx = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=3)
    dy = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=3)
    size = np.hypot(dx, dy) + 1e-6
    return dx / size, dy / size


@njit(cache=True, nogil=True)
def _two_nearest(px, py, sx, sy, weight, start, member, cell, columns, rows, near, border):
    for i in range(px.shape[0]):
        for j in range(px.shape[1]):
            x, y = px[i, j], py[i, j]
            cx = min(max(int(x / cell), 0), columns - 1)
            cy = min(max(int(y / cell), 0), rows - 1)
            best, other, first, second = 1e12, 1e12, -1, -1
            for b in range(max(cy - 2, 0), min(cy + 3, rows)):
                for a in range(max(cx - 2, 0), min(cx + 3, columns)):
                    c = b * columns + a
                    for m in range(start[c], start[c + 1]):
                        s = member[m]
                        d = (sx[s] - x) ** 2 + (sy[s] - y) ** 2 - weight[s]
                        if d < best:
                            other, second = best, first
                            best, first = d, s
                        elif d < other:
                            other, second = d, s
            near[i, j] = first
            if second >= 0:
                apart = math.sqrt((sx[first] - sx[second]) ** 2 + (sy[first] - sy[second]) ** 2)
                border[i, j] = (other - best) / (2 * apart + 1e-6)
            else:
                border[i, j] = 1e4


def bins(x: np.ndarray, y: np.ndarray, cell: float, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Points sorted into square cells: cell c holds member[start[c]:start[c + 1]], in the order given."""
    at = np.clip((y / cell).astype(int), 0, rows - 1) * columns + np.clip((x / cell).astype(int), 0, columns - 1)
    member = np.argsort(at, kind="stable").astype(np.int32)
    start = np.searchsorted(at[member], np.arange(columns * rows + 1)).astype(np.int64)
    return start, member


def voronoi(px, py, seeds: np.ndarray, spacing: float, weight=None) -> tuple[np.ndarray, np.ndarray]:
    """For each point (px, py): its nearest seed (-1: none near) and the distance to the border of that cell."""
    near = np.full(px.shape, -1, np.int32)
    border = np.full(px.shape, 1e4, np.float32)
    if len(seeds):
        low = seeds.min(0) - 2 * spacing
        sx, sy = (seeds - low).T.astype(np.float32)
        columns, rows = int(sx.max() / spacing) + 3, int(sy.max() / spacing) + 3
        start, member = bins(sx, sy, spacing, columns, rows)
        weight = np.zeros(len(seeds), np.float32) if weight is None else weight.astype(np.float32)
        px, py = (px - low[0]).astype(np.float32), (py - low[1]).astype(np.float32)
        _two_nearest(px, py, sx, sy, weight, start, member, float(spacing), columns, rows, near, border)
    return near, border


def lattice(rng: np.random.Generator, low, high, spacing: float, jitter: float = 0.4) -> np.ndarray:
    """A jittered hexagonal lattice over a box: (n, 2) points x, y, one per spacing**2 * 0.87."""
    rows = np.arange(low[1] - spacing, high[1] + spacing, spacing * 0.866)
    columns = np.arange(low[0] - spacing, high[0] + spacing, spacing)
    x = columns[None] + (np.arange(len(rows)) % 2)[:, None] * spacing / 2
    y = np.broadcast_to(rows[:, None], x.shape)
    points = np.stack([x.ravel(), y.ravel()], 1)
    return points + rng.uniform(-jitter, jitter, points.shape) * spacing
