"""Foreground at a fixed physical resolution, its area, and artefacts apart. Lengths in um, areas in mm2.

Thresholds were set on synthetic slides of development seeds and looked at on real ones; optical densities are
decadic and relative to the slide's own glass, so that lamp, white balance and exposure drop out.
"""

from __future__ import annotations

import cv2
import numpy as np

UM_PER_PX = 8.0  # the scale at which masks are made
DETAIL = 4  # focus is judged at a quarter of it, 2 um, where blurred nuclei lose their edges
KINDS = ("pen", "bubble", "fold", "blur")


def foreground(
    rgb: np.ndarray,
    um_per_px: float = UM_PER_PX,
    threshold: float = 0.02,
    core: float = 0.06,
    gap_um: float = 48.0,
    hole_um: float = 300.0,
    least_um: float = 80.0,
    spoilt: np.ndarray | None = None,
) -> np.ndarray:
    """Where tissue is, (h, w) bool, for a thumbnail (h, w, 3) uint8; fat and lumina count as tissue.

    threshold   optical density from which a pixel may be tissue; the walls of fat cells have about 0.03
    core        density that a connected region must reach somewhere
    gap_um      gaps up to about twice this wide are closed
    hole_um     enclosed holes up to this square are filled
    least_um    smaller squares of tissue are dropped
    spoilt      (h, w) bool, pixels that count as glass: ink, say
    """
    density = optical_density(rgb)
    dense = cv2.GaussianBlur(np.maximum(density[..., 1], density.mean(axis=2)), (0, 0), 8 / um_per_px)
    if spoilt is not None:
        dense[spoilt] = 0
    mask = _reaching(dense > threshold, dense > core)
    reach = round(gap_um / um_per_px) + 2
    mask = cv2.copyMakeBorder(mask, reach, reach, reach, reach, cv2.BORDER_CONSTANT, value=0)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, _disc(gap_um, um_per_px))
    mask = np.ascontiguousarray(mask[reach:-reach, reach:-reach])
    mask |= _holes(mask, (hole_um / um_per_px) ** 2)
    if spoilt is not None:
        mask[spoilt] = 0
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, _disc(12, um_per_px))
    return _larger(mask, (least_um / um_per_px) ** 2).astype(bool)


def optical_density(rgb: np.ndarray) -> np.ndarray:
    """-log10 of the transmission against the slide's glass, (h, w, 3) float32; about 0 on glass."""
    glass = glass_level(rgb)
    steps = np.arange(256, dtype=np.float32).clip(1)[:, None] / glass
    table = -np.log10(steps, dtype=np.float32)
    return np.stack([table[rgb[..., k], k] for k in range(3)], axis=-1)


def glass_level(rgb: np.ndarray) -> np.ndarray:
    """(3,) float32: the commonest of the brightest colours."""
    light = rgb.sum(axis=2, dtype=np.int32) // 3
    counts = np.bincount(light.ravel(), minlength=256)
    counts[: max(int(np.percentile(light, 99)) - 15, 0)] = 0
    return np.median(rgb[np.abs(light - counts.argmax()) <= 2], axis=0).astype(np.float32).clip(1)


def artefacts(rgb: np.ndarray, um_per_px: float = UM_PER_PX) -> dict[str, np.ndarray]:
    """Masks (h, w) bool of what is no tissue or of no use: "pen", "bubble", "fold"."""
    density = optical_density(rgb)
    return {
        "pen": _pen(density, um_per_px),
        "bubble": _bubble(density, um_per_px),
        "fold": _fold(density, um_per_px),
    }


def _pen(density: np.ndarray, um: float) -> np.ndarray:
    """Ink: no stain absorbs more red than green (blue, green ink) or is grey (black), nor more blue than this
    slide's eosin does (red).
    """
    smooth = cv2.GaussianBlur(density, (0, 0), 12 / um)
    red, green, blue = np.moveaxis(smooth, -1, 0)
    eosin = (green > 0.1) & (red < 0.45 * green)
    usual = np.quantile(blue[eosin] / green[eosin], 0.3) if eosin.any() else 0.0
    cold = (red > green) & (red > 0.25)
    grey = (np.minimum(red, blue) > 0.7 * green) & (np.minimum(red, blue) > 0.15)
    warm = eosin & (blue > 0.2) & (blue > max(0.6, 1.2 * usual) * green) & (blue < 1.15 * green)
    ink = cv2.morphologyEx((cold | grey | warm).astype(np.uint8), cv2.MORPH_OPEN, _disc(24, um))
    ink = _larger(ink, 0.02e6 / um**2)
    return cv2.dilate(ink, _disc(24, um)).astype(bool)


def _bubble(density: np.ndarray, um: float) -> np.ndarray:
    """Air: what a thin dark grey line encloses. H&E is never grey: eosin lets red through, haematoxylin blue."""
    red, green, blue = (
        cv2.morphologyEx(np.ascontiguousarray(density[..., k]), cv2.MORPH_TOPHAT, _disc(32, um)) for k in range(3)
    )
    rim = ((blue > 0.17) & (np.minimum(red, blue) > 0.5 * green)).astype(np.uint8)
    rim = _longer(rim, 48 / um)
    near = cv2.dilate(rim, np.ones((3, 3), np.uint8))
    grey = cv2.dilate(np.minimum(red, blue), np.ones((5, 5), np.uint8))
    closed = cv2.morphologyEx(rim, cv2.MORPH_CLOSE, _disc(24, um))
    closed, near, grey, frame = (
        cv2.copyMakeBorder(a, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
        for a in (closed, near, grey, np.zeros_like(closed))
    )  # the slide's edge closes a bubble that it cuts
    number, labels, stats, _ = cv2.connectedComponentsWithStats(1 - closed, connectivity=4)
    bubbles = np.zeros_like(closed)
    for k in range(1, number):
        if not 3e3 < stats[k, cv2.CC_STAT_AREA] * um**2 < 0.5e6:
            continue
        inside = (labels == k).astype(np.uint8)
        ring = cv2.dilate(inside, np.ones((3, 3), np.uint8)) > inside
        cut = frame[ring].mean()
        if cut < 0.4 and near[ring].mean() > 0.8 and np.median(grey[ring]) > 0.22 and _solidity(inside) > 0.7:
            bubbles |= inside
    return cv2.dilate(bubbles, _disc(16, um))[1:-1, 1:-1].astype(bool)


def _fold(density: np.ndarray, um: float) -> np.ndarray:
    """Tissue lying double: long, narrow and denser than is usual on this slide."""
    green = cv2.GaussianBlur(np.ascontiguousarray(density[..., 1]), (0, 0), 12 / um)
    tissue = green > 0.06
    if not tissue.any():
        return tissue
    dark = (green > 1.7 * np.median(green[tissue])).astype(np.uint8)
    dark = cv2.morphologyEx(dark, cv2.MORPH_OPEN, _disc(12, um))
    dark = cv2.morphologyEx(dark, cv2.MORPH_CLOSE, _disc(24, um))
    number, labels, stats, _ = cv2.connectedComponentsWithStats(dark, connectivity=8)
    depth = cv2.distanceTransform(dark, cv2.DIST_L2, 3) * um
    folds = np.zeros(number, bool)
    for k in range(1, number):
        area = stats[k, cv2.CC_STAT_AREA] * um**2
        half = depth[labels == k].max()
        length = area / (2 * half)
        folds[k] = area > 4e3 and half < 60 and length > max(160, 4 * half)
    return folds[labels]


def detail(rgb: np.ndarray, glass: np.ndarray) -> np.ndarray:
    """How much two neighbouring bands of fine structure hold, (2, h, w) float32 on the grid of the mask.

    rgb     (DETAIL h, DETAIL w, 3) uint8 at a DETAIL-th of the mask's um/px
    glass   (3,) of the whole slide
    """
    grey = np.log10(np.arange(256, dtype=np.float32).clip(1) / glass.mean())
    density = grey[cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)]
    once, twice = cv2.GaussianBlur(density, (0, 0), 1), cv2.GaussianBlur(density, (0, 0), 2)
    size = rgb.shape[1] // DETAIL, rgb.shape[0] // DETAIL
    bands = np.abs(density - once), np.abs(once - twice)
    return np.stack([cv2.resize(band, size, interpolation=cv2.INTER_AREA) for band in bands])


def blurred(detail: np.ndarray, tissue: np.ndarray, um_per_px: float = UM_PER_PX) -> np.ndarray:
    """Tissue out of focus, (h, w) bool: the finest band is weak beside the next one, against this slide's usual.

    detail   (2, h, w) as `detail` makes it; tissue (h, w) bool
    A slide that is blurred for the most part is not seen: sharpness is compared within the slide.
    """
    if not tissue.any():
        return np.zeros_like(tissue)
    fine, coarse = (cv2.GaussianBlur(band * tissue, (0, 0), 24 / um_per_px) for band in detail)
    ratio = fine / np.maximum(coarse, 1e-4)
    soft = (tissue & (ratio < 0.62 * np.median(ratio[tissue]))).astype(np.uint8)
    soft = cv2.morphologyEx(soft, cv2.MORPH_CLOSE, _disc(40, um_per_px))
    soft = cv2.morphologyEx(soft, cv2.MORPH_OPEN, _disc(40, um_per_px))
    return _larger(soft, 0.04e6 / um_per_px**2).astype(bool)


def area_mm2(mask: np.ndarray, um_per_px: float) -> float:
    """Area of the True pixels in mm2."""
    return float(np.count_nonzero(mask) * (um_per_px / 1000) ** 2)


def iou(mask: np.ndarray, truth: np.ndarray, um_per_px: float, ignore_um: float = 16.0) -> float:
    """Intersection over union of two (h, w) bool masks, leaving out pixels within ignore_um of truth's border.

    1.0 where both are empty.
    """
    truth = truth.astype(bool)
    disc = _disc(max(ignore_um, um_per_px), um_per_px)
    band = cv2.dilate(truth.astype(np.uint8), disc) != cv2.erode(truth.astype(np.uint8), disc)
    both, either = mask & truth & ~band, (mask | truth) & ~band
    return float(both.sum() / either.sum()) if either.any() else 1.0


def _disc(radius_um: float, um_per_px: float) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * round(radius_um / um_per_px) + 1,) * 2)


def _larger(mask: np.ndarray, least_px: float) -> np.ndarray:
    """The connected regions of more than least_px pixels, uint8."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] > least_px
    keep[0] = False
    return keep[labels].astype(np.uint8)


def _longer(mask: np.ndarray, least_px: float) -> np.ndarray:
    """The connected regions at least this wide or high, uint8."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = np.maximum(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT]) >= least_px
    keep[0] = False
    return keep[labels].astype(np.uint8)


def _reaching(mask: np.ndarray, core: np.ndarray) -> np.ndarray:
    """The connected regions of mask that touch core, uint8."""
    number, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    keep = np.zeros(number, np.uint8)
    keep[labels[core]] = 1
    keep[0] = 0
    return keep[labels]


def _holes(mask: np.ndarray, most_px: float) -> np.ndarray:
    """Enclosed background regions of at most most_px pixels, uint8."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4)
    fill = stats[:, cv2.CC_STAT_AREA] <= most_px
    fill[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = False
    fill[0] = False
    return fill[labels].astype(np.uint8)


def _solidity(mask: np.ndarray) -> float:
    """Area over area of the convex hull of a region."""
    outline = max(cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], key=cv2.contourArea)
    return cv2.contourArea(outline) / max(cv2.contourArea(cv2.convexHull(outline)), 1.0)
