"""Backbones of every make by name: their tokens are the network's own, and what cannot be had is said."""

import miniatures
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pathfm import InputError, TileSet, backbones, evaluation, export, tasks, vit
from pathfm.__main__ import main
from pathfm.features import extract, fingerprint, random_twin
from pathfm.segment import SegmentationProtocol

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

class Deep(nn.Module):
    # As DINOv2: a register, patch and CLS tokens apart, before or behind the final norm.
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        settings = {**SMALL, "depth": 3, "reg_tokens": 1}
        self.inner = timm.create_model("vit_tiny_patch16_224", **settings)
        self.mask_token, self.n_blocks = nn.Parameter(torch.zeros(1)), 3
        nn.init.normal_(self.inner.norm.bias)  # or the norm would change little
    def forward_features(self, x):
        tokens = self.inner.forward_features(x)
        return {"x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, 2:]}
    def all_layers(self, x, norm):
        x, found = self.inner._pos_embed(self.inner.patch_embed(x)), []
        for block in self.inner.blocks:
            x = block(x)
            found.append(self.inner.norm(x) if norm else x)
        return found
    def get_intermediate_layers(self, x, *, n=1, reshape=False, return_class_token=False, norm=True):
        found = self.all_layers(x, norm)[-n:]
        return tuple((one[:, 2:], one[:, 0]) if return_class_token else one[:, 2:] for one in found)

class First(Deep):
    # As the first DINO: every token, always behind the norm.
    forward_features = None
    def __init__(self):
        super().__init__()
        del self.mask_token, self.n_blocks
        self.inner.num_prefix_tokens, self.blocks = 1, self.inner.blocks
    def get_intermediate_layers(self, x, n=1):
        return [torch.cat([one[:, :1], one[:, 2:]], 1) for one in self.all_layers(x, True)[-n:]]

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

def deep(): return Deep()
def first(): return First()
def plain(): return lambda x: x.mean(dim=(2, 3))
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


def pixels_of(tiles, preprocess):
    return preprocess(np.stack([tiles.image(i) for i in range(len(tiles))]))


@pytest.mark.parametrize("entry", ["deep", "first"])
def test_networks_of_torch_hub_give_several_layers(hub, tiles, entry):
    model, preprocess = backbones.load(f"{hub}:{entry}", **SAID)
    with torch.inference_mode():
        last = [layer.numpy() for layer in model.network.all_layers(pixels_of(tiles, preprocess), True)[-2:]]
    wanted = [layer[:, 0] for layer in last] + [layer[:, 2:].mean(axis=1) for layer in last]
    found = extract(model, tiles, preprocess, "both", layers=2)
    assert found.x == pytest.approx(np.concatenate(wanted, axis=1), abs=1e-5)
    alone = extract(model, tiles, preprocess, "both")
    assert alone.x == pytest.approx(np.concatenate(wanted[1::2], axis=1), abs=1e-5)
    with pytest.raises(InputError, match=f"{type(model.network).__name__} has 3 blocks, not the 4 layers asked for"):
        extract(model, tiles, preprocess, layers=4)


@pytest.mark.parametrize(("entry", "norm"), [("deep", False), ("first", True), ("dinov2", True), ("dino", True)])
def test_networks_of_torch_hub_give_a_map_of_patches(hub, tiles, entry, norm):
    """Before the final norm where the network has it: as eva takes them."""
    model, preprocess = backbones.load(f"{hub}:{entry}", **SAID)
    pixels, own = pixels_of(tiles, preprocess), model.network.inner
    with torch.inference_mode():
        found = backbones.patch_map(model, pixels, "mine")
        wanted = own.norm(own.blocks(own._pos_embed(own.patch_embed(pixels)))) if norm else None
        wanted = model.network.all_layers(pixels, False)[-1] if entry == "deep" else wanted
        patches = wanted[:, -4:]
        assert torch.allclose(found, patches.mT.reshape(len(tiles), 16, 2, 2), atol=1e-5)
        timms = backbones.patch_map(own, pixels, "timm")
        assert torch.allclose(timms, own.forward_intermediates(pixels, 1, norm=False, intermediates_only=True)[0])


def test_a_decoder_of_masks_learns_on_a_network_of_torch_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    images = tasks.read(miniatures.consep(tmp_path / "consep"), tmp_path / "consep")
    short = SegmentationProtocol(input_px=32, steps=2, batch_size=8, patience=2, runs=1)
    row, table = evaluation.masks(f"{hub}:deep", images, "consep", short, **SAID)
    assert 0 <= row["score"] <= 1 and row["model"] == "repo:deep (32 px)"
    assert table["features"].tolist()[:2] == ["repo:deep", "random weights"]
    with pytest.raises(
        InputError, match=r"repo:vector \(Vector\) gives no patch tokens, which a decoder of masks needs"
    ):
        evaluation.masks(f"{hub}:vector", images, "consep", short, **SAID)


def test_networks_that_have_no_layers_apart_are_named(hub, tiles):
    for entry, message in (
        ("dinov2", "Dinov2 gives the tokens of its last layer alone: it has no get_intermediate_layers; take layers=1"),
        ("vector", "Vector gives one vector an image: it has no get_intermediate_layers; take layers=1"),
    ):
        model, preprocess = backbones.load(f"{hub}:{entry}", **SAID)
        with pytest.raises(InputError, match=message):
            extract(model, tiles, preprocess, layers=2)
    with pytest.raises(InputError, match="Vector gives one vector an image and no patch tokens; take pool='cls'"):
        extract(model, tiles, preprocess, "mean")
    with pytest.raises(InputError, match="'plain' of .* gives a function and no torch.nn.Module; wrap it in one"):
        backbones.load(f"{hub}:plain", **SAID)


def test_a_twin_is_a_backbone_by_name(hub):
    twin, preprocess = backbones.load(f"twin:{hub}:deep", **SAID)
    model, own = backbones.load(f"{hub}:deep", **SAID)
    assert preprocess == own and fingerprint(twin) == fingerprint(random_twin(model)) != fingerprint(model)


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
