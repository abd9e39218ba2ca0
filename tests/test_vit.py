import torch
from pytest import approx, mark, raises
from torch import nn

from pathfm import vit
from pathfm.errors import InputError
from pathfm.vit import DinoHead, attention_maps, make_backbone, patch_tokens, set_attention

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
