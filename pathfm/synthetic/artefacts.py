"""What goes wrong between the microtome and the scanner: pen marks, folds, air bubbles, blur; with their truth."""

from __future__ import annotations

import math

import cv2
import numpy as np

from pathfm.synthetic.layout import MAP_UM, smooth_noise

KINDS = ("pen", "fold", "bubble", "blur")
FLAG = {kind: 1 << index for index, kind in enumerate(KINDS)}  # bits of an artefact mask
# Optical density of felt-tip ink in R, G, B.
INKS = {
    "blue": (1.9, 1.15, 0.30),
    "green": (1.6, 0.45, 1.10),
    "black": (1.7, 1.65, 1.55),
    "red": (0.15, 1.50, 1.20),
}


def draw(rng: np.random.Generator, kinds: tuple[str, ...], tissue: np.ndarray, turn: int = 0) -> Artefacts:
    """Artefacts of the given kinds on a slide whose tissue mask, on the MAP_UM grid, is `tissue`.

    turn   the slide's number: pens change their ink and what they draw from slide to slide
    """
    marks = Artefacts(tissue.shape, turn)
    for kind in KINDS:
        if kind in kinds:
            _DRAW[kind](marks, rng, tissue)
    return marks


class Artefacts:
    """Fields on the MAP_UM grid from which any window is spoilt; `mask` (h, w) uint8 of FLAG bits is the truth."""

    def __init__(self, shape: tuple[int, int], turn: int = 0):
        self.turn = turn
        self.mask = np.zeros(shape, np.uint8)
        self.ink: np.ndarray | None = None  # (h, w) float32, amount of ink
        self.ink_od = np.zeros(3, np.float32)
        self.fold: np.ndarray | None = None  # (h, w) float32, 1 where tissue lies double
        self.fold_shift_um = (0.0, 0.0)
        self.rim: np.ndarray | None = None  # (h, w) float32, optical density at the edge of air
        self.air: np.ndarray | None = None  # (h, w) float32, 1 inside a bubble
        self.defocus: np.ndarray | None = None  # (h, w) float32, um of blur

    def window(self, field: np.ndarray | None, x_um: float, y_um: float, shape: tuple[int, int], mpp: float):
        """`field` over a window of `shape` pixels with its corner at (x_um, y_um), or None where it is all zero."""
        if field is None:
            return None
        rows = slice(max(int(y_um / MAP_UM) - 1, 0), int((y_um + shape[0] * mpp) / MAP_UM) + 3)
        cols = slice(max(int(x_um / MAP_UM) - 1, 0), int((x_um + shape[1] * mpp) / MAP_UM) + 3)
        if not field[rows, cols].any():
            return None
        return sample(field, MAP_UM, x_um, y_um, shape, mpp)

    def light(self, light: np.ndarray, x_um: float, y_um: float, mpp: float) -> np.ndarray:
        """`light` (h, w, 3) with ink, air and defocus in its way."""
        shape = light.shape[:2]
        rim = self.window(self.rim, x_um, y_um, shape, mpp)
        if rim is not None:
            air = sample(self.air, MAP_UM, x_um, y_um, shape, mpp)[..., None]
            soft = cv2.GaussianBlur(light, (0, 0), 2.2 / mpp)
            light = light + air * (0.9 * soft + 0.06 - light)
            light = np.minimum(light, 1.02) * np.exp(-rim[..., None] * np.float32([1.0, 0.95, 0.85]))
        ink = self.window(self.ink, x_um, y_um, shape, mpp)
        if ink is not None:
            light = light * np.exp(-ink[..., None] * self.ink_od)
        defocus = self.window(self.defocus, x_um, y_um, shape, mpp)
        return light if defocus is None else _defocused(light, defocus, mpp)


def sample(field, map_um: float, x_um: float, y_um: float, shape: tuple[int, int], mpp: float) -> np.ndarray:
    """`field`, given on a grid of `map_um`, at the centres of the pixels of a window; linear in between."""
    scale = mpp / map_um
    affine = np.array(
        [
            [scale, 0, (x_um + mpp / 2) / map_um - 0.5],
            [0, scale, (y_um + mpp / 2) / map_um - 0.5],
        ]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(field, affine, shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _defocused(light: np.ndarray, defocus: np.ndarray, mpp: float) -> np.ndarray:
    """`light` blurred by `defocus` um, interpolated between a few fixed blurs."""
    steps_um = (0.0, 1.5, 3.0, 5.0)
    out = light
    below = light
    for low, high in zip(steps_um[:-1], steps_um[1:], strict=True):
        above = cv2.GaussianBlur(light, (0, 0), high / mpp)
        weight = np.clip((defocus - low) / (high - low), 0, 1)[..., None]
        out = np.where(defocus[..., None] > low, below + weight * (above - below), out)
        below = above
    return out


def _stroke(shape, points_um: np.ndarray, width_um: float) -> np.ndarray:
    """A felt-tip line through `points_um` (n, 2: x, y): (h, w) float32, denser where it starts and overlaps."""
    line = np.zeros(shape, np.uint8)
    points = np.round(points_um / MAP_UM * 8).astype(np.int32)[None]
    cv2.polylines(line, points, False, 255, max(1, round(width_um / MAP_UM)), cv2.LINE_AA, shift=3)
    return line.astype(np.float32) / 255


def _pen(marks: Artefacts, rng: np.random.Generator, tissue: np.ndarray) -> None:
    """A loop around a part of the tissue, an arrow, or a few ticks beside it."""
    height, width = (side * MAP_UM for side in tissue.shape)
    side = min(height, width)
    pen_um = rng.uniform(0.045, 0.075) * min(side, 2400)
    strokes = []
    style = ("loop", "ticks", "line")[marks.turn % 3]
    wobble = lambda n: np.cumsum(rng.normal(0, 0.006 * side, (n, 2)), 0)  # noqa: E731
    if style == "loop":
        turn = np.linspace(0, 2 * np.pi * rng.uniform(0.85, 1.05), 40) + rng.uniform(0, 6.3)
        centre = np.array([rng.uniform(0.35, 0.65) * width, rng.uniform(0.35, 0.65) * height])
        radii = side * np.array([rng.uniform(0.26, 0.36), rng.uniform(0.26, 0.40)])
        strokes.append(centre + radii * np.stack([np.cos(turn), np.sin(turn)], 1) + wobble(40) * 0.6)
    elif style == "ticks":
        at = np.array([rng.uniform(0.08, 0.3) * width, rng.uniform(0.08, 0.9) * height])
        for _ in range(3):
            slope = rng.uniform(-1.2, 1.2)
            reach = np.linspace(0, rng.uniform(0.14, 0.24) * side, 12)[:, None]
            strokes.append(at + reach * [np.cos(slope), np.sin(slope)] + wobble(12) * 0.5)
            at = at + rng.uniform(-0.02, 0.10, 2) * side
    else:
        ends = rng.uniform(0.02, 0.98, (2, 2)) * [width, height]
        ends[0, 0], ends[1, 0] = 0.02 * width, 0.98 * width
        strokes.append(np.linspace(ends[0], ends[1], 30) + wobble(30))
    ink = np.zeros(tissue.shape, np.float32)
    for points in strokes:
        ink += _stroke(tissue.shape, points, pen_um)
    # Ink gathers at the rim of a stroke and is patchy inside.
    rim = np.clip(ink - cv2.GaussianBlur(ink, (0, 0), 7), 0, 1)
    patchy = 0.75 + 0.16 * smooth_noise(rng, tissue.shape, 60) + 0.06 * smooth_noise(rng, tissue.shape, 9)
    ink = cv2.GaussianBlur(ink * np.clip(patchy, 0.35, 1.3) + 0.5 * rim, (0, 0), 3.0)
    marks.ink = np.where(ink > 0.02, ink, 0).astype(np.float32)
    marks.ink_od = np.float32(list(INKS.values())[marks.turn % len(INKS)]) * np.float32(rng.uniform(0.75, 1.1))
    marks.mask[marks.ink > 0.12] |= FLAG["pen"]


def _fold(marks: Artefacts, rng: np.random.Generator, tissue: np.ndarray) -> None:
    """One to three narrow pleats: tissue over tissue, with a pale tear along one flank now and then."""
    rows, cols = np.nonzero(tissue)
    if len(rows) == 0:
        return
    side_um = min(tissue.shape) * MAP_UM
    fold = np.zeros(tissue.shape, np.float32)
    turn = rng.uniform(0, np.pi)
    for _ in range(int(rng.integers(1, 4))):
        pick = rng.integers(len(rows))
        middle = np.array([cols[pick], rows[pick]]) * MAP_UM
        length, steps = rng.uniform(0.25, 0.55) * side_um, 60
        bend = np.cumsum(np.cumsum(rng.normal(0, 0.005, steps)))
        heading = turn + rng.normal(0, 0.25) + bend - bend[steps // 2]
        path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1) * length / steps, 0)
        path += middle - path[steps // 2]
        swell = np.sin(np.linspace(0, np.pi, steps)) ** 0.6 * rng.uniform(20, 42) * min(1, side_um / 1200)
        for (x, y), radius in zip(path, swell, strict=True):
            at = (round(x / MAP_UM * 8), round(y / MAP_UM * 8))
            cv2.circle(fold, at, max(round(radius / MAP_UM * 8), 1), 1.0, -1, cv2.LINE_AA, shift=3)
        spacing = length / steps
        if spacing > 8:
            thick = max(1, round(float(swell.mean()) / MAP_UM))
            cv2.polylines(fold, [np.round(path / MAP_UM).astype(np.int32)], False, 1.0, thick)
    ragged = fold + 0.35 * smooth_noise(rng, fold.shape, 8) * (cv2.GaussianBlur(fold, (0, 0), 5) > 0.02)
    ragged = cv2.GaussianBlur(ragged.astype(np.float32), (0, 0), 2.0)
    marks.fold = np.clip((ragged - 0.45) / 0.15, 0, 1) * tissue
    angle = turn + math.pi / 2
    marks.fold_shift_um = (60 * math.cos(angle), 60 * math.sin(angle))
    marks.mask[marks.fold > 0.5] |= FLAG["fold"]


def _bubble(marks: Artefacts, rng: np.random.Generator, tissue: np.ndarray) -> None:
    """Air under the cover slip: dark refracting rims, paler and softer inside."""
    height, width = tissue.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    inside = np.full(tissue.shape, -np.inf, np.float32)
    sway = smooth_noise(rng, tissue.shape, 400 / MAP_UM) * 7
    at = rng.uniform(0.15, 0.85, 2) * tissue.shape
    for index in range(int(rng.integers(2, 6))):
        radius = rng.uniform(0.055, 0.12) * min(height, width) * (1 if index == 0 else rng.uniform(0.15, 0.8))
        turn, long = rng.uniform(0, np.pi), rng.uniform(1.0, 1.3)
        dx, dy = x - at[1], y - at[0]
        u, v = dx * np.cos(turn) + dy * np.sin(turn), -dx * np.sin(turn) + dy * np.cos(turn)
        inside = np.maximum(inside, radius - np.hypot(u / long, v * long))
        at = np.clip(at + rng.normal(0, 0.13, 2) * tissue.shape, 0, np.array(tissue.shape) - 1)
    depth_um = (inside * MAP_UM + sway).astype(np.float32)  # positive inside
    rim = 1.15 * np.exp(-(((depth_um - 5) / 5.5) ** 2)) + 0.30 * np.exp(-(((depth_um - 20) / 7) ** 2))
    rim += 0.12 * np.exp(-np.maximum(-depth_um, 0) / 12) * (depth_um < 0) * (depth_um > -40)
    marks.rim = np.where(rim > 0.01, rim, 0).astype(np.float32)
    marks.air = np.clip(depth_um / 6, 0, 1)
    marks.rim[(marks.air > 0) & (marks.rim == 0)] = 1e-6  # so that windows inside a bubble are drawn as air
    marks.mask[depth_um > 0] |= FLAG["bubble"]


def _blur(marks: Artefacts, rng: np.random.Generator, tissue: np.ndarray) -> None:
    """A band that the scanner's focus missed, along one of the slide's axes."""
    height, width = tissue.shape
    upright = rng.random() < 0.5
    across = np.arange(width if upright else height, dtype=np.float32)
    at, half = rng.uniform(0.25, 0.75) * len(across), rng.uniform(0.07, 0.12) * len(across)
    edge = min(30 / MAP_UM, half / 3)
    profile = np.clip((half - np.abs(across - at)) / edge, 0, 1) * rng.uniform(3.0, 4.8)
    band = profile[None] if upright else profile[:, None]
    marks.defocus = np.ascontiguousarray(band * (0.92 + 0.05 * smooth_noise(rng, tissue.shape, 300)), np.float32)
    marks.mask[marks.defocus > 1.5] |= FLAG["blur"]


_DRAW = {"pen": _pen, "fold": _fold, "bubble": _bubble, "blur": _blur}
