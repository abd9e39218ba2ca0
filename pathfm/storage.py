"""Files that appear whole or not at all, where they live, files read in blocks, and a progress bar."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pathfm.errors import InputError

BLOCK = 64 * 2**10  # bytes that a BlockFile reads at a time,
BLOCKS = 64  # and how many of them it keeps


def checkout() -> Path | None:
    """The repository this package runs from, or None where it was installed as a wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir() else None


def cache_dir() -> Path:
    """Where products that can be remade are kept: $PATHFM_CACHE, <checkout>/runs/cache or ~/.cache/pathfm."""
    if os.environ.get("PATHFM_CACHE"):
        return Path(os.environ["PATHFM_CACHE"]).expanduser()
    root = checkout()
    return root / "runs" / "cache" if root else Path.home() / ".cache" / "pathfm"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved onto it when the block succeeds and removed when it does not.

    Raises InputError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    # The suffix stays last: writers such as tifffile and imageio go by it.
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """An open file that replaces `path` when the block succeeds; see `atomic_path`."""
    with atomic_path(path) as partial, open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"no space left while writing {path}; free some and run again (nothing half-written is left)"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
        raise


class BlockFile(io.RawIOBase):
    """A seekable file over a `pathfm.source.Source`, read in blocks of BLOCK bytes; the BLOCKS used last are kept."""

    def __init__(self, source):
        self.name, self._source, self._at = source.path, source, 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        if at < 0:
            raise ValueError(f"cannot seek to {at}")
        self._at = at
        return at

    def readinto(self, buffer) -> int:
        start, stop = self._at, min(self._at + len(buffer), self._source.size)
        if start >= stop:
            return 0
        numbers = range(start // BLOCK, (stop - 1) // BLOCK + 1)
        blocks = self._get(numbers)
        data = memoryview(b"".join(blocks[n] for n in numbers))
        offset = start - numbers[0] * BLOCK
        buffer[: stop - start] = data[offset : offset + stop - start]
        self._at = stop
        return stop - start

    def _get(self, numbers: Sequence[int]) -> dict[int, bytes]:
        missing = [n for n in numbers if n not in self._blocks]
        lengths = [min(BLOCK, self._source.size - n * BLOCK) for n in missing]
        blocks = dict(zip(missing, self._source.read([n * BLOCK for n in missing], lengths), strict=True))
        for n in numbers:
            blocks.setdefault(n, self._blocks.pop(n, b""))
        self._blocks.update((n, blocks[n]) for n in numbers[-BLOCKS:])
        while len(self._blocks) > BLOCKS:
            self._blocks.popitem(last=False)
        return blocks


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, whole or not at all."""
    with atomic(path, "w") as file:
        json.dump(value, file, indent=2, default=str)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """The JSON in `path`. Raises InputError where it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); delete it and make it again") from None


def progress(items: Iterable | None, desc: str | None = None, total: int | None = None, unit: str = "it") -> Iterable:
    """`items` behind a bar on stderr, in a terminal or with PATHFM_PROGRESS=1; without one elsewhere.

    Without items its method `update(n)` moves it. The unit "B" is shown as kB, MB or GB. In a notebook, where only
    PATHFM_PROGRESS=1 (as `make lab` sets it) shows one, it stands below its cell until it ends and leaves nothing there
    to be stored.
    """
    from tqdm import tqdm

    wanted = os.environ.get("PATHFM_PROGRESS")
    quiet = not sys.stderr.isatty() if wanted is None else wanted == "0"
    look: dict[str, Any] = {"unit": unit, "unit_scale": unit == "B", "mininterval": 0.5, "dynamic_ncols": True}
    if not quiet and _in_notebook():
        look |= {"file": CellLine(), "leave": False, "position": 0}
    return tqdm(items, desc=desc, total=total, disable=quiet, **look)


class CellLine:
    """A file for a bar: its last line stands below a notebook's cell; a blank one takes it away.

    What a widget or stderr shows would stay in the notebook's outputs, which are compared with stored ones.
    """

    encoding = "utf-8"

    def __init__(self) -> None:
        from IPython.display import display

        self._shown = display({}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        line = text.strip()
        self._shown.update({"text/plain": line} if line else {}, raw=True)

    def flush(self) -> None:
        """Nothing waits."""


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")
