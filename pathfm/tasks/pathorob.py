"""PathoROB: its three sets of tiles as tables, images as they are given out, and its robustness index.

A set is in two places. Which tiles count, and in which pairs, is in the metadata CSV of its code's repository; the
images are Parquet shards on Hugging Face (`shards`), one row a tile, with the columns below. Sources: PathoROB's code
at 46594e9 (extract_features.py loads the split train and its column image, data_manager.py names the others), and two
public readers of the shards themselves, Soma's prepare_croma and waivphaet's extraction, which say how many there are,
that (slide_id, patch_id) names a tile once and that a tile is 256 px. Unknown: how many rows the shards have in all,
and whether they have a column subset; neither is relied upon, for the CSV says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from pathfm.benchmarks import SUFFIXES, TileSet, decode_all
from pathfm.errors import InputError
from pathfm.metrics import finite, so_os_each
from pathfm.scores import RESAMPLES, Difference, Interval, verdict
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


class Counts(NamedTuple):
    """Neighbours of every tile: so (N,) of its class and another centre, os (N,) of another class and its centre."""

    so: np.ndarray
    os: np.ndarray

    @property
    def index(self) -> float:
        """#SO / (#SO + #OS), 0 to 1; nan without either."""
        both = self.so.sum() + self.os.sum()
        return float(self.so.sum() / both) if both else np.nan


def counts(task: Task, x: np.ndarray, table: pd.DataFrame, k: int | None = None) -> Counts:
    """Of embeddings x (N, D), row by row those of `table`, over the k nearest neighbours by cosine.

    Tiles of a tile's own slide are left out; in the paired set neighbours are searched within each pair. Raises
    InputError where a tile has fewer than k.
    """
    if len(x) != len(table):
        raise InputError(f"{len(x):,} embeddings for {len(table):,} tiles of {task.name}; give one a row")
    x, k = finite(x), k or K[task.name]
    so, os = np.zeros((2, len(table)))
    for rows in _groups(task, table):
        one = table.iloc[rows]
        s, o = so_os_each(x[rows], one["label"], one["centre"], one["slide_id"], k)
        if s.shape[1] < k:
            raise InputError(
                f"{task.name}: a tile has {s.shape[1]} neighbours of other slides, under k {k}; is it partial?"
            )
        so[rows], os[rows] = s.sum(axis=1), o.sum(axis=1)
    return Counts(so, os)


def chance(task: Task, table: pd.DataFrame, k: int | None = None) -> Counts:
    """What k neighbours drawn at random from the other slides are expected to be: the floor of the index."""
    so, os, k = *np.zeros((2, len(table))), k or K[task.name]
    for rows in _groups(task, table):
        one = table.iloc[rows]
        size = lambda *by: one.groupby(list(by))["file"].transform("size").to_numpy()  # noqa: B023, E731
        same, others = size("label", "centre"), len(one) - size("slide_id")
        so[rows] = k * (size("label") - same) / others
        os[rows] = k * (size("centre") - same - (size("slide_id") - size("slide_id", "label"))) / others
    return Counts(so, os)


def interval(found: Counts, table: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The index with its bootstrap by patient (slide): whose neighbours are counted is drawn, the neighbours stay."""
    return Interval(found.index, *np.quantile(_drawn(found, table, resamples, seed), [0.025, 0.975]))


def paired(a: Counts, b: Counts, table: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """The index of a minus that of b on the same tiles; every draw takes the same patients for both."""
    drawn = _drawn(a, table, resamples, seed) - _drawn(b, table, resamples, seed)
    low, high = (float(q) for q in np.quantile(drawn, [0.025, 0.975]))
    n = table["patient_id"].nunique()
    return Difference(a.index - b.index, low, high, n, verdict(low, high, n))


def scored(task: Task, found: Mapping[str, np.ndarray], table: pd.DataFrame) -> pd.DataFrame:
    """A row for each of some embeddings, of which the first are a model's and the others floors, and for chance.

    Columns features, floor, robustness_index, low, high, n_tiles, n_patients; of the model also best_floor (that of
    highest index), gain, gain_low, gain_high and verdict.
    """
    said = {name: counts(task, x, table) for name, x in found.items()} | {"chance": chance(task, table)}
    rows = [{"features": name, "floor": True, **interval(one, table)._asdict()} for name, one in said.items()]
    found = pd.DataFrame(rows).rename(columns={"value": "robustness_index"})
    found = found.assign(n_tiles=len(table), n_patients=table["patient_id"].nunique())
    own, best = found["features"][0], found["features"][found["robustness_index"][1:].idxmax()]
    gain = paired(said[own], said[best], table)
    told = {"floor": False, "best_floor": best, "gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
    found.loc[0, list(told)] = list(told.values())
    return found.assign(verdict=[gain.verdict, *[""] * (len(found) - 1)])


def _drawn(found: Counts, table: pd.DataFrame, resamples: int, seed: int) -> np.ndarray:
    """(R,) the index of each draw of patients; draws without a neighbour that counts left out."""
    who = np.unique(table["patient_id"], return_inverse=True)[1]
    people = who.max() + 1
    weights = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), resamples)
    so, os = (weights @ np.bincount(who, each) for each in found)
    return np.divide(so, so + os, out=np.full(resamples, found.index), where=so + os > 0)


def _groups(task: Task, table: pd.DataFrame) -> list[np.ndarray]:
    """Rows among which neighbours are searched: all, or those of each pair."""
    if task.name not in PAIRED:
        return [np.arange(len(table))]
    return list(table.groupby(table["subset"].to_numpy()).indices.values())


def robustness(task: Task, x: np.ndarray, table: pd.DataFrame, k: int | None = None) -> dict:
    """PathoROB's index of embeddings x (N, D), row by row those of `table`.

    robustness_index, so, os, k, n: #SO / (#SO + #OS) over `counts`, added over the pairs of the paired set. Kömen et
    al. 2025, arXiv 2507.17845; the code at 46594e9. Unlike `metrics.robustness_index` it draws nothing: the sets are
    balanced. Raises InputError where a tile has fewer than k neighbours.
    """
    found = counts(task, x, table, k)
    told = {"so": int(found.so.sum()), "os": int(found.os.sum()), "k": k or K[task.name], "n": len(table)}
    return {"robustness_index": found.index, **told}


def _table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table ({error})") from None
    missing = [column for column in COLUMNS if column not in table]
    if missing or table.empty:
        raise InputError(f"{path} has no column '{(missing or ['(no rows)'])[0]}'; it needs {', '.join(COLUMNS)}")
    return table
