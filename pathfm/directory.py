"""The directory of a tiled TIFF: its levels, its scale, and where every compressed tile lies.

Aperio's SVS, generic tiled TIFF, Philips' TIFF and OME-TIFF, classic or BigTIFF, levels in a row or as sub-images.
Other layouts (overlapping tiles, several areas, strips) are left to OpenSlide.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tifffile

from pathfm import decode, tilemap
from pathfm.decode import CODECS, COLOURS, MARKERS, Damaged
from pathfm.errors import InputError
from pathfm.metadata import Unsupported, philips_spacings, properties_of, text_of
from pathfm.source import Source
from pathfm.tilemap import TileMap

MOST_PAGES = 10_000  # a chain of directories longer than this is damage
TILE_SIDES = range(8, 4097)
LONGEST_SIDE = 2**31 - 1
OTHERS = {  # layouts that are more than a grid of tiles, by how their descriptions begin or what they hold
    "leica": ("ImageDescription", "leica-microsystems.com/scn"),
    "ventana": ("XMP", "iScan"),
    "trestle": ("Software", "MedScan"),
    "huron": ("Make", "Huron"),
    "argos": ("65000", ""),
    "hamamatsu": ("65420", ""),
}


class Directory(NamedTuple):
    """What a slide's directory says.

    vendor        "aperio", "generic-tiff", "philips" or "ome"
    properties    text, named as OpenSlide names it, that a scale can be taken from
    sizes         (width, height) of each level, the largest first
    tiles         TileMap of its levels
    """

    vendor: str
    properties: dict[str, str]
    sizes: list[tuple[int, int]]
    tiles: TileMap

    @property
    def scales(self) -> tuple[int, ...]:
        """What fractions of their size all levels decode to."""
        levels = self.tiles.levels
        sides = np.concatenate([levels["tile_width"], levels["tile_height"]])
        whole = (levels["codec"] == decode.JPEG).all() and (sides % decode.SCALES[-1] == 0).all()
        return decode.SCALES if whole else (1,)

    @property
    def codec(self) -> str:
        """The codec of level 0 in words: "jpeg YCbCr 4:2:0 JFIF"."""
        level = self.tiles.levels[0]
        words = [CODECS[level["codec"]]]
        if level["codec"] == decode.JPEG:
            words += [COLOURS[level["colour"]], _notation(level["subsampling"])]
            words += [MARKERS[level["marker"]]] * bool(level["marker"])
        return " ".join(words)


def read_directory(source: Source) -> Directory:
    """The directory of a slide.

    Raises Unsupported where its layout or codec is another, and InputError, which names the slide, where what it says
    cannot be: no pixels, levels that disagree, tiles beyond the end of the file.
    """
    with source.file() as file, _unlogged("tifffile"):  # what it would log is said in the reason
        try:
            with tifffile.TiffFile(file, name=source.path) as tiff:
                first = tiff.pages[0]
                vendor = _vendor(first)
                pages = _pages_of(vendor, tiff)
                description, properties = first.description, properties_of(vendor, first)
                facts = [_facts(page) for page in pages]
        except (Unsupported, InputError):
            raise
        except Exception as error:  # whatever damage makes of it
            raise Unsupported(f"its directory cannot be read ({type(error).__name__}: {error})") from None
    sizes = _sizes(vendor, facts, description, source.path)
    kept = _usable(vendor, facts)
    maps = [_map(facts[k], sizes[k], k, source) for k in kept]
    return Directory(vendor, properties, [sizes[k] for k in kept], tilemap.join(maps))


@contextlib.contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keep a logger quiet about what this thread does meanwhile; it stays as it is for others."""
    logger, own = logging.getLogger(name), threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != own

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


class Facts(NamedTuple):
    """What a page's tags say of one level."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    codec: int
    colour: int
    predictor: int
    tables: bytes
    offsets: np.ndarray  # (n,) int64
    lengths: np.ndarray


def _facts(page) -> Facts:
    """A page as a level of 8-bit RGB. Raises Unsupported where it is something else."""
    if not page.is_tiled:
        raise Unsupported("its pixels are in strips, not tiles")
    layout = int(page.bitspersample), int(page.samplesperpixel), int(page.planarconfig), int(page.sampleformat)
    if layout != (8, 3, 1, 1) or int(page.imagedepth) != 1 or int(page.fillorder) != 1:
        raise Unsupported("its pixels are not 8-bit RGB")
    codec, colour = _codec(int(page.compression), int(page.photometric))
    predictor = int(page.predictor) if codec in (decode.LZW, decode.DEFLATE) else 1
    if predictor not in (1, 2):
        raise Unsupported(f"its predictor is {predictor}")
    tables = bytes(page.jpegtables or b"") if codec == decode.JPEG else b""
    if len(tables) > np.iinfo(np.uint16).max:
        raise Unsupported(f"its shared JPEG tables have {len(tables)} bytes")
    places = (np.array(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
    sides = page.imagewidth, page.imagelength, page.tilewidth, page.tilelength
    return Facts(*map(int, sides), codec, colour, predictor, tables, *places)


def _codec(compression: int, photometric: int) -> tuple[int, int]:
    """Numbers in CODECS and COLOURS for two TIFF tags."""
    rgb, ycbcr = 2, 6
    if compression == 7 and photometric in (rgb, ycbcr):
        return decode.JPEG, int(photometric == ycbcr)
    if compression in (33003, 33005):
        return decode.JPEG2000, int(compression == 33003)
    plain = {1: decode.UNCOMPRESSED, 5: decode.LZW, 8: decode.DEFLATE, 32946: decode.DEFLATE}
    if compression in plain and photometric == rgb:
        return plain[compression], 0
    raise Unsupported(f"its codec is {compression} with colours of kind {photometric}")


def _vendor(page) -> str:
    """Who wrote the file, by its first page. Raises Unsupported for layouts that are more than a grid of tiles."""
    for vendor, (tag, sign) in OTHERS.items():
        text = text_of(page, tag)
        if text is not None and sign in text:
            raise Unsupported(f"its layout is {vendor}'s")
    if page.description.startswith("Aperio"):
        return "aperio"
    if (text_of(page, "Software") or "").startswith("Philips") and "DPUfsImport" in page.description:
        return "philips"
    return "ome" if page.description.rstrip().endswith("OME>") else "generic-tiff"


def _pages_of(vendor: str, tiff: tifffile.TiffFile) -> list:
    """The pages that are levels, as OpenSlide chooses them; of a first page with sub-images, those."""
    pages = list(itertools.islice(_chain(tiff), MOST_PAGES + 1))
    if len(pages) > MOST_PAGES:
        raise Unsupported(f"it has more than {MOST_PAGES} pages")
    first = pages[0]
    if not first.is_tiled:
        raise Unsupported("its pixels are in strips, not tiles")
    if first.subifds:
        levels = [first, *(page for page in first.pages if page.is_tiled)]
    elif vendor == "ome":
        levels = [first]
    else:
        reduced = (page for page in pages[1:] if page.is_tiled and (vendor == "aperio" or int(page.subfiletype) & 1))
        levels = [first, *reduced]
    return levels if vendor == "aperio" else sorted(levels, key=lambda page: -int(page.imagewidth))


def _chain(tiff: tifffile.TiffFile) -> Iterator[Any]:
    for number in itertools.count():
        try:
            yield tiff.pages[number]
        except IndexError:
            return


def _sizes(vendor: str, levels: Sequence[Facts], description: str, path: str) -> list[tuple[int, int]]:
    """(width, height) of each level in pixels. Raises InputError where they cannot be levels of one image."""
    for k, level in enumerate(levels):
        sides = level.width, level.height, level.tile_width, level.tile_height
        if min(sides) < 1 or max(sides) > LONGEST_SIDE:
            raise InputError(f"{path} is damaged: level {k} has {sides[0]} x {sides[1]} px; fetch the file again")
        if level.tile_width not in TILE_SIDES or level.tile_height not in TILE_SIDES:
            raise Unsupported(f"its compressed tiles have {sides[2]} x {sides[3]} px")
    sizes = [(level.width, level.height) for level in levels]
    if vendor == "philips":  # upper levels are padded to whole tiles; their spacing tells how far they go
        spacings = philips_spacings(description)
        if len(spacings) != len(levels):
            raise Unsupported(f"it describes {len(spacings)} levels and has {len(levels)}")
        downs = [round((x / spacings[0][0] + y / spacings[0][1]) / 2) for x, y in spacings]
        sizes = [(sizes[0][0] // down, sizes[0][1] // down) for down in downs]
    for k, size in enumerate(sizes[1:], 1):
        if not _agree(sizes[0], size) or min(size) < 1 or size[0] > sizes[k - 1][0]:
            raise InputError(
                f"{path} has levels that disagree: level {k} of {size[0]} x {size[1]} px is no smaller copy of "
                f"level 0 of {sizes[0][0]} x {sizes[0][1]} px; write its pyramid again"
            )
    return sizes


def _agree(full: tuple[int, int], level: tuple[int, int]) -> bool:
    """Whether one downsample explains both sides of a level, each rounded up or down by less than a pixel."""
    least = max(n / (k + 1) for n, k in zip(full, level, strict=True))
    most = min(n / max(k - 1, 1e-9) for n, k in zip(full, level, strict=True))
    return least <= most


def _usable(vendor: str, levels: Sequence[Facts]) -> list[int]:
    """The levels to read from: one that lacks tiles which a finer one has is left out.

    In Aperio's files a tile above a missing one is itself often spoilt, so there every finer level must be whole.
    """
    kept, last = [0], levels[0]
    for k, level in enumerate(levels[1:], 1):
        if vendor == "aperio" and any((finer.lengths == 0).any() for finer in levels[:k]):
            break
        if _missing(level, last):
            continue
        kept.append(k)
        last = level
    return kept


def _missing(level: Facts, finer: Facts) -> bool:
    """Whether `level` has a tile of no bytes where `finer` has pixels."""
    empty = np.flatnonzero(level.lengths == 0)
    if not len(empty) or len(level.lengths) != _number(level) or len(finer.lengths) != _number(finer):
        return False
    columns, finer_columns = (-(-one.width // one.tile_width) for one in (level, finer))
    there = finer.lengths.reshape(-1, finer_columns) > 0
    across, down = (finer.width / level.width, finer.height / level.height)
    for number in empty:
        row, column = divmod(int(number), columns)
        rows = (int(edge * level.tile_height * down / finer.tile_height + 0.5) for edge in (row, row + 1))
        sides = (int(edge * level.tile_width * across / finer.tile_width + 0.5) for edge in (column, column + 1))
        if there[slice(*rows), slice(*sides)].any():
            return True
    return False


def _number(level: Facts) -> int:
    return -(-level.width // level.tile_width) * -(-level.height // level.tile_height)


def _map(level: Facts, size: tuple[int, int], k: int, source: Source) -> TileMap:
    """The map of level number k, its tiles checked against the size of the file and one of them decoded."""
    offsets, lengths = level.offsets, level.lengths
    if len(offsets) != len(lengths) or len(offsets) != _number(level):
        raise InputError(
            f"{source.path} is damaged: level {k} has {len(offsets)} places for {_number(level)} compressed tiles; "
            "fetch the file again"
        )
    beyond = np.flatnonzero((lengths < 0) | (offsets < 0) | (lengths > source.size) | (offsets > source.size - lengths))
    beyond = beyond[lengths[beyond] != 0]
    if len(beyond):
        raise InputError(
            f"{source.path} is cut short: {len(beyond)} of {len(offsets)} compressed tiles of level {k} lie beyond its "
            f"end at byte {source.size}; fetch the file again"
        )
    facts = np.zeros((), tilemap.LEVEL)
    for name in ("tile_width", "tile_height", "codec", "colour", "predictor"):
        facts[name] = getattr(level, name)
    facts["width"], facts["height"] = size
    facts["subsampling"] = 1
    offsets, lengths = _within(level, size)
    there = np.flatnonzero(lengths)
    if len(there):
        _try(facts, level, k, *(int(places[there[0]]) for places in (offsets, lengths)), source)
    return tilemap.single(facts, offsets, lengths, level.tables)


def _within(level: Facts, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths without the columns and rows of tiles that padding alone fills."""
    columns = -(-level.width // level.tile_width)
    shape = -(-size[1] // level.tile_height), -(-size[0] // level.tile_width)
    places = (values.reshape(-1, columns)[: shape[0], : shape[1]] for values in (level.offsets, level.lengths))
    return tuple(np.ascontiguousarray(values).ravel() for values in places)


def _try(facts: np.ndarray, level: Facts, k: int, offset: int, length: int, source: Source) -> None:
    """Decode one compressed tile, and note what a JPEG says of itself in `facts`."""
    (data,) = source.read([offset], [length])
    try:
        if level.codec == decode.JPEG:
            header = decode.jpeg_header(data)
            facts["subsampling"], facts["marker"] = header.subsampling, header.marker
            if not (header.own_tables or level.tables):
                raise Damaged("is a JPEG without tables, its own or shared")
        decode.decode(data, decode.recipe(facts, level.tables))
    except Damaged as why:
        raise Unsupported(f"the first compressed tile of level {k} {why}") from None


def _notation(subsampling) -> str:
    """4:2:0 and its kin."""
    across, down = (int(n) for n in subsampling)
    return f"4:{4 // across}:{4 // across if down == 1 else 0}" if (across, down) != (1, 2) else "4:4:0"
