"""Segmentation in eva itself: the configuration holds eva's settings, and eva runs with it to our scores."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from miniatures import monusac
from PIL import Image
from scipy.io import savemat

from pathfm import eva, eva_masks, segment, tasks
from pathfm.__main__ import main
from pathfm.errors import InputError

STEPS = 10


@pytest.fixture(scope="module")
def consep(tmp_path_factory):
    """As many images as CoNSeP has, one window each; every type has a colour of its own."""
    folder, rng = tmp_path_factory.mktemp("consep"), np.random.default_rng(0)
    for part, n in (("Train", 27), ("Test", 14)):
        for kind in ("Images", "Labels"):
            (folder / part / kind).mkdir(parents=True)
        for i in range(1, n + 1):
            types = np.kron(rng.integers(0, 8, (5, 5)), np.ones((50, 50)))
            instances = np.kron(np.arange(1, 26).reshape(5, 5), np.ones((50, 50))) * (types > 0)
            pixels = 30 * types[..., None] + rng.normal(0, 5, (250, 250, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / part / f"Images/{part.lower()}_{i}.png")
            savemat(folder / part / f"Labels/{part.lower()}_{i}.mat", {"inst_map": instances, "type_map": types})
    return folder


@pytest.mark.eva
@pytest.mark.parametrize("decoder", ["image", "tokens"])
def test_eva_scores_a_backbone_on_masks_as_we_do(eva_python, exported, consep, tmp_path, decoder):
    config = eva_masks.configuration(exported, "consep", consep, tmp_path, decoder, steps=STEPS, workers=0)
    config["trainer"]["init_args"]["n_runs"] = 2
    theirs = eva_masks.results(eva.execute(eva_masks.VERBS[decoder], config, eva_python))["validate"]
    protocol = replace(segment.EVA["consep"], steps=STEPS, runs=6, decoder=decoder, input_px=64)
    ours = segment.fit(exported, tasks.read("consep", consep), protocol).validate
    assert len(theirs) == 2 and theirs.between(0.15, 0.7).all()
    assert abs(theirs.mean() - ours.mean()) <= 3 * ours.std(ddof=1)


@pytest.mark.eva
def test_eva_reads_monusac_by_our_configuration(eva_python, exported, tmp_path):
    """On as many images as the official set has, all of them copies; eva refuses fewer."""
    folder = tmp_path / "monusac"
    monusac(folder)
    for part, n in (("MoNuSAC_images_and_annotations", 209), ("MoNuSAC Testing Data and Annotations", 85)):
        files = sorted((folder / part).rglob("*.tif"))
        for i in range(n - len(files)):
            for one in (files[i % len(files)], files[i % len(files)].with_suffix(".xml")):
                shutil.copy(one, one.with_name(f"{one.stem}_{i}{one.suffix}"))
    config = eva_masks.configuration(exported, "monusac", folder, tmp_path / "out", steps=4, workers=0)
    config["trainer"]["init_args"]["n_runs"] = 1
    out = eva.execute("fit", config, eva_python)
    assert eva_masks.results(out)["validate"].between(0, 1).all()
    seen = {name for name in eva.last(out)[1]["val"][0] if "monaidicescore_" in name}
    assert seen == {f"val/monaidicescore_{c.lower()}" for c in tasks.about("monusac").classes[:-1]}
    assert len(list((tmp_path / "out" / "masks").rglob("*.npy"))) == 209 + 85


def parts(config):
    return (config[part]["init_args"] for part in ("trainer", "model", "data"))


def test_the_configuration_holds_evas_settings(exported, tmp_path):
    trainer, model, data = parts(eva_masks.configuration(exported, "consep", "data", tmp_path))
    assert (trainer["max_steps"], trainer["n_runs"], trainer["log_every_n_steps"]) == (2000, 5, 6)
    checkpoint, stopping = (one["init_args"] for one in trainer["callbacks"])
    assert stopping["patience"] == 200 and checkpoint["monitor"] == stopping["monitor"] == "val/MonaiDiceScore"
    assert model["decoder"]["class_path"].endswith("ConvDecoderWithImage")
    assert model["decoder"]["init_args"] == {"in_features": 48, "num_classes": 5}
    arguments = model["encoder"]["init_args"]["arguments"]
    assert arguments["features_only"] and arguments["out_indices"] == 1
    assert model["optimizer"]["init_args"] == {"lr": 2e-3} and model["lr_multiplier_encoder"] == 0
    assert data["datasets"]["train"]["init_args"]["sampler"].endswith("GridSampler")
    assert data["dataloaders"]["train"]["batch_size"] == 64 and data["dataloaders"]["train"]["shuffle"] is True
    assert "shuffle" not in data["dataloaders"]["val"]


def test_monusac_ignores_a_class_and_trains_on_crops(exported, tmp_path):
    trainer, model, data = parts(eva_masks.configuration(exported, "monusac", "data", tmp_path))
    assert trainer["callbacks"][1]["init_args"]["patience"] == 100
    assert model["decoder"]["init_args"]["num_classes"] == 5
    assert model["criterion"]["init_args"]["ignore_index"] == 5
    assert {one["init_args"].get("num_classes", 6) for one in model["metrics"]["evaluation"]} == {6}
    train, val = (data["datasets"][role]["init_args"] for role in ("train", "val"))
    assert "RandomResizedCrop" in str(train["transforms"]) and "ResizeAndCrop" in str(val["transforms"])
    assert (train["split"], val["split"]) == ("train", "test") and train["processed_dir"] == str(tmp_path / "masks")


def test_without_the_image_tokens_are_written_first(exported, tmp_path):
    for task, keys, val in (("consep", ["coords"], "val"), ("monusac", None, "test")):
        trainer, model, data = parts(eva_masks.configuration(exported, task, "data", tmp_path, "tokens"))
        writer = trainer["callbacks"][-1]
        assert writer["class_path"] == "eva.callbacks.SegmentationEmbeddingsWriter"
        assert writer["init_args"].get("metadata_keys") == keys and "encoder" not in model
        assert writer["init_args"]["dataloader_idx_map"] == {0: "train", 1: val}
        assert model["decoder"]["class_path"].endswith("ConvDecoderMS")
        assert data["datasets"]["val"]["init_args"]["split"] == val and len(data["datasets"]["predict"]) == 2
        assert "RandomResizedCrop" not in str(data)


def test_the_command_line_writes_it_and_names_what_to_run(exported, tmp_path, capsys):
    for decoder, verb in eva_masks.VERBS.items():
        out = tmp_path / decoder
        assert main(["eva-config", str(exported), "consep", "data", str(out), "--decoder", decoder]) == 0
        assert capsys.readouterr().out == f"eva {verb} --config {out / 'eva.yaml'}\n"
        written = yaml.safe_load((out / "eva.yaml").read_text())
        assert written == eva_masks.configuration(exported, "consep", "data", out, decoder)
    for more, message in (
        (["--decoder", "imgae"], "eva's segmentation has no 'imgae'. Did you mean 'image'"),
        (["--protocol", "eva-2024"], "consep has one protocol in eva; leave 'eva-2024' out"),
    ):
        assert main(["eva-config", str(exported), "consep", "data", str(tmp_path), *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="has no 'conspe'. Did you mean 'consep'"):
        eva_masks.configuration(exported, "conspe", "data", tmp_path)
    with pytest.raises(InputError, match="holds no results of eva"):
        eva_masks.results(tmp_path / "nothing")
