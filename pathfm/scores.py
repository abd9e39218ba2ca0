"""Scores with intervals: bootstrap over patients, crossed with pretraining seeds; differences and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from pathfm.benchmarks import patient_column, patients
from pathfm.errors import InputError

RESAMPLES = 2000
MARGIN = 0.02  # two scores closer than this are equal for our purposes; stated beforehand
MIN_PATIENTS = 20  # under this a score is not informative
MAX_WIDTH = 0.10  # an interval wider than this is not informative
RESAMPLED = {"patient_id": "by patient", "slide_id": "by slide", None: "by image (too narrow)"}


@dataclass(frozen=True)
class Prediction:
    """What one probe said about the test tiles.

    table     the test tiles' rows, with columns truth and predicted; `right` too where a probe was fitted repeatedly
    seed      of the pretraining behind the features; predictions that differ in it alone are one row
    settings  of the probe: C, k, the validation score that chose them
    """

    name: str
    probe: str
    table: pd.DataFrame
    seed: int = 0
    settings: dict = field(default_factory=dict)
    floor: bool = False
    leaky: bool = False
    mpp: float | None = None  # effective, of what the model saw
    quarantined: int = 0

    @property
    def hits(self) -> np.ndarray:
        """(n,) 1 where right, else 0; of a probe fitted several times the share of its fits, from a column `right`."""
        if "right" in self.table:
            return self.table["right"].to_numpy(float)
        return (self.table["truth"].to_numpy(str) == self.table["predicted"].to_numpy(str)).astype(float)

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the classes of their mean `hits`: of several fits it is the mean of their balanced accuracies."""
        return float(pd.Series(self.hits).groupby(self.table["truth"].to_numpy(str)).mean().mean())


def of_centres(predictions: Iterable[Prediction], centres: Iterable[str]) -> list[Prediction]:
    """The same predictions on the tiles of some centres alone. Raises InputError where there are none."""
    wanted, kept = sorted(map(str, centres)), []
    for one in predictions:
        there = (
            one.table["centre"].astype(str).isin(wanted) if "centre" in one.table else np.zeros(len(one.table), bool)
        )
        if not there.any():
            raise InputError(f"{one.name}: no test tile comes from centre {', '.join(wanted) or '(none given)'}")
        kept.append(replace(one, table=one.table[there]))
    return kept


def by_fold(answer: Prediction) -> pd.Series:
    """Balanced accuracy of each fold of `probe.cross_validate`, by who was left out."""
    folds = answer.table.groupby("fold")
    return pd.Series({name: replace(answer, table=rows).balanced_accuracy for name, rows in folds})


class Interval(NamedTuple):
    """An estimate and the 2.5 % and 97.5 % points of its bootstrap."""

    value: float
    low: float
    high: float


def interval(predictions: Prediction | Sequence[Prediction], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Balanced accuracy, mean over pretraining seeds, 0 to 1.

    Patients are drawn with replacement (slides or images where a patient is not known), and seeds too.
    A class that a draw misses is left out of that draw's mean.
    """
    runs = as_runs(predictions)
    weights, seeds = _draws(runs, resamples, seed)
    drawn = _drawn_means(runs, weights, seeds)
    return Interval(_mean_score(runs), *_quantiles(drawn))


class Difference(NamedTuple):
    """How much the first is better than the second, in balanced accuracy, and what that allows to say."""

    value: float
    low: float
    high: float
    n_patients: int | None  # None where only images are known
    verdict: str

    def __str__(self) -> str:
        """As "+0.26 [+0.21, +0.31], better"."""
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}], {self.verdict}"


def paired(
    a: Prediction | Sequence[Prediction],
    b: Prediction | Sequence[Prediction],
    margin: float = MARGIN,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """a minus b on the same test tiles: every bootstrap draw takes the same patients for both.

    Pretraining seeds are drawn jointly where both have the same ones. Raises InputError where the test tiles
    differ.
    """
    a, b = as_runs(a), as_runs(b)
    same_tiles(a[0], b[0])
    weights, seeds_a = _draws(a, resamples, seed)
    same_seeds = [run.seed for run in a] == [run.seed for run in b]
    seeds_b = seeds_a if same_seeds else _draws(b, resamples, seed + 1)[1]
    drawn = _drawn_means(a, weights, seeds_a) - _drawn_means(b, weights, seeds_b)
    low, high = _quantiles(drawn)
    n = n_patients(a[0].table)
    return Difference(_mean_score(a) - _mean_score(b), low, high, n, verdict(low, high, n, margin))


def share_closed(
    teacher: Prediction | Sequence[Prediction],
    start: Prediction | Sequence[Prediction],
    oracle: Prediction,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """How much of the way from `start` to `oracle` the teacher goes: 0 none, 1 all of it, below 0 backwards.

    Patients, and the pretraining seeds that teacher and start share, are drawn as in `paired`.
    """
    teacher, start, top = as_runs(teacher), as_runs(start), as_runs(oracle)
    for other in (start, top):
        same_tiles(teacher[0], other[0])
    weights, seeds = _draws(teacher, resamples, seed)
    low = _drawn_means(start, weights, seeds if len(start) == len(teacher) else _draws(start, resamples, seed + 1)[1])
    way = _drawn_means(top, weights, np.ones((resamples, 1))) - low
    drawn = (_drawn_means(teacher, weights, seeds) - low) / way
    value = (_mean_score(teacher) - _mean_score(start)) / (_mean_score(top) - _mean_score(start))
    return Interval(value, *_quantiles(drawn))


def contrasts(by_features: dict[str, list[Prediction]], against: Sequence[str]) -> pd.DataFrame:
    """A row a paired difference of "teacher" minus each of `against`, and one for its share of the way to "oracle".

    by_features   name -> answers, one a pretraining seed; "random weights" is where the way begins
    """
    teacher = by_features["teacher"]
    rows = [{"contrast": f"teacher minus {one}", **paired(teacher, by_features[one])._asdict()} for one in against]
    share = share_closed(teacher, by_features["random weights"], by_features["oracle"][0])
    rows.append({"contrast": "share of the way from random weights to oracle", **share._asdict()})
    return pd.DataFrame(rows).convert_dtypes()


def verdict(low: float, high: float, n: int | None, margin: float = MARGIN) -> str:
    """What an interval of a difference allows: the first of these that holds.

    "not informative"  fewer than 20 test patients, or wider than 10 points
    "better", "worse"  clear of 0
    "equal"            inside +-margin
    "undecided"
    """
    if not informative(low, high, n):
        return "not informative"
    if low > 0 or high < 0:
        return "better" if low > 0 else "worse"
    return "equal" if -margin <= low and high <= margin else "undecided"


def informative(low: float, high: float, n: int | None) -> bool:
    """At least 20 patients (where they are known) and an interval of at most 10 points."""
    return (n is None or n >= MIN_PATIENTS) and high - low <= MAX_WIDTH


def scores(
    predictions: Iterable[Prediction],
    seen: Iterable[str] = (),
    margin: float = MARGIN,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per features and probe: score, interval, sizes, gain over the best floor, verdict.

    predictions  on one test set; those of the same name and probe are pretraining seeds of one row
    seen         patients, or slides, of the pretraining; a row that is tested on them is `transductive`

    balanced_accuracy, low, high and the gain are 0 to 1. `interval` says what was resampled: intervals by
    image are too narrow, for images of one patient resemble each other. `n_classes` are those on test, and
    `n_quarantined` the images of the whole set that could not be read. `mpp` is the effective one.
    The gain, and the verdict on it, is over the floor that scores highest on test, the strictest choice.
    Without floors the verdict is "" or "not informative", and scores of a leaking split say that instead.
    """
    groups: dict[tuple[str, str], list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault((prediction.name, prediction.probe), []).append(prediction)
    if not groups:
        raise InputError("no predictions to score")
    floors = [runs for runs in groups.values() if runs[0].floor]
    best = max(floors, key=_mean_score, default=None)
    seen = {str(one) for one in seen}
    rows = [_row(runs, best, seen, margin, resamples, seed) for runs in groups.values()]
    return pd.DataFrame(rows).astype({"n_patients": "Int64"})


def _row(runs: list[Prediction], best, seen: set[str], margin: float, resamples: int, seed: int) -> dict:
    first, score = runs[0], interval(runs, resamples, seed)
    n = n_patients(first.table)
    row = {
        "features": first.name,
        "probe": first.probe,
        "floor": first.floor,
        "seeds": len(runs),
        "balanced_accuracy": score.value,
        "low": score.low,
        "high": score.high,
        "interval": RESAMPLED[patient_column(first.table)],
        "n_classes": first.table["truth"].nunique(),
        "n_tiles": len(first.table),
        "n_patients": pd.NA if n is None else n,
        "n_quarantined": first.quarantined,
        "mpp": first.mpp,
        "transductive": not first.floor and bool(seen & _tissue(first.table)),
        "gain": np.nan,
        "gain_low": np.nan,
        "gain_high": np.nan,
        "verdict": "" if informative(score.low, score.high, n) else "not informative",
    }
    if best is not None and not first.floor:
        gain = paired(runs, best, margin, resamples, seed)
        row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
        row["verdict"] = gain.verdict
    if first.leaky:
        row["verdict"] = "leaks patients"
    return row


def _tissue(table: pd.DataFrame) -> set[str]:
    return {str(one) for column in ("patient_id", "slide_id") if column in table for one in table[column]}


def n_patients(table: pd.DataFrame) -> int | None:
    """Patients behind the rows (slides where only those are known), or None."""
    who = patients(table)
    return None if who is None else len(set(who))


def as_runs(predictions: Prediction | Sequence[Prediction]) -> list[Prediction]:
    """One prediction or several as a list. Raises InputError where seeds repeat or test tiles differ."""
    runs = [predictions] if isinstance(predictions, Prediction) else list(predictions)
    if not runs:
        raise InputError("no predictions to score")
    if len({run.seed for run in runs}) < len(runs):
        raise InputError(f"{runs[0].name} ({runs[0].probe}) has two predictions of one seed; give each its own")
    for run in runs[1:]:
        same_tiles(runs[0], run)
    return runs


def same_tiles(a: Prediction, b: Prediction) -> None:
    """Raises InputError unless both answered the same tiles, in one order."""
    same = len(a.table) == len(b.table) and all(
        np.array_equal(a.table[column], b.table[column]) for column in ("file", "truth")
    )
    if not same:
        raise InputError(f"{a.name} and {b.name} were tested on different tiles; probe both on one TileSet")


def counts(runs: list[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """Tiles (P, C) and right ones (S, P, C) of each patient and class."""
    table = runs[0].table
    who = patients(table)
    patient = np.arange(len(table)) if who is None else np.unique(who, return_inverse=True)[1]
    classes, truth = np.unique(table["truth"].to_numpy(str), return_inverse=True)
    n = np.zeros((patient.max() + 1, len(classes)))
    np.add.at(n, (patient, truth), 1)
    right = np.zeros((len(runs), *n.shape))
    for index, run in enumerate(runs):
        np.add.at(right[index], (patient, truth), run.hits)
    return n, right


def _draws(runs: list[Prediction], resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each patient (R, P) and each seed (R, S) is drawn."""
    rng = np.random.default_rng(seed)
    people = len(counts(runs)[0])
    weights = rng.multinomial(people, np.full(people, 1 / people), size=resamples)
    seeds = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=resamples)
    return weights.astype(float), seeds / len(runs)


def _drawn_means(runs: list[Prediction], weights: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """(R,) balanced accuracy of each draw, mean over its seeds."""
    n, right = counts(runs)
    drawn = weights @ n
    with np.errstate(invalid="ignore"):
        recall = np.where(drawn > 0, np.einsum("rp,spc->src", weights, right, optimize=True) / drawn, np.nan)
    return np.einsum("rs,sr->r", seeds, np.nanmean(recall, axis=2))


def _mean_score(runs: list[Prediction]) -> float:
    return float(np.mean([run.balanced_accuracy for run in runs]))


def _quantiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
