"""A backbone as a folder that timm, and whatever is built on it, loads: config.json, model.safetensors, a card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pathfm import weights
from pathfm.errors import InputError
from pathfm.storage import atomic, write_json
from pathfm.weights import MEAN, STD

LAYER_SCALE = 1e-5  # says that there is one; its values are in the weights


@dataclass(frozen=True)
class Preprocess:
    """Tiles as a backbone wants them."""

    input_px: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, images: np.ndarray | Tensor, resize: bool = True) -> Tensor:
        """Normalised float32 (B, 3, h, w) of uint8 tiles (B, H, W, 3), or of one (H, W, 3).

        Resized to input_px a side, antialiased, so that the effective mpp is tile mpp x H / input_px; with
        `resize=False` the pixels stay, and H and W must be multiples of the patch.
        """
        x = torch.as_tensor(images)
        x = (x if x.ndim == 4 else x[None]).permute(0, 3, 1, 2).float() / 255
        if resize and x.shape[-2:] != (self.input_px, self.input_px):
            x = F.interpolate(x, (self.input_px, self.input_px), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = x.new_tensor(self.mean), x.new_tensor(self.std)
        return (x - mean[:, None, None]) / std[:, None, None]

    def effective_mpp(self, mpp: float, side_px: int, resize: bool = True) -> float:
        """Microns per pixel that the model sees of tiles of `side_px` at `mpp`."""
        return mpp * side_px / self.input_px if resize else mpp


def export(model: VisionTransformer, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
    """Writes `model` so that `timm.create_model("local-dir:<folder>", pretrained=True)` gives its features.

    card  what a reader should know, by heading: data, recipe, init, commit, ...; README.md lists it
    """
    folder = Path(folder)
    px, width = model.patch_embed.img_size[0], model.num_features
    arguments = {
        "img_size": px,
        "patch_size": model.patch_embed.patch_size[0],
        "embed_dim": width,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "dynamic_img_size": True,
    }
    if model.num_reg_tokens:
        arguments["reg_tokens"] = model.num_reg_tokens
    if hasattr(model.blocks[0].ls1, "gamma"):
        arguments["init_values"] = LAYER_SCALE
    config = {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": 0,
        "num_features": width,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "pathfm",
            "input_size": [3, px, px],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "pathfm": card or {},
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic(folder / weights.WEIGHTS) as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt"}))
    with atomic(folder / "README.md", "w") as file:
        file.write(_card(config))
    write_json(folder / "config.json", config)  # last: a folder with a config is a whole one
    return folder


def load(folder: str | Path) -> tuple[VisionTransformer, Preprocess]:
    """The backbone of an exported folder, ready to embed (eval mode, CPU), and its preprocessing.

    `model(preprocess(tiles))` are CLS features (B, D); `pathfm.vit.patch_tokens` gives the patches' own.
    Raises InputError where the folder is none of ours or timm's, or damaged.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is no folder; give one with config.json and {weights.WEIGHTS}")
    model, config = weights.from_folder(folder)
    pretrained = config.get("pretrained_cfg", {})
    return model, Preprocess(
        model.patch_embed.img_size[0], tuple(pretrained.get("mean", MEAN)), tuple(pretrained.get("std", STD))
    )


def _card(config: dict[str, Any]) -> str:
    """A model card in Markdown."""
    lines = [f"# {config['architecture']}, pretrained with pathfm", ""]
    lines += [
        "```python",
        'model = timm.create_model("local-dir:<this folder>", pretrained=True)',
        "```",
        "",
        f"Input: {config['pretrained_cfg']['input_size'][1]} px tiles, mean = std = 0.5. Output: the CLS token, "
        f"{config['num_features']} features.",
        "",
    ]
    for heading, content in config["pathfm"].items():
        text = content if isinstance(content, str) else f"```json\n{json.dumps(content, indent=2, default=str)}\n```"
        lines += [f"## {heading}", "", text, ""]
    return "\n".join(lines)
