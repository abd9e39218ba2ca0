"""Frozen features are those of the model, are computed once, and stand on floors."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pathfm import descriptors, export, extractors, probe
from pathfm.benchmarks import TileSet
from pathfm.errors import InputError
from pathfm.features import Features, extract, fingerprint, pools, random_twin

PX = 32


def tiny_vit(seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"img_size": PX, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0, **settings}
    return timm.create_model("vit_tiny_patch16_224", **settings).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def folder(tmp_path):
    """Reddish and bluish noise, twelve images each."""
    rng = np.random.default_rng(0)
    for label, tint in (("red", [90, 0, 0]), ("blue", [0, 0, 90])):
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 160, (48, 48, 3)) + tint
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "set" / label / f"{i}.png")
    return tmp_path / "set"


@pytest.fixture
def tiles(folder):
    return TileSet.from_folder(folder, mpp=0.5)


def expected(model, tiles, pool):
    x = export.Preprocess(PX)(np.stack([tiles.image(row) for row in range(len(tiles))]))
    with torch.no_grad():
        tokens = model.forward_features(x)
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
    return {"cls": cls, "mean": mean, "both": torch.cat([cls, mean], dim=1)}[pool].numpy()


@pytest.mark.parametrize("pool", ["cls", "mean", "both"])
def test_features_are_the_models_whatever_the_batch(tiles, pool):
    model = tiny_vit()
    found = extract(model, tiles, pool=pool, batch_size=5)
    assert found.x.dtype == np.float32
    assert np.allclose(found.x, expected(model, tiles, pool), atol=1e-4)
    assert found.provenance["effective_mpp"] == 0.5 * 48 / PX
    assert found.y.tolist() == tiles.y.tolist()


def test_a_model_in_training_stays_so(tiles):
    model = tiny_vit(proj_drop_rate=0.5).train()
    assert np.allclose(extract(model, tiles).x, expected(model.eval(), tiles, "cls"), atol=1e-4)
    extract(model.train(), tiles, pool="mean")
    assert model.training


def test_registers_are_no_patches(tiles):
    model = tiny_vit(reg_tokens=3)
    tokens = model.forward_features(export.Preprocess(PX)(tiles.image(0)))
    assert np.allclose(extract(model, tiles, pool="mean").x[0], tokens[0, 4:].mean(dim=0).detach().numpy(), atol=1e-4)


def test_an_exported_folder_is_its_model(tiles, tmp_path):
    model = tiny_vit()
    found = extract(export.export(model, tmp_path / "backbone"), tiles)
    assert np.allclose(found.x, extract(model, tiles).x, atol=1e-5)
    assert found.name == "backbone"


def test_a_long_tile_is_cut_to_its_middle_and_sizes_may_mix(tmp_path):
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for i, shape in enumerate([(40, 60), (48, 48), (64, 40)]):
            Image.fromarray(rng.integers(0, 255, (*shape, 3), np.uint8)).save(tmp_path / label / f"{i}.png")
    tiles, model = TileSet.from_folder(tmp_path), tiny_vit()
    middle = export.Preprocess(PX)(tiles.image(0)[:, 10:50])
    with torch.no_grad():
        wanted = model.forward_features(middle)[0, 0].numpy()
    assert np.allclose(extract(model, tiles).x[0], wanted, atol=1e-4)
    assert extract(model, tiles).provenance["effective_mpp"] is None  # the mpp of these tiles is not known


class Counted:
    """A model that counts its batches."""

    def __init__(self, monkeypatch, model):
        self.batches, forward = 0, model.forward_features

        def counting(x):
            self.batches += 1
            return forward(x)

        monkeypatch.setattr(model, "forward_features", counting)


def test_features_are_computed_once(tiles, folder, monkeypatch):
    model = tiny_vit()
    counted = Counted(monkeypatch, model)
    first = extract(model, tiles)
    again = extract(model, tiles)
    relabelled = replace(tiles, table=tiles.table.assign(label=["a", "b"] * 12))
    assert extract(model, relabelled).y.tolist() == [0, 1] * 12
    assert counted.batches == 1
    assert isinstance(again.x, np.memmap)
    assert np.array_equal(first.x, again.x)


@pytest.mark.parametrize("change", ["weights", "preprocessing", "pool", "pixels", "architecture"])
def test_whatever_changes_features_misses_the_cache(change, tiles, folder, monkeypatch):
    extract(tiny_vit(), tiles)
    model, settings = tiny_vit(), {}
    if change == "weights":
        with torch.no_grad():
            model.cls_token += 1e-3
    if change == "architecture":
        model = tiny_vit(num_heads=4)  # of the same weights
    if change == "preprocessing":
        settings = {"preprocess": export.Preprocess(PX, mean=(0.4, 0.5, 0.5))}
    if change == "pool":
        settings = {"pool": "mean"}
    if change == "pixels":
        Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(folder / "red" / "3.png")
        tiles = TileSet.from_folder(folder, mpp=0.5)
    counted = Counted(monkeypatch, model)
    extract(model, tiles, **settings)
    assert counted.batches == 1


@pytest.mark.parametrize("spoil", ["array", "record", "shape"])
def test_a_damaged_cache_is_made_again(spoil, tiles, cache):
    model = tiny_vit()
    x = extract(model, tiles).x.copy()
    if spoil == "array":
        next(cache.glob("*.npy")).write_bytes(b"\x93NUMPY")
    if spoil == "record":
        next(cache.glob("*.json")).write_text("{")
    if spoil == "shape":
        np.save(next(cache.glob("*.npy")), x[:5])
    assert np.array_equal(extract(model, tiles).x, x)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_features import tiny_vit
from pathfm.benchmarks import TileSet
from pathfm.features import extract
model = tiny_vit()
forward, calls = model.forward_features, []
def dies(x):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(x)
model.forward_features = dies
extract(model, TileSet.from_folder({folder!r}, mpp=0.5), batch_size=5)
"""


def test_a_killed_extraction_goes_on_and_gives_the_same_numbers(tiles, folder, cache, tmp_path, monkeypatch):
    """24 tiles in batches of 5: three are kept, two are left to do."""
    whole = extract(tiny_vit(), tiles, batch_size=5, folder=tmp_path / "whole").x
    tests, root = Path(__file__).parent, Path(__file__).parents[1]
    script = KILLED.format(tests=str(tests), folder=str(folder))
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run([sys.executable, "-c", script], env=env).returncode == -signal.SIGKILL
    assert not list(cache.glob("*.npy")) and len(list(cache.glob(".*.partial"))) == 1
    model = tiny_vit()
    counted = Counted(monkeypatch, model)
    assert np.array_equal(extract(model, tiles, batch_size=5).x, whole)
    assert counted.batches == 2
    assert not list(cache.glob(".*.partial"))


@pytest.mark.parametrize("left", [b"", b"\x93NUMPY", "another size", "half a batch"])
def test_what_is_no_start_is_begun_anew(left, tiles, cache, tmp_path):
    whole = extract(tiny_vit(), tiles, folder=tmp_path / "whole")
    cache.mkdir(parents=True)
    partial = cache / f".{whole.provenance['key']}.partial"
    if isinstance(left, bytes):
        partial.write_bytes(left)
    else:
        content = (tmp_path / "whole" / f"{whole.provenance['key']}.npy").read_bytes()
        partial.write_bytes(content.replace(b"(24, 24)", b"(25, 24)") if left == "another size" else content[:-2000])
    assert np.array_equal(extract(tiny_vit(), tiles).x, whole.x)


@pytest.mark.parametrize("pool", ["cls", "mean", "both"])
def test_several_layers_stand_side_by_side(tiles, pool):
    model, seen = tiny_vit(depth=3), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, tokens: seen.append(tokens))
    model.forward_features(export.Preprocess(PX)(np.stack([tiles.image(row) for row in range(len(tiles))])))
    last = [model.norm(tokens).detach().numpy() for tokens in seen[1:]]
    cls, mean = [level[:, 0] for level in last], [level[:, 1:].mean(axis=1) for level in last]
    wanted = np.concatenate({"cls": cls, "mean": mean, "both": cls + mean}[pool], axis=1)
    found = extract(model, tiles, pool=pool, layers=2)
    assert np.allclose(found.x, wanted, atol=1e-4)
    if pool == "both":
        parts = pools(found)
        assert [part.x.shape[1] for part in parts] == [48, 48, 96]
        assert np.allclose(parts[1].x, np.concatenate(mean, axis=1), atol=1e-4)
    assert extract(model, tiles, pool=pool, layers=1).x.shape[1] == found.x.shape[1] // 2  # another key


def test_precision_is_kept_apart_and_told(tiles):
    single, half = (extract(tiny_vit(), tiles, precision=precision) for precision in ("float32", "bfloat16"))
    assert half.x.dtype == np.float32
    assert 0 < np.abs(single.x - half.x).max() < 0.1
    assert [one.provenance["precision"] for one in (single, half)] == ["float32", "bfloat16"]
    auto = extract(tiny_vit(), tiles, precision="auto")  # too few tiles for a comparison to pay
    assert np.array_equal(auto.x, single.x) and auto.provenance["precision"] == "float32"


def test_bfloat16_is_taken_where_neighbours_and_scores_stay(tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "SAMPLE", 24)
    monkeypatch.setattr(extractors, "WORTH_A_SAMPLE", 24)
    auto = extract(tiny_vit(), tiles, precision="auto")
    half = extract(tiny_vit(), tiles, precision="bfloat16")
    single = extract(tiny_vit(), tiles)
    measured = extractors.agreement(single.x, half.x, tiles.y)
    assert auto.provenance["bfloat16"]["neighbours"] == pytest.approx(measured.neighbours)
    wanted = half if measured.same else single
    assert np.array_equal(auto.x, wanted.x) and auto.provenance["precision"] == wanted.provenance["precision"]
    for least, precision in ((0.0, "bfloat16"), (1.01, "float32")):
        monkeypatch.setattr(extractors, "SAME_NEIGHBOURS", least)
        monkeypatch.setattr(extractors, "SAME_SCORE", 1.0)
        again = extract(tiny_vit(), tiles, precision="auto", folder=tmp_path / precision)
        assert again.provenance["precision"] == precision


def test_bfloat16_that_is_asked_for_is_compared_and_said(tiles, tmp_path, monkeypatch, recwarn):
    half, single = extract(tiny_vit(), tiles, precision="bfloat16"), extract(tiny_vit(), tiles)
    measured = extractors.agreement(single.x, half.x, tiles.y)
    assert half.provenance["bfloat16"] == pytest.approx(measured._asdict()) and measured.n == 24
    assert extractors.compared(half.provenance) == f"bfloat16: {measured}" and not extractors.compared(
        single.provenance
    )
    assert f"{measured.neighbours:.1%} of the nearest neighbours of 24 images; moves kNN by +0.0 points" in str(
        measured
    )
    assert not recwarn.list
    monkeypatch.setattr(extractors, "SAME_NEIGHBOURS", 1.01)
    with pytest.warns(UserWarning, match="VisionTransformer: bfloat16 leaves .* where 101% and 0.2 points are asked"):
        again = extract(tiny_vit(), tiles, precision="bfloat16", folder=tmp_path / "again")
    assert again.provenance["precision"] == "bfloat16" and np.array_equal(again.x, half.x)
    assert extractors.compared({"precision": "bfloat16"}) == "bfloat16, not compared with float32"
    assert "no probe was asked, for want of labels" in str(extractors.agreement(single.x, half.x))
    assert "bfloat16" not in extract("colour", tiles, precision="bfloat16").provenance


def test_agreement_counts_neighbours_and_points():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 8)), np.arange(60) % 2
    assert extractors.agreement(x, x, y) == (1.0, 0.0, 0.0, 60)
    ids = [np.argsort(-np.where(np.eye(60), -9, c))[:, :5] for c in (_cosines(x), _cosines(x[:, :4]))]
    shared = np.mean([len(set(p) & set(q)) / 5 for p, q in zip(*ids, strict=True)])
    assert extractors.agreement(x, x[:, :4], k=5).neighbours == pytest.approx(shared)
    assert np.isnan(extractors.agreement(x, x).score)
    assert not extractors.Agreement(0.98, 0.0).same and not extractors.Agreement(1.0, -0.003).same
    assert extractors.Agreement(0.99, np.nan).same and not extractors.Agreement(1.0, np.nan, 0.003).same
    same_neighbours = np.c_[x / np.linalg.norm(x, axis=1, keepdims=True), 1e-3 * (2 * y - 1)]
    found = extractors.agreement(same_neighbours[:, :8], same_neighbours, y)  # too little for a neighbour, not a probe
    assert found.neighbours > 0.99 and found.linear > 0.3 and not found.same


def _cosines(x):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


@pytest.mark.real
def test_bfloat16_keeps_neighbours_and_probes_of_real_tissue(real_data):
    """What "auto" asks for, with a ViT-S of random weights on 160 tiles of oral mucosa.

    There one tile of the smaller class is more than 0.2 points, and a linear probe may lose one.
    """
    tiles = TileSet.from_folder(real_data / "tiles" / "oral_oscc", mpp=1.0)
    tiles = tiles.subset(np.linspace(0, len(tiles) - 1, 160).astype(int)).split("tile")
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=64, depth=6).eval()
    single, half = (extract(model, tiles, precision=precision) for precision in ("float32", "bfloat16"))
    found = extractors.agreement(single.x, half.x, tiles.y)
    one_tile = 1 / np.unique(tiles.y, return_counts=True)[1].min() / 2
    assert found.neighbours >= 0.99 and abs(found.score) <= 0.002 and abs(found.linear) <= one_tile + 1e-9
    scores = [probe.linear(one).balanced_accuracy for one in (single, half)]
    assert abs(scores[0] - scores[1]) <= 0.002


def test_a_full_disk_is_an_error_that_says_so(tiles, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(InputError, match="no space left while writing"):
        extract("colour", tiles)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_features_that_are_not_finite_are_refused_by_name(tiles, cache):
    model = tiny_vit()
    with torch.no_grad():
        model.cls_token[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="features 'broken' hold NaN or infinity, first for blue/0.png"):
        extract(model, tiles, name="broken")
    with pytest.raises(InputError, match="24 of 24 feature rows hold NaN"):  # where precisions are compared
        extract(model, tiles, precision="bfloat16")
    assert not list(cache.glob("*.npy"))


def test_wrong_calls_say_what_would_be_right(tiles):
    with pytest.raises(InputError, match="unknown pool 'clss'. Did you mean 'cls'"):
        extract(tiny_vit(), tiles, pool="clss")
    with pytest.raises(InputError, match="neither a folder nor a floor. Did you mean 'colour'"):
        extract("color", tiles)
    with pytest.raises(InputError, match="no CLS token; take pool='mean'"):
        extract(tiny_vit(class_token=False, global_pool="avg"), tiles)
    with pytest.raises(InputError, match="refuses an input"):
        extract(tiny_vit(), tiles, preprocess=export.Preprocess(64))
    with pytest.raises(InputError, match="has 2 blocks, not the 3 layers asked for; take 1 to 2"):
        extract(tiny_vit(), tiles, layers=3)
    with pytest.raises(InputError, match="unknown precision 'bfloat'. Did you mean 'bfloat16'"):
        extract(tiny_vit(), tiles, precision="bfloat")
    with pytest.raises(InputError, match="give preprocess"):
        extract(torch.nn.Linear(2, 2), tiles)
    other = TileSet("other", tiles.table.iloc[::-1].reset_index(drop=True))
    with pytest.raises(InputError, match="belong to other images"):
        extract("colour", tiles).of(other)


def test_a_random_twin_has_the_architecture_and_no_weight():
    model = tiny_vit(seed=7)
    before = torch.random.get_rng_state()
    twin = random_twin(model, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert fingerprint(twin) == fingerprint(random_twin(model, seed=0)) != fingerprint(random_twin(model, seed=1))
    for (name, old), new in zip(model.named_parameters(), twin.parameters(), strict=True):
        if old.std() > 0:  # a norm or a bias starts constant
            assert not torch.equal(old, new), name
    assert twin.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_trained_weight_does_not_survive_in_the_twin():
    model = tiny_vit(init_values=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert all((parameter != 7).all() for parameter in random_twin(model).parameters())


def test_descriptors_on_images_that_can_be_worked_out():
    grey = np.full((20, 20, 3), 51, np.uint8)
    assert descriptors.colour(grey) == pytest.approx([0.2] * 3 + [0] * 3)
    half = grey.copy()
    half[:, :10] = [255, 0, 0]
    histogram = descriptors.histogram(half)
    assert histogram[[7 * 64, 64 + 8 + 1]] == pytest.approx([0.5**0.5] * 2)
    assert (histogram**2).sum() == pytest.approx(1)
    pattern = descriptors.lbp(grey).reshape(3, 10)
    assert pattern.sum(axis=1) == pytest.approx([1] * 3)
    assert descriptors.colour_lbp(half).shape == (36,)


def test_lbp_sees_texture_that_colour_does_not():
    rng = np.random.default_rng(0)
    fine = rng.integers(0, 2, (96, 96, 1)).repeat(3, axis=2) * 100
    coarse = np.kron(rng.integers(0, 2, (24, 24, 1)), np.ones((4, 4, 1))).repeat(3, axis=2) * 100
    fine, coarse = fine.astype(np.uint8), coarse.astype(np.uint8)
    assert np.abs(descriptors.colour(fine) - descriptors.colour(coarse)).max() < 0.02
    assert np.abs(descriptors.lbp(fine) - descriptors.lbp(coarse)).max() > 0.2


def test_every_floor_stands_beside_a_score(tiles):
    tiles = tiles.split("tile")
    table = probe.floors(tiles, tiny_vit()).set_index("features")
    assert table.loc["chance", "balanced_accuracy"] == 0.5
    assert table.loc["colour mean and spread", "balanced_accuracy"] == 1  # red against blue
    assert "colour histogram" in table.index
    assert "texture (LBP)" in table.index
    assert "colour + LBP" in table.index
    assert table.index.str.startswith("random weights").sum() == 1  # the best pool on validate
    assert "size and mpp alone" not in table.index  # they do not vary
    assert table["floor"].all()


def test_metadata_are_a_floor_where_they_vary(tiles):
    mpp = np.where(tiles.y == 0, 0.25, 0.5)
    varied = replace(tiles, table=tiles.table.assign(mpp=mpp, magnification=["100x", "400X"] * 12)).split("tile")
    assert extract("metadata", varied).x == pytest.approx(np.log(np.c_[mpp, [100, 400] * 12]), abs=1e-6)
    assert probe.floors(varied).set_index("features").loc["size and mpp alone", "balanced_accuracy"] == 1
    with pytest.raises(InputError, match="metadata say nothing"):
        extract("metadata", tiles)


def test_features_go_with_roles(tiles):
    features = extract("colour", tiles)
    assert isinstance(features.split("tile"), Features)
    assert (
        features.of(tiles.split("tile", seed=3)).table["role"].tolist()
        == features.split("tile", seed=3).table["role"].tolist()
    )
