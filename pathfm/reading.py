"""Rectangles of slides at any scale, many together: plan, fetch, decode, paste, resample.

A compressed tile that several rectangles need is fetched once, and decoded once per scale.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from pathfm import stores
from pathfm.decode import Damaged, decode
from pathfm.errors import InputError
from pathfm.resample import extent, resample
from pathfm.source import arriving
from pathfm.tilemap import Piece, Wanted, cover

FETCHERS = 4  # threads that take in what arrives from elsewhere, a batch each
SPARE_BYTES = 32 * 2**20  # of images, kept for the next ones
WHITE = 255  # what is beyond the slide, and where it has no compressed tile


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
    jobs, shared = batch.jobs, _decoded_ahead(batch, data, threads)

    def paint(k: int) -> np.ndarray:
        return _paint(jobs[k], batch.frames[k], batch.pieces[k], data.get(jobs[k].slide.path), shared)

    return _each(paint, range(len(jobs)), threads)


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
        _each(bring, range(min(threads, len(paths))), threads)
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


def _decoded_ahead(batch: Batch, data, threads: int) -> dict[tuple, np.ndarray]:
    """Pixels of the compressed tiles that several jobs need, by (path, level, tile, scale): the rows that any needs."""
    users: dict[tuple, list[tuple]] = {}
    for job, own in zip(batch.jobs, batch.pieces, strict=True):
        for piece in own:
            key = job.slide.path, piece.level, piece.tile, piece.scale
            users.setdefault(key, []).append((piece.rows, piece, job.slide))
    several = [key for key, members in users.items() if len(members) > 1]

    def pixels(k: int) -> np.ndarray:
        _, piece, slide = max(users[several[k]], key=itemgetter(0))
        return _decode(slide, piece, data[slide.path](), None)

    return dict(zip(several, _each(pixels, range(len(several)), threads), strict=True))


def _decode(slide, piece: Piece, parts: dict, buffer: np.ndarray | None) -> np.ndarray:
    try:
        return decode(parts[piece.level, piece.tile], slide.recipe(piece.level), piece.scale, buffer, piece.rows)
    except Damaged as why:
        raise InputError(
            f"{slide.path} is damaged: compressed tile {piece.tile} of level {piece.level - slide.first_level} (bytes "
            f"{piece.start} to {piece.start + piece.length}) {why}; fetch the file again"
        ) from None


def _paint(job: Job, framed: Frame, pieces: list[Piece], fetched, shared: dict) -> np.ndarray:
    """One job's pixels."""
    slide, (rectangle, resampled) = job.slide, framed
    if slide.tiles is None:
        canvas, shift = slide.peer.window(rectangle)
        if resampled is None:
            return canvas
        left, top, step = resampled
        return resample(canvas, left + shift[0], top + shift[1], step, _image(job.height, job.width))
    scratch = _SCRATCH
    if resampled is None:
        canvas = _image(rectangle.height, rectangle.width)
    else:
        canvas = scratch.canvas(rectangle.height, rectangle.width)
    _paste(canvas, slide, rectangle, pieces, fetched, shared, scratch)
    if resampled is None:
        return canvas
    return resample(canvas, *resampled, _image(job.height, job.width))


def _paste(canvas, slide, rectangle: Wanted, pieces: list[Piece], fetched, shared: dict, scratch: _Scratch) -> None:
    """Decode compressed tiles onto the canvas, which shows `rectangle` of a level."""
    scale, how = rectangle.scale, slide.recipe(slide.first_level + rectangle.level)
    right = min(rectangle.width, -(-how.level_width // scale) - rectangle.left)
    width, height = how.width // scale, how.height // scale
    places = [(max(p.x, 0), max(p.y, 0), min(p.x + width, right), p.y + p.rows) for p in pieces]
    if sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in places) < rectangle.width * rectangle.height:
        canvas.fill(WHITE)
    parts, buffer = fetched() if fetched else {}, scratch.tile(3 * width * height)
    for piece, (x0, y0, x1, y1) in zip(pieces, places, strict=True):
        pixels = shared.get((slide.path, piece.level, piece.tile, scale)) if shared else None
        if pixels is None:
            pixels = _decode(slide, piece, parts, buffer)
        canvas[y0:y1, x0:x1] = pixels[y0 - piece.y : y1 - piece.y, x0 - piece.x : x1 - piece.x]
    if scale > 1:
        _fade(canvas.swapaxes(0, 1), scale, how.level_width, rectangle.left)
        _fade(canvas, scale, how.level_height, rectangle.top)


def _fade(lines: np.ndarray, scale: int, length: int, start: int) -> None:
    """Let the level's last column or row be white by the share of it that lies beyond the level.

    lines   the canvas, its first axis across the level, from decoded pixel `start` on
    length  of the level, before it is scaled
    """
    last, share = length // scale - start, length % scale / scale
    if share and 0 <= last < len(lines):
        lines[last] = np.round(WHITE + share * (lines[last].astype(np.float32) - WHITE))


_SPARE: list[np.ndarray] = []


class _Recycled:
    """Memory of one image, which goes back to `_SPARE` when the last array on it is gone.

    Fresh memory costs a page fault every 4 kB, which adds a fifth to the time that decoding takes.
    """

    def __init__(self, shape: tuple[int, int, int]):
        self.memory = None
        while self.memory is None or self.memory.shape != shape:  # an image of another size is let go
            try:
                self.memory = _SPARE.pop()
            except IndexError:
                self.memory = np.empty(shape, np.uint8)
        self.__array_interface__ = self.memory.__array_interface__

    def __del__(self, spare=_SPARE, most=SPARE_BYTES):
        if self.memory is not None and (len(spare) + 1) * self.memory.nbytes <= most:
            spare.append(self.memory)


def _image(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 with anything in it."""
    return np.asarray(_Recycled((height, width, 3)))


class _Scratch(threading.local):
    """Memory of one thread that is used again: a decoded tile, and a canvas to resample from."""

    def __init__(self):
        self._tile = np.empty(0, np.uint8)
        self._canvas = np.empty(0, np.uint8)

    def tile(self, size: int) -> np.ndarray:
        if self._tile.size < size:
            self._tile = np.empty(size, np.uint8)
        return self._tile

    def canvas(self, height: int, width: int) -> np.ndarray:
        size = 3 * height * width
        if self._canvas.size < size:
            self._canvas = np.empty(size, np.uint8)
        return self._canvas[:size].reshape(height, width, 3)


_SCRATCH = _Scratch()


def _each(function: Callable[[int], Any], numbers: range, threads: int) -> list:
    """function of each number, in order.

    Threads take turns at runs of numbers: long enough that they seldom meet, so short that none waits long for
    the last.
    """
    if threads <= 1 or len(numbers) <= 1:
        return [function(k) for k in numbers]
    run = max(1, len(numbers) // (8 * threads))
    runs = [numbers[at : at + run] for at in range(0, len(numbers), run)]
    found = _pool(os.getpid(), "decode", threads).map(lambda members: [function(k) for k in members], runs)
    return [result for results in found for result in results]


@lru_cache(maxsize=8)
def _pool(pid: int, purpose: str, threads: int) -> ThreadPoolExecutor:
    """Threads of this process; one that was forked starts its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"pathfm-{purpose}")
