"""Areas under ROC curves of slides: intervals by patient, and differences on the same slides, corrected for number."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from pathfm.comparisons import FLIPS, corrected, flipped
from pathfm.errors import InputError
from pathfm.scores import MARGIN, RESAMPLES, Difference, verdict

MIN_EACH = 10  # test patients of either class; an area of fewer is not shown


class AUC(NamedTuple):
    """Mean over runs, with the interval of its bootstrap by patient; nan, and why, where it is not shown."""

    value: float
    low: float
    high: float
    spread: float  # standard deviation over runs: noise of the optimiser, no part of the interval
    n_patients: tuple[int, int]  # of the first and the last class
    reason: str


def auc(truth: np.ndarray, score: np.ndarray, patient: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> AUC:
    """Area under the ROC curve, 0 to 1; every bootstrap draw takes the same patients for all runs.

    truth (S,) bool; score (R, S), higher for True; patient (S,) whose slides are drawn together

    Not shown with fewer than 10 patients of either class. A draw without one of the classes is left out.
    """
    truth, who = np.asarray(truth, bool), np.unique(patient, return_inverse=True)[1]
    n, reason = _enough(truth, who)
    if reason:
        return AUC(*[np.nan] * 4, n, reason)
    won = _won(truth, np.atleast_2d(score))
    each = won.mean(axis=(1, 2))
    low, high = np.quantile(_drawn(won.mean(axis=0), truth, who, resamples, seed), [0.025, 0.975])
    return AUC(each.mean(), low, high, each.std(ddof=1) if len(each) > 1 else np.nan, n, "")


def paired(
    truth: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    patient: np.ndarray,
    margin: float = MARGIN,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The area of a minus that of b on the same slides: every bootstrap draw takes the same patients for both.

    a, b  (R, S) and (Q, S) scores of their runs; the rest as in `auc`

    nan, and "not informative", with fewer than 10 patients of either class.
    """
    truth, who = np.asarray(truth, bool), np.unique(patient, return_inverse=True)[1]
    n, reason = _enough(truth, who)
    if reason:
        return Difference(*[np.nan] * 3, sum(n), "not informative")
    won = [_won(truth, np.atleast_2d(score)).mean(axis=0) for score in (a, b)]
    low, high = np.quantile(_drawn(won[0] - won[1], truth, who, resamples, seed), [0.025, 0.975])
    people = int(who.max() + 1)
    return Difference(
        float((won[0] - won[1]).mean()), float(low), float(high), people, verdict(low, high, people, margin)
    )


def exchanged(truth: np.ndarray, a, b, patient: np.ndarray, flips: int = FLIPS, seed: int = 0) -> float:
    """p-value, two-sided, that a and b have one area: the ranks of both exchanged patient by patient.

    As `comparisons.sign_flip` of balanced accuracy. Scores are replaced by their ranks within a run, so that those of
    one model stand beside the other's. The difference of areas under an exchange is a sum over slides of a term that
    changes its sign with them: half of what a slide's pairs differ by where both slides stay, and half of what
    they differ by where one of them moves. nan with fewer than 10 patients of either class.

    Bandos, Rockette and Gur, Statistics in Medicine 2005.
    """
    truth, who = np.asarray(truth, bool), np.unique(patient, return_inverse=True)[1]
    if _enough(truth, who)[1]:
        return np.nan
    a, b = (rankdata(np.atleast_2d(score), axis=1) for score in (a, b))
    stay = _won(truth, a).mean(axis=0) - _won(truth, b).mean(axis=0)
    move = _between(truth, a, b) - _between(truth, b, a)
    term = np.empty(len(truth))
    term[truth], term[~truth] = (stay + move).sum(axis=1) / 2, (stay - move).sum(axis=0) / 2
    return flipped(np.bincount(who, term / stay.size), flips, seed)


def pairwise(truth: np.ndarray, models: Mapping[str, np.ndarray], patient: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Every pair of models on the same slides, as `comparisons.pairwise`: differences of areas, p by `exchanged`.

    models  name -> (R, S) scores of its runs
    """
    if len(models) < 2:
        raise InputError(f"{len(models)} model(s) make no pair; give two or more")
    rows = [
        {
            "a": a,
            "b": b,
            **paired(truth, models[a], models[b], patient, seed=seed)._asdict(),
            "p": exchanged(truth, models[a], models[b], patient, seed=seed),
        }
        for a, b in itertools.combinations(models, 2)
    ]
    return corrected(rows)


def _enough(truth: np.ndarray, who: np.ndarray) -> tuple[tuple[int, int], str]:
    """Patients of either class, and why an area of them is not shown ("" where it is)."""
    n = len(np.unique(who[~truth])), len(np.unique(who[truth]))
    return n, f"{n[0]} + {n[1]} test patients, fewer than {MIN_EACH} of a class" if min(n) < MIN_EACH else ""


def _won(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """(R, positives, negatives) 1 where the positive scores higher, a half where both are equal."""
    gap = score[:, truth, None] - score[:, None, ~truth]
    return (gap > 0) + 0.5 * (gap == 0)


def _between(truth: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(positives, negatives) how often a's positive ranks above b's negative, mean over the runs of both."""
    gap = a[:, None, truth, None] - b[None, :, None, ~truth]
    return ((gap > 0) + 0.5 * (gap == 0)).mean(axis=(0, 1))


def _drawn(won: np.ndarray, truth: np.ndarray, who: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Mean of `won` (positives, negatives) over the pairs of each draw of patients; draws without a pair left out."""
    people = who.max() + 1
    drawn = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), resamples)
    yes, no = drawn[:, who[truth]], drawn[:, who[~truth]]
    pairs = yes.sum(axis=1) * no.sum(axis=1)
    kept = pairs > 0
    return np.einsum("bp,pn,bn->b", yes[kept], won, no[kept], optimize=True) / pairs[kept]
