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
from pathfm.bags import Cut
from pathfm.benchmarks import TileSet, patients
from pathfm.errors import InputError, nearest
from pathfm.features import Features, extract, random_twin
from pathfm.index import SlideIndex
from pathfm.scores import Prediction
from pathfm.segment import SegmentationProtocol
from pathfm.segmentation import of_images
from pathfm.slide_probe import SlideProtocol
from pathfm.tasks import pathorob, sites
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
    if device and protocol in protocols.PROTOCOLS:
        fit = functools.partial(fit, device=device)
    made = {"device": device, "layers": layers, "precision": precision}
    features = extract(model, tiles, preprocess, pool, name, **made)
    answers = fit(features)
    validated = "validate" in answers.settings and not backbones.only_cls(model)
    floors = probe.floor_predictions(tiles, model if validated else None, preprocess, fit, **made)
    if not validated:  # nothing says which pooling of random weights is best
        twin = fit(extract(random_twin(model), tiles, preprocess, pool, f"random weights ({pool})", **made))
        floors.append(replace(twin, floor=True))
    model_name = _model(name, pool, layers, how.get("input_px"), features.provenance)
    row = leaderboard.row_of([answers], model_name, pretrained_on, _task(task, tiles.name), floors)
    role = answers.settings.get("reported on", "test")
    table = confounding.beside(scores.scores([answers, *floors]), [features], role)
    beside = table.iloc[0][list(confounding.COLUMNS)].to_dict()
    return Evaluated(row | beside | {"note": f"{row['note']}; pool {pool}"}, table)


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
        "n_tiles": len(np.unique(own.reported.row)),
        "n_patients": gain.n_patients,
        "n_quarantined": len(images.quarantined),
        "best_floor": best.name,
        **{"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high, "verdict": gain.verdict},
        "note": "; ".join(filter(None, [own.resampled, roles, f"decoder of {protocol.decoder}"])),
    }
    table = pd.concat([one.summary() for one in (own, *floors)], ignore_index=True)
    return Evaluated(row, table.assign(interval=own.resampled))


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
    **how,
) -> Evaluated:
    """The row of a backbone on slides with labels: balanced accuracy of heads on bags of its features.

    slides    with roles and paths, as `tasks.read` gives them
    head      of `mil.HEADS`; the row says "eva-2026" of abmil, "eva-2026, mean" and so on of the others
    protocol  None: eva's, twenty runs; the row says ", changed" of another
    device, layers, precision   of the backbone, as in `bags.extract`; the heads are trained on that device too
    others as in `evaluate`

    Floors are the same head on bags of SLIDE_FLOORS (standardised, or it would hardly be trained) and of random
    weights; chance; and of two classes what size alone (`slide_floors.size_alone`), cancer type alone, site alone and both say
    (`sites.alone`). The row and the table have the AUC too where there are two classes.
    """
    model, preprocess = backbones.load(backbone, **how)
    evas, name = SlideProtocol(), name or Path(str(backbone)).name
    protocol = protocol or evas
    index = SlideIndex.build(slides.cohort())
    cut = Cut(SLIDE_PX, slides.mpp or SLIDE_MPP, most=SLIDE_TILES.get(leaderboard.plain(task), 0))
    made = {"device": device, "layers": layers, "precision": precision}
    found = {
        name: bags.extract(model, index, cut, preprocess, pool, name, **made),
        "random weights": bags.extract(random_twin(model), index, cut, preprocess, pool, "random weights", **made),
    }
    by_pixels = {probe.FLOOR_NAMES[floor]: bags.extract(floor, index, cut) for floor in SLIDE_FLOORS}
    standard = replace(protocol, standardise=True)
    fits = {one: slide_probe.fit(bag, "label", head, protocol, device or "cpu") for one, bag in found.items()}
    for one, bag in by_pixels.items():
        fits[one] = slide_probe.fit(replace(bag, name=one), "label", head, standard, device or "cpu")
    own, *floors = [replace(fit.answer(), floor=one != name) for one, fit in fits.items()]
    alone = slide_floors.chance(found[name].slides)
    if len(slides.classes) == 2:
        alone |= slide_floors.size_alone(found[name].slides) | sites.alone(slides.table)
    floors += [_by_group(own, one, said, slides.classes) for one, said in alone.items()]
    by = _protocol(head if head != "abmil" else "", "changed" if protocol != evas else "")
    own, *floors = [replace(one, probe=by) for one in (own, *floors)]
    model_name = _model(name, pool, layers, how.get("input_px"), found[name].provenance)
    row = leaderboard.row_of([own], model_name, pretrained_on, _task(task, slides.name), floors)
    table, told = scores.scores([own, *floors]), [row["note"], slides.split, head, f"pool {pool}"]
    if len(slides.classes) == 2:
        areas = _areas(list(fits.values()), own, alone, slides.classes)
        table = table.assign(auc=areas["auc"].to_numpy())
        row |= areas.iloc[0].rename({"low": "auc_low", "high": "auc_high"}).to_dict()
    return Evaluated(row | {"note": "; ".join(filter(None, told))}, table)


def _by_group(own: Prediction, name: str, said: pd.Series, classes: Sequence[str]) -> Prediction:
    """Log-odds of the last class by slide as answers about the slides of `own`."""
    table = own.table.drop(columns="right")
    answers = np.array(sorted(classes))[(said.loc[table["file"]] > 0).to_numpy(int)]
    return Prediction(name, own.probe, table.assign(predicted=answers), floor=True, quarantined=own.quarantined)


def _areas(
    fits: Sequence[slide_probe.Fitted], own: Prediction, alone: dict[str, pd.Series], classes: Sequence[str]
) -> pd.DataFrame:
    """auc, low and high of the heads, and of what is said `alone` of the same test slides."""
    truth, who = own.table["truth"] == max(classes), patients(own.table)
    rows = [roc.auc(truth, said.loc[own.table["file"]].to_numpy(), who) for said in alone.values()]
    found = pd.DataFrame(rows, columns=roc.AUC._fields).rename(columns={"value": "auc"})
    return pd.concat([slide_probe.table(fits), found], ignore_index=True)[["auc", "low", "high"]]


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
) -> dict:
    """The row of a backbone on one of PathoROB's sets: its robustness index, and no probe.

    metadata, images   folders, as `tasks.pathorob.read` and `tasks.pathorob.tiles` take them
    embeddings         in place of the images, a folder of features made elsewhere, as `tasks.pathorob.embeddings` takes
                       it; the backbone is then but a name
    others as in `evaluate`

    Raises InputError unless one of images and embeddings is given, and what they lack.
    """
    about = tasks.about(task) if isinstance(task, str) else task
    if bool(images) == bool(embeddings):
        raise InputError(f"{about.name} needs the folder of its images, or one of embeddings; give one of the two")
    table, bad, name = tasks.read(about, metadata, allow_partial=allow_partial), 0, name or Path(str(backbone)).name
    full_name, note = table.attrs["name"], "given embeddings"
    if embeddings:
        x = pathorob.embeddings(embeddings, table)
    else:
        tiles = pathorob.tiles(about, table, images)
        model, preprocess = backbones.load(backbone, **how)
        found = extract(model, tiles, preprocess, pool, device=device, layers=layers, precision=precision)
        x, table = pathorob.align(found.x, tiles, table)
        name = _model(name, pool, layers, how.get("input_px"), found.provenance)
        bad, note = len(tiles.quarantined), f"pool {pool}"
    found = pathorob.robustness(about, x, table)
    return {
        "model": name,
        "pretrained_on": pretrained_on,
        "task": full_name,
        "part": "all",
        "metric": "robustness index",
        "score": found["robustness_index"],
        "protocol": ROBUSTNESS,
        "n_tiles": found["n"],
        "n_quarantined": bad,
        "runs": 1,
        "note": f"k {found['k']}; {note}",
    }
