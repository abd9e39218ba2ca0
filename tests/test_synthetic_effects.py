"""Nested random effects, layout and slide labels are drawn as documented."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from slide_files import small_spec

from pathfm.errors import InputError
from pathfm.synthetic import (
    CLASSES,
    Knobs,
    appearance,
    labelled_tiles,
    layout,
    oracles,
    render,
    slides,
)
from pathfm.synthetic.appearance import Origin


def auc(label, score) -> float:
    ranks = score.rank()
    positive = label == 1
    return (ranks[positive].mean() - (positive.sum() + 1) / 2) / (~positive).sum()


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


def test_oracles_have_a_row_a_slide_and_a_row_a_tile(cohort, tmp_path):
    assert oracles.slide_oracle(cohort, "stain").shape == (4, len(appearance.STAIN))
    manifest = pd.read_csv(labelled_tiles(cohort, tmp_path, tile_px=96, per_class=2) / "manifest.csv")
    features = oracles.tile_oracle(cohort, manifest, tile_px=96)
    assert len(features) == len(manifest) and np.isfinite(features.to_numpy()).all()
    by_class = features.groupby(manifest.label)["count"].mean()
    assert by_class["lymphocytes"] > 2 * by_class["adipose"]
    with pytest.raises(InputError, match="no oracle"):
        oracles.slide_oracle(cohort, "centre")


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
