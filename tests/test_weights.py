"""Where a backbone starts from: folders, files and checkpoints, ours and others', made to fit; headless ones go on."""

import argparse
import json

import numpy as np
import safetensors.torch
import timm
import torch
from pytest import MonkeyPatch, fixture, mark, raises
from structured_tiles import LabelledTiles, StructuredTiles
from test_dinov2 import tiny as tiny_dinov2
from test_pretrain import tiny as tiny_dino
from torch import nn

from pathfm import weights
from pathfm.checkpoint import found
from pathfm.dino import Dino
from pathfm.dinov2 import DinoV2
from pathfm.errors import InputError
from pathfm.export import Preprocess, export, load
from pathfm.pretrain import pretrain
from pathfm.probe import knn_accuracy
from pathfm.vit import make_backbone
from pathfm.watches import Watch
from pathfm.weights import Start, backbone_of, fit_weights, read_weights, renormalised

NAME = "vit_small_patch16_224"
TINY = {"depth": 2, "width": 32, "heads": 2, "img_size": 64}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def tiny(seed=0, **fields):
    torch.manual_seed(seed)
    return make_backbone(NAME, "random", **{**TINY, **fields})[0].eval()


def images(n=2, px=64, seed=0):
    return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_weights_come_from_a_folder_of_ours_or_a_file(tmp_path):
    model = tiny(seed=1)
    export(model, tmp_path / "ours")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    for init in (tmp_path / "ours", tmp_path / "ours" / "model.safetensors", tmp_path / "weights.pth"):
        again, said = make_backbone(NAME, init, **TINY)
        assert same(again, model) and init.name in said


def test_weights_of_another_size_and_patch_are_interpolated(tmp_path):
    model = tiny(seed=1)
    export(model, tmp_path)
    larger, _ = make_backbone(NAME, tmp_path, **{**TINY, "img_size": 96})
    assert larger.pos_embed.shape == (1, 37, 32)
    assert torch.equal(larger.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    finer, _ = make_backbone("vit_small_patch8_224", tmp_path, **TINY)
    assert finer.patch_embed.proj.weight.shape[-1] == 8 and finer(images()).shape == (2, 32)


def test_weights_that_do_not_fit_name_the_parameter(tmp_path):
    export(tiny(), tmp_path)
    with raises(InputError, match=r"cls_token is \(1, 1, 32\), the model has \(1, 1, 64\)"):
        make_backbone(NAME, tmp_path, **{**TINY, "width": 64})
    with raises(InputError, match=r"blocks\.2\.norm1\.weight is missing"):
        make_backbone(NAME, tmp_path, **{**TINY, "depth": 3})
    with raises(InputError, match=r"blocks\.1\.\S+ is not in the model"):
        make_backbone(NAME, tmp_path, **{**TINY, "depth": 1})


def test_weights_that_cannot_be_read_say_so(tmp_path):
    with raises(InputError, match=r"neither 'imagenet' nor 'random'"):
        make_backbone(NAME, tmp_path / "nowhere", **TINY)
    with raises(InputError, match=r"holds no model\.safetensors"):
        make_backbone(NAME, tmp_path, **TINY)
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with raises(InputError, match="no weights that can be read"):
        make_backbone(NAME, tmp_path, **TINY)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"weights": Trap()}, tmp_path / "trap.pth")
    with raises(InputError, match="no weights that can be read"):
        make_backbone(NAME, tmp_path / "trap.pth", **TINY)
    assert not (tmp_path / "sprung").exists()


def test_imagenet_weights_are_timms_with_the_position_embedding_resized(tmp_path, monkeypatch: MonkeyPatch):
    """timm's own loading, with a file in place of the network."""
    torch.manual_seed(0)
    classifier = timm.create_model("test_vit")  # 160 px, width 64, 1000 classes
    safetensors.torch.save_file(classifier.state_dict(), tmp_path / "imagenet.safetensors")
    create = timm.create_model

    def offline(name, pretrained=False, **arguments):
        overlay = {"file": str(tmp_path / "imagenet.safetensors"), "hf_hub_id": None} if pretrained else None
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    model, said = make_backbone("test_vit", "imagenet", img_size=64)
    assert "ImageNet weights of timm (test_vit.r160_in1k)" in said
    assert torch.equal(model.blocks[0].attn.qkv.weight, classifier.blocks[0].attn.qkv.weight)
    assert model.pos_embed.shape[1] == 17 and model(images()).shape == (2, 64)


def test_weights_are_said_to_be_of_the_images_they_were_trained_on():
    tags = {
        name: timm.models.get_pretrained_cfg(name).tag
        for name in (NAME, "vit_small_patch8_224", "vit_large_patch14_dinov2")
    }
    assert {name: weights._seen(tag) for name, tag in tags.items()} == dict(
        zip(tags, ("ImageNet", "ImageNet", "LVD-142M"), strict=True)
    )
    assert weights._seen("laion2b") == "pretrained"


def test_dinos_own_weights_come_before_timms_default_and_a_tag_before_both(monkeypatch: MonkeyPatch):
    """With their mean and std, which are not those of the default weights. Shapes alone: nothing is fetched."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **arguments: create(name, **arguments))
    with torch.device("meta"):
        ours, supervised = (weights.of_timm(f"{NAME}{tag}", {}) for tag in ("", ".augreg_in21k_ft_in1k"))
    assert ours.said == f"ImageNet weights of timm ({NAME}.dino)"
    assert {"mean": ours.mean, "std": ours.std} == IMAGENET
    assert supervised.said == f"ImageNet weights of timm ({NAME}.augreg_in21k_ft_in1k)"
    assert supervised.mean == (0.5, 0.5, 0.5)
    assert timm.models.get_pretrained_cfg(NAME).tag == "augreg_in21k_ft_in1k"  # or the rule has nothing to change
    assert weights.with_tag("vit_large_patch14_reg4_dinov2") == "vit_large_patch14_reg4_dinov2"


def test_a_tag_that_timm_does_not_have_offers_the_nearest():
    with raises(InputError, match=rf"no weights '{NAME}\.dion'. Did you mean '{NAME}\.dino'"):
        make_backbone(f"{NAME}.dion", "random", **TINY)
    assert make_backbone(f"{NAME}.dino", "random", **TINY)[0].pretrained_cfg["architecture"] == NAME


def test_imagenet_weights_out_of_reach_name_the_remedies(monkeypatch: MonkeyPatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with raises(InputError, match=r"ConnectionError.*local folder.*init='random'"):
        make_backbone("test_vit", "imagenet", img_size=64)
    with raises(InputError, match=r"as it is, not with.*depth.*init='random'"):
        make_backbone(NAME, "imagenet", **TINY)


def test_fit_weights_leaves_classifiers_out():
    model = tiny()
    state = {**tiny(seed=3).state_dict(), "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    fit_weights(model, Start(state, "a classifier"))
    assert same(model, tiny(seed=3))


# Inputs of another mean and std


@mark.parametrize("form", ["image", "row"])
def test_features_of_a_pixel_stay_what_they_were_under_another_normalisation(form):
    """The reference is the network on inputs as it was trained with, in float64; old weights keep a patch as a row."""
    model, pixels = tiny().double(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in IMAGENET.values())
    state = model.state_dict()
    if form == "row":
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    ours = tiny(seed=1).double()
    fit_weights(ours, Start(state, "theirs", **IMAGENET))
    with torch.no_grad():
        want, got = model((pixels - mean) / std), ours((pixels - 0.5) / 0.5)
    assert torch.allclose(got, want, atol=1e-10)
    assert not torch.allclose(model((pixels - 0.5) / 0.5), want, atol=1e-3)


def test_our_own_normalisation_changes_no_bit_and_one_without_a_place_is_refused():
    state = tiny().state_dict()
    kept = renormalised(Start(state, "ours"))
    assert all(kept[name] is state[name] for name in state)
    del state["patch_embed.proj.bias"]
    with raises(InputError, match=r"theirs take inputs of mean \(0\.485.*no bias"):
        renormalised(Start(state, "theirs", **IMAGENET))


def test_a_folder_of_others_goes_on_from_the_features_that_it_had(tmp_path):
    """A released backbone, in timm's format with ImageNet's mean and std: loaded as it is, trained in [-1, 1]."""
    theirs = timm.create_model("test_vit", num_classes=0, pretrained_cfg_overlay=IMAGENET).eval()
    timm.models.save_for_hf(theirs, tmp_path)
    network, preprocess = load(tmp_path)
    tiles = np.random.default_rng(0).integers(0, 256, (3, 160, 160, 3), dtype=np.uint8)
    ours, _ = make_backbone("test_vit", tmp_path, img_size=160)
    with torch.no_grad():
        want = network(preprocess(tiles))
        assert torch.allclose(theirs(preprocess(tiles)), want, atol=1e-6)
        assert torch.allclose(ours.eval()(Preprocess(160)(tiles)), want, atol=1e-4)
    assert (preprocess.mean, preprocess.std) == tuple(IMAGENET.values())


@mark.parametrize("method", ["dino", "dinov2"])
@mark.parametrize("form", ["timm", "flat"])
def test_no_further_step_from_a_folder_of_others_gives_identical_scores(method, form, tmp_path):
    """Trained and exported at mean = std = 0.5, the backbone has the features and the kNN answers that it came with."""
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0, pretrained_cfg_overlay=IMAGENET), tmp_path)
    if form == "flat":  # as timm wrote them once
        config = json.loads((tmp_path / "config.json").read_text())
        config |= config.pop("pretrained_cfg")
        (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, before = load(tmp_path)
    whole = {"model": "test_vit", "depth": 0, "width": 0, "heads": 0, "global_px": 160, "tile_px": 160}
    whole |= {"registers": 0, "layer_scale": 0.0} if method == "dinov2" else {}
    config = {"dino": tiny_dino, "dinov2": tiny_dinov2}[method](**whole, local_px=48, init=str(tmp_path))
    ours, after = load(export(METHODS[method](config).teacher.backbone, tmp_path / "ours"))
    assert (before.mean, before.std) == tuple(IMAGENET.values()) and {*after.mean, *after.std} == {0.5}
    tiles = np.stack([StructuredTiles(160)[i].image for i in range(40)])
    with torch.no_grad():
        want, got = theirs(before(tiles)), ours(after(tiles))
        foreign = ours(before(tiles))
    assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(foreign, want, atol=1e-2)
    labels = np.array([StructuredTiles(160)[i].slide_id for i in range(40)])
    scores = [knn_accuracy(x[:30].numpy(), labels[:30], x[30:].numpy(), labels[30:]) for x in (want, got)]
    assert scores[0] == scores[1]


# Checkpoints of others


def wrapped(state: dict, how: str) -> dict:
    """The names that a backbone's parameters have in checkpoints."""
    arguments = {"args": argparse.Namespace(arch="vit_small"), "epoch": 3}
    other = {f"module.backbone.{name}": torch.zeros_like(value) for name, value in state.items()}
    head = {"head.mlp.0.weight": torch.zeros(2, 2)}
    return {
        "plain": state,
        "state_dict": {"state_dict": state},
        "dino": {
            "student": other,
            "teacher": {**{f"backbone.{name}": value for name, value in state.items()}, **head},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
            **arguments,
        },
        "dinov2": {
            "teacher": {
                "dino_head.mlp.0.weight": torch.zeros(2, 2),
                "backbone.mask_token": torch.zeros(1, 32),
                **{f"backbone.{name.replace('blocks.', 'blocks.0.')}": value for name, value in state.items()},
            }
        },
        "trunk": {f"visual.trunk.{name}": value for name, value in state.items()},
    }[how]


@mark.parametrize("how", ["plain", "state_dict", "dino", "dinov2", "trunk"])
def test_the_backbone_is_found_in_a_checkpoint_and_heads_are_left(how, tmp_path):
    model = tiny(seed=1)
    torch.save(wrapped(model.state_dict(), how), tmp_path / "checkpoint.pth")
    assert same(make_backbone(NAME, tmp_path / "checkpoint.pth", **TINY)[0], model)


def test_dinov2s_register_tokens_come_under_timms_names():
    """DINOv2 adds the position of CLS at every pass, timm has it in the token; a reference by hand."""
    torch.manual_seed(0)
    model = make_backbone("vit_small_patch14_reg4_dinov2", "random", img_size=56, depth=2, width=32, heads=2)[0]
    state, place = model.state_dict(), torch.randn(1, 1, 32)
    theirs = {**state, "register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 32)}
    theirs |= {"cls_token": state["cls_token"] - place, "pos_embed": torch.cat([place, state["pos_embed"]], 1)}
    del theirs["reg_token"]
    again = make_backbone("vit_small_patch14_reg4_dinov2", "random", img_size=56, depth=2, width=32, heads=2)[0]
    fit_weights(again, Start(theirs, "Meta's"))
    assert all(torch.allclose(value, state[name], atol=1e-6) for name, value in again.state_dict().items())


def test_weights_under_other_names_are_refused(tmp_path):
    safetensors.torch.save_file({"embeddings.cls_token": torch.zeros(1)}, tmp_path / "model.safetensors")
    with raises(InputError, match=r"holds no 'patch_embed\.proj\.weight'.*convert"):
        make_backbone(NAME, tmp_path, **TINY)


# Going on from an export


@fixture(scope="module", params=["dino", "dinov2"])
def run(request, tmp_path_factory):
    """A run of either method, its config and a stream like its own."""
    config = {"dino": tiny_dino, "dinov2": tiny_dinov2}[request.param](watch_every=0)
    stream = StructuredTiles(config.tile_px)
    return pretrain(config, stream, folder=tmp_path_factory.mktemp(request.param)), config, stream


METHODS = {"dino": Dino, "dinov2": DinoV2}


def test_no_further_step_gives_identical_features(run, tmp_path):
    """The folder and the run's checkpoint alike; heads are made anew, and teacher and student start equal."""
    done, config, stream = run
    network, preprocess = load(done.teacher)
    x = preprocess(np.stack([stream[i].image for i in range(12)]))
    checkpoint = found(done.folder)[0]
    for init in (done.teacher, checkpoint):
        model = METHODS[config.method](config.replace(init=str(init))).eval()
        assert same(model.student, model.teacher)
        saved = read_weights(checkpoint)
        assert not torch.equal(model.student.head.last_layer.direction, saved["student.head.last_layer.direction"])
        again = load(export(model.teacher.backbone, tmp_path / "again"))[0]
        with torch.no_grad():
            want = network(x)
            for other in (model.student.backbone, model.teacher.backbone, again):
                assert torch.equal(other(x), want)


def test_a_headless_folder_is_probed_before_during_and_after(run, tmp_path):
    """A file with nothing but the backbone goes on; kNN at step 0 is the folder's own, at the end the new teacher's."""
    done, config, stream = run
    tiles = LabelledTiles(tmp_path, tile_px=config.tile_px)
    config = config.replace(init=str(done.teacher), watch_every=4, seed=1)
    more = pretrain(config, stream, tiles, tmp_path / "more")
    assert more.watches["step"].tolist() == [0, 4, 8] and more.params["init"].endswith("teacher")
    watch, looks = Watch.of(tiles, config.watch_tiles), more.watches.set_index("step")
    for folder, step in ((done.teacher, 0), (more.teacher, 8)):
        network, preprocess = load(folder)
        with torch.inference_mode():
            bank, x = (network(preprocess(images)).numpy() for images in (watch.bank, watch.images))
        assert looks.loc[step, "knn"] == knn_accuracy(bank, watch.bank_labels, x, watch.labels)


def test_the_teacher_is_taken_from_a_checkpoint_of_ours():
    state = {"teacher.backbone.patch_embed.proj.weight": torch.ones(1), "student.backbone.patch_embed.proj.weight": 0}
    state |= {"optimiser/exp_avg/backbone.patch_embed.proj.weight": 0}
    assert list(backbone_of(state, "it").values()) == [torch.ones(1)]
