"""The bytes of a slide, on a disk or in an object store: any ranges, many slides at once, nothing wrong returned.

Addresses are a path, `s3://bucket/key`, `gs://bucket/key`, `az://container/key` or `https://host/path` (`http://` too).
"""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pathfm import stores
from pathfm.errors import InputError
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

    def _fetch(self, start: int, stop: int) -> bytes:
        """One pread; the file is looked at after it, so that bytes written meanwhile are not returned."""
        try:
            handle = _handle(self.path, self.tag)
            data = os.pread(handle.number, stop - start, start)
            while data and len(data) < stop - start:  # a signal, or more than the system reads at once
                more = os.pread(handle.number, stop - start - len(data), start + len(data))
                data = data + more if more else b""
            now = _disk_tag(os.fstat(handle.number))
        except FileNotFoundError:
            raise InputError(f"{self.path} does not exist; correct its path") from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}; check the file and its disk") from None
        if now != self.tag or len(data) != stop - start:
            self.close()
            raise InputError(stores.changed(self.path))
        return data


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

    def _fetch(self, start: int, stop: int) -> bytes:
        return stores.get(self._place, start, stop, (self.size, self.tag), self.patience, self.options).data

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


def arriving(requests: Sequence[Request], in_flight: int | None = None) -> Iterator[tuple[int, list[bytes]]]:
    """`read_all` that yields (number of the request, its bytes) as they arrive; it starts asking when called.

    So one batch can be on its way while another is decoded.
    """
    windows = plan(requests)
    remote = [window for window in windows if isinstance(window.source, RemoteSource)]
    pool = _pool(in_flight) if remote else None
    futures = {pool.submit(window.source._fetch, window.start, window.stop): window for window in remote}
    local = [window for window in windows if not isinstance(window.source, RemoteSource)]
    return _collected(requests, local, futures)


def _collected(requests, local: list[Window], futures: dict[Future, Window]) -> Iterator[tuple[int, list[bytes]]]:
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
        for future in futures:
            future.cancel()


def _answers(local: list[Window], futures: dict[Future, Window]) -> Iterator[tuple[Window, bytes]]:
    for window in local:
        yield window, window.source._fetch(window.start, window.stop)
    for future in as_completed(futures) if futures else ():
        yield futures[future], future.result()


def plan(requests: Sequence[Request]) -> list[Window]:
    """The windows that serve all ranges; the rule stands in `read_all`. Raises InputError for a range outside."""
    by_source = defaultdict(list)
    for number, (source, starts, lengths) in enumerate(requests):
        for k, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            start, stop = int(start), int(start) + int(length)
            if not 0 <= start <= stop <= source.size:
                raise InputError(
                    f"{stores.shown(source.path)} has {source.size} bytes, and bytes {start} to {stop} are asked for; "
                    "the file is damaged or its index is of another version: fetch it, or index it, again"
                )
            if length:
                by_source[source].append((start, stop, number, k))
    return [window for source, ranges in by_source.items() for window in _merged(source, sorted(ranges))]


def _merged(source: Source, ranges: list[tuple[int, int, int, int]]) -> Iterator[Window]:
    first, end, *_ = ranges[0]
    needed, pieces = 0, []
    for start, stop, number, k in ranges:
        further = max(stop, end) - first
        more = max(0, stop - max(start, end)) if pieces else stop - start
        fits = start <= end + GAP and further <= WASTE * (needed + more) and (further <= LONGEST or start < end)
        if pieces and not fits:
            yield Window(source, first, end, needed, pieces)
            first, end, needed, more, pieces = start, stop, 0, stop - start, []
        end, needed = max(end, stop), needed + more
        pieces.append((number, k, start, stop))
    yield Window(source, first, end, needed, pieces)


def traffic() -> Traffic:
    """All that this process has read so far, from disk and network, by `read_all`, `arriving` and `Source.read`."""
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
