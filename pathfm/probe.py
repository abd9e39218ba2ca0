"""Probes on frozen features: train on probe-train, choose on validate, answer once on test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pathfm import regression, uni
from pathfm.errors import InputError
from pathfm.errors import nearest as nearest_name
from pathfm.metrics import CONSTANT, balanced_accuracy, finite
from pathfm.neighbours import nearest, vote
from pathfm.rows import Rows
from pathfm.scores import Prediction, interval, paired, scores

if TYPE_CHECKING:
    from torch import nn

    from pathfm.benchmarks import TileSet
    from pathfm.features import Features

__all__ = [
    "cross_validate",
    "cross_validate_within",
    "episodes",
    "eva",
    "few_shot",
    "floor_predictions",
    "floors",
    "interval",
    "knn",
    "knn_accuracy",
    "leakage",
    "linear",
    "logistic",
    "paired",
    "pooled",
    "retrieval",
    "retrieved",
    "scores",
    "simpleshot",
]

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse L2 penalty on standardised features; ours, fixed
SEARCHED = ", learning rate searched"  # behind a protocol's name
FLOOR_NAMES = {
    "chance": "chance",
    "colour": "colour mean and spread",
    "histogram": "colour histogram",
    "lbp": "texture (LBP)",
    "colour+lbp": "colour + LBP",
    "metadata": "size and mpp alone",
}


def linear(features: Features, seed: int = 0, grid: Sequence[float] = C_GRID) -> Prediction:
    """Logistic regression (L2, L-BFGS, classes weighted equally) on standardised features, answers on test.

    seed  of the pretraining behind the features, to keep with the answers; the fit itself has no chance in it
    grid  of C, searched on validate; the smallest of equals is taken. Fitted on probe-train alone

    Raises InputError where a role is missing or probe-train lacks a class.
    """
    train, validate, test = (_rows(features, role) for role in ("probe-train", "validate", "test"))
    (classes, codes), x = np.unique(features.y, return_inverse=True), Rows(features.x).finite()
    mean, spread = _scaling(x.take(train))
    fitted_on, judged_on, asked = (
        x.take(rows).changed(lambda block: (block - mean) / spread) for rows in (train, validate, test)
    )
    best, chosen, model = -1.0, None, None
    for c in grid:
        model = regression.balanced(fitted_on, codes[train], c, model)  # from the last one of the path
        score = balanced_accuracy(codes[validate], model.answers(judged_on))
        if score > best:
            best, chosen, answers = score, c, classes[model.answers(asked)]
    return _prediction(features, "linear", test, answers, seed, {"C": chosen, "validate": best})


def _scaling(x: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread (D,) float32 of features; a feature that does not vary is left as it is."""
    mean, square, largest = x.mean(), np.zeros(x.d), np.zeros(x.d, np.float32)
    for _, block in x.blocks():
        square += ((block - mean) ** 2).sum(axis=0, dtype=np.float64)
        largest = np.maximum(largest, np.abs(block).max(axis=0))
    spread = np.sqrt(square / len(x)).astype(np.float32)
    return mean, np.where(spread > CONSTANT * largest, spread, np.float32(1))


def knn(features: Features, seed: int = 0, k: int = 20, centred: bool = False) -> Prediction:
    """The majority of the k nearest probe-train tiles by cosine, answers on test. Nothing is chosen.

    centred  on the mean of probe-train first, as UNI's neighbours are
    """
    train, validate, test = (_rows(features, role) for role in ("probe-train", "validate", "test"))
    x, y = Rows(features.x).finite(), features.y
    if centred:
        mean = x.take(train).mean()
        x = x.changed(lambda block: block - mean)
    bank = x.take(train)
    found = {name: vote(*nearest(bank, x.take(rows), k), y[train]) for name, rows in (("v", validate), ("t", test))}
    settings = {"k": k, "validate": balanced_accuracy(y[validate], found["v"])}
    return _prediction(features, "kNN (centred)" if centred else "kNN", test, found["t"], seed, settings)


def eva(
    features: Features,
    name: str = "eva-2026",
    seed: int = 0,
    device: str = "cpu",
    slides: bool = False,
    learning_rates: Sequence[float] = (),
    **changes,
) -> Prediction:
    """A linear head by a protocol of eva, all runs at once; answers on test or, where there is none, on validate.

    name            one of `pathfm.protocols.PROTOCOLS`
    slides          20 runs, as eva has for slides
    learning_rates  in place of the protocol's: all are trained side by side, and that of the best mean score on
                    validate answers, the first of equals. The probe is then called SEARCHED, for eva has one rate
    changes         to the protocol, such as lr or runs; the answers' settings hold it as it ran

    The score is the mean of the runs', for `right` of the table is the share of them that are right; `predicted` is
    what most of them say. Runs are noise of the optimiser, and no seeds: settings have their `scores` one by one, and
    the steps at which each head was `kept` and each run `stopped`. A score on validate is of the tiles that chose it:
    settings say what it is `reported on`. Raises InputError where a role lacks a class.
    """
    from pathfm import heads
    from pathfm.protocols import protocol

    role = _reported(features)
    rows = {one: np.flatnonzero(_rows(features, one, whole=True)) for one in ("probe-train", "validate", role)}
    train, validate, asked = rows["probe-train"], rows["validate"], rows[role]
    y, classes = features.y, len(features.tiles.classes)
    chosen = protocol(name, len(train), len(validate), classes)
    chosen = replace(chosen, **({"runs": 20} if slides else {}), **changes)
    rates = tuple(learning_rates) or (chosen.lr,)
    found = heads.fit(chosen, features.x, y, train, validate, seed, rates, device)
    best = int(found.validate.mean(axis=1).argmax())
    said = found.answers(features.x, asked)[best]
    right = said == y[asked]
    most = (said[..., None] == np.arange(classes)).sum(axis=0).argmax(axis=1)
    settings = {
        **asdict(chosen),
        "lr": rates[best],
        "learning rates": rates,
        "reported on": role,
        "validate": float(found.validate[best].mean()),
        "scores": [balanced_accuracy(y[asked], one) for one in said],
        "kept": found.kept[best].tolist(),
        "stopped": found.stopped[best].tolist(),
    }
    answer = _prediction(features, f"{name}{SEARCHED}" if len(rates) > 1 else name, asked, most, seed, settings)
    return replace(answer, table=answer.table.assign(right=right.mean(axis=0)))


def logistic(features: Features, seed: int = 0) -> Prediction:
    """UNI's linear probe: `pathfm.uni.logistic` on probe-train and validate together, answers on test.

    Where there is no test it learns from probe-train alone and answers on validate.
    """
    role, train = _reported(features), _rows(features, "probe-train")
    if role == "test":
        train = train | _rows(features, "validate")
    asked = _rows(features, role)
    fitted = uni.logistic(Rows(features.x, train), features.y[train])
    settings = {"reported on": role, "objective": fitted.objective}
    return _prediction(features, "logistic", asked, fitted.answers(Rows(features.x, asked)), seed, settings)


def simpleshot(features: Features, seed: int = 0) -> Prediction:
    """The class whose mean over probe-train is nearest, after centring and normalising; answers on test or validate."""
    role, train = _reported(features), _rows(features, "probe-train")
    asked = _rows(features, role)
    said = uni.simpleshot(Rows(features.x, train), features.y[train], Rows(features.x, asked))
    return _prediction(features, "SimpleShot", asked, said, seed, {"reported on": role})


def few_shot(
    features: Features, shots: Sequence[int] | None = None, episodes: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Balanced accuracy of `simpleshot` from few images: a row a number of shots, over episodes that draw them anew.

    shots  images a class; None takes the powers of two up to the smallest class of probe-train
    low and high hold 95 % of the episodes: they tell of the draw, not of the patients
    """
    train, asked = _rows(features, "probe-train"), _rows(features, _reported(features), True)
    y, support, queries = features.y, Rows(features.x, train), Rows(features.x, asked)
    if shots is None:
        shots = 2 ** np.arange(int(np.log2(np.bincount(y[train]).min())) + 1)
    rows = []
    for n in shots:
        found = uni.episodes(support, y[train], queries, y[asked], int(n), episodes, seed).scores
        low, high = np.quantile(found, [0.025, 0.975])
        rows.append({"shots": int(n), "balanced_accuracy": found.mean(), "sd": found.std(), "low": low, "high": high})
    return pd.DataFrame(rows).assign(episodes=episodes, n_tiles=int(asked.sum()))


def episodes(features: Features, shots: int = 16, n: int = 1000, seed: int = 0) -> Prediction:
    """`few_shot` of one number of shots as answers: each of n episodes is a fit, and the score is their mean's."""
    train, asked = _rows(features, "probe-train"), _rows(features, _reported(features), True)
    y = features.y
    found = uni.episodes(Rows(features.x, train), y[train], Rows(features.x, asked), y[asked], shots, n, seed)
    settings = {"reported on": _reported(features), "shots": shots, "scores": found.scores.tolist()}
    answer = _prediction(features, f"few-shot-{shots}", asked, found.votes.argmax(axis=1), 0, settings)
    return replace(answer, table=answer.table.assign(right=found.votes[np.arange(len(y[asked])), y[asked]] / n))


def retrieved(features: Features, k: int = 5, seed: int = 0) -> Prediction:
    """`retrieval` as answers: right where one of the k nearest has the class; `predicted` is what most of them are.

    The score is acc@k as a mean over the classes, where UNI's is one over the images.
    """
    train, asked = _rows(features, "probe-train"), _rows(features, _reported(features))
    y, settings = features.y, {"reported on": _reported(features), "metric": f"acc@{k}"}
    hit, said = uni.hits(Rows(features.x, train), y[train], Rows(features.x, asked), y[asked], k)
    answer = _prediction(features, f"retrieval-{k}", asked, said, seed, settings)
    return replace(answer, table=answer.table.assign(right=hit[:, -1]))


def retrieval(features: Features, ks: Sequence[int] = (1, 3, 5)) -> dict[str, float]:
    """`pathfm.uni.retrieval` of test (or validate) among probe-train."""
    train, asked = _rows(features, "probe-train"), _rows(features, _reported(features))
    x, y = features.x, features.y
    return uni.retrieval(Rows(x, train), y[train], Rows(x, asked), y[asked], ks)


def knn_accuracy(train_x, train_y, test_x, test_y, k: int = 20) -> float:
    """Balanced accuracy, 0 to 1, of the majority of the k nearest by cosine: a watch for a training loop.

    train_x, test_x  (N, D) and (M, D) arrays;  train_y, test_y  (N,) and (M,) labels of any kind
    """
    classes, codes = np.unique(np.asarray(train_y), return_inverse=True)
    found = vote(*nearest(finite(train_x), finite(test_x), k), codes)
    return balanced_accuracy(test_y, classes[found])


def pooled(
    model: nn.Module | str | Path,
    tiles: TileSet,
    preprocess: Callable | None = None,
    name: str = "features",
    folder: str | Path | None = None,
    probe: Callable[..., Prediction] = linear,
    **how,
) -> Features:
    """A model's features of the pooling that validates best: CLS, mean of the patch tokens, or both.

    model  a backbone with its `preprocess`, or its name, as `backbones.load` takes it
    how    device, layers and precision of `features.extract`
    """
    from pathfm import backbones
    from pathfm.features import extract, pools

    if isinstance(model, (str, Path)):
        model, own = backbones.load(model)
        preprocess = preprocess or own
    found = pools(extract(model, tiles, preprocess, backbones.widest(model), name, folder, **how))
    return max(found, key=lambda features: probe(features).settings["validate"])


def cross_validate(
    features: Features,
    probe: Callable[..., Prediction] = linear,
    by: str = "centre",
    n: int | None = None,
    seed: int = 0,
    **settings,
) -> Prediction:
    """Every tile answered once, by a probe that saw nothing of its centre, patient or group of `n` of them.

    The answers of all folds are one Prediction; its column `fold` names who was left out, so that each can
    be reported: `table.groupby("fold")`. Roles in the features' tiles are not used.
    """
    answers = []
    for name, tiles in features.tiles.folds(by, n, seed):
        one = probe(replace(features, tiles=tiles), **settings)
        answers.append(replace(one, table=one.table.assign(fold=name)))
    table = pd.concat([one.table for one in answers]).sort_index()
    validate = float(np.mean([one.settings["validate"] for one in answers]))
    return replace(answers[0], table=table, settings={"by": by, "folds": len(answers), "validate": validate})


def cross_validate_within(
    features: Features, column: str, probe: Callable[..., Prediction] = linear, **settings
) -> Prediction:
    """`cross_validate` among the tiles of one value of `column` at a time, such as one magnification.

    The answers of all values are one Prediction, in the order of the tiles. Raises InputError for an unknown column.
    """
    table = features.table
    if column not in table:
        raise InputError(f"{features.tiles.name} has no column '{column}'.{nearest_name(column, table)}")
    parts = []
    for value in sorted(table[column].unique()):
        rows = (table[column] == value).to_numpy()
        alone = replace(features, x=features.x[rows], tiles=features.tiles.subset(rows))
        parts.append(cross_validate(alone, probe, **settings))
    answers = pd.concat([one.table for one in parts]).set_index("file").loc[table["file"]].reset_index()
    return replace(parts[0], table=answers, settings={**parts[0].settings, "within": column})


def floor_predictions(
    tiles: TileSet,
    model: nn.Module | None = None,
    preprocess: Callable | None = None,
    probe: Callable[..., Prediction] = linear,
    folder: str | Path | None = None,
    seed: int = 0,
    **how,
) -> list[Prediction]:
    """The answers of every floor on the same roles, probe and search: what any features must beat.

    Chance; colour mean and spread; colour histogram; local binary patterns; both; size, mpp and magnification
    where they vary; and, with `model`, the same architecture with random weights: CLS, mean or both, whichever
    is best on validate, or each of them where the probe says nothing of validate; `how` is that of `pooled`.
    """
    from pathfm import backbones
    from pathfm.features import extract, metadata_columns, pools, random_twin

    wanted = [name for name in FLOOR_NAMES if name != "metadata" or metadata_columns(tiles)]
    answers = [probe(extract(name, tiles, name=FLOOR_NAMES[name], folder=folder)) for name in wanted]
    if model is not None:
        named = backbones.widest(model), "random weights"
        twin = pools(extract(random_twin(model, seed), tiles, preprocess, *named, folder, **how))
        said = [probe(one) for one in twin]
        validated = all("validate" in one.settings for one in said)
        answers += [max(said, key=lambda one: one.settings["validate"])] if validated else said
    return [replace(answer, floor=True) for answer in answers]


def floors(
    tiles: TileSet, model: nn.Module | None = None, preprocess: Callable | None = None, **settings
) -> pd.DataFrame:
    """`floor_predictions` as a table of `scores`."""
    return scores(floor_predictions(tiles, model, preprocess, **settings))


def leakage(
    features: Features,
    probe: Callable[..., Prediction] = linear,
    by: Iterable[str] = ("tile", "patient", "centre"),
    seeds: Sequence[int] = (0, 1, 2),
) -> pd.DataFrame:
    """The same features and probe under splits by tile, patient and centre: what a leak would pretend.

    One row a split: balanced_accuracy and its standard deviation over the seeds of the split, the patients
    of the first one on test and on both sides, and `over_patient`, the score above that of the split by patient.
    A split that the tiles cannot be given is a row of NaN with its reason.
    """
    rows = []
    for unit in by:
        try:
            splits = [features.split(unit, seed=seed, allow_leak=True) for seed in seeds]
        except InputError as error:
            rows.append({"split": unit, "balanced_accuracy": np.nan, "spread": np.nan, "reason": str(error)})
            continue
        answers = [probe(split) for split in splits]
        values = [answer.balanced_accuracy for answer in answers]
        who = splits[0].tiles.patients
        test = (splits[0].table["role"] == "test").to_numpy()
        rows.append(
            {
                "split": unit,
                "balanced_accuracy": float(np.mean(values)),
                "spread": float(np.std(values, ddof=1)) if len(values) > 1 else np.nan,
                "n_tiles": int(test.sum()),
                "n_patients": pd.NA if who is None else len(set(who[test])),
                "on_both_sides": pd.NA if who is None else len(set(who[test]) & set(who[~test])),
                "reason": "",
            }
        )
    table = pd.DataFrame(rows)
    honest = table.loc[table["split"] == "patient", "balanced_accuracy"]
    table["over_patient"] = table["balanced_accuracy"] - (honest.iloc[0] if len(honest) else np.nan)
    return table


def _reported(features: Features) -> str:
    """The role that scores are of: test, or validate where no tile is for testing."""
    table = features.table
    return "test" if "role" not in table or (table["role"] == "test").any() else "validate"


def _rows(features: Features, role: str, whole: bool = False) -> np.ndarray:
    """(N,) bool. Raises InputError where the role is missing, or lacks a class and is probe-train or must be whole."""
    table = features.table
    rows = (table["role"] == role).to_numpy() if "role" in table else np.zeros(len(table), bool)
    if not rows.any():
        raise InputError(f"no tile of {features.tiles.name} has the role {role}; draw roles with .split(by='patient')")
    absent = np.setdiff1d(features.y, features.y[rows])
    if (whole or role == "probe-train") and len(absent):
        label = features.tiles.classes[absent[0]]
        raise InputError(f"{features.tiles.name}: no tile of class {label} has the role {role}; draw roles anew")
    return rows


def _prediction(
    features: Features, probe: str, rows: np.ndarray, answers: np.ndarray, seed: int, settings: dict
) -> Prediction:
    classes = np.array(features.tiles.classes)
    table = features.table.iloc[rows]
    return Prediction(
        name=features.name,
        probe=probe,
        table=table.assign(truth=table["label"], predicted=classes[answers]),
        seed=seed,
        settings=settings,
        leaky=features.tiles.leaky,
        mpp=features.provenance.get("effective_mpp"),
        quarantined=len(features.tiles.quarantined),
    )
