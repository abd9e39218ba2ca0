"""Many models at once: which differ when every pair is asked, and how they rank over several tasks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from pathfm.errors import InputError
from pathfm.scores import MARGIN, RESAMPLES, Prediction, as_runs, counts, paired, same_tiles

ALPHA = 0.05
FLIPS = 20_000  # sign patterns drawn where there are too many to try them all


def holm(p: Sequence[float]) -> np.ndarray:
    """(n,) p-values corrected for being the answers to n questions, by Holm's step-down method (1979).

    The smallest is multiplied by n, the next by n - 1, ...; none is below one that was smaller before. It holds the
    chance of any false finding at the level, whatever the tests' dependence.
    """
    p = np.asarray(p, float)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"p-values lie between 0 and 1, not {p.min():g} to {p.max():g}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def sign_flip(
    a: Prediction | Sequence[Prediction], b: Prediction | Sequence[Prediction], flips: int = FLIPS, seed: int = 0
) -> float:
    """p-value, two-sided, that a and b are equally good: the answers of both exchanged patient by patient.

    Under equality either could have given a patient's answers. The difference of balanced accuracies is a sum over
    patients, so that exchanging a patient's answers flips its sign: all 2^P patterns where that is at most `flips`,
    else as many drawn by `seed`, with the pattern that was seen among them. Answers of several pretraining seeds are
    averaged: the test is of the models that were trained, and the spread over seeds is in the interval of `paired`.
    """
    a, b = as_runs(a), as_runs(b)
    same_tiles(a[0], b[0])
    n, right_a = counts(a)
    return flipped(((right_a.mean(axis=0) - counts(b)[1].mean(axis=0)) / n.sum(axis=0)).mean(axis=1), flips, seed)


def flipped(gain: np.ndarray, flips: int = FLIPS, seed: int = 0) -> float:
    """The share of sign patterns under which the sum of `gain`, a number a patient, is as far from 0 as it is."""
    gain = gain[gain != 0]
    if not len(gain):
        return 1.0
    if 2 ** min(len(gain), 60) <= flips:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(gain))))
        return float(np.mean(_extreme(signs, gain)))
    signs = np.random.default_rng(seed).choice((-1, 1), size=(flips, len(gain)))
    return float((_extreme(signs, gain).sum() + 1) / (flips + 1))


def _extreme(signs: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return np.abs(signs @ gain) >= abs(gain.sum()) - 1e-12


def pairwise(
    models: Mapping[str, Prediction | Sequence[Prediction]],
    margin: float = MARGIN,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Every pair of models on the same test tiles, a row each: difference, interval, p, p corrected, verdict.

    models  name -> a Prediction, or one a pretraining seed

    low and high are of `paired`, one question at a time. p is `sign_flip`'s and p_holm corrects it for the number of
    pairs; "better" and "worse" stand only where p_holm is at most 0.05 too, else the pair is "undecided".
    """
    if len(models) < 2:
        raise InputError(f"{len(models)} model(s) make no pair; give two or more")
    rows = []
    for a, b in itertools.combinations(models, 2):
        found = paired(models[a], models[b], margin, resamples, seed)
        rows.append({"a": a, "b": b, **found._asdict(), "p": sign_flip(models[a], models[b], seed=seed)})
    return corrected(rows)


def corrected(rows: Sequence[dict]) -> pd.DataFrame:
    """Pairs a, b, a Difference and p, as `pairwise` gives them; a pair without p has no share in the correction."""
    table = pd.DataFrame(rows).rename(columns={"value": "difference"})
    table.insert(table.columns.get_loc("p") + 1, "p_holm", np.nan)
    known = table["p"].notna()
    table.loc[known, "p_holm"] = holm(table.loc[known, "p"])
    unsure = table["verdict"].isin(["better", "worse"]) & (table["p_holm"] > ALPHA)
    table.loc[unsure, "verdict"] = "undecided"
    return table.astype({"n_patients": "Int64"})


class Ranks(NamedTuple):
    """Mean ranks of models over tasks, 1 the best."""

    table: pd.DataFrame  # model (index), mean_rank, low, high, best first
    critical_difference: float  # mean ranks nearer than this are not told apart, Nemenyi at 5 %
    p: float  # of Friedman's test that no model is better than another
    n_tasks: int
    left_out: tuple[str, ...]  # tasks that some model has no score of


def mean_ranks(wide: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> Ranks:
    """Ranks of models (rows) within each task (columns) of `wide`, a table of scores where more is better.

    Ties share their ranks. low and high are a bootstrap over tasks; the critical difference is that of Demšar, JMLR
    2006: q / sqrt(2) x sqrt(k (k + 1) / 6 n) for k models and n tasks, q of the studentised range. Tasks count as
    independent, which they hardly are where they share patients. Raises InputError under two models or two tasks.
    """
    whole = wide.dropna(axis=1)
    left_out = tuple(str(name) for name in wide.columns.difference(whole.columns, sort=False))
    k, n = whole.shape
    if k < 2 or n < 2:
        raise InputError(
            f"ranks need two models and two tasks that all of them have scores of, not {k} and {n}"
            + (f"; {', '.join(left_out)} lack some" if left_out else "")
        )
    ranks = whole.rank(ascending=False).to_numpy()
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    low, high = np.quantile(ranks[:, drawn].mean(axis=2), [0.025, 0.975], axis=1)
    table = pd.DataFrame({"mean_rank": ranks.mean(axis=1), "low": low, "high": high}, index=whole.index)
    q = stats.studentized_range.ppf(1 - ALPHA, k, np.inf)
    return Ranks(
        table.sort_values("mean_rank", kind="stable"),
        float(q / np.sqrt(2) * np.sqrt(k * (k + 1) / (6 * n))),
        _friedman(ranks),
        n,
        left_out,
    )


def _friedman(ranks: np.ndarray) -> float:
    """p-value of Friedman's test; of two models, where it does not exist, that of the sign test; 1 where all tie."""
    if len(ranks) > 2:
        p = float(stats.friedmanchisquare(*ranks).pvalue)
        return 1.0 if np.isnan(p) else p
    differ = ranks[0][ranks[0] != ranks[1]] < 1.5
    return float(stats.binomtest(int(differ.sum()), len(differ)).pvalue) if len(differ) else 1.0
