"""Backbones from timm, the DINO head, patches hidden from a backbone, and what it looks at."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models._manipulate import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pathfm import weights
from pathfm.errors import InputError, nearest
from pathfm.ranks import BatchNorm


def make_backbone(
    name: str = "vit_small_patch16_224",
    init: str | Path = "imagenet",
    img_size: int = 224,
    drop_path: float = 0.0,
    depth: int = 0,
    width: int = 0,
    heads: int = 0,
    registers: int = 0,
    layer_scale: float = 0.0,
) -> tuple[VisionTransformer, str]:
    """A timm ViT without classifier, and a sentence that says where its weights come from.

    The model maps images (B, 3, H, W) in [-1, 1], H and W multiples of its patch, to CLS features (B, D).

    name      timm's; with a tag, such as vit_small_patch16_224.augreg_in21k, it chooses what "imagenet" means
    init      "imagenet": timm's weights, DINO's own where there are such, fetched or cached; "random": drawn from
              torch's generator; else a folder (ours or timm's: config.json and model.safetensors) or a file of
              weights; adapted to patch, size and the inputs' mean and std (`weights.fit_weights`)
    img_size  pixels a side that the position embedding is made for; other sizes are interpolated
    depth, width, heads, registers, layer_scale  0 = the model's own

    Raises InputError for an unknown name, a size that the patch does not divide, and weights that do not fit.
    """
    own = {"depth": depth, "embed_dim": width, "num_heads": heads, "reg_tokens": registers, "init_values": layer_scale}
    own = {key: value for key, value in own.items() if value}
    model = _create(name, img_size, drop_path, own)
    if str(init) == "random":
        return model, "random weights"
    start = weights.of_timm(name, own) if str(init) == "imagenet" else weights.of_path(init)
    weights.fit_weights(model, start)
    return model, start.said


def _create(name: str, img_size: int, drop_path: float, own: dict) -> VisionTransformer:
    known, (plain, _, tag) = timm.list_models("*vit*"), name.partition(".")
    if plain not in known:
        raise InputError(
            f"timm has no vision transformer '{name}'.{nearest(name, known).split(' Known')[0]}"
            " See timm.list_models('*vit*')"
        )
    if tag and not timm.models.is_model_pretrained(name):
        raise InputError(f"timm has no weights '{name}'.{nearest(name, timm.list_pretrained(f'{plain}.*'))}")
    try:
        model = timm.create_model(
            name, num_classes=0, img_size=img_size, dynamic_img_size=True, drop_path_rate=drop_path, **own
        )
    except (TypeError, AssertionError) as error:
        raise InputError(f"{name} cannot be made with {own or 'its own settings'}: {error}") from None
    if not isinstance(model, VisionTransformer):
        raise InputError(f"{name} is a {type(model).__name__}; take a plain ViT such as vit_small_patch16_224")
    check_size(model, img_size)
    return model


def check_size(model: VisionTransformer, px: int, what: str = "image size") -> None:
    """Raises InputError where `px` pixels are no multiple of the model's patch."""
    patch = model.patch_embed.patch_size[0]
    if px % patch:
        below, above = px // patch * patch, (px // patch + 1) * patch
        raise InputError(f"{what} {px} px is no multiple of the patch of {patch} px; take {below or above} or {above}")


def set_attention(model: nn.Module, fused: bool) -> None:
    """Chooses the attention kernel of every block: PyTorch's fused one, or plain products and a softmax."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


class Prototypes(nn.Module):
    """The weight-normalised last layer: one direction a prototype, and its length (1, and fixed, if `unit`)."""

    def __init__(self, features: int, prototypes: int, unit: bool):
        super().__init__()
        self.direction = nn.Parameter(nn.Linear(features, prototypes, bias=False).weight.detach())
        self.length = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not unit)

    def forward(self, x: Tensor) -> Tensor:
        # What torch's own parametrisation calls: one pass over the largest weight, a head in 0.6 of the time.
        return F.linear(x, torch._weight_norm(self.direction, self.length, 0))


class DinoHead(nn.Module):
    """Three layers, a bottleneck of length 1, prototypes: features (N, D) to logits (N, K). Caron et al., app. C."""

    def __init__(
        self,
        features: int,
        prototypes: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ):
        super().__init__()

        def layer(inputs: int) -> list[nn.Module]:
            return [nn.Linear(inputs, hidden), *([BatchNorm(hidden)] if batch_norm else []), nn.GELU()]

        self.mlp = nn.Sequential(*layer(features), *layer(hidden), nn.Linear(hidden, bottleneck))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = Prototypes(bottleneck, prototypes, unit=norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def drop_path_everywhere(model: VisionTransformer, rate: float) -> None:
    """Stochastic depth at the same rate in every block, as DINOv2; timm's grows linearly from 0."""
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


def tokens_seen(model: VisionTransformer, images: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
    """The last layer's normalised tokens (B, prefix + N, D) where the patches `hidden` (B, N) are `mask_token` (1, D).

    A hidden patch keeps its position. iBOT (Zhou et al. 2022, section 3.2), as `model.forward_features` otherwise.
    """
    x = model.patch_embed(images)  # (B, h, w, D)
    x = torch.where(hidden.view(*x.shape[:3], 1), mask_token.to(x.dtype), x)
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
    x = checkpoint_seq(model.blocks, x) if model.grad_checkpointing and model.training else model.blocks(x)
    return model.norm(x)


@torch.no_grad()
def patch_tokens(model: VisionTransformer, images: Tensor) -> Tensor:
    """The last layer's patch features (B, h, w, D) of normalised images (B, 3, H, W), one a patch."""
    tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    return tokens.unflatten(1, model.patch_embed.dynamic_feat_size(images.shape[-2:]))


@torch.no_grad()
def attention_maps(model: VisionTransformer, images: Tensor) -> Tensor:
    """How much the CLS token attends to each patch in the last block: (B, heads, h, w), sums at most 1 a head.

    images (B, 3, H, W) normalised. The rest of a head's attention is on CLS and registers.
    """
    seen = {}
    attention = model.blocks[-1].attn
    hook = attention.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    try:
        model.forward_features(images)
    finally:
        hook.remove()
    b, n, _ = seen["x"].shape
    query, key, _ = attention.qkv(seen["x"]).view(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = attention.q_norm(query[:, :, :1]) * attention.scale @ attention.k_norm(key).mT
    patches = weights.softmax(-1)[:, :, 0, model.num_prefix_tokens :]
    return patches.unflatten(2, model.patch_embed.dynamic_feat_size(images.shape[-2:]))
