"""How fast slides are indexed, and what that makes of 30,000: directories alone, and with the tissue mask.

    python benchmarks/indexing.py [--slides 30000] [--repeats 3] [more.svs ...]

Real files: those of $PATHFM_TEST_DATA (or ../shared/data beside the checkout), the embedded synthetic slides, any that
are named, and one written here whose level 0 has 130,000 compressed tiles, all alike, for its directory only.

directory   `read_directory`: the tags of every level, places and lengths packed, one compressed tile a level decoded
scan        all that an index asks of a slide: the directory, the last pixels of every level, tissue, counts
away        the same over a store that answers every request LATENCY later, as many at once as the reader asks for;
            "requests" and "waiting s" are of one slide, one after another: what is not decoded meanwhile is waited for
The extrapolation takes the mean slide of each kind and one process, which N processes divide by N. A scan's CPU time
grows with the slide: that of the 30,000 px slide of online_patching.py, where it is named, is the one to go by. Times
are CPU times but for the waiting, which on a busy machine includes that for the processor.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import simplejpeg
import tifffile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pathfm import InputError, scan, slide, source, stores  # noqa: E402
from pathfm.directory import read_directory  # noqa: E402
from pathfm.metadata import Unsupported  # noqa: E402
from pathfm.storage import BlockFile  # noqa: E402
from pathfm.synthetic import embedded  # noqa: E402

LATENCY = 0.02  # seconds


class Away(source.RemoteSource):
    """A local file that answers like a store: late, and many requests at once."""

    def __init__(self, path: str | Path):
        near = source.DiskSource.look(str(path))
        source.Source.__init__(self, near.path, near.size, near.tag)
        self._near = near

    def file(self):
        return BlockFile(self)

    def close(self) -> None:
        self._near.close()

    def _fetch(self, start: int, stop: int, let_go: threading.Event | None = None) -> bytes:
        time.sleep(LATENCY)
        return self._near._fetch(start, stop)


def largest(path: Path) -> Path:
    """An SVS of 92,400 px a side, 130,321 compressed tiles of plain tissue colour, in one level."""
    side, px = 361 * 256 - 16, 256
    stream = simplejpeg.encode_jpeg(np.full((px, px, 3), (220, 160, 200), np.uint8), 75, "RGB", "420")
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(
            (stream for _ in range(361**2)),
            shape=(side, side, 3),
            dtype=np.uint8,
            tile=(px, px),
            compression="jpeg",
            photometric="ycbcr",
            metadata=None,
            description=f"Aperio Image Library\r\n{side}x{side} |AppMag = 40|MPP = 0.25",
        )
    return path


def directory(path: Path, how: type) -> None:
    with how(str(path)) as opened:
        read_directory(opened)


def whole(path: Path, how: type) -> None:
    far = mock.patch.object(stores, "is_address", lambda given: how is Away)  # which reads take windows from elsewhere
    with mock.patch.object(slide, "open_source", lambda given: how(str(given))), far:
        scan.scan(str(path), None, False)


def timed(work, path: Path, repeats: int) -> dict[str, float]:
    """Medians for one slide: CPU ms near, requests and seconds of waiting away."""
    near = []
    for _ in range(repeats):
        began = time.process_time()
        work(path, source.DiskSource.look)
        near.append(time.process_time() - began)
    before, wall, cpu = source.traffic(), time.perf_counter(), time.process_time()
    work(path, Away)
    requests = source.traffic().since(before).windows
    waiting = time.perf_counter() - wall - (time.process_time() - cpu)
    return {"CPU ms": np.median(near) * 1e3, "requests": requests, "waiting s": max(waiting, 0)}


def indexing(slides: int = 30_000, repeats: int = 3, more=()) -> pd.DataFrame:
    """A row for each kind of slide and stage."""
    data = Path(os.environ.get("PATHFM_TEST_DATA", ROOT.parent / "shared" / "data")) / "slides"
    kinds = {"real": sorted(data.glob("*.*")), "synthetic, embedded": embedded().table["path"].map(Path).tolist()[:8]}
    kinds["named"] = [Path(path) for path in more]
    rows = []
    for kind, paths in kinds.items():
        for stage, work in {"directory": directory, "scan": whole}.items():
            found = []
            for path in paths:
                try:
                    work(path, source.DiskSource.look)  # compiles, and brings the file into memory
                    found.append(timed(work, path, repeats))
                except (InputError, Unsupported) as why:  # another reader's, or no use
                    print(f"left out of {stage}: {path.name}: {why}")
            if found:
                rows.append({"slides": f"{kind}: {stage}", "files": len(found), **pd.DataFrame(found).mean()})
    with tempfile.TemporaryDirectory() as scratch:
        path = largest(Path(scratch) / "largest.svs")
        rows.append({"slides": "130,321 tiles: directory", "files": 1, **timed(directory, path, repeats)})
    table = pd.DataFrame(rows)
    table[f"h for {slides}"] = table["CPU ms"] * slides / 3.6e6
    table[f"h for {slides}, {LATENCY * 1e3:.0f} ms away"] = (table["CPU ms"] / 1e3 + table["waiting s"]) * slides / 3600
    return table.round({"CPU ms": 1, "requests": 1, "waiting s": 2}).round(2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("more", nargs="*", type=Path)
    parser.add_argument("--slides", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(indexing(options.slides, options.repeats, options.more).to_string(index=False))
