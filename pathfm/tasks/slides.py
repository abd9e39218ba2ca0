"""Slide tasks as tables of slides, labels and roles: Camelyon16, PANDA, and labels of TCGA slides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from pathfm.benchmarks import TileSet
from pathfm.cohort import Cohort, check_roles
from pathfm.errors import InputError
from pathfm.tasks import checks, sites
from pathfm.tasks.listed import csv_table
from pathfm.tasks.task import ROLE, Task

COLUMNS = ["slide_id", "patient_id", "label", "site", "cancer_type", "role"]
SLIDES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".dcm", ".bif", ".vms"}
OUR_SPLIT = "our split by site"  # of a CSV of labels without roles; the seed stands behind it
PANDA_CSV = "train_with_noisy_labels.csv"  # Kaggle's train.csv with the noise columns of the 6th place
PANDA_SMALL = {"train": 0.10, "val": 0.05, "test": 0.05}  # eva 73b61a7, classification/panda.py
PANDA_SEED = 42

# eva 73b61a7, classification/camelyon16.py: the slides of PCam's validation part.
CAMELYON_VAL = {
    "normal": (
        10, 13, 16, 17, 19, 20, 25, 30, 31, 32, 52, 56, 57, 67, 76, 79, 85, 95, 98, 99, 101, 102, 105, 106, 109, 129,
        132, 137, 142, 143, 148, 152,
    ),
    "tumor": (1, 5, 11, 12, 13, 19, 31, 37, 43, 46, 57, 65, 69, 71, 73, 79, 80, 81, 82, 85, 97, 109),
}  # fmt: skip
CAMELYON_UMCU = {"normal": 101, "tumor": 71}  # the first training slide of Utrecht; those before are Radboud's


@dataclass(frozen=True, repr=False)
class SlideSet:
    """Slides with labels.

    table    index 0..n-1; slide_id, patient_id, label, site, cancer_type, role, all text, and path where the slides
             lie. A patient that is not known is the slide itself, a site or cancer type that is not known is ""
    classes  in the official order
    split    where its roles are from, in words; "" where nothing is known of it
    """

    name: str
    table: pd.DataFrame
    classes: tuple[str, ...]
    mpp: float | None = None
    split: str = ""

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"SlideSet({self.name}: {len(self)} slides of {self.table['patient_id'].nunique()} patients)"

    def cohort(self) -> Cohort:
        """The slides for an index and a tile stream; the label stays a column. Raises InputError without paths."""
        if "path" not in self.table:
            raise InputError(f"{self.name} is a table of labels; give the folder of its slides: read(..., slides=...)")
        return Cohort(self.table.rename(columns={"site": "centre"}), self.name)

    def folds(self, n: int = 5, by: str = "site", seed: int = 0):
        """(fold, SlideSet) as `sites.folds` deals them; each slide tests once."""
        for number, table in sites.folds(self.table, n, by, seed):
            yield number, replace(self, table=table)

    def floors(self, n: int = 5, seed: int = 0) -> pd.DataFrame:
        """What cancer type alone, site alone and both predict, as `sites.floors`."""
        return sites.floors(self.table, n, seed)

    def summary(self) -> pd.DataFrame:
        """Slides and patients a class, and slides a role."""
        rows = self.table.groupby("label")
        counts = pd.DataFrame({"slides": rows.size(), "patients": rows["patient_id"].nunique()})
        return counts.join(pd.crosstab(self.table["label"], self.table["role"])).reindex(self.classes)


def read(task: Task, folder: str | Path, split: str = "official", allow_partial: bool = False, **how) -> SlideSet:
    """Camelyon16 or PANDA as they unpack, or a CSV of labels; no slide is opened here.

    Each knows one split, whatever `split` asks for, and its name is in the result.
    """
    readers = {"camelyon16_small": _camelyon16, "panda_small": _panda}
    if task.name not in readers:
        return read_labels(task, folder, **how)
    if how:
        raise InputError(f"{task.name} takes no {next(iter(how))}")
    table, folder = readers[task.name](task, Path(folder).expanduser(), allow_partial)
    note = checks.partial(task, table, folder, allow_partial)
    return _slide_set(task, table.assign(role=table["split"].map(ROLE)).drop(columns="split"), note, "official split")


def read_labels(task: Task, csv: str | Path, slides: str | Path | None = None, seed: int = 0) -> SlideSet:
    """A CSV with columns slide_id and label, and where they are known patient_id, site, cancer_type, role.

    slides  a folder to look for <slide_id>*.svs and the like in; one that is not there is an error

    Patient and site of a TCGA barcode are read from it. Without a column role the first of five folds by site
    within a cancer type is the split, with `folds` for the rest. The split of the paper is not published: this is
    ours.
    """
    csv = Path(csv).expanduser()
    csv = csv / "labels.csv" if csv.is_dir() else csv
    table = csv_table(csv, {"slide_id": "slide_id", "label": "label"})
    unknown = sorted(set(table["label"]) - set(task.classes)) if task.classes else []
    if unknown:
        raise InputError(f"{csv}: label '{unknown[0]}' is none of {task.name}'s: {', '.join(task.classes)}")
    table = _people(table, csv)
    if "cancer_type" not in table:
        given = task.title.split(":")[0] if task.name.startswith(("exaone", "msi")) else ""
        table["cancer_type"] = given
        if task.name == "tp53":
            raise InputError(f"{csv} has no column 'cancer_type'; TP53 is split and floored within cancer types")
    if slides is not None:
        table["path"] = _paths(table["slide_id"], Path(slides).expanduser())
    own, split = task.classes or tuple(sorted(table["label"].unique())), "the table's own roles"
    if "role" not in table:
        split = f"{OUR_SPLIT}, seed {seed}"
        table = next(iter(sites.folds(table, seed=seed)))[1]
    odd = sorted(set(table["role"].astype(str)) - set(ROLE.values()))
    if odd:
        raise InputError(f"{csv}: role '{odd[0]}' is none of {', '.join(ROLE.values())}")
    check_roles(table)
    return _slide_set(replace(task, classes=own), table, "", split)


def of_tiles(tiles: TileSet, task: Task) -> SlideSet:
    """The slides of a TileSet whose tiles all carry their slide's label (MSI), one row a slide."""
    missing = [column for column in ("slide_id", "patient_id", "role") if column not in tiles.table]
    if missing:
        raise InputError(f"{tiles.name} has no column {missing[0]}; its tiles belong to no known slide")
    mixed = tiles.table.groupby("slide_id")[["label", "role"]].nunique().max(axis=1)
    if (mixed > 1).any():
        raise InputError(f"slide {mixed.index[mixed > 1][0]} has tiles of two classes or roles; it is no slide label")
    kept = [column for column in COLUMNS if column in tiles.table]
    table = tiles.table.drop_duplicates("slide_id")[kept].reset_index(drop=True)
    return _slide_set(task, table, tiles.name.partition(", ")[2])


def _slide_set(task: Task, table: pd.DataFrame, note: str, split: str = "") -> SlideSet:
    for column in ("site", "cancer_type"):
        table[column] = table[column].fillna("") if column in table else ""
    rest = [column for column in table if column not in COLUMNS]
    checks.classes(task.name, table, task.classes)
    name = ", ".join(filter(None, [task.name, note]))
    return SlideSet(name, table[COLUMNS + rest].reset_index(drop=True), task.classes, task.mpp, split)


def _people(table: pd.DataFrame, csv: Path) -> pd.DataFrame:
    """patient_id and site, from the table where it has them, else from TCGA barcodes."""
    needed = [column for column in ("patient_id", "site") if column not in table]
    if needed:
        try:
            known = pd.DataFrame([sites.barcode(name) for name in table["slide_id"]], columns=["patient_id", "site"])
        except InputError as error:
            raise InputError(f"{csv} has no column {needed[0]}, and {error}") from None
        table = table.assign(**{column: known[column] for column in needed})
    for column in ("patient_id", "site"):
        if table[column].isna().any():
            raise InputError(f"{csv}: slide {table['slide_id'][table[column].isna()].iloc[0]} has no {column}")
    return table


def _paths(slide_ids: Iterable[str], folder: Path) -> list[str]:
    """The file of each slide below a folder, by the name before the first point. Raises InputError with what lacks."""
    there = {p.name.split(".")[0]: str(p) for p in sorted(folder.rglob("*")) if p.suffix.lower() in SLIDES}
    missing = [name for name in slide_ids if name.split(".")[0] not in there]
    if missing:
        raise InputError(
            f"{len(missing)} of the slides are not in {folder}, first {missing[0]}; download them, or drop their rows"
        )
    return [there[name.split(".")[0]] for name in slide_ids]


def _camelyon16(task: Task, folder: Path, allow_partial: bool) -> tuple[pd.DataFrame, Path]:
    """training/{normal,tumor}, testing/images and testing/reference.csv, a headless table of slide and class."""
    parts = ("training/normal", "training/tumor", "testing/images", "testing/reference.csv")
    folder = checks.root(task, folder, parts)
    rows, wrong = [], []
    for path in sorted([*folder.glob("training/*/*.tif"), *folder.glob("testing/images/*.tif")]):
        kind, _, number = path.stem.partition("_")
        place = path.parent.name if path.parent.name != "images" else "test"
        if kind != place or not number.isdigit():
            wrong.append(path.relative_to(folder).as_posix())
        else:
            rows.append((path.stem, str(path), kind, int(number)))
    checks.named(task, rows, wrong, folder)
    table = pd.DataFrame(rows, columns=["slide_id", "path", "kind", "number"])
    held = [n in CAMELYON_VAL.get(kind, ()) for kind, n in zip(table["kind"], table["number"], strict=True)]
    table["split"] = np.select([table["kind"] == "test", held], ["test", "val"], "train")
    reference = pd.read_csv(folder / "testing/reference.csv", header=None, dtype=str)
    truth = dict(zip(reference[0].str.removesuffix(".tif"), reference[1].str.lower(), strict=True))
    lacking = sorted(set(table.loc[table["kind"] == "test", "slide_id"]) - set(truth))
    if lacking:
        raise InputError(f"{folder / 'testing/reference.csv'} has no label of {lacking[0]}; is it another set's?")
    table["label"] = [
        truth[name] if kind == "test" else kind for name, kind in zip(table["slide_id"], table["kind"], strict=True)
    ]
    first = table["kind"].map(CAMELYON_UMCU)
    table["site"] = np.select([first.isna(), table["number"] >= first], ["", "UMCU"], "RUMC")
    return table.assign(patient_id=table["slide_id"], cancer_type="breast").drop(columns=["kind", "number"]), folder


def _panda(task: Task, folder: Path, allow_partial: bool) -> tuple[pd.DataFrame, Path]:
    """The 9,555 slides without noisy labels, of which eva's draw takes a tenth and two twentieths."""
    folder = checks.root(task, folder, ("train_images", PANDA_CSV))
    table = csv_table(folder / PANDA_CSV, {"image_id": "slide_id", "isup_grade": "label", "data_provider": "site"})
    if "noise_ratio_10" not in table:
        raise InputError(
            f"{folder / PANDA_CSV} has no column noise_ratio_10; take the train.csv named in about('panda_small')"
        )
    there = {path.stem: str(path) for path in (folder / "train_images").glob("*.tiff")}
    checks.named(task, list(there), sorted(set(there) - set(table["slide_id"])), folder / "train_images")
    missing = sorted(set(table["slide_id"]) - set(there))
    if missing and not allow_partial:
        raise InputError(
            f"{task.name}: {folder} is a partial download. {len(missing):,} of {len(table):,} slides are missing, "
            f"first {missing[0]}.tiff; the draw is over all. Get the rest from {task.url}, or pass allow_partial=True"
        )
    table = table[table["noise_ratio_10"].astype(float) != 0].sort_values("slide_id", ignore_index=True)
    table["split"] = stratified(table["label"].to_numpy(), PANDA_SMALL, PANDA_SEED)
    table["path"] = table["slide_id"].map(there)
    table = table[(table["split"] != "") & table["path"].notna()].reset_index(drop=True)
    kept = ["slide_id", "label", "site", "split", "path"]
    return table[kept].assign(patient_id=table["slide_id"], cancer_type="prostate"), folder


def stratified(label: np.ndarray, fractions: dict[str, float], seed: int) -> np.ndarray:
    """(n,) split of each row, "" for the rest: of every class, in sorted order, shuffled by one generator, the first
    floor(fraction x n), at least one, are the first split, and so on. eva 73b61a7, core/data/splitting/stratified.py.
    """
    rng, split = np.random.default_rng(seed), np.full(len(label), "", object)
    for one in np.unique(label):
        rows = np.flatnonzero(label == one)
        rng.shuffle(rows)
        start = 0
        for name, share in fractions.items():
            n = int(np.floor(share * len(rows))) or 1
            split[rows[start : start + n]] = name
            start += n
    return split
