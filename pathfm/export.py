"""A backbone as a folder that timm, and whatever is built on it, loads: config.json, model.safetensors, a card."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pathfm import card, weights
from pathfm.errors import InputError, nearest
from pathfm.storage import atomic, cache_dir, read_json, write_json
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


def export(model: VisionTransformer, folder: str | Path, about: dict[str, Any] | None = None) -> Path:
    """Writes `model` so that `timm.create_model("local-dir:<folder>", pretrained=True)` gives its features.

    about  what a reader should know, by heading; README.md, the model card, lists it (`pathfm.card`)
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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    written = safetensors.torch.save(tensors, {"format": "pt"})
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
        "weights_sha256": hashlib.sha256(written).hexdigest(),
        "pathfm": about or {},
    }
    with atomic(folder / weights.WEIGHTS) as file:
        file.write(written)
    with atomic(folder / "README.md", "w") as file:
        file.write(card.markdown(config))
    write_json(folder / "config.json", config)  # last: a folder with a config is a whole one
    return folder


def export_run(folder: str | Path, out: str | Path, which: str = "teacher", licence: str = "") -> Path:
    """Writes the teacher's or student's backbone of the finished run in `folder` to `out`, with its card.

    which    "teacher" (what leaves by itself, at <folder>/teacher) or "student", from the run's last checkpoint
    licence  of the weights; the card says that it is not stated where this is empty, and why

    Raises InputError where the run is not finished, and for another `which`.
    """
    from pathfm import checkpoint, logbook

    if which not in ("teacher", "student"):
        raise InputError(f"which='{which}' is unknown.{nearest(which, ('teacher', 'student'))}")
    folder = Path(folder)
    newest = checkpoint.newest(folder)
    if newest is None:
        raise InputError(f"{folder} holds no checkpoint; give the folder that `pathfm pretrain` wrote to")
    network, _ = of_checkpoint(newest[0], which)
    looks = logbook.read(folder / "watches.csv")
    return export(network, out, card.of_run(read_json(folder / "params.json"), looks, which, licence))


def of_checkpoint(path: str | Path, which: str = "teacher") -> tuple[VisionTransformer, Preprocess]:
    """A backbone as a checkpoint in a finished run's folder has it, as `load` gives the exported one.

    which   "teacher" or "student"
    """
    from pathfm import checkpoint

    network, preprocess = load(Path(path).parent / "teacher")
    tensors, _ = checkpoint.load(path)
    weights.fit_weights(network, weights.Start(weights.backbone_of(tensors, path, which), str(path)))
    return network, preprocess


def load(where: str | Path) -> tuple[VisionTransformer, Preprocess]:
    """The backbone of an exported folder, ready to embed (eval mode, CPU), and its preprocessing.

    `model(preprocess(tiles))` are CLS features (B, D); `pathfm.vit.patch_tokens` gives the patches' own.

    where  a folder, or the address of one (http://...), whose two files are fetched once and kept in the cache

    Raises InputError where the folder is none of ours or timm's, cannot be fetched, or is damaged.
    """
    folder = fetched(str(where)) if "://" in str(where) else Path(where)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one with config.json and {weights.WEIGHTS}")
    model, config = weights.from_folder(folder)
    return model, Preprocess(model.patch_embed.img_size[0], *weights.normalisation(config))


def fetched(url: str) -> Path:
    """A folder in the cache with the config.json and the weights that lie below `url`, whole, and as exported.

    Ours say the hash of their weights, which must hold. Raises InputError where they cannot be had.
    """
    from pathfm.fetch import fetch

    url = url.rstrip("/")
    folder = cache_dir() / "hub" / hashlib.sha256(url.encode()).hexdigest()[:16]
    (config,) = fetch([f"{url}/config.json"], folder)
    checksum = read_json(config).get("weights_sha256")
    fetch([f"{url}/{weights.WEIGHTS}" + (f"#sha256={checksum}" if checksum else "")], folder)
    return folder
