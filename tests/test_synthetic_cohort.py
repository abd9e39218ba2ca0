"""The synthetic slides are what their truth says, the same every time, and whole or absent."""

from __future__ import annotations

import errno
import hashlib
import resource
from dataclasses import replace

import numpy as np
import openslide
import pandas as pd
import pytest
import tifffile
from PIL import Image
from slide_files import small_spec

from pathfm.cohort import check_roles
from pathfm.errors import InputError
from pathfm.slide import Slide
from pathfm.storage import read_json
from pathfm.synthetic import (
    CLASSES,
    Knobs,
    Truth,
    cohorts,
    contact_sheet,
    labelled_tiles,
    make_cohort,
    morphometry,
    render,
    slides,
    tiny_cohort,
)
from pathfm.synthetic.artefacts import KINDS
from pathfm.synthetic.morphometry import optical_density


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """One small slide with every artefact."""
    return tiny_cohort(tmp_path_factory.mktemp("spoilt"), n=1, side_um=800, artefacts=KINDS)


def digest(folder) -> dict[str, str]:
    files = [f for f in folder.iterdir() if f.suffix in (".svs", ".npz")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def thumbnail(path, um_per_px=8.0):
    with Slide.open(path) as slide:
        return slide.thumbnail(um_per_px)


# Slides


def test_same_seed_same_bytes(tmp_path):
    for name in ("a", "b"):
        tiny_cohort(tmp_path / name, n=2, side_um=300)
    tiny_cohort(tmp_path / "c", n=2, side_um=300, seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert not set(digest(tmp_path / "a").values()) & set(digest(tmp_path / "c").values())


def test_openslide_opens_them_as_aperio(cohort):
    for row in cohort:
        slide = openslide.OpenSlide(row.path)
        levels = tuple(int(level) for level in slides.read_spec(row.path).pyramid.split("-"))
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == row.mpp
        assert float(slide.properties["openslide.objective-power"]) == 10 / row.mpp
        assert slide.level_downsamples == levels
        assert all(tifffile.TiffFile(row.path).pages[k].is_tiled for k in range(len(levels)))


def test_levels_are_area_averages_of_level_0(cohort):
    slide = openslide.OpenSlide(cohort.table.path[0])
    top = np.asarray(slide.read_region((0, 0), 0, slide.level_dimensions[0]).convert("RGB"), float)
    coarse = np.asarray(slide.read_region((0, 0), 1, slide.level_dimensions[1]).convert("RGB"), float)
    f = round(slide.level_downsamples[1])
    mean = top.reshape(top.shape[0] // f, f, top.shape[1] // f, f, 3).mean((1, 3))
    assert np.abs(mean - coarse).mean() < 5  # twice JPEG; every fourth pixel instead would differ by 15


def test_the_same_tissue_at_both_resolutions():
    """0.25 and 0.5 mpp are two samplings of one scene, not two scenes."""
    coarse = render(small_spec())
    fine = render(small_spec(), mpp=0.25)
    shrunk = fine.reshape(512, 2, 640, 2, 3).mean((1, 3))
    correlation = np.corrcoef(shrunk.ravel(), coarse.ravel())[0, 1]
    assert correlation > 0.9


def test_windows_meet_without_a_seam():
    drawing = slides.Drawing(small_spec())
    drawing.scanner["noise"] = 0.0
    whole = drawing.window(0, 0, 512, 256).astype(int)
    parts = np.hstack([drawing.window(0, 0, 256, 256), drawing.window(256, 0, 256, 256)]).astype(int)
    assert np.abs(whole - parts).max() <= 2


def test_memory_and_strips(tmp_path):
    """A slide is drawn in bands: what it takes does not grow with its height by more than its coarser levels."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slides.make_slide(small_spec(width_px=2048, height_px=4096), tmp_path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 600


# Truth


def test_glass_is_white_and_tissue_is_not(cohort):
    for path in cohort.table.path:
        truth, image = Truth.open(path), thumbnail(path)
        glass = truth._at(truth.class_map == 0, 8.0)
        assert np.median(image[glass]) > 225
        stained = truth.class_mask("muscle", 8.0) | truth.class_mask("stroma", 8.0)
        assert np.median(image[stained].min(-1)) < 210


def test_masks_are_as_large_as_the_thumbnail_and_areas_agree(cohort):
    for path in cohort.table.path:
        truth = Truth.open(path)
        mask = truth.tissue_mask(8.0)
        assert mask.shape == thumbnail(path).shape[:2]
        assert mask.mean() == pytest.approx((truth.class_map > 0).mean(), abs=0.02)


def test_class_fraction_sums_to_one_and_names_the_class(cohort):
    truth = Truth.open(cohort.table.path[1])
    rows, cols = np.nonzero(truth.class_mask("stroma", 2.0))
    middle = len(rows) // 2
    at = (cols[middle] * 2 / truth.mpp, rows[middle] * 2 / truth.mpp)
    assert truth.class_fraction(*at, side_um=100).sum() == pytest.approx(1)
    assert truth.class_fraction(*at, side_um=2)["stroma"] == pytest.approx(1)


def test_nuclei_lie_in_their_class_and_are_dark(cohort):
    truth = Truth.open(cohort.table.path[1])
    assert set(truth.nuclei["class"]) <= set(CLASSES)
    assert truth.nuclei.query("kind != 'dust'")["diameter_um"].between(1, 30).mean() > 0.99
    cells = truth.nuclei[["y_um", "x_um"]].to_numpy() / truth.map_um
    y, x = np.clip(cells.astype(int), 0, np.array(truth.class_map.shape) - 1).T
    named = np.array(("glass", *CLASSES))[truth.class_map[y, x]]
    assert (named == truth.nuclei["class"]).mean() > 0.9


def test_every_artefact_has_its_mask_and_spoils_its_pixels(spoilt):
    path = spoilt.table.path[0]
    truth = Truth.open(path)
    for kind in KINDS:
        assert truth.artefact_mask(kind, 8.0).any(), kind
    clean = render(replace(slides.read_spec(path), artefacts=()), mpp=0.5)
    dirty = render(path, mpp=0.5)
    changed = np.abs(clean.astype(int) - dirty).max(-1) > 40
    for kind in ("pen", "fold"):
        mask = np.kron(truth.artefact_mask(kind, 2.0), np.ones((4, 4), bool))[: len(changed), : changed.shape[1]]
        assert changed[mask].mean() > 2 * changed[~mask].mean(), kind
    assert not (truth.tissue_mask(2.0) & truth.artefact_mask(None, 2.0)).any()


def test_truth_of_a_real_slide_is_refused(tmp_path):
    with pytest.raises(InputError, match="no truth"):
        Truth.open(tmp_path / "real.svs")


def test_unknown_class_and_artefact_offer_the_nearest(cohort):
    truth = Truth.open(cohort.table.path[0])
    with pytest.raises(InputError, match="Did you mean 'tumour'"):
        truth.class_mask("tumor", 8.0)
    with pytest.raises(InputError, match="Did you mean 'bubble'"):
        truth.artefact_mask("buble", 8.0)


# Whole or absent, resumed, cached


def test_a_finished_cohort_is_not_drawn_again(cohort, monkeypatch):
    folder = slides.Path(cohort.table.path[0]).parent
    monkeypatch.setattr(cohorts, "make_slide", lambda *_: pytest.fail("drawn again"))
    assert len(tiny_cohort(folder, n=4)) == 4


def test_an_interrupted_cohort_goes_on_where_it_was(tmp_path, monkeypatch):
    drawn, real = [], slides.make_slide

    def stop_at_third(spec, folder):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(spec.slide_id)
        return real(spec, folder)

    monkeypatch.setattr(cohorts, "make_slide", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        tiny_cohort(tmp_path, n=4, side_um=300)
    assert not (tmp_path / "cohort.csv").exists()
    again = []
    monkeypatch.setattr(cohorts, "make_slide", lambda spec, folder: again.append(spec.slide_id) or real(spec, folder))
    assert len(tiny_cohort(tmp_path, n=4, side_um=300)) == 4
    assert again == ["tiny-002", "tiny-003"]


@pytest.mark.parametrize("damage", ["svs", "truth.npz", "latents.json"])
def test_a_half_written_slide_never_counts_as_made(tmp_path, damage):
    spec = small_spec()
    slides.make_slide(spec, tmp_path)
    assert slides.is_made(spec, tmp_path)
    file = tmp_path / f"one.{damage}"
    file.write_bytes(file.read_bytes()[:-100])
    assert not slides.is_made(spec, tmp_path)


def test_a_slide_of_other_settings_does_not_count(tmp_path):
    slides.make_slide(small_spec(), tmp_path)
    assert not slides.is_made(small_spec(height_px=640), tmp_path)


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slides.tifffile.TiffWriter, "write", full)
    with pytest.raises(InputError, match="no space left"):
        tiny_cohort(tmp_path, n=1, side_um=200)
    assert [f.name for f in tmp_path.iterdir()] == [".lock"]


def test_slides_of_another_generator_are_never_mixed_in(tmp_path, monkeypatch):
    tiny_cohort(tmp_path, n=1, side_um=200)
    monkeypatch.setattr("pathfm.synthetic.generator_hash", lambda: "0123456789")
    with pytest.raises(InputError, match="generator"):
        tiny_cohort(tmp_path, n=2, side_um=200)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="choose a folder"):
        tiny_cohort(tmp_path / "file", n=1)


def test_what_a_killed_process_left_is_swept_up(tmp_path):
    (tmp_path / ".cohort-000.12345678.partial.svs").write_bytes(b"half")
    tiny_cohort(tmp_path, n=1, side_um=200)
    assert not list(tmp_path.glob("*.partial*"))


def test_a_worker_that_dies_or_fails_says_so(tmp_path):
    worker = cohorts._Worker(tmp_path)
    with pytest.raises(RuntimeError, match="one\\n"):
        worker.draw(small_spec(pyramid="1-3"))
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(InputError, match="fewer workers"):
        worker.draw(small_spec())
    worker.stop()


def test_workers_draw_the_same_slides(tmp_path):
    tiny_cohort(tmp_path / "one", n=2, side_um=200)
    todo = [slides.SlideSpec.from_json(read_json(f)["spec"]) for f in sorted((tmp_path / "one").glob("*.json"))]
    cohorts.make_slides(todo, tmp_path / "two", "tiny", workers=2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


# The design of the embedded cohort


@pytest.fixture(scope="module")
def embedded_table():
    specs = cohorts.specs("embedded")
    names = ("pyramid", "width_um", "height_um", "absent")
    return cohorts.table(specs).join(pd.DataFrame([{n: getattr(s, n) for n in names} for s in specs]))


def test_the_embedded_cohort_is_as_designed(embedded_table):
    table = embedded_table
    assert len(table) == 24 and table.patient_id.nunique() == 16 and table.centre.nunique() == 4
    assert (table.groupby("patient_id").size() == 2).sum() == 8
    assert (table.mpp == 0.25).sum() == 8
    assert table[["width_um", "height_um"]].stack().between(1990, 3010).all()
    assert set(table.role) == {"pretrain", "probe-train", "validate", "test"}
    check_roles(table)


def test_resolution_and_pyramid_are_crossed_with_centre_role_and_absent_classes(embedded_table):
    table = embedded_table
    assert (table.groupby("centre").mpp.apply(lambda m: (m == 0.25).sum()) == 2).all()
    assert (table.groupby("role").mpp.apply(lambda m: (m == 0.25).sum()) == 2).all()
    assert (pd.crosstab(table.pyramid, table.mpp).to_numpy() == [[4, 8], [4, 8]]).all()
    for name in CLASSES:
        shows = ~table.absent.apply(lambda absent, name=name: name in absent)
        assert (table[shows].groupby(["centre", "role"]).size() >= 2).all(), name
        assert table[shows].groupby(["mpp", "role"]).size().min() >= 1, name


@pytest.mark.parametrize("name, slides_, patients", [("study", 180, 144), ("bags", 300, 300)])
def test_larger_cohorts_are_rows_of_the_same_table(name, slides_, patients):
    table = cohorts.table(cohorts.specs(name))
    assert len(table) == slides_ and table.patient_id.nunique() == patients
    check_roles(table)


def test_unknown_names_offer_the_nearest(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'embedded'"):
        make_cohort("embeded", tmp_path)
    with pytest.raises(InputError, match="Did you mean 'centre'"):
        Knobs.of(center="off")
    with pytest.raises(InputError, match="Did you mean 'strong'"):
        Knobs(centre="stronk")
    with pytest.raises(InputError, match="centre=7"):
        render(small_spec(), centre=7)


# Looks


def test_morphometry_names_every_class_and_stays_near_published_ranges(cohort):
    table = morphometry(cohort)
    assert set(table["class"]) == set(CLASSES)
    assert table["inside"].dropna().mean() > 0.7
    assert table.query("quantity == 'H density'").set_index("class").measured.idxmax() in ("lymphocytes", "tumour")


def test_contact_sheet_has_every_class_at_every_mpp_and_real_tiles_beside(cohort, tmp_path):
    (tmp_path / "TUM").mkdir()
    Image.new("RGB", (32, 32), (180, 90, 160)).save(tmp_path / "TUM" / "one.png")
    titles, rows = contact_sheet(cohort, tmp_path, tile_px=32)
    assert titles == ["0.25 um/px", "0.5 um/px", "1 um/px", "2 um/px", "real"]
    assert list(rows) == list(CLASSES)
    assert all(image.shape == (32, 32, 3) for images in rows.values() for image in images[:4])
    assert rows["tumour"][4].shape == (32, 32, 3) and rows["muscle"][4] is None
    with pytest.raises(InputError, match="no folder named like"):
        contact_sheet(cohort, tmp_path / "TUM")


def test_optical_density_of_pure_dyes():
    white = np.full((4, 4, 3), 243, np.uint8)
    assert optical_density(white) == pytest.approx((0, 0), abs=1e-3)
    blue = np.round(243 * 10 ** -(0.5 * np.array([0.65, 0.70, 0.29]))).astype(np.uint8)
    h, e = optical_density(np.broadcast_to(blue, (4, 4, 3)))
    assert h == pytest.approx(0.5 * np.linalg.norm([0.65, 0.70, 0.29]), abs=0.02) and e < 0.02


# Labelled tiles


def test_labelled_tiles_are_pure_and_no_patient_has_two_roles(cohort, tmp_path):
    folder = labelled_tiles(cohort, tmp_path / "tiles", tile_px=128, per_class=3)
    manifest = pd.read_csv(folder / "manifest.csv")
    assert set(manifest.label) == set(CLASSES)
    assert (manifest.groupby("patient_id").role.nunique() == 1).all()
    assert (manifest.groupby(["label", "slide_id"]).size() <= 3).all()
    paths = dict(zip(cohort.table.slide_id, cohort.table.path, strict=True))
    for row in manifest.sample(20, random_state=0).itertuples():
        truth = Truth.open(paths[row.slide_id])
        assert truth.class_fraction(row.x, row.y, side_um=128 * 0.5)[row.label] >= 0.75 - 1e-6
        assert (folder / row.file).is_file()


def test_labelled_tiles_are_made_once_and_alike(cohort, tmp_path):
    first = labelled_tiles(cohort, tmp_path / "a", tile_px=64, per_class=1)
    second = labelled_tiles(cohort, tmp_path / "b", tile_px=64, per_class=1)
    assert (first / "manifest.csv").read_bytes() == (second / "manifest.csv").read_bytes()
    changed = (first / "manifest.csv").stat().st_mtime_ns
    labelled_tiles(cohort, first, tile_px=64, per_class=1)
    assert (first / "manifest.csv").stat().st_mtime_ns == changed


def test_tiles_larger_than_any_region_are_refused(cohort, tmp_path):
    with pytest.raises(InputError, match="ask for smaller tiles"):
        labelled_tiles(cohort, tmp_path, tile_px=1024)
