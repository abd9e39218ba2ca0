"""Foreground at a fixed physical resolution, its area, and artefacts apart. Lengths in um, areas in mm2.

Thresholds were set on synthetic slides of development seeds and looked at on real ones; optical densities are
decadic and relative to the slide's own glass, so that lamp, white balance and exposure drop out.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

UM_PER_PX = 8.0  # the scale at which masks are made
DETAIL = 4  # focus is judged at a quarter of it, 2 um, where blurred nuclei lose their edges
KINDS = ("pen", "bubble", "fold", "edge", "blur")


def segment(
    rgb: np.ndarray, um_per_px: float = UM_PER_PX, detail: Callable | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Tissue without artefacts, (h, w) bool, and the artefacts by kind, each (h, w) bool.

    rgb      (h, w, 3) uint8 thumbnail
    detail   called with the tissue mask and the glass (3,), gives (2, h, w) as the function `detail` makes it;
             None where the slide is too coarse to judge its focus
    """
    found = artefacts(rgb, um_per_px)
    spoilt = found["pen"] | found["bubble"] | found["edge"]
    mask = foreground(rgb, um_per_px, spoilt=spoilt)
    found["blur"] = np.zeros_like(mask)
    if detail is not None:
        found["blur"] = blurred(detail(mask, glass_level(rgb)), mask, um_per_px)
    return mask & ~np.logical_or.reduce(list(found.values())), found


def foreground(
    rgb: np.ndarray,
    um_per_px: float = UM_PER_PX,
    threshold: float = 0.04,
    core: float = 0.06,
    wall: float = 0.008,
    gap_um: float = 24.0,
    hole_um: float = 300.0,
    least_um: float = 80.0,
    inset_um: float = 8.0,
    spoilt: np.ndarray | None = None,
) -> np.ndarray:
    """Where tissue is, (h, w) bool, for a thumbnail (h, w, 3) uint8; fat and lumina count as tissue.

    threshold   optical density from which a pixel may be tissue
    core        density that a connected region must reach somewhere
    wall        density above its surroundings of a thin line beside tissue: a wall between fat cells
    gap_um      gaps up to about twice this wide are closed
    hole_um     enclosed holes up to this square are filled
    least_um    smaller squares of tissue are dropped
    inset_um    taken off the border, which light scattered by tissue and the smoothing push outwards
    spoilt      (h, w) bool, pixels that count as glass: ink, say
    """
    density = optical_density(rgb)
    density = np.maximum(density[..., 1], density.mean(axis=2))
    spoilt = np.zeros(density.shape, bool) if spoilt is None else spoilt
    density[spoilt] = 0
    smooth = cv2.GaussianBlur(density, (0, 0), 6 / um_per_px)
    solid = _reaching(smooth > threshold, smooth > core)
    mask = _closed(solid | _walls(density, solid, wall, um_per_px), gap_um / um_per_px)
    mask |= _holes(mask, (hole_um / um_per_px) ** 2)
    mask = cv2.morphologyEx(_reaching(mask, solid > 0), cv2.MORPH_OPEN, _disc(12, um_per_px))
    mask = cv2.erode(mask | spoilt, _disc(inset_um, um_per_px)) & ~spoilt
    return _larger(mask, (least_um / um_per_px) ** 2).astype(bool)


def _walls(density: np.ndarray, solid: np.ndarray, wall: float, um: float) -> np.ndarray:
    """Thin lines outside of dense tissue and of the light that it scatters, uint8: the net that fat is."""
    if um > 12:  # too coarse to show them
        return np.zeros_like(solid)
    lines = cv2.morphologyEx(density, cv2.MORPH_TOPHAT, _disc(24, um)) > wall
    body = cv2.morphologyEx(solid, cv2.MORPH_OPEN, _disc(24, um))
    lines &= ~cv2.dilate(body, _disc(48, um)).astype(bool)
    return _closed(lines, 32 / um)


def optical_density(rgb: np.ndarray) -> np.ndarray:
    """-log10 of the transmission against the slide's glass, (h, w, 3) float32; about 0 on glass."""
    glass = glass_level(rgb)
    steps = np.arange(256, dtype=np.float32).clip(1)[:, None] / glass
    table = -np.log10(steps, dtype=np.float32)
    return np.stack([table[rgb[..., k], k] for k in range(3)], axis=-1)


def glass_level(rgb: np.ndarray) -> np.ndarray:
    """(3,) float32: the commonest of the brightest colours; pure white is padding where there is darker glass too."""
    light = rgb.sum(axis=2, dtype=np.int32) // 3
    padding = rgb.min(axis=2) == 255
    if 0.01 < padding.mean() < 1:
        level = np.median(rgb[~padding & (np.abs(light - _commonest(light[~padding])) <= 2)], axis=0)
        share = (np.abs(rgb.astype(np.int16) - level).max(axis=2) <= 4).mean()
        if share > 0.05 and level.min() > 0.93 * level.max():  # as grey as glass is, and a surface
            return level.astype(np.float32).clip(1)
    return np.median(rgb[np.abs(light - _commonest(light)) <= 2], axis=0).astype(np.float32).clip(1)


def _commonest(light: np.ndarray) -> int:
    """The commonest grey level of the brightest."""
    counts = np.bincount(light.ravel(), minlength=256)
    counts[: max(int(np.percentile(light, 99)) - 15, 0)] = 0
    return int(counts.argmax())


def artefacts(rgb: np.ndarray, um_per_px: float = UM_PER_PX) -> dict[str, np.ndarray]:
    """Masks (h, w) bool of what is no tissue or of no use: "pen", "bubble", "fold", "edge"."""
    density = optical_density(rgb)
    edge = _edge(density, um_per_px)
    pen, bubble = _pen(density, um_per_px) & ~edge, _bubble(density, um_per_px)
    fold = _fold(density, um_per_px) & ~(pen | bubble | edge)
    return {"pen": pen, "bubble": bubble, "fold": fold, "edge": edge}


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
    stained = (green > 0.06) & (ink == 0)
    if ink.any() and stained.any():  # cold ink over tissue: darker than tissue is, and too blue for it
        over = (red > 0.55 * green) & (red > 0.3) & (green > 1.5 * np.median(green[stained]))
        ink = _reaching(over | (ink > 0), ink > 0)
    ink = cv2.morphologyEx(ink, cv2.MORPH_CLOSE, _disc(24, um))
    return cv2.dilate(ink, _disc(16, um)).astype(bool)


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
        if not 6e3 < stats[k, cv2.CC_STAT_AREA] * um**2 < 0.5e6:
            continue
        inside = (labels == k).astype(np.uint8)
        ring = cv2.dilate(inside, np.ones((3, 3), np.uint8)) > inside
        cut = frame[ring].mean()
        if cut < 0.4 and near[ring].mean() > 0.9 and np.median(grey[ring]) > 0.22 and _solidity(inside) > 0.7:
            bubbles |= inside
    return cv2.dilate(bubbles, _disc(16, um))[1:-1, 1:-1].astype(bool)


def _fold(density: np.ndarray, um: float, seed: float = 1.05, grown: float = 0.4, double: float = 1.45) -> np.ndarray:
    """Tissue lying double: a long, narrow ridge, nearly twice as dense as what lies beside it.

    seed, grown   rise above the surroundings, in the slide's usual density, where a ridge begins and ends
    double        least density and eosin of a ridge, in those beside it: a dark epithelium or a row of nuclei has
                  more haematoxylin, and no more eosin
    """
    red, green, _ = cv2.split(cv2.GaussianBlur(density, (0, 0), 10 / um))
    tissue = green > 0.06
    if not tissue.any():
        return tissue
    usual = np.median(green[tissue])
    rise = cv2.morphologyEx(green, cv2.MORPH_TOPHAT, _disc(72, um)) / usual
    ridge = cv2.morphologyEx(_reaching(rise > grown, rise > seed), cv2.MORPH_OPEN, _disc(12, um))
    eosin = green - 1.05 * red  # haematoxylin takes about as much red away as green
    number, labels, stats, _ = cv2.connectedComponentsWithStats(ridge, connectivity=8)
    depth = cv2.distanceTransform(ridge, cv2.DIST_L2, 3) * um
    folds = np.zeros(number, bool)
    for k in range(1, number):
        left, top, width, height, area = stats[k]
        reach = round(64 / um) + 1
        box = slice(max(top - reach, 0), top + height + reach), slice(max(left - reach, 0), left + width + reach)
        inside = labels[box] == k
        half = depth[box][inside].max()
        if half < 72 and area * um**2 / (2 * half) > max(110, 2.5 * half):
            far, near = (cv2.dilate(inside.astype(np.uint8), _disc(away, um)) > 0 for away in (64, 24))
            beside = far & ~near & tissue[box]
            dark = np.median(green[box][inside]) > 1.4 * usual
            folds[k] = (
                dark
                and beside.any()
                and all(
                    np.median(dye[box][inside]) > double * max(np.median(dye[box][beside]), 0.02)
                    for dye in (green, eosin)
                )
            )
    return cv2.dilate(folds[labels].astype(np.uint8), _disc(8, um)).astype(bool)


def _edge(density: np.ndarray, um: float) -> np.ndarray:
    """The rim of the glass or of the cover slip: grey, and a band along the picture's border or a straight line that
    runs through most of it, upright or level within 10 degrees.
    """
    red, green, blue = cv2.split(cv2.GaussianBlur(density, (0, 0), 8 / um))
    grey = ((np.minimum(red, blue) > 0.6 * green) & (np.minimum(red, blue) > 0.05)).astype(np.uint8)
    height, width = grey.shape
    band = cv2.morphologyEx(grey, cv2.MORPH_OPEN, _disc(24, um))
    _, labels = cv2.connectedComponents(band, connectivity=8)
    edge = np.zeros_like(grey)
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        names, lengths = np.unique(side[side > 0], return_counts=True)
        edge |= np.isin(labels, names[lengths > 0.5 * len(side)]).astype(np.uint8)
    dark = np.minimum(red, blue)
    thin = (cv2.morphologyEx(dark, cv2.MORPH_TOPHAT, _disc(64, um)) > 0.03).astype(np.uint8) & grey & ~edge
    for lying, reach in ((thin, width), (np.ascontiguousarray(thin.T), height)):
        if lying.mean() > 0.05:  # no line, but a picture that is grey all over
            continue
        drawn = np.zeros_like(lying)
        found = cv2.HoughLinesP(lying, 1, np.pi / 360, round(0.3 * reach), None, 0.6 * reach, 0.1 * reach)
        for x0, y0, x1, y1 in [] if found is None else found.reshape(-1, 4):
            if abs(int(y1) - int(y0)) < 0.18 * abs(int(x1) - int(x0)):
                cv2.line(drawn, (x0, y0), (x1, y1), 1, 2 * round(24 / um) + 1)
        edge |= drawn if lying is thin else drawn.T
    return cv2.dilate(edge, _disc(24, um)).astype(bool)


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
    soft = (tissue & (ratio < 0.7 * np.median(ratio[tissue]))).astype(np.uint8)
    soft = cv2.morphologyEx(soft, cv2.MORPH_CLOSE, _disc(40, um_per_px))
    soft = cv2.morphologyEx(soft, cv2.MORPH_OPEN, _disc(40, um_per_px))
    soft = _larger(soft, 0.04e6 / um_per_px**2)
    return cv2.dilate(soft, _disc(24, um_per_px)).astype(bool)  # focus is lost before it is missed


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


def consequence(
    mask: np.ndarray, truth: np.ndarray, um_per_px: float, tile_um: float = 128.0, min_tissue: float = 0.4
) -> tuple[float, float]:
    """What a (h, w) bool mask does to sampling: the share of admissible tiles that hold less than min_tissue of true
    tissue, and the share of true tissue that no admissible tile covers. Tiles lie on the mask's pixels.

    nan where there is no admissible tile, or no tissue.
    """
    side = round(tile_um / um_per_px)
    held, true = (_sums(each, side) for each in (mask, truth))
    need = min_tissue * side**2 - 1e-6
    reached = np.zeros(mask.shape, np.uint8)
    reached[: held.shape[0], : held.shape[1]] = held >= need
    wrong = (true[held >= need] < need).mean() if reached.any() else np.nan
    reached = cv2.dilate(reached, np.ones((side, side), np.uint8), anchor=(side - 1, side - 1))
    return float(wrong), float(1 - reached[truth].mean()) if truth.any() else np.nan


def _sums(mask: np.ndarray, side: int) -> np.ndarray:
    """True pixels in each square of `side` pixels, by its corner."""
    sums = cv2.integral(mask.astype(np.uint8))
    return sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]


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


def _closed(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """Morphological closing, uint8, for which the slide's edge is no tissue."""
    reach = round(radius_px) + 2
    framed = cv2.copyMakeBorder(mask.astype(np.uint8), *[reach] * 4, cv2.BORDER_CONSTANT, value=0)
    closed = cv2.morphologyEx(framed, cv2.MORPH_CLOSE, _disc(radius_px, 1))
    return np.ascontiguousarray(closed[reach:-reach, reach:-reach])


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
