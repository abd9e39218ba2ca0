"""The public tasks: what is known of each, and its files as tiles, masks or slides with roles.

tasks.about("bach")                     all that is known, with sources and what is unknown
tasks.table()                           a row a task; `contamination()` of it what models may have seen
tasks.read("crc", folder)               a TileSet with roles by the official split; split="clean" for the other
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from pathfm.errors import InputError, nearest
from pathfm.tasks import checks
from pathfm.tasks.catalogue import TILES
from pathfm.tasks.catalogue_nuclei import NUCLEI
from pathfm.tasks.catalogue_slides import ROBUSTNESS, SLIDES
from pathfm.tasks.task import KINDS, SOURCES_OF_TISSUE, SPLITS, Task

TASKS = {task.name: task for task in (*TILES, *NUCLEI, *SLIDES, *ROBUSTNESS)}

__all__ = ["KINDS", "SPLITS", "TASKS", "Task", "about", "contamination", "read", "table"]


def about(name: str) -> Task:
    """The task of that name; printed, it says all that is known. Raises InputError for an unknown name."""
    if name not in TASKS:
        raise InputError(f"no task '{name}'.{nearest(name, TASKS)}")
    return TASKS[name]


def table(kind: str | None = None) -> pd.DataFrame:
    """A row a task, of one kind or all: classes, scale, images in each split, licence, overlaps; "?" is unknown."""
    if kind is not None and kind not in KINDS:
        raise InputError(f"no kind of task '{kind}'.{nearest(kind, KINDS)}")
    return pd.DataFrame([task.row() for task in TASKS.values() if kind in (None, task.kind)])


def contamination() -> pd.DataFrame:
    """task, TCGA, GTEx, CAMELYON, why: are its patients or slides in what models are pretrained on? Why unknown?"""
    shown = table()[["task", *SOURCES_OF_TISSUE]]
    return shown.assign(why=[task.unknown.get("TCGA", "") for task in TASKS.values()])


def read(name: str | Task, folder: str | Path, split: str = "official", allow_partial: bool = False, **how) -> Any:
    """The data of a task: a TileSet, NucleiSet or SlideSet with roles, or PathoROB's table of tiles.

    name           of the task, or a Task with other counts
    folder         that holds what `about(name)` lists under files; of label tables the CSV
    split          "official": as eva has it; without a role test its score is of `validate`, which it was stopped on.
                   "clean": another where the official protocol stops and reports on the same images
    allow_partial  a partial download is read, and called partial in the name; otherwise it is an error
    how            run=3 (pcam_10shot), slides=folder and seed (label tables), mpp and patient (folder), mpp (masks)

    Raises InputError for an unknown name or split, a layout or names that are not the task's (and what was expected
    where), a partial download (and what is missing), a class that is absent from a role or single in it.
    """
    task = name if isinstance(name, Task) else about(name)
    if split not in SPLITS:
        raise InputError(f"no split '{split}' of {task.name}.{nearest(split, SPLITS)}")
    if task.reader == "any":
        return _any(task, folder, **how)
    reader: Callable = importlib.import_module(f"pathfm.tasks.{task.reader}").read
    try:
        return reader(task, folder, split, allow_partial, **how)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise InputError(f"{task.name} takes none of {', '.join(how)} ({error})") from None
        raise


def _any(task: Task, folder: str | Path, **how) -> Any:
    from pathfm.benchmarks import TileSet
    from pathfm.tasks import nuclei

    if task.name == "masks":
        return nuclei.from_folder(folder, **how)
    tiles = TileSet.from_folder(folder, **how)
    checks.classes(str(folder), tiles.table)
    return tiles


def with_counts(name: str, counts: dict[tuple[str | None, str | None], int]) -> Task:
    """The task with other expected counts, for copies that are known to be smaller; read it instead of the name."""
    return replace(about(name), counts=counts)
