"""Backbones of every make by name: their tokens are the network's own, and what cannot be had is said."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pathfm import InputError, TileSet, backbones, export, vit
from pathfm.__main__ import main
from pathfm.features import extract, random_twin

HUB = """
import timm, torch
from torch import nn

SMALL = dict(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=0)

def like_timm():
    torch.manual_seed(0)  # the same network whenever it is loaded
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

class Scale(nn.Module):
    def __init__(self, width, init_values=0.1):
        super().__init__()
        self.init_values, self.gamma = init_values, nn.Parameter(torch.full((width,), init_values))
    def forward(self, x):
        return x * self.gamma

class Bare(nn.Module):
    # As the first DINO's: tokens and positions are drawn by __init__ and by no method.
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 16, 16)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 5, 16))
        self.attention, self.ls, self.norm = nn.MultiheadAttention(16, 2, batch_first=True), Scale(16), nn.LayerNorm(16)
    def get_intermediate_layers(self, x, n=1):
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return [self.norm(x + self.ls(self.attention(x, x, x)[0]))]

class Odd(Bare):
    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.ones(3))

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
def bare(): return Bare()
def odd(): return Odd()
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


@pytest.mark.parametrize("entry", ["bare", "dinov2", "dino", "vector"])
def test_no_trained_weight_of_a_hub_network_survives_in_its_twin(hub, entry):
    model, _ = backbones.load(f"{hub}:{entry}", **SAID)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    twin, again, other = (random_twin(model, seed) for seed in (0, 0, 1))
    drawn = dict(twin.network.named_parameters())
    assert all((value != 7).all() and value.isfinite().all() for value in drawn.values())
    assert all(torch.equal(value, drawn[name]) for name, value in again.network.named_parameters())
    assert any(not torch.equal(value, drawn[name]) for name, value in other.network.named_parameters())
    if entry == "bare":
        assert (drawn["ls.gamma"] == 0.1).all()  # what its module says
        assert drawn["pos_embed"].std().item() == pytest.approx(0.02, rel=0.3) and (drawn["norm.weight"] == 1).all()
        assert drawn["attention.in_proj_weight"].std() > 0.05  # torch's own, by Xavier
    if entry in ("dinov2", "dino"):
        assert drawn["inner.blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.2)  # timm's own


def test_a_weight_that_nothing_says_how_to_draw_is_refused(hub):
    model, _ = backbones.load(f"{hub}:odd", **SAID)
    with pytest.raises(InputError, match="random weights of Odd cannot be drawn: nothing initialises mixing"):
        random_twin(model)


def test_a_wrong_input_size_is_said_of_hub_networks_too(hub, tiles):
    model, preprocess = backbones.load(f"{hub}:bare", **{**SAID, "input_px": 48})
    with pytest.raises(InputError, match=r"Bare refuses an input of \(8, 3, 48, 48\)"):
        extract(model, tiles, preprocess)


def test_embed_and_probe_take_any_name(hub, tiles, tmp_path, capsys):
    out, data = tmp_path / "features.npz", str(tmp_path / "tiles")
    said = ["--mean", "0.5", "--std", "0.25", "--input-px", "32"]
    assert main(["embed", f"{hub}:dino", data, str(out), "--pool", "mean", *said]) == 0
    model, preprocess = backbones.load(f"{hub}:dino", **SAID)
    with np.load(out) as found:
        assert np.array_equal(found["x"], extract(model, tiles, preprocess, "mean").x)
    assert main(["embed", "colour", data, str(out)]) == 0
    assert main(["embed", f"{hub}:like_timm", data, str(out)]) == 0  # it says itself how it wants its input
    assert np.array_equal(np.load(out)["x"], extract(f"{hub}:like_timm", tiles).x)
    for i in range(8, 40):
        rng = np.random.default_rng(i)
        path = tmp_path / "tiles" / "ab"[i % 2] / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    for entry in ("dino", "vector"):
        assert main(["probe", f"{hub}:{entry}", data, "--split", "tile", *said]) == 0
        assert entry in capsys.readouterr().out
    assert main(["embed", f"{hub}:dino", data, str(out)]) == 2
    assert "give mean, std and input_px" in capsys.readouterr().err
    assert main(["embed", "nowhere", data, str(out)]) == 2
    assert "'nowhere' is neither a folder nor a floor" in capsys.readouterr().err
