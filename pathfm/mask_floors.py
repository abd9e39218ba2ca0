"""What masks are guessed from without a network, one class everywhere and the colour of each pixel: floors of Dice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pathfm import segment
from pathfm.segment import SegmentationProtocol, Segmented
from pathfm.segmentation import of_images
from pathfm.tasks.nuclei import NucleiSet

BINS = 16  # of each colour channel; ours
THRESHOLDS = np.arange(0.05, 1, 0.05)  # of the probability that a pixel is of any class but background

Guess = Callable[[np.ndarray], np.ndarray]  # (P, px, px, 3) uint8 to (P, px, px) uint8 classes


def floors(images: NucleiSet, protocol: SegmentationProtocol | None = None) -> list[Segmented]:
    """ "one class everywhere" and "colour of a pixel", scored on the pieces that `segment.fit` reports.

    The class is the one of highest Dice on validate. A colour says the class it most often has on probe-train, unless
    it is background there too often: how often is too often is chosen on validate, by the Dice that is reported.
    Pixels of the ignored class teach nothing. Raises InputError for a role without images.
    """
    protocol = protocol or segment.protocol_of(images)
    role, parts = segment.parts(images, protocol)
    classes = [k for k in range(1, len(images.classes)) if images.classes[k] != images.ignored]
    constants = [_constant(kind) for kind in classes]
    shares = _shares(parts["probe-train"], len(images.classes), classes)
    colours = [_coloured(shares, classes, threshold) for threshold in THRESHOLDS]
    guesses = {"one class everywhere": constants, "colour of a pixel": colours}
    return [_best(name, tried, images, parts, role, protocol) for name, tried in guesses.items()]


def _constant(kind: int) -> Guess:
    return lambda pixels: np.full(pixels.shape[:3], kind, np.uint8)


def _codes(pixels: np.ndarray) -> np.ndarray:
    """The colour of each pixel as an integer below BINS cubed."""
    bins = pixels.astype(np.int64) * BINS // 256
    return (bins[..., 0] * BINS + bins[..., 1]) * BINS + bins[..., 2]


def _shares(taught: segment.Pieces, n: int, classes: list[int]) -> np.ndarray:
    """(BINS**3, C) how often a pixel of each colour is of each class; all background where a colour was never seen."""
    known = np.isin(taught.masks, [0, *classes])
    pairs = _codes(taught.images)[known] * n + taught.masks[known]
    counts = np.bincount(pairs, minlength=BINS**3 * n).reshape(-1, n).astype(float)
    counts[counts.sum(axis=1) == 0, 0] = 1
    return counts / counts.sum(axis=1, keepdims=True)


def _coloured(shares: np.ndarray, classes: list[int], threshold: float) -> Guess:
    likeliest = np.array(classes, np.uint8)[shares[:, classes].argmax(axis=1)]
    answers = np.where(1 - shares[:, 0] > threshold, likeliest, 0).astype(np.uint8)
    return lambda pixels: answers[_codes(pixels)]


def _best(name: str, tried: list[Guess], images: NucleiSet, parts: dict, role: str, protocol) -> Segmented:
    """The guess of highest Dice on validate, as a single run of what stops nowhere."""
    held = parts["validate"]
    scores = [
        np.nanmean(of_images(segment.by_class(guess(held.images)[None], held.masks, images)[0])) for guess in tried
    ]
    guess, reported = tried[int(np.argmax(scores))], parts[role]
    answers = guess(reported.images)[None]
    each, clean = (segment.by_class(answers, reported.masks, images, how) for how in (False, True))
    told = np.zeros(1, int), np.array([max(scores)]), protocol.window_px, guess
    return Segmented(name, images, reported, role, each, clean, *told)
