"""One command gives any backbone its row: public tasks, folders, CSVs, and PathoROB's index."""

from functools import partial

import miniatures
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pathfm import (
    InputError,
    TileSet,
    backbones,
    board,
    confounding,
    evaluation,
    export,
    leaderboard,
    metrics,
    probe,
    runs,
    tasks,
    vit,
)
from pathfm.__main__ import main
from pathfm.features import extract
from pathfm.tasks import pathorob

NAME = "small"


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A cache and a folder of results of the test's own."""
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "results_dir", lambda: tmp_path / "results")


@pytest.fixture
def small(tmp_path) -> str:
    """The folder of an exported backbone, of random weights."""
    model, _ = vit.make_backbone("vit_tiny_patch16_224", "random", img_size=32, depth=1, width=16, heads=2)
    return str(export.export(model, tmp_path / NAME))


def coloured(folder, patients=6, each=4):
    """Two classes of colour with a manifest that says the patient and centre."""
    rows, rng = [], np.random.default_rng(0)
    for patient in range(patients):
        for i in range(each):
            label = "red" if i % 2 else "blue"
            pixels = rng.integers(0, 60, (16, 16, 3), np.uint8)
            pixels[..., 0 if label == "red" else 2] += 150
            name = f"{patient}-{i}.png"
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / name)
            rows.append((name, label, f"p{patient}", f"c{patient % 2}", f"p{patient}"))
    columns = ["file", "label", "patient_id", "centre", "slide_id"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "manifest.csv", index=False)
    return folder


def test_the_row_is_that_of_the_probe_with_its_floors(tmp_path, small):
    tiles = evaluation.labelled(coloured(tmp_path / "data"))
    assert set(tiles.table["role"]) == {"probe-train", "validate", "test"}
    row, table = evaluation.evaluate(small, tiles, pretrained_on="none", name="mine", pool="mean")
    features = extract(*_loaded(small, tiles), pool="mean", name="mine")
    assert row["score"] == probe.linear(features).balanced_accuracy
    assert table.iloc[0]["features"] == "mine" and table["floor"].sum() >= 5
    assert row["best_floor"] in set(table.loc[table["floor"], "features"])
    assert set(confounding.COLUMNS) <= set(table) and table[list(confounding.COLUMNS)].iloc[1:].isna().all(axis=None)
    told = ("mine (mean)", "data", "test", "linear")
    assert (row["model"], row["task"], row["part"], row["protocol"]) == told
    assert (
        row["note"].endswith("; pool mean")
        and row["n_patients"] == tiles.table.query("role == 'test'")["patient_id"].nunique()
    )


def _loaded(small: str, tiles: TileSet):
    model, preprocess = backbones.load(small)
    return model, tiles, preprocess


def test_the_command_line_scores_a_folder_a_class_and_records_it(tmp_path, capsys, small):
    rng = np.random.default_rng(1)
    for i in range(20):
        path = tmp_path / "classes" / ("ab"[i % 2]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    options = ["--protocol", "kNN", "--pretrained-on", "none", "--record", "1"]
    assert main(["evaluate", small, str(tmp_path / "classes"), *options]) == 0
    printed = capsys.readouterr().out
    assert "colour histogram" in printed and "probes.csv" in printed
    kept = leaderboard.recorded().iloc[0]
    assert (kept["model"], kept["task"], kept["protocol"]) == (NAME, "classes", "kNN")
    assert kept["note"] == "by image (too narrow); pool cls"
    assert main(["leaderboard", "--protocol", "kNN"]) == 0
    assert NAME in capsys.readouterr().out


def test_a_column_of_a_csv_may_play_the_patient(tmp_path, small, capsys):
    csv = coloured(tmp_path / "data") / "manifest.csv"
    table = pd.read_csv(csv).rename(columns={"patient_id": "block"}).drop(columns="slide_id")
    table.to_csv(csv, index=False)
    assert main(["evaluate", small, str(csv), "--patient", "block", "--protocol", "kNN", "--record", "true"]) == 0
    assert leaderboard.recorded().iloc[0]["note"] == "by patient; pool cls"
    assert main(["evaluate", small, str(csv), "--patient", "blok"]) == 2
    assert "Did you mean 'block'" in capsys.readouterr().err


def test_a_public_task_takes_its_clean_split(tmp_path):
    miniatures.mhist(tmp_path / "data")
    tiles = evaluation.labelled(tmp_path / "data", "mhist", allow_partial=True)
    assert "clean split" in tiles.name and set(tiles.table["role"]) == {"probe-train", "validate", "test"}
    official = evaluation.labelled(tmp_path / "data", "mhist", "official", allow_partial=True)
    with pytest.raises(InputError, match="mhist.* stops and reports on the same images; take split 'clean'"):
        evaluation.evaluate("small", official)
    with pytest.raises(InputError, match="partial download"):
        evaluation.labelled(tmp_path / "data", "mhist")


@pytest.mark.parametrize("protocol", ["eva-2024", "eva-2026", "logistic", "SimpleShot"])
def test_other_protocols_report_on_validate_where_the_official_split_does(tmp_path, small, protocol, monkeypatch):
    if protocol.startswith("eva"):
        monkeypatch.setitem(evaluation.PROTOCOLS, protocol, partial(probe.eva, name=protocol, max_steps=40))
    miniatures.mhist(tmp_path / "data")
    tiles = evaluation.labelled(tmp_path / "data", "mhist", "official", allow_partial=True)
    row, table = evaluation.evaluate(small, tiles, "mhist", protocol, name="mine")
    assert (row["part"], row["protocol"], row["task"]) == ("val", protocol, "mhist, partial: 24 of 3,152")
    assert row["n_tiles"] == (tiles.table["role"] == "validate").sum() and 0 <= row["score"] <= 1
    assert row["runs"] == (5 if protocol.startswith("eva") else 1) and table["probe"].eq(protocol).all()
    leaderboard.record([row])
    shown = board.wide(leaderboard.rows(protocol))
    assert "mine" in set(shown["model"]) and "mhist, partial: 24 of 3,152 val" in shown


@pytest.mark.parametrize(
    ("protocol", "metric", "runs"),
    [("few-shot-2", "balanced accuracy", 1000), ("retrieval-3", "acc@3", 1), ("kNN (centred)", "balanced accuracy", 1)],
)
def test_unis_protocols_have_rows_with_intervals_and_floors(tmp_path, small, protocol, metric, runs):
    tiles = evaluation.labelled(coloured(tmp_path / "data", patients=10))
    row, table = evaluation.evaluate(small, tiles, protocol=protocol, pool="both")
    assert (row["protocol"], row["metric"], row["runs"]) == (protocol, metric, runs)
    assert row["low"] <= row["score"] <= row["high"] and row["mpp"] is None
    names, floors = set(table["features"]), table.set_index("features")["balanced_accuracy"]
    twins = {name for name in names if name.startswith("random weights")}
    # the best pooling where validate says which, else each of them
    assert len(twins) == (1 if protocol.startswith("kNN") else 3) and {"colour histogram", "colour + LBP"} <= names
    rest = (tiles.table["role"] == "probe-train").sum()
    reds = ((tiles.table["role"] == "probe-train") & (tiles.table["label"] == "red")).sum()
    chance = 1 - np.prod([(rest - reds - i) / (rest - i) for i in range(3)]) if "retrieval" in protocol else 0.5
    assert floors["chance"] == pytest.approx(chance, abs=0.02)
    features = extract(*_loaded(small, tiles), pool="both")
    if protocol == "few-shot-2":
        shown = probe.few_shot(features, [2]).iloc[0]
        assert row["score"] == pytest.approx(shown["balanced_accuracy"])
        assert row["spread"] == pytest.approx(shown["sd"], rel=1e-3)
    if protocol == "retrieval-3":
        answer = evaluation.PROTOCOLS[protocol](features).table
        assert answer["right"].mean() == pytest.approx(probe.retrieval(features)["acc@3"])


def test_pathorob_gets_its_index(tmp_path, small):
    task = miniatures.pathorob(tmp_path, "pathorob_camelyon", slides=4, tiles=4)
    table = tasks.read(task, tmp_path)
    for name in table["file"].unique():
        miniatures.picture(tmp_path / "images" / f"{name}.png")
    row, scored = evaluation.robustness(small, task, tmp_path, tmp_path / "images", pretrained_on="none")
    tiles = pathorob.tiles(task, table, tmp_path / "images")
    x, kept = pathorob.align(extract(*_loaded(small, tiles)).x, tiles, table)
    assert row["score"] == pathorob.robustness(task, x, kept)["robustness_index"]
    assert (row["protocol"], row["metric"], row["part"]) == ("pathorob-2025", "robustness index", "all")
    floors = ["colour mean and spread", "colour histogram", "texture (LBP)", "colour + LBP"]
    floors += [f"random weights ({pool})" for pool in ("cls", "mean", "both")] + ["chance"]
    assert scored["features"].tolist() == [NAME, *floors] and scored["floor"].tolist() == [False] + [True] * 8
    best = scored.iloc[1:].set_index("features")["robustness_index"]
    assert row["best_floor"] == best.idxmax() and row["gain"] == pytest.approx(row["score"] - best.max())
    assert row["low"] <= row["score"] <= row["high"] and row["mpp"] is task.mpp is None
    found = metrics.centre_identity(x, kept["centre"], kept["patient_id"])
    assert row["centre_identity"] == found.value and row["centre_chance"] == 0.5
    leaderboard.record([row])
    shown = board.wide(leaderboard.rows("pathorob-2025")).set_index("model")
    assert shown.loc[[NAME, "kaiko B/8"], "pathorob_camelyon"].notna().all()


def test_what_cannot_be_evaluated_is_said(tmp_path, small):
    tiles = evaluation.labelled(coloured(tmp_path / "data"))
    with pytest.raises(InputError, match="unknown protocol 'linaer'. Did you mean 'linear'"):
        evaluation.evaluate(small, tiles, protocol="linaer")
    with pytest.raises(InputError, match="consep is no task of labelled tiles"):
        evaluation.labelled(tmp_path, "consep")
    with pytest.raises(InputError, match="no task 'bahc'"):
        evaluation.labelled(tmp_path, "bahc")
    network = "nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())"
    (tmp_path / "hubconf.py").write_text(f"from torch import nn\ndef flat():\n    return {network}\n")
    flat, said = f"hub:{tmp_path}:flat", {"mean": 0.5, "std": 0.5, "input_px": 16}
    with pytest.raises(InputError, match="gives one vector an image and no patch tokens; take pool='cls'"):
        evaluation.evaluate(flat, tiles, pool="mean", **said)
    row, table = evaluation.evaluate(flat, tiles, **said)
    assert row["score"] == 1 and "random weights (cls)" in set(table["features"])  # the colour is the class
