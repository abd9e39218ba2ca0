"""From dye to pixels: Beer-Lambert absorption, then what a scanner does to the light."""

from __future__ import annotations

import cv2
import numpy as np
from numba import njit
from scipy import ndimage

_STEPS = 512  # entries of the exp table per unit of optical density
_TABLE = np.exp(-np.arange(8 * _STEPS) / _STEPS).astype(np.float32)
_NOISE_PX = 1024


@njit(cache=True, nogil=True)
def _absorb(h, e, gain, matrix, table, steps, out):
    last = table.shape[0] - 1
    for y in range(h.shape[0]):
        for x in range(h.shape[1]):
            a, b = h[y, x] * gain[y, x, 0], e[y, x] * gain[y, x, 1]
            for c in range(3):
                density = int((a * matrix[c, 0] + b * matrix[c, 1]) * steps)
                out[y, x, c] = table[min(max(density, 0), last)]


@njit(cache=True, nogil=True)
def _digitise(light, wide, sharpen, curve, noise, level, shift, out):
    size = noise.shape[0] - 1
    top = curve.shape[1] - 1
    for y in range(light.shape[0]):
        for x in range(light.shape[1]):
            for c in range(3):
                value = light[y, x, c]
                value += sharpen * (value - wide[y, x, c])
                grey = curve[c, min(max(int(value * top), 0), top)]
                grey += level * noise[(y + shift[c, 0]) & size, (x + shift[c, 1]) & size]
                out[y, x, c] = np.uint8(min(max(grey + 0.5, 0.0), 255.0))


def stain_matrix(stain: dict[str, float]) -> np.ndarray:
    """(3, 2) optical density of one unit of haematoxylin and of eosin in R, G, B, strengths included."""
    columns = [[stain[f"{dye}_{c}"] * stain[f"{dye}_strength"] for dye in "he"] for c in ("red", "green", "blue")]
    return np.array(columns, np.float32)


def transmitted(h: np.ndarray, e: np.ndarray, gain: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Light left after the dyes, (h, w, 3) float32 in 0..1; gain (h, w, 2) multiplies the amounts of dye."""
    out = np.empty((*h.shape, 3), np.float32)
    _absorb(h, e, gain, matrix, _TABLE, _STEPS, out)
    return out


def scan(light: np.ndarray, scanner: dict[str, float], mpp: float, seed: list[int]) -> np.ndarray:
    """What the scanner stores of `light`: (h, w, 3) uint8. `seed` names the window for its noise."""
    sigma = scanner["blur_um"] / mpp
    focused = cv2.GaussianBlur(light, (0, 0), sigma)
    wide = cv2.GaussianBlur(focused, (0, 0), max(2 * sigma, 0.9))
    shift = np.random.default_rng(seed).integers(_NOISE_PX, size=(3, 2))
    out = np.empty(light.shape, np.uint8)
    _digitise(focused, wide, scanner["sharpen"], _curve(scanner), _noise(), scanner["noise"], shift, out)
    return out


def _curve(scanner: dict[str, float]) -> np.ndarray:
    """Grey level of every amount of light by channel: white point and gamma, with a soft toe."""
    light = np.linspace(0, 1, 1024) ** scanner["gamma"]
    white = np.array([scanner[f"white_{c}"] for c in ("red", "green", "blue")])
    return (6 + (white[:, None] - 6) * light).astype(np.float32)


_noise_field: np.ndarray | None = None


def _noise() -> np.ndarray:
    global _noise_field
    if _noise_field is None:
        raw = np.random.default_rng(1).standard_normal((_NOISE_PX, _NOISE_PX)).astype(np.float32)
        soft = ndimage.gaussian_filter(raw, 0.5, mode="wrap")
        _noise_field = soft / soft.std()
    return _noise_field
