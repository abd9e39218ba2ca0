"""Whether memory or open files grow: a long stream over many more slides than may be open, and its plot.

    python benchmarks/soak.py [--tiles 200000] [--slides 300] [--out results/soak.csv]

Slides are links to a few small synthetic ones, each a file of its own to the reader; every tenth is a TIFF with an
alpha channel, which OpenSlide reads. Batches of 64 tiles of 64 px at 0.5 and 1 um/px are read on two threads and let
go; STEPS times on the way the process's resident memory and its open files are written down. It ends with status 1
where the second half of the run took over GROWTH_MB more memory than the first, or more files are open than the two
readers may keep together. The plot is figures/soak.svg and .png.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import tifffile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pathfm import Slide, SlideIndex, TileStream, figures, index, source  # noqa: E402
from pathfm.cohort import Cohort  # noqa: E402
from pathfm.runs import stamp  # noqa: E402
from pathfm.storage import atomic  # noqa: E402
from pathfm.synthetic import tiny_cohort  # noqa: E402

BATCH, THREADS, STEPS, GROWTH_MB = 64, 2, 100, 16


def many(folder: Path, slides: int) -> Cohort:
    """A cohort of links to four slides and, every tenth, to a fifth that OpenSlide reads."""
    paths = [Path(path) for path in tiny_cohort(folder / "drawn").table["path"]]
    alpha, found = with_alpha(paths[0], folder / "alpha.tiff"), []
    for k in range(slides):
        own = alpha if k % 10 == 9 else paths[k % len(paths)]
        found.append(folder / f"slide-{k:04d}{own.suffix}")
        os.link(own, found[-1])
    return Cohort(pd.DataFrame({"slide_id": [path.stem for path in found], "path": [str(path) for path in found]}))


def with_alpha(path: Path, copy: Path) -> Path:
    with Slide.open(path) as slide:
        pixels = slide.region(0, 0, slide.width_px, slide.height_px, slide.mpp)
        scale = {"resolution": (1e4 / slide.mpp, 1e4 / slide.mpp), "resolutionunit": "CENTIMETER"}
    pixels = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    options = {"photometric": "rgb", "extrasamples": ["unassalpha"], "compression": "deflate", "metadata": None}
    tifffile.imwrite(copy, pixels, tile=(256, 256), **options, **scale)
    return copy


def soak(stream: TileStream, tiles: int) -> pd.DataFrame:
    """tiles read, memory_mb, files and cpu_s, STEPS times over the run."""
    process, rows, began = psutil.Process(), [], time.process_time()
    every = max(tiles // STEPS // BATCH, 1) * BATCH
    for start in range(0, tiles, BATCH):
        stream.__getitems__(range(start, min(start + BATCH, tiles)))
        if (start + BATCH) % every == 0:
            memory, files = process.memory_info().rss / 1e6, process.num_fds()
            rows.append({"tiles": start + BATCH, "memory_mb": memory, "files": files})
            rows[-1]["cpu_s"] = time.process_time() - began
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame, most: int) -> plt.Figure:
    fig, (memory, files) = plt.subplots(1, 2, figsize=(7, 2.4), layout="constrained")
    thousands = table["tiles"] / 1000
    memory.plot(thousands, table["memory_mb"], color="#0072B2")
    memory.set(xlabel="thousand tiles read", ylabel="resident memory, MB", ylim=(0, 1.25 * table["memory_mb"].max()))
    files.plot(thousands, table["files"], color="#0072B2")
    files.axhline(most, color="#999999", ls="--", lw=1)
    files.annotate("most the readers may keep", (thousands.iloc[-1], most), ha="right", va="bottom", fontsize=7)
    files.set(xlabel="thousand tiles read", ylabel="open files", ylim=(0, 1.2 * most))
    return fig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=200_000)
    parser.add_argument("--slides", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "soak.csv")
    parser.add_argument("--figures", type=Path, default=None, help="folder of the plot; default: figures/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cohort = many(Path(scratch), options.slides)
        stream = TileStream(
            SlideIndex.build(cohort, Path(scratch) / "index", workers=0), tile_px=64, mpp=(0.5, 1.0), threads=THREADS
        )
        most = psutil.Process().num_fds() + source.OPEN_FILES
        most += index.OPEN_SLIDES * THREADS  # OpenSlide opens a slide anew for each thread that reads it
        table = soak(stream, options.tiles)
    half = len(table) // 2
    growth = table["memory_mb"][half:].max() - table["memory_mb"][:half].max()
    print(table.iloc[:: max(len(table) // 10, 1)].round(1).to_string(index=False))
    print(f"{options.slides} slides; at most {table['files'].max()} files open, {most} allowed")
    print(f"greatest memory of the second half over that of the first: {growth:+.1f} MB")
    figures.use_style()
    figures.save(plot(table, most), "soak", options.figures)
    with atomic(options.out) as file:
        about = {"slides": options.slides, **stamp()}
        table.assign(**about).to_csv(file, index=False, float_format="%.1f")
    return int(growth > GROWTH_MB or table["files"].max() > most)


if __name__ == "__main__":
    sys.exit(main())
