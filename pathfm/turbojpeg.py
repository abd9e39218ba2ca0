"""Part of a JPEG to pixels, by the TurboJPEG API of libjpeg-turbo 3, which skips the cosines of what is not needed.

No Python package offers `tj3SetCroppingRegion` (libjpeg-turbo issue 1), so its C interface is called here: from compiled
code, by address, so that many images are decoded without the interpreter's lock. The library comes with conda's
environment, with the system, or inside the wheel of `turbojpeg`. Where none is found, or where a C call cannot be made
as it is here (Windows), LIBRARY is None and `pathfm.decode` takes simplejpeg, which decodes whole images.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

DECOMPRESS, RGB = 1, 0  # TJINIT_DECOMPRESS, TJPF_RGB
STOP_ON_WARNING, SUBSAMPLING, WIDTH, HEIGHT, PROGRESSIVE = 0, 4, 5, 6, 12  # TJPARAM_
UNITS = (8, 16, 16, 8, 8, 32, 8)  # width in pixels of what is coded together, by TJSAMP_
MARGIN = 4  # pixels left and right: smooth chroma looks a pixel further, and is rough in an image of less than 3
PADDING = 16  # bytes that a file may add after the end of a JPEG
CALLS = ("tj3DecompressHeader", "tj3Get", "tj3SetScalingFactor", "tj3SetCroppingRegion", "tj3Decompress8")
WHOLE, COMPLAINT, OTHER_SIZE = 0, 1, 2


def _places() -> Iterator[str]:
    """Where the library may lie: in the environment, on the system, inside a wheel."""
    yield from map(str, sorted((Path(sys.prefix) / "lib").glob("libturbojpeg.*")))
    yield from filter(None, [ctypes.util.find_library("turbojpeg")])
    try:
        files = metadata.files("turbojpeg") or []
    except metadata.PackageNotFoundError:
        return
    yield from (str(file.locate()) for file in files if file.name.startswith("libturbojpeg"))


def load() -> ctypes.CDLL | None:
    """The first libjpeg-turbo that decodes parts; None where there is none."""
    if sys.platform == "win32":  # passes a region by reference
        return None
    for place in _places():
        try:
            library = ctypes.CDLL(place)
            library.tj3Init.restype = library.tj3GetErrorStr.restype = ctypes.c_void_p
            library.tj3Init.argtypes = [ctypes.c_int]
            library.tj3Destroy.argtypes = library.tj3GetErrorStr.argtypes = [ctypes.c_void_p]
            library.tj3Set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
            return all(getattr(library, name) for name in CALLS) and library
        except (OSError, AttributeError):
            continue
    return None


LIBRARY = load()
ADDRESSES = np.array([LIBRARY and ctypes.cast(getattr(LIBRARY, name), ctypes.c_void_p).value or 0 for name in CALLS])


class _Decoder(threading.local):
    """A thread's own decoder; the first warning ends a decoding."""

    def __init__(self):
        self.handle = LIBRARY.tj3Init(DECOMPRESS) if LIBRARY else 0
        if LIBRARY:
            LIBRARY.tj3Set(self.handle, STOP_ON_WARNING, 1)

    def __del__(self, destroy=LIBRARY and LIBRARY.tj3Destroy):
        if destroy:
            destroy(self.handle)


_DECODER = _Decoder()


def handle() -> int:
    """The address of this thread's decoder; 0 without a library."""
    return _DECODER.handle


def decode(data: bytes, size: tuple[int, int], scale: int, box: tuple[int, int, int, int], buffer=None) -> np.ndarray:
    """Pixels left <= x < right, top <= y < bottom of a JPEG at 1/scale of its size: (bottom - top, right - left, 3).

    size     (width, height) that the stream must have
    scale    1, 2, 4 or 8
    box      (left, top, right, bottom), decoded pixels
    buffer   (at least width * height * 3 / scale^2,) uint8, of which a view is returned

    The same pixels, bit for bit, as of the whole: accurate cosines, smooth chroma. Raises ValueError, with libjpeg's
    words, where the stream is damaged as far as it was decoded, is cut short, or is of another size.
    """
    if buffer is None:
        buffer = np.empty(size[0] * size[1] * 3 // scale**2, np.uint8)
    stream = np.frombuffer(data, np.uint8)
    status, x, y, across, down = part(ADDRESSES, handle(), stream, *size, scale, *box, buffer)
    if status == OTHER_SIZE:
        raise ValueError(f"of {across} x {down} px")
    if status == COMPLAINT:
        raise ValueError(ctypes.string_at(LIBRARY.tj3GetErrorStr(handle())).decode(errors="replace"))
    pixels = buffer[: across * down * 3].reshape(down, across, 3)
    return pixels[box[1] - y : box[3] - y, box[0] - x : box[2] - x]


@intrinsic
def _call(context, address, arguments):
    """What the C function at an address returns, an int, for integers and addresses.

    A C struct of up to 16 bytes travels as the one or two integers that hold it (System V x86-64 and AAPCS64 alike).
    """

    def generate(context, builder, signature, values):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word] * len(arguments)).as_pointer()
        parts = cgutils.unpack_tuple(builder, values[1], len(arguments))
        return builder.sext(builder.call(builder.inttoptr(values[0], kind), parts), word)

    return types.int64(types.int64, types.UniTuple(types.int64, len(arguments))), generate


@njit(cache=True, nogil=True)
def part(calls, decoder, stream, width, height, scale, left, top, right, bottom, buffer):
    """(status, x, y, across, down): `buffer` holds across x down pixels from (x, y) on, the box among them.

    calls, decoder   ADDRESSES, and handle() of the thread
    stream, buffer   uint8; the others as `decode` takes them
    status           WHOLE; COMPLAINT, of which tj3GetErrorStr tells; OTHER_SIZE, across x down being the true one
    """
    header, get, scaling, cropping, decompress = calls[0], calls[1], calls[2], calls[3], calls[4]
    data, length = np.int64(stream.ctypes.data), np.int64(len(stream))
    if _call(header, (decoder, data, length)):
        return COMPLAINT, 0, 0, 0, 0
    across, down = _call(get, (decoder, WIDTH)), _call(get, (decoder, HEIGHT))
    if across != width or down != height:
        return OTHER_SIZE, 0, 0, across, down
    sampling = _call(get, (decoder, SUBSAMPLING))
    wide, high = -(-width // scale), -(-height // scale)
    if len(buffer) < wide * high * 3:
        return OTHER_SIZE, 0, 0, across, down
    x, y, across, down = 0, 0, wide, high
    if 0 <= sampling < len(UNITS) and _call(get, (decoder, PROGRESSIVE)) == 0 and _ends(stream):
        unit = max(UNITS[sampling] // scale, 1)
        x, y = max(left - MARGIN, 0) // unit * unit, top
        across, down = min(right + MARGIN, wide) - x, bottom - top
    _call(scaling, (decoder, 1 | scale << 32))
    whole = across == wide and down == high
    corner, extent = (0, 0) if whole else (x | y << 32, across | down << 32)
    if _call(cropping, (decoder, corner, extent)):
        return COMPLAINT, 0, 0, 0, 0
    if _call(decompress, (decoder, data, length, np.int64(buffer.ctypes.data), 0, RGB)):
        return COMPLAINT, 0, 0, 0, 0
    return WHOLE, x, y, across, down


@njit(cache=True, nogil=True)
def _ends(stream):
    """Whether the mark of the end is there: where it is not, what is missing must be found out."""
    for k in range(max(len(stream) - PADDING, 0), len(stream) - 1):
        if stream[k] == 0xFF and stream[k + 1] == 0xD9:
            return True
    return False
