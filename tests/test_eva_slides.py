"""Slide labels in eva itself: its ABMIL on our bags comes to our scores, and the configuration holds its settings."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from test_eva_masks import parts
from test_slide_probe import made

from pathfm import eva, eva_slides, slide_probe
from pathfm.__main__ import main
from pathfm.errors import InputError


@pytest.mark.eva
def test_evas_abmil_comes_to_our_scores(eva_python, tmp_path):
    bags, classes = made(tmp_path / "bags", n=144, classes=3, signal=0.8), 3
    protocol = slide_probe.SlideProtocol(runs=4, epochs=12, patience=6, batch_size=16)
    folder = eva_slides.write_bags(tmp_path / "embeddings", bags)
    config = eva_slides.configuration(protocol, folder, tmp_path / "out", bags[0].shape[1], classes, tiles=16)
    theirs = eva_slides.results(eva.execute("fit", config, eva_python), classes)
    ours = slide_probe.fit(bags, protocol=replace(protocol, runs=16))
    test = [one.balanced_accuracy for one in ours.predictions()]
    assert len(theirs) == 4
    for found, mine in ((theirs["validate"], ours.validate), (theirs["test"], np.array(test))):
        assert abs(found.mean() - mine.mean()) <= 3 * np.hypot(found.std() / 2, mine.std(ddof=1) / 4) + 0.01


def test_bags_are_written_as_eva_reads_them(tmp_path):
    bags = made(tmp_path / "bags", n=12)
    folder = eva_slides.write_bags(tmp_path / "out", bags)
    lines = (folder / "manifest.csv").read_text().splitlines()
    assert lines[0] == "origin,embeddings,target,split,wsi_id" and len(lines) == 13
    assert lines[1] == "s0,0.pt,0,train,s0" and lines[8] == "s7,7.pt,1,val,s7"
    assert np.array_equal(torch.load(folder / "3.pt").numpy(), bags[3])


def test_the_configuration_holds_evas_settings(exported, tmp_path):
    trainer, model, data = parts(eva_slides.backbone_configuration(exported, "camelyon16_small", "data", tmp_path))
    assert (trainer["max_epochs"], trainer["n_runs"]) == (100, 20) and "max_steps" not in trainer
    checkpoint, stopping, writer = (one["init_args"] for one in trainer["callbacks"])
    assert stopping["patience"] == 20 and checkpoint["monitor"] == "val/BinaryBalancedAccuracy"
    assert (writer["metadata_keys"], writer["save_every_n"]) == (["wsi_id"], 10_000)
    assert model["head"]["init_args"] == {"input_size": 48, "output_size": 1, "projected_input_size": 128}
    assert model["optimizer"]["init_args"]["lr"] == 1e-3 and model["criterion"] == "torch.nn.BCEWithLogitsLoss"
    train, cut = data["datasets"]["train"]["init_args"], data["datasets"]["predict"][0]["init_args"]
    assert train["embeddings_transforms"]["init_args"] == {"pad_size": 1000}
    assert cut["sampler"]["init_args"] == {"max_samples": 1000} and (cut["width"], cut["target_mpp"]) == (224, 0.25)
    assert [one["init_args"]["split"] for one in data["datasets"]["predict"]] == ["train", "val", "test"]


def test_panda_has_six_grades_and_its_labels_beside_the_slides(exported, tmp_path):
    trainer, model, data = parts(eva_slides.backbone_configuration(exported, "panda_small", "data", tmp_path, epochs=3))
    assert trainer["callbacks"][0]["init_args"]["monitor"] == "val/MulticlassAccuracy" and trainer["max_epochs"] == 3
    assert model["head"]["init_args"]["output_size"] == 6 and model["criterion"] == "torch.nn.CrossEntropyLoss"
    assert "target_transforms" not in data["datasets"]["val"]["init_args"]
    cut = data["datasets"]["predict"][2]["init_args"]
    assert (cut["download_dir"], cut["target_mpp"], cut["split"]) == ("data", 0.5, "test")
    assert cut["sampler"]["init_args"] == {"max_samples": 200}


def test_the_command_line_writes_it(exported, tmp_path, capsys):
    assert main(["eva-config", str(exported), "panda_small", "data", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "eva.yaml"
    assert capsys.readouterr().out == f"eva predict_fit --config {path}\n"
    expected = eva_slides.backbone_configuration(exported, "panda_small", "data", tmp_path / "out")
    assert yaml.safe_load(path.read_text()) == expected
    with pytest.raises(InputError, match="no slides of 'panda' by this name. Did you mean 'panda_small'"):
        eva_slides.backbone_configuration(exported, "panda", "data", tmp_path)


def test_results_are_read_for_two_classes_and_more(tmp_path):
    scores = {"BinaryBalancedAccuracy": [0.5, 0.6], "MulticlassAccuracy": [0.2, 0.3]}
    metrics = {s: [{f"{s}/{name}": {"values": v} for name, v in scores.items()}] for s in ("val", "test")}
    (tmp_path / "session").mkdir()
    (tmp_path / "session" / "results.json").write_text(json.dumps({"metrics": metrics}))
    assert eva_slides.results(tmp_path, 2)["test"].tolist() == [0.5, 0.6]
    assert eva_slides.results(tmp_path, 6)["validate"].tolist() == [0.2, 0.3]
