"""The same command gives a backbone its row on masks and on slides: Dice, balanced accuracy, floors beside them."""

import miniatures
import numpy as np
import pandas as pd
import pytest
from slide_files import tissue_pixels, write_slide

from pathfm import InputError, evaluation, export, leaderboard, runs, segment, slide_probe, tasks, vit
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
    assert (row["metric"], row["part"], row["protocol"], row["runs"]) == ("Dice", "val", "eva-2026", 2)
    assert table["features"].tolist() == ["small", "random weights"] and table["dice"][0] == row["score"]
    assert row["gain"] == pytest.approx(table["dice"][0] - table["dice"][1], abs=1e-9)
    assert row["gain_low"] <= row["gain"] <= row["gain_high"] and row["n_tiles"] == 4
    kept = leaderboard.recorded() if leaderboard.record([row]) else None
    assert kept.iloc[0][["task", "metric"]].tolist() == ["consep", "Dice"]


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


def test_slides_give_a_row_of_all_runs(labels, small):
    slides = tasks.read("tp53", labels[0], slides=labels[1])
    row, table = evaluation.slide_labels(small, slides, "tp53", protocol=HEAD)
    assert (row["metric"], row["part"], row["protocol"], row["runs"]) == ("balanced accuracy", "test", "eva-2026", 3)
    assert table["features"].tolist() == ["small", "random weights", "colour + LBP"]
    assert table["floor"].tolist() == [False, True, True] and table["auc"].isna().all()  # too few of a class
    assert row["best_floor"] in ("random weights", "colour + LBP") and "abmil; pool cls" in row["note"]


def test_the_answer_of_all_runs_is_the_mean_of_their_scores(labels):
    from pathfm import SlideIndex, bags
    from pathfm.bags import Cut

    slides = tasks.read("tp53", labels[0], slides=labels[1])
    index = SlideIndex.build(slides.cohort())
    fitted = slide_probe.fit(bags.extract("colour", index, Cut(64, 1.0)), "label", "mean", HEAD)
    whole, each = fitted.answer(), fitted.predictions()
    assert whole.balanced_accuracy == pytest.approx(np.mean([one.balanced_accuracy for one in each]))
    assert whole.settings["scores"] == [one.balanced_accuracy for one in each]
    assert set(whole.table["predicted"]) <= set(fitted.classes)


def test_the_command_line_scores_masks_and_slides(labels, tmp_path, small, monkeypatch, capsys):
    monkeypatch.setitem(segment.EVA, "consep", DECODER)
    monkeypatch.setattr(evaluation, "SlideProtocol", lambda: HEAD)
    task = miniatures.consep(tmp_path / "consep")
    monkeypatch.setitem(tasks.TASKS, "consep", task)
    told = ["evaluate", small, str(tmp_path / "consep"), "--task", "consep", "--decoder", "tokens", "--record", "true"]
    assert main(told) == 0 and "dice" in capsys.readouterr().out
    told = ["evaluate", small, str(labels[0]), "--task", "tp53", "--slides", str(labels[1]), "--head", "mean"]
    assert main([*told, "--record", "true"]) == 0
    kept = leaderboard.recorded().set_index("task")
    assert kept.loc["consep", "note"] == "decoder of tokens" and kept.loc["tp53", "note"].endswith("mean; pool cls")
    assert main([*told, "--protocol", "linear"]) == 2
    assert "tp53 is scored by eva-2026 and not by 'linear'" in capsys.readouterr().err
