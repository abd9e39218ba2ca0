"""How fast tiles come from a disk, a web server, and the same server 50 ms away.

    python benchmarks/object_store.py [--cohort cohort.csv] [--threads 1 2] [--mpp 0.5 0.25,0.5,1,2] [--repeats 7]

One TileStream for each place of the same slides, read as a DataLoader of no workers reads it: batches of 64 tiles of
256 px in order, after some that are not timed. The places take turns, `repeats` times, each repeat at other tiles.

  disk            the files themselves
  nginx           nginx, which serves them
  relay           nginx behind a relay that passes bytes on at once
  relay + 50 ms   the same relay, which holds every request back
  no prefetch     relay + 50 ms, and batches in an order that cannot be foreseen: each waits for its bytes

Printed is the median of each rate and, of ratios within a repeat, median and range: "of disk" is the share of the local
speed at the same number of decoding threads, "of relay" what latency costs. Servers, relay and reader share this
machine's cores, so that "of disk" is too low where those are all busy; "of disk by CPU" compares the CPU time of the
reading process alone. With 192 windows in flight at most 3,840 come in a second from 50 ms away.

The first table says what indexing asks of a server, and what the first tile takes. Results go to
results/object_store.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from servers import delayed, nginx  # noqa: E402

from pathfm import Cohort, SlideIndex, TileStream  # noqa: E402
from pathfm.runs import stamp, write_results  # noqa: E402
from pathfm.source import traffic  # noqa: E402
from pathfm.synthetic import embedded  # noqa: E402

TILE_PX, BATCH = 256, 64
WARM = 10  # batches before those that are timed: by then as many are on their way as there will be at the end
LATENCY_S = 0.05
DISK, RELAY, FAR, ALONE = "disk", "relay", f"relay + {LATENCY_S * 1e3:.0f} ms", "no prefetch"


@contextlib.contextmanager
def places(cohort: Cohort, folder: Path) -> Iterator[dict[str, Cohort]]:
    """The cohort at each place."""
    (folder / "www").mkdir()
    for k, path in enumerate(cohort.table["path"]):
        (folder / "www" / f"{k}.svs").symlink_to(Path(path).resolve())
    with (
        nginx(folder / "www", folder / "nginx") as server,
        delayed(server, 0) as relay,
        delayed(server, LATENCY_S) as far,
    ):
        roots = {DISK: folder / "www", "nginx": server, RELAY: relay, FAR: far}
        numbers = range(len(cohort))
        yield {name: Cohort(cohort.table.assign(path=[f"{at}/{k}.svs" for k in numbers])) for name, at in roots.items()}


def cold(name: str, cohort: Cohort, folder: Path, whole: int) -> tuple[SlideIndex, dict]:
    """The index of the slides at a place, made in this process, and what that took. whole: bytes of all files."""
    before, began = traffic(), time.perf_counter()
    index = SlideIndex.build(cohort, folder / name, workers=0)
    seconds, read = time.perf_counter() - began, traffic().since(before)
    stream, before, began = TileStream(index, TILE_PX, 0.5), traffic(), time.perf_counter()
    stream[0]
    first, tile = time.perf_counter() - began, traffic().since(before)
    n = len(cohort)
    found = {"s_per_slide": seconds / n, "windows_per_slide": read.windows / n, "share_of_bytes": read.fetched / whole}
    return index, found | {"first_tile_s": first, "first_tile_bytes": tile.fetched}


def batches(repeat: int, n: int, foreseen: bool) -> list[range]:
    """WARM + n batches of numbers of a repeat; unless foreseen, in an order in which no two steps are alike."""
    starts = [(repeat * 1000 + k) * BATCH for k in range(WARM + n)]
    if not foreseen:
        starts = [starts[k // 2] if k % 2 == 0 else starts[-1 - k // 2] for k in range(len(starts))]
    return [range(start, start + BATCH) for start in starts]


def run(stream: TileStream, numbers: list[range]) -> dict[str, float]:
    """Rates over the batches after the first WARM."""
    for some in numbers[:WARM]:
        stream.__getitems__(some)
    before, began, worked = traffic(), time.perf_counter(), time.process_time()
    for some in numbers[WARM:]:
        stream.__getitems__(some)
    seconds, worked, read = time.perf_counter() - began, time.process_time() - worked, traffic().since(before)
    tiles = (len(numbers) - WARM) * BATCH
    return {
        "tiles_per_s": tiles / seconds,
        "windows_per_s": read.windows / seconds,
        "mb_per_s": read.fetched / seconds / 1e6,
        "fetched_over_needed": read.fetched / read.needed,
        "cpu_us_per_tile": worked / tiles * 1e6,
    }


def rates(indexes: dict[str, SlideIndex], mpp: str, threads: int, repeats: int, n: int) -> pd.DataFrame:
    """A row a place: medians, and ratios within a repeat with their range."""
    streams = {name: TileStream(index, TILE_PX, mpp, threads=threads) for name, index in indexes.items()}
    streams[ALONE] = TileStream(indexes[FAR], TILE_PX, mpp, threads=threads)
    rows, names = [], list(streams)
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            rows.append({"place": name, "repeat": repeat, **run(streams[name], batches(repeat, n, name != ALONE))})
            time.sleep(2 * LATENCY_S)  # what was begun for nobody arrives
    table = pd.DataFrame(rows).set_index(["repeat", "place"])
    speed, cpu = table["tiles_per_s"].unstack(), table["cpu_us_per_tile"].unstack()
    found = table.groupby(level="place").median().loc[names]
    ratios = {"of_disk": speed.div(speed[DISK], axis=0), "of_relay": speed.div(speed[RELAY], axis=0)}
    for name, ratio in ratios.items():
        found[name], found[f"{name}_low"], found[f"{name}_high"] = ratio.median(), ratio.min(), ratio.max()
    found["of_disk_by_cpu"] = cpu.rdiv(cpu[DISK], axis=0).median()
    return found.reset_index().assign(mpp=mpp, threads=threads, repeats=repeats)


def shown(found: pd.DataFrame) -> str:
    """The table as it is printed."""
    digits = dict.fromkeys(["tiles_per_s", "windows_per_s", "cpu_us_per_tile"], 0)
    digits |= {"mb_per_s": 1, "fetched_over_needed": 3} | {c: 2 for c in found if c.startswith("of_")}
    return found.drop(columns=["mpp", "threads", "repeats"]).round(digits).to_string(index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", type=Path, help="CSV; default: the embedded cohort")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="that decode")
    parser.add_argument("--mpp", nargs="+", default=["0.5", "0.25,0.5,1,2"], help="laws of mpp")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, default=16, help="of 64 tiles, in each measurement")
    options = parser.parse_args()
    cohort = Cohort.read(options.cohort) if options.cohort else embedded()
    whole = sum(Path(path).stat().st_size for path in cohort.table["path"])
    about, found = stamp(), []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cohorts = stack.enter_context(places(cohort, folder))
        made = {name: cold(name, one, folder, whole) for name, one in cohorts.items()}
        indexes, costs = ({name: pair[k] for name, pair in made.items()} for k in (0, 1))
        print(f"{len(cohort)} slides of {whole / 1e6:.0f} MB together, indexed in one process")
        print(pd.DataFrame(costs).T.round({"s_per_slide": 2, "share_of_bytes": 3, "first_tile_s": 2}).to_string())
        for mpp in options.mpp:
            for threads in options.threads:
                found.append(rates(indexes, mpp, threads, options.repeats, options.batches))
                print(f"\n{mpp} um/px, {threads} decoding thread(s), {options.repeats} repeats\n{shown(found[-1])}")
    table = pd.concat(found)
    table = table.join(pd.DataFrame(costs).T.add_prefix("index_"), on="place")
    print(f"\nwritten to {write_results('object_store', table.assign(slides=len(cohort), **about)).name}")


if __name__ == "__main__":
    main()
