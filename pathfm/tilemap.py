"""Where the compressed tiles of tiled slides lie: a few bytes each, in arrays that processes share.

A level's compressed tiles mostly follow one another in the file, so a tile is stored as its length and, only where
it does not begin at the end of the one before, the distance; both as numbers of seven bits a byte. Every BLOCK
tiles an absolute position stands beside, so that any tile is found in at most BLOCK steps. That makes about
3 bytes a compressed tile for JPEG of 8 to 500 kB; a file whose tiles lie in no order at all costs up to 9.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

BLOCK = 64
LEVEL = np.dtype(
    [
        ("width", "i4"),
        ("height", "i4"),
        ("tile_width", "i4"),
        ("tile_height", "i4"),
        ("codec", "u1"),  # number in decode.CODECS
        ("colour", "u1"),  # in decode.COLOURS: what the codestream holds
        ("marker", "u1"),  # in decode.MARKERS: what its JPEG streams say of their colours
        ("predictor", "u1"),  # 2 where rows hold differences
        ("subsampling", "u1", 2),  # pixels per chroma sample, across and down
        ("tables_length", "u2"),  # bytes of shared JPEG tables
        ("tables", "i8"),  # where they begin
        ("block", "i8"),  # its first block
        ("tile", "i8"),  # its first compressed tile among all, which numbers the checks
    ],
    align=True,
)
ANCHOR = np.dtype([("offset", "i8"), ("code", "i8")], align=True)  # where a block begins in the file and in `codes`
_ONE, _SEVEN, _LOW, _MORE = np.int64(1), np.int64(7), np.int64(0x7F), np.int64(0x80)


class TileMap(NamedTuple):
    """L levels of any number of slides, N compressed tiles."""

    levels: np.ndarray  # (L,) LEVEL
    anchors: np.ndarray  # (B,) ANCHOR, one every BLOCK tiles of a level
    codes: np.ndarray  # (.,) uint8
    tables: np.ndarray  # (.,) uint8, shared JPEG tables
    checks: np.ndarray  # (N,) uint32, the CRC-32 of every compressed tile; (0,) without

    @property
    def tiles(self) -> int:
        """N."""
        if not len(self.levels):
            return 0
        last = self.levels[-1]
        return int(last["tile"]) + tiles_of(last)

    def part(self, first: int, stop: int) -> TileMap:
        """Levels first to stop - 1 alone."""
        levels = self.levels[first:stop].copy()
        if not len(levels):
            return TileMap(levels, self.anchors[:0], self.codes[:0], self.tables[:0], self.checks[:0])
        tables = levels["tables"].min(), (levels["tables"] + levels["tables_length"]).max()
        end = levels[-1]
        blocks = levels["block"][0], end["block"] + -(-tiles_of(end) // BLOCK)
        anchors = self.anchors[slice(*blocks)].copy()
        last = self.anchors[blocks[1]]["code"] if blocks[1] < len(self.anchors) else len(self.codes)
        codes = self.codes[anchors["code"][0] : last].copy()
        checks = self.checks[levels["tile"][0] : end["tile"] + tiles_of(end)].copy()
        anchors["code"] -= anchors["code"][0]
        for name, start in (("tables", tables[0]), ("block", blocks[0]), ("tile", levels["tile"][0])):
            levels[name] -= start
        return TileMap(levels, anchors, codes, self.tables[slice(*tables)].copy(), checks)

    def find(self, level: int, numbers: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, lengths) of compressed tiles of a level, numbered row by row; length 0 where there is none."""
        found = np.array([_locate(self.anchors, self.codes, self.levels[level]["block"], n) for n in numbers], np.int64)
        return tuple(found.reshape(-1, 2).T)

    def frozen(self) -> TileMap:
        """The same, read-only, as a mapped file is: compiled code then sees one kind of array."""
        views = [array.view() for array in self]
        for view in views:
            view.flags.writeable = False
        return TileMap(*views)


def tiles_of(level) -> int:
    """The number of compressed tiles of a level."""
    return -(-int(level["width"]) // int(level["tile_width"])) * -(-int(level["height"]) // int(level["tile_height"]))


def empty() -> TileMap:
    dtypes = LEVEL, ANCHOR, np.uint8, np.uint8, np.uint32
    return TileMap(*(np.empty(0, dtype) for dtype in dtypes))


def single(level: np.ndarray, offsets, lengths, tables: bytes) -> TileMap:
    """The map of one level, from its facts (a LEVEL record) and the place of each compressed tile."""
    codes = np.empty(20 * len(offsets), np.uint8)
    anchors = np.empty(-(-len(offsets) // BLOCK), ANCHOR)
    used = _pack(np.asarray(offsets, np.int64), np.asarray(lengths, np.int64), anchors, codes)
    level = np.array([level], LEVEL)
    level["tables_length"], level["tables"], level["block"], level["tile"] = len(tables), 0, 0, 0
    return TileMap(level, anchors, codes[:used].copy(), np.frombuffer(tables, np.uint8), np.empty(0, np.uint32))


def join(maps: Iterable[TileMap]) -> TileMap:
    """Maps one after another."""
    maps = list(maps)
    if not maps:
        return empty()
    moved, before = [], Shift()
    for part in maps:
        moved.append(before.move(part))
        before = before.after(part)
    return TileMap(*(np.concatenate(arrays) for arrays in zip(*moved, strict=True)))


class Shift(NamedTuple):
    """How much lies before a map where several are joined."""

    block: int = 0
    tile: int = 0
    tables: int = 0
    code: int = 0

    def move(self, part: TileMap) -> TileMap:
        """`part`, counted from here."""
        levels, anchors = part.levels.copy(), part.anchors.copy()
        for name in ("block", "tile", "tables"):
            levels[name] += getattr(self, name)
        anchors["code"] += self.code
        return part._replace(levels=levels, anchors=anchors)

    def after(self, part: TileMap) -> Shift:
        own = len(part.anchors), part.tiles, len(part.tables), len(part.codes)
        return Shift(*(a + b for a, b in zip(self, own, strict=True)))


def load(folder: Path) -> TileMap:
    """The map stored in a folder, memory-mapped."""
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in FILES)
    return TileMap(*(np.asarray(array) for array in arrays)).frozen()


FILES = tuple(f"tilemap.{name}" for name in TileMap._fields)


@njit(cache=True, nogil=True)
def _put(codes, at, value):
    """Write a number >= 0, seven bits a byte, the lowest first; returns where the next one goes."""
    while value >= _MORE:
        codes[at] = np.uint8((value & _LOW) | _MORE)
        value >>= _SEVEN
        at += 1
    codes[at] = np.uint8(value)
    return at + 1


@njit(cache=True, nogil=True)
def _get(codes, at):
    """The number written at `at`, and where the next one is."""
    value, shift = np.int64(0), np.int64(0)
    while at < len(codes) and shift < 63:
        byte = np.int64(codes[at])
        at += 1
        value |= (byte & _LOW) << shift
        if byte < _MORE:
            break
        shift += _SEVEN
    return value, at


@njit(cache=True, nogil=True)
def _pack(offsets, lengths, anchors, codes):
    """Fill anchors and codes; returns the bytes used. A code is twice the length, plus 1 where a distance follows."""
    at = end = np.int64(0)
    for k in range(len(offsets)):
        if k % BLOCK == 0:
            if lengths[k] > 0:
                end = offsets[k]
            anchors[k // BLOCK].offset, anchors[k // BLOCK].code = end, at
        distance = offsets[k] - end
        if lengths[k] == 0 or distance == 0:
            at = _put(codes, at, 2 * lengths[k])
        else:
            at = _put(codes, at, 2 * lengths[k] + _ONE)
            at = _put(codes, at, 2 * distance if distance > 0 else -2 * distance - _ONE)
        if lengths[k] > 0:
            end = offsets[k] + lengths[k]
    return at


@njit(cache=True, nogil=True)
def _locate(anchors, codes, block, number):
    """(offset, length) of a level's compressed tile, the level's anchors beginning at `block`."""
    anchor = anchors[block + number // BLOCK]
    end, at, start, length = anchor.offset, anchor.code, anchor.offset, np.int64(0)
    for _ in range(number % BLOCK + 1):
        code, at = _get(codes, at)
        length = code >> _ONE
        if code & _ONE:
            far, at = _get(codes, at)
            end += -((far + _ONE) >> _ONE) if far & _ONE else far >> _ONE
        start = end
        end += length
    return start, length


class Wanted(NamedTuple):
    """A rectangle of a level as it is decoded: at 1/scale of its size, in pixels of that size."""

    level: int  # in the map
    scale: int
    left: int
    top: int
    width: int
    height: int


class Piece(NamedTuple):
    """A compressed tile and where it goes."""

    wanted: int  # number of the rectangle
    level: int  # in the map
    scale: int
    tile: int
    start: int  # of its bytes in the file
    length: int
    x: int  # of its corner in the rectangle, decoded pixels
    y: int
    rows: int  # from its top to the last one that the rectangle has of the level


@njit(cache=True, nogil=True)
def cover(levels, anchors, codes, wanted):
    """Which compressed tiles hold the rectangles, (P, 9) int64 as in Piece.

    wanted   (n, 6) int64 as in Wanted
    Rectangles may reach beyond the level. Compressed tiles of no bytes are left out.
    """
    most = 0
    for n in range(len(wanted)):
        across, down = _reach(levels[wanted[n, 0]], wanted[n])
        most += max(across[1] - across[0], 0) * max(down[1] - down[0], 0)
    pieces = np.empty((most, 9), np.int64)
    used = 0
    for n in range(len(wanted)):
        row, scale, left, top = wanted[n, 0], wanted[n, 1], wanted[n, 2], wanted[n, 3]
        level = levels[row]
        columns = -(-level.width // level.tile_width)
        width, height = level.tile_width // scale, level.tile_height // scale
        bottom = min(top + wanted[n, 5], -(-level.height // scale))
        across, down = _reach(level, wanted[n])
        for j in range(down[0], down[1]):
            for i in range(across[0], across[1]):
                tile = j * columns + i
                start, length = _locate(anchors, codes, level.block, tile)
                if length > 0:
                    rows = min(height, bottom - j * height)
                    pieces[used] = n, row, scale, tile, start, length, i * width - left, j * height - top, rows
                    used += 1
    return pieces[:used]


@njit(cache=True, nogil=True)
def _reach(level, wanted):
    """First and one past the last column and row of compressed tiles that a rectangle has pixels of the level in."""
    scale = wanted[1]
    across = _span(wanted[2], wanted[4], -(-level.width // scale), level.tile_width // scale)
    return across, _span(wanted[3], wanted[5], -(-level.height // scale), level.tile_height // scale)


@njit(cache=True, nogil=True)
def _span(start, number, length, tile):
    """First and one past the last tile of an axis of `length` pixels for `number` pixels from `start` on."""
    first, stop = max(start, 0), min(start + number, length)
    return (first // tile, (stop - 1) // tile + 1) if first < stop else (0, 0)
