import json

import numpy as np
import pytest
import timm
import torch

import pathfm
from pathfm.errors import InputError
from pathfm.export import Preprocess, export, load
from pathfm.vit import make_backbone

CARD = {"Recipe": {"steps": 3}, "Start": "random weights"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return make_backbone("vit_small_patch16_224", "random", img_size=64, depth=2, width=32, heads=2)[0].eval()


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


@torch.no_grad()
def test_timm_loads_the_folder_with_identical_features(model, tiles, tmp_path):
    export(model, tmp_path / "teacher", CARD)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'teacher'}", pretrained=True).eval()
    for px in (64, 96):
        x = Preprocess(px)(tiles)
        assert torch.equal(theirs(x), model(x))
    data = timm.data.resolve_model_data_config(theirs)
    assert {*data["mean"], *data["std"]} == {0.5} and list(data["input_size"]) == [3, 64, 64]


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch8_224", "vit_small_patch14_reg4_dinov2"])
def test_other_vits_leave_and_come_back_the_same(name, tmp_path):
    model = make_backbone(name, "random", img_size=56, depth=2, width=32, heads=2)[0].eval()
    export(model, tmp_path)
    x = torch.rand(2, 3, 56, 56)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))
    assert torch.equal(load(tmp_path)[0](x), model(x))


@torch.no_grad()
def test_load_brings_back_the_model_and_its_preprocessing(model, tiles, tmp_path):
    again, preprocess = pathfm.load(export(model, tmp_path, CARD))
    assert not again.training
    assert torch.equal(again(preprocess(tiles)), model((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5))


def test_preprocessing_keeps_account_of_scale(tiles):
    preprocess = Preprocess(32)
    assert preprocess(tiles).shape == (3, 3, 32, 32) and preprocess(tiles[0]).shape == (1, 3, 32, 32)
    assert preprocess.effective_mpp(0.5, 64) == 1.0
    assert preprocess(tiles, resize=False).shape == (3, 3, 64, 64)
    assert preprocess.effective_mpp(0.5, 64, resize=False) == 0.5
    assert preprocess(np.full((1, 64, 64, 3), 255, np.uint8)).unique().tolist() == [1.0]
    assert preprocess(np.zeros((1, 64, 64, 3), np.uint8)).unique().tolist() == [-1.0]


def test_the_card_tells_what_was_given(model, tmp_path):
    card = (export(model, tmp_path, CARD) / "README.md").read_text()
    assert "## Start\n\nrandom weights" in card and '"steps": 3' in card and "local-dir" in card
    assert json.loads((tmp_path / "config.json").read_text())["pathfm"] == CARD


def test_folders_that_are_no_backbone_say_so(model, tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="names no architecture"):
        load(tmp_path)
    weights = export(model, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="no weights that can be read"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        load(tmp_path)
