"""What features are like without a probe: spectrum, redundancy, and what they say about slide and centre."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from pathfm.errors import InputError
from pathfm.neighbours import nearest, vote
from pathfm.rows import Rows

EPSILON = 1e-7  # added to each share of the spectrum, Garrido et al. 2022
CONSTANT = 1e-6  # spread below this share of the largest value is rounding, not a feature


def balanced_accuracy(truth, predicted) -> float:
    """Mean over the classes in `truth` of the share of that class predicted right, 0 to 1."""
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if len(truth) != len(predicted) or not len(truth):
        raise InputError(f"{len(truth)} true labels but {len(predicted)} predicted ones")
    return float(np.mean([np.mean(predicted[truth == label] == label) for label in np.unique(truth)]))


class RankMe(NamedTuple):
    """An effective rank, with the size of the matrix that it depends on."""

    value: float
    n: int
    d: int

    def __float__(self) -> float:
        return self.value

    @property
    def share(self) -> float:
        """RankMe / D, 0 to 1."""
        return self.value / self.d


def rankme(z: np.ndarray) -> RankMe:
    """exp of the entropy of the singular values of raw features z (N, D): between 1 and min(N, D).

    Neither centred nor normalised. Comparable only within one method and one N; take N >= 10 D.
    Garrido et al. 2022, eq. 1. Raises InputError where a feature is not finite.
    """
    z = finite(z)
    sigma = np.linalg.svd(z, compute_uv=False).astype(np.float64)
    share = sigma / max(sigma.sum(), np.finfo(np.float64).tiny) + EPSILON
    return RankMe(float(np.exp(-(share * np.log(share)).sum())), *z.shape)


class ODCorr(NamedTuple):
    """Off-diagonal correlation of features, with what it must be read against."""

    value: float  # mean |r| over pairs of features; nan with fewer than two that vary
    floor: float  # expected value for independent Gaussian features, sqrt(2 / (pi N))
    constants: int  # features left out because they do not vary
    mean_r2: float  # mean r^2 over the same pairs
    tiles: float  # mean |r| over pairs of tiles, across the features
    tiles_floor: float  # sqrt(2 / (pi D))
    n: int
    d: int

    def __float__(self) -> float:
        return self.value


def odcorr(z: np.ndarray) -> ODCorr:
    """Mean absolute Pearson correlation between features of z (N, D), 0 to 1; lower is less redundant.

    Our definition: Kaiko 2024 reports an ODCorr whose formula is not published.
    Raises InputError where a feature is not finite.
    """
    z = finite(z)
    n, d = z.shape
    features, constants = _standard(z)
    tiles, _ = _standard(z.T)
    value, mean_r2 = _off_diagonal(features)
    return ODCorr(
        value=value,
        floor=math.sqrt(2 / (math.pi * n)),
        constants=constants,
        mean_r2=mean_r2,
        tiles=_off_diagonal(tiles)[0],
        tiles_floor=math.sqrt(2 / (math.pi * d)),
        n=n,
        d=d,
    )


def finite(z: np.ndarray) -> np.ndarray:
    """z as a float32 (N, D) matrix. Raises InputError where it is not one, or holds NaN or infinity."""
    z = np.asarray(z, dtype=np.float32)
    Rows(z).finite()
    return z


def _standard(z: np.ndarray) -> tuple[np.ndarray, int]:
    """The varying columns of z, centred and of length 1, and the number of constant ones left out."""
    centred = z - z.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(centred, axis=0)
    varies = length > CONSTANT * np.abs(z).max(axis=0) * math.sqrt(len(z))
    return (centred[:, varies] / length[varies]).astype(np.float32), int((~varies).sum())


def _off_diagonal(columns: np.ndarray, block: int = 1024) -> tuple[float, float]:
    """Mean |r| and mean r^2 over pairs i != j of standard columns (N, D), block by block."""
    d = columns.shape[1]
    if d < 2:
        return math.nan, math.nan
    absolute = squared = 0.0
    for i in range(0, d, block):
        for j in range(i, d, block):
            r = columns[:, i : i + block].T @ columns[:, j : j + block]
            if i == j:
                np.fill_diagonal(r, 0)
            twice = 1 if i == j else 2
            absolute += twice * np.abs(r).sum(dtype=np.float64)
            squared += twice * np.square(r).sum(dtype=np.float64)
    pairs = d * (d - 1)
    return float(absolute / pairs), float(squared / pairs)


def robustness_index(
    x: np.ndarray,
    label,
    centre,
    patient=None,
    k: tuple[int, ...] = (1, 2, 5, 10, 20, 50),
    seed: int = 0,
) -> pd.DataFrame:
    """Columns k, robustness_index, so, os, n: does biology or the centre decide who is near whom?

    #SO / (#SO + #OS) over the k nearest neighbours by cosine of every tile: S same, O other; class, then
    centre. 1 is robust, 0 follows the centre. Neighbours of the same patient are left out. Every class is
    drawn equally often from every centre (by `seed`), from the centres that hold all classes. The value is
    NaN, and the column `reason` says why, where two such centres or k such neighbours do not exist.
    PathoROB, arXiv 2507.17845.
    """
    x, label, centre = finite(x), np.asarray(label), np.asarray(centre)
    patient = np.arange(len(x)) if patient is None else np.asarray(patient)
    table = pd.DataFrame({"k": list(k), "robustness_index": np.nan, "so": 0, "os": 0, "n": 0, "reason": ""})
    rows, reason = _balanced_rows(label, centre, seed)
    if reason:
        return table.assign(reason=reason)
    so, os = so_os(x[rows], label[rows], centre[rows], patient[rows], max(k))
    table["n"] = len(rows)
    for row, neighbours in enumerate(k):
        if neighbours > len(so):
            table.loc[row, "reason"] = f"a tile has only {len(so)} neighbours of other patients"
            continue
        s, o = int(so[neighbours - 1]), int(os[neighbours - 1])
        table.loc[row, ["so", "os"]] = s, o
        table.loc[row, "robustness_index"] = s / (s + o) if s + o else np.nan
    return table


def so_os(x: np.ndarray, label, centre, group, k: int) -> tuple[np.ndarray, np.ndarray]:
    """How many neighbours up to the 1st, 2nd, ... k-th are of the same class and another centre, and the reverse.

    Two arrays (k,), summed over all rows; neighbours by cosine, those of the row's own group (patient, slide) left
    out. Shorter than k where some row has fewer neighbours.
    """
    so, os = so_os_each(x, label, centre, group, k)
    return np.cumsum(so.sum(axis=0)), np.cumsum(os.sum(axis=0))


def so_os_each(x: np.ndarray, label, centre, group, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`so_os` of each row and neighbour, not summed: two boolean arrays (N, k)."""
    label, centre = np.asarray(label), np.asarray(centre)
    ids, _ = nearest(x, k=k, bank_group=np.unique(np.asarray(group), return_inverse=True)[1])
    ids = ids[:, : int((ids >= 0).sum(axis=1).min())]
    same_class, same_centre = label[ids] == label[:, None], centre[ids] == centre[:, None]
    return same_class & ~same_centre, ~same_class & same_centre


def _balanced_rows(label: np.ndarray, centre: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Rows with every class equally often in every centre that holds all classes, or why there are none."""
    count = pd.crosstab(pd.Series(label, name="label"), pd.Series(centre, name="centre"))
    alone = count.index[(count > 0).sum(axis=1) < 2]
    if len(alone):
        return np.array([], int), f"class {alone[0]} has one centre"
    count = count.loc[:, (count > 0).all(axis=0)]
    if count.shape[1] < 2:
        return np.array([], int), "fewer than two centres hold every class"
    rng = np.random.default_rng(seed)
    cells = [np.flatnonzero((label == a) & (centre == b)) for a in count.index for b in count.columns]
    each = min(map(len, cells))
    return np.sort(np.concatenate([rng.choice(cell, each, replace=False) for cell in cells])), ""


class SlideDependence(NamedTuple):
    """How much the neighbours of a tile depend on its slide. All are balanced accuracies, 0 to 1."""

    identity: float  # of naming the slide
    identity_chance: float  # 1 / slides
    with_slide: float  # of naming the class, tiles of the same slide among the neighbours
    without_slide: float  # the same without them
    n: int  # tiles used, at least `apart_um` from each other within a slide

    @property
    def dependence(self) -> float:
        """What the class score gains from tiles of the same slide."""
        return self.with_slide - self.without_slide


def slide_dependence(
    x: np.ndarray, label, slide_id, xy_um: np.ndarray | None = None, k: int = 5, apart_um: float = 500
) -> SlideDependence:
    """kNN leaving one tile out: accuracy of the slide, and of the class with and without its own slide.

    xy_um  (N, 2) positions in um; tiles nearer than `apart_um` to an earlier one of their slide are left
           out, so that neighbouring tissue does not count as slide identity. None takes every tile.
    k is small because a slide has few tiles that far apart.
    """
    x, label, slide_id = finite(x), np.asarray(label), np.asarray(slide_id)
    if xy_um is not None:
        rows = _apart(slide_id, np.asarray(xy_um, float), apart_um)
        x, label, slide_id = x[rows], label[rows], slide_id[rows]
    slides, slide = np.unique(slide_id, return_inverse=True)
    if len(slides) < 2:
        raise InputError(f"slide dependence needs tiles of at least two slides, not of {len(slides)}")
    classes, code = np.unique(label, return_inverse=True)
    ids, cosines = nearest(x, k=k)
    other_ids, other_cosines = nearest(x, k=k, bank_group=slide)
    return SlideDependence(
        identity=balanced_accuracy(slide, vote(ids, cosines, slide)),
        identity_chance=1 / len(slides),
        with_slide=balanced_accuracy(code, vote(ids, cosines, code)),
        without_slide=balanced_accuracy(code, vote(other_ids, other_cosines, code)),
        n=len(x),
    )


def _apart(slide_id: np.ndarray, xy_um: np.ndarray, apart_um: float) -> np.ndarray:
    """Rows kept in order when a tile near an earlier kept one of its slide is left out."""
    kept: dict = {}
    for row, (slide, xy) in enumerate(zip(slide_id, xy_um, strict=True)):
        near = kept.setdefault(slide, [])
        if all(np.hypot(*(xy - xy_um[other])) >= apart_um for other in near):
            near.append(row)
    return np.sort(np.concatenate([np.array(rows) for rows in kept.values()]))


class CentreIdentity(NamedTuple):
    """Balanced accuracy of naming the centre from other patients' tiles, and its chance level."""

    value: float
    chance: float
    n: int

    def __float__(self) -> float:
        return self.value


def centre_identity(x: np.ndarray, centre, patient, k: int = 20) -> CentreIdentity:
    """kNN accuracy of the centre, neighbours of the same patient left out. A robust backbone is near chance."""
    x = finite(x)
    centres, code = np.unique(np.asarray(centre), return_inverse=True)
    if len(centres) < 2:
        raise InputError(f"centre identity needs at least two centres, not {len(centres)}")
    ids, cosines = nearest(x, k=k, bank_group=np.unique(np.asarray(patient), return_inverse=True)[1])
    return CentreIdentity(balanced_accuracy(code, vote(ids, cosines, code)), 1 / len(centres), len(x))
