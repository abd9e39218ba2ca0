"""Rectangles of slides at any scale, many together: plan, fetch, decode, paste, resample.

A compressed tile that several rectangles need is fetched once, and decoded once per scale.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pathfm import painting, stores, turbojpeg
from pathfm.buffers import SCRATCH, image
from pathfm.decode import Damaged, decode, in_place, whole_jpeg
from pathfm.errors import InputError
from pathfm.resample import extent, resample
from pathfm.source import arriving
from pathfm.tilemap import Piece, Wanted, cover

FETCHERS = 4  # threads that take in what arrives from elsewhere, a batch each


class ReadPlan(NamedTuple):
    """How a slide serves an mpp: what is decoded, the true mpp returned, the grid of whole positions."""

    level: int
    downsample: float  # level-0 pixels per decoded pixel
    mpp: float  # of the pixels returned
    grid: int  # g, in level-0 pixels; positions on it are whole
    resampled: bool  # False where decoded pixels are returned as they are
    scale: int = 1  # the level is decoded at 1/scale of its size


class Job(NamedTuple):
    """width x height pixels of a slide at plan.mpp, the upper-left corner at level-0 (x, y)."""

    slide: Any  # a pathfm.slide.Slide
    plan: ReadPlan
    x: float
    y: float
    width: int
    height: int


class Frame(NamedTuple):
    """The decoded pixels that a job needs, and where in them what it asks for begins."""

    rectangle: Wanted  # its level counted within the slide
    resampled: tuple[float, float, float] | None  # left, top, step as `resample` takes them; None: as it is


def frame(job: Job) -> Frame:
    """What to decode for a job: just the pixels that its filter reaches."""
    plan = job.plan
    step = plan.mpp / job.slide.mpp / plan.downsample if plan.resampled else 1.0
    left, top = job.x / plan.downsample, job.y / plan.downsample
    if not plan.resampled and left == int(left) and top == int(top):
        return Frame(Wanted(plan.level, plan.scale, int(left), int(top), job.width, job.height), None)
    columns, rows = extent(left, step, job.width), extent(top, step, job.height)
    size = columns[1] - columns[0], rows[1] - rows[0]
    return Frame(Wanted(plan.level, plan.scale, columns[0], rows[0], *size), (left - columns[0], top - rows[0], step))


class Batch(NamedTuple):
    """Jobs, what to decode for each, and the compressed tiles that hold it: none where OpenSlide reads."""

    jobs: Sequence[Job]
    frames: list[Frame]
    pieces: list[list[Piece]]


class Begun(NamedTuple):
    """A batch whose bytes are on their way."""

    batch: Batch
    data: dict[str, Callable[[], dict]]  # see `fetched`

    @property
    def bytes(self) -> int:
        """Of compressed tiles, those that several jobs need counted for each."""
        return sum(piece.length for own in self.batch.pieces for piece in own)


def read(jobs: Sequence[Job], threads: int = 1) -> list[np.ndarray]:
    """The pixels of each job, (height, width, 3) uint8 on white. Threads change the speed and no pixel.

    Raises InputError, which names the slide, where it is damaged or has changed.
    """
    return finish(begin(jobs, threads), threads)


def begin(jobs: Sequence[Job], threads: int = 1) -> Begun:
    """Ask for the bytes of jobs, and wait for none that lie elsewhere; `finish` gives the pixels."""
    batch = planned(jobs)
    return Begun(batch, fetched(batch, threads))


def finish(begun: Begun, threads: int = 1) -> list[np.ndarray]:
    """What `read` returns, of jobs that were begun."""
    batch, data = begun
    ready = decoded_ahead(batch, data, threads)

    def paint(numbers: range) -> list[np.ndarray]:
        mapped = [k for k in numbers if batch.jobs[k].slide.tiles is not None]
        found = dict(zip(mapped, painted(batch, mapped, data, ready), strict=True))
        return [found[k] if k in found else _peers(batch.jobs[k], batch.frames[k]) for k in numbers]

    return _runs(paint, range(len(batch.jobs)), threads)


def planned(jobs: Sequence[Job]) -> Batch:
    """What reading `jobs` takes. No file is touched."""
    batch = Batch(jobs, [frame(job) for job in jobs], [[] for _ in jobs])
    maps: dict[int, list[int]] = {}
    for k, job in enumerate(jobs):
        if job.slide.tiles is not None:
            maps.setdefault(id(job.slide.tiles), []).append(k)
    for members in maps.values():
        tiles = jobs[members[0]].slide.tiles
        wanted = np.array([batch.frames[k].rectangle for k in members], np.int64)
        wanted[:, 0] += [jobs[k].slide.first_level for k in members]
        for row in cover(tiles.levels, tiles.anchors, tiles.codes, wanted).tolist():
            batch.pieces[members[row[0]]].append(Piece._make(row))
    return batch


def fetched(batch: Batch, threads: int = 1) -> dict[str, Callable[[], dict[tuple[int, int], bytes]]]:
    """For each slide by its path: a call that gives the bytes of its compressed tiles, by (level, tile).

    All ranges of all slides are asked for at once. From a disk they are here when this returns, each thread having
    read from some of the slides; those from elsewhere arrive while others are decoded.
    """
    slides, wanted = {}, {}
    for job, own in zip(batch.jobs, batch.pieces, strict=True):
        if own:
            slides[job.slide.path] = job.slide
            wanted.setdefault(job.slide.path, {}).update({(p.level, p.tile): (p.start, p.length) for p in own})
    parts, paths = {path: Future() for path in slides}, list(slides)

    def arrivals(some: list[str]) -> Iterator:
        return arriving([(slides[path].source(), *zip(*wanted[path].values(), strict=True)) for path in some])

    def bring(k: int) -> None:
        _bring(arrivals(paths[k::threads]), paths[k::threads], slides, wanted, parts)

    if any(stores.is_address(path) for path in paths):
        _pool(os.getpid(), "fetch", FETCHERS).submit(_bring, arrivals(paths), paths, slides, wanted, parts)
    else:
        _runs(lambda numbers: [bring(k) for k in numbers], range(min(threads, len(paths))), threads)
    return {path: future.result for path, future in parts.items()}


def _bring(arrivals: Iterator, paths: list[str], slides: dict, wanted: dict, parts: dict[str, Future]) -> None:
    """Fill in the bytes of these slides, or why they cannot be had."""
    try:
        for number, data in arrivals:
            path = paths[number]
            found = dict(zip(wanted[path], data, strict=True))
            if len(slides[path].tiles.checks):
                _check(slides[path], found)
            parts[path].set_result(found)
    except Exception as error:
        for path in paths:
            if not parts[path].done():
                parts[path].set_exception(error)


def _check(slide, parts: dict[tuple[int, int], bytes]) -> None:
    """Hold every compressed tile against the CRC-32 that the index has of it."""
    for (level, tile), data in parts.items():
        if zlib.crc32(data) != slide.tiles.checks[slide.tiles.levels["tile"][level] + tile]:
            raise InputError(
                f"{slide.path} is damaged: compressed tile {tile} of level {level - slide.first_level} is not what it "
                "was when it was indexed (CRC-32); fetch the file again, or build the index again if it was changed"
            )


def _key(slide, piece: Piece) -> tuple:
    return slide.path, piece.level, piece.tile, piece.scale


class Ready(NamedTuple):
    """Part of a compressed tile, decoded."""

    pixels: np.ndarray  # (rows, columns, 3) uint8, contiguous
    x: int  # where it begins in the tile
    y: int


def decoded_ahead(batch: Batch, data, threads: int) -> dict[tuple, Ready]:
    """By _key: the compressed tiles that several jobs need, and those that libjpeg-turbo does not decode in place.

    Of each the smallest box that holds what any of the jobs has of it.
    """
    users: dict[tuple, list[tuple[Piece, Any]]] = {}
    for job, own in zip(batch.jobs, batch.pieces, strict=True):
        for piece in own:
            users.setdefault(_key(job.slide, piece), []).append((piece, job.slide))
    ahead = [
        members
        for members in users.values()
        if len(members) > 1 or not in_place(members[0][1].recipe(members[0][0].level))
    ]

    def decoded(numbers: range) -> list[Ready]:
        return [_decoded(*zip(*ahead[k], strict=True), data) for k in numbers]

    keys = (_key(members[0][1], members[0][0]) for members in ahead)
    return dict(zip(keys, _runs(decoded, range(len(ahead)), threads), strict=True))


def _decoded(pieces: Sequence[Piece], slides: Sequence, data) -> Ready:
    """A compressed tile that pieces name, as far as any of them needs it."""
    lefts, tops, rights, bottoms = zip(*(piece.box for piece in pieces), strict=True)
    box, piece, slide = (min(lefts), min(tops), max(rights), max(bottoms)), pieces[0], slides[0]
    stream = data[slide.path]()[piece.level, piece.tile]
    try:
        pixels = decode(stream, slide.recipe(piece.level), piece.scale, box)
    except Damaged as why:
        raise InputError(
            f"{slide.path} is damaged: compressed tile {piece.tile} of level {piece.level - slide.first_level} (bytes "
            f"{piece.start} to {piece.start + piece.length}) {why}; fetch the file again"
        ) from None
    return Ready(np.ascontiguousarray(pixels), *box[:2])


def painted(batch: Batch, numbers: Sequence[int], data, ready: dict[tuple, Ready]) -> list[np.ndarray]:
    """The pixels of these jobs, whose compressed tiles are known."""
    found, images, pieces, owners, streams = [], [], [], [], []
    for k in numbers:
        job, framed, own = batch.jobs[k], batch.frames[k], batch.pieces[k]
        found.append(image(job.height, job.width))
        images.append(_image_row(job, framed, found[-1], len(pieces), len(own)))
        pieces += _piece_rows(job.slide, own, data[job.slide.path]() if own else {}, ready, streams)
        owners += [(piece, job.slide) for piece in own]
    images, pieces = np.array(images, painting.IMAGE), np.array(pieces, painting.PIECE)
    pieces["start"] = np.cumsum(pieces["length"]) - pieces["length"]
    tile = SCRATCH.tile(3 * int((images["tile_width"] * images["tile_height"]).max(initial=0)))
    canvas = SCRATCH.canvas(3 * int((images["width"] * images["height"]).max(initial=0)))
    joined = np.frombuffer(b"".join(streams), np.uint8)
    damaged = painting.paint(turbojpeg.ADDRESSES, joined, pieces, images, tile, canvas)
    if damaged >= 0:
        piece, slide = owners[damaged]
        _decoded([piece], [slide], data)  # says why
        raise InputError(f"{slide.path} is damaged: compressed tile {piece.tile}; fetch the file again")
    return found


def _image_row(job: Job, framed: Frame, out: np.ndarray, first: int, number: int) -> tuple:
    """painting.IMAGE of a job that writes to `out` and has `number` pieces from `first` on."""
    rectangle, resampled = framed
    how = job.slide.recipe(job.slide.first_level + rectangle.level)
    place = first, first + number, out.ctypes.data, job.width, job.height, *rectangle[2:]
    sizes = rectangle.scale, how.level_width, how.level_height, how.width, how.height
    return *place, *sizes, resampled is not None, *(resampled or (0.0, 0.0, 1.0))


def _piece_rows(
    slide, pieces: list[Piece], parts: dict, ready: dict[tuple, Ready], streams: list[bytes]
) -> list[tuple]:
    """painting.PIECE of each, its start still 0; JPEGs that are not decoded yet are added to `streams`."""
    rows = []
    for piece in pieces:
        here = ready.get(_key(slide, piece)) if ready else None
        if here is None:
            stream = whole_jpeg(parts[piece.level, piece.tile], slide.recipe(piece.level))
            streams.append(stream)
            what = len(stream), 0, 0, 0, 0, 0
        else:
            height, width = here.pixels.shape[:2]
            what = 0, here.pixels.ctypes.data, width, height, here.x, here.y
        rows.append((0, *what, piece.x, piece.y, *piece.box))
    return rows


def _peers(job: Job, framed: Frame) -> np.ndarray:
    """The pixels of a job that OpenSlide reads."""
    rectangle, resampled = framed
    canvas, shift = job.slide.peer.window(rectangle)
    if resampled is None:
        return canvas
    left, top, step = resampled
    return resample(canvas, left + shift[0], top + shift[1], step, image(job.height, job.width))


def _runs(function: Callable[[range], list], numbers: range, threads: int) -> list:
    """function of runs of numbers, which gives one result a number, in order.

    Threads take turns at runs: long enough that they seldom meet, so short that none waits long for the last.
    """
    if threads <= 1 or len(numbers) <= 1:
        return function(numbers)
    run = -(-len(numbers) // (4 * threads))
    runs = [numbers[at : at + run] for at in range(0, len(numbers), run)]
    return [result for results in _pool(os.getpid(), "decode", threads).map(function, runs) for result in results]


@lru_cache(maxsize=8)
def _pool(pid: int, purpose: str, threads: int) -> ThreadPoolExecutor:
    """Threads of this process; one that was forked starts its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"pathfm-{purpose}")
