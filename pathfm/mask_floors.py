"""What masks are guessed from without a network, from nothing to colour and texture around a pixel: floors of Dice."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from skimage.feature import local_binary_pattern
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pathfm import segment
from pathfm.descriptors import POINTS, RADII_PX
from pathfm.segment import Pieces, SegmentationProtocol, Segmented
from pathfm.segmentation import of_images
from pathfm.tasks.nuclei import NucleiSet

BINS = 16  # of each colour channel; ours
AROUND_PX = 15  # side of the square in which colour and texture around a pixel are read; ours
SAMPLE = 20_000  # pixels of probe-train that teach what is around them
THRESHOLDS = np.arange(0.05, 1, 0.05)  # of the probability that a pixel is of any class but background
SIZE = ("width_px", "height_px", "mpp")  # of an image

Shares = Callable[[np.ndarray], np.ndarray]  # (h, w, 3) uint8 to (h, w, C), how often a pixel like it is of each class


class _Set(NamedTuple):
    """What floors are fitted, chosen and scored on."""

    images: NucleiSet
    parts: dict[str, Pieces]
    role: str  # that is reported
    classes: list[int]  # that score
    protocol: SegmentationProtocol


def floors(images: NucleiSet, protocol: SegmentationProtocol | None = None) -> list[Segmented]:
    """Scored on the pieces that `segment.fit` reports, fitted on probe-train, chosen on validate by Dice.

    "one class everywhere": the class of highest Dice. "size and mpp alone", where they vary and there are two classes:
    one class everywhere too, that which images of such a size fare best with. "colour of a pixel": how often a colour,
    of a joint histogram of BINS a channel, is of each class. "texture around a pixel" and "colour + LBP around a
    pixel": logistic regressions on local binary patterns in a square of AROUND_PX, and on them with the pixel's colour
    and the square's mean and spread. Of the last three a pixel is background unless it is anything else more often
    than a threshold. Pixels of the ignored class teach nothing. Raises InputError for a role without images.
    """
    protocol = protocol or segment.protocol_of(images)
    role, parts = segment.parts(images, protocol)
    classes = [k for k in range(1, len(images.classes)) if images.classes[k] != images.ignored]
    data = _Set(images, parts, role, classes, protocol)
    taught = parts["probe-train"]
    return [
        *_constant(data),
        _by_pixel("colour of a pixel", _of_colour(taught, len(images.classes), classes), data),
        _by_pixel("texture around a pixel", _of_surroundings(texture, taught, len(images.classes), classes), data),
        _by_pixel("colour + LBP around a pixel", _of_surroundings(both, taught, len(images.classes), classes), data),
    ]


def texture(image: np.ndarray) -> np.ndarray:
    """(h, w, 30) histograms of uniform local binary patterns in the square around each pixel, as `descriptors.lbp`.

    image  (h, w, 3) uint8; its grey values, 8 points at radii of 1, 2 and 3 px, at its own scale
    """
    grey, found = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), []
    for radius in RADII_PX:
        codes = local_binary_pattern(grey, POINTS, radius, method="uniform")
        found += [_mean(codes == code) for code in range(POINTS + 2)]
    return np.stack(found, axis=-1)


def both(image: np.ndarray) -> np.ndarray:
    """(h, w, 39) the colour of each pixel, mean and spread of colour around it, and `texture`."""
    colour = image / np.float32(255)
    mean, square = _mean(colour), _mean(colour**2)
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    return np.concatenate([colour, mean, spread, texture(image)], axis=-1)


def _mean(values: np.ndarray) -> np.ndarray:
    """Of the square of AROUND_PX around each pixel, mirrored at the border."""
    return cv2.blur(values.astype(np.float32), (AROUND_PX, AROUND_PX))


def _constant(data: _Set) -> list[Segmented]:
    """One class everywhere, for all images and, where that can differ, by their size."""
    scores = {part: _scores(data, part) for part in ("probe-train", "validate")}
    with np.errstate(invalid="ignore"):
        best = int(np.nanmean(scores["validate"], axis=0).argmax())
    reported, held = data.parts[data.role], np.nanmean(scores["validate"][:, best])
    kind = np.full(len(reported.row), data.classes[best])
    guess = lambda pixels: np.full(pixels.shape[:3], data.classes[best], np.uint8)  # noqa: E731
    found = [_segmented("one class everywhere", _filled(kind, reported), held, data, guess)]
    table = data.images.table
    known = [name for name in SIZE if table[name].notna().all() and table[name].nunique() > 1]
    if known and len(data.classes) > 1:
        sizes = {part: np.log(table[known].to_numpy(float))[pieces.row] for part, pieces in data.parts.items()}
        there = ~np.isnan(scores["probe-train"][:, 0])
        model = make_pipeline(StandardScaler(), LinearRegression())
        model.fit(sizes["probe-train"][there], scores["probe-train"][there])
        chosen = {part: model.predict(sizes[part]).argmax(axis=1) for part in ("validate", data.role)}
        held = np.nanmean(np.take_along_axis(scores["validate"], chosen["validate"][:, None], axis=1))
        kind = np.array(data.classes)[chosen[data.role]]
        found.append(_segmented("size and mpp alone", _filled(kind, reported), held, data, None))
    return found


def _scores(data: _Set, part: str) -> np.ndarray:
    """(P, K) what every piece of a part scores with each class everywhere; nan without any class in it."""
    pieces = data.parts[part]
    each = [_filled(np.full(len(pieces.row), kind), pieces) for kind in data.classes]
    return np.stack([of_images(segment.by_class(one[None], pieces.masks, data.images)[0]) for one in each], axis=1)


def _filled(kind: np.ndarray, pieces: Pieces) -> np.ndarray:
    """(P, px, px) uint8 masks of one class each."""
    return np.broadcast_to(kind.astype(np.uint8)[:, None, None], pieces.masks.shape)


def _codes(pixels: np.ndarray) -> np.ndarray:
    """The colour of each pixel as an integer below BINS cubed."""
    bins = pixels.astype(np.int64) * BINS // 256
    return (bins[..., 0] * BINS + bins[..., 1]) * BINS + bins[..., 2]


def _of_colour(taught: Pieces, n: int, classes: list[int]) -> Shares:
    """Of n classes, from pixels of the same colour; all background where a colour was never seen."""
    known = np.isin(taught.masks, [0, *classes])
    pairs = _codes(taught.images)[known] * n + taught.masks[known]
    counts = np.bincount(pairs, minlength=BINS**3 * n).reshape(-1, n).astype(float)
    counts[counts.sum(axis=1) == 0, 0] = 1
    shares = counts / counts.sum(axis=1, keepdims=True)
    return lambda image: shares[_codes(image)]


def _of_surroundings(
    describe: Callable[[np.ndarray], np.ndarray], taught: Pieces, n: int, classes: list[int], seed: int = 0
) -> Shares:
    """Of n classes, by a logistic regression on what is around a pixel, classes weighted equally."""
    rng, x, y = np.random.default_rng(seed), [], []
    each = -(-SAMPLE // len(taught.masks))
    for image, mask in zip(taught.images, taught.masks, strict=True):
        known = np.flatnonzero(np.isin(mask, [0, *classes]))
        chosen = rng.choice(known, min(each, len(known)), replace=False)
        x.append(describe(image).reshape(mask.size, -1)[chosen])
        y.append(mask.ravel()[chosen])
    x, y = np.concatenate(x), np.concatenate(y)
    if len(np.unique(y)) < 2:  # nothing but background, or nothing but one class
        return lambda image: np.broadcast_to(np.eye(n)[y[0]], (*image.shape[:2], n))
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=200)).fit(x, y)

    def shares(image: np.ndarray) -> np.ndarray:
        found = np.zeros((image.shape[0] * image.shape[1], n))
        found[:, model.classes_] = model.predict_proba(describe(image).reshape(len(found), -1))
        return found.reshape(*image.shape[:2], n)

    return shares


def _by_pixel(name: str, shares: Shares, data: _Set) -> Segmented:
    """The likeliest class where any but background is likelier than the threshold of highest Dice on validate."""
    held, reported = data.parts["validate"], data.parts[data.role]
    likeliest, there = _called(shares, held.images, data.classes)
    guesses = (np.where(there > threshold, likeliest, 0)[None] for threshold in THRESHOLDS)
    scores = [np.nanmean(of_images(segment.by_class(guess, held.masks, data.images)[0])) for guess in guesses]
    threshold = THRESHOLDS[int(np.argmax(scores))]

    def guess(pixels: np.ndarray) -> np.ndarray:
        likeliest, there = _called(shares, pixels, data.classes)
        return np.where(there > threshold, likeliest, 0).astype(np.uint8)

    return _segmented(name, guess(reported.images), max(scores), data, guess)


def _called(shares: Shares, images: np.ndarray, classes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest of the classes, (P, px, px) uint8, and how often a pixel is of any class but background."""
    likeliest, there = np.empty(images.shape[:3], np.uint8), np.empty(images.shape[:3], np.float32)
    for row, image in enumerate(images):
        found = shares(image)
        likeliest[row] = np.array(classes)[found[..., classes].argmax(axis=-1)]
        there[row] = 1 - found[..., 0]
    return likeliest, there


def _segmented(name: str, answers: np.ndarray, held: float, data: _Set, guess: Callable | None) -> Segmented:
    """Answers (P, px, px) on the reported pieces, and Dice on validate, as a single run of what stops nowhere."""
    reported = data.parts[data.role]
    each, clean = (segment.by_class(answers[None], reported.masks, data.images, how) for how in (False, True))
    told = np.zeros(1, int), np.array([held]), data.protocol.window_px, guess
    return Segmented(name, data.images, reported, data.role, each, clean, *told)
