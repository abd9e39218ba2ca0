"""Our probes beside eva's own: the same embeddings and protocol, the same scores; an exported backbone inside eva."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from pathfm import eva, heads
from pathfm.__main__ import main
from pathfm.errors import InputError
from pathfm.export import load
from pathfm.metrics import balanced_accuracy
from pathfm.protocols import protocol


def clouds(classes, signal, seed=0, sizes=(500, 250, 400), d=64):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, sum(sizes))
    x = signal * rng.normal(size=(classes, d))[y] + rng.normal(size=(len(y), d))
    splits = dict(zip(("train", "val", "test"), np.split(np.arange(len(y)), np.cumsum(sizes)[:2]), strict=True))
    return x.astype(np.float32), y, splits


def agree(theirs, ours):
    """Half a point, or two standard errors of the difference of the means."""
    error = 2 * np.sqrt(theirs.var(ddof=1) / len(theirs) + np.var(ours, ddof=1) / len(ours))
    return abs(theirs.mean() - np.mean(ours)) <= max(0.005, error)


@pytest.mark.eva
@pytest.mark.parametrize(("classes", "signal"), [(2, 0.25), (5, 0.35)])
def test_scores_and_steps_are_those_of_eva(eva_python, tmp_path, classes, signal):
    x, y, splits = clouds(classes, signal)
    chosen = protocol("eva-2026", 500, 250, classes, max_steps=80)
    chosen = replace(chosen, lr=1e-2, patience=10)  # quick to settle: runs stop early
    files = eva.write_embeddings(tmp_path / "embeddings", x, y, splits)
    config = eva.configuration(chosen, files, tmp_path / "out", x.shape[1], classes)
    theirs = eva.run("fit", config, eva_python)
    found = heads.fit(replace(chosen, runs=20), x, y, splits["train"], splits["val"])
    test = [balanced_accuracy(y[splits["test"]], one) for one in found.answers(x, splits["test"])[0]]
    assert 0.5 < theirs["test"].mean() < 0.95 and len(theirs) == 5
    assert agree(theirs["test"], test) and agree(theirs["validate"], found.validate[0])
    for steps, mine in ((theirs["kept"], found.kept[0]), (theirs["stopped"], found.stopped[0])):
        error = 3 * np.sqrt(steps.var(ddof=1) / 5 + mine.var(ddof=1) / 20)
        assert abs(steps.mean() - mine.mean()) <= max(4, error)


@pytest.mark.eva
def test_an_exported_backbone_runs_in_eva(eva_python, exported, tmp_path):
    photos = tmp_path / "bach" / "ICIAR2018_BACH_Challenge" / "Photos"
    rng, images = np.random.default_rng(0), {}
    for index, label in enumerate(("Benign", "InSitu", "Invasive", "Normal")):
        (photos / label).mkdir(parents=True)
        for number in range(100):
            noise = rng.normal(60 + 40 * index, 40, (64, 64, 3))
            images[f"{label}/{number:03d}"] = noise.clip(0, 255).astype(np.uint8)
            Image.fromarray(images[f"{label}/{number:03d}"]).save(photos / label / f"{number:03d}.tif")
    config = eva.backbone_configuration(exported, "bach", tmp_path / "bach", tmp_path / "out", max_steps=40, workers=0)
    table = eva.run("predict_fit", config, eva_python)
    assert len(table) == 5 and (table["kept"] <= table["stopped"]).all() and (table["stopped"] <= 40).all()
    manifest = pd.read_csv(tmp_path / "out" / "embeddings" / "manifest.csv")
    assert manifest["split"].value_counts().to_dict() == {"train": 268, "val": 132}
    model, preprocess = load(exported)
    with torch.inference_mode():
        ours = model(preprocess(np.stack([images[name.removesuffix(".tif")] for name in manifest["origin"]])))
    files = [torch.load(tmp_path / "out" / "embeddings" / file)[0] for file in manifest["embeddings"]]
    assert torch.allclose(torch.stack([one.flatten() for one in files]), ours, atol=1e-4)
    y, split = manifest["target"].to_numpy(), manifest["split"].to_numpy()
    chosen = replace(protocol("eva-2026", 268, 132, 4, max_steps=40), runs=20)
    found = heads.fit(chosen, ours.numpy(), y, np.flatnonzero(split == "train"), np.flatnonzero(split == "val"))
    # predict_fit builds the head before it copies the model, so eva's runs share one start; it is one of ours.
    assert abs(table["validate"].mean() - found.validate.mean()) <= 3 * found.validate.std(ddof=1)


def test_the_configuration_holds_the_protocol(exported, tmp_path):
    config = eva.backbone_configuration(exported, "pcam", "data", tmp_path / "out")
    path = eva.write(config, tmp_path / "pcam.yaml")
    read = yaml.safe_load(path.read_text())
    trainer, model, data = (read[part]["init_args"] for part in ("trainer", "model", "data"))
    checkpoint, stopping, writer = (one["init_args"] for one in trainer["callbacks"])
    assert (trainer["max_steps"], trainer["n_runs"], stopping["patience"]) == (12_500, 5, 3)
    assert checkpoint["monitor"] == stopping["monitor"] == "val/BinaryBalancedAccuracy"
    assert (model["head"]["init_args"], model["criterion"]) == (
        {"in_features": 48, "out_features": 1},
        "torch.nn.BCEWithLogitsLoss",
    )
    assert model["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}}
    assert [one["init_args"]["split"] for one in data["datasets"]["predict"]] == ["train", "val", "test"]
    assert writer["backbone"]["init_args"]["arguments"]["model_name"] == f"local-dir:{exported}"
    assert data["datasets"]["predict"][0]["init_args"]["transforms"]["init_args"]["size"] == 64
    shots = eva.backbone_configuration(exported, "pcam_10shot", "data", tmp_path)["data"]["init_args"]["samplers"]
    assert shots["train"]["init_args"] == {"num_samples": 10, "reset_generator": False}


def test_the_command_line_writes_the_configuration(exported, tmp_path, capsys):
    assert main(["eva-config", str(exported), "bach", "data", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "eva.yaml"
    assert capsys.readouterr().out == f"eva predict_fit --config {path}\n"
    assert yaml.safe_load(path.read_text()) == eva.backbone_configuration(exported, "bach", "data", tmp_path / "out")
    assert main(["eva-config", str(exported), "bahc", "data", str(tmp_path)]) == 2
    assert "Did you mean 'bach'" in capsys.readouterr().err


def test_the_configuration_of_2024_has_its_schedule_and_metric(tmp_path):
    chosen = protocol("eva-2024", 2175, 977, 2)
    config = eva.configuration(chosen, "embeddings", tmp_path, 8, 2)
    model = config["model"]["init_args"]
    assert model["optimizer"]["init_args"] == {"lr": pytest.approx(0.000625), "momentum": 0.9}
    assert model["lr_scheduler"]["init_args"] == {"T_max": 12_500}
    stopping = config["trainer"]["init_args"]["callbacks"][1]["init_args"]
    assert (stopping["monitor"], stopping["patience"]) == ("val/BinaryAccuracy", 51)


def test_results_name_the_steps_of_each_run(tmp_path):
    config = eva.configuration(protocol("eva-2026", 100, 50, 3), "embeddings", tmp_path, 8, 3)
    with pytest.raises(InputError, match="holds no results"):
        eva.results(tmp_path, config)
    score = {
        "val": [{"val/MulticlassAccuracy": {"values": [0.7]}}],
        "test": [{"test/MulticlassAccuracy": {"values": [0.6]}}],
    }
    (tmp_path / "session" / "run_0").mkdir(parents=True)
    (tmp_path / "session" / "results.json").write_text(json.dumps({"metrics": score}))
    log = "step,lr,val/MulticlassAccuracy\n0,1,\n2,,0.5\n5,,0.7\n8,,0.7\n9,,0.7\n"
    (tmp_path / "session" / "run_0" / "metrics.csv").write_text(log)
    expected = {"validate": 0.7, "test": 0.6, "kept": 6, "stopped": 9}
    assert eva.results(tmp_path, config).to_dict("records") == [expected]


def test_unknown_tasks_and_a_missing_eva_are_named(exported, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="Did you mean 'mhist'"):
        eva.backbone_configuration(exported, "mhits", "data", tmp_path)
    with pytest.raises(InputError, match="no folder"):
        eva.backbone_configuration(tmp_path / "nothing", "mhist", "data", tmp_path)
    monkeypatch.setenv("PATHFM_EVA_PYTHON", str(tmp_path / "python"))
    with pytest.raises(InputError, match="PATHFM_EVA_PYTHON"):
        eva.interpreter()
