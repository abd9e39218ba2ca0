"""The same command gives a backbone its row on masks and on slides: Dice, balanced accuracy, floors beside them."""

import pickle
from dataclasses import replace

import cloudpickle
import miniatures
import numpy as np
import pandas as pd
import pytest
from slide_files import tissue_pixels, write_slide

from pathfm import (
    InputError,
    bags,
    evaluation,
    export,
    jobs,
    leaderboard,
    roc,
    runs,
    segment,
    slide_floors,
    slide_probe,
    tasks,
    vit,
)
from pathfm.__main__ import main
from pathfm.segment import SegmentationProtocol
from pathfm.slide_probe import SlideProtocol

DECODER = SegmentationProtocol(input_px=32, steps=6, batch_size=4, patience=6, runs=2)
HEAD = SlideProtocol(runs=3, epochs=4, patience=4)


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "results_dir", lambda: tmp_path / "results")


@pytest.fixture
def small(tmp_path) -> str:
    model, _ = vit.make_backbone("vit_tiny_patch16_224", "random", img_size=32, depth=1, width=16, heads=2)
    return str(export.export(model, tmp_path / "small"))


@pytest.fixture
def consep(tmp_path):
    folder = tmp_path / "consep"
    return tasks.read(miniatures.consep(folder), folder)


def test_masks_give_a_row_with_the_gain_over_random_weights(consep, small):
    row, table = evaluation.masks(small, consep, "consep", DECODER)
    assert (row["metric"], row["part"], row["protocol"], row["runs"]) == ("Dice", "val", "eva-2026, changed", 2)
    assert row["note"] == "by image (too narrow); decoder of image" and table["interval"][0] == "by image (too narrow)"
    floors = ["random weights", "one class everywhere", *PIXELS]
    assert row["mpp"] == pytest.approx(mpp_of(consep)) and np.isnan(row["centre_identity"])  # one centre
    assert table["features"].tolist() == ["small", *floors] and table["dice"][0] == row["score"]
    best = int(table["dice"][1:].argmax())
    assert row["best_floor"] == floors[best]
    assert row["gain"] == pytest.approx(table["dice"][0] - table["dice"][best + 1], abs=1e-9)
    assert row["gain_low"] <= row["gain"] <= row["gain_high"] and row["n_tiles"] == 4
    kept = leaderboard.recorded() if leaderboard.record([row]) else None
    assert kept.iloc[0][["task", "metric"]].tolist() == ["consep", "Dice"]


PIXELS = ["colour of a pixel", "texture around a pixel", "colour + LBP around a pixel"]


def mpp_of(images) -> float:
    reported = images.table[images.table["role"] == "validate"]
    return float((reported["mpp"] * reported[["width_px", "height_px"]].min(axis=1)).median() / DECODER.input_px)


def test_masks_of_two_centres_have_them_beside_the_score(tmp_path, small, consep):
    """Twelve images a centre, and a class that most of the nuclei's pixels of each have."""
    table = pd.concat([consep.table] * 3, ignore_index=True)
    table["patient_id"] = [f"p{k}" for k in range(len(table))]
    table["centre"] = [f"c{k % 2}" for k in range(len(table))]
    table["role"] = np.where(np.arange(len(table)) < 6, "probe-train", "validate")
    row, shown = evaluation.masks(small, replace(consep, table=table), "consep", DECODER)
    assert 0 <= row["centre_identity"] <= 1 and row["centre_chance"] == 0.5
    assert shown["centre_identity"][0] == row["centre_identity"] and shown["centre_identity"][1:].isna().all()


def test_decoders_on_other_pieces_are_not_compared(consep, small):
    whole = segment.fit(small, consep, DECODER)
    part = segment.fit(small, consep.subset(np.arange(len(consep)) != 13), DECODER)
    with pytest.raises(InputError, match="small and small were scored on different pieces"):
        whole.gain(part)
    same = whole.gain(whole)
    assert same[:3] == (0, 0, 0) and same.n_patients is None


@pytest.fixture
def labels(tmp_path):
    """24 slides of 24 patients at six sites, a CSV of their labels, and the folder they lie in."""
    slides, rows = tmp_path / "slides", []
    slides.mkdir()
    for k in range(24):
        name = f"TCGA-{'ABCDEF'[k % 6] * 2}-{k:04d}-01Z-00-DX1"
        write_slide(slides / f"{name}.svs", tissue_pixels(seed=k), 0.5, (1,))
        rows.append((name, ("mutant", "wild type")[k // 6 % 2], "LUAD"))
    csv = tmp_path / "labels.csv"
    pd.DataFrame(rows, columns=["slide_id", "label", "cancer_type"]).to_csv(csv, index=False)
    return csv, slides


BY_PIXELS = ["colour mean and spread", "colour histogram", "colour + LBP"]
ALONE = ["chance", "cancer type alone", "site alone", "cancer type and site"]


def test_slides_give_a_row_of_all_runs(labels, small):
    slides = tasks.read("tp53", labels[0], slides=labels[1])
    row, table = evaluation.slide_labels(small, slides, "tp53", protocol=HEAD)
    told = ("balanced accuracy", "test", "eva-2026, changed", 3)
    assert (row["metric"], row["part"], row["protocol"], row["runs"]) == told
    assert table["features"].tolist() == ["small", "random weights", *BY_PIXELS, *ALONE]
    assert table["floor"].tolist() == [False] + [True] * 8
    assert table.set_index("features").loc["chance", "balanced_accuracy"] == 0.5
    assert table["auc"].isna().all() and np.isnan(row["auc"])  # too few of a class
    assert row["best_floor"] in set(table["features"][1:])
    assert row["note"].startswith("by patient; our split by site, seed 0; abmil; pool cls; ")
    assert row["note"].endswith("slide dependence is n/a of one vector a slide")
    assert row["mpp"] == pytest.approx(0.5 * 224 / 32) and table["mpp"][:2].tolist() == [row["mpp"]] * 2


def test_five_folds_by_site_are_one_row_of_every_slide(labels, small, monkeypatch):
    """Every slide tests once, by heads and floors that never saw its hospital."""
    slides = tasks.read("tp53", labels[0], slides=labels[1])
    monkeypatch.setattr(roc, "MIN_EACH", 6)
    row, table = evaluation.slide_labels(small, slides, "tp53", "mean", HEAD, folds=5)
    assert (row["task"], row["n_tiles"], row["n_patients"], row["runs"]) == ("tp53, 5 folds by site", 24, 24, 3)
    assert row["low"] <= row["score"] <= row["high"] and row["auc_low"] <= row["auc"] <= row["auc_high"]
    table = table.set_index("features")
    assert table.loc["site alone", ["balanced_accuracy", "auc"]].tolist() == [0.5, 0.5]  # unseen: the rate of all
    assert table["n_tiles"].eq(24).all() and leaderboard.plain(row["task"]) == "tp53"
    assert "each slide tests in one of 5 folds by site" in row["note"]
    single = evaluation.slide_labels(small, slides, "tp53", "mean", HEAD).row
    assert single["task"] == "tp53" and single["n_patients"] < 24
    own = replace(slides, split="the table's own roles")
    with pytest.raises(InputError, match="tp53 has the table's own roles; folds are of a CSV of labels without"):
        evaluation.slide_labels(small, own, "tp53", folds=5)


def test_the_hospital_alone_is_a_floor_with_its_auc(labels, small, monkeypatch):
    """Sites that train and test, and decide the label: the floor of the site is right about every slide."""
    table = pd.read_csv(labels[0])
    site = table["slide_id"].str[5:7]
    table["label"] = np.where(site.isin(["AA", "CC", "EE"]), "mutant", "wild type")
    table["role"] = np.array(["probe-train", "validate", "test", "test"])[np.arange(24) // 6]
    table.to_csv(labels[0], index=False)
    slides = tasks.read("tp53", labels[0], slides=labels[1])
    monkeypatch.setattr(roc, "MIN_EACH", 6)
    row, found = evaluation.slide_labels(small, slides, "tp53", "mean", HEAD)
    found = found.set_index("features")
    assert found.loc["site alone", ["balanced_accuracy", "auc"]].tolist() == [1, 1]
    assert found.loc["cancer type alone", ["balanced_accuracy", "auc"]].tolist() == [0.5, 0.5]
    assert found.loc[row["best_floor"], "balanced_accuracy"] == 1
    assert row["gain"] == pytest.approx(row["score"] - 1) and row["protocol"] == "eva-2026, mean, changed"
    assert row["auc"] == found.loc["small", "auc"] and row["auc_low"] <= row["auc"] <= row["auc_high"]
    assert "the table's own roles" in row["note"]
    kept = leaderboard.recorded() if leaderboard.record([row]) else None
    assert kept["auc"].iloc[0] == pytest.approx(row["auc"], abs=1e-4)


def test_size_alone_says_what_size_says():
    n = np.arange(40)
    roles = np.array(["probe-train", "probe-train", "validate", "test"])[n % 4]
    slides = pd.DataFrame({"slide_id": [f"s{k}" for k in n], "role": roles, "label": np.array(["a", "b"])[n // 4 % 2]})
    slides = slides.assign(height_px=500, mpp=0.5, tissue_mm2=2.0)
    told = slide_floors.size_alone(slides.assign(width_px=np.where(slides["label"] == "b", 900, 300)))
    test = slides[slides["role"] == "test"].set_index("slide_id")
    assert ((told["size, mpp and tissue area alone"] > 0) == (test["label"] == "b")).all()
    assert not slide_floors.size_alone(slides.assign(width_px=700))


def test_the_answer_of_all_runs_is_the_mean_of_their_scores(labels):
    from pathfm import SlideIndex, bags
    from pathfm.bags import Cut

    slides = tasks.read("tp53", labels[0], slides=labels[1])
    index = SlideIndex.build(slides.cohort())
    fitted = slide_probe.fit(bags.extract("colour", index, Cut(64, 1.0)), "label", "mean", HEAD)
    whole, each = slide_probe.answer([fitted]), fitted.predictions()
    assert whole.balanced_accuracy == pytest.approx(np.mean([one.balanced_accuracy for one in each]))
    assert whole.settings["scores"] == [one.balanced_accuracy for one in each]
    assert set(whole.table["predicted"]) <= set(fitted.classes)


def test_workers_embed_the_slides_of_backbone_and_floors(labels, small, tmp_path, monkeypatch):
    """What is sent names each network and can be pickled; test_bags has workers of flesh and blood."""
    monkeypatch.setattr(evaluation, "SLIDE_FLOORS", ("colour",))
    slides, sent, own = tasks.read("tp53", labels[0], slides=labels[1]), [], jobs.run

    def run(function, todo, crashed, workers=0, scheduler=None, **how):
        todo = {key: pickle.loads(cloudpickle.dumps(arguments)) for key, arguments in todo.items()}
        sent.extend(((workers or 0, scheduler), arguments[0]) for arguments in todo.values())
        return own(function, todo, crashed)

    monkeypatch.setattr(jobs, "run", run)
    monkeypatch.setattr(evaluation, "SlideProtocol", lambda: HEAD)
    told = ["evaluate", small, str(labels[0]), "--task", "tp53", "--slides", str(labels[1]), "--head", "mean"]
    assert main([*told, "--scheduler", "tcp://host:8786", "--record", "true"]) == 0
    assert {where for where, _ in sent} == {(0, "tcp://host:8786")}
    names = [source.folder for _, source in sent if isinstance(source, bags.Source)]
    assert len(sent) == 4 * 24 and names == [small] * 24 + [f"twin:{small}"] * 24  # the index and three bags
    monkeypatch.setattr(jobs, "run", own)
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "another"))
    alone, _ = evaluation.slide_labels(small, slides, "tp53", "mean", HEAD)
    assert leaderboard.recorded()["score"][0] == pytest.approx(alone["score"], abs=1e-4)


def test_the_command_line_scores_masks_and_slides(labels, tmp_path, small, monkeypatch, capsys):
    monkeypatch.setitem(segment.EVA, "consep", DECODER)
    monkeypatch.setattr(evaluation, "SlideProtocol", lambda: HEAD)
    task = miniatures.consep(tmp_path / "consep")
    monkeypatch.setitem(tasks.TASKS, "consep", task)
    told = ["evaluate", small, str(tmp_path / "consep"), "--task", "consep", "--decoder", "tokens", "--record", "true"]
    assert main(told) == 0 and "dice" in capsys.readouterr().out
    assert main([*told, "--split", "official", "--decoder", "image"]) == 0
    assert main([*told, "--workers", "2"]) == 2
    assert "workers and scheduler are of slides; consep is embedded in this process" in capsys.readouterr().err
    assert main([*told, "--layers", "2"]) == 2
    assert "consep is scored on the last block" in capsys.readouterr().err
    told = ["evaluate", small, str(labels[0]), "--task", "tp53", "--slides", str(labels[1]), "--head", "mean"]
    assert main([*told, "--record", "true"]) == 0
    kept = leaderboard.recorded().set_index("task")
    assert set(kept.index) == {"consep (clean split)", "consep", "tp53"}  # no split replaces the other
    assert kept["protocol"].tolist() == ["eva-2026, tokens", "eva-2026", "eva-2026, mean"]
    assert kept["part"].tolist() == ["test", "val", "test"]
    assert kept.loc["consep (clean split)", "note"] == "by image (too narrow); decoder of tokens"
    assert kept.loc["tp53", "note"].startswith("by patient; our split by site, seed 0; mean; pool cls; ")
    assert main([told[0], small, str(tmp_path / "consep"), "--task", "consep", "--folds", "5"]) == 2
    assert "folds are of slides; consep has none" in capsys.readouterr().err
    for name, value, message in (
        ("--learning-rates", "1e-4", "learning_rates are of eva's heads on tiles; tp53 is of slides"),
        ("--layers", "2", "1 blocks, not the 2 layers asked for"),
    ):
        assert main([*told, name, value]) == 2
        assert message in capsys.readouterr().err
    assert main([*told, "--precision", "bfloat16", "--pool", "mean", "--device", "cpu", "--record", "true"]) == 0
    kept = leaderboard.recorded().query("task == 'tp53'").set_index("model")
    assert set(kept.index) == {"small", "small (mean, bfloat16)"}
    assert "bfloat16: bfloat16 leaves" in kept.loc["small (mean, bfloat16)", "note"]
    assert main([*told, "--protocol", "linear"]) == 2
    assert "tp53 is scored by eva-2026 and not by 'linear'" in capsys.readouterr().err
