"""Backbones of every make by name: their tokens are the network's own, and what cannot be had is said."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pathfm import InputError, TileSet, backbones, export, vit
from pathfm.features import extract

HUB = """
import timm, torch
from torch import nn

SMALL = dict(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=0)

def like_timm():
    return timm.create_model("vit_tiny_patch16_224", **SMALL)

class Dinov2(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.mask_token = like_timm(), nn.Parameter(torch.zeros(1))
    def forward_features(self, x):
        tokens = self.inner.forward_features(x)
        return {"x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, 1:]}

class Dino(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = like_timm()
    def get_intermediate_layers(self, x, n=1):
        return [self.inner.forward_features(x)]

class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)
    def forward(self, x):
        return self.layer(x.mean(dim=(2, 3)))

class Pair(Vector):
    def forward(self, x):
        return super().forward(x), 1

def dinov2(): return Dinov2()
def dino(): return Dino()
def vector(): return Vector()
def pair(): return Pair()
def broken(): raise KeyError("no weights")
"""
SAID = {"mean": 0.5, "std": 0.25, "input_px": 32}


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "hubconf.py").write_text(HUB)
    return f"hub:{tmp_path / 'repo'}"


@pytest.fixture
def tiles(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "tiles" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    return TileSet.from_folder(tmp_path / "tiles")


@pytest.mark.parametrize("entry", ["dinov2", "dino"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_networks_of_other_makes_give_their_own_tokens(hub, tiles, entry, pool):
    model, preprocess = backbones.load(f"{hub}:{entry}", **SAID)
    x = extract(model, tiles, preprocess, pool).x
    pixels = preprocess(np.stack([tiles.image(i) for i in range(len(tiles))]))
    with torch.inference_mode():
        tokens = model.network.inner.forward_features(pixels)
    own = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
    assert x == pytest.approx(own.numpy(), abs=1e-5)
    assert not backbones.only_cls(model) and not model.training


def test_a_network_without_tokens_gives_its_vector(hub, tiles):
    model, preprocess = backbones.load(f"{hub}:vector", **SAID)
    assert backbones.only_cls(model)
    pixels = preprocess(np.stack([tiles.image(i) for i in range(len(tiles))]))
    with torch.inference_mode():
        assert extract(model, tiles, preprocess).x == pytest.approx(model.network(pixels).numpy(), abs=1e-5)
    model, preprocess = backbones.load(f"{hub}:pair", **SAID)
    with pytest.raises(InputError, match=r"Pair gives no vector \(B, D\) an image, but tuple"):
        extract(model, tiles, preprocess)


def test_timms_own_models_need_nothing_said(hub):
    model, preprocess = backbones.load("random:vit_tiny_patch16_224")
    assert (preprocess.input_px, preprocess.mean) == (224, (0.5, 0.5, 0.5)) and not model.training
    assert backbones.load("random:resnet18")[1].mean == pytest.approx((0.485, 0.456, 0.406))
    assert backbones.load(f"{hub}:like_timm")[1].input_px == 32
    same, other = (backbones.load("random:vit_tiny_patch16_224", seed=seed)[0] for seed in (0, 1))
    assert torch.equal(same.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert not torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_a_folder_and_what_is_said_in_place_of_its_own(tmp_path):
    small = {"img_size": 32, "depth": 1, "width": 16, "heads": 2}
    made, _ = vit.make_backbone("vit_tiny_patch16_224", "random", **small)
    export.export(made, tmp_path / "export")
    model, preprocess = backbones.load(tmp_path / "export")
    assert (preprocess.input_px, preprocess.mean) == (32, (0.5, 0.5, 0.5))
    assert torch.equal(model.cls_token, made.cls_token)
    assert backbones.load(tmp_path / "export", mean=0.1, std=0.2)[1] == export.Preprocess(32, (0.1,) * 3, (0.2,) * 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "backbone 'no/such/folder' is none of: a folder of an export, timm:<model>"),
        ("timm:vit_smal_patch16_224", "timm has no model 'vit_smal_patch16_224'. Did you mean 'vit_small"),
        ("hub:only", "names no repository and entry"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(InputError, match=message):
        backbones.load(name)


def test_what_cannot_be_had_is_said(hub, monkeypatch):
    with pytest.raises(InputError, match="torch.hub cannot load 'broken' of .*KeyError: 'no weights'"):
        backbones.load(f"{hub}:broken", **SAID)
    with pytest.raises(InputError, match="torch.hub cannot load 'nothing'"):
        backbones.load(f"{hub}:nothing", **SAID)
    with pytest.raises(InputError, match="does not say how it wants its input; give mean, std and input_px"):
        backbones.load(f"{hub}:dino", mean=0.5)
    with pytest.raises(InputError, match="std and input_px are above 0"):
        backbones.load(f"{hub}:dino", mean=0.5, std=0.0, input_px=32)

    def offline(*given, **how):
        raise OSError("no network\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"cannot be made \(no network\); download its folder"):
        backbones.load("timm:vit_tiny_patch16_224")
