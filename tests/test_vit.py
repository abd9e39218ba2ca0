import safetensors.torch
import timm
import torch
from pytest import MonkeyPatch, approx, mark, raises
from torch import nn

from pathfm import vit
from pathfm.errors import InputError
from pathfm.export import export
from pathfm.vit import DinoHead, attention_maps, fit_weights, make_backbone, patch_tokens, set_attention

NAME = "vit_small_patch16_224"
TINY = {"depth": 2, "width": 32, "heads": 2, "img_size": 64}


def tiny(seed=0, **fields):
    torch.manual_seed(seed)
    return make_backbone(NAME, "random", **{**TINY, **fields})[0].eval()


def images(n=2, px=64, seed=0):
    return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_backbone_gives_one_feature_vector_at_any_multiple_of_the_patch():
    model = tiny()
    for px in (32, 64, 96):
        assert model(images(px=px)).shape == (2, 32)
    assert "random" in make_backbone(NAME, "random", **TINY)[1]


@mark.parametrize("px", [60, 10])
def test_a_size_that_the_patch_does_not_divide_names_the_next_ones(px):
    with raises(InputError, match=r"patch.*16 px.*take .* or "):
        make_backbone(NAME, "random", **{**TINY, "img_size": px})


def test_an_unknown_model_offers_the_nearest():
    with raises(InputError, match="vit_small_patch16_224"):
        make_backbone("vit_smal_patch16_224", "random")


def test_a_model_that_is_no_plain_vit_is_refused():
    with raises(InputError, match="take a plain ViT"):
        make_backbone("vit_small_patch16_dinov3", "random", img_size=64)


def test_stochastic_depth_grows_from_none_to_the_last_block():
    model = tiny(depth=4, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == approx([0, 0.1, 0.2, 0.3])


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
    assert {name: vit._seen(tag) for name, tag in tags.items()} == dict(
        zip(tags, ("ImageNet", "ImageNet", "LVD-142M"), strict=True)
    )
    assert vit._seen("laion2b") == "pretrained"


def test_imagenet_weights_out_of_reach_name_the_remedies(monkeypatch: MonkeyPatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with raises(InputError, match=r"ConnectionError.*local folder.*init='random'"):
        make_backbone("test_vit", "imagenet", img_size=64)
    with raises(InputError, match=r"as it is, not with.*depth.*init='random'"):
        make_backbone(NAME, "imagenet", **TINY)


def test_patch_tokens_are_the_tokens_after_cls():
    model, x = tiny(), images(px=96)
    tokens = patch_tokens(model, x)
    assert tokens.shape == (2, 6, 6, 32)
    with torch.no_grad():
        assert torch.equal(tokens.flatten(1, 2), model.forward_features(x)[:, 1:])


def test_attention_maps_are_what_the_last_block_computes():
    """The reference is the softmax inside timm's own attention, seen where it enters the dropout."""
    model, x, seen = tiny(), images(px=96), {}
    maps = attention_maps(model, x)
    set_attention(model, fused=False)
    model.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, args, out: seen.update(p=out))
    with torch.no_grad():
        model(x)
    assert maps.shape == (2, 2, 6, 6)
    assert torch.allclose(maps.flatten(2), seen["p"][:, :, 0, 1:], atol=1e-6)
    assert (maps.sum((2, 3)) < 1).all()


def test_fused_and_plain_attention_agree():
    model, x = tiny(), images()
    outputs = []
    for fused in (True, False):
        set_attention(model, fused)
        assert all(block.attn.fused_attn is fused for block in model.blocks)
        outputs.append(model(x).detach())
    assert torch.allclose(*outputs, atol=1e-5)


def test_logits_of_the_head_are_cosines_to_prototypes():
    torch.manual_seed(0)
    head = DinoHead(32, prototypes=40, hidden=16, bottleneck=8)
    x = torch.randn(6, 32)
    bottleneck = head.mlp(x)
    want = nn.functional.cosine_similarity(bottleneck[:, None], head.last_layer.direction[None], dim=-1)
    assert torch.allclose(head(x), want, atol=1e-5)
    assert not head.last_layer.length.requires_grad
    free = DinoHead(32, prototypes=40, hidden=16, bottleneck=8, norm_last_layer=False)
    assert free.last_layer.length.requires_grad


def test_a_head_of_the_published_shape_has_the_published_number_of_parameters():
    head = DinoHead(384)
    linear = (384 * 2048 + 2048) + (2048 * 2048 + 2048) + (2048 * 256 + 256)
    assert sum(p.numel() for p in head.parameters()) == linear + 256 * 65536 + 65536
    assert vit.DinoHead(8, 4, 4, 4, batch_norm=True).mlp[1].__class__ is nn.BatchNorm1d


def test_fit_weights_leaves_classifiers_out():
    model = tiny()
    state = {**tiny(seed=3).state_dict(), "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    fit_weights(model, state, "a classifier")
    assert same(model, tiny(seed=3))
