"""Any backbone by its name: a folder, timm's, torch.hub's; as a module whose tokens the features are pooled from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from pathfm import export
from pathfm.errors import InputError, nearest

FORMS = "a folder of an export, timm:<model>, random:<timm model> or hub:<owner/repo or folder>:<entry>"


def load(
    name: str | Path, mean: float | None = None, std: float | None = None, input_px: int = 0, seed: int = 0
) -> tuple[nn.Module, export.Preprocess]:
    """A backbone in eval mode on the CPU, and its preprocessing.

    name      a folder that `pathfm.export` or timm wrote; "timm:vit_small_patch16_224.dino" (its weights are fetched,
              or cached); "random:vit_small_patch16_224" (drawn by `seed`); "hub:owner/repo:entry" or
              "hub:/folder:entry". torch.hub runs the code of that repository, and asks before it fetches a new one
    mean, std, input_px   of all channels and in pixels, in place of the model's own; a model of torch.hub that does
              not say them needs all three

    Raises InputError for a name of none of these forms, an unknown timm model, weights that cannot be had.
    """
    model, own = _made(name, seed)
    return model, _replaced(own, mean, std, input_px)


def network(name: str | Path, seed: int = 0) -> nn.Module:
    """The backbone alone, as `load` takes it: for whom has a preprocessing of his own."""
    return _made(name, seed)[0]


def _made(name: str | Path, seed: int) -> tuple[nn.Module, export.Preprocess | None]:
    kind, _, rest = str(name).partition(":")
    if kind in ("timm", "random"):
        model = _timm(rest, kind == "timm", seed)
    elif kind == "hub":
        model = _with_tokens(_hub(rest))
    elif Path(name).is_dir():
        return export.load(name)
    else:
        raise InputError(f"backbone '{name}' is none of: {FORMS}; a folder that does not exist is none either")
    return model.eval(), _own(model)


class Tokens(nn.Module):
    """A network of another make, whose `forward_features` gives (B, 1 + prefix + patches, D), the CLS token first."""

    def __init__(self, network: nn.Module, tokens: Callable[[nn.Module, Tensor], Tensor], prefix: int, patches: bool):
        super().__init__()
        self.network, self.tokens, self.num_prefix_tokens = network, tokens, prefix
        self.cls_token, self.patches = True, patches  # that there is one

    def forward_features(self, x: Tensor) -> Tensor:
        return self.tokens(self.network, x)


def only_cls(model: nn.Module) -> bool:
    """Whether a network gives one vector an image and no patch tokens."""
    return not getattr(model, "patches", True)


def widest(model: nn.Module) -> str:
    """The pool that holds all that a network has: "both"; without CLS token "mean"; of one vector an image "cls"."""
    if only_cls(model):
        return "cls"
    return "both" if getattr(model, "cls_token", None) is not None else "mean"


def _timm(name: str, pretrained: bool, seed: int) -> nn.Module:
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        raise InputError(f"timm has no model '{name}'.{nearest(name, timm.list_models(f'{name[:5]}*'))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:  # no network, no such weights, another shape
            raise InputError(
                f"timm's '{name}' cannot be made ({str(error).splitlines()[0]}); download its folder and give that"
            ) from None


def _hub(name: str) -> nn.Module:
    where, _, entry = name.rpartition(":")
    if not where or not entry:
        raise InputError(f"'hub:{name}' names no repository and entry; write hub:owner/repo:entry or hub:folder:entry")
    local = Path(where).expanduser().is_dir()
    try:
        known = {} if local else {"trust_repo": "check"}
        return torch.hub.load(where, entry, source="local" if local else "github", **known)
    except Exception as error:  # the repository's own code runs here and may raise anything
        logging.getLogger(__name__).debug("torch.hub", exc_info=True)
        raise InputError(f"torch.hub cannot load '{entry}' of {where}: {type(error).__name__}: {error}") from None


def _with_tokens(model: nn.Module) -> nn.Module:
    """The model where it is made like timm's, else in Tokens: DINOv2's (a dict), DINO's (get_intermediate_layers)."""
    if getattr(model, "num_prefix_tokens", None) is not None:
        return model
    if hasattr(model, "forward_features") and hasattr(model, "mask_token"):
        return Tokens(model, _dinov2, 1, patches=True)
    if hasattr(model, "get_intermediate_layers"):
        return Tokens(model, lambda network, x: network.get_intermediate_layers(x, 1)[0], 1, patches=True)
    return Tokens(model, _vector, 1, patches=False)


def _dinov2(network: nn.Module, x: Tensor) -> Tensor:
    found = network.forward_features(x)
    return torch.cat([found["x_norm_clstoken"][:, None], found["x_norm_patchtokens"]], dim=1)


def _vector(network: nn.Module, x: Tensor) -> Tensor:
    found = network(x)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise InputError(f"{type(network).__name__} gives no vector (B, D) an image, but {type(found).__name__}")
    return found[:, None]


def _own(model: nn.Module) -> export.Preprocess | None:
    """What timm says of its models; None where a model says nothing."""
    if not getattr(model, "pretrained_cfg", None):
        return None
    said = resolve_model_data_config(model)
    embed = getattr(model, "patch_embed", None)
    side = embed.img_size[0] if getattr(embed, "img_size", None) else said["input_size"][-1]
    return export.Preprocess(side, tuple(said["mean"]), tuple(said["std"]))


def _replaced(own: export.Preprocess | None, mean: float | None, std: float | None, input_px: int) -> export.Preprocess:
    if own is None and (mean is None or std is None or not input_px):
        raise InputError("this backbone does not say how it wants its input; give mean, std and input_px")
    if (std is not None and std <= 0) or input_px < 0:
        raise InputError(f"std and input_px are above 0, not {std} and {input_px}")
    own = own or export.Preprocess(input_px)
    return export.Preprocess(
        input_px or own.input_px,
        own.mean if mean is None else (float(mean),) * 3,
        own.std if std is None else (float(std),) * 3,
    )
