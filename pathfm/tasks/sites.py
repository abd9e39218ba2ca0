"""Splits of slide labels that keep a patient and its hospital on one side, and what the hospital alone predicts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd

from pathfm.errors import InputError
from pathfm.metrics import balanced_accuracy

BARCODE = re.compile(r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})(?:-.*)?")
FLOORS = {"cancer type": ("cancer_type",), "site": ("site",), "cancer type and site": ("cancer_type", "site")}
PRIOR = 5.0  # patients' worth of the overall rate that a group's own rate is mixed with; ours
MIN_TEST = 10  # patients of either class under which no AUC is given


def barcode(slide_id: str) -> tuple[str, str]:
    """Patient and tissue source site of a TCGA barcode: TCGA-AA-3488-01Z-00-DX1 -> TCGA-AA-3488, AA."""
    found = BARCODE.fullmatch(slide_id.split(".")[0])
    if not found:
        raise InputError(f"'{slide_id}' is no TCGA barcode such as TCGA-AA-3488-01Z-00-DX1; give patient_id and site")
    return found[1], found[2]


def folds(table: pd.DataFrame, n: int = 5, by: str = "site", seed: int = 0) -> Iterator[tuple[int, pd.DataFrame]]:
    """(fold, table with column role): each fold tests once, the next one validates, the rest trains.

    by   "site": within each cancer type whole sites, so that no test patient's hospital was trained on (Howard et
         al. 2021 motivate it; the assignment, greedy in the classes' balance, is ours); "patient": whole patients

    A cancer type with fewer sites (or patients) than folds is absent from the test of some. Raises InputError
    where a patient has two sites.
    """
    if by not in ("site", "patient"):
        raise InputError(f"cannot fold by '{by}'; give site or patient")
    if n < 3:
        raise InputError(f"{n} folds leave nothing to train, validate or test on; give 3 or more")
    crossing = table.groupby("patient_id")["site"].nunique()
    if (crossing > 1).any():
        raise InputError(f"patient {crossing.index[crossing > 1][0]} has two sites; correct the column site")
    units = table["site"] + "\0" + table["cancer_type"] if by == "site" else table["patient_id"]
    fold = pd.Series(0, index=table.index)
    for number, (_, rows) in enumerate(table.groupby("cancer_type")):
        fold[rows.index] = _deal(units[rows.index], rows["label"], n, np.random.default_rng([seed, number]))
    if by == "site":  # a hospital with several cancer types goes where most of its slides went
        fold = fold.groupby(table["site"]).transform(lambda f: f.mode()[0])
    if fold.nunique() < n:
        raise InputError(
            f"{table[by if by == 'site' else 'patient_id'].nunique()} {by}s do not fill {n} folds; take fewer"
        )
    for test in range(n):
        role = np.select([fold == test, fold == (test + 1) % n], ["test", "validate"], "probe-train")
        yield test, table.assign(role=role)


def floors(table: pd.DataFrame, n: int = 5, seed: int = 0) -> pd.DataFrame:
    """What cancer type alone, site alone and both predict of a label of two classes, in folds by site and by patient.

    Columns floor, folds, auc, balanced_accuracy, n_test (slides). The rate of the second class among a group's
    training slides, mixed with PRIOR slides of the overall rate, is the prediction; over all test slides of all
    folds. By site, the site was never seen: any gain there is a leak of the folds, and the difference to by
    patient is what a model can gain by knowing the hospital. AUC is NaN under MIN_TEST patients a class.
    """
    labels = sorted(table["label"].unique())
    if len(labels) != 2:
        raise InputError(f"floors by site are for two classes, not {len(labels)}")
    rows = []
    for by in ("site", "patient"):
        tested = [(fold[fold["role"] != "test"], fold[fold["role"] == "test"]) for _, fold in folds(table, n, by, seed)]
        for name, columns in FLOORS.items():
            scores = pd.concat([_rates(train, test, list(columns), labels[1]) for train, test in tested])
            truth = table.loc[scores.index, "label"] == labels[1]
            rows.append({"floor": name, "folds": f"by {by}", **_scored(table, truth, scores)})
    return pd.DataFrame(rows)


def alone(table: pd.DataFrame) -> dict[str, pd.Series]:
    """What cancer type alone, site alone and both say of the slides with role test, from those with another role.

    Log-odds of the second class by slide_id, as in `floors`: above 0 it is the likelier one than among all. What is
    known of no slide is left out. Raises InputError where there are not two classes.
    """
    labels = sorted(table["label"].unique())
    if len(labels) != 2:
        raise InputError(f"floors by site are for two classes, not {len(labels)}")
    test, found = table["role"] == "test", {}
    for name, columns in FLOORS.items():
        if all((table[column] != "").any() for column in columns):
            said = _rates(table[~test], table[test], list(columns), labels[1])
            found[f"{name} alone" if len(columns) == 1 else name] = said.set_axis(table.loc[test, "slide_id"])
    return found


def _rates(train: pd.DataFrame, test: pd.DataFrame, columns: list[str], positive: str) -> pd.Series:
    """(test,) log-odds of `positive` by group against the rate of all training slides, 0 for an unseen group."""
    hit = (train["label"] == positive).astype(float)
    overall = hit.mean()
    groups = hit.groupby([train[c] for c in columns]).agg(["sum", "count"])
    rate = (groups["sum"] + PRIOR * overall) / (groups["count"] + PRIOR)
    keys = pd.MultiIndex.from_frame(test[columns]) if len(columns) > 1 else pd.Index(test[columns[0]])
    found = rate.reindex(keys).fillna(overall).clip(1e-6, 1 - 1e-6).to_numpy()
    base = np.clip(overall, 1e-6, 1 - 1e-6)
    return pd.Series(np.log(found / (1 - found)) - np.log(base / (1 - base)), index=test.index)


def _scored(table: pd.DataFrame, truth: pd.Series, scores: pd.Series) -> dict:
    from sklearn.metrics import roc_auc_score

    people = table.loc[scores.index].groupby(truth.to_numpy())["patient_id"].nunique()
    enough = len(people) == 2 and people.min() >= MIN_TEST
    return {
        "auc": float(roc_auc_score(truth, scores)) if enough else np.nan,
        "balanced_accuracy": balanced_accuracy(truth.to_numpy(), (scores > 0).to_numpy()),
        "n_test": len(scores),
    }


def _deal(units: pd.Series, label: pd.Series, n: int, rng: np.random.Generator) -> np.ndarray:
    """(rows,) fold of each row: whole units, the large ones first, each to the fold that has least of its classes."""
    count = pd.crosstab(units, label)
    share = (count / count.sum()).to_numpy()
    order = rng.permutation(len(count))
    order = order[np.argsort(-np.round(share[order].sum(axis=1), 2), kind="stable")]
    have, fold = np.zeros((n, share.shape[1])), np.empty(len(count), int)
    ties = rng.permutation(n)
    for one in order:
        fold[one] = ties[np.argmin((have @ share[one])[ties])] if share[one].any() else ties[0]
        have[fold[one]] += share[one]
    return pd.Series(fold, index=count.index).loc[units].to_numpy()
