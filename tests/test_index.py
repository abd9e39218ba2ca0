"""The index: counted once, resumable, quarantining what it cannot read."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import sys
import tempfile
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from slide_files import cohort_of, tissue_pixels, write_slide

from pathfm import InputError, SlideIndex, TileStream, positions
from pathfm import index as index_module
from pathfm import scan as scan_module
from pathfm.scan import scan_or_reason


@pytest.fixture
def slides(tmp_path):
    """Three good slides: name -> path."""
    names = ("one", "two", "three")
    return {
        name: write_slide(tmp_path / f"{name}.tiff", tissue_pixels(seed=k), 0.5, (1, 4)) for k, name in enumerate(names)
    }


def test_geometry_tissue_and_counts(slides, tmp_path):
    index = SlideIndex.build(cohort_of(slides, centre=["a", "a", "b"]), tmp_path / "index", workers=0)
    row = index.slides.iloc[0]
    assert (row.status, row.width_px, row.height_px, row.mpp, row.levels) == ("ok", 512, 512, 0.5, "1 4")
    assert list(index.slides["centre"]) == ["a", "a", "b"]
    assert row.tissue_mm2 == pytest.approx((0.384 * 0.5) ** 2, rel=0.2)
    mask, um_per_px = index.mask("one")
    assert (mask.shape, um_per_px) == ((32, 32), 8.0)
    assert row["positions@0.25"] == 0  # finer than the slide
    assert row["positions@0.5"] == positions.count(mask, 16, (512, 512), 256.0, 1, 0.4)


def test_the_exact_count_is_that_of_trying_every_position():
    rng = np.random.default_rng(5)
    for side, grid, min_tissue in ((20.0, 1, 0.4), (17.3, 1, 0.5), (24.0, 3, 0.25), (9.6, 1, 1.0), (8.0, 2, 0.0)):
        mask = rng.random((11, 9)) < 0.6
        width, height, cell = 50, 63, 6
        fine = np.kron(mask, np.ones((cell, cell)))[:height, :width]
        admissible = []
        for y in range(0, height, grid):
            for x in range(0, width, grid):
                if max(x + side - width, y + side - height) > 1e-9:
                    continue
                across = np.clip(x + side - np.arange(width), 0, 1) * (np.arange(width) >= x)
                down = np.clip(y + side - np.arange(height), 0, 1) * (np.arange(height) >= y)
                if down @ fine @ across >= min_tissue * side**2 - 1e-6:
                    admissible.append((x, y))
        settings = (mask, cell, (width, height), side, grid, min_tissue)
        assert positions.count(*settings) == len(admissible)
        ranked = [positions.kth(*settings, k) for k in range(len(admissible))]
        assert sorted(ranked) == sorted(admissible)
        packed = positions.pack(mask)
        areas = [positions.covered(packed.ravel(), 0, 1, cell, x, y, side) for x, y in admissible]
        assert min(areas, default=side**2) >= min_tissue * side**2 - 1e-6


def test_packing_is_a_round_trip():
    for width in (1, 63, 64, 65, 200):
        mask = np.random.default_rng(width).random((7, width)) < 0.5
        assert np.array_equal(positions.unpack(positions.pack(mask), width), mask)


def test_processes_make_the_same_index(slides, tmp_path):
    alone = SlideIndex.build(cohort_of(slides), tmp_path / "alone", workers=0, checksums=True)
    together = SlideIndex.build(cohort_of(slides), tmp_path / "together", workers=2, checksums=True)
    assert alone.slides.equals(together.slides)
    assert np.array_equal(alone.words, together.words)
    for name, array in alone.tiles._asdict().items():
        assert np.array_equal(array, getattr(together.tiles, name)), name
    assert len(alone.tiles.checks) == alone.tiles.tiles > 3 * 64


def test_a_killed_build_goes_on_where_it_was(slides, tmp_path, monkeypatch):
    scan, scanned = scan_module.scan, []

    def killed_at_the_third(path, mpp, checksums):
        scanned.append(path)
        if len(scanned) == 3:
            raise KeyboardInterrupt
        return scan(path, mpp, checksums)

    monkeypatch.setattr(scan_module, "scan", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        SlideIndex.build(cohort_of(slides), tmp_path / "index", workers=0)
    with pytest.raises(InputError, match="holds no index"):
        SlideIndex.open(tmp_path / "index")
    SlideIndex.build(cohort_of(slides), tmp_path / "index", workers=0)
    assert len(scanned) == 4  # two before, the third again
    written = (tmp_path / "index" / "masks.npy").stat().st_mtime_ns
    SlideIndex.build(cohort_of(slides), tmp_path / "index", workers=0)
    assert len(scanned) == 4
    assert (tmp_path / "index" / "masks.npy").stat().st_mtime_ns == written  # a reader is not disturbed


def test_a_changed_file_is_indexed_anew(slides, tmp_path):
    cohort = cohort_of(slides)
    before = SlideIndex.build(cohort, tmp_path / "index", workers=0)
    write_slide(slides["two"], tissue_pixels(640, 512), 0.5, (1, 4))
    after = SlideIndex.build(cohort, tmp_path / "index", workers=0)
    assert list(before.slides["width_px"]) == [512, 512, 512]
    assert list(after.slides["width_px"]) == [512, 640, 512]


def test_what_cannot_be_read_is_quarantined_by_name_and_reason(slides, tmp_path):
    good = slides["one"].read_bytes()
    bad = {
        "missing": (tmp_path / "missing.svs", "missing.svs does not exist"),
        "folder": (tmp_path / "folder.svs", "is an empty folder; give the slide file"),
        "empty": (tmp_path / "empty.svs", "is empty (0 bytes)"),
        "truncated": (tmp_path / "truncated.tiff", "fetch"),
        "text": (tmp_path / "text.svs", "is no slide format"),
        "ome": (tmp_path / "image.ome.tif", "its directory cannot be read"),
        "tiny": (tmp_path / "tiny.tiff", "16 x 16 px, too small"),
        "unscaled": (tmp_path / "unscaled.tiff", "no mpp"),
        "blank": (tmp_path / "blank.tiff", "shows no tissue"),
    }
    (tmp_path / "folder.svs").mkdir()
    (tmp_path / "empty.svs").touch()
    (tmp_path / "truncated.tiff").write_bytes(good[: int(len(good) * 0.6)])
    (tmp_path / "text.svs").write_text("slide_id,path\n")
    (tmp_path / "image.ome.tif").write_bytes(b"II*\0" + b"\0" * 64)
    write_slide(tmp_path / "tiny.tiff", tissue_pixels()[:16, :16])
    write_slide(tmp_path / "unscaled.tiff", tissue_pixels(), None)
    write_slide(tmp_path / "blank.tiff", np.full((512, 512, 3), 243, np.uint8))
    cohort = cohort_of({name: path for name, (path, _) in bad.items()} | slides)
    index = SlideIndex.build(cohort, tmp_path / "index", workers=0)
    assert list(index.usable["slide_id"]) == list(slides)
    reasons = index.quarantined.set_index("slide_id")["reason"]
    assert set(reasons.index) == set(bad)
    for name, (path, reason) in bad.items():
        assert reason in reasons[name]
        assert path.name in reasons[name]
        assert str(tmp_path) not in reasons[name]  # notebooks show it
    with pytest.raises(InputError, match="slide 'blank' is quarantined: blank.tiff shows no tissue"):
        index.mask("blank")


def test_a_scale_given_by_the_cohort_is_used(slides, tmp_path):
    path = write_slide(tmp_path / "unscaled.tiff", tissue_pixels(), None)
    cohort = cohort_of({"unscaled": path, "one": slides["one"]}, mpp=[0.25, None])
    index = SlideIndex.build(cohort, tmp_path / "index", workers=0)
    assert list(index.slides["mpp"]) == [0.25, 0.5]


def crashing(path, *rest):
    """What a worker does in the next test: a segmentation fault on one slide."""
    if path.endswith("two.tiff"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return scan_or_reason(path, *rest)


def test_a_slide_that_crashes_its_process_is_quarantined_alone(slides, tmp_path, monkeypatch):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker can import a test
    monkeypatch.setattr(scan_module, "scan_or_reason", crashing)
    index = SlideIndex.build(cohort_of(slides), tmp_path / "index", workers=2)
    assert list(index.usable["slide_id"]) == ["one", "three"]
    assert "two.tiff crashes its reader" in index.quarantined["reason"][0]


def test_a_cohort_whose_paths_are_all_wrong_says_so(tmp_path):
    cohort = cohort_of({"a": tmp_path / "a.svs", "b": tmp_path / "b.svs"})
    with pytest.raises(InputError, match=r"none of the 2 slides.*a\.svs does not exist.*b\.svs does not exist"):
        SlideIndex.build(cohort, tmp_path / "index", workers=0)
    assert not (tmp_path / "index" / "index.json").exists()


def test_a_finished_index_serves_from_a_disk_that_cannot_be_written(slides, tmp_path, monkeypatch):
    SlideIndex.build(cohort_of(slides), tmp_path / "index", workers=0)

    def refuse(path, mode="wb"):
        raise AssertionError(f"wrote {path}")

    monkeypatch.setattr(index_module, "atomic", refuse)
    assert len(SlideIndex.build(cohort_of(slides), tmp_path / "index", workers=0).usable) == 3


def test_a_full_disk_is_an_error_not_a_quarantine(slides, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left while writing"):
        SlideIndex.build(cohort_of(slides), tmp_path / "index", workers=0)
    assert not [path for path in (tmp_path / "index").rglob("*") if path.is_file()]


TEMP = Path(tempfile.gettempdir())


@pytest.fixture
def closed_folder(tmp_path):
    """A function that closes a folder to writing. Root writes anywhere, so the test goes on as nobody."""
    root = os.geteuid() == 0

    def close(folder):
        for above in (folder, *folder.parents):
            if root and above != TEMP and above.is_relative_to(TEMP):
                above.chmod(0o755)
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)

    yield close
    if root:
        os.seteuid(0)
    for path in tmp_path.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)


def test_an_index_in_a_folder_that_cannot_be_written(slides, tmp_path, closed_folder):
    """What is whole is opened and read; what has to be made is refused by name."""
    folder = tmp_path / "index"
    TileStream(SlideIndex.build(cohort_of(slides), folder, workers=0), tile_px=64)[0]  # compiles what nobody may cache
    other = tmp_path / "other"
    other.mkdir()
    write_slide(tmp_path / "new.tiff", tissue_pixels(seed=9), 0.5, (1, 4))
    (folder / "parts").chmod(0o555)
    other.chmod(0o555)
    closed_folder(folder)
    index = SlideIndex.build(cohort_of(slides), folder, workers=0)
    assert TileStream(index, tile_px=64)[0].image.shape == (64, 64, 3)
    with pytest.raises(InputError, match=r"cannot write .*parts.*: Permission denied; choose a folder"):
        SlideIndex.build(cohort_of(slides | {"new": tmp_path / "new.tiff"}), folder, workers=0)
    with pytest.raises(InputError, match=r"cannot write .*index.json: Permission denied; choose a folder"):
        SlideIndex.build(cohort_of({"one": slides["one"]}), folder, workers=0)
    with pytest.raises(InputError, match=r"cannot write .*other.*: Permission denied; choose a folder"):
        SlideIndex.build(cohort_of(slides), other, workers=0)
    assert len(SlideIndex.open(folder).usable) == 3


def test_an_index_of_another_version_is_refused(slides, tmp_path):
    SlideIndex.build(cohort_of(slides), tmp_path / "index", workers=0)
    (tmp_path / "index" / "index.json").write_text('{"version": 0}')
    with pytest.raises(InputError, match="index of version 0, this is .*; build it again"):
        SlideIndex.open(tmp_path / "index")


def test_saved_opened_and_sent_it_is_the_same(index):
    for again in (SlideIndex.open(index.folder), pickle.loads(pickle.dumps(index))):
        assert again.slides.equals(index.slides)
        for slide_id in index.slides["slide_id"]:
            assert np.array_equal(again.mask(slide_id)[0], index.mask(slide_id)[0])
        assert again.slide(slide_id).width_px == index.usable["width_px"].iloc[-1]


def test_subsets_share_the_folder(index):
    fewer = index.subset("mpp == 0.25")
    assert 0 < len(fewer) < len(index)
    name = fewer.slides["slide_id"][0]
    assert np.array_equal(fewer.mask(name)[0], index.mask(name)[0])
    assert TileStream(fewer, tile_px=64).name(0).slide_id in set(fewer.slides["slide_id"])


def test_open_slides_stay_bounded(slides, tmp_path, monkeypatch):
    """Those that OpenSlide reads; the others hold no file."""
    monkeypatch.setattr(index_module, "OPEN_SLIDES", 2)
    index = SlideIndex.build(cohort_of(slides), tmp_path / "index", workers=0)
    light = [index.slide(name) for name in ("one", "two", "three", "one")]
    assert light[0] is light[3] and {slide.reader for slide in light} == {"ranges"}
    index = SlideIndex(index.folder, index.slides.assign(reader="openslide"))
    kept = index_module._Open()
    monkeypatch.setattr(index_module, "_OPEN", kept)
    for name in ("one", "two", "three", "one"):
        index.slide(name).read(0, 0, 8, 0.5)
    assert [path for path, *_ in kept._slides] == [str(slides["three"]), str(slides["one"])]


@pytest.mark.parametrize(("size", "share"), [((40, 30), 0.3), ((64, 64), 0.02), ((700, 65), 0.01), ((130, 900), 0.001)])
def test_a_summary_of_a_mask_bounds_the_tissue_of_any_square(size, share):
    (width, height), cell, rng = size, 8, np.random.default_rng(0)
    mask = rng.random((height, width)) < share
    packed = positions.pack(mask)
    blocks = np.zeros(positions.BLOCKS, np.uint64)
    block = positions.summarise(packed.ravel(), 0, packed.shape[1], width, height, blocks)
    assert block == -(-max(size) // positions.BLOCKS)
    for j, row in enumerate(blocks.tolist()):
        for i in range(positions.BLOCKS):
            part = mask[j * block : (j + 1) * block, i * block : (i + 1) * block]
            assert (row >> i & 1) == part.any(), (i, j)
    tight = 0
    for _ in range(300):
        side = float(rng.uniform(1, cell * min(size)))
        x, y = (int(rng.integers(0, cell * length - side + 1)) for length in size)
        found = positions.covered(packed.ravel(), 0, packed.shape[1], cell, x, y, side)
        bound = positions.at_most(blocks, block * cell, x, y, side)
        assert found <= bound + 1e-6 and bound <= side * side + 1e-6
        tight += bound < side * side / 2
    assert share > 0.1 or tight > 10  # and it does settle something
