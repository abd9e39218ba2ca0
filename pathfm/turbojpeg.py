"""Part of a JPEG to pixels, by the TurboJPEG API of libjpeg-turbo 3, which skips the cosines of what is not needed.

No Python package offers `tj3SetCroppingRegion`, so the C interface is called here: from compiled code, by address, so
that many images are decoded without the interpreter's lock. The library comes with conda's environment, with the
system, or inside the wheel of `turbojpeg`. Where none is found, or where a C call cannot be made as it is here
(Windows), LIBRARY is None and `pathfm.decode` takes simplejpeg, which decodes whole images.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from pathfm.kernels import kernel

DECOMPRESS, RGB = 1, 0  # TJINIT_DECOMPRESS, TJPF_RGB
STOP_ON_WARNING, SUBSAMPLING, WIDTH, HEIGHT, PROGRESSIVE = 0, 4, 5, 6, 12  # TJPARAM_
UNITS = (8, 16, 16, 8, 8, 32, 8)  # width in pixels of what is coded together, by TJSAMP_
MARGIN = 4  # pixels left and right: smooth chroma looks a pixel further, and is rough in an image of less than 3
WORDS = 200  # JMSG_LENGTH_MAX, of what the library complains of
PADDING = 16  # bytes that a file may add after the end of a JPEG
CALLS = (
    "tj3Init",
    "tj3Set",
    "tj3DecompressHeader",
    "tj3Get",
    "tj3SetScalingFactor",
    "tj3SetCroppingRegion",
    "tj3Decompress8",
    "tj3GetErrorStr",
    "tj3Destroy",
)
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
            return all(getattr(library, name) for name in CALLS) and library
        except (OSError, AttributeError):
            continue
    return None


LIBRARY = load()
ADDRESSES = np.array([LIBRARY and ctypes.cast(getattr(LIBRARY, name), ctypes.c_void_p).value or 0 for name in CALLS])


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
    status, x, y, across, down = part(ADDRESSES, stream, *size, scale, *box, buffer)
    if status == OTHER_SIZE:
        raise ValueError(f"is a JPEG of {across} x {down} px and not {size[0]} x {size[1]}")
    if status == COMPLAINT:
        raise ValueError(f"is no whole JPEG ({buffer[:across].tobytes().decode(errors='replace')})")
    pixels = buffer[: across * down * 3].reshape(down, across, 3)
    return pixels[box[1] - y : box[3] - y, box[0] - x : box[2] - x]


@intrinsic
def _call(context, address, arguments):
    """What the C function at an address returns, as a machine's word, for integers and addresses.

    A C struct of up to 16 bytes travels as the one or two integers that hold it (System V x86-64 and AAPCS64 alike).
    """

    def generate(context, builder, signature, values):
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * len(arguments)).as_pointer()
        parts = cgutils.unpack_tuple(builder, values[1], len(arguments))
        return builder.call(builder.inttoptr(values[0], kind), parts)

    return types.int64(types.int64, types.UniTuple(types.int64, len(arguments))), generate


@intrinsic
def pointer(context, address):
    """The uint8 that lie at an address, for numba's carray."""

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.int64), generate


@kernel()
def part(calls, stream, width, height, scale, left, top, right, bottom, buffer):
    """(status, x, y, across, down): `buffer` holds across x down pixels from (x, y) on, the box among them.

    calls            ADDRESSES
    stream, buffer   uint8; the others as `decode` takes them
    status           WHOLE; OTHER_SIZE, across x down being the true one; COMPLAINT, of `across` bytes in the buffer

    Each image has a decoder of its own (half a microsecond): one that is used again keeps the tables of its last image
    and would decode with them an image that lacks its own.
    """
    decoder = _call(calls[0], (DECOMPRESS,))
    _call(calls[1], (decoder, STOP_ON_WARNING, 1))
    found = _decoded(calls, decoder, stream, width, height, scale, left, top, right, bottom, buffer)
    if found[0] == COMPLAINT:
        words, length = carray(pointer(_call(calls[7], (decoder,))), (WORDS,)), 0
        while length < min(len(buffer), WORDS) and words[length] != 0:
            buffer[length] = words[length]
            length += 1
        found = COMPLAINT, 0, 0, length, 0
    _call(calls[8], (decoder,))
    return found


@kernel()
def _decoded(calls, decoder, stream, width, height, scale, left, top, right, bottom, buffer):
    """`part` with this decoder."""
    data, length = np.int64(stream.ctypes.data), np.int64(len(stream))
    if np.int32(_call(calls[2], (decoder, data, length))) != 0:
        return COMPLAINT, 0, 0, 0, 0
    across, down = _get(calls, decoder, WIDTH), _get(calls, decoder, HEIGHT)
    wide, high = -(-width // scale), -(-height // scale)
    if across != width or down != height or len(buffer) < wide * high * 3:
        return OTHER_SIZE, 0, 0, across, down
    sampling = _get(calls, decoder, SUBSAMPLING)
    x, y, across, down = 0, 0, wide, high
    if 0 <= sampling < len(UNITS) and _get(calls, decoder, PROGRESSIVE) == 0 and _ends(stream):
        unit = max(UNITS[sampling] // scale, 1)
        x, y = max(left - MARGIN, 0) // unit * unit, top
        across, down = min(right + MARGIN, wide) - x, bottom - top
    _call(calls[4], (decoder, 1 | scale << 32))
    whole = across == wide and down == high
    corner, extent = (0, 0) if whole else (x | y << 32, across | down << 32)
    if np.int32(_call(calls[5], (decoder, corner, extent))) != 0:
        return COMPLAINT, 0, 0, 0, 0
    if np.int32(_call(calls[6], (decoder, data, length, np.int64(buffer.ctypes.data), 0, RGB))) != 0:
        return COMPLAINT, 0, 0, 0, 0
    return WHOLE, x, y, across, down


@kernel()
def _get(calls, decoder, parameter):
    return np.int64(np.int32(_call(calls[3], (decoder, parameter))))


@kernel()
def _ends(stream):
    """Whether the mark of the end is there: where it is not, what is missing must be found out."""
    ends = False
    for k in range(max(len(stream) - PADDING, 0), len(stream) - 1):
        ends |= stream[k] == 0xFF and stream[k + 1] == 0xD9
    return ends
