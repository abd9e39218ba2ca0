"""Answers of probes as one table, a row a test tile: what a run records so that any contrast can be drawn later."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from pathfm.errors import InputError
from pathfm.scores import Prediction, same_tiles
from pathfm.storage import atomic

# What is kept of a tile, where it is known.
TILE = ("file", "slide_id", "patient_id", "centre", "magnification", "truth")


def table(predictions: Iterable[Prediction]) -> pd.DataFrame:
    """A row a tile: what is known of it, then a column "<features>|<probe>|<seed>" of answers for each prediction.

    Of a probe that was fitted several times "<features>|<probe>|<seed>|right" has the share of its fits that are right:
    its score is theirs, and not that of the answers that most of them give. Raises InputError where two predictions
    were tested on different tiles.
    """
    predictions = list(predictions)
    first = predictions[0].table
    wide = first[[name for name in TILE if name in first]].reset_index(drop=True)
    for one in predictions:
        same_tiles(predictions[0], one)
        key = f"{one.name}|{one.probe}|{one.seed}"
        wide[key] = one.table["predicted"].to_numpy(str)
        if "right" in one.table:
            wide[f"{key}|right"] = one.table["right"].to_numpy(float)
    return wide


def write(folder: str | Path, predictions: Iterable[Prediction], name: str = "answers") -> None:
    """`table` as <folder>/<name>.csv, for a sweep to collect; an empty folder name writes nothing."""
    if folder:
        write_table(Path(folder) / f"{name}.csv", table(predictions))


def write_table(path: Path, wide: pd.DataFrame) -> Path:
    """`wide` as a CSV file, whole or not at all."""
    with atomic(path, "w") as file:
        wide.to_csv(file, index=False)
    return path


def merged(folders: Iterable[Path], name: str = "answers") -> pd.DataFrame | None:
    """The answers of that name of several runs, side by side; None where none wrote any.

    Columns that agree are kept once. Raises InputError where runs were tested on different tiles, or give one name two
    meanings.
    """
    paths = [folder / f"{name}.csv" for folder in folders]
    tables = [pd.read_csv(path, dtype=str) for path in paths if path.is_file()]
    if not tables:
        return None
    wide = tables[0]
    for other in tables[1:]:
        known = [name for name in other if name in wide]
        if len(other) != len(wide) or not other[known].equals(wide[known]):
            differ = next((name for name in known if list(other[name]) != list(wide[name])), "file")
            raise InputError(f"runs of one sweep differ in '{differ}'; they were not tested alike")
        wide = wide.join(other.drop(columns=known))
    return wide


def read(wide: pd.DataFrame) -> dict[str, list[Prediction]]:
    """The predictions of a `table`, by name of the features; those of one name differ in their seed."""
    about = [name for name in wide if "|" not in name]
    found: dict[str, list[Prediction]] = {}
    for column in wide:
        if column.count("|") == 2:
            name, probe, seed = column.split("|")
            rows = wide[about].assign(predicted=wide[column])
            if f"{column}|right" in wide:
                rows = rows.assign(right=wide[f"{column}|right"].astype(float))
            found.setdefault(name, []).append(Prediction(name, probe, rows, int(seed)))
    return found
