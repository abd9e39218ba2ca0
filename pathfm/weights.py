"""Where a backbone starts from: weights of timm, a folder or a file, made to fit another patch, size and input."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from pathfm.errors import InputError
from pathfm.storage import read_json

WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "pytorch_model.bin")  # of a folder in timm's format, the first that is there
MEAN = STD = (0.5, 0.5, 0.5)  # inputs in [-1, 1], as the kaiko models; travels with the weights
STEM = "patch_embed.proj"
SEEN = {"lvd142m": "LVD-142M", "in21k": "ImageNet", "in1k": "ImageNet", "dino": "ImageNet"}  # by what is in timm's tags


class Start(NamedTuple):
    """Weights to start from."""

    tensors: dict[str, Tensor]  # by timm's names, without heads
    said: str  # where they come from
    mean: tuple[float, ...] = MEAN  # of the inputs that they were trained on,
    std: tuple[float, ...] = STD  # red, green and blue from 0 to 1


def of_timm(name: str, own: dict[str, Any]) -> Start:
    """timm's weights for `name` (`with_tag`) at their own size. Raises InputError where they cannot be had.

    own  what was asked of the model that is not as `name` has it
    """
    if own:
        raise InputError(f"ImageNet weights fit {name} as it is, not with {own}; take init='random'")
    try:
        theirs = timm.create_model(with_tag(name), pretrained=True, num_classes=0)
    except Exception as error:  # timm and its hub client raise whatever the network or the cache made them
        raise InputError(
            f"ImageNet weights of {name} cannot be fetched ({type(error).__name__}); set init to a local folder "
            "(config.json and model.safetensors, ours or timm's) or file of weights, or take init='random'"
        ) from error
    about = theirs.pretrained_cfg  # its mean and std are of these weights, not of the name's default ones
    tag = about.get("tag") or "default"
    return Start(
        theirs.state_dict(),
        f"{_seen(tag)} weights of timm ({about['architecture']}.{tag})",
        tuple(about["mean"]),
        tuple(about["std"]),
    )


def with_tag(name: str) -> str:
    """The name by which timm has the weights that "imagenet" stands for: DINO's own, where there are such of `name`.

    kaiko's baselines on ImageNet are DINO's and DINOv2's weights; timm's own choice for ViT-S/16, B/16 and B/8 was
    trained with labels. A name that has a tag, such as vit_small_patch16_224.augreg_in21k, keeps it.
    """
    return f"{name}.dino" if timm.models.is_model_pretrained(f"{name}.dino") else name


def _seen(tag: str) -> str:
    """What images weights were trained on, by timm's tag for them: those of a DINOv2 ViT are not of ImageNet."""
    return next((name for mark, name in SEEN.items() if mark in tag), "pretrained")


def of_path(path: str | Path) -> Start:
    """The weights in a folder of ours or timm's, or in a file; of a run's or DINO's checkpoint the teacher's.

    What a config.json beside them says of mean and std holds; without one they are taken to be 0.5.
    """
    path = Path(path)
    config = (path if path.is_dir() else path.parent) / "config.json"
    mean, std = normalisation(read_json(config) if config.is_file() else {})
    tensors = backbone_of(read_weights(path), path)
    return Start(tensors, f"weights of {'/'.join(path.parts[-2:])}", mean, std)


def normalisation(config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """mean and std of the inputs in a config.json, by timm's present layout or its first; 0.5 where it says none."""
    about = config.get("pretrained_cfg") or config
    return tuple(about.get("mean", MEAN)), tuple(about.get("std", STD))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a folder's weights or in a file, by name, those of a dict in a dict by "outer.inner".

    No code that a file may hold is run. Raises InputError where there is none, or where it is damaged.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None:
            raise InputError(f"{path} holds no {WEIGHTS}; init takes a folder as pathfm or timm exports it")
    if not file.is_file():
        raise InputError(f"init='{path}' is neither 'imagenet' nor 'random' nor a folder or file that exists")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's checkpoints keep their arguments in one
            return dict(_tensors(torch.load(file, map_location="cpu", weights_only=True)))
    except Exception as error:  # safetensors, zipfile and torch each have their own
        raise InputError(
            f"{file} holds no weights that can be read ({type(error).__name__}); fetch or export them again"
        ) from error


def _tensors(nested: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors in dicts of dicts."""
    for name, value in nested.items() if isinstance(nested, dict) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.")


def backbone_of(tensors: dict[str, Tensor], said: str | Path, which: str = "teacher") -> dict[str, Tensor]:
    """The part of a checkpoint that is a ViT by timm's or DINO's names, the teacher's (`which`) where it has one.

    Raises InputError where it has none.
    """
    end = f"{STEM}.weight"
    starts = [name.removesuffix(end) for name in tensors if name.endswith(end) and not name.startswith("optimi")]
    if not starts:
        raise InputError(f"{said} holds no '{end}'; its parameters are not named as timm's or DINO's, convert them")
    start = min(starts, key=lambda name: (which not in name, "ema" not in name, len(name)))
    # DINOv2's training code counts blocks within chunks: blocks.1.13 is block 13
    return {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name.removeprefix(start)): value
        for name, value in tensors.items()
        if name.startswith(start)
    }


def fit_weights(model: VisionTransformer, start: Start) -> None:
    """Loads `start` into `model`, patch and position embeddings interpolated, classifiers left out.

    The model takes inputs of mean and std 0.5; where the weights were trained on others, that difference goes into
    the patch embedding, and the features of a pixel stay what they were. Raises InputError that names the first
    parameter that is missing, foreign or of another shape.
    """
    logging.getLogger("timm").setLevel(logging.ERROR)
    state = {
        name: value
        for name, value in checkpoint_filter_fn(renormalised(start), model).items()
        if not name.startswith(("head.", "head_dist.", "fc."))
    }
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in state:
            raise InputError(f"{start.said}: parameter {name} is missing; the model is another one")
        if state[name].shape != value.shape:
            raise InputError(
                f"{start.said}: parameter {name} is {tuple(state[name].shape)}, the model has "
                f"{tuple(value.shape)}; choose model, depth, width and heads as the weights have them"
            )
    for name in state:
        if name not in wanted:
            raise InputError(f"{start.said}: parameter {name} is not in the model; the model is another one")
    model.load_state_dict(state)


def renormalised(start: Start) -> dict[str, Tensor]:
    """The tensors, with a patch embedding that takes inputs of mean and std 0.5 in place of the weights' own.

    Exact: (pixel - mean) / std = scale x + shift for x = (pixel - 0.5) / 0.5, and a linear map swallows both.
    Raises InputError where the embedding has no bias to put the shift into.
    """
    tensors = dict(start.tensors)
    if (start.mean, start.std) == (MEAN, STD):
        return tensors
    weight, bias = tensors[f"{STEM}.weight"], tensors.get(f"{STEM}.bias")
    if bias is None:
        raise InputError(f"{start.said} take inputs of mean {start.mean}, and their patch embedding has no bias")
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (start.mean, start.std))
    by_channel = weight.double().reshape(len(weight), 3, -1, 1)
    shift = (by_channel * (0.5 - mean) / std).sum((1, 2, 3))
    tensors[f"{STEM}.weight"] = (by_channel * 0.5 / std).to(weight).view_as(weight)
    tensors[f"{STEM}.bias"] = (bias.double() + shift).to(bias)
    return tensors


def from_folder(folder: str | Path) -> tuple[VisionTransformer, dict]:
    """The backbone in a folder of config.json and weights, and its config. Ours or timm's; inputs as it had them."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if "architecture" not in config:
        raise InputError(f"{folder / 'config.json'} names no architecture; it is no folder of timm's format")
    model = timm.create_model(config["architecture"], **{**config.get("model_args", {}), "num_classes": 0})
    fit_weights(model, Start(backbone_of(read_weights(folder), folder), str(folder)))
    return model.eval(), config
