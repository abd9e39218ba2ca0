"""Does it carry over: what a probe or a decoder reads from a teacher, and from its floors, on real tissue."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from pathfm import mask_floors, probe, scores, segment, tasks
from pathfm.benchmarks import TileSet, patient_column
from pathfm.features import extract
from pathfm.scores import Prediction
from pathfm.segment import SegmentationProtocol, Segmented
from pathfm.segmentation import DECODERS
from pathfm.storage import checkout
from pathfm.tasks.nuclei import NucleiSet

FOLDS = 5
GROUP = "magnification"  # a column of some tile sets
FLOORS = {"colour": "colour", "colour + LBP": "colour+lbp"}  # name in the answers -> of `features.extract`
WITHIN = ", within"  # after the name of features whose probe saw one magnification at a time


def test_data(part: str) -> Path | None:
    """A folder of the project's real test data, such as "nuclei/dsb2018_he"; None on a machine without it.

    $PATHFM_TEST_DATA, else shared/data beside the checkout.
    """
    given = os.environ.get("PATHFM_TEST_DATA")
    folder = Path(given).expanduser() if given else (checkout() or Path.cwd()).parent / "shared" / "data"
    return folder / part if (folder / part).is_dir() else None


def read_tiles(folder: str | Path, block: str = "block") -> TileSet:
    """Labelled tiles; where neither patient nor slide is known, those of one `block` stay on one side of a split.

    A block is a run of images that were likely taken together: consecutive numbers, say.
    """
    tiles = TileSet.from_folder(folder)
    if patient_column(tiles.table) is None and block in tiles.table:
        return replace(tiles, table=tiles.table.assign(slide_id=tiles.table[block]))
    return tiles


def read_nuclei(folder: str | Path, block: str = "cluster", seed: int = 0) -> NucleiSet:
    """Images with nuclei and roles for a decoder; images of one `block`, alike in stain and scale, share a role."""
    images = tasks.read("masks", folder)
    if patient_column(images.table) is None and block in images.table:
        images = replace(images, table=images.table.assign(slide_id=images.table[block].astype(str)))
    return images.split("tile" if patient_column(images.table) is None else "patient", seed)


def decoded(
    networks: Mapping[str, nn.Module], preprocess: Callable, images: NucleiSet, protocol: SegmentationProtocol
) -> dict[str, list[Segmented]]:
    """Both of eva's decoders, "image" and "tokens", on every network by name; under "none" the floors of masks.

    protocol  of every decoder, but for which it is
    """
    found = {
        decoder: [
            segment.fit(network, images, replace(protocol, decoder=decoder), preprocess, name)
            for name, network in networks.items()
        ]
        for decoder in DECODERS
    }
    return found | {"none": mask_floors.floors(images, protocol)}


def dice_table(found: Mapping[str, list[Segmented]], start: str = "random weights") -> pd.DataFrame:
    """A row a decoder and network of `decoded`: Dice, and the gain over the network `start`, with intervals by image.

    By image they are too narrow: images of one patient, or of one stain, resemble each other.
    """
    rows = []
    for decoder, several in found.items():
        several = [by_image(one) for one in several]
        first = next((one for one in several if one.name == start), None)
        for one in several:
            dice, kind = one.interval(), dict(zip(one.images.classes, np.nanmean(one.each, axis=(0, 1)), strict=True))
            row = {"decoder": decoder, "features": one.name, "dice": dice.value, "low": dice.low, "high": dice.high}
            if first is not None and one is not first:
                gain = one.gain(first)
                row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            row |= kind | {"role": one.role, "runs": len(one.each), "n_images": len(np.unique(one.reported.row))}
            rows.append(row | {"n_quarantined": len(one.images.quarantined)})
    return pd.DataFrame(rows)


def by_image(one: Segmented) -> Segmented:
    """The same without what is known of patients or groups: its intervals are drawn over images."""
    table = one.images.table.drop(columns=["patient_id", "slide_id"], errors="ignore")
    return replace(one, images=replace(one.images, table=table))


def judged(
    teacher: nn.Module, start: nn.Module, preprocess: Callable, tiles: TileSet, seed: int = 0
) -> list[Prediction]:
    """Every tile answered by five-fold probes on teacher, random weights, colour and colour + LBP.

    teacher, start  backbones; of both CLS and mean of the patch tokens, nothing chosen
    seed            of the pretraining behind both

    Where tiles have a column `magnification`, each features' second answers, named with WITHIN, come from probes that
    saw one magnification alone.
    """
    found = {
        "teacher": extract(teacher, tiles, preprocess, "both"),
        "random weights": extract(start, tiles, preprocess, "both"),
        **{name: extract(floor, tiles) for name, floor in FLOORS.items()},
    }
    fit = functools.partial(probe.linear, seed=seed)
    answers = []
    for name, features in found.items():
        features = replace(features, name=name)
        answers.append(probe.cross_validate(features, fit, "patient", FOLDS))
        if GROUP in tiles.table:
            within = probe.cross_validate_within(features, GROUP, fit, by="patient", n=FOLDS)
            answers.append(replace(within, name=name + WITHIN))
    return [replace(one, floor=not one.name.startswith("teacher")) for one in answers]


def table(said: dict[str, list[Prediction]], teacher: str = "teacher") -> pd.DataFrame:
    """A row for what the probes saw and where they are tested: scores, and the teacher's gain over random weights.

    said     recorded answers of `judged` by name, a seed each (`study.recorded_answers`)
    teacher  its name there
    """
    rows = []
    for seen, suffix in (("one magnification", WITHIN), ("all tiles", "")):
        names = {"teacher": teacher, **{name: name for name in ("random weights", *FLOORS)}}
        runs = {shown: said[name + suffix] for shown, name in names.items() if name + suffix in said}
        for place in _places(runs["teacher"][0].table) if runs else ():
            at = {name: [_at(one, place) for one in several] for name, several in runs.items()}
            means = {name: scores.interval(several).value for name, several in at.items()}
            gain = scores.paired(at["teacher"], at["random weights"])
            rows.append(
                {"probe saw": seen, "tested on": place, **means, "gain": gain.value, "low": gain.low, "high": gain.high}
                | {"tiles": len(at["teacher"][0].table), "blocks": gain.n_patients, "verdict": gain.verdict}
            )
    return pd.DataFrame(rows)


def _places(table: pd.DataFrame) -> list[str]:
    return [*(sorted(table[GROUP].unique()) if GROUP in table else ()), "all tiles"]


def _at(one: Prediction, place: str) -> Prediction:
    return one if place == "all tiles" else replace(one, table=one.table[one.table[GROUP] == place])
