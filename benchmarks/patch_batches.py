"""What a batch of tiles looks like, and where the time goes that it takes; see online_patching.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, default_collate, get_worker_info

from pathfm import SlideIndex, TileStream, painting, reading
from pathfm.augment import MultiCrop
from pathfm.config import PretrainConfig
from pathfm.synthetic import embedded

BATCH, PX, MPP = 64, 256, (0.25, 0.5, 1.0, 2.0)
TILES = 20 * BATCH  # drawn to judge how they mix
STEPS, VIEW_BATCH, WORKERS = 12, 32, 2


def stream() -> TileStream:
    return TileStream(SlideIndex.build(embedded(), workers=0), tile_px=PX, mpp=MPP)


def mixing() -> pd.DataFrame:
    """Slides a batch, overlap and first repeat over the embedded cohort, of a TileStream and of a pool of slides."""
    rows = [of_places("pathfm", *timed_places(own_places(stream())))]
    try:
        rows.append(of_places("wsistream, its defaults: 8 open, 100 tiles each", *timed_places(pool_places())))
    except ImportError:
        rows.append({"contender": "wsistream: not installed"})
    return pd.DataFrame(rows)


def timed_places(places: Iterable[tuple]) -> tuple[pd.DataFrame, float]:
    """slide, x, y, side (level-0 px) and mpp of TILES tiles, whose pixels are read, and tiles a CPU second."""
    began = time.process_time()
    table = pd.DataFrame(islice(places, TILES), columns=["slide", "x", "y", "side", "mpp"])
    return table, len(table) / (time.process_time() - began)


def own_places(tiles: TileStream):
    for start in range(0, TILES, BATCH):
        for tile in tiles.__getitems__(range(start, start + BATCH)):
            yield tile.slide_id, tile.x, tile.y, PX * tile.mpp / tiles.index.slide(tile.slide_id).mpp, tile.mpp


def pool_places():
    import wsistream

    sampler = wsistream.MultiMagnificationSampler(target_mpps=list(MPP), patch_size=PX)
    pipeline = wsistream.PatchPipeline(
        slide_paths=[str(path) for path in embedded().table["path"]],
        backend=wsistream.OpenSlideBackend(),
        tissue_detector=wsistream.OtsuTissueDetector(),
        sampler=sampler,
        cycle=True,
        seed=0,
    )
    finest = dict(zip(embedded().table["path"].astype(str), [None] * len(embedded().table), strict=True))
    for result in pipeline:
        at = result.coordinate
        if finest[at.slide_path] is None:
            with wsistream.SlideHandle(at.slide_path, backend=wsistream.OpenSlideBackend()) as slide:
                finest[at.slide_path] = slide.properties.mpp
        yield at.slide_path, at.x, at.y, at.patch_size * at.mpp / finest[at.slide_path], at.mpp


def of_places(name: str, table: pd.DataFrame, rate: float) -> dict:
    batches = [group for _, group in table.groupby(np.arange(len(table)) // BATCH)]
    first = first_repeat(table)
    return {
        "contender": name,
        "slides in the cohort": embedded().table["path"].nunique(),
        "slides per batch": np.mean([batch["slide"].nunique() for batch in batches]).round(1),
        "overlap in a batch": np.mean([overlap(batch) for batch in batches]).round(4),
        "tiles until a repeat": first if first is not None else np.nan,
        "CPU s until a repeat": np.nan if first is None else round(first / rate, 2),
        "tiles/CPU s": round(rate),
    }


def overlap(batch: pd.DataFrame) -> float:
    """The share of the tiles' area that another tile of the batch has shown."""
    shown = batch["side"].pow(2).sum()
    return 1 - sum(union(group) for _, group in batch.groupby("slide")) / shown


def union(tiles: pd.DataFrame) -> float:
    left, top = tiles["x"].to_numpy(float), tiles["y"].to_numpy(float)
    right, bottom = left + tiles["side"].to_numpy(), top + tiles["side"].to_numpy()
    x, y = np.unique([left, right]), np.unique([top, bottom])
    covered = np.zeros((len(y) - 1, len(x) - 1), bool)
    for k in range(len(tiles)):
        rows = slice(*np.searchsorted(y, (top[k], bottom[k])))
        covered[rows, slice(*np.searchsorted(x, (left[k], right[k])))] = True
    return float(np.diff(y) @ covered @ np.diff(x))


def first_repeat(tiles: pd.DataFrame) -> int | None:
    """The number of tiles when one first covers more than half of an earlier one at its mpp; None where none does."""
    seen: dict[tuple, list] = {}
    for n, tile in enumerate(tiles.itertuples(), 1):
        earlier = seen.setdefault((tile.slide, round(tile.mpp, 3)), [])
        for x, y in earlier:
            across, down = (max(tile.side - abs(a - b), 0) for a, b in ((tile.x, x), (tile.y, y)))
            if across * down > tile.side**2 / 2:
                return n
        earlier.append((tile.x, tile.y))
    return None


PAINT = "decode, paste and resample"
STAGES = ("draw and name", "find byte ranges", "fetch", PAINT, "the rest", "collate")


class Clock:
    """CPU seconds of each stage in each worker; a stage within another is not counted twice."""

    def __init__(self):
        self.spent = torch.zeros(WORKERS, len(STAGES), dtype=torch.float64).share_memory_()
        self.whole = torch.zeros(WORKERS, dtype=torch.float64).share_memory_()
        self.inner = 0.0

    def of(self, stage: str, function: Callable) -> Callable:
        column = STAGES.index(stage)

        def timed(*args, **kwargs):
            outer, self.inner, began = self.inner, 0.0, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.thread_time() - began
                worker = get_worker_info()
                if worker:
                    self.spent[worker.id, column] += took - self.inner
                    self.whole[worker.id] = time.process_time()
                self.inner = outer + took

        return timed


def views() -> pd.DataFrame:
    """CPU ms per tile of each stage, over the workers and this process, and its share."""
    torch.set_num_threads(1)
    clock, tiles = Clock(), stream()
    tiles.__getitems__(range(BATCH))  # compiles what is compiled
    stages = {
        (TileStream, "_named"): "draw and name",
        (reading, "planned"): "find byte ranges",
        (reading, "fetched"): "fetch",
        (painting, "paint"): PAINT,
        (reading, "_decode"): PAINT,
        (TileStream, "__getitems__"): "the rest",
    }
    before = {place: getattr(*place) for place in stages}
    for place, stage in stages.items():
        setattr(*place, clock.of(stage, before[place]))
    try:
        return _views(tiles, clock)
    finally:
        for place, function in before.items():
            setattr(*place, function)


def _views(tiles: TileStream, clock: Clock) -> pd.DataFrame:
    multicrop = MultiCrop(PretrainConfig())
    loader = DataLoader(
        tiles,
        VIEW_BATCH,
        sampler=range(BATCH, BATCH + (STEPS + 1) * VIEW_BATCH),
        num_workers=WORKERS,
        collate_fn=clock.of("collate", default_collate),
        multiprocessing_context="fork",
    )
    began, cpu, waited, viewed = time.perf_counter(), time.process_time(), 0.0, 0.0
    arrivals = iter(loader)
    for step in range(STEPS + 1):
        at = time.perf_counter()
        batch = next(arrivals)
        waited += time.perf_counter() - at
        at = time.process_time()
        multicrop(batch.image, batch.mpp, torch.Generator().manual_seed(step))
        viewed += time.process_time() - at
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    spent = dict(zip(STAGES, clock.spent.sum(0).tolist(), strict=True))
    spent["hand over and start, workers"] = float(clock.whole.sum() - clock.spent.sum())
    spent |= {"hand over, training process": cpu - viewed, "DINO's views": viewed}
    number = (STEPS + 1) * VIEW_BATCH
    table = pd.DataFrame({"stage": list(spent), "CPU ms/tile": np.array(list(spent.values())) / number * 1e3})
    table["share"] = table["CPU ms/tile"] / table["CPU ms/tile"].sum()
    wall = {"stage": f"wall, {WORKERS} workers on {os.cpu_count()} cores", "CPU ms/tile": np.nan, "wall ms/tile": wall}
    waiting = {"stage": "of it the training process waits for a batch", "wall ms/tile": waited}
    table = pd.concat([table, pd.DataFrame([wall, waiting])])
    table["wall ms/tile"] *= 1e3 / number
    return table.round({"CPU ms/tile": 3, "share": 3, "wall ms/tile": 3})
