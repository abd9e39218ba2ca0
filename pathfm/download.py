"""Files over HTTP, whole: resumed where they stopped, tried again, checked, several at a time."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import requests

from pathfm.errors import InputError
from pathfm.storage import explained, progress

CHUNK = 2**16  # bytes between looks at whether to stop
TIMEOUT_S = 10, 60  # to connect; between bytes
BACKOFF_S, LONGEST_S = 1.0, 60.0  # before the second try, doubled each time up to
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be another next time
Tell = Callable[[int], Any]  # how many bytes more (or fewer) there are


class Item(NamedTuple):
    """One file to fetch."""

    url: str
    path: Path
    size: int | None = None  # bytes
    checksum: str | None = None  # "md5=..." or "sha256=...", hexadecimal
    token: str | None = None  # of GDC, sent to no other host
    gdc: bool = False


class Passing(Exception):
    """A fault that may be gone next time.

    wait_s       seconds that the server asked for, if it did
    progressed   some bytes came before it
    """

    def __init__(self, reason: str, wait_s: float = 0.0, progressed: bool = False):
        super().__init__(reason)
        self.wait_s, self.progressed = wait_s, progressed


class Refused(Exception):
    """A fault that stays."""


class Stopped(Exception):
    """Another file's trouble, or Ctrl-C, ends this one."""


class Session(requests.Session):
    """Bytes as they are stored, and a token that no other host gets to see."""

    def __init__(self, parallel: int):
        super().__init__()
        self.headers["Accept-Encoding"] = "identity"
        for scheme in ("http://", "https://"):
            self.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=parallel))

    def rebuild_auth(self, prepared_request, response):
        super().rebuild_auth(prepared_request, response)
        if self.should_strip_auth(response.request.url, prepared_request.url):
            prepared_request.headers.pop("X-Auth-Token", None)


def with_sizes(items: list[Item], session: Session, parallel: int) -> list[Item]:
    """Sizes that only the server knows are asked for; one that does not say stays None."""

    def sized(item: Item) -> Item:
        if item.size is not None:
            return item
        try:
            with session.head(item.url, timeout=TIMEOUT_S, allow_redirects=True) as response:
                length = response.headers.get("Content-Length", "")
                return item._replace(size=int(length)) if response.ok and length.isdecimal() else item
        except requests.RequestException:
            return item

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(sized, items))


def check_room(items: list[Item], folder: Path) -> None:
    here = sum(path.stat().st_size for item in items for path in partials(item))
    needed, free = sum(item.size or 0 for item in items) - here, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are to come; "
            "free some, or give a folder on another disk"
        )


def download(items: list[Item], session: Session, parallel: int, tries: int) -> dict[Path, str]:
    """path -> reason of each file that could not be had."""
    failed, stop = {}, threading.Event()
    total = sum(item.size or 0 for item in items)
    with progress(None, "fetching", total or None, "B") as bar, ThreadPoolExecutor(parallel) as pool:
        jobs = {pool.submit(_download, item, session, tries, stop, bar.update): item for item in items}
        try:
            for job in as_completed(jobs):
                if job.result():
                    failed[jobs[job].path] = job.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failed


def _download(item: Item, session: Session, tries: int, stop: threading.Event, tell: Tell) -> str | None:
    """None when the file is in its place, else why not."""
    try:
        with explained(item.path):
            item.path.parent.mkdir(parents=True, exist_ok=True)
            wrong = None
            for _ in range(2):  # a wrong checksum may come from what an earlier call left
                partial = patiently(lambda: _receive(item, session, stop, tell), tries, stop)
                wrong = _wrong(partial, item)
                if not wrong:
                    os.replace(partial, item.path)
                    break
                tell(-partial.stat().st_size)
                partial.unlink()
            for old in partials(item) if not wrong else []:  # of another version of the file
                old.unlink()
            return wrong
    except Refused as error:
        return _with_advice(str(error), item)
    except Passing as error:
        return f"{error}, {tries} times in a row"
    except Stopped:
        return "stopped"
    except InputError as error:
        stop.set()  # the disk is full or closed to all of them
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"no space left while fetching {item.path}; free some and run again to go on") from None
        raise


def partials(item: Item) -> list[Path]:
    """What there is of a file that is not whole yet."""
    return list(item.path.parent.glob(f".{glob.escape(item.path.name)}.*.partial"))


def _with_advice(reason: str, item: Item) -> str:
    if not item.gdc or not reason.startswith(("HTTP 401", "HTTP 403")):
        return reason
    if item.token:
        return f"{reason}: the token given does not open it; tokens last a month, and each project needs permission"
    return f"{reason}: under controlled access; download a token from GDC's portal and give it with --token-file"


def patiently(attempt: Callable[[], Any], tries: int, stop: threading.Event) -> Any:
    """What `attempt` returns, tried again after passing faults; one that had brought bytes starts the count anew."""
    failed = 0
    while True:
        if stop.is_set():
            raise Stopped
        try:
            return attempt()
        except Passing as error:
            failed = 1 if error.progressed else failed + 1
            if failed >= tries:
                raise
            if stop.wait(min(max(error.wait_s, BACKOFF_S * 2 ** (failed - 1)), LONGEST_S)):
                raise Stopped from None


def get(session: Session, url: str, headers: dict | None = None):
    """A response whose body is still to be read. Raises Passing or Refused."""
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S)
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.TooManyRedirects) as error:
        raise Refused(str(error)) from None
    except requests.RequestException as error:
        raise Passing(f"{type(error).__name__} ({error})") from None
    if response.status_code in (200, 206, 416):
        return response
    response.close()
    reason = f"HTTP {response.status_code} {response.reason}"
    if response.status_code in PASSING:
        wait = response.headers.get("Retry-After", "")
        raise Passing(reason, float(wait) if wait.isdecimal() else 0.0)
    raise Refused(reason)


def _receive(item: Item, session: Session, stop: threading.Event, tell: Tell) -> Path:
    """The partial file with every byte, gone on with where it stands if the server lets us.

    Its name holds the checksum or, without one, the server's ETag or date, so that no two versions are ever mixed.
    """
    headers, tag = {"X-Auth-Token": item.token} if item.token else {}, item.checksum
    if tag is None:
        with get(session, item.url, headers) as response:
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
    partial = item.path.with_name(f".{item.path.name}.{_hash(item.url, str(tag))}.partial")
    start = partial.stat().st_size if tag and partial.is_file() else 0
    if start and start == item.size and item.checksum:
        tell(start)
        return partial
    with get(session, item.url, headers | ({"Range": f"bytes={start}-"} if start else {})) as response:
        if response.headers.get("Content-Range") == f"bytes */{start}":  # 416: there is no more
            tell(start)
            return partial
        if not (response.status_code == 200 or _goes_on(response, start, item, tag)):
            partial.unlink(missing_ok=True)
            raise Passing(f"asked for bytes from {start}, the server answers with others")
        start = 0 if response.status_code == 200 else start
        total = start + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        if item.checksum and None not in (item.size, total) and total != item.size:
            raise Refused(f"has {total} bytes there and should have {item.size}")
        _write(response, partial, start, stop, tell)
    size = partial.stat().st_size
    if total is not None and size != total:
        tell(-size)
        raise Passing(f"the connection ended after {size} of {total} bytes", progressed=size > start)
    return partial


def _goes_on(response, start: int, item: Item, tag: str) -> bool:
    """Whether a response continues what there is of the same file."""
    ranged = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status_code != 206 or not ranged or int(ranged[1]) != start:
        return False
    return item.checksum is not None or tag in (response.headers.get("ETag"), response.headers.get("Last-Modified"))


def _write(response, partial: Path, start: int, stop: threading.Event, tell: Tell) -> None:
    written = 0
    tell(start)
    try:
        with open(partial, "r+b" if start else "wb") as file:
            file.seek(start)
            for chunk in response.iter_content(CHUNK):
                if stop.is_set():
                    raise Stopped
                file.write(chunk)
                tell(len(chunk))
                written += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    except requests.RequestException as error:
        tell(-start - written)  # counted again when it goes on
        raise Passing(f"the connection broke ({type(error).__name__})", progressed=written > 0) from None


def _wrong(partial: Path, item: Item) -> str | None:
    """What is wrong with a file that is all there."""
    if item.checksum is None:
        return None
    kind, _, expected = item.checksum.partition("=")
    with open(partial, "rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    return None if found == expected else f"its {kind} is {found} and should be {expected}; nothing of it is kept"


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=6).hexdigest()
