"""How fast tiles come from a slide: pathfm beside its peers, beside the decoder's own limit, and over many slides.

    python benchmarks/online_patching.py [--side 30000] [--repeats 5] [--tiles 64] [--parts rates mixing ...]

Peers are optional, and the table names those that are missing:

    pip install wsistream tiffslide cucim-cu12

rates     One synthetic SVS (JPEG 75, 4:2:0, levels 1-4-16), made once in the cache. All contenders read the same tiles
          of 256 px, in turn, `repeats` times; medians, CPU time. "grid": corners on whole pixels of what is read, as a
          TileStream draws them; "any": on any level-0 pixel, where most loops draw. The floor is the CPU time of
          decoding each compressed tile that the batch touches once, plus one resampling of a tile where it is
          resampled, and nothing else; "of floor" is the floor's time over a contender's. pathfm decodes of a
          compressed tile only the part that is needed, which takes less than this floor; "of floor, parts" is over a
          floor that does the same. "differs" is the mean absolute difference from the OpenSlide loop, in grey levels:
          large where a peer returns another mpp than asked, which "mpp" shows. wsistream and its like return the
          nearest level.
          OpenSlide, tiffslide and cuCIM keep the slide open; "reopened" opens it for each tile, as a loop over more
          slides than it can hold must. "filtered" is pathfm with resample="always".
addresses CPU time of one thread where compressed tiles are decoded to a multiple of 32 bytes, to 16 beyond one, and to
          an odd address as `buffers.decodable` has it; in turn, on the same tiles.
mixing    What a batch of 64 looks like: slides in it, the share of its area that is seen more than once, and after how
          many tiles (seconds at the rate of this run) one first covers more than half of an earlier one at its mpp.
views     A DataLoader of 2 workers, and DINO's views in this process: where CPU time goes.
planning  A simulated index of 30,000 slides beside one of 10; see many_slides.py.
indexing  Directories and whole scans of real headers, and what 30,000 slides take; see indexing.py.

A spin probe says how many cores were free: the work that two threads do in a second of wall time over what one does in
a second of CPU time. Wall times of two threads are to be read beside it, and beside "bare": what two threads gain that
only decode, paste and resample, all else being done beforehand. Both are of BATCHES batches in a row, as a stream reads
them: with two threads the next one is begun before one is handed out.

Results go to results/online_patching.csv; parts that are not asked for stay there as they were recorded.
"""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError, RuntimeError, ValueError):
    import cucim  # before all others, and made to load its readers: beside other libraries that never ends

    cucim.CuImage(__file__)

import argparse
import functools
import hashlib
import io
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import cv2
import numpy as np
import openslide
import pandas as pd
import simplejpeg
import tifffile
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import many_slides  # noqa: E402
from indexing import indexing  # noqa: E402
from patch_batches import mixing, views  # noqa: E402

from pathfm import Slide, reading, turbojpeg  # noqa: E402
from pathfm.buffers import LINE, decodable  # noqa: E402
from pathfm.decode import whole_jpeg  # noqa: E402
from pathfm.reading import Job  # noqa: E402
from pathfm.runs import stamp  # noqa: E402
from pathfm.storage import atomic, atomic_path, cache_dir  # noqa: E402
from pathfm.synthetic import embedded  # noqa: E402

PX = 256
BATCHES = 12  # so that the first, which nothing is done beside, and the end of the last weigh little
SLIDE_MPP, LEVELS, QUALITY = 0.25, (1, 4, 16), 75
MPP = (0.25, 0.5, 1.0, 2.0, 0.3, 0.7, 1.5)
_POOL = ThreadPoolExecutor(2)
BARS = {0.25: 2.8, 0.5: 7.0, 1.0: 6.0, 2.0: 12.0}  # times an OpenSlide loop, one thread


def slide_path(side: int) -> Path:
    """A slide of side x side pixels, tissue of an embedded slide mirrored over and over; made once."""
    path = cache_dir() / "benchmarks" / f"tissue-{side}.svs"
    if path.is_file():
        return path
    table = embedded().table
    source = max((Slide.open(p) for p in table["path"]), key=lambda s: (s.mpp == SLIDE_MPP, s.width_px * s.height_px))
    piece = min(source.width_px, source.height_px) * 3 // 4 // PX * PX
    piece = min(piece, side)
    corner = (source.width_px - piece) // 2, (source.height_px - piece) // 2
    tissue = source.read(*corner, piece, source.mpp)
    back_and_forth = np.resize(np.concatenate([np.arange(piece), np.arange(piece)[::-1]]), side)

    def rows(factor: int, top: int) -> np.ndarray:
        """PX rows of a level, from `top` on; fewer at its end."""
        own = tissue[back_and_forth[top * factor : (top + PX) * factor]][:, back_and_forth]
        height, width = min(PX, side // factor - top), side // factor
        own = own[: height * factor, : width * factor]
        return own if factor == 1 else cv2.resize(own, (width, height), interpolation=cv2.INTER_AREA)

    def tiles(factor: int):
        for top in range(0, side // factor, PX):
            strip = rows(factor, top)
            strip = np.pad(strip, ((0, PX - len(strip)), (0, -strip.shape[1] % PX), (0, 0)), "edge")
            for left in range(0, strip.shape[1], PX):
                yield np.ascontiguousarray(strip[:, left : left + PX])

    options = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": QUALITY}, "metadata": None}
    with atomic_path(path) as partial, tifffile.TiffWriter(partial) as file:
        for k, factor in enumerate(LEVELS):
            n = side // factor
            about = f"Aperio Image Library\r\n{n}x{n} |AppMag = 40|MPP = {SLIDE_MPP}"
            shape = {"shape": (n, n, 3), "dtype": np.uint8, "tile": (PX, PX)}
            file.write(tiles(factor), description=about, maxworkers=1, **shape, **options)
            if not k:  # readers of SVS take the second page for the thumbnail
                small = cv2.resize(tissue, (512, 512), interpolation=cv2.INTER_AREA)
                file.write(small, rowsperstrip=16, description="Aperio Image Library\r\n512x512", **options)
    return path


class Contender(NamedTuple):
    name: str
    read: Callable[[list, float], list]  # images of (x, y) in level-0 px at an mpp
    returned: Callable[[float], float] = lambda mpp: mpp


def loop(name: str, downsamples, region: Callable) -> Contender:
    """What most code does: the best level, a region of it, PIL's bilinear (antialiasing) filter."""

    def read(corners: list, mpp: float) -> list:
        images = []
        for x, y in corners:
            level = max(k for k, down in enumerate(downsamples) if down <= mpp / SLIDE_MPP * 1.01)
            side = round(PX * mpp / SLIDE_MPP / downsamples[level])
            image = region(x, y, level, side)
            if side != PX:
                image = Image.fromarray(np.asarray(image)).resize((PX, PX), Image.BILINEAR)
            images.append(np.asarray(image))
        return images

    return Contender(name, read)


def openslide_loops(path: Path) -> list[Contender]:
    slide = openslide.OpenSlide(path)

    def region(x, y, level, side):
        return slide.read_region((x, y), level, (side, side)).convert("RGB")

    def reopened(x, y, level, side):
        with openslide.OpenSlide(path) as own:
            return own.read_region((x, y), level, (side, side)).convert("RGB")

    downsamples = slide.level_downsamples
    return [loop("OpenSlide", downsamples, region), loop("OpenSlide, reopened", downsamples, reopened)]


def wsistream_one(path: Path) -> Contender:
    from wsistream import OpenSlideBackend, SlideHandle

    slide = SlideHandle(path, backend=OpenSlideBackend())

    def read(corners: list, mpp: float) -> list:
        level = slide.best_level_for_mpp(mpp)
        return [slide.read_region(x, y, PX, PX, level) for x, y in corners]

    downsamples = slide.properties.level_downsamples
    return Contender("wsistream", read, lambda mpp: SLIDE_MPP * downsamples[slide.best_level_for_mpp(mpp)])


def tiffslide_one(path: Path) -> Contender:
    from tiffslide import TiffSlide

    slide = TiffSlide(path)
    downsamples = slide.level_downsamples
    return loop("tiffslide", downsamples, lambda x, y, k, n: slide.read_region((x, y), k, (n, n), as_array=True))


def cucim_one(path: Path) -> Contender:
    from cucim import CuImage

    slide = CuImage(str(path))
    downsamples = slide.resolutions["level_downsamples"]
    return loop("cuCIM", downsamples, lambda x, y, k, n: np.asarray(slide.read_region((x, y), (n, n), k)))


def pathfm_ones(slide: Slide) -> list[Contender]:
    def read(corners: list, mpp: float, threads: int = 1, resample: str = "auto") -> list:
        return reading.read(jobs(slide, corners, mpp, resample), threads)

    return [
        Contender("pathfm", read),
        Contender("pathfm, 2 threads", functools.partial(read, threads=2)),
        Contender("pathfm, filtered", functools.partial(read, resample="always")),
    ]


def jobs(slide: Slide, corners: list, mpp: float, resample: str = "auto") -> list[Job]:
    return [Job(slide, slide.plan(mpp, resample=resample), x, y, PX, PX) for x, y in corners]


def contenders(path: Path, slide: Slide) -> tuple[list[Contender], list[str]]:
    """Those that are here, and the names of those that are not, with the reason."""
    found, missing = openslide_loops(path), []
    for name, make in {"wsistream": wsistream_one, "tiffslide": tiffslide_one, "cuCIM": cucim_one}.items():
        try:
            found.append(make(path))
        except ImportError as error:
            missing.append(f"{name} is not installed ({error})")
    return found + pathfm_ones(slide), missing


class Floor(NamedTuple):
    """CPU seconds that a batch takes at least: what it touches decoded once, and resampled where it is."""

    whole: float  # every compressed tile from corner to corner
    parts: float  # of each only the box that is needed
    resample: float
    touched: int  # compressed tiles
    share: float  # of their area that is needed


def floor(slide: Slide, wanted: list[Job]) -> Floor:
    batch = reading.planned(wanted)
    arrivals, boxes, scales, streams = reading.fetched(batch), {}, {}, {}
    for k, piece in enumerate(batch.pieces):
        key, box = (int(piece["level"]), int(piece["tile"])), tuple(piece[name].item() for name in reading.BOX)
        boxes[key], scales[key] = union(box, boxes.get(key, box)), int(piece["scale"])
        streams[key] = whole_jpeg(bytes(arrivals.compressed(k)), slide.recipe(key[0]))
    streams = [(streams[key], scales[key], boxes[key]) for key in boxes]
    filtered = [framed for framed in batch.frames if framed.resampled]  # on the grid by chance: not
    share = np.mean([(x1 - x0) * (y1 - y0) * scale**2 / PX**2 for _, scale, (x0, y0, x1, y1) in streams])
    whole, parts = decoding(streams, simply), decoding(streams, partly if turbojpeg.LIBRARY else simply)
    return Floor(whole, parts, resampling(filtered), len(boxes), share)


def in_order(batches: list[list[Job]], threads: int) -> float:
    """Wall seconds of reading batch after batch, as a TileStream that is walked in order does."""
    began, under_way = time.perf_counter(), None
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        under_way = under_way or reading.begin(batch, threads)
        ahead = reading.begin(following, threads) if following and threads > 1 else None
        reading.finish(under_way, threads)
        under_way = ahead
    return time.perf_counter() - began


def side_by_side(batches: list[list[Job]]) -> tuple[float, float]:
    """How much sooner two threads are done than one, and two that only decode, paste and resample, in turn."""
    batch = reading.planned([job for jobs in batches for job in jobs])
    arrivals, rows, half = reading.fetched(batch), reading.image_rows(batch), len(batches[0]) // 2
    ahead = reading.decoded_ahead(batch, rows, arrivals, 1)
    parts = [range(k, k + half) for k in range(0, len(batch.jobs), half)]

    def seconds(turns: Callable) -> float:
        began = time.perf_counter()
        list(turns(lambda part: len(reading.painted(batch, part, rows, arrivals, ahead)), parts))
        return time.perf_counter() - began

    def sooner(one: Callable[[], float], two: Callable[[], float]) -> float:
        """By the better of two turns each, so that what else the machine does weighs less."""
        times = [(one(), two()) for _ in range(2)]
        return min(first for first, _ in times) / min(second for _, second in times)

    ours = sooner(lambda: in_order(batches, 1), lambda: in_order(batches, 2))
    return ours, sooner(lambda: seconds(map), lambda: seconds(_POOL.map))


def addresses(side: int, repeats: int, n: int) -> pd.DataFrame:
    """ms of CPU time per tile by where tiles are decoded to, medians."""
    found = []
    with Slide.open(slide_path(side)) as slide:
        for asked, seed in itertools.product((0.25, 1.0, 0.7), range(-1, repeats)):  # the first compiles
            corners = corners_of(slide, asked, "grid", n, np.random.default_rng(seed + 1))
            row, several = {"asked": asked}, jobs(slide, corners, asked)
            for beyond in (0, 16, 1):
                to = functools.partial(beginning, beyond=beyond)
                with mock.patch.object(reading, "decodable", to):
                    began = time.process_time()
                    reading.read(several)
                    row[f"{beyond} beyond"] = (time.process_time() - began) / n * 1e3
            found += [row] if seed >= 0 else []
    return pd.DataFrame(found).groupby("asked", sort=False).median().reset_index()


def beginning(memory: np.ndarray, beyond: int) -> np.ndarray:
    """`memory` from so many bytes beyond a multiple of LINE on."""
    return memory[(beyond - memory.ctypes.data) % LINE :]


def union(a: tuple, b: tuple) -> tuple[int, int, int, int]:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def simply(stream: bytes, scale: int, box: tuple, buffer: np.ndarray) -> None:
    simplejpeg.decode_jpeg(stream, "RGB", False, False, PX // scale, PX // scale, 1, buffer)


def partly(stream: bytes, scale: int, box: tuple, buffer: np.ndarray) -> None:
    turbojpeg.decode(stream, (PX, PX), scale, box, buffer)


def decoding(streams: list[tuple[bytes, int, tuple]], decoder: Callable) -> float:
    """CPU seconds of (JPEG, scale, box) each by the decoder alone."""
    buffer = decodable(np.empty(PX * PX * 3 + LINE, np.uint8))
    began = time.process_time()
    for stream, scale, box in streams:
        decoder(stream, scale, box, buffer)
    return time.process_time() - began


def resampling(frames: list[reading.Frame]) -> float:
    if not frames:
        return 0.0
    side = max(max(framed.rectangle.width, framed.rectangle.height) for framed in frames)
    source, out = np.full((side, side, 3), 128, np.uint8), np.empty((PX, PX, 3), np.uint8)
    began = time.process_time()
    for framed in frames:
        reading.resample(source, *framed.resampled, out)
    return time.process_time() - began


def free_cores(seconds: float = 0.25) -> float:
    """Work of one thread per core in `seconds` of wall time over work of one thread per second of CPU time."""
    data = bytes(1 << 16)

    def spin(done: list) -> None:
        began, rounds = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            hashlib.sha256(data)  # without the interpreter's lock
            rounds += 1
        done.append(rounds)

    began, alone, together = time.thread_time(), [], []
    spin(alone)
    per_second = alone[0] / (time.thread_time() - began)
    threads = [threading.Thread(target=spin, args=(together,)) for _ in range(os.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(together) / seconds / per_second


def corners_of(slide: Slide, mpp: float, positions: str, n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    grid = slide.plan(mpp).grid if positions == "grid" else 1
    room = (min(slide.width_px, slide.height_px) - int(PX * mpp / SLIDE_MPP) - 1) // grid
    return [tuple(corner) for corner in (rng.integers(0, room, (n, 2)) * grid).tolist()]


def repeat(slide: Slide, them: list[Contender], mpp: float, positions: str, n: int, seed: int) -> list[dict]:
    """One repeat: the floor and every contender on the same n tiles; ms per tile."""
    corners = corners_of(slide, mpp, positions, n, np.random.default_rng(seed))
    least = floor(slide, jobs(slide, corners, mpp))
    both = {name: getattr(least, name) / n * 1e3 for name in ("whole", "parts", "resample")}
    both |= {"touched": least.touched / n, "share": least.share, "cores": free_cores()}
    several = [corners_of(slide, mpp, positions, n, np.random.default_rng((seed, k))) for k in range(BATCHES)]
    both["wall_speedup"], both["bare_speedup"] = side_by_side([jobs(slide, some, mpp) for some in several])
    rows, reference = [], None
    turn = seed % len(them)
    for one in them[turn:] + them[:turn]:
        wall, cpu = time.perf_counter(), time.process_time()
        images = one.read(corners, mpp)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        sample = [np.asarray(image, np.int16) for image in images[:8]]
        rows.append({"contender": one.name, "cpu": cpu / n * 1e3, "wall": wall / n * 1e3, "sample": sample, **both})
        rows[-1]["mpp"] = one.returned(mpp)
        reference = sample if one.name == "OpenSlide" else reference
        del images
    for row in rows:
        row["differs"] = float(
            np.mean([np.abs(a - b).mean() for a, b in zip(row.pop("sample"), reference, strict=True)])
        )
    against = next(row["cpu"] for row in rows if row["contender"] == "OpenSlide")
    for row in rows:
        row |= {"of_openslide": against / row["cpu"], "of_floor": (row["whole"] + row["resample"]) / row["cpu"]}
        row["of_parts_floor"] = (row["parts"] + row["resample"]) / row["cpu"]
    return rows


def rates(side: int, repeats: int, n: int) -> tuple[pd.DataFrame, list[str]]:
    path = slide_path(side)
    found = []
    with Slide.open(path) as slide:
        them, missing = contenders(path, slide)
        for positions in ("grid", "any"):
            for asked in MPP:
                if positions == "any" and slide.plan(asked).grid == 1:
                    continue  # the same positions
                repeat(slide, them, asked, positions, 2, 0)  # compiles, and opens what is opened late
                for seed in range(repeats):
                    rows = repeat(slide, them, asked, positions, n, seed)
                    found += [{"positions": positions, "asked": asked, **row} for row in rows]
    table = pd.DataFrame(found)
    order = ["positions", "asked", "contender"]
    return table.groupby(order, sort=False).median().reset_index().sort_values(order[:2], kind="stable"), missing


def shown(table: pd.DataFrame) -> str:
    told = table.assign(rate=1e3 / table["cpu"])
    digits = {"rate": 0, "cpu": 2, "of_openslide": 2, "of_floor": 2, "of_parts_floor": 2, "differs": 1}
    told = told[["positions", "asked", "mpp", "contender", *digits]]
    named = {"cpu": "CPU ms/tile", "rate": "tiles/CPU s", "of_openslide": "x OpenSlide", "of_floor": "of floor"}
    named["of_parts_floor"] = "of floor, parts"
    return told.round(digits).rename(columns=named).to_string(index=False)


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """The bars that were set beforehand, and what was found."""
    found = []
    for row in table[table["contender"] == "pathfm"].itertuples():
        common = {"positions": row.positions, "mpp": row.asked}
        if row.asked in BARS:
            found.append({**common, "what": "times OpenSlide", "bar": BARS[row.asked], "found": row.of_openslide})
        found.append({**common, "what": "of the floor", "bar": 0.85, "found": row.of_floor})
        found.append({**common, "what": "of the floor of parts", "bar": 0.85, "found": row.of_parts_floor})
        found.append({**common, "what": "2 threads, wall", "bar": 1.8, "found": row.wall_speedup, "cores": row.cores})
        found[-1]["bare"] = row.bare_speedup
    found = pd.DataFrame(found)
    found["holds"] = np.where(found["found"] >= found["bar"], "yes", "no")
    found.loc[(found["holds"] == "no") & (found["cores"] < 1.9), "holds"] = "not told: too few free cores"
    return found.round({"found": 2, "cores": 2, "bare": 2})


def tidy(part: str, table: pd.DataFrame, cases: list[str]) -> pd.DataFrame:
    """One row a number: part, case, quantity, value."""
    case = table[cases].astype(str).agg(", ".join, axis=1)
    numbers = table.drop(columns=cases).select_dtypes("number").assign(part=part, case=case)
    return numbers.melt(["part", "case"], var_name="quantity", value_name="value").dropna()


PARTS = ["rates", "addresses", "mixing", "views", "planning", "indexing"]


def write(path: Path, table: pd.DataFrame, about: dict[str, str]) -> None:
    """A part's rows in place of those that it had, as soon as they are known; other parts stay as recorded."""
    new = table.assign(**about).to_csv(index=False, float_format="%.5g")
    rows = pd.read_csv(io.StringIO(new), dtype=str)
    if path.is_file():
        old = pd.read_csv(path, dtype=str)
        rows = pd.concat([old[~old["part"].isin(rows["part"])], rows])
    with atomic(path) as file:
        rows.sort_values("part", key=lambda names: names.map(PARTS.index), kind="stable").to_csv(file, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=30_000, help="of the synthetic slide, px; at least 8,192")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiles", type=int, default=64, help="in a batch")
    parser.add_argument("--parts", nargs="+", default=PARTS)
    parser.add_argument("--slides", type=int, default=30_000, help="of the simulated index")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "online_patching.csv")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    about = stamp()
    print(f"{about['device']}, commit {about['commit']}, {about['date']}")
    print(f"load {os.getloadavg()[0]:.1f}; {free_cores():.2f} cores free before")
    if "rates" in options.parts:
        table, missing = rates(options.side, options.repeats, options.tiles)
        print(f"\nrates, {options.side} px, median of {options.repeats} repeats of {options.tiles} tiles")
        print("\n".join([*missing, shown(table)]))
        print(
            f"\nthe floor\n{floors(table).to_string(index=False)}\n\nthe bars\n{verdicts(table).to_string(index=False)}"
        )
        write(options.out, tidy("rates", table, ["positions", "asked", "contender"]), about)
    parts = {"mixing": mixing, "views": views, "planning": lambda: many_slides.compare(options.slides)}
    parts["addresses"] = lambda: addresses(options.side, options.repeats, options.tiles)
    parts["indexing"] = lambda: indexing(options.slides, more=[slide_path(options.side)])
    for name, measure in parts.items():
        if name in options.parts:
            table = measure()
            print(f"\n{name}\n{table.to_string(index=False)}", flush=True)
            write(options.out, tidy(name, table, [table.columns[0]]), about)
    print(f"\nload {os.getloadavg()[0]:.1f}; {free_cores():.2f} cores free after")


def floors(table: pd.DataFrame) -> pd.DataFrame:
    own = table[table["contender"] == "pathfm"]
    told = own[["positions", "asked", "whole", "parts", "resample", "touched", "share", "cores"]].round(3)
    named = {"whole": "decoding, ms/tile", "parts": "decoding parts, ms/tile", "resample": "resampling, ms/tile"}
    return told.rename(columns=named | {"touched": "compressed tiles/tile", "share": "share of their area"})


if __name__ == "__main__":
    main()
