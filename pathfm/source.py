"""The bytes of a slide, on a disk or in an object store: any ranges, many slides at once, nothing wrong returned.

Addresses are a path, `s3://bucket/key`, `gs://bucket/key`, `az://container/key` or `https://host/path` (`http://` too).
"""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pathfm import stores
from pathfm.buffers import room
from pathfm.errors import InputError
from pathfm.kernels import kernel
from pathfm.storage import BlockFile
from pathfm.stores import Patience

GAP = 64 * 2**10  # bytes: ranges of one slide this close are fetched together,
WASTE = 1.3  # unless more than this many bytes a byte needed would be fetched,
LONGEST = 2**20  # or the window would grow beyond this many bytes
IN_FLIGHT = 192  # windows asked for at once over the network, in a process: 3,840 a second from 50 ms away
OPEN_FILES = 64  # handles kept in a process

Request = tuple["Source", Sequence[int], Sequence[int]]  # of these bytes: starts, lengths


class Source:
    """The bytes of one slide. `open_source` is the way in; picklable, and safe in threads.

    path   as given
    size   bytes
    tag    tells this version of the file from another: size and mtime_ns on disk, over the network the ETag,
           or time and size where the server gives none

    Every read is checked against size and tag, so that a file that has changed is named and never mixed.
    """

    def __init__(self, path: str, size: int, tag: str):
        self.path, self.size, self.tag = path, int(size), tag

    @property
    def identity(self) -> str:
        """A text that another file, or another version of this one, does not have: what caches go by."""
        raise NotImplementedError

    def read(self, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """The bytes of every range, in order; see `read_all`."""
        return read_all([(self, starts, lengths)])[0]

    def file(self) -> io.RawIOBase:
        """The slide as a seekable binary file, for a library that wants one."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""

    def _fetch(self, start: int, stop: int) -> bytes:
        raise NotImplementedError

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Source({stores.shown(self.path)}, {self.size} bytes)"


def open_source(
    path: str | Path, size: int | None = None, tag: str | None = None, patience: Patience = stores.PATIENCE, **options
) -> Source:
    """The bytes at a local path or an address; raises InputError that says what is wrong and what to do.

    size, tag   as `Source` has them, where they are known (an index keeps them): then nothing is asked now, and
                a file that is another by now is named when it is read
    patience    how often and how long a remote store is asked
    options     of the store, in place of environment variables: endpoint, region, skip_signature, ...; see
                `pathfm.stores` for where credentials come from
    """
    path, known = str(path), None not in (size, tag)
    if not stores.is_address(path):
        return DiskSource(path, size, tag) if known else DiskSource.look(path)
    return RemoteSource(path, size, tag, patience, options) if known else RemoteSource.look(path, patience, options)


def open_all(paths: Sequence[str | Path], in_flight: int | None = None, **options) -> list[Source | InputError]:
    """`open_source` of many, at once over the network; an InputError stands where one cannot be opened."""

    def attempt(path: str | Path) -> Source | InputError:
        try:
            return open_source(path, **options)
        except InputError as error:
            return error

    if not any(stores.is_address(str(path)) for path in paths):
        return [attempt(path) for path in paths]
    return list(_pool(in_flight).map(attempt, paths))


class DiskSource(Source):
    """A local file. At most OPEN_FILES are open in a process."""

    @classmethod
    def look(cls, path: str) -> DiskSource:
        """The file as it is now."""
        try:
            stat = os.stat(path)
            folder = os.listdir(path) if os.path.isdir(path) else None
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; correct its path") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        if folder is not None:
            raise InputError(f"{path} is {'a folder' if folder else 'an empty folder'}; give the slide file")
        if stat.st_size == 0:
            raise InputError(f"{path} is empty (0 bytes); fetch the file again")
        return cls(path, stat.st_size, _disk_tag(stat))

    @property
    def identity(self) -> str:
        return f"{os.path.abspath(self.path)} {self.tag}"

    def file(self) -> io.FileIO:
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}") from None

    def close(self) -> None:
        _HANDLES.pop((self.path, self.tag), None)

    def _fetch(self, start: int, stop: int) -> bytearray:
        data = bytearray(stop - start)
        self.read_into([memoryview(data)], [start])
        return data

    def read_into(self, views: Sequence[memoryview], starts: Sequence[int]) -> None:
        """Fill each view with the bytes from its start on.

        The file is looked at after that, so that bytes written meanwhile are not returned.
        """
        try:
            handle = _handle(self.path, self.tag)
            whole = all(_filled(handle.number, *one) for one in zip(views, starts, strict=True))
            now = _disk_tag(os.fstat(handle.number))
        except FileNotFoundError:
            raise InputError(f"{self.path} does not exist; correct its path") from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}; check the file and its disk") from None
        if now != self.tag or not whole:
            self.close()
            raise InputError(stores.changed(self.path))


def _filled(file: int, view: memoryview, start: int) -> bool:
    """Whether an open file held what fills the view."""
    at = got = os.preadv(file, [view], start)
    while got and at < len(view):  # a signal, or more than the system reads at once
        got = os.preadv(file, [view[at:]], start + at)
        at += got
    return at == len(view)


class RemoteSource(Source):
    """An object in a store. It holds no connection: those belong to the store, which the slides in it share."""

    def __init__(self, path: str, size: int, tag: str, patience: Patience, options: dict):
        super().__init__(path, size, tag)
        self.patience, self.options = patience, options
        self._place = stores.Place.of(path)

    @classmethod
    def look(cls, path: str, patience: Patience, options: dict) -> RemoteSource:
        """The object as it is now, by one request for its first byte: a signed address may forbid HEAD."""
        found = stores.get(stores.Place.of(path), 0, 1, None, patience, options)
        return cls(path, found.size, found.tag, patience, options)

    @property
    def identity(self) -> str:
        return f"{self._place.shown} {self.size} {self.tag}"

    def file(self) -> io.RawIOBase:
        return BlockFile(self)

    def _fetch(self, start: int, stop: int, let_go: threading.Event | None = None) -> bytes:
        known = self.size, self.tag
        return stores.get(self._place, start, stop, known, self.patience, self.options, let_go).data

    def __reduce__(self):
        return RemoteSource, (self.path, self.size, self.tag, self.patience, self.options)


class Window(NamedTuple):
    """One read of one slide, and which part of it answers which range."""

    source: Source
    start: int
    stop: int
    needed: int  # bytes of it that were asked for
    pieces: list[tuple[int, int, int, int]]  # number of the request, of the range in it; start, stop


class Traffic(NamedTuple):
    """What this process has read through windows; `since` an earlier one."""

    windows: int
    fetched: int  # bytes
    needed: int  # bytes asked for, those asked for twice in a call counted once
    retries: int  # answers that were no good and were asked for again

    def since(self, before: Traffic) -> Traffic:
        return Traffic(*(now - then for now, then in zip(self, before, strict=True)))


def read_all(requests: Sequence[Request], in_flight: int | None = None) -> list[list[bytes]]:
    """For every request (source, starts, lengths) the bytes of its ranges, in order.

    in_flight   windows asked for at once over the network; None: $PATHFM_IN_FLIGHT or 192. All calls of a
                process with the same number share it

    Neighbouring ranges of one source are fetched in one window: where the gap between them is at most GAP
    (64 KiB), the window at most LONGEST (1 MiB), and its bytes at most WASTE (1.3) times those asked for. So
    bytes fetched over bytes needed never exceeds 1.3; `traffic` counts both. Files on disk are read by pread.

    Raises InputError that names the file, where a range lies outside of it, the file is another than it was when
    opened or indexed, or a store gives no good answer for as long as `Patience` says.
    """
    found: list[list[bytes]] = [[]] * len(requests)
    for number, parts in arriving(requests, in_flight):
        found[number] = parts
    return found


def arriving(
    requests: Sequence[Request], in_flight: int | None = None, let_go: threading.Event | None = None
) -> Iterator[tuple[int, list[bytes]]]:
    """`read_all` that yields (number of the request, its bytes) as they arrive; it starts asking when called.

    let_go  set by whoever does not wait for them any more: what fails is not asked for again then

    So one batch can be on its way while another is decoded.
    """
    windows = plan(requests)
    remote = [window for window in windows if isinstance(window.source, RemoteSource)]
    pool, let_go = _pool(in_flight) if remote else None, let_go or threading.Event()
    futures = {pool.submit(window.source._fetch, window.start, window.stop, let_go): window for window in remote}
    local = [window for window in windows if not isinstance(window.source, RemoteSource)]
    return _collected(requests, local, futures, let_go)


def _collected(
    requests, local: list[Window], futures: dict[Future, Window], let_go: threading.Event
) -> Iterator[tuple[int, list[bytes]]]:
    parts = [[b""] * len(starts) for _, starts, _ in requests]
    left = [sum(length > 0 for length in lengths) for _, _, lengths in requests]
    yield from ((number, parts[number]) for number, ranges in enumerate(left) if not ranges)
    windows = fetched = needed = 0
    try:
        for window, data in _answers(local, futures):
            windows, fetched, needed = windows + 1, fetched + window.stop - window.start, needed + window.needed
            data = data if isinstance(data, bytes) else memoryview(data)
            for number, k, start, stop in window.pieces:  # all of it is not copied
                parts[number][k] = bytes(data[start - window.start : stop - window.start])
                left[number] -= 1
                if not left[number]:
                    yield number, parts[number]
    finally:
        _count(windows, fetched, needed)
        let_go.set()  # nobody reads on: what has not begun is dropped, what fails is not asked for again
        for future in futures:
            future.cancel()


def _answers(local: list[Window], futures: dict[Future, Window]) -> Iterator[tuple[Window, bytes]]:
    for window in local:
        yield window, window.source._fetch(window.start, window.stop)
    for future in as_completed(futures) if futures else ():
        yield futures[future], future.result()


def plan(requests: Sequence[Request]) -> list[Window]:
    """The windows that serve all ranges; the rule stands in `read_all`. Raises InputError for a range outside."""
    sources, ranges = {}, []
    for number, (source, starts, lengths) in enumerate(requests):
        file = sources.setdefault(source, len(sources))
        for k, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            start, stop = int(start), int(start) + int(length)
            _refuse_outside(source, start, stop)
            if length:
                ranges.append((file, start, stop, number, k))
    if not ranges:
        return []
    own, spans = merged(*np.array(ranges, np.int64)[:, :3].T)
    named = list(sources)
    found = [Window(named[file], start, stop, needed, []) for file, start, stop, needed in spans.tolist()]
    for window, (_, start, stop, number, k) in sorted(zip(own.tolist(), ranges, strict=True)):
        found[window].pieces.append((number, k, start, stop))
    return found


def _refuse_outside(source: Source, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= source.size:
        raise InputError(
            f"{stores.shown(source.path)} has {source.size} bytes, and bytes {start} to {stop} are asked for; "
            "the file is damaged or its index is of another version: fetch it, or index it, again"
        )


def merged(files: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which window serves each range, (n,); file, start, stop and bytes needed of each window, (w, 4) int64."""
    order = np.lexsort((stops, starts, files))
    sorted_own, spans = _merged(files[order], starts[order], stops[order], GAP, WASTE, LONGEST)
    own = np.empty_like(sorted_own)
    own[order] = sorted_own
    return own, spans


@kernel()
def _merged(files, starts, stops, gap, waste, longest):
    own, spans, w = np.empty(len(files), np.int64), np.empty((len(files), 4), np.int64), -1
    for k in range(len(files)):
        start, stop, fits, more = starts[k], stops[k], False, np.int64(0)
        if w >= 0 and spans[w, 0] == files[k]:
            end = spans[w, 2]
            further, more = max(stop, end) - spans[w, 1], max(0, stop - max(start, end))
            fits = (
                start <= end + gap and further <= waste * (spans[w, 3] + more) and (further <= longest or start < end)
            )
        if fits:
            spans[w, 2], spans[w, 3] = max(spans[w, 2], stop), spans[w, 3] + more
        else:
            w += 1
            spans[w, 0], spans[w, 1], spans[w, 2], spans[w, 3] = files[k], start, stop, stop - start
        own[k] = w
    return own, spans[: w + 1]


class Landing:
    """Ranges of files on disks, read into one buffer. None of them is empty.

    sources                  files on disks
    files, starts, lengths   (n,) int64: the number in `sources`, and bytes, of each range
    buffer                   (N,) uint8, filled by `bring`
    at                       (n,) int64, where in it each range begins

    Raises InputError for a range outside of its file.
    """

    def __init__(self, sources: Sequence[DiskSource], files: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
        size = np.array([source.size for source in sources], np.int64)[files]
        for k in np.flatnonzero((starts < 0) | (lengths < 0) | (starts > size - lengths)):
            _refuse_outside(sources[files[k]], int(starts[k]), int(starts[k]) + int(lengths[k]))
        own, self._spans = merged(files, starts, starts + lengths)
        sizes = self._spans[:, 2] - self._spans[:, 1]
        self._at = np.cumsum(sizes) - sizes
        self.sources, self.buffer = sources, room("read", int(sizes.sum()))
        self.at = self._at[own] + starts - self._spans[own, 1]

    def __len__(self) -> int:
        """Windows to read: neighbouring ranges in one, as `read_all` does it."""
        return len(self._spans)

    def bring(self, windows: range) -> None:
        """Read some of the windows. Raises InputError as `read_all` does."""
        rows = self._spans[windows.start : windows.stop].tolist()
        places, whole = self._at[windows.start : windows.stop].tolist(), memoryview(self.buffer)
        for file, some in groupby(zip(rows, places, strict=True), key=lambda one: one[0][0]):
            some = list(some)
            views = [whole[at : at + stop - start] for (_, start, stop, _), at in some]
            self.sources[file].read_into(views, [start for (_, start, _, _), _ in some])
        _count(len(rows), sum(stop - start for _, start, stop, _ in rows), sum(needed for *_, needed in rows))


def traffic() -> Traffic:
    """All that this process has read so far from disk and network: `read_all`, `arriving`, `Landing`, `Source.read`."""
    return _traffic._replace(retries=stores.retries())


_traffic, _lock = Traffic(0, 0, 0, 0), threading.Lock()


def _count(windows: int, fetched: int, needed: int) -> None:
    global _traffic
    with _lock:
        windows, fetched, needed = windows + _traffic.windows, fetched + _traffic.fetched, needed + _traffic.needed
        _traffic = Traffic(windows, fetched, needed, 0)


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)  # another thread may hold it just then


class _Handle:
    """An open file, closed when the last reader lets go of it."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


_HANDLES: OrderedDict[tuple[str, str], _Handle] = OrderedDict()  # least recently used first


def _handle(path: str, tag: str) -> _Handle:
    """The file, open. Two threads may open it at once; the handle that is not kept closes itself."""
    handle = _HANDLES.pop((path, tag), None) or _Handle(path)
    _HANDLES[path, tag] = handle
    if len(_HANDLES) > OPEN_FILES:
        _HANDLES.popitem(last=False)
    return handle


def _disk_tag(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _pool(in_flight: int | None) -> ThreadPoolExecutor:
    given = os.environ.get("PATHFM_IN_FLIGHT", IN_FLIGHT) if in_flight is None else in_flight
    try:
        number = int(given)
    except ValueError:
        number = 0
    stores.same_process()
    if number < 1:
        raise InputError(f"in_flight (or PATHFM_IN_FLIGHT) is {given!r}; give how many windows to ask for at once")
    return _threads(number)


@lru_cache
def _threads(number: int) -> ThreadPoolExecutor:
    """Threads that wait for answers: half the CPU time a window of obstore's asyncio interface."""
    return ThreadPoolExecutor(number, thread_name_prefix="pathfm-source")
