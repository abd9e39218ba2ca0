"""What features know that they should not: centre and slide, told beside a score on the same test tiles."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from pathfm import metrics
from pathfm.benchmarks import TileSet, patients
from pathfm.errors import InputError
from pathfm.features import Features

K = 20  # neighbours of the robustness index and of the centre's name
COLUMNS = ("robustness_index", "centre_identity", "centre_chance", "slide_dependence")


def of(features: Features, role: str | None = "test", k: int = K, seed: int = 0) -> dict:
    """COLUMNS of the tiles of a role, or of all: see `metrics.robustness_index`, `centre_identity`, `slide_dependence`.

    k     neighbours
    seed  of the draw that gives every class and centre the same number of tiles

    What the tiles cannot tell is NaN, and `why` says so: the index needs classes in two centres, the centre's name two
    centres, and dependence on slides two slides; all but the last need patients or slides to keep apart.
    """
    rows = np.ones(len(features), bool) if role is None else _of_role(features, role)
    table, x = features.table[rows].reset_index(drop=True), np.asarray(features.x[rows])
    who, found, why = patients(table), dict.fromkeys(COLUMNS, np.nan), []
    if who is None or "centre" not in table:
        why.append("no patients or slides are known" if who is None else "no centres are known")
    else:
        label, centre = table["label"].to_numpy(str), table["centre"].to_numpy(str)
        index = metrics.robustness_index(x, label, centre, who, (k,), seed).iloc[0]
        found["robustness_index"] = float(index["robustness_index"])
        why += [index["reason"]] if index["reason"] else []
        if len(np.unique(centre)) > 1:
            named = metrics.centre_identity(x, centre, who, k)
            found["centre_identity"], found["centre_chance"] = named.value, named.chance
    if "slide_id" in table and table["slide_id"].nunique() > 1:
        places = features.tiles.xy_um
        places = None if places is None else places[rows]
        found["slide_dependence"] = metrics.slide_dependence(x, table["label"], table["slide_id"], places).dependence
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
