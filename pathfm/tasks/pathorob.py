"""PathoROB: its three sets of tiles as tables, images as they are given out, and its robustness index.

A set is in two places. Which tiles count, and in which pairs, is in the metadata CSV of its code's repository; the
images are Parquet shards on Hugging Face (`shards`), one row a tile, with the columns below. Sources: PathoROB's code
at 46594e9 (extract_features.py loads the split train and its column image, data_manager.py names the others), and two
public readers of the shards themselves, Soma's prepare_croma and waivphaet's extraction, which say how many there are,
that (slide_id, patch_id) names a tile once and that a tile is 256 px. Unknown: how many rows the shards have in all,
and whether they have a column subset; neither is relied upon, for the CSV says it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from pathfm.benchmarks import SUFFIXES, TileSet, decode_all
from pathfm.errors import InputError
from pathfm.metrics import finite, so_os
from pathfm.tasks import checks, shards
from pathfm.tasks.task import Task

FILES = {
    "pathorob_camelyon": "camelyon.csv",
    "pathorob_tcga": "tcga_2x2.csv",
    "pathorob_tolkach": "tolkach_esca_reduced.csv",
}
K = {"pathorob_camelyon": 11, "pathorob_tcga": 61, "pathorob_tolkach": 46}  # of the published numbers
PAIRED = {"pathorob_tcga"}  # neighbours are searched within each pair of classes and centres
IN_SHARDS = {"slide_id": "slide_id", "patch_id": "patch_id", "biological_class": "label", "medical_center": "centre"}
COLUMNS = ("subset", "slide_id", "patch_id", "biological_class", "medical_center")


def read(task: Task, folder: str | Path, split: str = "official", allow_partial: bool = False) -> pd.DataFrame:
    """A row a tile: file (slide-patch, the name of its embedding), label, centre, slide_id, patient_id, subset.

    From the metadata CSV that PathoROB's repository ships. Tiles of subset OOD are left out, as the index does. In
    the paired set a tile has a row in every pair it stands in.
    """
    folder = Path(folder).expanduser()
    folder = next(
        (f for f in (folder, folder / "metadata", folder / "data/metadata") if (f / FILES[task.name]).exists()), folder
    )
    folder = checks.root(task, folder, (FILES[task.name],))
    given = _table(folder / FILES[task.name])
    given = given[given["subset"] != "OOD"].reset_index(drop=True)
    table = pd.DataFrame(
        {
            "file": given["slide_id"] + "-" + given["patch_id"],
            "label": given["biological_class"],
            "centre": given["medical_center"],
            "slide_id": given["slide_id"],
            "patient_id": given["slide_id"].str[:12] if task.name == "pathorob_tcga" else given["slide_id"],
            "subset": given["subset"],
        }
    )
    unknown = sorted(set(table["label"]) - set(task.classes)) if task.classes else []
    if unknown:
        raise InputError(f"{task.name}: {FILES[task.name]} has the class {unknown[0]}, which is none of its own")
    note = checks.partial(task, table.assign(split=None), folder, allow_partial)
    table.attrs["name"] = ", ".join(filter(None, [task.name, note]))
    return table


def tiles(task: Task, table: pd.DataFrame, folder: str | Path) -> TileSet:
    """The images of a table from `read`, each tile once, in an order of their own (see `align`).

    folder   that of the Hugging Face data set: data/train-<number>-of-<N>.parquet, read where they lie; or images
             below it that are named <slide_id>-<patch_id>.png (or another suffix)

    Raises InputError with the shards or images that are missing, and for shards that say another class or centre than
    the metadata.
    """
    once = table.drop_duplicates("file", ignore_index=True).drop(columns="subset")
    found = shards.find(folder)
    there = _in_shards(found, once) if found else _files(folder, once)
    lacking = once["file"][there["path"].isna()]
    if len(lacking):
        raise InputError(
            f"{task.name}: {len(lacking):,} of {len(once):,} images are not in {folder}, first {lacking.iloc[0]}"
            + ("" if found else f".png; expected data/train-00000-of-0000N.parquet from {task.url}, or images")
        )
    if found:
        there = there.astype({"row": int}).sort_values(["path", "row"], ignore_index=True)
    make, check = (shards.ShardTiles, shards.check) if found else (TileSet, decode_all)
    good, bad = checks.decoded(there, check)
    return make(task.name, good.assign(mpp=np.nan if task.mpp is None else task.mpp), bad)


def _files(folder: str | Path, once: pd.DataFrame) -> pd.DataFrame:
    there = {path.stem: str(path) for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in SUFFIXES}
    return once.assign(path=once["file"].map(there))


def _in_shards(found: list[Path], once: pd.DataFrame) -> pd.DataFrame:
    """The tiles with their shard (path) and place in it (row), NaN for what no shard has."""
    listed = shards.table(found, list(IN_SHARDS)).rename(columns=IN_SHARDS)
    listed["file"] = listed["slide_id"] + "-" + listed["patch_id"]
    twice = listed["file"][listed["file"].duplicated()]
    if len(twice):
        raise InputError(f"{found[0].parent} has the tile {twice.iloc[0]} twice; are these shards of one version?")
    both = once.merge(listed[["file", "path", "row", "label", "centre"]], "left", "file", suffixes=("", "_there"))
    for column in ("label", "centre"):
        other = both[both["path"].notna() & (both[column] != both[f"{column}_there"])]
        if len(other):
            one = other.iloc[0]
            raise InputError(
                f"{one.path} says {column} {one[f'{column}_there']} of tile {one.file}, the metadata {one[column]}, "
                f"and so of {len(other) - 1} others; are both of one version?"
            )
    return both.drop(columns=["label_there", "centre_there"])


def align(x: np.ndarray, tiles: TileSet, table: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """Features x (N, D) of `tiles` and the table, row by row; tiles that are quarantined are left out of both."""
    place = pd.Series(np.arange(len(tiles)), index=tiles.table["file"]).reindex(table["file"]).to_numpy()
    known = ~np.isnan(place)
    return x[place[known].astype(int)], table[known].reset_index(drop=True)


def embeddings(folder: str | Path, table: pd.DataFrame) -> np.ndarray:
    """(N, D) float32 of the table's rows from <folder>/<centre>.npz, one array a tile, as PathoROB writes them.

    Raises InputError for a missing centre or tile.
    """
    folder, found = Path(folder).expanduser(), {}
    for centre, rows in table.groupby("centre"):
        path = folder / f"{centre.replace(' ', '_')}.npz"
        if not path.exists():
            raise InputError(f"expected {path} with the embeddings of centre {centre}")
        with np.load(path, allow_pickle=False) as arrays:
            lacking = sorted(set(rows["file"]) - set(arrays.files))
            if lacking:
                raise InputError(f"{path} has no embedding of {len(lacking)} tiles, first {lacking[0]}")
            found |= {name: arrays[name] for name in rows["file"].unique()}
    return np.stack([found[name] for name in table["file"]]).astype(np.float32)


def robustness(task: Task, x: np.ndarray, table: pd.DataFrame, k: int | None = None) -> dict:
    """PathoROB's index of embeddings x (N, D), row by row those of `table`.

    robustness_index, so, os, k, n: #SO / (#SO + #OS) over the k nearest neighbours by cosine of every tile, tiles
    of its own slide left out; in the paired set within each pair, counts added over the pairs. Kömen et al. 2025,
    arXiv 2507.17845; the code at 46594e9. Unlike `metrics.robustness_index` it draws nothing: the sets are
    balanced. Raises InputError where a tile has fewer than k neighbours.
    """
    if len(x) != len(table):
        raise InputError(f"{len(x):,} embeddings for {len(table):,} tiles of {task.name}; give one a row")
    x, k = finite(x), k or K[task.name]
    so = os = 0
    groups = table["subset"] if task.name in PAIRED else pd.Series("all", index=table.index)
    for _, rows in table.groupby(groups.to_numpy()):
        one = table.loc[rows.index]
        s, o = so_os(x[rows.index], one["label"], one["centre"], one["slide_id"], k)
        if len(s) < k:
            raise InputError(
                f"{task.name}: a tile has {len(s)} neighbours of other slides, under k {k}; is it partial?"
            )
        so, os = so + int(s[-1]), os + int(o[-1])
    return {"robustness_index": so / (so + os) if so + os else np.nan, "so": so, "os": os, "k": k, "n": len(table)}


def _table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table ({error})") from None
    missing = [column for column in COLUMNS if column not in table]
    if missing or table.empty:
        raise InputError(f"{path} has no column '{(missing or ['(no rows)'])[0]}'; it needs {', '.join(COLUMNS)}")
    return table
