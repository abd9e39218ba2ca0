"""What planning costs with very many slides: a simulated index beside one of 10; see online_patching.py.

    python benchmarks/many_slides.py FOLDER    the figures of one simulated index, made before, as JSON

Every slide has 30,000 x 30,000 px at 0.25 um/px, levels 1-4-16 and a mask with 10 % tissue. Slides share KINDS masks
and maps of compressed tiles (their sizes drawn), 300 MB together: more than any cache of a processor holds, and less
than the 3.3 GB and 1.4 GB that 30,000 slides of their own would fill. All else is each slide's own. No file is read.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIDE, CELL, LEVELS, TILE = 30_000, 32, (1, 4, 16), 256
KINDS, TISSUE, BATCH, BATCHES = 2000, 0.1, 64, 200


def make(folder: Path, slides: int) -> None:
    """Write an index of simulated slides."""
    from pathfm import scan, tilemap
    from pathfm.decode import CODECS
    from pathfm.storage import write_json

    rng, kinds = np.random.default_rng(0), min(slides, KINDS)
    words, per_slide = masks(kinds, rng)
    maps = []
    for _ in range(kinds):
        levels, at = [], 16
        for down in LEVELS:
            level = np.zeros((), tilemap.LEVEL)
            level["width"] = level["height"] = SIDE // down
            level["tile_width"] = level["tile_height"] = TILE
            level["codec"], level["subsampling"] = CODECS.index("jpeg"), (2, 2)
            lengths = rng.gamma(4, 2000, tilemap.tiles_of(level)).astype(np.int64) + 600
            levels.append(tilemap.single(level, at + np.cumsum(lengths) - lengths, lengths, b""))
            at += int(lengths.sum())
        maps.append(tilemap.join(levels))
    shared = tilemap.join(maps)
    whose = (np.arange(slides)[:, None] % kinds * len(LEVELS) + np.arange(len(LEVELS))).ravel()
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(tilemap.FILES, shared._replace(levels=shared.levels[whose]), strict=True):
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "masks.npy", words)
    rows(slides, kinds, per_slide, rng).to_csv(folder / "slides.csv", index=False)
    write_json(folder / "index.json", {"version": scan.VERSION, "cohort": "simulated", "slides": slides})


def masks(kinds: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Packed masks, smooth blobs that fill TISSUE of a slide, and the words of one."""
    from scipy.ndimage import gaussian_filter

    from pathfm import positions

    side = -(-SIDE // CELL)
    found = []
    for kind in range(kinds):
        if kind % 50 == 0:  # 50 draws of one field, each turned another way
            field = gaussian_filter(rng.normal(size=(side // 8 + 1, side // 8 + 1)), 5)
            base = np.kron(field > np.quantile(field, 1 - TISSUE), np.ones((8, 8), bool))[:side, :side]
        found.append(positions.pack(np.roll(base, rng.integers(0, side, 2), (0, 1))).ravel())
    return np.concatenate(found), len(found[0])


def rows(slides: int, kinds: int, per_slide: int, rng: np.random.Generator) -> pd.DataFrame:
    number = np.arange(slides)
    table = pd.DataFrame({"slide_id": [f"slide-{k:05d}" for k in number]})
    table["path"] = [f"/slides/{name}.svs" for name in table["slide_id"]]
    table["patient_id"] = [f"patient-{k // 2:05d}" for k in number]
    table["label"] = rng.integers(0, 30, slides)
    return table.assign(
        status="ok",
        reason="",
        width_px=SIDE,
        height_px=SIDE,
        mpp=0.25,
        levels=" ".join(map(str, LEVELS)),
        cell_px=CELL,
        tissue_mm2=rng.gamma(4, 1.4, slides).round(3),
        reader="ranges",
        fallback="",
        codec="jpeg",
        scales="1 2 4 8",
        bytes=130_000_000,
        tag="simulated",
        part="",
        mask_start=number % kinds * per_slide,
        mask_words=math.ceil(math.ceil(SIDE / CELL) / 64),
        first_level=number * len(LEVELS),
    )


def figures(folder: Path) -> dict[str, float]:
    """Of one index, in a process of its own."""
    from pathfm import SlideIndex, TileStream, reading

    began = time.perf_counter()
    index = SlideIndex.open(folder)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    stream = TileStream(index, tile_px=TILE, mpp=(0.25, 0.5, 1.0, 2.0))
    made = time.perf_counter() - began

    def planned(numbers) -> None:
        wanted = [stream._job(name) for name in stream._named(numbers)]
        reading.planned(wanted)

    began = time.process_time()
    planned(range(BATCH))
    first = time.process_time() - began
    stages = {"drawn": lambda numbers: stream._sampler(np.array(numbers)), "named": stream._named, "planned": planned}
    for batch in range(BATCHES):
        planned(range(batch * BATCH, (batch + 1) * BATCH))
    spent = {name: [] for name in stages}
    for batch in range(BATCHES):
        for k, (name, stage) in enumerate(stages.items()):
            at = (batch + k * BATCHES // len(stages)) % BATCHES * BATCH  # not what a stage before has just touched
            began = time.process_time()
            stage(range(at, at + BATCH))
            spent[name].append(time.process_time() - began)
    found = {f"{name}, us/tile": np.median(times) / BATCH * 1e6 for name, times in spent.items()}
    context = get_context("fork")
    with context.Pool(1) as pool:
        own, whole = pool.apply(worker_memory, (Planner(stream),))
    return {
        "slides": len(index),
        **found,
        "first batch of the process, us/tile": first / BATCH * 1e6,
        "open, s": opened,
        "make a stream, s": made,
        "a worker's own memory, MB": own / 1e6,
        "a worker's resident memory, MB": whole / 1e6,
    }


class Planner:
    """A stream that travels to a worker as a DataLoader's does where processes are not forked: pickled."""

    def __init__(self, stream):
        self.stream = stream


def worker_memory(planner: Planner) -> tuple[int, int]:
    """Bytes of this process that no other shares, and all that are resident, after planning in it."""
    import psutil

    from pathfm import reading

    for batch in range(BATCHES):
        names = planner.stream._named(range(batch * BATCH, (batch + 1) * BATCH))
        wanted = [planner.stream._job(name) for name in names]
        reading.planned(wanted)
    memory = psutil.Process().memory_full_info()
    return memory.uss, memory.rss


def compare(slides: int = 30_000) -> pd.DataFrame:
    """A row of figures for 10 slides and one for `slides`, each measured in a fresh process."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in (10, slides):
            folder = Path(scratch) / str(number)
            make(folder, number)
            told = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True)
            if told.returncode:
                raise SystemExit(told.stderr)
            found.append(json.loads(told.stdout.splitlines()[-1]))
    table = pd.DataFrame(found).round(2).astype({"slides": str}).set_index("slides").T
    return table.rename_axis("figure").add_suffix(" slides").reset_index()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(json.dumps(figures(parser.parse_args().folder)))
