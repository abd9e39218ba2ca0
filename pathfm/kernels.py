"""Compiled functions, kept on disk until any module with such functions changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numba

HERE = Path(__file__).parent
MARK = b"import kernel"  # of a module whose functions are compiled


def kernel(**options) -> Callable:
    """numba.njit without the interpreter's lock, kept in `folder`.

    numba knows a kept function by the file that defines it, and not by those of the functions that it calls, which
    are compiled into it: after a change there it would go on with the old ones.
    """

    def compiled(function: Callable) -> Callable:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder())  # read while numba decorates
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        finally:
            numba.config.CACHE_DIR = before

    return compiled


@cache
def folder() -> Path:
    """A folder for the present text of all modules with kernels: in NUMBA_CACHE_DIR where set, else beside the code.

    Where it cannot be written numba takes one of the user's own, as it does without it.
    """
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*.py")):
        text = path.read_bytes()
        if MARK in text:
            digest.update(path.name.encode() + b"\0" + text)
    return Path(numba.config.CACHE_DIR or HERE / "__pycache__") / f"kernels-{digest.hexdigest()[:12]}"
