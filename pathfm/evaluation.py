"""The row of any backbone: a public task or any labelled tiles, one protocol, floors beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pathfm import backbones, confounding, leaderboard, probe, protocols, scores, tasks
from pathfm.benchmarks import TileSet
from pathfm.errors import InputError, nearest
from pathfm.features import Features, extract, random_twin
from pathfm.scores import Prediction
from pathfm.tasks import pathorob

# By the name that their predictions bear.
PROTOCOLS: dict[str, Callable[[Features], Prediction]] = {
    "linear": probe.linear,
    "kNN": probe.knn,
    "logistic": probe.logistic,
    "SimpleShot": probe.simpleshot,
    **{name: functools.partial(probe.eva, name=name) for name in protocols.PROTOCOLS},
}
ON_TEST = ("linear", "kNN")  # these choose on validate; eva's report on it where there is no test
ROBUSTNESS = "pathorob-2025"
READ_BY = {"segmentation": "pathfm.tasks.read gives masks to a decoder", "slides": "pathfm.tasks.read gives slides"}


class Evaluated(NamedTuple):
    """What one backbone got on one task."""

    row: dict  # for the leaderboard, as `leaderboard.row_of`
    table: pd.DataFrame  # of `scores.scores`, floors among them, with `confounding.COLUMNS`


def labelled(data: str | Path, task: str = "folder", split: str = "clean", seed: int = 0, **how) -> TileSet:
    """The tiles of a public task, or of any folder a class or CSV (`task` "folder"), with roles.

    Tiles without roles of their own are split by patient, by image where none is known. Raises InputError for a task
    whose labels are not of tiles.
    """
    about = tasks.about(task)
    if about.kind != "tiles":
        raise InputError(f"{task} is no task of labelled tiles: {READ_BY.get(about.kind, 'it has its own measure')}")
    tiles = tasks.read(task, data, split, **how)
    if "role" in tiles.table:
        return tiles
    return tiles.split("tile" if tiles.patients is None else "patient", seed=seed)


def evaluate(
    backbone: str | Path,
    tiles: TileSet,
    task: str = "",
    protocol: str = "linear",
    pool: str = "cls",
    pretrained_on: str = "not stated",
    name: str = "",
    **how,
) -> Evaluated:
    """The row of a backbone on tiles with roles.

    backbone       as `backbones.load` takes it; `how` is passed on to it
    task           under which it stands on the leaderboard; the tiles' name where empty
    protocol       of PROTOCOLS; those of ON_TEST choose on validate and answer on test
    pool           "cls", "mean" or "both"
    pretrained_on  sources joined by +, such as "TCGA+GTEx", for the column of who has seen what
    name           on the leaderboard; the backbone's own where empty

    Raises InputError for an unknown protocol, patch tokens of a backbone without any, and what the probe refuses.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol '{protocol}'.{nearest(protocol, PROTOCOLS)}")
    if protocol in ON_TEST and "test" not in set(tiles.table["role"]):
        raise InputError(f"{tiles.name} stops and reports on the same images; take split 'clean', or a protocol of eva")
    model, preprocess = backbones.load(backbone, **how)
    if backbones.only_cls(model) and pool != "cls":
        raise InputError(f"{backbone} gives one vector an image and no patch tokens; take pool='cls'")
    name, fit = name or Path(str(backbone)).name, PROTOCOLS[protocol]
    features = extract(model, tiles, preprocess, pool, name)
    answers = fit(features)
    validated = "validate" in answers.settings and not backbones.only_cls(model)
    floors = probe.floor_predictions(tiles, model if validated else None, preprocess, fit)
    if not validated:  # nothing says which pooling of random weights is best
        twin = fit(extract(random_twin(model), tiles, preprocess, pool, f"random weights ({pool})"))
        floors.append(replace(twin, floor=True))
    row = leaderboard.row_of([answers], name, pretrained_on, task or tiles.name, floors)
    role = answers.settings.get("reported on", "test")
    table = confounding.beside(scores.scores([answers, *floors]), [features], role)
    return Evaluated(row | {"note": f"{row['note']}; pool {pool}"}, table)


def robustness(
    backbone: str | Path,
    task: str,
    metadata: str | Path,
    images: str | Path,
    pool: str = "cls",
    pretrained_on: str = "not stated",
    name: str = "",
    **how,
) -> dict:
    """The row of a backbone on one of PathoROB's sets: its robustness index, and no probe.

    metadata, images   folders, as `tasks.pathorob.read` and `tasks.pathorob.tiles` take them
    """
    about = tasks.about(task) if isinstance(task, str) else task
    table = tasks.read(about, metadata)
    tiles = pathorob.tiles(about, table, images)
    model, preprocess = backbones.load(backbone, **how)
    x, table = pathorob.align(extract(model, tiles, preprocess, pool).x, tiles, table)
    found = pathorob.robustness(about, x, table)
    return {
        "model": name or Path(str(backbone)).name,
        "pretrained_on": pretrained_on,
        "task": about.name,
        "part": "all",
        "metric": "robustness index",
        "score": found["robustness_index"],
        "protocol": ROBUSTNESS,
        "n_tiles": found["n"],
        "runs": 1,
        "note": f"k {found['k']}; pool {pool}",
    }
