"""Reading by byte ranges: the filter against float64, positions, many tiles at once, a file that changed."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from compressed_files import write_jpeg
from slide_files import cohort_of, shrink, tissue_pixels, write_slide
from test_slide import cubic
from torch.utils.data import DataLoader

from pathfm import InputError, Slide, SlideIndex, TileStream, decode, fallback, painting, reading, source, turbojpeg
from pathfm import index as index_module
from pathfm import stream as stream_module
from pathfm.__main__ import main
from pathfm.reading import Job, ReadPlan
from pathfm.tilemap import tiles_of

SIDE = 100


@pytest.fixture(scope="module")
def fine(cohort) -> Slide:
    """A synthetic slide of 0.25 um/px, JPEG 4:2:0, levels 1-4-16."""
    return next(slide for slide in map(Slide.open, cohort.table["path"]) if slide.mpp == 0.25)


def whole_level(slide: Slide, level: int) -> np.ndarray:
    down = slide.level_downsamples[level]
    width, height = (int(n // down) for n in (slide.width_px, slide.height_px))
    return reading.read([Job(slide, ReadPlan(level, down, down * slide.mpp, 1, False), 0, 0, width, height)])[0]


def reference(slide: Slide, plan: ReadPlan, x: float, y: float, side: int) -> np.ndarray:
    """In float64 from the full decode of the level: the mean of scale x scale pixels, then Keys."""
    level = whole_level(slide, plan.level)
    level = shrink(level, plan.scale) if plan.scale > 1 else level.astype(float)
    step = plan.mpp / slide.mpp / plan.downsample
    rows = cubic(level, y / plan.downsample, step, side)
    return np.clip(cubic(rows.swapaxes(0, 1), x / plan.downsample, step, side).swapaxes(0, 1), 0, 255)


def decibels(image: np.ndarray, expected: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(((image - expected) ** 2).mean(), 1e-9))


SERVED = {  # mpp: (level, scale, resampled) for 0.25 um/px and levels 1-4-16
    0.25: (0, 1, False),
    0.3: (0, 1, True),
    0.5: (0, 2, False),
    0.7: (0, 2, True),
    1.0: (1, 1, False),
    1.5: (1, 1, True),
    2.0: (1, 2, False),
}


def assert_agrees(slide: Slide, mpp: float, served: tuple, corners: tuple) -> None:
    """Read as `served` says, on tissue, and within 37 or 40 dB of the reference."""
    plan = slide.plan(mpp)
    assert (plan.level, plan.scale, plan.resampled) == served
    for x, y in corners:
        image = slide.read(x, y, SIDE, mpp)
        assert image.std() > 10
        assert decibels(image, reference(slide, plan, x, y, SIDE)) > (37 if plan.scale > 1 else 40)


@pytest.mark.parametrize("mpp", SERVED)
def test_pixels_agree_with_a_float64_reference(fine, mpp):
    assert_agrees(fine, mpp, SERVED[mpp], ((800, 960), (1200, 880)))


REAL = {  # mpp: (level, scale, resampled) for 0.499 um/px and levels 1-2-4-8
    0.5: (0, 1, False),
    0.7: (0, 1, True),
    1.0: (1, 1, False),
    1.5: (1, 1, True),
    2.0: (2, 1, False),
    8.0: (3, 2, False),
    10.0: (3, 2, True),
}


@pytest.mark.real
@pytest.mark.parametrize("mpp", REAL)
def test_pixels_of_a_real_pyramid_agree_with_a_float64_reference(real_data, mpp):
    corners = ((1200, 1600), (800, 2400)) if mpp < 8 else ((96, 160), (208, 800))
    with Slide.open(real_data / "slides" / "derived_cmu1_region_pyramid.tiff") as slide:
        assert_agrees(slide, mpp, REAL[mpp], corners)


@pytest.mark.parametrize("mpp", SERVED)
def test_a_tile_lies_where_its_name_says(fine, mpp):
    plan = fine.plan(mpp)
    for x, y in ((800, 960), (801, 963)):
        image, expected = fine.read(x, y, SIDE, mpp).astype(float), reference(fine, plan, x, y, SIDE)
        gradients = np.stack([g[4:-4, 4:-4].ravel() for g in np.gradient(expected, axis=(0, 1))])
        shift = np.linalg.lstsq(gradients.T, (expected - image)[4:-4, 4:-4].ravel(), rcond=None)[0]
        assert np.abs(shift).max() < 0.1


def test_always_filters_whole_levels_only(fine):
    for mpp in SERVED:
        plan = fine.plan(mpp, resample="always")
        assert (plan.scale, plan.resampled, plan.mpp) == (1, True, mpp)


def test_a_fraction_of_the_last_pixel_is_white(tmp_path):
    """17 px wide: at half size the ninth pixel is half beyond the edge."""
    pixels = np.full((64, 17, 3), 55, np.uint8)
    slide = Slide.open(write_jpeg(tmp_path / "a.svs", pixels), mpp=0.25)
    row = slide.read(0, 0, 12, 0.5)[5, :, 0].astype(int)
    assert np.abs(row - ([55] * 8 + [155] + [255] * 3)).max() <= 2


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> SlideIndex:
    """JPEG, lossless, and one that OpenSlide reads (RGBA)."""
    folder = tmp_path_factory.mktemp("mixed")
    slides = {
        "jpeg": write_jpeg(folder / "jpeg.svs", tissue_pixels(512, 512, 1), levels=(1, 4)),
        "lossless": write_slide(folder / "lossless.tiff", tissue_pixels(), 0.5, (1, 2)),
        "alpha": write_alpha(folder / "alpha.tiff", tissue_pixels()),
    }
    return SlideIndex.build(cohort_of(slides), folder / "index", workers=0)


def test_the_index_says_how_each_slide_is_read(mixed):
    rows = mixed.slides.set_index("slide_id")
    assert rows["reader"].to_dict() == {"jpeg": "ranges", "lossless": "ranges", "alpha": "openslide"}
    assert rows["fallback"]["alpha"] == "its pixels are not 8-bit RGB"
    assert rows["codec"].to_dict() == {"jpeg": "jpeg YCbCr 4:2:0 JFIF", "lossless": "uncompressed", "alpha": ""}
    assert rows["scales"].to_dict() == {"jpeg": "1 2 4 8", "lossless": "1", "alpha": "1"}
    for row in rows.itertuples():
        stat = os.stat(row.path)
        assert (row.bytes, row.tag) == (stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}")
    packed = mixed.tiles.codes.nbytes + mixed.tiles.anchors.nbytes
    assert packed <= 5 * mixed.tiles.tiles


def test_any_number_of_threads_gives_the_same_tiles(mixed):
    settings = {"tile_px": 64, "mpp": (0.5, 0.7, 1.0), "seed": 3}
    one, three = (TileStream(mixed, threads=threads, **settings) for threads in (1, 3))
    for a, b in zip(one.__getitems__(range(24)), three.__getitems__(range(24)), strict=True):
        assert a[1:] == b[1:]
        assert np.array_equal(a.image, b.image)
    with pytest.raises(InputError, match="threads=0"):
        TileStream(mixed, threads=0)


def test_threads_decode_the_next_batch_of_an_even_walk_and_give_the_same_tiles(mixed, monkeypatch):
    """From the third batch on what comes next is decoded before it is asked for; one thread does nothing early."""
    began, begin = [], stream_module.begin
    monkeypatch.setattr(stream_module, "begin", lambda jobs, threads: began.append(begin(jobs, threads)) or began[-1])
    settings = {"tile_px": 64, "mpp": (0.5, 0.7, 1.0), "seed": 3}
    one, two = (TileStream(mixed, threads=threads, **settings) for threads in (1, 2))
    plain = [one.__getitems__(range(8 * k, 8 * k + 8)) for k in range(6)]
    assert len(began) == 6 and all(each.images is None for each in began)
    began.clear()
    for k, tiles in enumerate(plain):
        found = two.__getitems__(range(8 * k, 8 * k + 8))
        assert all(np.array_equal(a.image, b.image) and a[1:] == b[1:] for a, b in zip(tiles, found, strict=True))
        assert len(began) == k + 1 + (k >= 2)  # one batch ahead, and no more
    waiting = began[-1]
    assert waiting.bytes == waiting.batch.bytes + 8 * 64 * 64 * 3
    assert [run.result() for run in waiting.images]  # it is decoded though nobody has asked


def test_an_interrupted_walk_goes_on_with_the_same_tiles(mixed, monkeypatch):
    """Ctrl-C may come while the caller is at the share of a batch that nobody has asked for yet."""
    settings = {"tile_px": 64, "mpp": (0.5, 0.7, 1.0), "seed": 3}
    one, two = (TileStream(mixed, threads=threads, **settings) for threads in (1, 2))
    for k in range(3):
        two.__getitems__(range(8 * k, 8 * k + 8))
    began, begin, paint, busy = [], reading.begin, reading.painted, threading.Event()
    monkeypatch.setattr(stream_module, "begin", lambda *given: began.append(begin(*given)) or began[-1])

    def interrupted(batch, *given):
        if threading.current_thread() is not threading.main_thread():
            assert busy.wait(60)
        elif began and batch is began[-1].batch:
            busy.set()
            raise KeyboardInterrupt
        return paint(batch, *given)

    monkeypatch.setattr(reading, "painted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for k in range(3, 9):
            two.__getitems__(range(8 * k, 8 * k + 8))
    monkeypatch.undo()
    for again in (k + 1, k + 2, k):
        numbers = range(8 * again, 8 * again + 8)
        found, plain = two.__getitems__(numbers), one.__getitems__(numbers)
        assert all(np.array_equal(a.image, b.image) and a[1:] == b[1:] for a, b in zip(found, plain, strict=True))


def test_tiles_are_decoded_to_where_the_caches_keep_them(mixed, monkeypatch):
    """libjpeg-turbo writes past the caches to multiples of 32 bytes."""
    found, paint = [], painting.paint
    monkeypatch.setattr(painting, "paint", lambda *given: found.append(given[6]) or paint(*given))
    monkeypatch.setattr(reading, "SCRATCH", type(reading.SCRATCH)())
    slide = mixed.slide("jpeg")
    for side in (64, 100, 200):
        slide.read(8, 8, side, 0.5)
    assert len(found) == 3 and all(tile.ctypes.data % 32 == 1 and tile.size >= 3 * 240 * 240 for tile in found)


@pytest.mark.parametrize("whole", [False, True], ids=["in parts", "whole"])
def test_each_compressed_tile_of_a_batch_is_decoded_once(mixed, monkeypatch, whole):
    decoded, paint, alone = [], painting.paint, reading.decode

    def seen(calls, pieces, data, ready, images, *room):
        for one in images:
            mine = slice(one["first"], one["last"])
            decoded.extend(pieces["tile"][mine][ready["pixels"][mine] == 0])
        return paint(calls, pieces, data, ready, images, *room)

    monkeypatch.setattr(painting, "paint", seen)
    if whole:
        monkeypatch.setattr(turbojpeg, "LIBRARY", None)
        monkeypatch.setattr(reading, "decode", lambda data, *how: decoded.append(bytes(data)) or alone(data, *how))
    slide = mixed.slide("jpeg")
    jobs = [Job(slide, slide.plan(0.5), 12 * k, 12 * k, 100, 100) for k in range(20)]
    images = reading.read(jobs)
    assert len(decoded) == len(set(decoded)) == 4
    for job, image in zip(jobs, images, strict=True):
        assert np.array_equal(image, slide.read(job.x, job.y, 100, 0.5))


def test_memory_that_is_used_again_never_changes_an_image_that_is_kept(mixed):
    slide = mixed.slide("jpeg")
    kept = [slide.read(8 * k, 8, 64, 0.5) for k in range(5)]
    copies = [image.copy() for image in kept]
    for k in range(40):
        slide.read(400 - 8 * k, 100, 64, 0.5)
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_open_files_stay_bounded_whatever_the_number_of_slides(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "OPEN_FILES", 3)
    monkeypatch.setattr(index_module, "OPEN_SLIDES", 2)
    links = {}
    for k in range(24):
        original = Path(mixed.slides["path"][k % 3])
        links[f"s{k}"] = tmp_path / f"s{k}{original.suffix}"
        os.link(original, links[f"s{k}"])
    stream = TileStream(SlideIndex.build(cohort_of(links), tmp_path / "index", workers=0), tile_px=64, threads=2)
    before, most = len(os.listdir("/dev/fd")), 0
    for start in range(0, 96, 8):
        assert len({tile.slide_id for tile in stream.__getitems__(range(start, start + 8))}) == 8
        most = max(most, len(os.listdir("/dev/fd")))
    assert most <= before + 3 + 2 * (2 + 4)  # OpenSlide opens a slide for each thread: kept, and of two batches


def test_a_slide_takes_its_own_part_of_the_map_along(mixed):
    slide = mixed.slide("lossless")
    sent = pickle.loads(pickle.dumps(slide))
    assert len(sent.tiles.levels) == 2
    assert np.array_equal(sent.read(70, 90, 64, 0.7), slide.read(70, 90, 64, 0.7))


def write_alpha(path: Path, pixels: np.ndarray) -> Path:
    """RGBA, which OpenSlide reads."""
    alpha = np.full(pixels.shape[:2], 255, np.uint8)
    return write_slide(path, np.dstack([pixels, alpha]), 0.5, extrasamples=["unassalpha"])


WRITERS = {"ranges": write_jpeg, "openslide": write_alpha}


def copied(tmp_path, reader="ranges", side=512, **settings):
    path = WRITERS[reader](tmp_path / "a.svs", tissue_pixels(side, side, 1))
    index = SlideIndex.build(cohort_of({"a": path}), tmp_path / "index", workers=0, **settings)
    assert list(index.slides["reader"]) == [reader]
    return path, TileStream(index, tile_px=64)


CHANGED = r"a\.svs has changed since it was opened or indexed; index it again"


@pytest.mark.parametrize("reader", WRITERS)
def test_a_file_that_changed_since_it_was_indexed_is_named(tmp_path, reader):
    path, stream = copied(tmp_path, reader)
    before = os.stat(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000))
    with pytest.raises(InputError, match=CHANGED):
        stream[0]
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stream[0].image.shape == (64, 64, 3)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000))  # while it is open
    with pytest.raises(InputError, match=CHANGED):
        stream[0]


def test_another_slide_in_its_place_is_named_where_openslide_reads(tmp_path):
    """As large, and the first one was read before: neither its open file nor a tile kept of it is returned."""
    path, stream = copied(tmp_path, "openslide")
    indexed, opened = stream[0].image, Slide.open(path)
    assert opened.read(0, 0, 512, 0.5).std() > 10
    write_alpha(tmp_path / "b.svs", tissue_pixels(512, 512, 2))
    os.replace(tmp_path / "b.svs", path)
    for read in (lambda: stream[0], lambda: opened.read(0, 0, 64, 0.5)):
        with pytest.raises(InputError, match=CHANGED):
            read()
    again = TileStream(SlideIndex.build(cohort_of({"a": path}), tmp_path / "index", workers=0), tile_px=64)
    assert not np.array_equal(again[0].image, indexed)
    path.write_bytes(b"no slide any more")
    with pytest.raises(InputError, match=CHANGED):
        again[0]


@pytest.mark.parametrize(("where", "name"), [(fallback, "_opened"), (fallback.openslide.OpenSlide, "read_region")])
def test_a_file_that_changes_just_then_is_named(tmp_path, monkeypatch, where, name):
    """While OpenSlide opens it, and while it reads."""
    path, real = write_alpha(tmp_path / "a.svs", tissue_pixels()), getattr(where, name)

    def touched(*how):
        os.utime(path, ns=(0, 1))
        return real(*how)

    with monkeypatch.context() as patch, pytest.raises(InputError, match=CHANGED):
        patch.setattr(where, name, touched)
        Slide.open(path).read(0, 0, 64, 0.5)
    assert Slide.open(path).read(0, 0, 64, 0.5).shape == (64, 64, 3)


def flips(tiles, number: int) -> list[tuple[int, int, int, int]]:
    """(level, tile, place in the file, what to change there) of random bytes, all of compressed tiles alike."""
    rng, places = np.random.default_rng(0), []
    for level, facts in enumerate(tiles.levels):
        for tile, (start, length) in enumerate(zip(*tiles.find(level, range(tiles_of(facts))), strict=True)):
            places.append((level, tile, int(start), int(length)))
    assert len(places) == tiles.tiles
    ends = np.cumsum([length for *_, length in places])
    found = []
    for at in rng.integers(ends[-1], size=number):
        level, tile, start, length = places[k := int(np.searchsorted(ends, at, side="right"))]
        found.append((level, tile, start + int(at - ends[k]) + length, int(rng.integers(1, 256))))
    return found


def test_with_a_crc_any_flipped_byte_is_named(tmp_path):
    """Random bytes of all compressed tiles, each tile read by one pixel of it; without a CRC many pass."""
    pixels, side, passed = tissue_pixels(300, 260, 1), 64, 0
    path = write_jpeg(tmp_path / "a.svs", pixels, side=side, levels=(1, 2))
    cohort = cohort_of({"a": path})
    checked, bare = (
        SlideIndex.build(cohort, tmp_path / str(with_crc), workers=0, checksums=with_crc) for with_crc in (True, False)
    )
    assert checked.tiles.checks.dtype == np.uint32
    assert (len(checked.tiles.checks), len(bare.tiles.checks)) == (checked.tiles.tiles, 0)
    stat, slides = os.stat(path), [index._slide(index._row("a")) for index in (checked, bare)]
    for level, tile, at, change in flips(checked.tiles, 200):
        down = slides[0].level_downsamples[level]
        row, column = divmod(tile, -(-int(300 // down) // side))
        plan = ReadPlan(level, down, 0.5 * down, 1, False)
        jobs = [Job(slide, plan, column * side * down, row * side * down, 1, 1) for slide in slides]
        with flipped(path, at, change, stat):
            with pytest.raises(
                InputError, match=rf"a\.svs is damaged: compressed tile {tile} of level {level} .*CRC-32"
            ):
                reading.read(jobs[:1])
            with contextlib.suppress(InputError):
                passed += len(reading.read(jobs[1:]))
        assert reading.read(jobs[:1])[0].shape == (1, 1, 3)
    assert passed > 20


@contextlib.contextmanager
def flipped(path: Path, at: int, change: int, stat: os.stat_result):
    """A file with another byte at one place, for a while, and its old time."""
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        for value in (byte ^ change, byte):
            os.pwrite(file.fileno(), bytes([value]), at)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            if value != byte:
                yield


def test_an_index_with_checksums_keeps_them(tmp_path, capsys):
    """Switched on from the shell; what builds the same index afterwards says nothing of them."""
    path = write_jpeg(tmp_path / "a.svs", tissue_pixels(512, 512, 1))
    csv, folder = cohort_of({"a": path}).write(tmp_path / "cohort.csv"), tmp_path / "index"
    stored = []
    for more in ([], ["--checksums", "true"], [], ["--checksums", "false"]):
        assert main(["index", str(csv), "--folder", str(folder), *more]) == 0
        stored.append(len(SlideIndex.open(folder).tiles.checks))
    assert stored == [0, 4, 4, 0]
    capsys.readouterr()


def test_damage_that_is_met_ahead_is_named_when_its_batch_is_asked_for(tmp_path):
    path, stream = copied(tmp_path, side=2048)
    stream = TileStream(stream.index, tile_px=64, mpp=0.5, threads=2)
    stat, data = os.stat(path), bytearray(path.read_bytes())
    pieces = reading.planned(jobs_of(stream, range(6, 8))).pieces
    before = reading.planned(jobs_of(stream, range(6))).pieces
    spoilt = next(piece for piece in pieces if piece["start"] not in before["start"])
    data[spoilt["start"] + 300 : spoilt["start"] + spoilt["length"]] = bytes(int(spoilt["length"]) - 300)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for k in range(3):
        assert len(stream.__getitems__(range(2 * k, 2 * k + 2))) == 2  # the next batch is under way with the third
    with pytest.raises(InputError, match=rf"compressed tile {spoilt['tile']} of level {spoilt['level']}"):
        stream.__getitems__(range(6, 8))


def jobs_of(stream: TileStream, numbers) -> list[Job]:
    return [stream._job(stream.name(i)) for i in numbers]


def test_a_forked_worker_decodes_what_its_parent_had_begun(mixed):
    """The parent's threads, and what they were at, are not there."""
    settings = {"tile_px": 64, "mpp": (0.5, 0.7, 1.0), "seed": 3}
    stream, plain = TileStream(mixed, threads=2, **settings), TileStream(mixed, **settings)
    for k in range(3):
        stream.__getitems__(range(8 * k, 8 * k + 8))  # and begins the next
    loader = DataLoader(
        stream, 8, sampler=range(24, 48), collate_fn=list, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    found = [tile.image for batch in loader for tile in batch]
    assert all(np.array_equal(a, b.image) for a, b in zip(found, plain.__getitems__(range(24, 48)), strict=True))


def test_a_damaged_tile_is_named_with_its_place(tmp_path):
    path, stream = copied(tmp_path)
    stat, data = os.stat(path), bytearray(path.read_bytes())
    start, length = (int(found[0]) for found in stream.index.tiles.find(0, [3]))
    data[start + 300 : start + length] = bytes(length - 300)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    slide = stream.index._slide(stream.index._row("a"))
    with pytest.raises(
        InputError, match=rf"compressed tile 3 of level 0 \(bytes {start} to {start + length}\) is no whole"
    ):
        slide.read(400, 400, 64, 0.5)
    assert slide.read(0, 0, 64, 0.5).shape == (64, 64, 3)
    assert slide.scales == decode.SCALES
