"""Foreground at a fixed physical resolution, its area, and artefacts apart. Lengths in um, areas in um2."""

from __future__ import annotations

import cv2
import numpy as np

UM_PER_PX = 8.0  # the scale at which masks are made


def foreground(rgb: np.ndarray, um_per_px: float = UM_PER_PX) -> np.ndarray:
    """Where tissue is, (h, w) bool, for a thumbnail (h, w, 3) uint8; fat and lumina count as tissue."""
    density = optical_density(rgb)
    smooth = cv2.GaussianBlur(density, (0, 0), 8 / um_per_px)
    mask = smooth > 0.06
    close = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * round(32 / um_per_px) + 1,) * 2)
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, close)
    return mask.astype(bool)


def optical_density(rgb: np.ndarray) -> np.ndarray:
    """Mean over R, G, B of -log10 of the transmission against the slide's own glass, (h, w) float32."""
    glass = np.clip(np.percentile(rgb.reshape(-1, 3), 99, axis=0), 200, 255)
    return -np.log10(np.clip(rgb / glass, 1 / 255, 1)).mean(axis=2, dtype=np.float32)


def artefacts(rgb: np.ndarray, um_per_px: float = UM_PER_PX) -> dict[str, np.ndarray]:
    """Masks (h, w) bool of what is no tissue or no use: "pen", "bubble", "fold"."""
    return {kind: np.zeros(rgb.shape[:2], bool) for kind in ("pen", "bubble", "fold")}


def area_mm2(mask: np.ndarray, um_per_px: float) -> float:
    """Area of the True pixels in mm2."""
    return float(np.count_nonzero(mask) * (um_per_px / 1000) ** 2)


def iou(mask: np.ndarray, truth: np.ndarray, um_per_px: float, ignore_um: float = 16.0) -> float:
    """Intersection over union of two (h, w) bool masks, leaving out pixels within ignore_um of truth's border.

    1.0 where both are empty.
    """
    truth = truth.astype(bool)
    reach = max(1, round(ignore_um / um_per_px))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2)
    band = cv2.dilate(truth.astype(np.uint8), disc) != cv2.erode(truth.astype(np.uint8), disc)
    both, either = mask & truth & ~band, (mask | truth) & ~band
    return float(both.sum() / either.sum()) if either.any() else 1.0
