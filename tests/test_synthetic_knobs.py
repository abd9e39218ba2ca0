"""Every knob is seen at strong and silent at off; facts of files say nothing; splits leak at default alone."""

from dataclasses import asdict, fields, replace
from functools import cache, partial

import cv2
import numpy as np
import pandas as pd
import pytest

from pathfm import descriptors
from pathfm.metrics import balanced_accuracy
from pathfm.synthetic import CLASSES, Knobs, appearance, cohorts, layout, optics, painters, slides
from pathfm.synthetic.appearance import MIMICS, Origin

STAINED = ("stain", "scanner")


def told(x, y, half) -> float:
    """Balanced accuracy of the nearest class mean in standardised x, fitted where `half` is False."""
    x, y, half = np.asarray(x, float), np.asarray(y), np.asarray(half, bool)
    z = (x - x[~half].mean(0)) / (x[~half].std(0) + 1e-9)
    names = np.unique(y)
    means = np.stack([z[~half & (y == name)].mean(0) for name in names])
    return balanced_accuracy(y[half], names[((z[half][:, None] - means) ** 2).sum(-1).argmin(1)])


def one_class(name: str, origin: Origin, knobs: Knobs, side_um: int = 320, seed: int = 0) -> painters.Scene:
    """A plan of nothing but the class `name`, as `origin` shows it."""
    params = appearance.tissue(origin, knobs)
    classes = np.full((side_um // 2, side_um // 2), layout.CODE[name], np.uint8)
    painted_as = {mimic.name: mimic.painted_as for mimic in appearance.mimics(origin, knobs)}
    return painters.plan(classes, 2.0, params, seed, appearance.departure(knobs), painted_as)


# Every knob: (strong, off) of a reading, what strong must reach and what off must stay below


def centre_in(tags, knobs: Knobs) -> float:
    """Centre of other patients from the latents of `tags`; chance is 1/4."""
    scores = []
    for seed in range(5):
        x, y, half = [], [], []
        for patient in range(60):
            origin = Origin(seed, patient % 4, 4, patient, patient)
            parts = [sum(appearance.components(origin, tag, knobs).values()) for tag in tags]
            x.append(np.concatenate(parts))
            y.append(patient % 4)
            half.append(patient >= 30)
        scores.append(told(x, y, half))
    return float(np.mean(scores))


def of_whom(level: str, knobs: Knobs) -> float:
    """Which of 4 patients, or of 4 slides of one patient, a noisy reading of the latents is of; chance is 1/4."""
    rng, scores = np.random.default_rng(0), []
    for seed in range(20):
        x, y, half = [], [], []
        for who in range(4):
            for reading in range(20):
                patient, slide = (who, 100 * who + reading) if level == "patient" else (0, who)
                origin = Origin(seed, 0, 4, patient, slide)
                parts = [sum(appearance.components(origin, tag, knobs).values()) for tag in ("tissue", *STAINED)]
                latents = np.concatenate(parts)
                x.append(latents + 0.5 * rng.standard_normal(len(latents)))
                y.append(who)
                half.append(reading >= 10)
        scores.append(told(x, y, half))
    return float(np.mean(scores))


def region_spread(knobs: Knobs) -> float:
    """Standard deviation of how loose 16 pieces of one class are on one slide."""
    classes = np.zeros((200, 200), np.uint8)
    for row in range(4):
        for column in range(4):
            classes[50 * row + 5 : 50 * row + 45, 50 * column + 5 : 50 * column + 45] = layout.CODE["muscle"]
    params = appearance.tissue(Origin(0, 0, 4, 0, 0), knobs)
    scene = painters.plan(classes, 2.0, params, 0, appearance.departure(knobs))
    looseness = scene.table[1:, painters.materials.LOOSE]
    return float(looseness.std())


def nucleus_spread(knobs: Knobs) -> float:
    """Standard deviation of the size of lymphocytes in one field, of the logarithm."""
    nuclei = one_class("lymphocytes", Origin(0, 0, 4, 0, 0), knobs).nuclei
    nuclei = nuclei[nuclei["kind"] == "lymphocyte"]
    return float(np.log(nuclei["major_um"] * nuclei["minor_um"]).std())


def which_variant(knobs: Knobs) -> float:
    """The commonest variants of muscle from its parameters in other patients; chance is 1/3."""
    x, y, half = [], [], []
    for patient in range(400):
        origin = Origin(0, 0, 4, patient, patient)
        which = appearance.variant(origin, "muscle")
        if which < 3:
            x.append(list(asdict(appearance.tissue(origin, knobs)["muscle"]).values()))
            y.append(which)
            half.append(patient % 2)
    return told(x, y, half)


def class_of_mimics(family: str, knobs: Knobs) -> float:
    """Which of two classes drawn by one painter, from the parameters the family moves; chance is 1/2."""
    scores = []
    for index, mimic in enumerate(MIMICS):
        if mimic.family != family:
            continue
        x, y, half = [], [], []
        for origin in shown(index, 40):
            built = appearance.tissue(origin, knobs)
            for name in (mimic.name, mimic.painted_as):
                x.append([asdict(built[name])[cue] for cue in mimic.own])
                y.append(name)
                half.append(len(y) > 40)
        scores.append(told(x, y, half))
    return float(min(scores) if knobs.strength(family) else max(scores))


def spoilt(knobs: Knobs) -> float:
    """Share of the slides of a study with an artefact."""
    return float(np.mean([bool(spec.artefacts) for spec in cohorts.specs("study", knobs=knobs)]))


@cache
def shown(index: int, n: int) -> list[Origin]:
    """The first `n` patients who show MIMICS[index] and no other."""
    found = []
    for patient in range(5000):
        origin = Origin(5, 0, 4, patient, patient)
        if appearance.mimics(origin, Knobs()) == [MIMICS[index]]:
            found.append(origin)
            if len(found) == n:
                break
    return found


EFFECTS = {  # knob: reading, least at strong, most at off
    "centre": (partial(centre_in, STAINED), 0.90, 0.33),
    "patient": (lambda knobs: of_whom("patient", knobs), 0.90, 0.33),
    "slide": (lambda knobs: of_whom("slide", knobs), 0.90, 0.33),
    "region": (region_spread, 0.08, 1e-6),
    "nucleus": (nucleus_spread, 0.30, 1e-3),
    "variants": (which_variant, 0.90, 0.45),
    "fine_cues": (partial(class_of_mimics, "fine_cues"), 0.90, 0.5),
    "coarse_cues": (partial(class_of_mimics, "coarse_cues"), 0.90, 0.5),
    "proportions": (partial(centre_in, ("shares",)), 0.60, 0.33),
    "artefacts": (spoilt, 0.80, 0.0),
    "scanner_share": (partial(centre_in, ("scanner",)), 0.90, 0.33),
}
ENDS = {"scanner_share": (1.0, 0.0)}


def test_every_knob_has_a_reading():
    assert set(EFFECTS) == {field.name for field in fields(Knobs)}


@pytest.mark.parametrize("knob", EFFECTS)
def test_the_oracle_sees_a_strong_effect_and_nothing_at_off(knob):
    reading, least, most = EFFECTS[knob]
    strong, off = (reading(Knobs(**{knob: end})) for end in ENDS.get(knob, ("strong", "off")))
    assert strong >= least
    assert off <= most


# Confusable pairs

MIMIC_IDS = [f"{m.name} as {m.painted_as}, {m.family}" for m in MIMICS]


def gap(index: int, knobs: Knobs) -> pd.Series:
    """How far the cues of MIMICS[index] lie from those of the class that paints it, mean over patients."""
    mimic, rows = MIMICS[index], []
    for origin in shown(index, 20):
        built = appearance.tissue(origin, knobs)
        own, painter = asdict(built[mimic.name]), asdict(built[mimic.painted_as])
        rows.append({name: abs(own[name] - painter[name]) for name in mimic.own})
    return pd.DataFrame(rows).mean()


@pytest.mark.parametrize("index", range(len(MIMICS)), ids=MIMIC_IDS)
def test_with_its_cues_off_a_class_is_drawn_as_the_one_it_mimics(index):
    mimic = MIMICS[index]
    for origin in shown(index, 20):
        built = appearance.tissue(origin, Knobs(**{mimic.family: "off"}))
        assert built[mimic.name] == built[mimic.painted_as]
    spec = slides.SlideSpec("one", shown(index, 1)[0], 0.5, 320, 320)
    assert slides.tissue(spec).latents["painted_as"] == {mimic.name: mimic.painted_as}


@pytest.mark.parametrize("index", range(len(MIMICS)), ids=MIMIC_IDS)
def test_a_mimic_differs_in_its_own_family_alone(index):
    mimic = MIMICS[index]
    scales = {"fine_cues": {"fine"}, "coarse_cues": {"coarse"}}[mimic.family]
    metadata = {field.name: field.metadata for field in fields(painters.TissueParams)}
    assert {metadata[name]["scale"] for name in mimic.own} == scales
    for origin in shown(index, 5):
        built = appearance.tissue(origin, Knobs())
        own, painter = asdict(built[mimic.name]), asdict(built[mimic.painted_as])
        assert {name for name in own if own[name] != painter[name]} == set(mimic.own)


@pytest.mark.parametrize("index", range(len(MIMICS)), ids=MIMIC_IDS)
def test_the_cues_of_a_mimic_grow_with_the_knob(index):
    off, default, strong = (gap(index, Knobs(**{MIMICS[index].family: setting})) for setting in appearance.SETTINGS)
    assert (off == 0).all() and (default > 0).all()
    assert (strong / default).mean() >= 1


def fields_of(index: int, knobs: Knobs, n: int = 6):
    """`n` fields of 240 um of a mimic and of its painter: (scene, haematoxylin at 0.5 um/px) each."""
    mimic, drawn = MIMICS[index], []
    for name in (mimic.name, mimic.painted_as):
        scenes = [one_class(name, shown(index, n)[k], knobs, seed=k) for k in range(n)]
        drawn.append([(scene, painters.raster(scene, 40, 40, 480, 480, 0.5)[0]) for scene in scenes])
    return drawn


def apart(own, painter) -> float:
    """Mean paired difference, in standard deviations of the differences."""
    difference = np.asarray(own) - np.asarray(painter)
    return float(abs(difference.mean()) / (difference.std() + 1e-9))


def grain(h: np.ndarray) -> float:
    """Standard deviation of what a 4 um average loses, inside nuclei."""
    return float((h - cv2.blur(h, (8, 8)))[h > 0.4].std())


def coarse(h: np.ndarray) -> float:
    """Standard deviation of the 4 um average."""
    return float(cv2.blur(h, (8, 8)).std())


FINE = [k for k, m in enumerate(MIMICS) if m.family == "fine_cues"]
COARSE = [k for k, m in enumerate(MIMICS) if m.family == "coarse_cues"]


@pytest.mark.parametrize("index", FINE, ids=[MIMIC_IDS[k] for k in FINE])
def test_a_fine_mimic_is_told_below_4_um_only(index):
    own, painter = fields_of(index, Knobs())
    fine = [[grain(h) for _, h in side] for side in (own, painter)]
    wide = [[coarse(h) for _, h in side] for side in (own, painter)]
    assert apart(*fine) > 3
    assert apart(*wide) < 1.5
    assert np.mean(wide[0]) == pytest.approx(np.mean(wide[1]), rel=0.03)


@pytest.mark.parametrize("index", COARSE, ids=[MIMIC_IDS[k] for k in COARSE])
def test_a_coarse_mimic_is_told_by_structure_and_not_by_its_nuclei(index):
    own, painter = fields_of(index, Knobs(coarse_cues="strong"), n=8)
    for quantity in ("major_um", "grain", "vesicle", "dark"):
        means = [np.mean([scene.nuclei[quantity].astype(float).mean() for scene, _ in side]) for side in (own, painter)]
        assert means[0] == pytest.approx(means[1], rel=0.15), quantity
    assert told_by_structure(own, painter) > 1.8
    assert told_by_structure(*fields_of(index, Knobs(coarse_cues="off"), n=8)) < 1.5


def told_by_structure(own, painter) -> float:
    """The largest `apart` of a quantile of the depth into epithelium or fascicle or of that into lumina."""
    quantiles = [
        [np.quantile(s.structure(), (0.25, 0.5, 0.75, 0.95), axis=(0, 1)) for s, _ in side] for side in (own, painter)
    ]
    return max(apart(a, b) for a, b in zip(*(np.reshape(side, (len(side), -1)).T for side in quantiles), strict=True))


# Slide labels


def wilson(right: int, n: int, z: float = 3.29) -> tuple[float, float]:
    """Interval of a proportion that misses one time in a thousand."""
    share, spread = right / n, z * np.sqrt(right / n * (1 - right / n) / n + z**2 / (4 * n**2))
    middle = share + z**2 / (2 * n)
    return (middle - z * spread) / (1 + z**2 / n), (middle + z * spread) / (1 + z**2 / n)


@pytest.fixture(scope="module")
def bags():
    """Every latent of 3 draws of the cohort `bags`, and the labels: (900, D), and a table."""
    x, labels = [], []
    for seed in (1, 2, 3):
        for spec in cohorts.specs("bags", seed):
            origin = spec.origin
            latent, drawn = appearance.labels(origin)
            parts = [sum(appearance.components(origin, tag, spec.knobs).values()) for tag in appearance.SHARES]
            x.append(
                np.concatenate([*parts, list(latent.values()), [appearance.scanner(origin, spec.knobs)["quality"]]])
            )
            labels.append({**drawn, **{f"latent {name}": value for name, value in latent.items()}})
    return np.array(x), pd.DataFrame(labels)


def test_no_latent_says_anything_of_the_coin(bags):
    """The leak canary, read with a probe on all that was drawn; the same probe reads the other labels."""
    x, labels = bags
    half = np.arange(len(x)) % 2 == 1
    for name in ("B0", "B1", "B2", "B3"):
        right = round(told(x, labels[name], half) * half.sum())
        low, high = wilson(right, half.sum())
        assert (low < 0.5 < high) == (name == "B0"), name


def test_the_coin_is_fair_in_every_cohort():
    for seed in range(10):
        heads = [appearance.labels(spec.origin)[1]["B0"] for spec in cohorts.specs("bags", seed)]
        low, high = wilson(sum(heads), len(heads))
        assert low < 0.5 < high


@pytest.mark.parametrize("name", ["B1", "B2", "B3"])
def test_the_latent_behind_a_label_is_a_noisy_oracle(bags, name):
    _, labels = bags
    rank, positive = labels[f"latent {name}"].rank(), labels[name] == 1
    auc = (rank[positive].mean() - (positive.sum() + 1) / 2) / (~positive).sum()
    assert 0.85 <= auc <= 0.92


# Leaks


def board(origin: Origin, knobs: Knobs) -> painters.Scene:
    """The eight classes side by side, 96 um each."""
    classes = np.kron(np.arange(1, 9, dtype=np.uint8).reshape(2, 4), np.ones((48, 48), np.uint8))
    painted_as = {mimic.name: mimic.painted_as for mimic in appearance.mimics(origin, knobs)}
    params = appearance.tissue(origin, knobs)
    return painters.plan(classes, 2.0, params, origin.slide, appearance.departure(knobs), painted_as)


@cache
def by_colour_alone(knobs: Knobs) -> dict[str, float]:
    """Balanced accuracy over classes of the nearest neighbour in colour, leaving out the tile, patient or centre.

    24 patients of 4 centres, four windows of 40 um of every class.
    """
    x, rows = [], []
    for patient in range(24):
        origin = Origin(0, patient % 4, 4, patient, patient)
        scene, scanner = board(origin, knobs), appearance.scanner(origin, knobs)
        matrix = optics.stain_matrix(appearance.stain(origin, knobs))
        for cls in range(8):
            for k in range(4):
                at = (96 * (cls % 4) + 8 + 40 * (k % 2), 96 * (cls // 4) + 8 + 40 * (k // 2))
                light = optics.transmitted(
                    *painters.raster(scene, *at, 40, 40, 1.0), np.ones((40, 40, 2), "f4"), matrix
                )
                x.append(descriptors.colour(optics.scan(light, scanner, 1.0, [patient, cls, k])))
                rows.append({"label": cls, "tile": len(rows), "patient": patient, "centre": origin.centre})
    x, table = np.array(x), pd.DataFrame(rows)
    x = (x - x.mean(0)) / x.std(0)
    away = ((x[:, None] - x[None]) ** 2).sum(-1)
    label, scores = table["label"].to_numpy(), {}
    for unit in ("tile", "patient", "centre"):
        same = np.equal.outer(table[unit].to_numpy(), table[unit].to_numpy())
        scores[unit] = balanced_accuracy(label, label[np.where(same, np.inf, away).argmin(1)])
    return scores


def test_a_leaking_split_pays_at_default():
    scores = by_colour_alone(Knobs())
    assert scores["tile"] > scores["patient"] + 0.05
    assert scores["patient"] > scores["centre"] + 0.02


def test_without_centre_patient_and_slide_effects_every_split_says_the_same():
    scores = by_colour_alone(Knobs(centre="off", patient="off", slide="off", variants="off"))
    assert max(scores.values()) - min(scores.values()) < 0.04


# Designs


def best_guess(specs: list[slides.SlideSpec], fact) -> float:
    """Balanced accuracy over classes of the best rule on `fact` of a slide; 1/8 where it is crossed with the classes.

    A class lies on the slides that show it, equally on each.
    """
    values = sorted({fact(spec) for spec in specs})
    shows = np.array([[name not in spec.absent for name in CLASSES] for spec in specs], float)
    at = np.array([[fact(spec) == value for value in values] for spec in specs], float)
    return float((at.T @ shows / shows.sum(0)).max(1).sum() / len(CLASSES))


@pytest.mark.parametrize("design, most", [("study", 0.13), ("development", 0.13), ("bags", 0.125), ("embedded", 0.14)])
def test_resolution_and_pyramid_predict_no_class(design, most):
    """Of 24 slides a third is fine and a fifth lacks each class: there the crossing cannot be exact."""
    assert best_guess(cohorts.specs(design), lambda spec: (spec.mpp, spec.pyramid)) <= most + 1e-9


@pytest.mark.parametrize("design", cohorts.DESIGNS)
def test_resolution_and_pyramid_predict_no_centre(design):
    table = pd.DataFrame([asdict(spec) | {"centre": spec.origin.centre} for spec in cohorts.specs(design)])
    counts = pd.crosstab([table["mpp"], table["pyramid"]], table["centre"])
    assert (counts.max(axis=1) - counts.min(axis=1) <= 2).all()
    assert pd.crosstab(table["mpp"], table["centre"]).apply(lambda row: row.max() - row.min() <= 7, axis=1).all()


def test_jpeg_quality_predicts_no_class():
    """Above and below the median quality, over ten draws: a probe on it is at chance."""
    drawn = [spec for seed in range(10) for spec in cohorts.specs("study", seed)]
    quality = {spec: appearance.scanner(spec.origin, spec.knobs)["quality"] for spec in drawn}
    middle = np.median(list(quality.values()))
    assert best_guess(drawn, lambda spec: quality[spec] > middle) < 0.13
    biased = [replace(spec, absent=("muscle",) if quality[spec] > middle else ()) for spec in drawn]
    of = {replace(spec, absent=()): value for spec, value in quality.items()}
    assert best_guess(biased, lambda spec: of[replace(spec, absent=())] > middle) > 0.15
