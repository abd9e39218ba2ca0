"""Centre and slide beside a score: features that hold the class, the centre or the slide alone say so."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pathfm import InputError, bags, confounding, metrics, probe, segment
from pathfm.benchmarks import TileSet
from pathfm.features import Features
from pathfm.tasks.nuclei import NucleiSet


def tiles(patients=24, each=12, centres=4) -> TileSet:
    """Half of the patients train or validate the probe, half test; both classes in every patient and centre."""
    n = patients * each
    patient = np.repeat(np.arange(patients), each)
    table = pd.DataFrame({"file": [f"{i}.png" for i in range(n)], "label": np.where(np.arange(n) % 2, "a", "b")})
    table["patient_id"], table["slide_id"] = [f"p{i}" for i in patient], [f"s{i}" for i in patient]
    table["centre"] = [f"c{i % centres}" for i in patient]
    role = np.where(patient < patients // 2, "test", np.where(patient % 3, "probe-train", "validate"))
    return TileSet("made", table.assign(role=role, digest=table["file"], mpp=0.5, width_px=64, height_px=64))


def holding(column, name="made", noise=0.3, **how) -> Features:
    """Features that know one column of the table and noise."""
    made = tiles(**how)
    values, code = np.unique(made.table[column], return_inverse=True)
    rng = np.random.default_rng(0)
    x = 3 * np.eye(len(values))[code] + noise * rng.normal(size=(len(code), len(values)))
    return Features(name, x.astype(np.float32), made)


def test_features_of_the_class_are_robust_and_of_the_centre_are_not():
    biology, centre, slide = (confounding.of(holding(column)) for column in ("label", "centre", "slide_id"))
    assert biology["robustness_index"] > 0.95 and centre["robustness_index"] < 0.05
    assert biology["centre_identity"] < 0.35 and centre["centre_identity"] > 0.95
    assert biology["centre_chance"] == 0.25
    assert abs(biology["slide_dependence"]) < 0.05
    assert biology["why"] == slide["why"] == ""


def test_the_numbers_are_those_of_the_test_tiles_alone():
    features = holding("centre", noise=1.5)
    rows = (features.table["role"] == "test").to_numpy()
    table, x = features.table[rows], features.x[rows]
    found = confounding.of(features)
    index = metrics.robustness_index(x, table["label"], table["centre"], table["patient_id"], (20,))
    assert found["robustness_index"] == index["robustness_index"][0]
    assert found["centre_identity"] == metrics.centre_identity(x, table["centre"], table["patient_id"]).value
    assert found["slide_dependence"] == metrics.slide_dependence(x, table["label"], table["slide_id"]).dependence
    assert confounding.of(features, role=None)["centre_identity"] != found["centre_identity"]


def test_they_stand_beside_the_scores_of_their_features():
    biology, centre = holding("label", "biology"), holding("centre", "centre")
    table = probe.scores([probe.linear(biology), probe.knn(biology), probe.linear(centre)], resamples=50)
    shown = confounding.beside(table, [biology, centre])
    assert list(shown.columns[-4:]) == list(confounding.COLUMNS)
    assert shown["robustness_index"].tolist() == [
        confounding.of(f)["robustness_index"] for f in (biology, biology, centre)
    ]
    assert confounding.beside(table, [biology])["robustness_index"].isna().tolist() == [False, False, True]
    with pytest.raises(InputError, match="no score is of features 'other'"):
        confounding.beside(table, [holding("label", "other")])


def test_what_the_tiles_cannot_tell_is_said():
    one = confounding.of(holding("label", centres=1))
    assert np.isnan(one["robustness_index"]) and one["why"] == "class a has one centre"
    assert np.isnan(one["centre_identity"]) and np.isfinite(one["slide_dependence"])
    for column, why in (("centre", "no centres are known"), ("patient_id", "no patients or slides are known")):
        features = holding("label")
        less = features.table.drop(columns=[column, "slide_id"] if column == "patient_id" else column)
        found = confounding.of(replace(features, tiles=TileSet("made", less)))
        assert found["why"] == why and np.isnan(found["robustness_index"])
    with pytest.raises(InputError, match="no tile of made has the role pretrain"):
        confounding.of(holding("label"), role="pretrain")


def test_of_one_class_nothing_is_robust():
    features = holding("centre")
    one = replace(features.tiles, table=features.table.assign(label="a"))
    found = confounding.of(replace(features, tiles=one))
    assert found["why"] == "all are of one class" and found["centre_identity"] > 0.95
    assert np.isnan(found["robustness_index"]) and np.isnan(found["slide_dependence"])


def test_tiles_of_an_unknown_centre_are_asked_of_their_slide_alone():
    features, some = holding("label"), holding("label").table["patient_id"].isin(["p0", "p1"]).to_numpy()
    table = features.table.assign(centre=features.table["centre"].mask(some, ""))
    found = confounding.told(features.x, table, k=2)
    known = confounding.told(features.x[~some], features.table[~some], k=2)
    assert found["robustness_index"] == known["robustness_index"] and found["centre_chance"] == 0.25
    assert found["slide_dependence"] == confounding.told(features.x, features.table)["slide_dependence"]


def test_slides_are_asked_by_the_mean_of_their_bags(tmp_path):
    """48 slides whose tiles hold the centre, and noise that a mean takes out."""
    rng, n = np.random.default_rng(0), 48
    centre, files = np.arange(n) // 2 % 2, []
    for k in range(n):
        files.append(tmp_path / f"{k}.npy")
        np.save(files[-1], (np.eye(2)[centre[k]] + 7 * rng.normal(size=(200, 2))).astype(np.float32))
    slides = pd.DataFrame({"slide_id": [f"s{k}" for k in range(n)], "role": "test", "label": np.arange(n) % 2})
    slides = slides.assign(centre=[f"c{k}" for k in centre], n_tiles=200)
    bag = bags.Bags("made", slides, files, [None] * n, pd.DataFrame(columns=["slide_id", "reason"]))
    found = confounding.of_slides(bag, k=5)
    who = slides["slide_id"].to_numpy()
    assert found["centre_identity"] == metrics.centre_identity(bag.means(), slides["centre"], who, 5).value > 0.7
    assert found["robustness_index"] < 0.4 and found["why"] == "slide dependence is n/a of one vector a slide"
    assert np.isnan(found["slide_dependence"])
    half = confounding.of_slides(replace(bag, slides=slides.assign(role=np.where(np.arange(n) < 32, "test", "x"))), k=5)
    whole = confounding.of_slides(replace(bag, slides=slides.assign(role="x")), role=None, k=5)
    assert whole["centre_identity"] == found["centre_identity"] != half["centre_identity"]


def test_masks_are_asked_by_their_tokens_and_commonest_class():
    n = 40
    masks = np.zeros((n, 4, 4), int)
    masks[:, :2], masks[:, 3, 0] = 1 + np.arange(n)[:, None, None] % 2, 2 - np.arange(n) % 2
    table = pd.DataFrame({"patient_id": [f"p{k}" for k in range(n)], "centre": [f"c{k // 2 % 2}" for k in range(n)]})
    masks[-1] = 0  # no nucleus
    images = NucleiSet("made", table, ("background", "a", "b"), None)
    pieces = segment.Pieces(None, masks, np.arange(n))
    tokens = np.eye(2)[np.arange(n) % 2]
    made = segment.Segmented("net", images, pieces, "test", *[None] * 4, 0, None, tokens)
    found = confounding.of_masks(made, k=5)
    label = np.array(["a", "b"])[np.arange(n) % 2]
    assert found == confounding.told(tokens[:-1], table[:-1].assign(label=label[:-1]), k=5)
    assert found["robustness_index"] == 1
    with pytest.raises(InputError, match="'net' has no tokens"):
        confounding.of_masks(replace(made, tokens=None))


def test_too_few_neighbours_are_no_index():
    features = holding("label", patients=8, each=4, centres=2)
    found = confounding.of(features)
    assert np.isnan(found["robustness_index"]) and found["why"] == "a tile has only 12 neighbours of other patients"
    assert confounding.of(features, k=2)["robustness_index"] > 0.9


def test_centres_are_asked_of_the_test_tiles_where_those_have_two():
    assert confounding.asked(tiles()) == "test"
    test = tiles().table["role"] == "test"
    one = tiles().table.assign(centre=lambda t: t["centre"].mask(test, "c0"))
    assert confounding.asked(TileSet("made", one)) is None  # all tiles: those of test come from one centre
    assert confounding.asked(TileSet("made", one.drop(columns=["role", "centre"]))) is None
