"""The row of any backbone on a public task or on any labelled tiles, masks or slides; floors beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from pathfm import backbones, bags, confounding, leaderboard, probe, protocols, scores, segment, slide_probe, tasks
from pathfm.bags import Cut
from pathfm.benchmarks import TileSet, patients
from pathfm.errors import InputError, nearest
from pathfm.features import Features, extract, random_twin
from pathfm.index import SlideIndex
from pathfm.scores import Prediction
from pathfm.segment import SegmentationProtocol
from pathfm.segmentation import of_images
from pathfm.slide_probe import SlideProtocol
from pathfm.tasks import pathorob
from pathfm.tasks.nuclei import NucleiSet
from pathfm.tasks.slides import SlideSet

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
EVA = "eva-2026"  # of masks and slides there is no other
READ_BY = {"segmentation": "`masks` scores it", "slides": "`slide_labels` scores it"}
SLIDE_PX = 224  # of the tiles that a slide is cut into; eva's
SLIDE_TILES = {"camelyon16_small": 1000, "panda_small": 200}  # a slide at most; eva's
SLIDE_MPP = 0.5  # where a task does not say; ours
SLIDE_FLOOR = "colour+lbp"


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


def masks(
    backbone: str | Path,
    images: NucleiSet,
    task: str = "",
    protocol: SegmentationProtocol | None = None,
    pretrained_on: str = "not stated",
    name: str = "",
    **how,
) -> Evaluated:
    """The row of a backbone on images with masks: Dice of eva's decoder, and the gain over random weights.

    images    as `tasks.read` gives them; those without roles are split by patient, by image where none is known
    protocol  None: eva's of the task; see `segment.fit`. `input_px`, where it is given, replaces its own
    others as in `evaluate`
    """
    model, preprocess = backbones.load(backbone, **how)
    protocol = protocol or segment.EVA.get(task, SegmentationProtocol())
    protocol = replace(protocol, input_px=how.get("input_px") or protocol.input_px)
    if "role" not in images.table:
        images = images.split("tile" if patients(images.table) is None else "patient")
    name = name or Path(str(backbone)).name
    own = segment.fit(model, images, protocol, preprocess, name)
    floor = segment.fit(random_twin(model), images, protocol, preprocess, "random weights")
    dice, gain = own.interval(), own.gain(floor)
    each = [np.nanmean(of_images(run)) for run in own.each]
    row = {
        "model": name,
        "pretrained_on": pretrained_on,
        "task": task or images.name,
        "part": leaderboard.PART[own.role],
        "metric": "Dice",
        **{"score": dice.value, "low": dice.low, "high": dice.high, "runs": len(each)},
        "spread": np.std(each, ddof=1) if len(each) > 1 else np.nan,
        "protocol": EVA,
        "n_tiles": len(np.unique(own.reported.row)),
        "n_patients": gain.n_patients,
        "best_floor": floor.name,
        **{"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high, "verdict": gain.verdict},
        "note": f"decoder of {protocol.decoder}",
    }
    return Evaluated(row, pd.concat([own.summary(), floor.summary()], ignore_index=True))


def slide_labels(
    backbone: str | Path,
    slides: SlideSet,
    task: str = "",
    head: str = "abmil",
    protocol: SlideProtocol | None = None,
    pool: str = "cls",
    pretrained_on: str = "not stated",
    name: str = "",
    **how,
) -> Evaluated:
    """The row of a backbone on slides with labels: balanced accuracy of heads on bags of its features.

    slides    with roles and paths, as `tasks.read` gives them
    head      of `mil.HEADS`
    protocol  None: eva's, twenty runs
    others as in `evaluate`

    Floors are the same head on bags of colour and texture (standardised, or it would hardly be trained) and of
    random weights. The table has the AUC beside it where there are two classes.
    """
    model, preprocess = backbones.load(backbone, **how)
    protocol, name = protocol or SlideProtocol(), name or Path(str(backbone)).name
    index = SlideIndex.build(slides.cohort())
    cut = Cut(SLIDE_PX, slides.mpp or SLIDE_MPP, most=SLIDE_TILES.get(task, 0))
    found = {
        name: bags.extract(model, index, cut, preprocess, pool, name),
        "random weights": bags.extract(random_twin(model), index, cut, preprocess, pool, "random weights"),
        "colour + LBP": bags.extract(SLIDE_FLOOR, index, cut, name="colour + LBP"),
    }
    fits = {
        one: slide_probe.fit(
            bag, "label", head, replace(protocol, standardise=True) if one == "colour + LBP" else protocol
        )
        for one, bag in found.items()
    }
    own, *floors = [replace(fit.answer(), floor=one != name) for one, fit in fits.items()]
    own, *floors = [replace(one, probe=EVA) for one in (own, *floors)]
    row = leaderboard.row_of([own], name, pretrained_on, task or slides.name, floors)
    table = scores.scores([own, *floors])
    if len(slides.classes) == 2:
        table = table.assign(auc=slide_probe.table(fits.values())["auc"].to_numpy())
    return Evaluated(row | {"note": f"{row['note']}; {head}; pool {pool}"}, table)


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
