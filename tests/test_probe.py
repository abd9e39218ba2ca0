"""Probes, intervals, verdicts and what a leaking split does."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pathfm import probe
from pathfm.benchmarks import TileSet
from pathfm.errors import InputError
from pathfm.features import Features
from pathfm.scores import (
    Difference,
    Prediction,
    by_fold,
    contrasts,
    interval,
    of_centres,
    paired,
    scores,
    share_closed,
    verdict,
)


def tile_table(label, patient=None, centre=None) -> pd.DataFrame:
    n = len(label)
    table = pd.DataFrame({"file": [f"{i}.png" for i in range(n)], "label": [f"class{c}" for c in label]})
    table["digest"], table["mpp"], table["width_px"], table["height_px"] = table["file"], 0.5, 64, 64
    if patient is not None:
        table["patient_id"] = [f"p{p}" for p in patient]
    if centre is not None:
        table["centre"] = [f"c{c}" for c in centre]
    return table


def make_features(x, label, patient=None, centre=None, name="made") -> Features:
    return Features(name, np.asarray(x, np.float32), TileSet("made", tile_table(label, patient, centre)))


def study(seed=0, patients=60, tiles=10, classes=3, signal=1.5):
    """Features of `signal` strength, classes equally often in every patient, four centres."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), tiles)
    label = np.arange(patients * tiles) % classes
    x = signal * rng.normal(size=(classes, 8))[label] + rng.normal(size=(len(label), 8))
    return make_features(x, label, patient, patient % 4)


def answers(right, patient=None, name="a", seed=0, floor=False, **more) -> Prediction:
    """A prediction that is right where `right`; classes alternate."""
    right = np.asarray(right, bool)
    truth = np.arange(len(right)) % 2
    table = tile_table(truth, patient)
    wrong = np.where(right, truth, 1 - truth)
    table = table.assign(truth=table["label"], predicted=[f"class{c}" for c in wrong])
    return Prediction(name, "linear", table, seed=seed, floor=floor, **more)


def test_linear_searches_on_validate_and_answers_on_test():
    features = study().split("patient", seed=1)
    found = probe.linear(features)
    assert found.table["role"].unique().tolist() == ["test"]
    role = features.table["role"].to_numpy()
    train, validate, test = (role == r for r in ("probe-train", "validate", "test"))
    x = (features.x - features.x[train].mean(0)) / features.x[train].std(0)
    best = max(
        (
            LogisticRegression(C=c, class_weight="balanced", max_iter=500).fit(x[train], features.y[train])
            for c in probe.C_GRID
        ),
        key=lambda m: round(m.score(x[validate], features.y[validate]), 9),
    )
    assert found.settings["C"] in probe.C_GRID
    expected = best.score(x[test], features.y[test])
    assert found.balanced_accuracy == pytest.approx(expected, abs=0.03)


def test_linear_never_looks_at_test_labels():
    features = study().split("patient", seed=1)
    test = (features.table["role"] == "test").to_numpy()
    swapped = features.table.copy()
    swapped.loc[test, "label"] = swapped.loc[test, "label"].to_numpy()[::-1]
    other = replace(features, tiles=replace(features.tiles, table=swapped))
    assert probe.linear(features).table["predicted"].tolist() == probe.linear(other).table["predicted"].tolist()


def test_knn_separates_what_is_separate_and_the_watch_agrees():
    features = study(signal=6).split("patient")
    found = probe.knn(features)
    assert found.balanced_accuracy > 0.97
    role = features.table["role"].to_numpy()
    train, test = role == "probe-train", role == "test"
    watch = probe.knn_accuracy(features.x[train], features.y[train], features.x[test], features.y[test], k=20)
    assert watch == pytest.approx(found.balanced_accuracy)


def test_the_scale_of_features_does_not_matter():
    features = study().split("patient")
    tiny = replace(features, x=features.x * 1e-9)
    assert probe.linear(tiny).balanced_accuracy == pytest.approx(probe.linear(features).balanced_accuracy, abs=0.01)


def test_chance_is_one_over_classes():
    features = study(classes=3).split("patient")
    flat = replace(features, x=np.zeros((len(features), 1), np.float32))
    assert probe.linear(flat).balanced_accuracy == pytest.approx(1 / 3)
    assert probe.knn(flat).balanced_accuracy == pytest.approx(1 / 3)


def test_missing_roles_and_classes_are_named():
    features = study()
    with pytest.raises(InputError, match="role probe-train"):
        probe.linear(features)
    table = features.split("patient").table
    table.loc[table["label"] == "class2", "role"] = "test"
    with pytest.raises(InputError, match="class class2 has the role probe-train"):
        probe.knn(replace(features, tiles=replace(features.tiles, table=table)))
    bad = replace(features.split("patient"), x=np.full_like(features.x, np.nan))
    with pytest.raises(InputError, match="NaN"):
        probe.linear(bad)


def test_interval_is_a_plain_bootstrap_over_patients():
    rng = np.random.default_rng(0)
    patient = rng.permutation(np.repeat(np.arange(25), 8))
    one = answers(rng.random(200) < 0.7, patient)
    found = interval(one, resamples=3000)
    truth, predicted = one.table["truth"].to_numpy(str), one.table["predicted"].to_numpy(str)
    drawn = []
    for _ in range(3000):
        rows = np.concatenate([np.flatnonzero(patient == p) for p in rng.integers(0, 25, 25)])
        drawn.append(np.mean([np.mean(predicted[rows][truth[rows] == c] == c) for c in np.unique(truth)]))
    assert found.value == one.balanced_accuracy
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)


def test_interval_covers_the_truth_when_patients_differ():
    rng, covered, too_narrow = np.random.default_rng(0), 0, 0
    repeats, patients, tiles = 200, 40, 20
    patient = np.repeat(np.arange(patients), tiles)
    for _ in range(repeats):
        skill = rng.beta(4, 2, size=patients)[patient]  # mean 2/3, and patients differ
        right = rng.random(patients * tiles) < skill
        low, high = interval(answers(right, patient), resamples=300)[1:]
        covered += low <= 2 / 3 <= high
        low, high = interval(answers(right), resamples=300)[1:]
        too_narrow += low <= 2 / 3 <= high
    assert 0.90 <= covered / repeats <= 0.99
    assert too_narrow / repeats < 0.75  # by image: what the table warns of


def test_seeds_widen_the_interval():
    rng, patient = np.random.default_rng(0), np.repeat(np.arange(30), 10)
    runs = [answers(rng.random(300) < skill, patient, seed=s) for s, skill in enumerate((0.5, 0.7, 0.9))]
    low, high = interval(runs)[1:]
    assert high - low > 2 * (interval(runs[1]).high - interval(runs[1]).low)
    assert interval(runs).value == pytest.approx(np.mean([run.balanced_accuracy for run in runs]))
    with pytest.raises(InputError, match="two predictions of one seed"):
        interval([runs[0], runs[0]])


def test_paired_verdicts():
    rng, patient = np.random.default_rng(0), np.repeat(np.arange(200), 10)
    right = rng.random(2000) < 0.7
    base = answers(right, patient)
    better = answers(right | (rng.random(2000) < 0.3), patient)
    assert paired(better, base).verdict == "better"
    assert paired(base, better).verdict == "worse"
    assert paired(base, base)[:3] == (0, 0, 0)
    assert paired(base, base).verdict == "equal"
    other = answers(rng.random(2000) < 0.7, patient)
    assert paired(base, other).verdict == "undecided"  # the same skill, and not enough patients to say equal
    few = np.repeat(np.arange(10), 200)
    assert paired(answers(right, few), answers(right, few)).verdict == "not informative"


@pytest.mark.parametrize(
    ("low", "high", "n", "said"),
    [
        (0.01, 0.05, 50, "better"),
        (-0.05, -0.01, 50, "worse"),
        (-0.01, 0.02, 50, "equal"),
        (-0.01, 0.03, 50, "undecided"),
        (0.01, 0.05, 19, "not informative"),
        (0.01, 0.12, 50, "not informative"),
        (0.01, 0.05, None, "better"),
    ],
)
def test_verdict(low, high, n, said):
    assert verdict(low, high, n) == said


def test_pairing_is_tighter_than_two_intervals():
    rng, patient = np.random.default_rng(0), np.repeat(np.arange(40), 10)
    skill = rng.beta(2, 1, size=40)[patient]
    luck = rng.random(400)
    a, b = answers(luck < skill, patient), answers(luck < skill - 0.05, patient)
    width = lambda i: i.high - i.low  # noqa: E731
    assert width(paired(a, b)) < 0.6 * width(interval(a))


def test_pairs_on_different_tiles_are_refused():
    a, b = answers(np.ones(40)), answers(np.ones(42))
    with pytest.raises(InputError, match="different tiles"):
        paired(a, b)


def test_scores_say_what_was_resampled_and_what_it_allows():
    rng, patient = np.random.default_rng(0), np.repeat(np.arange(150), 10)
    floor = answers(rng.random(1500) < 0.55, patient, "colour", floor=True)
    chance = answers(np.arange(1500) % 4 < 2, patient, "chance", floor=True)
    model = [answers(rng.random(1500) < 0.8, patient, "ours", seed=s, quarantined=2) for s in (0, 1)]
    table = scores([floor, chance, *model], seen=["p3"]).set_index("features")
    ours = table.loc["ours"]
    assert (ours["seeds"], ours["n_tiles"], ours["n_patients"], ours["n_quarantined"]) == (2, 1500, 150, 2)
    assert (ours["interval"], ours["verdict"], ours["transductive"]) == ("by patient", "better", True)
    assert ours["gain"] == pytest.approx(ours["balanced_accuracy"] - table.loc["colour", "balanced_accuracy"])
    assert not table.loc["colour", "transductive"]
    by_image = scores([answers(rng.random(300) < 0.8)]).iloc[0]
    assert by_image["interval"] == "by image (too narrow)"
    assert pd.isna(by_image["n_patients"])
    table = model[0].table.rename(columns={"patient_id": "slide_id"})
    assert scores([replace(model[0], table=table)])["interval"].tolist() == ["by slide"]


def test_a_leak_looks_good_by_tile_and_is_chance_by_patient():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(200), 6)
    coin = rng.permutation(np.repeat([0, 1], 100))[patient]  # of the patient, and without any cause in x
    x = rng.normal(size=(200, 200))[patient] + 0.3 * rng.normal(size=(len(patient), 200))
    features = make_features(x, coin, patient, patient % 4)
    table = probe.leakage(features, seeds=range(2)).set_index("split")
    assert table.loc["tile", "balanced_accuracy"] > 0.9
    assert abs(table.loc["patient", "balanced_accuracy"] - 0.5) < 0.12
    honest = interval(probe.cross_validate(features, by="patient", n=5))
    assert honest.low < 0.5 < honest.high
    assert table.loc["tile", "over_patient"] > 0.35
    assert table["on_both_sides"].tolist() == [table.loc["tile", "n_patients"], 0, 0]
    leaking = features.split("tile", allow_leak=True)
    assert scores([probe.linear(leaking)])["verdict"].tolist() == ["leaks patients"]


def test_leakage_says_which_split_cannot_be():
    table = probe.leakage(replace(study(), tiles=TileSet("x", study().table.drop(columns="centre"))), seeds=(0,))
    assert table["reason"].str.contains("needs a column centre").tolist() == [False, False, True]


def test_cross_validation_answers_every_tile_once_without_its_centre():
    features = study()
    found = probe.cross_validate(features, by="centre")
    assert found.table["file"].tolist() == features.table["file"].tolist()
    assert (found.table["fold"] == found.table["centre"]).all()
    assert found.balanced_accuracy > 0.8
    assert probe.cross_validate(features, by="patient", n=3).settings["folds"] == 3


def two_centres(said, seed=0, name="teacher"):
    tiles = pd.DataFrame(
        {"file": list("abcd"), "patient_id": list("ppqq"), "centre": ["1", "1", "2", "2"], "truth": list("xyxy")}
    )
    return Prediction(name, "linear", tiles.assign(predicted=list(said)), seed)


def test_scores_on_some_centres_alone():
    (only,) = of_centres([two_centres("xyyx")], ["1"])
    assert only.balanced_accuracy == 1 and set(only.table["centre"]) == {"1"}
    with pytest.raises(InputError, match="no test tile comes from centre 7"):
        of_centres([two_centres("xyyx")], [7])


def test_the_share_of_the_way_to_the_oracle():
    start, oracle = two_centres("xxxx", name="start"), two_centres("xyxy", name="oracle")
    halfway = share_closed([two_centres("xyxx")], [start], oracle)
    assert halfway.value == pytest.approx(0.5)
    assert share_closed([oracle], [start], oracle)[:3] == (1, 1, 1)
    teacher = [two_centres("xyxx")]
    told = contrasts({"teacher": teacher, "random weights": [start], "oracle": [oracle]}, ["random weights", "oracle"])
    for row, one in zip(told.itertuples(), (start, oracle), strict=False):
        assert (row.value, row.low, row.high) == paired(teacher, [one])[:3]
    assert told["value"].iloc[-1] == halfway.value and told["contrast"].iloc[-1].startswith("share of the way")
    assert share_closed([start], [start], oracle)[:3] == (0, 0, 0)


def test_the_pooling_that_validates_best_is_kept(monkeypatch):
    import pathfm.features as features_module

    quality, asked = {"cls": 0.2, "mean": 0.9, "both": 0.5}, []
    features = study()

    def extract(source, tiles, preprocess, pool, name, folder):
        asked.append(pool)
        return replace(features, name=name, provenance={"pool": pool})

    def judge(found):
        return Prediction("f", "linear", pd.DataFrame(), settings={"validate": quality[found.provenance["pool"]]})

    monkeypatch.setattr(features_module, "extract", extract)
    model = torch.nn.Identity()
    model.cls_token = torch.zeros(1)
    best = probe.pooled(model, None, name="ours", probe=judge)
    assert best.name == "ours (mean)" and asked == ["both"]  # one pass over the tiles
    assert np.array_equal(best.x, features.x[:, features.x.shape[1] // 2 :])
    assert probe.pooled(torch.nn.Identity(), None, probe=judge).name.endswith("(mean)")  # without CLS
    assert asked[1:] == ["mean"]


def test_each_fold_has_its_own_score():
    features = study()
    found = probe.cross_validate(features, by="centre")
    table = by_fold(found)
    assert list(table.index) == ["c0", "c1", "c2", "c3"]
    rows = found.table[found.table["fold"] == "c2"]
    recall = (rows["truth"] == rows["predicted"]).groupby(rows["truth"]).mean()
    assert table["c2"] == pytest.approx(recall.mean()) and table.nunique() > 1


def test_a_difference_is_told_in_one_line():
    assert str(Difference(0.2603, 0.2077, -0.004, 36, "better")) == "+0.26 [+0.21, -0.00], better"
