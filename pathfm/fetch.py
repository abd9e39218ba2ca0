"""Public slides by name, address or GDC manifest."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import requests
from filelock import FileLock, Timeout

from pathfm import gdc
from pathfm.download import Item, Passing, Refused, Session, check_room, download, get, patiently, with_sizes
from pathfm.errors import InputError, nearest
from pathfm.storage import explained

GDC = "https://api.gdc.cancer.gov"
TESTDATA = "https://openslide.cs.cmu.edu/download/openslide-testdata"


def fetch(
    what: Sequence[str],
    folder: str | Path,
    parallel: int = 4,
    tries: int = 5,
    token: str | None = None,
    gdc_url: str = GDC,
    testdata_url: str = TESTDATA,
) -> list[Path]:
    """Download files into `folder` and return their paths.

    what       each the path of a GDC manifest (its files go to <folder>/<uuid>/<name>, as GDC's client puts them),
               a URL, with "#md5=..." or "#sha256=..." after it if known, or a name of OpenSlide's test data
    parallel   files at a time
    tries      in a row that bring no byte before a file is given up; the waits between them double from 1 s
    token      of GDC, for files under controlled access

    A file appears whole and with its checksum right, or not at all. Until then it is .<name>.<hash>.partial beside
    its place; another call goes on from there, if the server still has the same file. One that is there with
    the right size is not fetched again. Raises InputError where the disk has no room, before anything is fetched;
    and at the end where files could not be had, with the reason of each.
    """
    folder = Path(folder)
    if parallel < 1 or tries < 1:
        raise InputError(f"parallel is {parallel} and tries {tries}; both are at least 1")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder")
    with _alone(folder), Session(parallel) as session:
        items = _items(what, folder, session, tries, gdc_url, token, testdata_url)
        todo = [item for item in items if not _is_there(item)]
        todo = with_sizes(todo, session, parallel)
        check_room(todo, folder)
        failed = download(todo, session, parallel, tries)
    if failed:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in list(failed.items())[:5])
        raise InputError(
            f"{len(failed)} of {len(items)} files could not be fetched ({reasons}"
            f"{'; ...' if len(failed) > 5 else ''}). The others are in {folder}; run again to go on"
        )
    return [item.path for item in items]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder, made and kept from another fetch: two would write the same partial files."""
    lock = FileLock(folder / ".fetch.lock", timeout=0)
    try:
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        raise InputError(f"another fetch is filling {folder}; wait for it or give another folder") from None
    try:
        yield
    finally:
        lock.release()


def read_token(path: str | Path) -> str:
    """The token in a file from GDC's portal. Raises InputError where there is none."""
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token file {path} cannot be read ({error}); download one from GDC's portal") from None
    if not token or any(character.isspace() for character in token):
        raise InputError(f"{path} holds no token: one line of text is expected; download one from GDC's portal")
    return token


def _items(what, folder: Path, session, tries: int, gdc_url: str, token: str | None, testdata_url: str) -> list[Item]:
    items, testdata = [], None
    for given in what:
        if "://" in given:
            items.append(_url_item(given, folder))
        elif Path(given).is_file():
            items += _manifest_items(given, folder, gdc_url, token)
        else:
            testdata = testdata or _testdata(session, tries, testdata_url)
            items.append(_testdata_item(given, folder, testdata, testdata_url))
    for path, times in Counter(item.path for item in items).most_common(1):
        if times > 1:
            raise InputError(f"{path.name} would be fetched twice to {path}; give it once")
    return items


def _url_item(given: str, folder: Path) -> Item:
    url, checksum = urldefrag(given)
    name = Path(unquote(urlsplit(url).path)).name
    if urlsplit(url).scheme not in ("http", "https") or not name:
        raise InputError(f"{given} is no address of a file; give one that begins with http:// or https://")
    if checksum and not re.fullmatch(r"md5=[0-9a-fA-F]{32}|sha256=[0-9a-fA-F]{64}", checksum):
        raise InputError(f"{given} ends in no checksum; write #md5= or #sha256= and 32 or 64 hexadecimal digits")
    return Item(url, folder / name, None, checksum.lower() or None)


def _manifest_items(path: str, folder: Path, gdc_url: str, token: str | None) -> list[Item]:
    listed = gdc.files(path)
    if listed["md5"].isna().any():
        raise InputError(f"{path} is a sample sheet, which has no checksums; give the manifest of the same cart")
    return [
        Item(
            f"{gdc_url}/data/{row.id}", folder / row.id / row.name, row.size, f"md5={row.md5.lower()}", token, gdc=True
        )
        for row in listed.itertuples()
    ]


def _testdata(session, tries: int, url: str) -> dict[str, dict]:
    """OpenSlide's list: "Aperio/CMU-1-Small-Region.svs" -> size, sha256, license, ..."""

    def ask() -> Any:
        with get(session, f"{url}/index.json") as response:
            try:
                return response.json()
            except requests.exceptions.JSONDecodeError:
                raise Refused("its list of files is no JSON") from None

    try:
        return patiently(ask, tries, threading.Event())
    except (Passing, Refused) as error:
        raise InputError(f"OpenSlide's test data cannot be listed at {url}: {error}; try again later") from None


def _testdata_item(given: str, folder: Path, listed: dict[str, dict], url: str) -> Item:
    found = [name for name in listed if given in (name, name.split("/")[-1])]
    if len(found) != 1:
        raise InputError(
            f"'{given}' is no file here, no URL and {'none' if not found else 'several'} of OpenSlide's test data."
            f"{nearest(given, found or [name.split('/')[-1] for name in listed])}"
        )
    about = listed[found[0]]
    return Item(f"{url}/{found[0]}", folder / Path(found[0]).name, about["size"], f"sha256={about['sha256']}")


def _is_there(item: Item) -> bool:
    return item.path.is_file() and item.size in (None, item.path.stat().st_size)
