"""Frozen features: one row a tile, computed once and kept under a key of weights, preprocessing and data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor, nn

from pathfm import extractors
from pathfm.backbones import random_twin
from pathfm.benchmarks import TileSet
from pathfm.devices import kept_memory
from pathfm.errors import InputError
from pathfm.extractors import FLOORS, POOLS, Extractor, fingerprint, metadata_columns
from pathfm.storage import cache_dir, explained, progress, read_json, write_json

__all__ = ["FLOORS", "POOLS", "Features", "extract", "fingerprint", "metadata_columns", "pools", "random_twin"]


@dataclass(frozen=True, repr=False)
class Features:
    """Features and the tiles they belong to.

    x           (N, D) float32, memory-mapped from the cache, read-only
    tiles       the TileSet, row by row
    provenance  what made them: model, pool, key, effective mpp, ...
    """

    name: str
    x: np.ndarray
    tiles: TileSet
    provenance: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        return f"Features({self.name}: {self.x.shape[0]} x {self.x.shape[1]} of {self.tiles.name})"

    @property
    def y(self) -> np.ndarray:
        """(N,) classes as integers from 0, in the order of `tiles.classes`."""
        return self.tiles.y

    @property
    def table(self) -> pd.DataFrame:
        """The tiles' table."""
        return self.tiles.table

    def split(self, by: str = "patient", **settings) -> Features:
        """The same features with roles drawn by `TileSet.split`."""
        return replace(self, tiles=self.tiles.split(by, **settings))

    def of(self, tiles: TileSet) -> Features:
        """The same features with the roles in `tiles`, which must be the same images in the same order."""
        if not np.array_equal(tiles.table["digest"], self.table["digest"]):
            raise InputError(f"features {self.name} belong to other images than those of {tiles.name}")
        return replace(self, tiles=tiles)


def extract(
    model: nn.Module | str | Path,
    tiles: TileSet,
    preprocess: Callable[[np.ndarray], Tensor] | None = None,
    pool: str = "cls",
    name: str | None = None,
    folder: str | Path | None = None,
    batch_size: int = 64,
    device: str | None = None,
    layers: int = 1,
    precision: str = "float32",
) -> Features:
    """Features of every tile, from the cache where these weights have seen these images before.

    model       a timm-like network, any name that `backbones.load` takes, or that of a floor:
                chance, colour, histogram, lbp, colour+lbp, metadata
    preprocess  uint8 (B, h, h, 3) to float (B, 3, H, W); None takes the folder's or timm's own mean, standard
                deviation and input size. Tiles that are not square are cut to their central square
    pool        "cls" token, "mean" of the patch tokens, or "both" side by side
    folder      of the cache; None is <cache_dir>/features
    device      to move the model to; None leaves it where it is
    layers      the last so many blocks side by side; with pool "both" the CLS of all, then the means of all
    precision   "float32", "bfloat16", or "auto": bfloat16 for a large set where, on 512 of its tiles, 99 % of the
                20 nearest neighbours stay and the scores of kNN and linear probe move by 0.2 points at most; stored
                as float32. What was found stands in the provenance, of "bfloat16" too, which warns where it is less

    An extraction that was killed goes on behind its last whole batch, and gives the same numbers.
    Raises InputError for an unknown floor or pool, a model without the token or layers asked for, an input size
    it refuses, and features that are not finite.
    """
    make = _maker(model, tiles, preprocess, pool, layers, device)
    extractor = make(precision)
    key = _key(extractor, tiles)
    folder = Path(folder) if folder else cache_dir() / "features"
    path, record = folder / f"{key}.npy", folder / f"{key}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        if _stale(path, record, len(tiles)):
            chosen, agreed = extractor, None
            if precision != "float32":
                chosen, agreed = extractors.choose(make, precision, len(tiles), *_sample(tiles))
            with kept_memory(torch.device(device or "cpu")):
                width = _write(path, chosen, tiles, batch_size, name or extractor.name)
            told = {"bfloat16": agreed._asdict()} if agreed else {}
            write_json(record, {"n": len(tiles), "d": width, "key": key, **chosen.provenance, **told})
    provenance = {**read_json(record), "effective_mpp": _effective_mpp(extractor, tiles)}
    return Features(name or extractor.name, np.load(path, mmap_mode="r"), tiles, provenance)


def _maker(model, tiles: TileSet, preprocess, pool: str, layers: int, device) -> Callable[[str], Extractor]:
    """Precision -> the extractor; a floor has one precision."""
    if isinstance(model, str) and model in FLOORS:
        known = extractors.floor(model, tiles)
        return lambda precision: known
    return extractors.maker(model, preprocess, pool, layers, device)


def _sample(tiles: TileSet) -> tuple[Callable[[Extractor], np.ndarray], np.ndarray]:
    """The features of some tiles that lie as far apart as they may, and their classes."""
    some = tiles.subset(np.unique(np.linspace(0, len(tiles) - 1, extractors.SAMPLE).astype(int)))
    return lambda extractor: np.concatenate([extractor.features(*batch) for batch in _batches(some, 64)]), some.y


def pools(features: Features) -> list[Features]:
    """CLS, mean and both, in the order of POOLS, from features of pool "both": one pass makes the three.

    Features of another pool come back alone. The pool is added to the name.
    """
    pool, d = features.provenance["pool"], features.x.shape[1] // 2
    parts = (
        {"cls": slice(None, d), "mean": slice(d, None), "both": slice(None)} if pool == "both" else {pool: slice(None)}
    )
    return [
        replace(
            features,
            name=f"{features.name} ({part})",
            x=features.x[:, columns],
            provenance={**features.provenance, "pool": part},
        )
        for part, columns in parts.items()
    ]


def _effective_mpp(extractor: Extractor, tiles: TileSet) -> float | None:
    """Median um per pixel that the model saw; None where the tiles' mpp or the view's side is not known."""
    side = tiles.table[["width_px", "height_px"]].min(axis=1)
    if not hasattr(extractor.preprocess, "effective_mpp") or tiles.table["mpp"].isna().all():
        return None
    return float(extractor.preprocess.effective_mpp(tiles.table["mpp"], side).median())


def _write(path: Path, extractor: Extractor, tiles: TileSet, batch_size: int, name: str) -> int:
    """Writes the features as .npy batch by batch, behind what an earlier run left, and returns how many a tile has.

    Through plain writes: a memory map would end the process, not raise, where the disk is full.
    """
    partial = path.with_name(f".{path.stem}.partial")
    done, width = _kept(partial, len(tiles), batch_size)
    rest = tiles.subset(np.arange(done, len(tiles))) if done else tiles
    batches = progress(ahead(_batches(rest, batch_size)), name, -(-len(rest) // batch_size), "batch")
    try:
        with explained(path), open(partial, "ab" if done else "wb", buffering=0) as file:
            for images, rows in batches:
                x = np.ascontiguousarray(extractor.features(images, rows), dtype="<f4")
                _finite(x, rows, name)
                if not width:
                    width = x.shape[1]
                    header = {"descr": "<f4", "fortran_order": False, "shape": (len(tiles), width)}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(x.tobytes())
            os.fsync(file.fileno())
        os.replace(partial, path)
    except InputError:  # a full disk or spoilt features: what is there is no start for another try
        partial.unlink(missing_ok=True)
        raise
    return width


def _kept(partial: Path, n: int, batch_size: int) -> tuple[int, int]:
    """Rows and features a row that an interrupted extraction left, cut to whole batches; 0, 0 where it left none."""
    try:
        with open(partial, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            header = file.tell()
    except (OSError, ValueError):
        return 0, 0
    row = 4 * shape[1]
    batches = (partial.stat().st_size - header) // (row * batch_size)
    if shape[0] != n or not batches:
        return 0, 0
    os.truncate(partial, header + batches * batch_size * row)
    return min(batches * batch_size, n), shape[1]


def _batches(tiles: TileSet, batch_size: int) -> Iterator[tuple[list[np.ndarray], pd.DataFrame]]:
    """Images and their rows of the table."""
    start = 0
    for images in tiles.images(batch_size):
        yield images, tiles.table.iloc[start : start + len(images)]
        start += len(images)


def ahead(items: Iterable) -> Iterator[Any]:
    """The same items, the next one made in a thread while this one is used."""
    end, iterator = object(), iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item


def _finite(x: np.ndarray, rows: pd.DataFrame, name: str) -> None:
    bad = ~np.isfinite(x).all(axis=1)
    if bad.any():
        first = rows["file"].iloc[int(bad.argmax())]
        raise InputError(f"features '{name}' hold NaN or infinity, first for {first}; look at the weights")


def _stale(path: Path, record: Path, n: int) -> bool:
    """Whether the cached pair is missing or not what its record says."""
    try:
        said = read_json(record)
        return np.load(path, mmap_mode="r").shape != (n, said["d"])
    except (InputError, OSError, ValueError, KeyError):
        return True


def _key(extractor: Extractor, tiles: TileSet) -> str:
    return hashlib.blake2b("\n".join([extractor.key, *tiles.table["digest"]]).encode(), digest_size=12).hexdigest()
