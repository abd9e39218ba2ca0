"""Labels of slides from bags of frozen tiles: many runs trained at once, AUC by patient, where attention looks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from pathfm.bags import Bags
from pathfm.benchmarks import patients
from pathfm.cohort import check_roles
from pathfm.ensemble import Ensemble
from pathfm.errors import InputError, nearest
from pathfm.metrics import CONSTANT, balanced_accuracy
from pathfm.mil import HEADS, side_by_side
from pathfm.roc import auc
from pathfm.scores import Prediction
from pathfm.storage import progress

ROLES = ("probe-train", "validate", "test")
# Of one step; runs are trained in groups that stay below. Small on a CPU, where only ABMIL and its twins gain by
# company (dozens of small products): five runs of TransMIL at once take 1.2 times the seconds of five, one by one.
BYTES_AT_ONCE = {"cpu": 2**27, "gpu": 2**34}


@dataclass(frozen=True)
class SlideProtocol:
    """How a head is trained: eva's of 2026 for slides, 73b61a7 configs/.../camelyon16_small.yaml and HeadModule."""

    runs: int = 20
    batch_size: int = 32  # slides
    epochs: int = 100  # at most
    patience: int = 20  # epochs without a better balanced accuracy on validate
    slow_epochs: int = 5  # at first, at a third of the rate: what torch's ConstantLR does when nothing is set
    seed: int = 0  # of the first run
    standardise: bool = False  # features, by mean and spread of the probe-train tiles; eva does not


@dataclass(frozen=True, repr=False)
class Fitted:
    """The runs of one head on one label.

    logits   (R, S, C) of every slide of the bags, C is 1 for two classes
    state    parameters of the best epoch, each with a leading R
    epochs   (R,) that epoch; validate (R,) its balanced accuracy
    scaling  what was subtracted from the features and what they were divided by
    """

    head: str
    label: str
    bags: Bags
    classes: list[str]
    logits: np.ndarray
    state: dict[str, Tensor]
    epochs: np.ndarray
    validate: np.ndarray
    scaling: tuple[np.ndarray | float, np.ndarray | float] = (0.0, 1.0)

    def probability(self) -> np.ndarray:
        """(R, S) of the last class where there are two."""
        return 1 / (1 + np.exp(-self.logits[..., 0].astype(float)))

    def predictions(self) -> list[Prediction]:
        """One a run, of the test slides, for `scores.interval` and the tables; their seeds are those of the runs."""
        test = (self.bags.slides["role"] == "test").to_numpy()
        table = self.bags.slides[test].assign(file=self.bags.slides["slide_id"][test])
        truth = np.array(self.classes)[_codes(self.bags, self.label)[1][test]]
        how = {"quarantined": len(self.bags.quarantined), "mpp": self.bags.mpp}
        names, found = np.array(self.classes), []
        for run, answer in enumerate(_answers(self.logits[:, test])):
            said = table.assign(truth=truth, predicted=names[answer])
            told = {"validate": float(self.validate[run])}
            found.append(Prediction(self.bags.name, self.head, said, run, told, **how))
        return found

    def attention(self, row: int) -> np.ndarray:
        """(n_tiles,) of a slide, mean over the runs, sum 1. Raises InputError for a head without attention."""
        if self.head != "abmil":
            raise InputError(f"the head '{self.head}' has no attention over tiles; take abmil")
        model = HEADS[self.head](self.bags[row].shape[1], self.logits.shape[2])
        x, tiles = _padded(_scaled([self.bags[row]], self.scaling))
        weights = []
        for run in range(len(self.logits)):
            model.load_state_dict({name: tensor[run] for name, tensor in self.state.items()})
            with torch.inference_mode():
                weights.append(model.attention(x, tiles)[0])
        return torch.stack(weights).mean(dim=0).numpy()


def fit(
    bags: Bags,
    label: str = "label",
    head: str = "abmil",
    protocol: SlideProtocol | None = None,
    device: str | torch.device = "cpu",
) -> Fitted:
    """Heads trained on the bags' probe-train slides, stopped and chosen on validate, asked about all of them.

    label   a column of `bags.slides`; beside it the column role
    device  of the heads; features go there batch by batch

    Each run has its own initial weights and its own order of slides; runs are trained in one batch, as far as it fits
    (BYTES_AT_ONCE). Raises InputError for a column or head that is not there, a slide without label, one class, a role
    without slides, probe-train or validate without a class, a patient on two sides, and features that are not finite.
    """
    protocol = protocol or SlideProtocol()
    if head not in HEADS:
        raise InputError(f"no head '{head}'.{nearest(head, HEADS)}")
    classes, y = _codes(bags, label)
    rows = _roles(bags, label, classes, y)
    held = [np.ascontiguousarray(bag) for bag in bags]
    for name, bag in zip(bags.slides["slide_id"], held, strict=True):
        if not np.isfinite(bag).all():
            raise InputError(f"features '{bags.name}' hold NaN or infinity, first for {name}; look at the weights")
    scaling = _scaling([held[row] for row in rows["probe-train"]]) if protocol.standardise else (0.0, 1.0)
    held = _scaled(held, scaling)
    longest, width = max(len(bag) for bag in held), held[0].shape[1]
    one_run = 4 * longest * (width + HEADS[head].held) * protocol.batch_size
    group = max(1, BYTES_AT_ONCE["cpu" if torch.device(device).type == "cpu" else "gpu"] // one_run)
    seeds = np.arange(protocol.runs) + protocol.seed
    parts = [_train(held, y, rows, head, len(classes), protocol, seeds[at : at + group], device) for at in
             progress(range(0, len(seeds), group), f"{head} on {label}", unit="group")]  # fmt: skip
    logits, epochs, validate = (np.concatenate([part[name] for part in parts]) for name in _OUT)
    state = {name: torch.cat([part["state"][name] for part in parts]) for name in parts[0]["state"]}
    return Fitted(head, label, bags, classes, logits, state, epochs, validate, scaling)


def pooled(bags: Sequence[Bags], *how, **settings) -> Fitted:
    """`fit` of each of several poolings of one network, such as `Bags.pools`: the one that validates best."""
    return max((fit(one, *how, **settings) for one in bags), key=lambda found: found.validate.mean())


def answer(folds: Sequence[Fitted]) -> Prediction:
    """All runs of one head as one answer, of the test slides of one or more folds together.

    `right` is the share of the runs that name a slide's class, `predicted` what most of them say; settings hold each
    run's score over all folds.
    """
    each = [pd.concat([one.table for one in run]) for run in zip(*(fold.predictions() for fold in folds), strict=True)]
    runs = [Prediction(folds[0].bags.name, folds[0].head, table, run) for run, table in enumerate(each)]
    said = pd.DataFrame({run.seed: run.table["predicted"].to_numpy(str) for run in runs})
    hits = np.mean([run.hits for run in runs], axis=0)
    table = each[0].assign(predicted=said.mode(axis=1)[0].to_numpy(), right=hits)
    validate = float(np.mean([fold.validate.mean() for fold in folds]))
    scored = {"validate": validate, "scores": [run.balanced_accuracy for run in runs]}
    bags = folds[0].bags
    return Prediction(bags.name, folds[0].head, table, 0, scored, mpp=bags.mpp, quarantined=len(bags.quarantined))


def asked(folds: Sequence[Fitted]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """truth (S,) bool, score (R, S) and patient (S,) of the test slides of one or more folds, as `roc.auc` takes them.

    Raises InputError where there are not two classes.
    """
    truth, score, who = [], [], []
    for one in folds:
        if len(one.classes) != 2:
            raise InputError(f"{one.label} has {len(one.classes)} classes, an AUC has two; score its predictions()")
        test = (one.bags.slides["role"] == "test").to_numpy()
        truth.append(_codes(one.bags, one.label)[1][test] == 1)
        score.append(one.probability()[:, test])
        who.append(patients(one.bags.slides)[test])
    return np.concatenate(truth), np.concatenate(score, axis=1), np.concatenate(who)


_OUT = ("logits", "epochs", "validate")


def _scaling(bags: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread (D,) of the tiles; a feature that does not vary is left as it is."""
    tiles = np.concatenate(bags)
    spread = tiles.std(axis=0)
    return tiles.mean(axis=0), np.where(spread > CONSTANT * np.abs(tiles).max(axis=0), spread, 1)


def _scaled(bags: list[np.ndarray], scaling: tuple) -> list[np.ndarray]:
    return [(bag - scaling[0]) / scaling[1] for bag in bags]


def _train(held: list, y: np.ndarray, rows: dict, head: str, classes: int, protocol, seeds, device) -> dict[str, Any]:
    """A group of runs, side by side."""
    outputs = 1 if classes == 2 else classes
    models = [_seeded(HEADS[head], held[0].shape[1], outputs, seed).to(device) for seed in seeds]
    runs = Ensemble(models, models[0].lr, protocol.slow_epochs, protocol.patience)
    orders = [np.random.default_rng(seed) for seed in seeds]
    target = torch.from_numpy(y).to(device)
    for epoch in range(protocol.epochs):
        shuffled = np.stack([orders[run].permutation(rows["probe-train"]) for run in runs.numbers])
        for start in range(0, shuffled.shape[1], protocol.batch_size):
            chosen = shuffled[:, start : start + protocol.batch_size]
            different, place = np.unique(chosen, return_inverse=True)
            x, tiles = (part.to(device)[place.reshape(chosen.shape)] for part in _padded([held[i] for i in different]))
            logits = side_by_side(runs.model, runs.state, x, tiles)
            runs.step(_losses(logits, target[torch.from_numpy(chosen).to(device)]))
        answers = _answers(_ask(runs.model, runs.state, held, rows["validate"], protocol, device))
        runs.look(np.array([balanced_accuracy(y[rows["validate"]], one) for one in answers]), epoch)
        if not len(runs.numbers):
            break
    logits = _ask(runs.model, runs.best, held, np.arange(len(held)), protocol, device)
    state = {name: tensor.cpu() for name, tensor in runs.best.items()}
    return {"state": state, "logits": logits, "epochs": runs.when, "validate": runs.score}


@torch.inference_mode()
def _ask(model, state: dict[str, Tensor], held: list, rows: np.ndarray, protocol, device) -> np.ndarray:
    """(A, len(rows), C) logits of the same slides from every run."""
    runs, found = len(next(iter(state.values()))), []
    for start in range(0, len(rows), protocol.batch_size):
        x, tiles = (p.to(device) for p in _padded([held[row] for row in rows[start : start + protocol.batch_size]]))
        found.append(side_by_side(model, state, x.expand(runs, *x.shape), tiles.expand(runs, *tiles.shape)))
    return torch.cat(found, dim=1).cpu().numpy()


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    """(R,) mean loss of each run's bags: binary with one logit, else cross-entropy."""
    if logits.shape[2] == 1:
        return F.binary_cross_entropy_with_logits(logits[..., 0], y.float(), reduction="none").mean(dim=1)
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(dim=1)


def _answers(logits: np.ndarray) -> np.ndarray:
    """(R, S) class of each slide as an integer from 0."""
    return (logits[..., 0] > 0).astype(int) if logits.shape[2] == 1 else logits.argmax(axis=2)


def _padded(bags: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """x (B, N, D) with zeros behind the end of a bag, and where there are tiles (B, N)."""
    longest = max(len(bag) for bag in bags)
    x = np.zeros((len(bags), longest, bags[0].shape[1]), np.float32)
    for place, bag in enumerate(bags):
        x[place, : len(bag)] = bag
    tiles = np.arange(longest) < np.array([len(bag) for bag in bags])[:, None]
    return torch.from_numpy(x), torch.from_numpy(tiles)


def _seeded(head, width: int, outputs: int, seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return head(width, outputs)


def _codes(bags: Bags, label: str) -> tuple[list[str], np.ndarray]:
    """The classes in sorted order, and each slide's as an integer."""
    slides = bags.slides
    if label not in slides:
        raise InputError(f"the slides of {bags.name} have no column '{label}'.{nearest(label, slides.columns)}")
    if slides[label].isna().any():
        raise InputError(f"slide {slides['slide_id'][slides[label].isna()].iloc[0]} has no {label}")
    classes, y = np.unique(slides[label].astype(str).to_numpy(str), return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"all slides of {bags.name} have the {label} {classes[0]}; a probe needs two classes or more")
    return classes.tolist(), y


def _roles(bags: Bags, label: str, classes: list[str], y: np.ndarray) -> dict[str, np.ndarray]:
    slides = bags.slides
    rows = {role: np.flatnonzero(slides["role"] == role) if "role" in slides else [] for role in ROLES}
    for role, there in rows.items():
        absent = np.setdiff1d(np.arange(len(classes)), y[there]) if len(there) else []
        if not len(there) or (role != "test" and len(absent)):
            what = f"of {label} {classes[absent[0]]} " if len(there) else ""
            raise InputError(f"{bags.name}: no slide {what}has the role {role}; give the cohort a column role")
    if patients(slides) is not None:
        check_roles(slides.assign(patient=patients(slides)), unit="patient")
    return rows


def table(fits: Iterable[Fitted]) -> pd.DataFrame:
    """A row a fit: AUC on test with its interval by patient, sizes, effective mpp, runs, what was left out and why."""
    rows = []
    for one in fits:
        truth, score, who = asked([one])
        found = auc(truth, score, who)
        told = found._asdict() | {"n_patients": len(set(who)), "n_slides": len(who), "mpp": one.bags.mpp}
        told |= {"n_quarantined": len(one.bags.quarantined), "runs": len(one.logits), "validate": one.validate.mean()}
        rows.append({"label": one.label, "features": one.bags.name, "head": one.head, **told})
    return pd.DataFrame(rows).rename(columns={"value": "auc"})
