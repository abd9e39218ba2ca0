"""Inside a field: attention and patch tokens of any network that has them, on one scale."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch

from pathfm import inside
from pathfm.backbones import Tokens
from pathfm.export import Preprocess
from pathfm.inside import Inside
from pathfm.representation import token_colours
from pathfm.vit import attention_maps, make_backbone, patch_tokens

FIELDS = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
TINY = {"depth": 2, "width": 32, "heads": 2, "img_size": 64}


def tiny(**fields):
    torch.manual_seed(0)
    return make_backbone("vit_small_patch16_224", "random", **{**TINY, **fields})[0].eval()


def test_it_is_what_the_network_says_of_the_fields_own_pixels():
    model, prepare = tiny(), Preprocess(64)
    found = inside.look(model, prepare, FIELDS)
    pixels = prepare(FIELDS, resize=False)
    expected = attention_maps(model, pixels).mean(1).numpy()
    assert found.attention.shape == (3, 6, 6) and np.allclose(found.attention.mean((1, 2)), 1, atol=1e-5)
    assert np.allclose(found.attention, expected / expected.mean((1, 2), keepdims=True), atol=1e-5)
    colours, share = token_colours(patch_tokens(model, pixels).numpy())
    assert np.allclose(found.colours, colours, atol=1e-4) and found.share == pytest.approx(share, abs=1e-5)


def test_fields_become_what_the_network_takes():
    fixed = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=0)
    assert inside.look(fixed.eval(), Preprocess(32), FIELDS).colours.shape == (3, 2, 2, 3)
    odd = timm.create_model(
        "vit_tiny_patch16_224", img_size=56, patch_size=14, depth=1, embed_dim=16, num_heads=2, dynamic_img_size=True
    )
    assert inside.look(odd.eval(), Preprocess(56), FIELDS).attention.shape == (3, 7, 7)  # 98 px of 96


def test_what_a_network_cannot_say_is_left_out():
    model = tiny()
    other = Tokens(model, lambda network, x: network.forward_features(x), 1, patches=True)
    found = inside.look(other.eval(), Preprocess(64), FIELDS)
    assert found.attention is None and found.colours.shape == (3, 4, 4, 3)
    vector = Tokens(model, lambda network, x: network(x)[:, None], 1, patches=False)
    assert inside.look(vector.eval(), Preprocess(64), FIELDS)[:2] == (None, None)
    maps = timm.create_model("resnet10t", num_classes=0).eval()
    assert inside.look(maps, Preprocess(64), FIELDS)[:2] == (None, None)


@pytest.mark.usefixtures("style")
def test_all_attention_is_drawn_on_one_scale():
    rng = np.random.default_rng(0)
    sharp, flat = (Inside(1 + width * rng.normal(size=(2, 4, 4)), rng.random((2, 4, 4, 3)), 0.5) for width in (1, 0.1))
    seen = {
        "random weights": flat,
        "pretrained": sharp,
        "released": Inside(None, sharp.colours, 0.5),
        "vector": Inside(),
    }
    fig = inside.figure(FIELDS[:2], 0.5, seen)
    axes = np.array(fig.axes[:12]).reshape(6, 2)
    labels = [ax.texts[-1].get_text().replace("\n", " ") for ax in axes[:, 0]]
    assert labels == [
        "field",
        "attention, random weights",
        "attention, pretrained",
        "tokens, random weights",
        "tokens, pretrained",
        "tokens, released",
    ]
    assert len({ax.images[0].get_clim() for ax in axes[1:3].ravel()}) == 1
    assert np.array_equal(axes[1, 1].images[0].get_array(), flat.attention[1])
    plt.close(fig)
    rows = inside.table(seen, ["a", "b"]).set_index(["network", "field"])
    assert list(rows.index) == [(n, f) for n in ("random weights", "pretrained") for f in "ab"]
    assert rows.loc[("pretrained", "b"), "max"] == sharp.attention[1].max() and (rows["patches"] == 16).all()


@pytest.mark.usefixtures("style")
def test_nuclei_stand_below_the_fields_and_attention_is_told_apart_by_them():
    masks = np.zeros((3, 96, 96), bool)
    masks[:, :32, :32] = True
    attention = np.full((3, 6, 6), 0.5)
    attention[:, :2, :2] = 5.0
    seen = {"one": Inside(attention, np.random.default_rng(0).random((3, 6, 6, 3)), 0.4), "other": Inside()}
    table = inside.on_nuclei(seen, masks, ["a", "b", "c"])
    assert table["field"].tolist() == ["a", "b", "c"] and set(table["network"]) == {"one"}
    assert (table["attention there"] == 5).all() and (table["elsewhere"] == 0.5).all()
    assert table["nuclei"].tolist() == pytest.approx([1 / 9] * 3)
    fig = inside.figure(FIELDS, None, seen, masks)
    rows = np.array(fig.axes[:12]).reshape(4, 3)
    shown = rows[1, 0].images[0].get_array()
    assert shown.shape == (96, 96, 3) and shown[0, 0, 0] < 0.5 < shown[-1, -1, 0]
    assert rows[2, 0].images[0].get_array().shape == (6, 6) and len(fig.axes) == 13  # and one bar
    assert not any(ax.patches for ax in rows[0])  # no scale bar where the scale is unknown
