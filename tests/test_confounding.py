"""Centre and slide beside a score: features that hold the class, the centre or the slide alone say so."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pathfm import InputError, confounding, metrics, probe
from pathfm.benchmarks import TileSet
from pathfm.features import Features


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
