"""Tile tasks that unpack to trees of images: labels, patients and splits stand in the paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from pathfm import gdc
from pathfm.benchmarks import SUFFIXES, TileSet, decode_all, draw_roles, patient_column
from pathfm.errors import InputError
from pathfm.tasks import checks
from pathfm.tasks.task import ROLE, Task

VALIDATE = {"probe-train": 0.8, "validate": 0.2}  # of the official training split, for a clean one; ours


@dataclass(frozen=True)
class Layout:
    """How to read the paths of one data set.

    parts    folders that must be there, below the one given
    pattern  of a path below the folder, with named groups: label; where known split, patient, slide
    ignored  pattern of images that belong to the data set and not to the task
    split    official split by what the group split says
    label    class by what the group label says, where the two differ
    assign   columns to add to the table, such as the split where no path says it
    """

    parts: tuple[str, ...]
    pattern: str
    ignored: str = r"(?!)"
    split: Mapping[str, str] = field(default_factory=dict)
    label: Mapping[str, str] = field(default_factory=dict)
    assign: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table


# eva 73b61a7, classification/bach.py: half-open ranges of the images in order of class and number, chosen so that
# no patient is in "train" and "val". Two ranges of "train" may still share one: image 59 alone was left there.
BACH_STARTS = (0, 41, 59, 60, 90, 100, 139, 169, 200, 240, 258, 260, 273, 300, 345, 368)
BACH_VAL = (41, 60, 139, 240, 260, 345)  # first images of the ranges that are "val"
BACH_CLEAN = (90, 169, 273, 368)  # of the training ranges, those that validate in the clean split; ours

# eva 73b61a7, classification/breakhis.py
BREAKHIS_VAL = (
    "18842D", "19979", "15275", "15792", "16875", "3909", "5287", "16716", "2773", "5695", "16184CD", "23060CD",
    "21998CD", "21998EF",
)  # fmt: skip


def _bach(table: pd.DataFrame) -> pd.DataFrame:
    """Split and block from the number in the file's name; a partial download keeps the right ones."""
    first = table["label"].map({"Benign": 0, "InSitu": 100, "Invasive": 200, "Normal": 300})
    place = first + table["number"].astype(int) - 1
    start = np.array(BACH_STARTS)[np.searchsorted(BACH_STARTS, place, side="right") - 1]
    return table.drop(columns="number").assign(split=np.where(np.isin(start, BACH_VAL), "val", "train"), block=start)


def _breakhis(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(split=np.where(table["patient_id"].isin(BREAKHIS_VAL), "val", "train"))


def _gleason(table: pd.DataFrame) -> pd.DataFrame:
    """The tissue microarray decides: ZT76 validates, ZT80 tests. A core is a patient."""
    array = table["patient_id"].str.split("_").str[0]
    return table.assign(split=array.map({"ZT76": "val", "ZT80": "test"}).fillna("train"))


def of_tcga(table: pd.DataFrame) -> pd.DataFrame:
    """Source site and institution by the patient's barcode; an institution that GDC's table lacks goes by its code."""
    site = table["patient_id"].fillna("").str[5:7]
    return table.assign(site=site, centre=site.map(gdc.source_sites()["centre"]).fillna(site))


def _msi(cancer: str) -> Layout:
    return Layout(
        parts=(),
        pattern=rf"{cancer}_(?P<split>TRAIN|TEST)(?:_(?P<zip>MSIMUT|MSS))?/(?P<label>MSIMUT|MSS)/"
        r"blk-[A-Z]+-(?P<slide>(?P<patient>TCGA-\w{2}-\w{4})-\w+-\w+-\w+)\.(?:png|jpg)",
        ignored=rf"(?!{cancer}_).*",  # the other cancer of the record
        split={"TRAIN": "train", "TEST": "test"},
        assign=lambda table: of_tcga(table).assign(cancer_type={"CRC_DX": "CRC"}.get(cancer, cancer)),
    )


LAYOUTS = {
    "bach": Layout(
        parts=("ICIAR2018_BACH_Challenge/Photos",),
        pattern=r"ICIAR2018_BACH_Challenge/Photos/(?:(?P<label>Benign)/b|(?P<label2>InSitu)/is|(?P<label3>Invasive)/iv|"
        r"(?P<label4>Normal)/n)(?P<number>0\d[1-9]|0[1-9]0|100)\.tif",
        assign=_bach,
    ),
    "crc": Layout(
        parts=("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"),
        pattern=r"(?P<split>NCT-CRC-HE-100K|CRC-VAL-HE-7K)/(?P<label>[A-Z]+)/(?P=label)-(?:TCGA-)?[A-Z]{8}\.tif",
        split={"NCT-CRC-HE-100K": "train", "CRC-VAL-HE-7K": "val"},
    ),
    "crc_nonorm": Layout(
        parts=("NCT-CRC-HE-100K-NONORM", "CRC-VAL-HE-7K"),
        pattern=r"(?P<split>NCT-CRC-HE-100K-NONORM|CRC-VAL-HE-7K)/(?P<label>[A-Z]+)/(?P=label)-(?:TCGA-)?[A-Z]{8}\.tif",
        split={"NCT-CRC-HE-100K-NONORM": "train", "CRC-VAL-HE-7K": "val"},
    ),
    "bracs": Layout(
        parts=tuple(f"BRACS_RoI/latest_version/{split}" for split in ("train", "val", "test")),
        pattern=r"BRACS_RoI/latest_version/(?P<split>train|val|test)/(?P<label>\d_(?P<code>[A-Z]+))/"
        r"(?P<slide>BRACS_\d+)_(?P=code)_\d+\.png",
    ),
    "breakhis": Layout(
        parts=("BreaKHis_v1/histology_slides/breast",),
        pattern=r"BreaKHis_v1/.*/40X/SOB_[BM]_(?P<label>TA|MC|F|DC)-\d\d-(?P<patient>[^-/]+)-40-\d+\.png",
        ignored=r"BreaKHis_v1/.*/(?:(?:100|200|400)X/.*|40X/SOB_[BM]_(?:A|PT|LC|PC)-.*)",
        assign=_breakhis,
    ),
    "gleason": Layout(
        parts=("train_validation_patches_750", "test_patches_750/patho_1"),
        pattern=r"(?:train_validation_patches_750|test_patches_750/patho_1)/"
        r"(?P<patient>ZT(?:76|80|111|199|204)_\d+_[A-Z]_\d+_\d+)/(?P=patient)_patch_\d+_class_(?P<label>[0-3])\.jpg",
        ignored=r"test_patches_750/patho_2/.*",
        label={"0": "benign", "1": "gleason_3", "2": "gleason_4", "3": "gleason_5"},
        assign=_gleason,
    ),
    "til": Layout(
        parts=("TCGA-TILs/images-tcga-tils",),
        pattern=r"TCGA-TILs/images-tcga-tils/(?!pancancer/)(?P<cancer_type>[^/]+)/(?P<split>train|val|test)/"
        r"(?P<label>til-negative|til-positive)/(?:(?P<patient>TCGA-\w{2}-\w{4})[^/]*|[^/]+)\.png",
        ignored=r"TCGA-TILs/images-tcga-tils/pancancer/.*",  # where ChampKit links all of them a second time
        assign=of_tcga,
    ),
    "msi_crc": _msi("CRC_DX"),
    "msi_stad": _msi("STAD"),
}


def read(task: Task, folder: str | Path, split: str = "official", allow_partial: bool = False) -> TileSet:
    """The TileSet of one of LAYOUTS, with roles; every image is decoded once."""
    layout = LAYOUTS[task.name]
    folder = checks.root(task, folder, layout.parts)
    table = _listed(task, layout, folder)
    note = checks.partial(task, table, folder, allow_partial)
    return tile_set(task, table, split, note, folder)


def tile_set(
    task: Task,
    table: pd.DataFrame,
    split: str,
    note: str,
    folder: Path,
    make: type[TileSet] = TileSet,
    check: Callable = decode_all,
    only: Collection[str] | None = None,
) -> TileSet:
    """Decodes the images of a table with columns file, path, label and split, and gives them roles.

    make, check  of a TileSet whose images are no files
    only         the files to keep, of all that are decoded: a draw does not decode the others again
    """
    if split == "official":
        table = table[~table["split"].isin(task.left_out)].reset_index(drop=True)
    good, bad = checks.decoded(table, check)
    if only is not None:
        good, bad = (one[one["file"].isin(only)].reset_index(drop=True) for one in (good, bad))
    lost = sorted(set(table["label"]) - set(good["label"]))
    if lost:
        reason = bad.loc[bad["label"] == lost[0]].iloc[0]
        raise InputError(f"{task.name}: no image of class {lost[0]} decodes ({reason.file}: {reason.reason})")
    good = with_roles(task, good, split).assign(mpp=np.nan if task.mpp is None else task.mpp)
    checks.classes(f"{task.name} in {folder}", good, task.classes)
    leaky = _crosses(good)
    clean = " (clean split)" if split == "clean" and task.clean else ""
    notes = [note, "patients on two sides" if leaky else ""]
    return make(", ".join(filter(None, [task.name + clean, *notes])), good, bad, leaky=leaky)


def with_roles(task: Task, table: pd.DataFrame, split: str) -> pd.DataFrame:
    """The table with column role from its column split (train, val, test).

    official  val is `validate`; without a test split the official protocol reports on it too
    clean     what the protocol reports on is `test`, and without another val a part of train is `validate`: by
              patient, by block or else by image. No patient is on two sides, whatever the official split does
    """
    official = table.assign(role=table["split"].map(ROLE))
    if split == "official":
        return official
    if _crosses(official):
        return table.assign(role=draw_roles(table, "patient", 0))
    if {"val", "test"} <= set(table["split"]):
        return official
    report = "test" if (table["split"] == "test").any() else "val"
    role = pd.Series("test", index=table.index)
    rest = table["split"] != report
    if task.name == "bach":
        role[rest] = np.where(table.loc[rest, "block"].isin(BACH_CLEAN), "validate", "probe-train")
    else:
        by = "tile" if patient_column(table) is None else "patient"
        role[rest] = draw_roles(table[rest], by, 0, VALIDATE)
    return table.assign(role=role)


def _listed(task: Task, layout: Layout, folder: Path) -> pd.DataFrame:
    """A row a file: file, path, label, split, and patient_id, slide_id, ... where the paths say them."""
    pattern, ignored = re.compile(layout.pattern), re.compile(layout.ignored)
    rows, wrong = [], []
    for path in _images(folder, layout.parts):
        name = path.relative_to(folder).as_posix()
        found = pattern.fullmatch(name)
        if found:
            rows.append({"file": name, "path": str(path), **_groups(found)})
        elif not ignored.fullmatch(name):
            wrong.append(name)
    checks.named(task, rows, wrong, folder)
    table = pd.DataFrame(rows).rename(columns={"patient": "patient_id", "slide": "slide_id"})
    table["label"] = table["label"].map(layout.label) if layout.label else table["label"]
    unknown = sorted(set(table["label"]) - set(task.classes))
    if unknown:
        raise InputError(f"{task.name}: {folder} has the class {unknown[0]}; it has {', '.join(task.classes)}")
    if layout.split:
        table["split"] = table["split"].map(layout.split)
    known = table.columns[table.notna().all()]  # a patient in some names only is no patient column
    table = layout.assign(table[known]).drop(columns=["code", "zip"], errors="ignore")
    return table.sort_values("file", ignore_index=True)


def _images(folder: Path, parts: tuple[str, ...]):
    for part in parts or ("",):
        for path in sorted((folder / part).rglob("*")):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                yield path


def _groups(found: re.Match) -> dict:
    """Named groups, label2 and on folded into label; groups that did not take part are None."""
    groups = found.groupdict()
    alternatives = [groups.pop(name) for name in list(groups) if re.fullmatch(r"label\d", name)]
    return {**groups, "label": next((x for x in (groups["label"], *alternatives) if x), None)}


def _crosses(table: pd.DataFrame) -> bool:
    """Whether a patient stands on two sides of the official split itself."""
    known = patient_column(table)
    return known is not None and bool((table.groupby(known)["role"].nunique() > 1).any())
