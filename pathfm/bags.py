"""Features of whole slides: a bag of tiles a slide, from a fixed grid, computed once, on this machine or on Dask."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
from filelock import FileLock
from torch import Tensor, nn

from pathfm import extractors, jobs
from pathfm.descriptors import DESCRIPTORS
from pathfm.errors import InputError
from pathfm.extractors import Extractor
from pathfm.features import ahead
from pathfm.grids import Grid
from pathfm.index import SlideIndex
from pathfm.storage import atomic, atomic_path, cache_dir, progress, read_json, write_json

BATCH = 64  # tiles read and embedded at once
SAMPLED = 32  # slides on whose tiles bfloat16 is compared with float32


class Cut(NamedTuple):
    """How slides are cut into tiles; see `pathfm.grids.Grid`."""

    tile_px: int = 224
    mpp: float = 0.5  # um/px
    stride_px: int | None = None  # None: neither gap nor overlap
    min_tissue: float = 0.4
    most: int = 0  # tiles a slide, drawn at random where it has more; 0 takes all
    seed: int = 42  # of that draw, which the slide's name decides too

    def tiles(self, index: SlideIndex) -> tuple[Grid, np.ndarray]:
        """The grid of the one slide of an index, and the numbers of the tiles that are taken, in their order."""
        grid = Grid(index, *self[:2], self.stride_px, self.min_tissue)
        if not self.most or len(grid) <= self.most:
            return grid, np.arange(len(grid))
        name = hashlib.blake2b(grid.table["slide_id"].iloc[0].encode(), digest_size=8).digest()
        rng = np.random.default_rng([self.seed, int.from_bytes(name, "little")])
        return grid, np.sort(rng.choice(len(grid), self.most, replace=False))


class Source(NamedTuple):
    """A backbone as it travels to a worker: a name or folder that workers know too, and the weights it must have."""

    folder: str
    weights: str
    preprocess: Callable | None
    pool: str
    layers: int
    precision: str
    device: str | None


@dataclass(frozen=True, repr=False)
class Bags:
    """Features of the tiles of slides.

    slides       table, one row a slide: the index's columns and n_tiles; labels are columns of the cohort
    files        the .npy of each slide, float32 (n_tiles, D)
    names        slide_id, x, y (level-0 px), mpp, tissue, ... of the tiles of each slide, in the rows' order
    quarantined  slide_id and reason of each slide without features: counted, never left out in silence
    provenance   what made them: model, pool, cut, effective mpp, ...
    columns      of the files that are the features: the first, and the one behind the last (None: all the rest)
    """

    name: str
    slides: pd.DataFrame
    files: list[Path]
    names: list[pd.DataFrame]
    quarantined: pd.DataFrame
    provenance: dict = field(default_factory=dict)
    columns: tuple[int, int | None] = (0, None)

    def __len__(self) -> int:
        return len(self.slides)

    def __repr__(self) -> str:
        tiles = int(self.slides["n_tiles"].sum())
        return f"Bags({self.name}: {len(self)} slides, {tiles} tiles, {len(self.quarantined)} slides quarantined)"

    def __getitem__(self, row: int) -> np.ndarray:
        """(n_tiles, D) float32 of a slide, memory-mapped and read-only."""
        return np.load(self.files[row], mmap_mode="r")[:, slice(*self.columns)]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def row(self, slide_id: str) -> int:
        """The place of a slide. Raises InputError where it has no features, with the reason."""
        found = np.flatnonzero(self.slides["slide_id"] == slide_id)
        if len(found):
            return int(found[0])
        why = self.quarantined.set_index("slide_id")["reason"].get(slide_id, "it is not in the index")
        raise InputError(f"{self.name} has no features of slide '{slide_id}': {why}")

    def subset(self, rows) -> Bags:
        """The slides of a boolean mask or of integer positions."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows)
        kept = {"files": [self.files[row] for row in rows], "names": [self.names[row] for row in rows]}
        return replace(self, slides=self.slides.iloc[rows].reset_index(drop=True), **kept)

    def of(self, table: pd.DataFrame) -> Bags:
        """The bags of the slides in a table of labels, with its columns in place of their own: a fold, a task.

        Raises InputError where a slide of the table has neither features nor a reason why: a table of other slides.
        """
        known = {*self.slides["slide_id"], *self.quarantined["slide_id"]}
        strange = [name for name in table["slide_id"] if name not in known]
        if strange:
            raise InputError(f"{len(strange)} slides of the labels are not among {self.name}'s, first {strange[0]}")
        kept = self.subset(self.slides["slide_id"].isin(table["slide_id"]).to_numpy())
        own = kept.slides.drop(columns=[c for c in table if c != "slide_id" and c in kept.slides])
        bad = self.quarantined[self.quarantined["slide_id"].isin(table["slide_id"])].reset_index(drop=True)
        return replace(kept, slides=own.merge(table, on="slide_id", validate="one_to_one"), quarantined=bad)

    @property
    def mpp(self) -> float | None:
        """Effective um per pixel of what the network saw; None of floors, which see the tiles as they are."""
        return self.provenance.get("effective_mpp")

    def pools(self) -> list[Bags]:
        """CLS, mean and both, in the order of POOLS, of bags of pool "both", whose files they share; others alone.

        The pool is added to the name.
        """
        pool, half = self.provenance.get("pool"), self[0].shape[1] // 2
        if pool != "both":
            return [self]
        parts = {"cls": (0, half), "mean": (half, None), "both": (0, None)}
        return [
            replace(self, name=f"{self.name} ({part})", columns=columns, provenance={**self.provenance, "pool": part})
            for part, columns in parts.items()
        ]

    def means(self) -> np.ndarray:
        """(S, D) float32 mean of each slide's tiles."""
        return np.stack([bag.mean(axis=0) for bag in self])

    def write(self, folder: str | Path) -> Path:
        """One <slide_id>.h5 a slide with `features` (n, D) and `coords` (n, 2), as CLAM and TRIDENT keep them."""
        for slide_id, x, names in zip(self.slides["slide_id"], self, self.names, strict=True):
            with atomic_path(Path(folder) / f"{slide_id}.h5") as path, h5py.File(path, "w") as file:
                file["features"], file["coords"] = x, names[["x", "y"]].to_numpy(np.int64)
                file["features"].attrs["name"] = self.name
                file["coords"].attrs["mpp"] = float(names["mpp"].iloc[0])
        return Path(folder)


def extract(
    model: nn.Module | str | Path,
    index: SlideIndex,
    cut: Cut | None = None,
    preprocess: Callable[[np.ndarray], Tensor] | None = None,
    pool: str = "cls",
    name: str | None = None,
    folder: str | Path | None = None,
    device: str | None = None,
    layers: int = 1,
    precision: str = "float32",
    workers: int = 0,
    scheduler: str | None = None,
) -> Bags:
    """Features of every tile of a grid over every usable slide; slides done before are taken from the cache.

    model      as in `features.extract`; of the floors those that look at pixels: colour, histogram, lbp, colour+lbp
    cut        which tiles; None: Cut()
    folder     of the cache; None is <cache_dir>/bags. One file a slide, so that what was killed goes on
    precision  "float32", "bfloat16" or "auto", as `features.extract` has it; of a sample of SAMPLED slides' tiles the
               neighbours are compared, for tiles of slides have no labels that a probe could be asked
    workers    processes on this machine, one slide each at a time; 0 or 1: this process
    scheduler  address of a Dask scheduler; its workers see slides, index and model under the same paths

    A slide that cannot be read, or has no tile, is quarantined with its reason. Raises InputError where that is
    every one, and where a network is to go to workers that is no folder.
    """
    cut = cut or Cut()
    make, folder = _maker(model, preprocess, pool, layers, device), Path(folder) if folder else cache_dir() / "bags"
    folder.mkdir(parents=True, exist_ok=True)
    reasons = dict(zip(index.quarantined["slide_id"], index.quarantined["reason"], strict=True))
    found, todo, grids = {}, {}, []
    for row in index.usable.itertuples():
        try:
            grid, taken = cut.tiles(index.subset([row.slide_id]))
        except InputError as error:
            reasons[row.slide_id] = str(error)
        else:
            grids.append((row, grid.table.iloc[taken].drop(columns="i").reset_index(drop=True)))
    extractor, told = _chosen(make, precision, index, cut, grids, folder)
    source = extractor
    if workers > 1 or scheduler is not None:
        source = _source(model, preprocess, pool, layers, extractor, device)
    for row, names in grids:
        path = folder / f"{_key(extractor.key, row, names)}.npy"
        found[row.slide_id] = path, names
        if not _whole(path, len(names)):
            todo[row.slide_id] = source, index.subset([row.slide_id]), cut
    with FileLock(folder / f"{_hash(extractor.key)}.lock"):
        results = jobs.run(embed_slide, todo, _crashed, workers, scheduler)
        with contextlib.closing(results):
            for slide_id, result in progress(results, name or extractor.name, len(todo), "slide"):
                if isinstance(result, str):
                    reasons[slide_id] = result
                    del found[slide_id]
                else:
                    _keep(found[slide_id][0], result)
    seen = getattr(extractor.preprocess, "effective_mpp", None)
    told |= {**cut._asdict(), "effective_mpp": seen and float(seen(cut.mpp, cut.tile_px))}
    return _bags(name or extractor.name, index, found, reasons, {**extractor.provenance, **told})


def embed_slide(source: Source | Extractor, index: SlideIndex, cut: Cut) -> np.ndarray | str:
    """(n, D) float32 of the one slide of an index, or why it has none."""
    extractor = source if isinstance(source, Extractor) else _opened(source)
    grid, taken = cut.tiles(index)
    batches = (grid.__getitems__(numbers) for numbers in np.array_split(taken, -(-len(taken) // BATCH)))
    found = []
    reading = ahead(batches)
    while True:
        try:
            tiles = next(reading, None)
        except InputError as error:  # the slide's, not the model's
            return str(error)
        if tiles is None:
            return np.concatenate(found)
        x = np.asarray(extractor.features([tile.image for tile in tiles], None), np.float32)
        if not np.isfinite(x).all():
            raise InputError(
                f"features '{extractor.name}' hold NaN or infinity in {tiles[0].slide_id}; see the weights"
            )
        found.append(x)


def _maker(model, preprocess, pool: str, layers: int, device) -> Callable[[str], Extractor]:
    """Precision -> the extractor; a floor has one precision."""
    if isinstance(model, str) and model in extractors.FLOORS:
        if model not in DESCRIPTORS:
            raise InputError(f"the floor '{model}' is of labelled tiles; slides take {', '.join(DESCRIPTORS)}")
        known = extractors.floor(model, None)
        return lambda precision: known
    return extractors.maker(model, preprocess, pool, layers, device)


def _chosen(make, precision: str, index: SlideIndex, cut: Cut, grids: list, folder: Path) -> tuple[Extractor, dict]:
    """The extractor of a precision, and how far bfloat16 agreed with float32, measured once for the same slides."""
    asked = make(precision)
    if not grids or asked.provenance.get("precision", "float32") == "float32":
        return asked, {}
    record = folder / f"{_hash(*(_key(asked.key, *slide) for slide in grids))}.json"
    with contextlib.suppress(InputError):
        said = read_json(record)
        return make(said["precision"]), {"bfloat16": said["bfloat16"]}
    images: list[np.ndarray] = []

    def sample(extractor: Extractor) -> np.ndarray:
        images.extend([] if images else _images(index, cut, grids))
        parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return np.concatenate([np.asarray(extractor.features(part, None), np.float32) for part in parts])

    extractor, agreed = extractors.choose(make, precision, sum(len(names) for _, names in grids), sample)
    if agreed is None:
        return extractor, {}
    told = {"bfloat16": agreed._asdict()}
    write_json(record, {"precision": extractor.provenance["precision"], **told})
    return extractor, told


def _images(index: SlideIndex, cut: Cut, grids: list) -> list[np.ndarray]:
    """About extractors.SAMPLE tiles of up to SAMPLED slides; one that cannot be read gives none."""
    some_slides = np.unique(np.linspace(0, len(grids) - 1, min(SAMPLED, len(grids))).astype(int))
    found, each = [], -(-extractors.SAMPLE // len(some_slides))
    for row in (grids[i][0] for i in some_slides):
        grid, taken = cut.tiles(index.subset([row.slide_id]))
        some = taken[np.unique(np.linspace(0, len(taken) - 1, each).astype(int))]
        with contextlib.suppress(InputError):  # the slide's, which will be quarantined
            found += [tile.image for tile in grid.__getitems__(some)]
    if not found:
        raise InputError(f"no slide of {index} can be read to compare precisions; say precision='float32'")
    return found


def _source(model, preprocess, pool: str, layers: int, extractor: Extractor, device) -> Extractor | Source:
    """What stands for an extractor in a job on another machine."""
    if isinstance(model, nn.Module):
        raise InputError("a network in memory does not go to other processes; write it with pathfm.export.export "
                         "and give its folder")  # fmt: skip
    if "weights" not in extractor.provenance:
        return extractor  # a floor
    name = str(model).removeprefix("twin:")
    whole = name if ":" in name else str(Path(name).absolute())  # workers have a working folder of their own
    folder = whole if name == str(model) else f"twin:{whole}"
    how = extractor.provenance["weights"], preprocess, pool, layers, extractor.provenance["precision"], device
    return Source(folder, *how)


@functools.lru_cache(maxsize=1)
def _opened(source: Source) -> Extractor:
    """The backbone of a worker, loaded once. Raises InputError where its folder holds other weights than here."""
    folder, weights, *how = source
    made = extractors.backbone(folder, *how)
    if made.provenance["weights"] != weights:
        raise InputError(
            f"{folder} holds other weights on a worker than here; copy the model to where workers see it. Random ones "
            "are the same where machines and their torch are"
        )
    return made


def _crashed(source, index: SlideIndex, cut: Cut) -> str:
    return f"{index.slides['slide_id'].iloc[0]} crashes its reader; fetch the file again or leave it out"


def _bags(name: str, index: SlideIndex, found: dict, reasons: dict, provenance: dict) -> Bags:
    if not found:
        raise InputError(f"no slide of {index} has features. The first: {next(iter(reasons.values()), 'it is empty')}")
    slides = index.usable
    slides = slides[slides["slide_id"].isin(found)].reset_index(drop=True)
    files, names = zip(*(found[slide_id] for slide_id in slides["slide_id"]), strict=True)
    slides["n_tiles"] = [len(one) for one in names]
    bad = pd.DataFrame(sorted(reasons.items()), columns=["slide_id", "reason"])
    return Bags(name, slides, list(files), list(names), bad, provenance)


def _key(extractor: str, row, names: pd.DataFrame) -> str:
    """Of the model, the version of the slide's file, and its tiles."""
    version = f"{row.tag} {row.bytes}" if row.tag else row.part
    return _hash(extractor, version, names.drop(columns="slide_id").to_csv(index=False))


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()


def _whole(path: Path, n: int) -> bool:
    try:
        return len(np.load(path, mmap_mode="r")) == n
    except (OSError, ValueError):
        return False


def _keep(path: Path, x: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, x)
    with atomic(path) as file:
        file.write(buffer.getbuffer())
