"""What pixels say without a network: the floors that every score stands on. Fixed before any training."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from skimage.feature import local_binary_pattern

VERSION = 1  # of the definitions below; recorded with every floor
TEXTURE_PX = 96  # side at which texture is read
RADII_PX = (1, 2, 3)  # of the local binary patterns, at that side
POINTS = 8  # samples on each circle
BINS = 8  # of the histogram, per colour channel


def colour(image: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of red, green, blue (6,), of 0 to 1. image (h, w, 3) uint8."""
    mean, spread = cv2.meanStdDev(image)
    return np.concatenate([mean, spread])[:, 0] / 255


def histogram(image: np.ndarray) -> np.ndarray:
    """Square root of the joint colour histogram (512,), 8 bins a channel. image (h, w, 3) uint8."""
    counts = cv2.calcHist([image], [0, 1, 2], None, [BINS] * 3, [0, 256] * 3).ravel()
    return np.sqrt(counts / counts.sum())


def lbp(image: np.ndarray) -> np.ndarray:
    """Histograms of uniform local binary patterns (30,): 8 points at radii 1, 2 and 3 px of the grey image.

    The image is resized to 96 px a side first, so that radii mean the same share of every tile.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, (TEXTURE_PX, TEXTURE_PX), interpolation=cv2.INTER_AREA)
    codes = [local_binary_pattern(grey, POINTS, radius, method="uniform") for radius in RADII_PX]
    return np.concatenate([np.bincount(c.ravel().astype(int), minlength=POINTS + 2) / c.size for c in codes])


def colour_lbp(image: np.ndarray) -> np.ndarray:
    """`colour` and `lbp` side by side (36,)."""
    return np.concatenate([colour(image), lbp(image)])


DESCRIPTORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "colour": colour,
    "histogram": histogram,
    "lbp": lbp,
    "colour+lbp": colour_lbp,
}
