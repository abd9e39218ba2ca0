"""Where the compressed tiles of tiled slides lie: a few bytes each, in arrays that processes share.

A level's compressed tiles mostly follow one another in the file, so a tile is stored as its length and, only where
it does not begin at the end of the one before, the distance. Where they lie in another order than row by row, they are
stored in that of the file, and for each tile its rank there. All are numbers of as many bits as a level needs. Every
BLOCK tiles an absolute position stands beside, so that any tile is found in at most BLOCK steps.

Bytes a compressed tile, for 130,000 JPEGs of 9, 30 and 100 kB: 2.3, 2.5 and 2.8 in order; 4.4, 4.7 and 4.9 in columns,
backwards or in no order at all. Only where besides most have a gap of their own before them it is over 5: up to 7.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pathfm.kernels import kernel

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
        ("length_bits", "u1"),  # of a compressed tile's length,
        ("gap_bits", "u1"),  # of the distance before it; 0 where there is none in the level,
        ("rank_bits", "u1"),  # and of its rank in the file; 0 where all are in order
        ("tables_length", "u2"),  # bytes of shared JPEG tables
        ("tables", "i8"),  # where they begin
        ("block", "i8"),  # its first block
        ("ranks", "i8"),  # where they begin in `codes`, in bits
        ("tile", "i8"),  # its first compressed tile among all, which numbers the checks
    ],
    align=True,
)
ANCHOR = np.dtype(
    [("offset", "i8"), ("code", "i8")], align=True
)  # where a block begins in the file, and in `codes`, in bits


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
        last = self.anchors[blocks[1]]["code"] if blocks[1] < len(self.anchors) else 8 * len(self.codes)
        codes = self.codes[anchors["code"][0] // 8 : last // 8].copy()
        checks = self.checks[levels["tile"][0] : end["tile"] + tiles_of(end)].copy()
        moved = {"tables": tables[0], "block": blocks[0], "tile": levels["tile"][0], "ranks": anchors["code"][0]}
        anchors["code"] -= anchors["code"][0]
        for name, start in moved.items():
            levels[name] -= start
        return TileMap(levels, anchors, codes, self.tables[slice(*tables)].copy(), checks)

    def find(self, level: int, numbers: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, lengths) of compressed tiles of a level, numbered row by row; length 0 where there is none."""
        found = np.array([_locate(self.levels[level], self.anchors, self.codes, n) for n in numbers], np.int64)
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
    offsets, lengths = np.asarray(offsets, np.int64), np.asarray(lengths, np.int64)
    order = _file_order(offsets, lengths)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    lengths, before, gaps = lengths[order], *_gaps(offsets[order], lengths[order])
    level = np.array([level], LEVEL)
    level["tables_length"], level["tables"], level["block"], level["tile"] = len(tables), 0, 0, 0
    level["length_bits"], level["gap_bits"] = int(lengths.max()).bit_length(), int(gaps.max()).bit_length()
    level["rank_bits"] = 0 if (order[1:] > order[:-1]).all() else len(order).bit_length()
    bits = np.array([level[f"{name}_bits"][0] for name in ("length", "gap", "rank")], np.int64)
    used = len(order) * (bits[0] + bits[2] + (bits[1] > 0)) + (gaps > 0).sum() * bits[1]
    anchors, codes = np.empty(-(-len(order) // BLOCK), ANCHOR), np.zeros(-(-used // 8), np.uint8)
    anchors["offset"] = before[::BLOCK]
    level["ranks"] = _pack(lengths, gaps, ranks, bits, anchors, codes)
    return TileMap(level, anchors, codes, np.frombuffer(tables, np.uint8), np.empty(0, np.uint32))


def _file_order(offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of compressed tiles as they follow in the file; one of no bytes stays behind the one before it."""
    last = np.maximum.accumulate(np.where(lengths > 0, np.arange(len(lengths)), -1))
    return np.argsort(np.where(last < 0, -1, offsets[last]), kind="stable")


def _gaps(offsets: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For tiles in file order: where those before end, and the distance from there as a number >= 0 (see `_locate`)."""
    there = lengths > 0
    last = np.maximum.accumulate(np.where(there, np.arange(len(there)), -1))
    last = np.concatenate([[-1], last[:-1]])
    before = np.where(last < 0, offsets[there.argmax()], (offsets + lengths)[last])
    gaps = np.where(there, offsets - before, 0)
    return before, np.where(gaps < 0, -2 * gaps - 1, 2 * gaps)


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
    code: int = 0  # bits

    def move(self, part: TileMap) -> TileMap:
        """`part`, counted from here."""
        levels, anchors = part.levels.copy(), part.anchors.copy()
        for name in ("block", "tile", "tables"):
            levels[name] += getattr(self, name)
        levels["ranks"] += self.code
        anchors["code"] += self.code
        return part._replace(levels=levels, anchors=anchors)

    def after(self, part: TileMap) -> Shift:
        own = len(part.anchors), part.tiles, len(part.tables), 8 * len(part.codes)
        return Shift(*(a + b for a, b in zip(self, own, strict=True)))


def load(folder: Path) -> TileMap:
    """The map stored in a folder, memory-mapped."""
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in FILES)
    return TileMap(*(np.asarray(array) for array in arrays)).frozen()


FILES = tuple(f"tilemap.{name}" for name in TileMap._fields)


@kernel()
def _put(codes, at, value, width):
    """Write a number of `width` bits, the lowest first, from bit `at` on; returns where the next one goes."""
    while width > 0:
        number = min(8 - (at & 7), width)
        codes[at >> 3] |= np.uint8((value & ((1 << number) - 1)) << (at & 7))
        value, at, width = value >> number, at + number, width - number
    return at


@kernel()
def _get(codes, at, width):
    """The number of `width` bits at bit `at`."""
    value, found = np.int64(0), 0
    while found < width and at >> 3 < len(codes):
        number = min(8 - (at & 7), width - found)
        value |= ((np.int64(codes[at >> 3]) >> (at & 7)) & ((1 << number) - 1)) << found
        found, at = found + number, at + number
    return value


@kernel()
def _pack(lengths, gaps, ranks, bits, anchors, codes):
    """Fill codes and where in them each block begins; returns where the ranks do.

    A code is whether a distance follows (in a level with distances), the length, and the distance.
    """
    at = np.int64(0)
    for k in range(len(lengths)):
        if k % BLOCK == 0:
            anchors[k // BLOCK].code = at
        if bits[1]:
            at = _put(codes, at, np.int64(gaps[k] > 0), 1)
        at = _put(codes, at, lengths[k], bits[0])
        if gaps[k] > 0:
            at = _put(codes, at, gaps[k], bits[1])
    start = at
    for k in range(len(ranks) if bits[2] else 0):
        at = _put(codes, at, ranks[k], bits[2])
    return start


@kernel()
def _locate(level, anchors, codes, number):
    """(offset, length) of a level's compressed tile. A distance is stored twice its size, less 1 where it is back."""
    length_bits, gap_bits, rank_bits = np.int64(level.length_bits), np.int64(level.gap_bits), np.int64(level.rank_bits)
    rank = _get(codes, level.ranks + number * rank_bits, rank_bits) if rank_bits else np.int64(number)
    anchor = anchors[level.block + rank // BLOCK]
    end, at, start, length = anchor.offset, anchor.code, anchor.offset, np.int64(0)
    for _ in range(rank % BLOCK + 1):
        gap = gap_bits and _get(codes, at, 1)
        at += gap_bits > 0
        length = _get(codes, at, length_bits)
        at += length_bits
        if gap:
            far = _get(codes, at, gap_bits)
            at += gap_bits
            end += -((far + 1) >> 1) if far & 1 else far >> 1
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


# A compressed tile and where it goes.
PIECE = np.dtype(
    [
        ("wanted", "i8"),  # number of the rectangle
        ("level", "i8"),  # in the map
        ("scale", "i8"),
        ("tile", "i8"),
        ("start", "i8"),  # of its bytes in the file
        ("length", "i8"),
        ("x", "i8"),  # of its corner in the rectangle, decoded pixels
        ("y", "i8"),
        ("left", "i8"),  # what the rectangle has of it, decoded pixels from its corner
        ("top", "i8"),
        ("right", "i8"),
        ("bottom", "i8"),
    ]
)


def cover(tiles: TileMap, wanted: np.ndarray) -> np.ndarray:
    """Which compressed tiles hold the rectangles: (P,) PIECE, those of a rectangle together.

    wanted   (n, 6) int64 as in Wanted

    Rectangles may reach beyond the level. Compressed tiles of no bytes are left out.
    """
    return _cover(tiles.levels, tiles.anchors, tiles.codes, wanted).view(PIECE)[:, 0]


@kernel()
def _cover(levels, anchors, codes, wanted):
    """`cover`, (P, 12) int64: the fields of PIECE."""
    most = 0
    for n in range(len(wanted)):
        across, down = _reach(levels[wanted[n, 0]], wanted[n])
        most += max(across[1] - across[0], 0) * max(down[1] - down[0], 0)
    pieces = np.empty((most, 12), np.int64)
    used = 0
    for n in range(len(wanted)):
        row, scale, left, top = wanted[n, 0], wanted[n, 1], wanted[n, 2], wanted[n, 3]
        level = levels[row]
        columns = -(-level.width // level.tile_width)
        width, height = level.tile_width // scale, level.tile_height // scale
        right = min(left + wanted[n, 4], -(-level.width // scale))
        bottom = min(top + wanted[n, 5], -(-level.height // scale))
        across, down = _reach(level, wanted[n])
        for j in range(down[0], down[1]):
            for i in range(across[0], across[1]):
                tile = j * columns + i
                start, length = _locate(level, anchors, codes, tile)
                if length > 0:
                    x, y = i * width, j * height
                    pieces[used, :8] = n, row, scale, tile, start, length, x - left, y - top
                    pieces[used, 8:10] = max(left - x, 0), max(top - y, 0)
                    pieces[used, 10:] = min(right - x, width), min(bottom - y, height)
                    used += 1
    return pieces[:used]


@kernel()
def _reach(level, wanted):
    """First and one past the last column and row of compressed tiles that a rectangle has pixels of the level in."""
    scale = wanted[1]
    across = _span(wanted[2], wanted[4], -(-level.width // scale), level.tile_width // scale)
    return across, _span(wanted[3], wanted[5], -(-level.height // scale), level.tile_height // scale)


@kernel()
def _span(start, number, length, tile):
    """First and one past the last tile of an axis of `length` pixels for `number` pixels from `start` on."""
    first, stop = max(start, 0), min(start + number, length)
    return (first // tile, (stop - 1) // tile + 1) if first < stop else (0, 0)
