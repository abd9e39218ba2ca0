"""Directories of tiled TIFF: which layouts are read, what their scale is, and directories that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from compressed_files import texture, write_jpeg
from damage import main as damaged
from slide_files import halves, write_ome, write_philips, write_slide
from test_compressed import largest_difference

from pathfm import InputError, Slide, fallback, tilemap
from pathfm.directory import Unsupported, read_directory
from pathfm.source import open_source

RGB = {"tile": (64, 64), "photometric": "rgb"}


@pytest.mark.parametrize(("unit", "size"), [("µm", 0.25), ("nm", 250.0), ("mm", 0.00025)])
def test_ome_tiff_with_sub_images(tmp_path, unit, size):
    pixels = texture(400, 300)
    slide = Slide.open(write_ome(tmp_path / "a.ome.tif", pixels, unit, size))
    assert (slide.reader, slide.vendor, slide.level_downsamples) == ("ranges", "ome", (1, 2, 4))
    assert slide.mpp == pytest.approx(0.25)
    assert np.array_equal(slide.region(0, 0, 400, 300, 0.25), pixels)
    assert np.array_equal(slide.region(0, 0, 100, 75, 1.0), halves(pixels, 4)[0])


def test_philips_levels_end_where_their_spacing_says(tmp_path):
    """Its upper levels are padded to whole tiles, so that their sizes tell a wrong downsample."""
    pixels = texture(512, 448)
    slide = Slide.open(write_philips(tmp_path / "a.tiff", pixels))
    assert (slide.reader, slide.vendor, slide.level_downsamples) == ("ranges", "philips", (1, 2, 4))
    assert slide.mpp == pytest.approx(0.25)
    with openslide.OpenSlide(slide.path) as peer:
        assert peer.properties["openslide.vendor"] == "philips"
    assert largest_difference(slide) == 0
    assert (slide.read(512 - 64, 448 - 64, 40, 1.0)[16:] == 255).all()


def test_generic_levels_are_sorted_and_others_left_to_openslide(tmp_path):
    pixels = texture(256, 192)
    slide = Slide.open(write_slide(tmp_path / "a.tiff", pixels, 0.5, (1, 4, 2)))
    assert slide.level_downsamples == (1, 2, 4)
    assert largest_difference(slide) == 0
    tifffile.imwrite(tmp_path / "grey.tiff", pixels[..., 0], tile=(64, 64))
    grey = Slide.open(tmp_path / "grey.tiff", mpp=0.5)
    assert (grey.reader, grey.fallback) == ("openslide", "its pixels are not 8-bit RGB")
    assert np.array_equal(grey.read(0, 0, 100, 0.5)[..., 1], pixels[:100, :100, 0])
    tifffile.imwrite(tmp_path / "strips.tiff", pixels, photometric="rgb")
    with pytest.raises(InputError, match="strips.tiff is a TIFF that cannot be read here .its pixels are in strips"):
        Slide.open(tmp_path / "strips.tiff", mpp=0.5)
    tifffile.imwrite(tmp_path / "other.tiff", pixels, software="MedScan 1", **RGB)
    with pytest.raises(Unsupported, match="its layout is trestle's"):
        read_directory(open_source(tmp_path / "other.tiff"))


def patched(path: Path, page: int, changes: dict[str, int]) -> Path:
    """A TIFF with other values in the tags of a page."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        for name, value in changes.items():
            file.pages[page].tags[name].overwrite(value)
    return path


@pytest.mark.parametrize(
    ("page", "changes", "complaint"),
    [
        (0, {"ImageWidth": 0}, "level . has 0 x"),
        (0, {"ImageWidth": 4000}, "level 0 has 12 places for 189 compressed tiles|levels that disagree"),
        (1, {"ImageLength": 31}, "levels that disagree: level 1 of 128 x 31 px"),
    ],
)
def test_sizes_that_cannot_be_are_named(tmp_path, page, changes, complaint):
    path = patched(write_slide(tmp_path / "a.tiff", texture(256, 192), 0.5, (1, 2)), page, changes)
    with pytest.raises(InputError, match=rf"a\.tiff .*({complaint})"):
        Slide.open(path)


def test_places_beyond_the_end_and_missing_tables_are_named(tmp_path):
    path = write_slide(tmp_path / "a.tiff", texture(256, 192))
    offsets = list(tifffile.TiffFile(path).pages[0].dataoffsets)
    patched(path, 0, {"TileOffsets": [*offsets[:-1], path.stat().st_size + 5]})
    with pytest.raises(
        InputError, match=r"a\.tiff is cut short: 1 of 12 compressed tiles of level 0 lie beyond its end"
    ):
        Slide.open(path)
    bare = write_jpeg(tmp_path / "b.svs", texture(256, 192), side=128, shared=True)
    data = bare.read_bytes()
    where = data.index(b"\xff\xd8\xff\xdb")
    bare.write_bytes(data[:where] + b"\0" * 4 + data[where + 4 :])
    with pytest.raises(InputError, match=r"b\.svs.*damaged|b\.svs.*shared JPEG tables"):
        Slide.open(bare).read(0, 0, 64, 0.5)


def test_a_tile_that_no_memory_holds_is_named(tmp_path, monkeypatch):
    """OpenSlide would end the process."""
    tifffile.imwrite(tmp_path / "grey.tiff", texture(256, 192)[..., 0], tile=(64, 64))
    monkeypatch.setattr(fallback, "LARGEST_TILE_PX", 1000)
    with pytest.raises(InputError, match=r"grey\.tiff is damaged: level 0 has tiles of 64 x 64 px"):
        Slide.open(tmp_path / "grey.tiff", mpp=0.5)


IN_5_BYTES = ("in order", "gaps", "holes", "columns", "backwards", "no order")


@pytest.mark.parametrize("kind", [*IN_5_BYTES, "no order, gaps", "shared", "empty"])
def test_the_map_gives_back_every_place(kind):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3_000, 60_000, 900)
    offsets = 1000 + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    if kind == "gaps":
        offsets += 8 * np.arange(900)
    elif kind in ("columns", "backwards", "no order"):
        order = {"columns": np.arange(900).reshape(30, 30).T.ravel(), "backwards": np.arange(900)[::-1]}
        order = order.get(kind, rng.permutation(900))
        offsets[order] = 2**33 + np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
    elif kind == "no order, gaps":
        offsets = rng.permutation(900) * 70_000 + 2**33
    elif kind == "empty":
        offsets[:], lengths[:] = 0, 0
    elif kind == "holes":
        lengths[rng.random(900) < 0.3] = 0
        offsets[lengths == 0] = 0
    elif kind == "shared":
        offsets[::3], lengths[::3] = offsets[0], lengths[0]
    level = np.zeros((), tilemap.LEVEL)
    level["width"], level["height"], level["tile_width"], level["tile_height"] = 30 * 64, 30 * 64, 64, 64
    one = tilemap.single(level, offsets, lengths, b"tables")
    whole = tilemap.join([one, one, one])
    for tiles, number in ((whole, 2), (whole.part(1, 3), 1)):
        found = tiles.find(number, range(900))
        assert np.array_equal(found[1], lengths)
        assert np.array_equal(found[0][lengths > 0], offsets[lengths > 0])
    if kind in IN_5_BYTES:
        assert one.codes.nbytes + one.anchors.nbytes <= 5 * 900


def test_what_tifffile_logs_is_said_in_the_reason_and_its_logger_left_as_it_is(tmp_path, caplog):
    path = write_slide(tmp_path / "a.tiff", texture(256, 192), 0.5, (1, 2))
    with tifffile.TiffFile(path) as tiff:
        second = tiff.pages[1].offset
    path.write_bytes(path.read_bytes()[: second - 50])
    with pytest.raises(InputError, match=r"a\.tiff is cut short: 1 of 12"):
        Slide.open(path)
    assert not caplog.records
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages) == 1
    assert "invalid page offset" in caplog.text


def test_damaged_files_are_read_or_named():
    outcomes = damaged(2000)
    assert outcomes["named"] > 500
    assert outcomes["read"] > 500  # without a CRC a flipped bit may pass as another picture
