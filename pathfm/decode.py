"""One compressed tile to pixels: JPEG at a fraction of its size and no more of it than is needed, JPEG 2000, LZW, ...

What lies below the box asked for is not decoded: a flipped bit or a stray marker there is not named, nor does it
change what is returned. A stream that is cut short is named all the same, and the index's CRC-32 names any damage.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache
from typing import NamedTuple

import imagecodecs
import numpy as np
import simplejpeg

from pathfm import turbojpeg
from pathfm.kernels import kernel

CODECS = ("jpeg", "jpeg2000", "lzw", "deflate", "uncompressed")
COLOURS = ("RGB", "YCbCr")
MARKERS = ("none", "JFIF", "Adobe")
SCALES = (1, 2, 4, 8)  # a JPEG decodes to 1/scale of its size by leaving out the finer cosines of each block
JPEG, JPEG2000, LZW, DEFLATE, UNCOMPRESSED = range(len(CODECS))

_JFIF, _ADOBE = 0xE0, 0xEE  # segments that say what the colours are
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start of frame, all processes


class Damaged(ValueError):
    """Why a compressed tile cannot be decoded. Whoever knows the file adds its name."""


def _adobe(colour: int) -> bytes:
    """The APP14 segment that says what a JPEG's three components are: 0 RGB, 1 YCbCr."""
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([colour])


class Recipe(NamedTuple):
    """How the compressed tiles of one level are decoded. Sizes in pixels."""

    codec: int
    colour: int  # number in COLOURS: what a JPEG or JPEG 2000 stream holds
    width: int  # of a compressed tile
    height: int
    level_width: int
    level_height: int
    predictor: int
    head: bytes  # what a JPEG stream begins with in place of its first two bytes
    as_it_is: bool  # no shared tables: a stream that says YCbCr by a JFIF marker needs no other head


def recipe(level, tables: bytes) -> Recipe:
    """The recipe of a LEVEL record (see tilemap) and its shared JPEG tables, b"" where it has none."""
    colour = int(level["colour"])
    sizes = (int(level[name]) for name in ("tile_width", "tile_height", "width", "height"))
    codec, predictor = int(level["codec"]), int(level["predictor"])
    return Recipe(codec, colour, *sizes, predictor, _head(colour, tables), not tables and colour == 1)


@lru_cache(maxsize=1024)
def _head(colour: int, tables: bytes) -> bytes:
    """Most slides of a cohort share theirs: it is kept once."""
    return b"\xff\xd8" + _adobe(colour) + tables_only(tables)


def decode(data: bytes, how: Recipe, scale: int = 1, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """A compressed tile's pixels: (bottom - top, right - left, 3) uint8, RGB.

    scale    one of SCALES; only JPEG decodes at another than 1
    box      (left, top, right, bottom) of what is needed, pixels of the tile at 1/scale; None: all

    A JPEG gives what OpenSlide gives, bit for bit: accurate cosines, smooth chroma. Raises Damaged where the data
    are cut short, not what the codec expects, or not of the declared size.
    """
    left, top, right, bottom = box or (0, 0, how.width // scale, how.height // scale)
    if how.codec == JPEG:
        return _jpeg(data, how, scale, (left, top, right, bottom))
    return _whole(data, how)[top:bottom, left:right]


def _whole(data: bytes, how: Recipe) -> np.ndarray:
    """A compressed tile's pixels where the codec is not JPEG."""
    try:
        if how.codec == JPEG2000:
            return _jpeg2000(data, how)
        if how.codec == LZW:
            data = imagecodecs.lzw_decode(data, out=how.width * how.height * 3)
        elif how.codec == DEFLATE:
            data = _inflated(data, how.width * how.height * 3)
    except Damaged:
        raise
    except Exception as error:
        raise Damaged(f"is no {CODECS[how.codec]} data ({error})") from None
    if len(data) != how.width * how.height * 3:
        raise Damaged(f"holds {len(data)} bytes of pixels and not {how.width} x {how.height} x 3")
    pixels = np.frombuffer(data, np.uint8).reshape(how.height, how.width, 3)
    return np.cumsum(pixels, axis=1, dtype=np.uint8) if how.predictor == 2 else pixels


def _inflated(data: bytes, size: int) -> bytes:
    """At most a byte more than `size`, whatever a damaged stream would swell to."""
    stream = zlib.decompressobj()
    found = stream.decompress(data, size + 1)
    if len(found) == size and not stream.eof:
        found += stream.decompress(stream.unconsumed_tail, 1)
    if not stream.eof:
        raise Damaged("is Deflate data cut short or too long")
    return found


def _jpeg(data: bytes, how: Recipe, scale: int, box: tuple[int, int, int, int]) -> np.ndarray:
    stream = whole_jpeg(data, how)
    if turbojpeg.LIBRARY is None:
        return _simply(stream, how, scale)[box[1] : box[3], box[0] : box[2]]
    try:
        return turbojpeg.decode(stream, (how.width, how.height), scale, box)
    except ValueError as error:
        raise Damaged(str(error)) from None


def whole_jpeg(data: bytes, how: Recipe) -> bytes:
    """The stream of a compressed tile with its tables, and a marker that says its colours."""
    head, body = np.frombuffer(how.head, np.uint8), np.frombuffer(data, np.uint8)
    out = np.empty(len(head) + len(body), np.uint8)
    return out[: joined(head, how.as_it_is, body, out)].tobytes()


@kernel()
def joined(head, as_it_is, data, out):
    """Write `whole_jpeg` to `out`, which has room for head and data; its length. All uint8; head, as_it_is of Recipe.

    The TIFF's own tag decides on the colours, as it does for OpenSlide: what the stream says of them is left out.
    """
    length, at = len(data), 0
    if not (as_it_is and length >= 4 and data[2] == 0xFF and data[3] == _JFIF):
        at = 2
        while at + 4 <= length and data[at] == 0xFF and (data[at + 1] == _JFIF or data[at + 1] == _ADOBE):
            at += 2 + (np.int64(data[at + 2]) << 8 | data[at + 3])
        at = min(at, length)
        copy_bytes(head, out)
        out = out[len(head) :]
    copy_bytes(data[at:], out)
    return length - at if at == 0 else len(head) + length - at


@kernel()
def copy_bytes(source, to):
    """Write source to the beginning of `to`, as much of it as there is room: uint8, which do not overlap.

    For lines of some hundred bytes, of which an image takes hundreds: a plain loop, with nothing to set up.
    """
    for k in range(min(len(source), len(to))):
        to[k] = source[k]


def in_place(how: Recipe) -> bool:
    """Whether `painting.paint` decodes it."""
    return turbojpeg.LIBRARY is not None and how.codec == JPEG


def _simply(stream: bytes, how: Recipe, scale: int) -> np.ndarray:
    """A whole image, where there is no libjpeg-turbo 3."""
    width, height = how.width // scale, how.height // scale
    try:
        pixels = simplejpeg.decode_jpeg(stream, "RGB", False, False, height, width, 1)
    except ValueError as error:
        raise Damaged(f"is no whole JPEG ({error})") from None
    if pixels.shape != (height, width, 3):
        found = tuple(scale * side for side in pixels.shape[1::-1])
        raise Damaged(f"is a JPEG of {found[0]} x {found[1]} px and not {how.width} x {how.height}")
    return pixels


def tables_only(tables: bytes) -> bytes:
    """The segments of shared JPEG tables, without the marks of beginning and end."""
    if not tables:
        return b""
    if tables[:2] != b"\xff\xd8":
        raise Damaged("has shared JPEG tables that are none")
    return tables[2:-2] if tables[-2:] == b"\xff\xd9" else tables[2:]


class JpegHeader(NamedTuple):
    width: int
    height: int
    subsampling: tuple[int, int]  # pixels per chroma sample, across and down
    marker: int  # number in MARKERS
    own_tables: bool  # of quantisation, so that no shared ones are needed


def jpeg_header(data: bytes) -> JpegHeader:
    """What a JPEG stream says of itself before its pixels. Raises Damaged where it is cut short or none."""
    if data[:2] != b"\xff\xd8":
        raise Damaged("does not begin as a JPEG")
    at, marker, tables = 2, 0, False
    while at + 4 <= len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if kind == 0xE0 and body[:4] == b"JFIF" and not marker:
            marker = MARKERS.index("JFIF")
        elif kind == 0xEE and body[:5] == b"Adobe":
            marker = MARKERS.index("Adobe")
        elif kind == 0xDB:
            tables = True
        elif kind in _FRAMES:
            if len(body) < 15 or body[5] != 3:
                raise Damaged("is a JPEG of other than three components")
            height, width = struct.unpack(">HH", body[1:5])
            across, down = divmod(body[7], 16)
            chroma = divmod(body[10], 16)
            if 0 in chroma or 0 in (across, down):
                raise Damaged("is a JPEG without a sampling of its chroma")
            return JpegHeader(width, height, (across // chroma[0], down // chroma[1]), marker, tables)
        at += 2 + length
    raise Damaged("is a JPEG without a frame")


def _jpeg2000(data: bytes, how: Recipe) -> np.ndarray:
    """Whether colours are converted is decided by the codestream: by its own transform, or because it subsamples.

    Always decoded whole. Pillow leaves out resolutions, but for half the size it needs 0.9 of the time that
    imagecodecs needs for the whole (256 px: 2.1 and 2.4 ms), holds the interpreter's lock meanwhile, and gives a
    picture that lies a quarter of its pixels off, 35 dB from the mean of what it stands for.
    """
    size, subsampled, transformed = jpeg2000_header(data)
    if size != (how.width, how.height):
        raise Damaged(f"is a JPEG 2000 of {size[0]} x {size[1]} px and not {how.width} x {how.height}")
    if b"\xff\xd9" not in data[-16:]:  # the decoder takes what there is
        raise Damaged("is a JPEG 2000 without an end")
    pixels = imagecodecs.jpeg2k_decode(data, numthreads=1)
    if pixels.shape != (how.height, how.width, 3) or pixels.dtype != np.uint8:
        raise Damaged(f"is a JPEG 2000 of shape {pixels.shape}, {pixels.dtype}")
    converted = transformed or subsampled  # by the decoder
    return pixels if how.colour == 0 or converted else _rgb_of(pixels)


def jpeg2000_header(data: bytes) -> tuple[tuple[int, int], bool, bool]:
    """((width, height), whether chroma is subsampled, whether the stream transforms its components itself)."""
    if data[:4] != b"\xff\x4f\xff\x51" or len(data) < 42:
        raise Damaged("does not begin as a JPEG 2000 codestream")
    right, bottom, left, top = struct.unpack(">IIII", data[8:24])
    components = int.from_bytes(data[40:42], "big")
    if components != 3 or len(data) < 51:
        raise Damaged("is a JPEG 2000 of other than three components")
    subsampled = max(data[46], data[47], data[49], data[50]) > 1
    at = 4 + int.from_bytes(data[4:6], "big")
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0x90:  # until the first tile part
        if data[at + 1] == 0x52:  # coding style
            return (right - left, bottom - top), subsampled, len(data) > at + 8 and data[at + 8] == 1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise Damaged("is a JPEG 2000 without a coding style")


_CHROMA = np.arange(256) - 128.0
_RED, _BLUE = (np.round(factor * _CHROMA).astype(np.int32) for factor in (1.402, 1.772))
_GREEN_CB = np.round(65536 * (0.5 - 0.34414 * _CHROMA)).astype(np.int32)
_GREEN_CR = np.round(65536 * -0.71414 * _CHROMA).astype(np.int32)


@kernel()
def _rgb_of(ycbcr: np.ndarray) -> np.ndarray:
    """YCbCr of JPEG (full range, ITU-R BT.601) as RGB, rounded as OpenSlide rounds it; (h, w, 3) uint8."""
    out = np.empty_like(ycbcr)
    for j in range(ycbcr.shape[0]):
        for i in range(ycbcr.shape[1]):
            y, cb, cr = ycbcr[j, i]
            green = (_GREEN_CB[cb] + _GREEN_CR[cr]) >> 16
            out[j, i, 0] = min(max(y + _RED[cr], 0), 255)
            out[j, i, 1] = min(max(y + green, 0), 255)
            out[j, i, 2] = min(max(y + _BLUE[cb], 0), 255)
    return out
