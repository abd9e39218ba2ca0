"""Rectangles of slides at any scale, many together: plan, fetch, decode, paste, resample.

A compressed tile that several rectangles need is fetched once, and decoded once per scale.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pathfm import painting, stores, turbojpeg
from pathfm.buffers import LINE, SCRATCH, decodable, image, room
from pathfm.crew import Share, crew
from pathfm.decode import Damaged, Recipe, decode, in_place
from pathfm.errors import InputError
from pathfm.resample import extent, resample
from pathfm.source import Landing, arriving
from pathfm.tilemap import PIECE, Wanted, cover

BOX = {"left": np.minimum, "top": np.minimum, "right": np.maximum, "bottom": np.maximum}
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
    pieces: np.ndarray  # (P,) tilemap.PIECE; `wanted` is the number of the job
    first: list[int]  # (n + 1,) where the pieces of each job begin
    slides: list  # those that have pieces
    files: np.ndarray  # (P,) the number in `slides` of each piece

    @property
    def bytes(self) -> int:
        """Of compressed tiles, those that several jobs need counted for each."""
        return int(self.pieces["length"].sum())


class Begun(NamedTuple):
    """A batch whose bytes are on their way, and its pixels where threads decode what lies on a disk."""

    batch: Batch
    arrivals: Arrivals
    images: list[Share] | None  # of consecutive jobs; None: not begun

    @property
    def bytes(self) -> int:
        """That it holds, at most: compressed, and decoded where that is begun."""
        decoded = sum(3 * job.width * job.height for job in self.batch.jobs) if self.images else 0
        return self.batch.bytes + decoded


def read(jobs: Sequence[Job], threads: int = 1) -> list[np.ndarray]:
    """The pixels of each job, (height, width, 3) uint8 on white. Threads change the speed and no pixel.

    Raises InputError, which names the slide, where it is damaged or has changed.
    """
    return finish(begin(jobs, threads), threads)


def begin(jobs: Sequence[Job], threads: int = 1) -> Begun:
    """Ask for the bytes of jobs, and wait for none that lie elsewhere; `finish` gives the pixels.

    Where there are several threads, all but the caller's go on to decode, unless they had to wait for bytes from
    elsewhere.
    """
    batch = planned(jobs)
    arrivals = fetched(batch, threads)
    early = threads > 1 and not any(stores.is_address(slide.path) for slide in batch.slides)
    return Begun(batch, arrivals, _images(batch, arrivals, threads) if early else None)


def finish(begun: Begun, threads: int = 1) -> list[np.ndarray]:
    """What `read` returns, of jobs that were begun."""
    shares = begun.images or _images(begun.batch, begun.arrivals, threads)
    return [image for images in crew(threads).finish(shares) for image in images]


def _images(batch: Batch, arrivals: Arrivals, threads: int) -> list[Share]:
    """The pixels of consecutive jobs, begun."""
    rows = image_rows(batch)
    ahead = decoded_ahead(batch, rows, arrivals, threads)
    return crew(threads).begin(lambda some: painted(batch, some, rows, arrivals, ahead), range(len(batch.jobs)))


def planned(jobs: Sequence[Job]) -> Batch:
    """What reading `jobs` takes. No file is touched."""
    frames = [frame(job) for job in jobs]
    maps, slides = {}, {}
    for k, job in enumerate(jobs):
        if job.slide.tiles is not None:
            maps.setdefault(id(job.slide.tiles), []).append(k)
            slides.setdefault(_file(job.slide), (len(slides), job.slide))
    found = [_pieces(jobs, frames, members) for members in maps.values()]
    pieces = found[0] if len(found) == 1 else np.concatenate([np.empty(0, PIECE), *found])
    if len(found) > 1:
        pieces = pieces[np.argsort(pieces["wanted"], kind="stable")]
    first = np.searchsorted(pieces["wanted"], np.arange(len(jobs) + 1)).tolist()
    number = np.array([slides.get(_file(job.slide), (-1,))[0] for job in jobs], np.int64)
    return Batch(jobs, frames, pieces, first, [slide for _, slide in slides.values()], number[pieces["wanted"]])


def _file(slide) -> tuple[str, int]:
    """A slide's compressed tiles are numbered by its map."""
    return slide.path, id(slide.tiles)


def _pieces(jobs: Sequence[Job], frames: list[Frame], members: list[int]) -> np.ndarray:
    """Those of the jobs of one map."""
    wanted = np.array([frames[k].rectangle for k in members], np.int64)
    wanted[:, 0] += [jobs[k].slide.first_level for k in members]
    pieces = cover(jobs[members[0]].slide.tiles, wanted)
    pieces["wanted"] = np.array(members, np.int64)[pieces["wanted"]]
    return pieces


class Arrivals:
    """The compressed bytes of a batch's pieces: here, or on their way.

    addresses   (P,) int64, where the bytes of each piece lie in memory once `wait` has returned
    """

    def __init__(self, batch: Batch):
        self.addresses = np.zeros(len(batch.pieces), np.int64)
        self._batch, self._kept, self._landing, self._coming = batch, [], [], {}

    def wait(self, pieces: np.ndarray) -> None:
        """Until the bytes of these pieces are here. Raises InputError where they cannot be had."""
        for windows in self._landing:
            windows.result()
        if self._coming:
            for file in self._coming.keys() & set(self._batch.files[pieces].tolist()):
                self._coming[file].result()

    def compressed(self, k: int) -> memoryview:
        """The bytes of piece k, which are here."""
        length = int(self._batch.pieces["length"][k])
        return memoryview((ctypes.c_ubyte * length).from_address(int(self.addresses[k]))).cast("B")

    def land(self, files: list[int], threads: int) -> None:
        """Read all pieces of these files, which lie on a disk; threads go on with it when this returns."""
        batch = self._batch
        chosen = np.flatnonzero(np.isin(batch.files, files))
        pieces, sources = batch.pieces[chosen], [slide.source() for slide in batch.slides]
        landing = Landing(sources, batch.files[chosen], pieces["start"], pieces["length"])
        self.addresses[chosen] = landing.at + landing.buffer.ctypes.data
        self._kept.append(landing.buffer)
        self._landing = crew(threads).begin(landing.bring, range(len(landing)))
        self._check(chosen)

    def ask(self, files: list[int]) -> None:
        """Ask for all pieces of these files, which lie elsewhere, and wait for none."""
        batch, chosen, requests = self._batch, [], []
        for file in files:
            chosen.append(np.flatnonzero(batch.files == file))
            pieces = batch.pieces[chosen[-1]]
            requests.append((batch.slides[file].source(), pieces["start"].tolist(), pieces["length"].tolist()))
        self._coming = {file: Future() for file in files}
        let_go = threading.Event()
        weakref.finalize(self, let_go.set).atexit = False
        _fetchers(os.getpid()).submit(_take, weakref.ref(self), arriving(requests, let_go=let_go), files, chosen)

    def take(self, file: int, chosen: np.ndarray, data: list[bytes]) -> None:
        """Note what has arrived of a file. Raises InputError where it is not what the index has of it."""
        self._kept.append(data)
        self.addresses[chosen] = [np.frombuffer(one, np.uint8).ctypes.data for one in data]
        self._check(chosen)
        self._coming[file].set_result(None)

    def give_up(self, why: Exception) -> None:
        """Say of all files that have not arrived why they cannot be had."""
        for future in self._coming.values():
            if not future.done():
                future.set_exception(why)

    def _check(self, chosen: np.ndarray) -> None:
        """Hold these pieces, once they are here, against the CRC-32 that the index has of them, if any."""
        checked = [len(slide.tiles.checks) > 0 for slide in self._batch.slides]
        if not any(checked):
            return
        for windows in self._landing:
            windows.result()
        for k in chosen[np.array(checked)[self._batch.files[chosen]]].tolist():
            slide, piece = self._batch.slides[self._batch.files[k]], self._batch.pieces[k]
            at = slide.tiles.levels["tile"][piece["level"]] + piece["tile"]
            if zlib.crc32(self.compressed(k)) != slide.tiles.checks[at]:
                raise InputError(
                    f"{slide.path} is damaged: compressed tile {piece['tile']} of level "
                    f"{piece['level'] - slide.first_level} is not what it was when it was indexed (CRC-32); fetch the "
                    "file again, or build the index again if it was changed"
                )


def _take(waiting: weakref.ref[Arrivals], coming: Iterator, files: list[int], chosen: list[np.ndarray]) -> None:
    """Hand what arrives of each file, or why it cannot be had, to whoever is still waiting for it."""
    try:
        for number, data in coming:
            if (arrivals := waiting()) is None:
                return
            arrivals.take(files[number], chosen[number], data)
            del arrivals  # or this thread would keep it while it waits for the next
    except Exception as error:
        if (arrivals := waiting()) is not None:
            arrivals.give_up(error)


def fetched(batch: Batch, threads: int = 1) -> Arrivals:
    """The bytes of a batch's pieces, all asked for at once.

    With one thread those on a disk are here when this returns; the others arrive while this thread goes on.
    """
    arrivals = Arrivals(batch)
    far = [file for file, slide in enumerate(batch.slides) if stores.is_address(slide.path)]
    near = [file for file, slide in enumerate(batch.slides) if not stores.is_address(slide.path)]
    if far:
        arrivals.ask(far)
    if near:
        arrivals.land(near, threads)
    return arrivals


def image_rows(batch: Batch) -> np.ndarray:
    """(n,) painting.IMAGE of a batch's jobs, but for where their pixels go; zeros where OpenSlide reads.

    A head without bytes says that `painting.paint` does not decode what the job needs.
    """
    rows = np.zeros(len(batch.jobs), painting.IMAGE)
    mapped = [k for k, job in enumerate(batch.jobs) if job.slide.tiles is not None]
    rows[mapped] = np.array([_image_row(batch, k) for k in mapped], painting.IMAGE)
    return rows


def _image_row(batch: Batch, k: int) -> tuple:
    job, (rectangle, resampled), how = batch.jobs[k], batch.frames[k], _recipe(batch, k)
    place = batch.first[k], batch.first[k + 1], 0, job.width, job.height, *rectangle[2:]
    sizes = rectangle.scale, how.level_width, how.level_height, how.width, how.height
    head = (np.frombuffer(how.head, np.uint8).ctypes.data, len(how.head)) if in_place(how) else (0, 0)
    return *place, *sizes, *head, how.as_it_is, resampled is not None, *(resampled or (0.0, 0.0, 1.0))


def _recipe(batch: Batch, k: int) -> Recipe:
    """How the compressed tiles of a job are decoded."""
    slide = batch.jobs[k].slide
    return slide.recipe(slide.first_level + batch.frames[k].rectangle.level)


class Ahead(NamedTuple):
    """What is decoded before any image is painted."""

    ready: np.ndarray  # (P,) painting.READY
    memory: np.ndarray  # uint8, where it lies: whoever follows an address of `ready` holds it too
    shares: Sequence[Share] = ()  # which decode it


def decoded_ahead(batch: Batch, rows: np.ndarray, arrivals: Arrivals, threads: int) -> Ahead:
    """The compressed tiles that several jobs need, and those that libjpeg-turbo does not decode in place: begun.

    Of each the smallest box that holds what any of the jobs has of it.
    """
    keys = [batch.pieces[name] for name in ("scale", "tile", "level")] + [batch.files]
    order = np.lexsort(keys)
    starts = np.flatnonzero(np.any([np.diff(key[order], prepend=-1) != 0 for key in keys], axis=0))
    sizes, pieces = np.diff(starts, append=len(order)), batch.pieces[order]  # of groups that are one compressed tile
    boxes = pieces[starts]
    for name, reach in BOX.items():
        boxes[name] = reach.reduceat(pieces[name], starts) if len(starts) else 0
    early = (sizes > 1) | (rows["head_length"][boxes["wanted"]] == 0)
    wide, high = boxes["right"] - boxes["left"], boxes["bottom"] - boxes["top"]
    ends = np.cumsum(3 * wide * high * early)
    memory, ready = room("decoded", int(ends[-1]) if len(ends) else 0), np.zeros(len(boxes), painting.READY)
    ready["pixels"] = np.where(early, memory.ctypes.data + ends - 3 * wide * high, 0)
    ready["columns"], ready["rows"], ready["x"], ready["y"] = wide, high, boxes["left"], boxes["top"]
    chosen = np.flatnonzero(early)

    def decode_some(some: range) -> None:
        few = chosen[some.start : some.stop]
        _decoded(batch, order[starts[few]], boxes[few], rows, arrivals, Ahead(ready[few], memory))

    shares = crew(threads).begin(decode_some, range(len(chosen)))
    each = np.empty(len(order), painting.READY)
    each[order] = np.repeat(ready, sizes)
    return Ahead(each, memory, shares)


def _decoded(
    batch: Batch, numbers: np.ndarray, boxes: np.ndarray, rows: np.ndarray, arrivals: Arrivals, ahead: Ahead
) -> None:
    """Decode the boxes (G,) PIECE of the compressed tiles of these pieces, each to where `ahead` has it ready."""
    arrivals.wait(numbers)
    images = rows[boxes["wanted"]]
    plain = images["head_length"] > 0
    for k, box, to in zip(numbers[~plain].tolist(), boxes[~plain], ahead.ready[~plain], strict=True):
        pixels, at = _decode(batch, k, box, arrivals), int(to["pixels"]) - ahead.memory.ctypes.data
        ahead.memory[at : at + pixels.size] = pixels.reshape(-1)
    images, own, ready, there = images[plain], boxes[plain], ahead.ready[plain], numbers[plain]
    own["x"], own["y"] = -own["left"], -own["top"]
    images["first"], images["last"] = np.arange(len(own)), np.arange(len(own)) + 1
    images["out"], images["out_width"], images["out_height"] = ready["pixels"], ready["columns"], ready["rows"]
    images["width"], images["height"] = ready["columns"], ready["rows"]
    images["level_width"] = images["level_height"] = images["resampled"] = 0  # nothing fades
    damaged = _paint(images, own, arrivals.addresses[there], np.zeros(len(own), painting.READY))
    if damaged >= 0:
        _refuse(batch, there[damaged], own[damaged], arrivals)


def painted(batch: Batch, numbers: range, rows: np.ndarray, arrivals: Arrivals, ahead: Ahead) -> list[np.ndarray]:
    """The pixels of consecutive jobs."""
    arrivals.wait(np.arange(batch.first[numbers.start], batch.first[numbers.stop]))
    for share in ahead.shares:
        share.result()
    mapped = [k for k in numbers if batch.jobs[k].slide.tiles is not None]
    found = {k: image(batch.jobs[k].height, batch.jobs[k].width) for k in mapped}
    images = rows[mapped]
    images["out"] = [one.ctypes.data for one in found.values()]
    damaged = _paint(images, batch.pieces, arrivals.addresses, ahead.ready)
    if damaged >= 0:
        _refuse(batch, damaged, batch.pieces[damaged], arrivals)
    return [found[k] if k in found else _peers(batch.jobs[k], batch.frames[k]) for k in numbers]


def _paint(images: np.ndarray, pieces: np.ndarray, addresses: np.ndarray, ready: np.ndarray) -> int:
    """`painting.paint` with room for its work."""
    if not len(images):
        return -1
    stream = SCRATCH.of("stream", int(pieces["length"].max(initial=0) + images["head_length"].max()))
    tile = decodable(SCRATCH.of("tile", 3 * int((images["tile_width"] * images["tile_height"]).max()) + LINE))
    canvas = SCRATCH.of("canvas", 3 * int((images["width"] * images["height"]).max()))
    return painting.paint(turbojpeg.ADDRESSES, pieces, addresses, ready, images, stream, tile, canvas)


def _decode(batch: Batch, k: int, box: np.void, arrivals: Arrivals) -> np.ndarray:
    """What a box (PIECE) has of piece k's compressed tile. Raises InputError, which names it, where it is damaged."""
    slide, piece = batch.slides[batch.files[k]], batch.pieces[k]
    how, edges = _recipe(batch, piece["wanted"]), tuple(box[name].item() for name in BOX)
    try:
        return decode(bytes(arrivals.compressed(k)), how, int(piece["scale"]), edges)
    except Damaged as why:
        raise InputError(
            f"{slide.path} is damaged: compressed tile {piece['tile']} of level {piece['level'] - slide.first_level} "
            f"(bytes {piece['start']} to {piece['start'] + piece['length']}) {why}; fetch the file again"
        ) from None


def _refuse(batch: Batch, k: int, box: np.void, arrivals: Arrivals) -> None:
    """Say why a piece's compressed tile cannot be decoded."""
    _decode(batch, k, box, arrivals)
    path, tile = batch.slides[batch.files[k]].path, batch.pieces["tile"][k]
    raise InputError(f"{path} is damaged: compressed tile {tile}; fetch the file again")


def _peers(job: Job, framed: Frame) -> np.ndarray:
    """The pixels of a job that OpenSlide reads."""
    rectangle, resampled = framed
    canvas, shift = job.slide.peer.window(rectangle)
    if resampled is None:
        return canvas
    left, top, step = resampled
    return resample(canvas, left + shift[0], top + shift[1], step, image(job.height, job.width))


@lru_cache(maxsize=8)
def _fetchers(pid: int) -> ThreadPoolExecutor:
    """Threads of this process; one that was forked starts its own."""
    return ThreadPoolExecutor(FETCHERS, thread_name_prefix="pathfm-fetch")
