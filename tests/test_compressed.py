"""Every codec and colour that is read here gives the pixels that OpenSlide gives."""

from __future__ import annotations

import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from compressed_files import jpeg, jpeg2000, marked, texture, tiles_of, write_jpeg, write_jpeg2000
from PIL import Image
from slide_files import shrink

from pathfm import Slide, decode, turbojpeg
from pathfm.decode import Damaged
from pathfm.storage import cache_dir
from pathfm.synthetic import generator_hash
from pathfm.synthetic.cohorts import specs


def largest_difference(slide: Slide, squares: int = 12, side: int = 90) -> int:
    """Over random squares of every level, on whole level pixels, some of them over the edge."""
    rng = np.random.default_rng(1)
    worst = seen = 0
    with openslide.OpenSlide(slide.path) as peer:
        assert peer.level_count == len(slide.level_downsamples)
        for level, down in enumerate(slide.level_downsamples):
            width, height = peer.level_dimensions[level]
            down = int(down)
            for _ in range(squares):
                x, y = (int(rng.integers(-10, max(n - side, 0) + 30)) * down for n in (width, height))
                theirs = np.asarray(whitened(peer.read_region((x, y), level, (side, side))))
                ours = slide.read(x, y, side, slide.mpp * down)
                if slide.plan(slide.mpp * down).scale == 1 and exact(peer, level, x, y):
                    worst, seen = max(worst, int(np.abs(theirs.astype(int) - ours).max())), seen + 1
    assert seen > squares // 2
    return worst


def exact(peer: openslide.OpenSlide, level: int, x: int, y: int) -> bool:
    """Whether OpenSlide reads whole pixels of this level here: its own downsample may be 4.0003."""
    down = peer.level_downsamples[level]
    return all(abs(n / down - round(n / down)) < 1e-6 for n in (x, y))


def whitened(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return white


JPEGS = [
    ("ycbcr", "JFIF", "420", 256, False),
    ("ycbcr", "none", "420", 240, True),
    ("ycbcr", "Adobe", "422", 256, True),
    ("ycbcr", "none", "444", 240, False),
    ("ycbcr", "JFIF", "440", 256, True),
    ("ycbcr", "JFIF", "411", 256, False),
    ("rgb", "none", "444", 240, True),
    ("rgb", "none", "444", 256, False),
    ("rgb", "Adobe", "444", 256, True),
    ("rgb", "JFIF", "444", 256, False),  # says YCbCr and means RGB
]


@pytest.mark.parametrize(("colour", "marker", "subsampling", "side", "shared"), JPEGS)
def test_jpeg_is_openslides_own(tmp_path, colour, marker, subsampling, side, shared):
    pixels = texture(512, 640)
    settings = (colour, marker, subsampling, side, shared)
    slide = Slide.open(write_jpeg(tmp_path / "a.svs", pixels, *settings, levels=(1, 2)))
    assert slide.reader == "ranges"
    assert largest_difference(slide) == 0
    assert np.abs(slide.read(0, 0, 500, 0.5).astype(int) - pixels[:500, :500]).mean() < 25  # wrong colours: over 60
    words = "jpeg", {"ycbcr": "YCbCr", "rgb": "RGB"}[colour], ":".join(subsampling)
    assert slide.codec.split()[: len(words)] == list(words)


def test_synthetic_slides_are_read_as_openslide_reads_them(cohort):
    for path in cohort.table["path"]:
        slide = Slide.open(path)
        assert slide.reader == "ranges"
        assert largest_difference(slide, squares=8) == 0


def test_the_embedded_cohort_is_read_as_openslide_reads_it():
    """`make test` draws it before the tests: some random squares of every level of all of its slides."""
    folder = cache_dir() / f"embedded-{generator_hash()}"
    paths = sorted(folder.glob("*.svs"))
    if len(paths) < len(specs("embedded")):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("draw it: python -m pathfm cohort embedded")
    for path in paths:
        with Slide.open(path) as slide:
            assert slide.reader == "ranges"
            assert largest_difference(slide, squares=3) == 0, path.name


@pytest.mark.real
@pytest.mark.parametrize("name", ["cmu-1-small-region.svs", "derived_cmu1_region_pyramid.tiff", "openslide_16px.svs"])
def test_real_slides_are_read_as_openslide_reads_them(real_data, name):
    slide = Slide.open(real_data / "slides" / name)
    assert slide.reader == "ranges"
    assert largest_difference(slide, squares=30) == 0


def test_partial_tiles_at_the_edge_and_a_bigtiff(tmp_path):
    slide = Slide.open(write_jpeg(tmp_path / "a.svs", texture(601, 433), side=240, levels=(1, 4), bigtiff=True))
    assert (slide.reader, slide.level_downsamples) == ("ranges", (1, 4))
    assert largest_difference(slide) == 0


def test_tiles_of_no_bytes_are_white(tmp_path):
    pixels = texture(768, 512)
    slide = Slide.open(write_jpeg(tmp_path / "a.svs", pixels, empty=[(0, 1), (0, 5)]))
    assert largest_difference(slide) == 0
    assert (slide.read(300, 0, 200, 0.5) == 255).all()
    assert slide.read(200, 0, 50, 0.5).std() > 10


def test_a_level_over_missing_tiles_is_not_read(tmp_path):
    """OpenSlide paints them from a finer level; here the finer level itself is read."""
    pixels = texture(1024, 1024)
    slide = Slide.open(write_jpeg(tmp_path / "a.svs", pixels, levels=(1, 2, 4), empty=[(1, 3)]))
    assert slide.level_downsamples == (1,)
    assert slide.plan(1.0).scale == 2
    seen = slide.read(600, 600, 100, 1.0).astype(float)
    assert np.abs(seen - shrink(pixels, 2)[300:400, 300:400]).mean() < 15  # elsewhere: over 40


@pytest.mark.parametrize("tag", [33003, 33005])
def test_jpeg_2000_is_openslides_own(tmp_path, tag):
    pixels = texture(512, 300)
    if tag == 33003:
        stored = cv2.cvtColor(pixels, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
        streams = [jpeg2000(tile, False) for tile in tiles_of(stored, 128)]
    else:
        streams = [jpeg2000(tile, True) for tile in tiles_of(pixels, 128)]
    slide = Slide.open(write_jpeg2000(tmp_path / "a.svs", streams, (512, 300), 128, tag))
    assert (slide.reader, slide.codec, slide.scales) == ("ranges", "jpeg2000", (1,))
    assert largest_difference(slide) == 0
    assert np.abs(slide.read(0, 0, 300, 0.5).astype(int) - pixels[:300, :300]).mean() < 4


def test_subsampled_jpeg_2000(tmp_path):
    streams = [(Path(__file__).parent / f"data/chroma-4-2-2-{side}.j2k").read_bytes() for side in ("left", "right")]
    assert decode.jpeg2000_header(streams[0]) == ((64, 64), True, False)
    slide = Slide.open(write_jpeg2000(tmp_path / "a.svs", streams, (128, 64), 64, 33003))
    assert largest_difference(slide, side=40) <= 1
    assert slide.read(0, 0, 64, 0.5).std(axis=(0, 1)).min() > 10


def test_a_33003_that_transforms_its_colours_itself_is_not_converted_again(tmp_path):
    pixels = texture(128, 128)
    slide = Slide.open(write_jpeg2000(tmp_path / "a.svs", [jpeg2000(pixels, True)], (128, 128), 128, 33003))
    assert np.abs(slide.read(0, 0, 128, 0.5).astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("compression", ["lzw", "deflate", "adobe_deflate", None])
def test_lossless_tiles(tmp_path, compression, predictor):
    pixels = texture(300, 200)
    options = {"predictor": predictor} if compression else {}
    scale = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(
        tmp_path / "a.tiff", pixels, tile=(64, 64), photometric="rgb", compression=compression, **options, **scale
    )
    slide = Slide.open(tmp_path / "a.tiff")
    assert slide.reader == "ranges"
    assert np.array_equal(slide.region(0, 0, 300, 200, 0.5), pixels)
    assert largest_difference(slide) == 0


HOW = decode.Recipe(decode.JPEG, 1, 256, 256, 256, 256, 1, b"\xff\xd8", True)


@pytest.fixture(scope="module")
def stream() -> bytes:
    return jpeg(texture(256, 256), "ycbcr", "420")


def test_damage_that_a_decoder_can_show_is_named(stream):
    assert decode.decode(stream, HOW).shape == (256, 256, 3)
    with pytest.raises(Damaged, match="is no whole JPEG"):
        decode.decode(stream[: len(stream) // 2], HOW)
    with pytest.raises(Damaged, match="is a JPEG of 256 x 256 px and not 240 x 240|no whole JPEG"):
        decode.decode(stream, HOW._replace(width=240, height=240))
    with pytest.raises(Damaged, match="is a JPEG of 256 x 256 px and not 320 x 320"):
        decode.decode(stream, HOW._replace(width=320, height=320))
    bare, _ = marked(stream, "JFIF", "ycbcr", True)
    with pytest.raises(Damaged, match="is no whole JPEG"):
        decode.decode(bare, HOW)
    with pytest.raises(Damaged, match="tables that are none"):
        decode.tables_only(b"tables")
    for name in ("lzw", "deflate", "uncompressed", "jpeg2000"):
        with pytest.raises(Damaged):
            decode.decode(stream, HOW._replace(codec=decode.CODECS.index(name)))
    whole = jpeg2000(texture(256, 256), True)
    with pytest.raises(Damaged, match="without an end"):
        decode.decode(whole[:-400], HOW._replace(codec=decode.JPEG2000))


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_fraction_is_the_mean_of_what_it_stands_for(scale):
    """Leaving out the finer cosines is nearly averaging: at least 37 dB of it."""
    stream = jpeg(texture(256, 256, blur=4), "ycbcr", "420")
    whole = decode.decode(stream, HOW)
    error = decode.decode(stream, HOW, scale) - shrink(whole, scale)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 37


@pytest.fixture(params=["libjpeg-turbo 3", "simplejpeg"])
def decoder(request, monkeypatch) -> str:
    """With the library that decodes parts, which the tests' environment holds, and without."""
    assert turbojpeg.LIBRARY is not None
    if request.param == "simplejpeg":
        monkeypatch.setattr(turbojpeg, "LIBRARY", None)
    return request.param


def boxes(width: int, height: int, number: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Random ones, some of a pixel or two, some at the edges, and the whole."""
    found = [(0, 0, width, height), (0, 0, 1, 1), (width - 1, height - 1, width, height)]
    for k in range(number):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        right, bottom = (
            (left + 1 + k % 3, top + 1 + k // 3 % 3) if k % 2 else rng.integers((left, top), (width, height)) + 1
        )
        found.append((left, top, min(int(right), width), min(int(bottom), height)))
    return found


@pytest.mark.parametrize("scale", decode.SCALES)
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
@pytest.mark.parametrize("sides", [(256, 240), (240, 250), (504, 488)])
def test_a_part_is_that_of_the_whole(decoder, sides, subsampling, scale):
    width, height = (side // scale * scale for side in sides)
    stream = jpeg(texture(width, height, blur=0.7), "ycbcr", subsampling)
    how = HOW._replace(width=width, height=height)
    whole = simplejpeg.decode_jpeg(stream, "RGB", False, False, height // scale, width // scale, 1)
    for left, top, right, bottom in boxes(width // scale, height // scale, 150, np.random.default_rng(0)):
        part = decode.decode(stream, how, scale, (left, top, right, bottom))
        assert np.array_equal(part, whole[top:bottom, left:right]), (left, top, right, bottom)


@pytest.mark.parametrize("scale", decode.SCALES)
@pytest.mark.parametrize(("subsampling", "unit"), [("444", 8), ("422", 16), ("420", 16), ("440", 8), ("411", 32)])
def test_little_more_than_the_part_is_decoded(stream, subsampling, unit, scale):
    data = np.frombuffer(jpeg(texture(256, 256), "ycbcr", subsampling), np.uint8)
    buffer, side = np.empty(256 * 256 * 3, np.uint8), 256 // scale
    for box in boxes(side, side, 100, np.random.default_rng(1)):
        found = turbojpeg.part(turbojpeg.ADDRESSES, data, 256, 256, scale, *box, buffer)
        status, x, y, across, down = found
        assert status == turbojpeg.WHOLE
        assert 0 <= box[0] - x < unit // scale + turbojpeg.MARGIN
        assert 0 <= x + across - box[2] <= turbojpeg.MARGIN
        assert (y, down) in ((box[1], box[3] - box[1]), (0, side))


def test_parts_whatever_the_marker_and_the_tables(decoder):
    for colour, marker, subsampling, side, shared in JPEGS:
        stream, tables = marked(jpeg(texture(side, side), colour, subsampling), marker, colour, shared)
        level = {"tile_width": side, "tile_height": side, "width": side, "height": side, "predictor": 1}
        how = decode.recipe({**level, "codec": decode.JPEG, "colour": int(colour == "ycbcr")}, tables)
        assert np.array_equal(decode.decode(stream, how, 1, (9, 50, 77, 99)), decode.decode(stream, how)[50:99, 9:77])


def test_damage_never_changes_a_part_unnoticed(stream, decoder):
    """Flipped bytes: named, or what the whole stream decodes to there. Cut short: named, wherever."""
    rng, named = np.random.default_rng(0), 0
    pixels = stream.index(b"\xff\xda") + 14
    for left, top, right, bottom in boxes(256, 256, 600, rng):
        spoilt, at = bytearray(stream), int(rng.integers(pixels, len(stream) - 2))
        spoilt[at : at + 2] = rng.choice([0xFF, *rng.integers(256, size=2)]), rng.integers(256)
        try:
            found = decode.decode(bytes(spoilt), HOW, 1, (left, top, right, bottom))
        except Damaged:
            named += 1
            with pytest.raises(Damaged):
                decode.decode(bytes(spoilt), HOW)
        else:
            loosely = simplejpeg.decode_jpeg(bytes(spoilt), "RGB", False, False, strict=False)
            assert np.array_equal(found, loosely[top:bottom, left:right])
    assert 60 < named < 540
    for length in range(pixels, len(stream) - 1, 97):
        with pytest.raises(Damaged, match="is no whole JPEG"):
            decode.decode(stream[:length], HOW, 1, (0, 0, 256, 20))


def test_what_ends_early_is_named_as_far_as_it_is_needed(stream):
    short = stream[: len(stream) // 2] + b"\xff\xd9"
    with pytest.raises(Damaged, match="is no whole JPEG"):
        decode.decode(short, HOW, 1, (0, 0, 256, 200))
    above = decode.decode(short, HOW, 1, (0, 0, 256, 8))  # this damage lies below
    assert np.array_equal(above, decode.decode(stream, HOW)[:8])


@pytest.mark.parametrize("options", [{"restart_marker_rows": 1}, {"restart_marker_blocks": 3}, {"progressive": True}])
def test_parts_of_streams_that_restart_or_refine(decoder, options):
    file = io.BytesIO()
    Image.fromarray(texture(256, 256)).save(file, "jpeg", quality=75, **options)
    whole = np.asarray(Image.open(file))
    for left, top, right, bottom in boxes(256, 256, 60, np.random.default_rng(2)):
        found = decode.decode(file.getvalue(), HOW, 1, (left, top, right, bottom))
        assert np.array_equal(found, whole[top:bottom, left:right])


def test_an_image_of_another_size_writes_nothing_beyond_the_buffer(stream):
    """A stream may declare any size: the pixels that a compressed tile has room for are all that is written."""
    for side in (128, 255, 264, 4096):
        with pytest.raises(ValueError, match=f"is a JPEG of 256 x 256 px and not {side} x {side}"):
            turbojpeg.decode(stream, (side, side), 1, (0, 0, side, side))
    memory = np.full(3 * 256 * 256 + 64, 7, np.uint8)
    with pytest.raises(ValueError, match="is a JPEG of"):
        turbojpeg.decode(stream, (256, 256), 1, (0, 0, 256, 256), memory[: 3 * 255 * 256])
    assert (memory == 7).all()
    turbojpeg.decode(stream, (256, 256), 1, (100, 100, 256, 256), memory[: 3 * 256 * 256])
    assert (memory[-64:] == 7).all()


def test_a_library_that_decodes_no_parts_is_passed_over(monkeypatch):
    monkeypatch.setattr(turbojpeg, "_places", lambda: iter(["/nowhere/libturbojpeg.so", "libc.so.6"]))
    assert turbojpeg.load() is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert turbojpeg.load() is None


def test_threads_decode_side_by_side(stream):
    """Each with a decoder of its own, which ends with it."""
    whole = decode.decode(stream, HOW)

    def parts(seed: int) -> bool:
        found = ((decode.decode(stream, HOW, 1, box), box) for box in boxes(256, 256, 200, np.random.default_rng(seed)))
        return all(np.array_equal(part, whole[box[1] : box[3], box[0] : box[2]]) for part, box in found)

    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(parts, range(8)))
