"""How fast tiles' bytes come from a disk, a web server, and the same server 50 ms away.

    python benchmarks/object_store.py [--cohort cohort.csv] [--threads 1] [--repeats 5] [--in-flight 128]

A tile is the square of 256 level-0 pixels at a random place in tissue: all compressed tiles that it touches, mostly
four in two windows. Batches of 64 tiles are drawn from all slides at random, as in training, and the next two batches
are on their way while one is worked on. Three things are measured, in turn, `repeats` times; the median is printed:

  bytes     the bytes alone
  decoded   the bytes and the JPEG decoding of every compressed tile, on `threads` threads
  stream    tiles of a TileStream over the same slides by path and by address, where it reads addresses

"relay" is nginx behind a relay that passes bytes on at once, "relay + 50 ms" the same relay holding each request back:
their ratio is what latency costs. With W windows in flight, no more than W / 0.05 windows can come in a second.
nginx, relay and reader share this machine's cores, so that rates say little where those are busy; "CPU us/tile" is of
the reading process alone, and "of disk by CPU" the share of the local speed that is left where CPU time is the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import tifffile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from servers import delayed, nginx  # noqa: E402

from pathfm import Cohort, InputError, SlideIndex, TileStream  # noqa: E402
from pathfm.source import Source, arriving, open_all, traffic  # noqa: E402

TILE_PX = 256
BATCH = 64
AHEAD = 2  # batches on their way while one is worked on
LATENCY_S = 0.05


class Grid:
    """Where the compressed tiles of a slide's level 0 lie."""

    def __init__(self, path: str):
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            if page.compression != tifffile.COMPRESSION.JPEG or page.jpegtables:
                raise InputError(f"{path} is not compressed by JPEG without shared tables; give another cohort")
            self.side, columns = page.tilewidth, -(-page.imagewidth // page.tilewidth)
            self.starts = np.reshape(page.dataoffsets, (-1, columns))
            self.lengths = np.reshape(page.databytecounts, (-1, columns))
        self.tissue = np.argwhere(self.lengths[:-2, :-2] >= np.median(self.lengths))

    def ranges(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of what a tile at a random place in tissue touches."""
        row, column = self.tissue[rng.integers(len(self.tissue))]
        down, right = (1 + (rng.integers(self.side) + TILE_PX - 1) // self.side for _ in range(2))
        place = np.s_[row : row + down, column : column + right]
        return self.starts[place].ravel(), self.lengths[place].ravel()


def batches(sources: list[Source], grids: list[Grid], n: int, seed: int) -> Iterator[list]:
    """n batches of requests; the same for every kind of source."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        drawn = rng.integers(len(sources), size=BATCH)
        yield [(sources[s], *grids[s].ranges(rng)) for s in drawn]


def run(sources, grids, n: int, seed: int, in_flight: int, pool: ThreadPoolExecutor | None) -> dict[str, float]:
    """Rates over n batches; with a pool every compressed tile is decoded there as its tile's bytes arrive."""
    before, began, worked, compressed = traffic(), time.perf_counter(), time.process_time(), 0
    waiting, decoding = deque(), deque()
    for requests in batches(sources, grids, n, seed):
        compressed += sum(len(starts) for _, starts, _ in requests)
        waiting.append(arriving(requests, in_flight))
        if len(waiting) > AHEAD:
            work(waiting.popleft(), decoding, pool)
    for arrivals in waiting:
        work(arrivals, decoding, pool)
    for future in decoding:
        future.result()
    seconds, read = time.perf_counter() - began, traffic().since(before)
    return {
        "tiles/s": n * BATCH / seconds,
        "ranges/s": compressed / seconds,
        "windows/s": read.windows / seconds,
        "MB/s": read.fetched / seconds / 1e6,
        "fetched/needed": read.fetched / read.needed,
        "CPU us/tile": (time.process_time() - worked) / n / BATCH * 1e6,
    }


def work(arrivals: Iterator, decoding: deque, pool: ThreadPoolExecutor | None) -> None:
    for _, parts in arrivals:
        if pool:
            decoding.append(pool.submit(decode, parts))
        while len(decoding) > 4 * BATCH:
            decoding.popleft().result()


def decode(parts: list[bytes]) -> None:
    for part in parts:
        imagecodecs.jpeg8_decode(part)


def stream_rate(cohort: Cohort, folder: Path, n: int) -> float:
    """Tiles a second of a TileStream in this process; the index is made first, and is not timed."""
    stream = TileStream(SlideIndex.build(cohort, folder, workers=0), tile_px=TILE_PX, mpp=0.5)
    stream.__getitems__(range(BATCH))
    began = time.perf_counter()
    for k in range(1, n + 1):
        stream.__getitems__(range(k * BATCH, (k + 1) * BATCH))
    return n * BATCH / (time.perf_counter() - began)


def table(rows: dict[str, list[dict]]) -> pd.DataFrame:
    median = {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in rows.items()}
    found = pd.DataFrame(median).T
    found["of disk"] = found["tiles/s"] / found.loc["disk", "tiles/s"]
    found["of disk by CPU"] = found.loc["disk", "CPU us/tile"] / found["CPU us/tile"]
    digits = dict.fromkeys(["tiles/s", "ranges/s", "windows/s", "CPU us/tile"], 0)
    return found.round(digits | {"MB/s": 1, "fetched/needed": 3, "of disk": 2, "of disk by CPU": 2})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", type=Path, help="CSV; default: the embedded cohort")
    parser.add_argument("--threads", type=int, default=1, help="that decode")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20, help="of 64 tiles, in each measurement")
    parser.add_argument("--in-flight", type=int, default=128, help="windows asked for at once")
    options = parser.parse_args()
    if options.cohort:
        cohort = Cohort.read(options.cohort)
    else:
        from pathfm.synthetic import embedded

        cohort = embedded()
    paths = [Path(path) for path in cohort.table["path"]]
    grids = [Grid(path) for path in paths]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "www").mkdir()
        for k, path in enumerate(paths):
            (folder / "www" / f"{k}.svs").symlink_to(path.resolve())
        server = stack.enter_context(nginx(folder / "www", folder / "nginx"))
        places = {
            "disk": str(folder / "www"),
            "nginx": server,
            "relay": stack.enter_context(delayed(server, 0)),
            f"relay + {LATENCY_S * 1e3:.0f} ms": stack.enter_context(delayed(server, LATENCY_S)),
        }
        addresses = {name: [f"{place}/{k}.svs" for k in range(len(paths))] for name, place in places.items()}
        sources = {name: open_all(each) for name, each in addresses.items()}
        most = options.in_flight / LATENCY_S
        print(f"{len(paths)} slides, median of {options.repeats}; {options.in_flight} windows in flight,")
        print(f"so that {LATENCY_S * 1e3:.0f} ms away at most {most:.0f} windows come in a second")
        with ThreadPoolExecutor(options.threads) as pool:
            for title, decoder in (("bytes", None), (f"decoded on {options.threads} thread(s)", pool)):
                rows = {name: [] for name in places}
                for repeat in range(options.repeats):
                    for name in places:
                        rows[name].append(
                            run(sources[name], grids, options.batches, repeat, options.in_flight, decoder)
                        )
                found = table(rows)
                print(f"\n{title}\n{found.to_string()}")
                cost = found["tiles/s"].iloc[3] / found["tiles/s"].iloc[2]
                print(f"with {LATENCY_S * 1e3:.0f} ms added: {cost:.2f} of the same server without")
        print("\nstream")
        for name in places:
            table_of = cohort.table.assign(path=addresses[name])
            try:
                print(f"{name:>16} {stream_rate(Cohort(table_of), folder / name, options.batches):6.0f} tiles/s")
            except InputError as error:
                print(f"{name:>16} not read: {str(error)[:200]}")


if __name__ == "__main__":
    main()
