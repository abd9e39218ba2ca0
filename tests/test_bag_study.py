"""Slide labels from end to end: the synthetic ones in small, with the oracle as ceiling, and TP53 from its CSV."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from slide_files import tissue_pixels, write_slide
from test_features import tiny_vit

from pathfm import (
    InputError,
    SlideIndex,
    bag_study,
    bags,
    export,
    extractors,
    roc,
    runs,
    slide_floors,
    slide_probe,
    tasks,
)
from pathfm.bags import Cut
from pathfm.slide_probe import SlideProtocol

QUICK = SlideProtocol(runs=1, epochs=2, patience=2)


@pytest.fixture
def every_sample_pays(monkeypatch):
    monkeypatch.setattr(extractors, "WORTH_A_SAMPLE", 0)


@pytest.fixture
def slides(tmp_path):
    """24 slides of 24 patients, six sites, in the names of TCGA."""
    paths = {}
    for k in range(24):
        name = f"TCGA-{'ABCDEF'[k % 6] * 2}-{k:04d}-01Z-00-DX1"
        paths[name] = write_slide(tmp_path / f"{name}.svs", tissue_pixels(seed=k), 0.5, (1,))
    return paths


def test_sources_are_floors_and_the_pretrained(index, tmp_path, monkeypatch, every_sample_pays):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path))
    folder = export.export(tiny_vit(), tmp_path / "model")
    found = list(bag_study.sources(index, folder, Cut(48, 1.0)))
    assert [one.name for one in found] == ["colour histogram", "colour + LBP", "random weights", "pretrained"]
    assert [one[0].shape[1] for one in found] == [512, 36, 48, 48]
    assert not np.allclose(found[2][0], found[3][0])
    assert [one.mpp for one in found] == [None, None, 1.5, 1.5]  # 48 px at 1 um in an input of 32 px
    parts = found[2].pools()
    assert [one.name for one in parts] == [f"random weights ({pool})" for pool in ("cls", "mean", "both")]
    assert np.array_equal(np.concatenate([parts[0][1], parts[1][1]], axis=1), parts[2][1])
    assert found[0].pools() == [found[0]]
    for one in found[2:]:
        kept = one.provenance["bfloat16"]["neighbours"]
        assert 0.9 < kept <= 1
        assert one.provenance["precision"] == ("bfloat16" if kept >= 0.99 else "float32")


def test_networks_whose_neighbours_move_are_asked_in_float32(index, tmp_path, monkeypatch, every_sample_pays):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path))
    monkeypatch.setattr(extractors, "SAME_NEIGHBOURS", 1.1)
    folder = export.export(tiny_vit(), tmp_path / "model")
    found = list(bag_study.sources(index, folder, Cut(48, 1.0)))
    assert [one.provenance["precision"] for one in found[2:]] == ["float32"] * 2


def test_the_recorded_coin_is_a_coin():
    """A leak canary. Each interval misses 0.5 once in twenty by chance, so two rows may, and fewer than half."""
    path = runs.results_dir() / "bags.csv"
    if not path.exists():
        pytest.skip("no slide labels are recorded")
    table = pd.read_csv(path)
    table = table[table["features"] != "chance"]
    coin = table[(table["label"] == "B0") & (table["generator"] == runs.stamp()["generator"])]
    if coin.empty:
        pytest.skip("nothing is recorded for this generator")
    missed = coin[(coin["low"] > 0.5) | (coin["high"] < 0.5)]
    assert len(missed) <= 2 and 2 * len(missed) < len(coin), missed[["features", "head", "auc", "low", "high"]]
    assert coin["auc"].notna().all()


def test_a_row_a_label_and_the_coin_has_no_oracle(cohort, index, tmp_path):
    """Six slides, two of them copies: every AUC is nan, and says why."""
    from pathfm import Cohort

    rows = [0, 1, 2, 3, 0, 1]
    found = bags.extract("colour", index, Cut(48, 1.0), folder=tmp_path).subset(rows)
    labels = {"slide_id": [f"s{k}" for k in range(6)], "patient_id": list("aabbcc"), "B0": [0, 1] * 3, "B1": [0, 1] * 3}
    labels["role"] = np.repeat(["probe-train", "validate", "test"], 2)
    found = replace(found, slides=found.slides.assign(**labels))
    rows = bag_study.measure(
        Cohort(cohort.table.iloc[rows].assign(**labels), "tiny"), [found], {"mean": 1}, ("B0", "B1"), QUICK
    )
    measured = list(rows)
    assert [len(one.pairs) for one in measured] == [0] * 4  # one of the features makes no pair
    table = pd.concat([one.rows for one in measured], ignore_index=True)
    alone = ["chance", slide_floors.BY_SIZE]
    told = {label: rows["features"].tolist() for label, rows in table.groupby("label")}
    assert told == {"B0": [*alone, "colour"], "B1": ["oracle", *alone, "colour"]}
    assert table["auc"].isna().all() and table["reason"].str.contains("fewer than 10 of a class").all()


def test_tp53_goes_from_its_csv_to_a_score_by_fold(slides, tmp_path):
    """Labels in their CSV, slides in a folder: index, bags, a head a fold, every slide tested once."""
    label = np.array(tasks.about("tp53").classes or ("mutant", "wild type"))[np.arange(24) // 6 % 2]
    rows = pd.DataFrame({"slide_id": list(slides), "label": label, "cancer_type": "LUAD"})
    rows.to_csv(tmp_path / "labels.csv", index=False)
    labelled = tasks.read("tp53", tmp_path / "labels.csv", slides=tmp_path)
    index = SlideIndex.build(labelled.cohort(), tmp_path / "index", workers=0)
    found = bags.extract("colour", index, Cut(64, 1.0), folder=tmp_path / "bags")
    assert len(found) == 24 and {"label", "role", "patient_id"} <= set(found.slides)
    tested = []
    for _, fold in labelled.folds(3):
        one = found.of(fold.table.drop(columns="path"))
        tested += one.slides.loc[one.slides["role"] == "test", "slide_id"].tolist()
        assert one.slides.groupby("patient_id")["role"].nunique().max() == 1
    assert sorted(tested) == sorted(slides)
    with pytest.raises(InputError, match="the slides of colour have no column 'TP53'"):
        slide_probe.fit(found, "TP53")


def test_a_row_replaces_its_forerunner_and_leaves_all_others(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "results_dir", lambda: tmp_path)
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path))
    row = {"label": "B1", "features": "pretrained", "head": "abmil", "auc": 0.7, "runs": 20}
    row |= {"commit": "1234e56789", "date": "today", "device": "a", "generator": runs.stamp()["generator"]}
    for changes in (
        {},
        {"head": "transmil", "runs": 3},
        {"features": "oracle", "head": "latent"},
        {"label": "B0"},
        {"generator": "1-old", "auc": 0.1},
        {"auc": 0.8, "commit": "later"},
    ):
        table = bag_study.keep("bags", pd.DataFrame([{**row, **changes}]), ["label", "features", "head"])
    assert table[["label", "head", "auc", "runs", "commit"]].to_numpy().tolist() == [
        ["B0", "abmil", 0.7, 20, "1234e56789"],
        ["B1", "latent", 0.7, 20, "1234e56789"],
        ["B1", "abmil", 0.8, 20, "later"],
        ["B1", "transmil", 0.7, 3, "1234e56789"],
    ]
    assert runs.read_results("bags")[0].equals(table)
    shown = bag_study.by_head(table.assign(low=0.61, high=0.89))
    assert shown.columns.tolist() == ["abmil, 20 runs", "transmil, 3 runs", "latent"]
    assert shown.loc[("B1", "pretrained")].tolist() == ["0.80 [0.61, 0.89]", "0.70 [0.61, 0.89]", ""]


def test_the_gain_is_over_the_floor_of_highest_area(tmp_path, monkeypatch):
    """Bags of three vectors: one is the label, one noise, one nearly the label; and a size that says it in part."""
    rng, n = np.random.default_rng(0), 120
    y = np.arange(n) % 2
    role = np.repeat(["probe-train", "validate", "test"], 40)
    slides = pd.DataFrame({"slide_id": [f"s{k}" for k in range(n)], "role": role, "B1": y})
    slides = slides.assign(patient_id=slides["slide_id"], centre=[f"c{k // 2 % 2}" for k in range(n)], n_tiles=2)
    slides = slides.assign(width_px=100 + 10 * y + rng.integers(0, 15, n), height_px=100, mpp=1.0, tissue_mm2=1.0)
    how = SlideProtocol(runs=2, epochs=30, patience=30, standardise=True)

    def fitted(name, noise):
        files = []
        for k in range(n):
            files.append(tmp_path / f"{name}-{k}.npy")
            np.save(files[-1], (y[k] + noise * rng.normal(size=(2, 3))).astype(np.float32))
        empty = pd.DataFrame(columns=["slide_id", "reason"])
        return slide_probe.fit(bags.Bags(name, slides, files, [None] * n, empty), "B1", "mean", how)

    fits = {
        name: fitted(name, noise)
        for name, noise in (("colour + LBP", 3.0), ("random weights", 9.0), ("pretrained", 0.3))
    }
    alone = slide_floors.chance(slides) | slide_floors.size_alone(slides, "B1")
    rows, pairs = bag_study.contrasted(fits, alone)
    areas = rows.set_index("features")["auc"].to_dict()
    truth, _, who = slide_probe.asked([fits["colour + LBP"]])
    areas |= {name: roc.auc(truth, said.to_numpy(), who).value for name, said in alone.items()}
    own = rows.set_index("features").loc["pretrained"]
    best = max((name for name in areas if name != "pretrained"), key=areas.get)
    assert own["best_floor"] == best == slide_floors.BY_SIZE
    assert own["gain"] == pytest.approx(areas["pretrained"] - areas[best]) and own["gain_low"] <= own["gain"]
    assert rows["floor"].tolist() == [True, True, False] and rows["gain"].notna().tolist() == [False, False, True]
    assert rows["robustness_index"].notna().all() and rows["slide_dependence"].isna().all()
    assert pairs[["label", "head", "a", "b"]].iloc[-1].tolist() == ["B1", "mean", "random weights", "pretrained"]
    assert len(pairs) == 3 and pairs["p_holm"].iloc[-1] < 0.05
    shown = bag_study.beside(rows).set_index("features")
    assert shown["gain"].tolist() == ["", "", round(own["gain"], 2)] and shown["centre_identity"].notna().all()
    monkeypatch.setattr(runs, "results_dir", lambda: tmp_path)
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path))
    assert bag_study.pairs("B1").empty
    for _ in range(2):
        bag_study.keep("bags_pairs", pairs.assign(**runs.stamp()), ["label", "head", "a", "b"])
    assert bag_study.pairs("B1")["p_holm"].tolist() == pairs["p_holm"].round(2).tolist()
    assert bag_study.pairs("B2").empty


def test_a_head_that_is_none_is_named_before_anything_is_drawn():
    with pytest.raises(InputError, match=r"no head or label 'abmill'.*abmil"):
        bag_study.record(heads=["mean", "abmill"])
    with pytest.raises(InputError, match="no head or label 'B4'"):
        bag_study.record(labels=["B4"])
