"""The synthetic slides are what their truth says, the same every time, and whole or absent."""

from __future__ import annotations

import errno
import hashlib
import resource
from dataclasses import asdict, replace

import numpy as np
import openslide
import pandas as pd
import pytest
import tifffile
from PIL import Image

from pathfm.cohort import check_roles
from pathfm.errors import InputError
from pathfm.slide import Slide
from pathfm.storage import read_json
from pathfm.synthetic import (
    CLASSES,
    Knobs,
    Truth,
    appearance,
    cohorts,
    contact_sheet,
    labelled_tiles,
    layout,
    make_cohort,
    morphometry,
    oracles,
    render,
    slides,
    tiny_cohort,
)
from pathfm.synthetic.appearance import Origin
from pathfm.synthetic.artefacts import KINDS
from pathfm.synthetic.morphometry import optical_density


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Four small slides: 0.5 and 0.25 mpp in turn, two patients, two centres."""
    return tiny_cohort(tmp_path_factory.mktemp("tiny"), n=4)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """One small slide with every artefact."""
    return tiny_cohort(tmp_path_factory.mktemp("spoilt"), n=1, side_um=800, artefacts=KINDS)


def digest(folder) -> dict[str, str]:
    files = [f for f in folder.iterdir() if f.suffix in (".svs", ".npz")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def small_spec(**changes) -> slides.SlideSpec:
    fields = {"mpp": 0.5, "width_px": 640, "height_px": 512}
    return slides.SlideSpec("one", Origin(0, 0, 2, 0, 0), **{**fields, **changes})


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


def test_openslide_opens_them_as_aperio(tiny):
    for row in tiny:
        slide = openslide.OpenSlide(row.path)
        levels = tuple(int(level) for level in slides.read_spec(row.path).pyramid.split("-"))
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == row.mpp
        assert float(slide.properties["openslide.objective-power"]) == 10 / row.mpp
        assert slide.level_downsamples == levels
        assert all(tifffile.TiffFile(row.path).pages[k].is_tiled for k in range(len(levels)))


def test_levels_are_area_averages_of_level_0(tiny):
    slide = openslide.OpenSlide(tiny.table.path[0])
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


def test_glass_is_white_and_tissue_is_not(tiny):
    for path in tiny.table.path:
        truth, image = Truth.open(path), thumbnail(path)
        glass = truth._at(truth.class_map == 0, 8.0)
        assert np.median(image[glass]) > 225
        stained = truth.class_mask("muscle", 8.0) | truth.class_mask("stroma", 8.0)
        assert np.median(image[stained].min(-1)) < 210


def test_masks_are_as_large_as_the_thumbnail_and_areas_agree(tiny):
    for path in tiny.table.path:
        truth = Truth.open(path)
        mask = truth.tissue_mask(8.0)
        assert mask.shape == thumbnail(path).shape[:2]
        assert mask.mean() == pytest.approx((truth.class_map > 0).mean(), abs=0.02)


def test_class_fraction_sums_to_one_and_names_the_class(tiny):
    truth = Truth.open(tiny.table.path[1])
    rows, cols = np.nonzero(truth.class_mask("stroma", 2.0))
    middle = len(rows) // 2
    at = (cols[middle] * 2 / truth.mpp, rows[middle] * 2 / truth.mpp)
    assert truth.class_fraction(*at, side_um=100).sum() == pytest.approx(1)
    assert truth.class_fraction(*at, side_um=2)["stroma"] == pytest.approx(1)


def test_nuclei_lie_in_their_class_and_are_dark(tiny):
    truth = Truth.open(tiny.table.path[1])
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


def test_unknown_class_and_artefact_offer_the_nearest(tiny):
    truth = Truth.open(tiny.table.path[0])
    with pytest.raises(InputError, match="Did you mean 'tumour'"):
        truth.class_mask("tumor", 8.0)
    with pytest.raises(InputError, match="Did you mean 'bubble'"):
        truth.artefact_mask("buble", 8.0)


# Whole or absent, resumed, cached


def test_a_finished_cohort_is_not_drawn_again(tiny, monkeypatch):
    folder = slides.Path(tiny.table.path[0]).parent
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
    (tmp_path / ".tiny-000.12345678.partial.svs").write_bytes(b"half")
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


# Layout


def test_class_areas_follow_the_wanted_shares():
    for kind in layout.KINDS:
        classes = layout.class_map(layout.Plot(2200, 2000, kind=kind), np.random.default_rng(3))
        tissue = np.bincount(classes.ravel(), minlength=9)
        assert classes.shape == (1000, 1100)
        assert 0.35 < 1 - tissue[0] / classes.size < 0.8
        shares = dict(zip(CLASSES, tissue[1:] / tissue[1:].sum(), strict=True))
        for name, wanted in layout.TYPICAL.items():
            assert shares[name] == pytest.approx(wanted, abs=0.05), (kind, name)


def test_an_absent_class_is_absent_and_glass_surrounds_the_tissue():
    shares = {name: value for name, value in layout.TYPICAL.items() if name != "mucus"}
    classes = layout.class_map(layout.Plot(2000, 2000, shares), np.random.default_rng(0))
    assert layout.CODE["mucus"] not in classes
    frame = np.concatenate([classes[:10].ravel(), classes[-10:].ravel(), classes[:, :10].ravel()])
    assert (frame == 0).all()


def test_necrosis_lies_in_tumour():
    classes = layout.class_map(layout.Plot(2400, 2400), np.random.default_rng(5))
    dead = classes == layout.CODE["necrosis"]
    grown = layout.ndimage.binary_dilation(dead, iterations=3) & ~dead
    neighbours = classes[grown]
    assert (neighbours == layout.CODE["tumour"]).mean() > 0.5


# Nested effects


def many(tag: str) -> pd.DataFrame:
    """Contributions of every level to one latent of `tag`, over 30 cohorts of 4 centres x 6 patients x 2 slides."""
    rows = []
    for seed in range(30):
        for patient in range(24):
            for slide in (2 * patient, 2 * patient + 1):
                parts = appearance.components(Origin(seed, patient // 6, 4, patient, slide), tag, Knobs())
                rows.append({level: values[0] for level, values in parts.items()})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("tag", ["stain", "scanner", "tissue"])
def test_variance_shares_are_as_documented(tag):
    variance = many(tag).var()
    for level, found in variance.items():
        assert found == pytest.approx(appearance.SHARES[tag][level], rel=0.25, abs=0.01), level
    assert sum(appearance.SHARES[tag].values()) == pytest.approx(1)


def test_slides_of_a_patient_are_alike_and_centres_differ():
    def pink(centre, patient, slide):
        return appearance.stain(Origin(0, centre, 4, patient, slide), Knobs())["e_red"]

    centres = [np.mean([pink(c, 10 * c + p, 100 * c + p) for p in range(10)]) for c in range(4)]
    within = [np.std([pink(c, 10 * c + p, 100 * c + p) for p in range(10)]) for c in range(4)]
    assert np.std(centres) > np.mean(within) / 2
    glands = [[appearance.tissue(Origin(0, 0, 4, p, s), Knobs())["tumour"].gland_um for s in (0, 1)] for p in range(8)]
    pairs = np.log(glands)
    assert np.abs(np.diff(pairs)).mean() < 2 * pairs.mean(1).std()


def test_an_effect_that_is_off_is_nil():
    off = Knobs(centre="off", patient="off", slide="off", region="off", variants="off")
    origins = [Origin(0, p % 4, 4, p, p) for p in range(8)]
    assert len({tuple(appearance.stain(o, off).values()) for o in origins}) == 1
    assert len({tuple(appearance.scanner(o, off).values()) for o in origins}) == 1
    assert len({tuple(asdict(appearance.tissue(o, off)["tumour"]).values()) for o in origins}) == 1


def test_the_null_twin_of_the_centre_shows_no_centre():
    twin = small_spec(knobs=Knobs(centre="off"))
    assert (render(twin, centre=0) == render(twin, centre=1)).all()
    assert (slides.tissue(twin).scene.class_map == slides.tissue(small_spec()).scene.class_map).all()


def test_centres_differ_in_class_proportions_only_on_request():
    def spread(knobs: Knobs) -> float:
        wanted = [
            [appearance.shares(Origin(0, c, 4, p, p), layout.TYPICAL, knobs)["adipose"] for p in range(40)]
            for c in range(4)
        ]
        return float(np.log(wanted).mean(1).std())

    assert spread(Knobs(proportions="strong")) > 3 * spread(Knobs(proportions="off"))


def test_variants_follow_zipf_and_belong_to_patients():
    drawn = [appearance.variant(Origin(0, 0, 4, p, s), "tumour") for p in range(2000) for s in (0, 1)]
    assert drawn[::2] == drawn[1::2]
    counts = np.bincount(drawn, minlength=appearance.VARIANTS)
    expected = 1 / np.arange(1, appearance.VARIANTS + 1)
    expected = expected / expected.sum()
    assert counts[0] / len(drawn) == pytest.approx(expected[0], abs=0.03)
    assert counts[:10].sum() / len(drawn) == pytest.approx(expected[:10].sum(), abs=0.04)


def test_the_centre_effect_can_be_all_stain_or_all_scanner():
    origins = [Origin(0, c, 4, 0, 0) for c in range(4)]
    for share, still, moving in ((0.0, "scanner", "stain"), (1.0, "stain", "scanner")):
        knobs = Knobs(scanner_share=share, slide="off", patient="off")
        kinds = {
            part: {tuple(getattr(appearance, part)(o, knobs).values()) for o in origins} for part in (still, moving)
        }
        assert len(kinds[still]) == 1 and len(kinds[moving]) == 4


def test_the_same_tissue_under_every_centre():
    """A counterfactual changes colour and scanner, and nothing of what lies on the glass."""
    spec = small_spec()
    own, other = render(spec, centre=0), render(spec, centre=1)
    assert (own == render(spec)).all()
    assert np.abs(own.astype(int) - other).mean() > 2
    grey = [np.asarray(image, float).mean(-1).ravel() for image in (own, other)]
    assert np.corrcoef(*grey)[0, 1] > 0.9


def test_a_special_stain_is_brown_and_the_nuclei_stay():
    brown = render(small_spec(), stain="DAB")
    red, blue = brown[..., 0].astype(int), brown[..., 2].astype(int)
    stained = brown.min(-1) < 180
    assert (red - blue)[stained].mean() > 30
    assert np.corrcoef(brown[..., 1].ravel(), render(small_spec())[..., 1].ravel())[0, 1] > 0.7
    with pytest.raises(InputError, match="no stain"):
        render(small_spec(), stain="PAS")


def test_the_label_on_nucleoli_reaches_a_tenth_of_tumour_nuclei():
    changed = []
    for amount in (-5.0, 5.0):
        slides.tissue.cache_clear()
        scene = slides.tissue(small_spec(width_px=1280, height_px=1280)).scene
        before = scene.cells.rows.copy()
        slides._prominent_nucleoli(scene, amount)
        moved = (scene.cells.rows != before).any(1)
        in_tumour = (scene.nuclei["cls"] == 1).sum()
        changed.append(moved.sum() / in_tumour)
        assert (scene.cells.rows[moved][:, [0, 1, 2, 3]] == before[moved][:, [0, 1, 2, 3]]).all()
    slides.tissue.cache_clear()
    assert 0.03 < max(changed) < 0.12


def centre_of(knobs: Knobs) -> float:
    """Accuracy of the nearest centre in the stain and scanner latents of other patients."""
    draws = []
    for seed in range(4):
        for patient in range(40):
            origin = Origin(seed, patient % 4, 4, patient, patient)
            latents = {**appearance.stain(origin, knobs), **appearance.scanner(origin, knobs)}
            draws.append([seed, patient % 4, *latents.values()])
    x = np.array(draws)
    z = (x[:, 2:] - x[:, 2:].mean(0)) / (x[:, 2:].std(0) + 1e-9)
    right = []
    for seed in range(4):
        own, early = x[:, 0] == seed, np.arange(len(x)) % 40 < 20
        train, test = own & early, own & ~early
        means = np.stack([z[train & (x[:, 1] == c)].mean(0) for c in range(4)])
        right.append((((z[test][:, None] - means) ** 2).sum(-1).argmin(1) == x[test, 1]).mean())
    return float(np.mean(right))


def test_the_oracle_sees_a_strong_centre_and_nothing_at_off():
    assert centre_of(Knobs(centre="strong")) > 0.95
    assert centre_of(Knobs(centre="off")) == pytest.approx(0.25, abs=0.15)


def test_oracles_have_a_row_a_slide_and_a_row_a_tile(tiny, tmp_path):
    assert oracles.slide_oracle(tiny, "stain").shape == (4, len(appearance.STAIN))
    manifest = pd.read_csv(labelled_tiles(tiny, tmp_path, tile_px=96, per_class=2) / "manifest.csv")
    features = oracles.tile_oracle(tiny, manifest, tile_px=96)
    assert len(features) == len(manifest) and np.isfinite(features.to_numpy()).all()
    by_class = features.groupby(manifest.label)["count"].mean()
    assert by_class["lymphocytes"] > 2 * by_class["adipose"]
    with pytest.raises(InputError, match="no oracle"):
        oracles.slide_oracle(tiny, "centre")


def test_labels_are_noisy_readings_of_their_latents():
    drawn = [appearance.labels(Origin(0, 0, 4, p, p)) for p in range(3000)]
    latents = pd.DataFrame([latent for latent, _ in drawn])
    labels = pd.DataFrame([label for _, label in drawn])
    assert labels.B0.mean() == pytest.approx(0.5, abs=0.04)
    for name in ("B1", "B2", "B3"):
        assert 0.85 <= auc(labels[name], latents[name]) <= 0.92, name
        assert abs(auc(labels.B0, latents[name]) - 0.5) < 0.04


def test_the_labels_on_lymphocytes_reach_the_tissue():
    params = [appearance.tissue(Origin(0, 0, 4, 0, 0), Knobs(), immune)["stroma"] for immune in (-1.5, 1.5)]
    assert params[1].inflammation > 3 * params[0].inflammation
    distance = []
    for wanted_um in (30, 500):
        classes = layout.class_map(layout.Plot(2400, 2400, lymphocytes_um=wanted_um), np.random.default_rng(2))
        to_tumour = layout.ndimage.distance_transform_edt(classes != layout.CODE["tumour"]) * layout.MAP_UM
        distance.append(to_tumour[classes == layout.CODE["lymphocytes"]].mean())
    assert distance[1] > 1.5 * distance[0]


# Looks


def test_morphometry_names_every_class_and_stays_near_published_ranges(tiny):
    table = morphometry(tiny)
    assert set(table["class"]) == set(CLASSES)
    assert table["inside"].dropna().mean() > 0.7
    assert table.query("quantity == 'H density'").set_index("class").measured.idxmax() in ("lymphocytes", "tumour")


def test_contact_sheet_has_every_class_at_every_mpp_and_real_tiles_beside(tiny, tmp_path):
    (tmp_path / "TUM").mkdir()
    Image.new("RGB", (32, 32), (180, 90, 160)).save(tmp_path / "TUM" / "one.png")
    titles, rows = contact_sheet(tiny, tmp_path, tile_px=32)
    assert titles == ["0.25 um/px", "0.5 um/px", "1 um/px", "2 um/px", "real"]
    assert list(rows) == list(CLASSES)
    assert all(image.shape == (32, 32, 3) for images in rows.values() for image in images[:4])
    assert rows["tumour"][4].shape == (32, 32, 3) and rows["muscle"][4] is None
    with pytest.raises(InputError, match="no folder named like"):
        contact_sheet(tiny, tmp_path / "TUM")


def test_optical_density_of_pure_dyes():
    white = np.full((4, 4, 3), 243, np.uint8)
    assert optical_density(white) == pytest.approx((0, 0), abs=1e-3)
    blue = np.round(243 * 10 ** -(0.5 * np.array([0.65, 0.70, 0.29]))).astype(np.uint8)
    h, e = optical_density(np.broadcast_to(blue, (4, 4, 3)))
    assert h == pytest.approx(0.5 * np.linalg.norm([0.65, 0.70, 0.29]), abs=0.02) and e < 0.02


def auc(label, score) -> float:
    ranks = score.rank()
    positive = label == 1
    return (ranks[positive].mean() - (positive.sum() + 1) / 2) / (~positive).sum()


# Labelled tiles


def test_labelled_tiles_are_pure_and_no_patient_has_two_roles(tiny, tmp_path):
    folder = labelled_tiles(tiny, tmp_path / "tiles", tile_px=128, per_class=3)
    manifest = pd.read_csv(folder / "manifest.csv")
    assert set(manifest.label) == set(CLASSES)
    assert (manifest.groupby("patient_id").role.nunique() == 1).all()
    assert (manifest.groupby(["label", "slide_id"]).size() <= 3).all()
    paths = dict(zip(tiny.table.slide_id, tiny.table.path, strict=True))
    for row in manifest.sample(20, random_state=0).itertuples():
        truth = Truth.open(paths[row.slide_id])
        assert truth.class_fraction(row.x, row.y, side_um=128 * 0.5)[row.label] >= 0.75 - 1e-6
        assert (folder / row.file).is_file()


def test_labelled_tiles_are_made_once_and_alike(tiny, tmp_path):
    first = labelled_tiles(tiny, tmp_path / "a", tile_px=64, per_class=1)
    second = labelled_tiles(tiny, tmp_path / "b", tile_px=64, per_class=1)
    assert (first / "manifest.csv").read_bytes() == (second / "manifest.csv").read_bytes()
    changed = (first / "manifest.csv").stat().st_mtime_ns
    labelled_tiles(tiny, first, tile_px=64, per_class=1)
    assert (first / "manifest.csv").stat().st_mtime_ns == changed


def test_tiles_larger_than_any_region_are_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="ask for smaller tiles"):
        labelled_tiles(tiny, tmp_path, tile_px=1024)
