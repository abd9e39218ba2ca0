import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from file_server import FileServer
from structured_tiles import StructuredTiles
from test_dinov2 import tiny as tiny_dinov2
from test_pretrain import tiny as tiny_dino

import pathfm
from pathfm.__main__ import main
from pathfm.errors import InputError
from pathfm.export import Preprocess, export, export_run, load, of_checkpoint
from pathfm.pretrain import pretrain
from pathfm.vit import make_backbone, patch_tokens
from pathfm.weights import read_weights

ROOT = Path(__file__).resolve().parent.parent

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


# A run leaves


@pytest.fixture(scope="module", params=["dino", "dinov2"])
def run(request, tmp_path_factory):
    config = {"dino": tiny_dino, "dinov2": tiny_dinov2}[request.param](watch_every=8, prototypes=16)
    stream, watched = (StructuredTiles(config.tile_px, seed=seed) for seed in (0, 1))
    return pretrain(config, stream, watched, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def test_teacher_and_student_leave_as_they_are_in_the_checkpoint(run, tmp_path):
    saved = read_weights(sorted(run.folder.glob("checkpoint*.safetensors"))[-1])
    for which in ("teacher", "student"):
        folder = export_run(run.folder, tmp_path / which, which, "CC-BY-4.0")
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert all(torch.equal(v, saved[f"{which}.backbone.{name}"]) for name, v in theirs.state_dict().items())
        card = (folder / "README.md").read_text()
        assert f"The {which}'s backbone after 8 steps" in card and "## Licence\n\nCC-BY-4.0" in card
    first, second = ((tmp_path / which / "model.safetensors").read_bytes() for which in ("teacher", "student"))
    assert first == (run.teacher / "model.safetensors").read_bytes() != second


def test_every_checkpoint_gives_the_teacher_of_its_step(run):
    first, last = sorted(run.folder.glob("checkpoint*.safetensors"))
    for path in (first, last):
        network, preprocess = of_checkpoint(path)
        saved = read_weights(path)
        assert all(torch.equal(v, saved[f"teacher.backbone.{name}"]) for name, v in network.state_dict().items())
        assert preprocess == load(run.teacher)[1] and not network.training
    ended = run.backbone.state_dict()
    assert all(torch.equal(v, ended[name]) for name, v in of_checkpoint(last)[0].state_dict().items())
    assert not all(torch.equal(v, ended[name]) for name, v in of_checkpoint(first)[0].state_dict().items())


def test_the_command_line_exports_and_wrong_requests_are_named(run, tmp_path, capsys):
    assert main(["export", str(run.folder), str(tmp_path / "out"), "--which", "student"]) == 0
    assert load(capsys.readouterr().out.strip())[0].num_features == 32
    with pytest.raises(InputError, match="which='studnt' is unknown.*'student'"):
        export_run(run.folder, tmp_path / "out", "studnt")
    shutil.copytree(run.teacher, tmp_path / "run" / "teacher")
    with pytest.raises(InputError, match="holds no checkpoint"):
        export_run(tmp_path / "run", tmp_path / "out")


@torch.no_grad()
def test_cls_and_tokens_are_both_reachable_from_a_folder(run, tiles):
    network, preprocess = load(run.teacher)
    x = preprocess(tiles)
    everything = network.forward_features(x)
    assert torch.equal(network(x), everything[:, 0])
    side = x.shape[-1] // network.patch_embed.patch_size[0]
    assert torch.equal(patch_tokens(network, x).flatten(1, 2), everything[:, -(side**2) :])
    assert everything.shape[1] == side**2 + network.num_prefix_tokens


# Through torch.hub, from a folder and from a web server


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = FileServer()
    yield server
    server.close()


def serve(server: FileServer, folder: Path) -> str:
    for name in ("config.json", "model.safetensors"):
        server.files[f"/teacher/{name}"] = (folder / name).read_bytes()
    return f"{server.url}/teacher"


@torch.no_grad()
def test_torch_hub_loads_a_folder_and_an_address(run, server, tiles):
    want, prepare = load(run.teacher)
    address = serve(server, run.teacher)
    for where in (str(run.teacher), address):
        network, preprocess = torch.hub.load(str(ROOT), "load", where, source="local")
        assert preprocess == prepare and torch.equal(network(preprocess(tiles)), want(prepare(tiles)))
        assert torch.equal(
            torch.hub.load(str(ROOT), "backbone", where, source="local")(prepare(tiles)), want(prepare(tiles))
        )
    asked = len(server.requests)
    load(address)
    assert len(server.requests) == asked  # it is kept


def test_an_address_without_a_backbone_or_with_other_weights_says_so(run, server):
    with pytest.raises(InputError, match=r"config\.json.*404"):
        load(f"{server.url}/nothing")
    address = serve(server, run.teacher)
    server.files["/teacher/model.safetensors"] = bytes(server.files["/teacher/model.safetensors"][:-1]) + b"x"
    with pytest.raises(InputError, match=r"model\.safetensors.*sha256"):
        load(address)


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
