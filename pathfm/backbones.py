"""Any backbone by its name: a folder, timm's, torch.hub's; as a module whose tokens the features are pooled from."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from pathfm import export
from pathfm.errors import InputError, nearest

FORMS = "a folder of an export, timm:<model>, random:<timm model>, hub:<owner/repo or folder>:<entry>, or twin: and one"


def load(
    name: str | Path, mean: float | None = None, std: float | None = None, input_px: int = 0, seed: int = 0
) -> tuple[nn.Module, export.Preprocess]:
    """A backbone in eval mode on the CPU, and its preprocessing.

    name      a folder that `pathfm.export` or timm wrote; "timm:vit_small_patch16_224.dino" (its weights are fetched,
              or cached); "random:vit_small_patch16_224" (drawn by `seed`); "hub:owner/repo:entry" or
              "hub:/folder:entry". torch.hub runs the code of that repository, and asks before it fetches a new one.
              "twin:" before any of them is its `random_twin`, drawn by `seed`
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
    elif kind == "twin":
        model, own = _made(rest, 0)
        return random_twin(model, seed), own
    elif Path(name).is_dir():
        return export.load(name)
    else:
        raise InputError(f"backbone '{name}' is none of: {FORMS}; a folder that does not exist is none either")
    return model.eval(), _own(model)


class Tokens(nn.Module):
    """A network of another make, whose `forward_features` gives (B, 1 + prefix + patches, D), the CLS token first.

    patches  whether it gives patch tokens
    layers   network, images, n, norm -> the same of its last n blocks, behind the final norm or, where the network
             has them, before it; None where it gives its last layer alone
    """

    def __init__(
        self,
        network: nn.Module,
        tokens: Callable[[nn.Module, Tensor], Tensor],
        prefix: int,
        patches: bool,
        layers: Callable[[nn.Module, Tensor, int, bool], list[Tensor]] | None = None,
    ):
        super().__init__()
        self.network, self.tokens, self.num_prefix_tokens, self.layers = network, tokens, prefix, layers
        self.cls_token, self.patches = True, patches  # that there is one

    def forward_features(self, x: Tensor) -> Tensor:
        return self.tokens(self.network, x)


def only_cls(model: nn.Module) -> bool:
    """Whether a network gives one vector an image and no patch tokens."""
    return not getattr(model, "patches", True)


def kind(model: nn.Module) -> str:
    """What a network is, by the name of its class."""
    return type(model.network if isinstance(model, Tokens) else model).__name__


def check_layers(model: nn.Module, n: int, name: str) -> None:
    """Raises InputError where a network does not give the tokens of its last n blocks; `name` is what it is called."""
    if n == 1:
        return
    if isinstance(model, Tokens) and model.layers is None:
        what = "one vector an image" if only_cls(model) else "the tokens of its last layer alone"
        raise InputError(f"{name} gives {what}: it has no get_intermediate_layers; take layers=1")
    own = model.network if isinstance(model, Tokens) else model
    depth = getattr(own, "n_blocks", len(getattr(own, "blocks", ())))
    if not 1 <= n <= depth:
        raise InputError(f"{name} has {depth} blocks, not the {n} layers asked for; take 1 to {max(depth, 1)}")


def last_layers(model: nn.Module, x: Tensor, n: int) -> list[Tensor]:
    """The tokens (B, prefix + N, D) of the last n blocks, each behind the final norm, from early to late.

    Of a convolutional network, n = 1, its last map (B, D, h, w).
    """
    if n == 1:
        return [model.forward_features(x)]
    if isinstance(model, Tokens):
        return model.layers(model.network, x, n, True)
    how = {"return_prefix_tokens": True, "output_fmt": "NLC", "norm": True, "intermediates_only": True}
    return [torch.cat([prefix, patches], 1) for patches, prefix in model.forward_intermediates(x, n, **how)]


def patch_map(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """The patch tokens (B, D, h, w) of the last block before the final norm, as eva takes them.

    A network of torch.hub that has them only behind the norm, such as the first DINO's, gives those. Raises InputError
    where a network, which is called `name`, gives none, or none of a square grid.
    """
    if not isinstance(model, Tokens) and hasattr(model, "forward_intermediates"):
        return model.forward_intermediates(x, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True)[0]
    if not isinstance(model, Tokens) or only_cls(model):
        raise InputError(
            f"{name} ({kind(model)}) gives no patch tokens, which a decoder of masks needs; take a network of timm, or "
            "one of torch.hub with get_intermediate_layers"
        )
    found = model.forward_features(x) if model.layers is None else model.layers(model.network, x, 1, False)[0]
    patches = found[:, model.num_prefix_tokens :]
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise InputError(f"{name} ({kind(model)}) gives {patches.shape[1]} patch tokens, which are no square")
    return patches.mT.unflatten(2, (side, side))


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
        model = torch.hub.load(where, entry, source="local" if local else "github", **known)
    except Exception as error:  # the repository's own code runs here and may raise anything
        logging.getLogger(__name__).debug("torch.hub", exc_info=True)
        raise InputError(f"torch.hub cannot load '{entry}' of {where}: {type(error).__name__}: {error}") from None
    if not isinstance(model, nn.Module):
        raise InputError(f"'{entry}' of {where} gives a {type(model).__name__} and no torch.nn.Module; wrap it in one")
    return model


def _with_tokens(model: nn.Module) -> nn.Module:
    """The model where it is made like timm's, else in Tokens: DINOv2's (a dict), DINO's (get_intermediate_layers)."""
    if getattr(model, "num_prefix_tokens", None) is not None:
        return model
    ask = getattr(model, "get_intermediate_layers", None)
    layers = None
    if ask is not None:
        layers = _of_dinov2 if "return_class_token" in inspect.signature(ask).parameters else _of_dino
    if hasattr(model, "forward_features") and hasattr(model, "mask_token"):
        return Tokens(model, _dinov2, 1, patches=True, layers=layers)
    if layers:
        return Tokens(model, lambda network, x: layers(network, x, 1, True)[0], 1, patches=True, layers=layers)
    return Tokens(model, _vector, 1, patches=False)


def _of_dino(network: nn.Module, x: Tensor, n: int, norm: bool) -> list[Tensor]:
    """Of the first DINO, whose layers are whole and always behind the norm."""
    return list(network.get_intermediate_layers(x, n=n))


def _of_dinov2(network: nn.Module, x: Tensor, n: int, norm: bool) -> list[Tensor]:
    """Of DINOv2 and its heirs: patch tokens and CLS token apart, registers left out."""
    found = network.get_intermediate_layers(x, n=n, return_class_token=True, norm=norm)
    return [torch.cat([cls[:, None], patches], dim=1) for patches, cls in found]


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


def random_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same architecture with weights drawn anew by its own initialisation: the floor of every backbone.

    What no initialisation of its own reaches is drawn by `_drawn`. Raises InputError for a weight that nothing says
    how to draw: a trained one that stayed would make the floor no floor.
    """
    twin = copy.deepcopy(model).cpu()
    own = twin.network if isinstance(twin, Tokens) else twin
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in own.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)  # whatever is NaN afterwards was not drawn
        for module in own.modules():
            for reset in ("_reset_parameters", "reset_parameters"):  # torch's attention has the first
                if hasattr(module, reset):
                    getattr(module, reset)()
        _initialise(own)
        for name, module in own.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.isnan().any():
                    _drawn(f"{name}.{key}".lstrip("."), module, parameter)
    return twin.eval()


def _initialise(module: nn.Module) -> None:
    """Calls init_weights of the outermost modules that have it: timm's and DINOv2's tokens, positions and ranges."""
    if hasattr(module, "init_weights"):
        module.init_weights()
        return
    for child in module.children():
        _initialise(child)


def _drawn(name: str, module: nn.Module, parameter: nn.Parameter) -> None:
    """A bare parameter as ViTs and their kin start: tokens, positions and tables from a truncated normal of 0.02, the
    scale of a residual branch at what its module says or CaiT's 1e-5, further scales at 1, biases at 0.
    """
    key = name.rpartition(".")[2]
    if "gamma" in key or "layer_scale" in key:
        said = getattr(module, "init_values", 1e-5)
        parameter.fill_(said if isinstance(said, float) else 1e-5)
    elif key.endswith("bias"):
        parameter.zero_()
    elif key.endswith(("scale", "temperature")) or (key == "weight" and parameter.ndim == 1):
        parameter.fill_(1)
    elif parameter.ndim > 1 or re.search("token|embed|pos|table", key):
        nn.init.trunc_normal_(parameter, std=0.02)
    else:
        raise InputError(
            f"random weights of {type(module).__name__} cannot be drawn: nothing initialises {name}; give its module a "
            "method reset_parameters"
        )
