"""The row of any backbone on a public task or on any labelled tiles, masks or slides; floors beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from pathfm import (
    backbones,
    bags,
    confounding,
    extractors,
    leaderboard,
    mask_floors,
    probe,
    protocols,
    roc,
    scores,
    segment,
    slide_floors,
    slide_probe,
    tasks,
)
from pathfm.bags import Bags, Cut
from pathfm.benchmarks import TileSet, patients
from pathfm.descriptors import DESCRIPTORS
from pathfm.errors import InputError, nearest
from pathfm.features import Features, extract, pools, random_twin
from pathfm.index import SlideIndex
from pathfm.scores import Prediction
from pathfm.segment import SegmentationProtocol
from pathfm.segmentation import of_images
from pathfm.slide_probe import SlideProtocol
from pathfm.tasks import pathorob, sites
from pathfm.tasks.nuclei import NucleiSet
from pathfm.tasks.slides import OUR_SPLIT, SlideSet

SHOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # images a class, as UNI has them
# By the name that their predictions bear.
PROTOCOLS: dict[str, Callable[[Features], Prediction]] = {
    "linear": probe.linear,
    "kNN": probe.knn,
    "logistic": probe.logistic,
    "SimpleShot": probe.simpleshot,
    "kNN (centred)": functools.partial(probe.knn, centred=True),
    **{f"few-shot-{n}": functools.partial(probe.episodes, shots=n) for n in SHOTS},
    **{f"retrieval-{k}": functools.partial(probe.retrieved, k=k) for k in (1, 3, 5)},
    **{name: functools.partial(probe.eva, name=name) for name in protocols.PROTOCOLS},
}
ON_TEST = ("linear", "kNN", "kNN (centred)")  # these choose on validate; eva's report on it where there is no test
ROBUSTNESS = "pathorob-2025"
EVA = "eva-2026"  # of masks and slides; what is not as eva has it there stands behind it in the row
TEN_SHOT = "eva-2026-10shot", "pcam_10shot"  # the protocol draws the images of this task itself
ANY = ("", "folder", "masks")  # tasks that are no one data set: a row bears the name of the data
READ_BY = {"segmentation": "`masks` scores it", "slides": "`slide_labels` scores it"}
SLIDE_PX = 224  # of the tiles that a slide is cut into; eva's
SLIDE_TILES = {"camelyon16_small": 1000, "panda_small": 200}  # a slide at most; eva's
SLIDE_MPP = 0.5  # where a task does not say; ours
SLIDE_FLOORS = ("colour", "histogram", "colour+lbp")


class Evaluated(NamedTuple):
    """What one backbone got on one task."""

    row: dict  # for the leaderboard, as `leaderboard.row_of`
    table: pd.DataFrame  # of `scores.scores`, floors among them, with `confounding.COLUMNS`


def labelled(
    data: str | Path, task: str = "folder", split: str = "clean", seed: int = 0, protocol: str = "", **how
) -> TileSet:
    """The tiles of a public task, or of any folder a class or CSV (`task` "folder"), with roles.

    Tiles without roles of their own are split by patient, by image where none is known. For `protocol` eva-2026-10shot
    pcam_10shot is all of PCam: its 50 runs draw their own images. Raises InputError for a task whose labels are not of
    tiles.
    """
    about = tasks.about(task)
    if about.kind != "tiles":
        raise InputError(f"{task} is no task of labelled tiles: {READ_BY.get(about.kind, 'it has its own measure')}")
    if (protocol, task) == TEN_SHOT:
        how = {"run": None} | how
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
    device: str | None = None,
    layers: int = 1,
    precision: str = "float32",
    learning_rates: Sequence[float] = (),
    **how,
) -> Evaluated:
    """The row of a backbone on tiles with roles.

    backbone       as `backbones.load` takes it; `how` is passed on to it
    task           under which it stands on the leaderboard; the tiles' name where empty. What that name says of the
                   split, and of what is missing, stands behind it
    protocol       of PROTOCOLS; those of ON_TEST choose on validate and answer on test
    pool           "cls", "mean" or "both"
    pretrained_on  sources joined by +, such as "TCGA+GTEx", for the column of who has seen what
    name           on the leaderboard; the backbone's own where empty. A pool other than "cls", more layers, another
                   input size and bfloat16 stand behind it, so that their rows do not replace each other
    device         of the backbone and of eva's heads, layers and precision: as in `features.extract`
    learning_rates among which eva's heads choose on validate, floors too; the row's protocol says so

    Raises InputError for an unknown protocol, patch tokens of a backbone without any, and what the probe refuses.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol '{protocol}'.{nearest(protocol, PROTOCOLS)}")
    if protocol in ON_TEST and "test" not in set(tiles.table["role"]):
        raise InputError(f"{tiles.name} stops and reports on the same images; take split 'clean', or a protocol of eva")
    model, preprocess = backbones.load(backbone, **how)
    name, fit = name or Path(str(backbone)).name, PROTOCOLS[protocol]
    if protocol in protocols.PROTOCOLS:
        fit = functools.partial(fit, device=device or "cpu", learning_rates=learning_rates)
    elif learning_rates:
        raise InputError(f"learning rates are of eva's heads; {protocol} has none")
    made = {"device": device, "layers": layers, "precision": precision}
    features = extract(model, tiles, preprocess, pool, name, **made)
    answers = fit(features)
    floors = probe.floor_predictions(tiles, model, preprocess, fit, **made)
    model_name = _model(name, pool, layers, how.get("input_px"), features.provenance)
    row = leaderboard.row_of([answers], model_name, pretrained_on, _task(task, tiles.name), floors)
    role = answers.settings.get("reported on", "test")
    table = confounding.beside(scores.scores([answers, *floors]), [features], role)
    beside = table.iloc[0][list(confounding.COLUMNS)].to_dict()
    note = leaderboard.noted(row["task"], row["note"], f"pool {pool}", extractors.compared(features.provenance))
    return Evaluated(row | beside | {"note": note}, table)


def _model(name: str, pool: str, layers: int = 1, input_px: int | None = 0, made: Mapping | None = None) -> str:
    """A model on the leaderboard: its name and how its features were made, where that is not as usual.

    made   what the features say of themselves: the precision that was taken
    """
    told = [pool] * (pool != "cls") + [f"{layers} layers"] * (layers != 1) + [f"{input_px} px"] * bool(input_px)
    precision = (made or {}).get("precision", "float32")
    told += [precision] * (precision != "float32")
    return f"{name} ({', '.join(told)})" if told else name


def _task(task: str, name: str) -> str:
    """A task on the leaderboard, with what the name of the data says of split and completeness."""
    known = leaderboard.plain(name)
    said, task = name[len(known) :], known if task in ANY else task
    return task if task.endswith(said) else task + said


def _protocol(*others: str) -> str:
    """eva's name, with what is not as eva has it: such a row stands in a table of its own."""
    return ", ".join([EVA, *filter(None, others)])


def masks(
    backbone: str | Path,
    images: NucleiSet,
    task: str = "",
    protocol: SegmentationProtocol | None = None,
    pretrained_on: str = "not stated",
    name: str = "",
    device: str | None = None,
    **how,
) -> Evaluated:
    """The row of a backbone on images with masks: Dice of eva's decoder, and the gain over the best floor.

    images    as `tasks.read` gives them; those without roles are split by patient, by image where none is known
    protocol  None: eva's of the task; see `segment.fit`. `input_px`, where it is given, replaces its own. The row says
              "eva-2026" of the decoder "image", "eva-2026, tokens" of the other, and ", changed" of other settings
    device    of the backbone and the decoders
    others as in `evaluate`

    Floors are the same decoder on random weights and those of `mask_floors`; the best is the one of highest Dice.
    Robustness index, centre identity and slide dependence are those of the reported pieces, `confounding.of_masks`.
    """
    model, preprocess = backbones.load(backbone, **how)
    evas = segment.EVA.get(leaderboard.plain(task), SegmentationProtocol())
    protocol = protocol or evas
    protocol = replace(protocol, input_px=how.get("input_px") or protocol.input_px)
    changed = replace(protocol, decoder=evas.decoder, input_px=evas.input_px) != evas
    roles = "" if leaderboard.plain(images.name) in segment.EVA else "the table's own roles"
    if "role" not in images.table:
        by = "tile" if patients(images.table) is None else "patient"
        images, roles = images.split(by), f"roles drawn by {'image' if by == 'tile' else by}"
    name = name or Path(str(backbone)).name
    own = segment.fit(model, images, protocol, preprocess, name, device)
    floors = [segment.fit(random_twin(model), images, protocol, preprocess, "random weights", device)]
    floors += mask_floors.floors(images, protocol)
    best = max(floors, key=lambda floor: floor.interval().value)
    dice, gain = own.interval(), own.gain(best)
    each = [np.nanmean(of_images(run)) for run in own.each]
    row = {
        "model": _model(name, "cls", input_px=how.get("input_px")),
        "pretrained_on": pretrained_on,
        "task": _task(task, images.name),
        "part": leaderboard.PART[own.role],
        "metric": "Dice",
        **{"score": dice.value, "low": dice.low, "high": dice.high, "runs": len(each)},
        "spread": np.std(each, ddof=1) if len(each) > 1 else np.nan,
        "protocol": _protocol(protocol.decoder if protocol.decoder != "image" else "", "changed" if changed else ""),
        "mpp": own.mpp,
        "n_tiles": len(np.unique(own.reported.row)),
        "n_patients": gain.n_patients,
        "n_quarantined": len(images.quarantined),
        "best_floor": best.name,
        **{"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high, "verdict": gain.verdict},
        "note": "; ".join(filter(None, [own.resampled, roles, f"decoder of {protocol.decoder}"])),
    }
    table = pd.concat([one.summary() for one in (own, *floors)], ignore_index=True).assign(interval=own.resampled)
    beside = {name: value for name, value in confounding.of_masks(own).items() if name in confounding.COLUMNS}
    table.loc[0, list(beside)] = list(beside.values())
    return Evaluated(row | beside, table)


def slide_labels(
    backbone: str | Path,
    slides: SlideSet,
    task: str = "",
    head: str = "abmil",
    protocol: SlideProtocol | None = None,
    pool: str = "cls",
    pretrained_on: str = "not stated",
    name: str = "",
    device: str | None = None,
    layers: int = 1,
    precision: str = "float32",
    folds: int = 0,
    workers: int = 0,
    scheduler: str | None = None,
    **how,
) -> Evaluated:
    """The row of a backbone on slides with labels: balanced accuracy of heads on bags of its features.

    slides    with roles and paths, as `tasks.read` gives them
    head      of `mil.HEADS`; the row says "eva-2026" of abmil, "eva-2026, mean" and so on of the others
    protocol  None: eva's, twenty runs; the row says ", changed" of another
    device, layers, precision   of the backbone, as in `bags.extract`; the heads are trained on that device too
    folds     0: the slides' own roles; else so many folds by site, which each test once: heads and floors are fitted
              anew in each, and the row is of all test slides together
    workers, scheduler   of indexing and of every bag, as in `bags.extract`
    others as in `evaluate`

    Floors are the same head on bags of SLIDE_FLOORS (standardised, or it would hardly be trained) and of random
    weights, pooled as they validate best; chance; and of two classes what size alone (`slide_floors.size_alone`),
    cancer type alone, site alone and both say (`sites.alone`). The row and the table have the AUC too where there are
    two classes, and beside it what the mean of a bag knows of the centre. Raises InputError for folds of slides that
    have roles of their own.
    """
    model, preprocess = backbones.load(backbone, **how)
    evas, name = SlideProtocol(), name or Path(str(backbone)).name
    protocol, sets = protocol or evas, [one for _, one in slides.folds(folds)] if folds else [slides]
    if folds and not slides.split.startswith(OUR_SPLIT):
        raise InputError(f"{slides.name} has {slides.split}; folds are of a CSV of labels without a column role")
    index = SlideIndex.build(slides.cohort(), workers=workers or None, scheduler=scheduler)
    cut = Cut(SLIDE_PX, slides.mpp or SLIDE_MPP, most=SLIDE_TILES.get(leaderboard.plain(task), 0))
    where = {"workers": workers, "scheduler": scheduler}
    made = {"device": device, "layers": layers, "precision": precision, **where}
    own = bags.extract(str(backbone), index, cut, preprocess, pool, name, **made)  # by name, which travels to workers
    twin = f"twin:{backbone}", index, cut, preprocess, backbones.widest(model), "random weights"
    found = {name: [own], "random weights": bags.extract(*twin, **made).pools()}
    found |= {probe.FLOOR_NAMES[floor]: [bags.extract(floor, index, cut, **where)] for floor in SLIDE_FLOORS}
    standard = [one for one in found if one not in (name, "random weights")]
    fits = {
        one: [
            _best(choices, part, head, replace(protocol, standardise=one in standard or protocol.standardise), device)
            for part in sets
        ]
        for one, choices in found.items()
    }
    by = _protocol(head if head != "abmil" else "", "changed" if protocol != evas else "")
    each = [replace(slide_probe.answer(fit), name=one, probe=by, floor=one != name) for one, fit in fits.items()]
    alone = [_alone(fit.bags.slides, part) for fit, part in zip(fits[name], sets, strict=True)]
    alone = {one: pd.concat([said[one] for said in alone]) for one in alone[0]}
    each += [_by_group(each[0], one, said, slides.classes) for one, said in alone.items()]
    full_name = _task(task, slides.name) + (f", {folds} folds by site" if folds else "")
    model_name = _model(name, pool, layers, how.get("input_px"), own.provenance)
    row, table = leaderboard.row_of(each[:1], model_name, pretrained_on, full_name, each[1:]), scores.scores(each)
    if len(slides.classes) == 2:
        areas = _areas(fits, each[0], alone, slides.classes)
        table = table.assign(auc=areas["auc"].to_numpy())
        row |= areas.iloc[0].rename({"low": "auc_low", "high": "auc_high"}).to_dict()
    known = confounding.of_slides(own, role=None if folds else "test")
    table.loc[0, list(confounding.COLUMNS)] = beside = [known[column] for column in confounding.COLUMNS]
    split = f"each slide tests in one of {folds} folds by site" if folds else slides.split
    told = split, head, f"pool {pool}", extractors.compared(own.provenance), known["why"]
    note = leaderboard.noted(full_name, row["note"], *told)
    return Evaluated(row | dict(zip(confounding.COLUMNS, beside, strict=True)) | {"note": note}, table)


def _best(choices: Sequence[Bags], part: SlideSet, head: str, protocol: SlideProtocol, device) -> slide_probe.Fitted:
    """The pooling that validates best, with the roles of a fold."""
    roles = part.table[["slide_id", "role"]]
    return slide_probe.pooled([bag.of(roles) for bag in choices], "label", head, protocol, device or "cpu")


def _alone(slides: pd.DataFrame, part: SlideSet) -> dict[str, pd.Series]:
    """Log-odds by test slide of what needs no tile; of two classes also size, cancer type, site."""
    known = slide_floors.chance(slides)
    if len(part.classes) != 2:
        return known
    there = part.table[part.table["slide_id"].isin(slides["slide_id"])]
    return known | slide_floors.size_alone(slides) | sites.alone(there)


def _by_group(own: Prediction, name: str, said: pd.Series, classes: Sequence[str]) -> Prediction:
    """Log-odds of the last class by slide as answers about the slides of `own`."""
    table = own.table.drop(columns="right")
    answers = np.array(sorted(classes))[(said.loc[table["file"]] > 0).to_numpy(int)]
    return Prediction(name, own.probe, table.assign(predicted=answers), floor=True, quarantined=own.quarantined)


def _areas(
    fits: Mapping[str, Sequence[slide_probe.Fitted]],
    own: Prediction,
    alone: dict[str, pd.Series],
    classes: Sequence[str],
) -> pd.DataFrame:
    """auc, low and high of the heads, and of what is said `alone` of the same test slides; folds are put together."""
    rows = [roc.auc(*slide_probe.asked(fit)) for fit in fits.values()]
    truth, who = own.table["truth"] == max(classes), patients(own.table)
    rows += [roc.auc(truth, said.loc[own.table["file"]].to_numpy(), who) for said in alone.values()]
    return pd.DataFrame(rows).rename(columns={"value": "auc"})[["auc", "low", "high"]]


def robustness(
    backbone: str | Path,
    task: str,
    metadata: str | Path,
    images: str | Path = "",
    pool: str = "cls",
    pretrained_on: str = "not stated",
    name: str = "",
    embeddings: str | Path = "",
    allow_partial: bool = False,
    device: str | None = None,
    layers: int = 1,
    precision: str = "float32",
    **how,
) -> Evaluated:
    """The row of a backbone on one of PathoROB's sets: its robustness index with interval and floors, and no probe.

    metadata, images   folders, as `tasks.pathorob.read` and `tasks.pathorob.tiles` take them
    embeddings         in place of the images, a folder of features made elsewhere, as `tasks.pathorob.embeddings` takes
                       it; the backbone is then but a name
    others as in `evaluate`

    Floors are chance and, of images, DESCRIPTORS and the same network with random weights in each pooling. Raises
    InputError unless one of images and embeddings is given, and what they lack.
    """
    about = tasks.about(task) if isinstance(task, str) else task
    if bool(images) == bool(embeddings):
        raise InputError(f"{about.name} needs the folder of its images, or one of embeddings; give one of the two")
    table, bad, name = tasks.read(about, metadata, allow_partial=allow_partial), 0, name or Path(str(backbone)).name
    full_name, model_name, mpp, note = table.attrs["name"], name, None, "given embeddings: chance is the only floor"
    if embeddings:
        found = {name: pathorob.embeddings(embeddings, table)}
    else:
        tiles = pathorob.tiles(about, table, images)
        model, preprocess = backbones.load(backbone, **how)
        made = {"device": device, "layers": layers, "precision": precision}
        own = extract(model, tiles, preprocess, pool, name, **made)
        twin = extract(random_twin(model), tiles, preprocess, backbones.widest(model), "random weights", **made)
        floors = [extract(floor, tiles, name=probe.FLOOR_NAMES[floor]) for floor in DESCRIPTORS]
        aligned = {one.name: pathorob.align(one.x, tiles, table) for one in (own, *floors, *pools(twin))}
        found, table = {one: x for one, (x, _) in aligned.items()}, aligned[name][1]
        model_name = _model(name, pool, layers, how.get("input_px"), own.provenance)
        mpp, bad = own.provenance["effective_mpp"], len(tiles.quarantined)
        note = "; ".join(filter(None, [f"pool {pool}", extractors.compared(own.provenance)]))
    scored = pathorob.scored(about, found, table)
    once = ~table["file"].duplicated().to_numpy()
    known = confounding.told(found[name][once], table[once])
    first = scored.iloc[0].rename({"robustness_index": "score"})
    row = {
        "model": model_name,
        "pretrained_on": pretrained_on,
        "task": full_name,
        "part": "all",
        "metric": "robustness index",
        **first.drop(["features", "floor"]),
        "protocol": ROBUSTNESS,
        "mpp": mpp,
        "n_quarantined": bad,
        "runs": 1,
        **{column: known[column] for column in confounding.COLUMNS if column != "robustness_index"},
        "note": f"k {pathorob.K[about.name]}; {note}",
    }
    return Evaluated(row, scored)
