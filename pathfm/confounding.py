"""What features know that they should not: centre and slide, told beside a score on the same test tiles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pathfm import metrics
from pathfm.benchmarks import TileSet, patients
from pathfm.errors import InputError
from pathfm.features import Features

if TYPE_CHECKING:
    from pathfm.bags import Bags
    from pathfm.segment import Segmented

K = 20  # neighbours of the robustness index and of the centre's name
COLUMNS = ("robustness_index", "centre_identity", "centre_chance", "slide_dependence")


def of(features: Features, role: str | None = "test", k: int = K, seed: int = 0) -> dict:
    """`told` of the tiles of a role, or of all. Raises InputError for a role that none has."""
    rows = np.ones(len(features), bool) if role is None else _of_role(features, role)
    places = features.tiles.xy_um
    return told(features.x[rows], features.table[rows], None if places is None else places[rows], k, seed)


def of_slides(bags: Bags, label: str = "label", role: str | None = "test", k: int = K, seed: int = 0) -> dict:
    """`told` of the slides of a role, or of all, each the mean of its bag: one vector a slide."""
    slides = bags.slides.assign(label=bags.slides[label].astype(str))
    rows = np.ones(len(slides), bool) if role is None else (slides["role"] == role).to_numpy()
    table = slides[rows].assign(patient_id=patients(slides[rows])).drop(columns="slide_id")
    found = told(bags.subset(rows).means(), table, None, k, seed)
    why = "slide dependence is n/a of one vector a slide"
    return found | {"why": "; ".join(filter(None, [found["why"], why]))}


def of_masks(model: Segmented, k: int = K, seed: int = 0) -> dict:
    """`told` of the reported pieces: the mean of its tokens, under the class of most of its nuclei's pixels.

    A piece without nuclei is left out. Raises InputError for what has no tokens, such as the floors.
    """
    if model.tokens is None:
        raise InputError(f"'{model.name}' has no tokens; ask what a network was segmented from")
    n = len(model.images.classes)
    counts = np.stack([np.bincount(mask.ravel(), minlength=n)[1:] for mask in model.reported.masks])
    rows = counts.sum(axis=1) > 0
    label = np.array(model.images.classes[1:])[counts[rows].argmax(axis=1)]
    return told(
        model.tokens[rows], model.images.table.iloc[model.reported.row[rows]].assign(label=label), None, k, seed
    )


def told(x: np.ndarray, table: pd.DataFrame, xy_um: np.ndarray | None = None, k: int = K, seed: int = 0) -> dict:
    """COLUMNS of features (N, D): see `metrics.robustness_index`, `centre_identity`, `slide_dependence`.

    table  a row each: label, and where known patient_id, slide_id, centre
    xy_um  (N, 2) places on the slides
    k      neighbours
    seed   of the draw that gives every class and centre the same number of tiles

    What the tiles cannot tell is NaN, and `why` says so: the index needs classes in two centres, the centre's name two
    centres, and dependence on slides two slides; all but the last need patients or slides to keep apart. Tiles of an
    unknown centre are asked of their slide alone.
    """
    x, table = np.asarray(x), table.reset_index(drop=True)
    who, found, why = patients(table), dict.fromkeys(COLUMNS, np.nan), []
    one_class = table["label"].nunique() < 2
    there = table["centre"].fillna("").ne("").to_numpy() if "centre" in table else np.zeros(len(table), bool)
    if who is None or not there.any():
        why.append("no patients or slides are known" if who is None else "no centres are known")
    else:
        label, centre = (table.loc[there, column].to_numpy(str) for column in ("label", "centre"))
        index = metrics.robustness_index(x[there], label, centre, who[there], (k,), seed).iloc[0]
        reason = "all are of one class" if one_class else index["reason"]
        found["robustness_index"] = np.nan if reason else float(index["robustness_index"])
        why += [reason] if reason else []
        if len(np.unique(centre)) > 1:
            named = metrics.centre_identity(x[there], centre, who[there], k)
            found["centre_identity"], found["centre_chance"] = named.value, named.chance
    if "slide_id" in table and table["slide_id"].nunique() > 1 and not one_class:
        found["slide_dependence"] = metrics.slide_dependence(x, table["label"], table["slide_id"], xy_um).dependence
    return {**found, "why": "; ".join(why)}


def asked(tiles: TileSet) -> str | None:
    """The `role` that tells of centres: "test" where its tiles come from two centres, else None, all tiles."""
    test = tiles.table["role"] == "test" if "role" in tiles.table else np.zeros(len(tiles), bool)
    return "test" if "centre" in tiles.table and tiles.table.loc[test, "centre"].nunique() > 1 else None


def beside(scores: pd.DataFrame, features: Iterable[Features], role: str | None = "test", k: int = K) -> pd.DataFrame:
    """A table of `scores.scores` with COLUMNS of the features that each row was probed on, NaN where none are given.

    Features are known by their name. Raises InputError where none of them is in the table.
    """
    known = {one.name: of(one, role, k) for one in features}
    unknown = set(known) - set(scores["features"])
    if unknown:
        raise InputError(
            f"no score is of features '{min(unknown)}'; there are {', '.join(scores['features'].unique())}"
        )
    told = [known.get(name, dict.fromkeys(COLUMNS, np.nan)) for name in scores["features"]]
    return scores.assign(**{column: [one[column] for one in told] for column in COLUMNS})


def _of_role(features: Features, role: str) -> np.ndarray:
    if "role" not in features.table or not (features.table["role"] == role).any():
        raise InputError(f"no tile of {features.tiles.name} has the role {role}; draw roles, or take role=None")
    return (features.table["role"] == role).to_numpy()
