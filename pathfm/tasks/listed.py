"""MHIST: images in one folder, their labels and splits in a CSV beside it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pathfm.benchmarks import SUFFIXES, TileSet
from pathfm.errors import InputError
from pathfm.tasks import checks
from pathfm.tasks.folders import tile_set
from pathfm.tasks.task import Task

COLUMNS = {"Image Name": "name", "Majority Vote Label": "label", "Partition": "split"}
VOTES = "Number of Annotators who Selected SSA (Out of 7)"
PARTITIONS = {"train": "train", "test": "val"}  # eva validates on the official test images, and reports on them


def read(task: Task, folder: str | Path, split: str = "official", allow_partial: bool = False) -> TileSet:
    """annotations.csv and images/. An image that is listed and not there counts as missing, one there and not listed
    as of another data set. Where the CSV has them, column votes is how many of seven pathologists said SSA.
    """
    folder = checks.root(task, folder, ("annotations.csv", "images"))
    table = csv_table(folder / "annotations.csv", COLUMNS)
    table["file"] = "images/" + table["name"]
    table["path"] = [str(folder / file) for file in table["file"]]
    odd = sorted((set(table["label"]) - set(task.classes)) | (set(table["split"]) - set(PARTITIONS)))
    if odd:
        raise InputError(f"{folder / 'annotations.csv'} says '{odd[0]}', which is no label or partition of {task.name}")
    there = {path.name for path in (folder / "images").iterdir() if path.suffix.lower() in SUFFIXES}
    checks.named(task, list(there), sorted(there - set(table["name"])), folder / "images")
    table["split"] = table["split"].map(PARTITIONS)
    table = table.rename(columns={VOTES: "votes"})[table["name"].isin(there)].drop(columns="name")
    note = checks.partial(task, table, folder, allow_partial)
    return tile_set(task, table.sort_values("file", ignore_index=True), split, note, folder)


def csv_table(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """A CSV as text with the columns renamed. Raises InputError for what is no table or lacks or leaves one empty."""
    try:
        table = pd.read_csv(path, dtype=str, encoding="utf-8-sig", keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table ({error})") from None
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{path} has no column '{missing[0]}'; found: {', '.join(map(str, table.columns))}")
    table = table.rename(columns=columns)
    names = list(columns.values())
    if table.empty:
        raise InputError(f"{path} lists nothing")
    if table[names].isna().any(axis=None):
        column = table[names].isna().any().idxmax()
        raise InputError(f"{path}: line {table[column].isna().argmax() + 2} has no {column}")
    twice = table[names[0]].duplicated()
    if twice.any():
        raise InputError(f"{path} lists {table[names[0]][twice].iloc[0]} twice")
    return table
