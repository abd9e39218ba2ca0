"""PatchCamelyon: images inside HDF5 files, read where they lie, and its draws of ten images a class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from pathfm.benchmarks import QUARANTINE, TileSet
from pathfm.errors import InputError
from pathfm.storage import progress
from pathfm.tasks import checks
from pathfm.tasks.folders import tile_set
from pathfm.tasks.task import Task

PARTS = {"train": "train", "valid": "val", "test": "test"}  # in the files' names -> official split
BLOCK = 1024  # images read at once, 28 MB
SHOTS = 10  # images a class, eva 73b61a7 patch_camelyon_10shot.yaml
SHOT_SEED = 42  # the default of eva's BalancedSampler


@dataclass(frozen=True, repr=False)
class PackedTiles(TileSet):
    """Tiles inside HDF5 files: the table's column `path` is the file and `row` the place in its dataset x."""

    def image(self, row: int) -> np.ndarray:
        """(h, w, 3) uint8. Raises InputError where the file changed since it was checked."""
        return next(iter(self._read(self.table.iloc[[row]])))

    def images(self, batch_size: int = 64) -> Iterator[list[np.ndarray]]:
        """Batches of images in the table's order."""
        for start in range(0, len(self), batch_size):
            yield self._read(self.table.iloc[start : start + batch_size])

    def _read(self, table: pd.DataFrame) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for path, rows in table.groupby("path")["row"]:
            try:
                with h5py.File(path, "r") as file:
                    places = np.unique(rows)  # HDF5 takes increasing places only
                    pixels = file["x"][places[0] : places[-1] + 1] if _dense(places) else file["x"][places]
            except (OSError, KeyError, IndexError, ValueError) as error:
                raise InputError(f"{path} could be read before and now cannot ({error}); read the task again") from None
            where = places - places[0] if _dense(places) else np.arange(len(places))
            at = dict(zip(places, where, strict=True))
            found |= {index: pixels[at[place]] for index, place in rows.items()}
        return [found[index] for index in table.index]


def read(
    task: Task, folder: str | Path, split: str = "official", allow_partial: bool = False, run: int | None = 0
) -> TileSet:
    """PCam from its six files camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, as gunzip leaves them.

    run   which draw of ten images a class of the training part (the task pcam_10shot; eva makes 50); None: all of
          that part, for a protocol that draws them itself

    With the files ..._meta.csv beside them the table has the slide of each image. Raises InputError for a file that
    is missing, cut off or of another shape, and for labels of another file.
    """
    if run and task.name != "pcam_10shot":
        raise InputError(f"{task.name} has no runs; only pcam_10shot is drawn")
    folder = checks.root(task, folder, [] if allow_partial else [_name(part, "x") for part in PARTS])
    there = [part for part in PARTS if (folder / _name(part, "x")).exists()]
    if not there:
        raise InputError(f"{task.name}: {folder} has none of the files {task.files[-1]}")
    table = pd.concat([_part(task, folder, part) for part in there])
    note = checks.partial(task, table.reset_index(drop=True), folder, allow_partial)
    table = table.drop(columns="slide_id") if table["slide_id"].isna().any() else table
    only = None
    if task.name == "pcam_10shot" and run is not None:
        train = (table["split"] == "train").to_numpy()
        drawn = table["file"][train].iloc[shots(table["label"].to_numpy()[train], run)]
        only, note = {*drawn, *table["file"][~train]}, ", ".join(filter(None, [f"run {run}", note]))
    return tile_set(task, table.reset_index(drop=True), split, note, folder, PackedTiles, _check, only)


def shots(label: np.ndarray, run: int = 0, n: int = SHOTS, seed: int = SHOT_SEED) -> np.ndarray:
    """(classes x n,) places of the images of one run: n a class without replacement, from one generator for all runs.

    As eva's BalancedSampler draws them with reset_generator=False: classes in order of appearance, then shuffled.
    """
    _, first = np.unique(label, return_index=True)
    places = [np.flatnonzero(label == label[at]) for at in sorted(first)]
    if min(map(len, places)) < n:
        raise InputError(f"{n} images a class were asked for, one class has {min(map(len, places))}")
    rng = np.random.default_rng(seed)
    for _ in range(run + 1):
        drawn = [int(place) for each in places for place in rng.choice(each, size=n, replace=False)]
        rng.shuffle(drawn)
    return np.array(drawn)


def _name(part: str, kind: str) -> str:
    return f"camelyonpatch_level_2_split_{part}_{kind}.{'csv' if kind == 'meta' else 'h5'}"


def _dense(places: np.ndarray) -> bool:
    return len(places) == 1 or bool(places[-1] - places[0] < 4 * len(places))


def _part(task: Task, folder: Path, part: str) -> pd.DataFrame:
    """A row an image of one part: file, path, row, label, split, slide_id (missing where it is not known)."""
    images, labels, meta = (folder / _name(part, kind) for kind in ("x", "y", "meta"))
    shape, y = _open(images, "x", lambda x: x.shape), _open(labels, "y", lambda y: y[:].reshape(-1))
    if len(shape) != 4 or shape[3] != 3:
        raise InputError(f"{images}: x has the shape {shape}, not (images, height, width, 3)")
    if len(y) != shape[0]:
        raise InputError(f"{images} has {shape[0]:,} images and {labels} {len(y):,} labels; these are not a pair")
    if not set(np.unique(y)) <= {0, 1}:
        raise InputError(f"{labels} has the labels {np.unique(y)[:5]}; PCam's are 0 and 1")
    names = [f"camelyonpatch_level_2_split_{PARTS[part]}_x_{row}" for row in range(len(y))]  # as eva names them
    table = pd.DataFrame({"file": names, "path": str(images), "row": np.arange(len(y)), "split": PARTS[part]})
    table["label"] = np.array(task.classes)[y.astype(int)]
    table["slide_id"] = _slides(meta, len(y)) if meta.exists() else None
    return table


def _open(path: Path, key: str, take):
    """take(dataset) of an HDF5 file. Raises InputError where it is missing, cut off or without that dataset."""
    if not path.exists():
        raise InputError(f"{path} is missing; download it, and gunzip it")
    try:
        with h5py.File(path, "r") as file:
            return take(file[key])
    except OSError as error:
        raise InputError(f"{path} is no whole HDF5 file ({error}); download it again") from None
    except KeyError:
        raise InputError(f"{path} has no dataset '{key}'; is it a file of PCam?") from None


def _slides(meta: Path, n: int) -> list[str]:
    table = pd.read_csv(meta, dtype=str)
    if "wsi" not in table or len(table) != n:
        raise InputError(f"{meta} has {len(table):,} rows for {n:,} images, or no column wsi; it is another part's")
    return table["wsi"].tolist()


def _check(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every image read once: digest and size; what HDF5 cannot read is quarantined image by image."""
    digest, reason = np.full(len(table), "", object), np.full(len(table), "", object)
    size = np.zeros((len(table), 2), int)
    for path, rows in table.reset_index(drop=True).groupby("path")["row"]:
        with h5py.File(path, "r") as file:
            x = file["x"]
            for start in progress(range(0, len(rows), BLOCK), "checking images", unit="block"):
                block = rows.iloc[start : start + BLOCK]
                for index, pixels, why in _block(x, block):
                    digest[index], reason[index] = pixels, why
            size[rows.index] = x.shape[2], x.shape[1]
    good = reason == ""
    sizes = {"digest": digest, "width_px": size[:, 0], "height_px": size[:, 1], "reason": reason}
    checked = table.reset_index(drop=True).assign(**sizes)
    return checked[good].drop(columns="reason").reset_index(drop=True), checked.loc[~good, QUARANTINE]


def _block(x: h5py.Dataset, rows: pd.Series) -> Iterator[tuple[int, str, str]]:
    """(index, digest, reason) of each row, read together, or one by one where together fails."""
    places = rows.to_numpy()
    try:
        if not (np.diff(places) > 0).all():
            raise OSError("not in order")
        pixels = x[places[0] : places[-1] + 1] if _dense(places) else x[places]
        for index, place in rows.items():
            one = pixels[place - places[0]] if _dense(places) else pixels[np.searchsorted(places, place)]
            yield index, hashlib.blake2b(one.tobytes(), digest_size=12).hexdigest(), ""
    except OSError:
        for index, place in rows.items():
            try:
                yield index, hashlib.blake2b(x[place].tobytes(), digest_size=12).hexdigest(), ""
            except OSError as error:
                yield index, "", f"does not decode: {error}"
