"""What a pretraining run is told: one flat dataclass, a unit and a source beside every default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pathfm.errors import InputError, nearest

# Sources: [dino] main_dino.py and vision_transformer.py of facebookresearch/dino (Caron et al. 2021), where the
# authors count in epochs of 100 this counts in shares of the run; [dinov2] Oquab et al. 2023 and their code;
# [tellez] Tellez et al. 2019, Medical Image Analysis 58; [kaiko] arXiv 2404.15217; [ours] our choice.
CHOICES = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "precision": ("auto", "float32", "bfloat16"),
    "attention": ("auto", "fused", "plain"),
}


def setting(default: Any, why: str) -> Any:
    """A field with its default, and its unit, reason and source for --help and for notebooks."""
    return dataclasses.field(default=default, metadata={"help": why})


@dataclass(frozen=True)
class PretrainConfig:
    """DINO as published, on tiles. `PretrainConfig.of(**fields)` names the nearest field when one is misspelt."""

    # tiles
    mpp: tuple[float, ...] = setting(
        (0.25, 0.5, 1.0, 2.0), "microns per pixel of a tile, equal weights; [kaiko], weights [ours]"
    )
    tile_px: int = setting(256, "tile side in pixels before cropping; [kaiko]")
    min_tissue: float = setting(0.4, "least share of foreground in a tile; [kaiko]")
    # backbone
    model: str = setting("vit_small_patch16_224", "timm name; ViT-S/16 is [kaiko]'s ablation model")
    init: str = setting("imagenet", "'imagenet', 'random', or a folder or file of weights; [kaiko]")
    depth: int = setting(0, "blocks; 0 = the model's own")
    width: int = setting(0, "features; 0 = the model's own")
    heads: int = setting(0, "attention heads; 0 = the model's own")
    drop_path: float = setting(0.1, "stochastic depth of the student's last block, linear from 0; [dino]")
    # views
    global_px: int = setting(224, "side of a global view in pixels; [dino]")
    local_px: int = setting(96, "side of a local view in pixels; [dino]")
    local_views: int = setting(8, "small crops per tile; [dino]")
    global_scale: tuple[float, ...] = setting((0.4, 1.0), "share of the tile's area in a global crop; [dino]")
    local_scale: tuple[float, ...] = setting((0.05, 0.4), "share of the tile's area in a local crop; [dino]")
    flip: float = setting(0.5, "probability of a left-right flip; [dino]")
    vertical_flip: float = setting(0.0, "probability of an upside-down flip; [dino] has none, tissue allows 0.5")
    jitter: float = setting(0.8, "probability of colour jitter; [dino]")
    brightness: float = setting(0.4, "factor within 1 +- this; [dino]")
    contrast: float = setting(0.4, "factor within 1 +- this; [dino]")
    saturation: float = setting(0.2, "factor within 1 +- this; [dino]")
    hue: float = setting(0.1, "turns of the colour circle, +- this; [dino]")
    stain: float = setting(0.0, "amount of each dye within 1 +- this, and a tenth of it added; 0 = none; [tellez]")
    grayscale: float = setting(0.2, "probability of losing colour; [dino]")
    blur: tuple[float, ...] = setting((1.0, 0.1, 0.5), "probability: first global, second global, local; [dino]")
    blur_sigma_px: tuple[float, ...] = setting((0.1, 2.0), "of the Gaussian, in view pixels; [dino]")
    solarise: float = setting(0.2, "probability, second global view only; [dino]")
    # head
    prototypes: int = setting(65536, "outputs K of the head; [dino]")
    head_hidden: int = setting(2048, "width of the head's two hidden layers; [dino]")
    head_bottleneck: int = setting(256, "features before the last layer; [dino]")
    head_norm: bool = setting(False, "BatchNorm in the head; [dino] without")
    norm_last_layer: bool = setting(True, "prototypes of length 1; [dino]")
    # teacher
    momentum: float = setting(0.996, "of the teacher's moving average, cosine to 1; [dino]")
    centre_momentum: float = setting(0.9, "of the centre's moving average; [dino]")
    student_temperature: float = setting(0.1, "of the student's softmax; [dino]")
    teacher_temperature: float = setting(0.04, "of the teacher's softmax after warm-up; [dino]")
    teacher_temperature_start: float = setting(0.04, "before it; [dino]")
    temperature_warmup: float = setting(0.0, "share of the run; [dino] (0.1 in its longest recipe)")
    # loss
    koleo: float = setting(
        0.0, "weight of the spread of a batch's features; 0 = DINO as published, DINOv2 has 0.1; [dinov2]"
    )
    # optimiser
    steps: int = setting(50_000, "optimiser steps; [ours], [kaiko] counts 100 epochs of unknown length")
    batch_size: int = setting(256, "tiles a step; [kaiko]'s ablations")
    base_lr: float = setting(5e-4, "AdamW, at 256 tiles a batch, scaled linearly; [dino]")
    min_lr: float = setting(1e-6, "at the end of the cosine; [dino]")
    warmup: float = setting(0.1, "share of the run in which the rate rises from 0; [dino] 10 of 100 epochs")
    weight_decay: float = setting(0.04, "at the start; not on biases and norms; [dino]")
    weight_decay_end: float = setting(0.4, "at the end of its cosine; [dino]")
    clip: float = setting(3.0, "greatest gradient norm of each parameter, 0 = none; [dino]")
    freeze_last_layer: float = setting(
        0.01, "share of the run in which the prototypes stand still; [dino] 1 epoch of 100"
    )
    # running
    seed: int = setting(0, "of weights, views and stochastic depth; the stream has its own")
    device: str = setting("auto", "'auto': cuda, else cpu")
    precision: str = setting("auto", "of the networks, losses are float32; 'auto': bfloat16 where it is fast")
    attention: str = setting("auto", "'auto': fused, but plain on a CPU, where fused is 1.7 times slower; [ours]")
    threads: int = setting(0, "CPU threads of torch; 0 = as they are")
    workers: int = setting(0, "processes that read tiles")
    checkpoint_every: int = setting(500, "steps; [ours]")
    watch_every: int = setting(1000, "steps between looks at the validation tiles, 0 = none; [ours]")
    watch_tiles: int = setting(4096, "validation tiles looked at; [ours], at least 10 a feature for RankMe")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name)))
        _check(self)

    @classmethod
    def of(cls, **fields: Any) -> PretrainConfig:
        """The defaults with `fields` replaced, e.g. `of(**SMOKE, steps=10)`. Raises InputError for unknown names."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise InputError(f"PretrainConfig has no field '{name}'.{nearest(name, known)}")
        return cls(**fields)

    def replace(self, **fields: Any) -> PretrainConfig:
        """A copy with `fields` replaced."""
        return self.of(**{**dataclasses.asdict(self), **fields})

    @property
    def views(self) -> int:
        """Views of one tile: two global and the local ones."""
        return 2 + self.local_views

    @property
    def lr(self) -> float:
        """Peak learning rate of this batch size."""
        return self.base_lr * self.batch_size / 256


# Proves the machinery on one CPU core in some ten seconds; every value [ours]. At 1 and 2 mpp, because 224 px tiles
# at 0.5 mpp seen at 64 px are 1.75 mpp. float32, so that another machine prints the same rounded losses. The rate
# suits some 50 steps; over hundreds the teacher drifts to no opinion (entropy log K), and 2e-3 delays that.
SMOKE: dict[str, Any] = {
    "mpp": (1.0, 2.0),
    "tile_px": 72,
    "global_px": 64,
    "local_px": 32,
    "local_views": 2,
    "init": "random",
    "depth": 4,
    "width": 128,
    "heads": 4,
    "drop_path": 0.0,
    "prototypes": 512,
    "head_hidden": 256,
    "head_bottleneck": 64,
    "head_norm": True,
    "momentum": 0.996,
    "steps": 40,
    "batch_size": 16,
    "base_lr": 1.6e-2,
    "warmup": 0.1,
    "precision": "float32",
    "checkpoint_every": 20,
    "watch_every": 20,
    "watch_tiles": 256,
}


# Learns in some twenty-five minutes on one CPU core; every value [ours], tuned on development seeds (trial j1 of
# results/recipe_search.csv, told in notebook 03). What mattered there: KoLeo, which keeps features from gathering on
# few directions; other amounts of dye in place of colour jitter; and many steps. Its views see what a probe's tile
# shows: 112 um.
DEMO: dict[str, Any] = {
    **SMOKE,
    "mpp": (1.0,),
    "model": "vit_small_patch16_224",
    "tile_px": 128,
    "global_px": 112,
    "local_px": 48,
    "local_views": 4,
    "global_scale": (0.5, 1.0),
    "local_scale": (0.2, 0.5),
    "vertical_flip": 0.5,
    "jitter": 0.0,
    "stain": 0.5,
    "grayscale": 0.1,
    "blur": (0.5, 0.1, 0.2),
    "blur_sigma_px": (0.1, 1.0),
    "solarise": 0.0,
    "prototypes": 1024,
    "head_hidden": 512,
    "head_bottleneck": 128,
    "head_norm": False,
    "momentum": 0.996,
    "teacher_temperature": 0.02,
    "teacher_temperature_start": 0.02,
    "koleo": 0.1,
    "steps": 2400,
    "batch_size": 64,
    "base_lr": 4e-3,
    "warmup": 0.1,
    "weight_decay_end": 0.04,
    "precision": "auto",
    "checkpoint_every": 400,
    "watch_every": 600,
    "watch_tiles": 1280,
}

RECIPES = {"smoke": SMOKE, "demo": DEMO}


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """`value` as the field's type: JSON and papermill bring lists for tuples and 1 for 1.0."""
    kind = type(field.default)
    if kind is tuple and isinstance(value, (list, tuple, int, float)) and not isinstance(value, bool):
        value = tuple(float(part) for part in (value if isinstance(value, (list, tuple)) else (value,)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{field.name}={value!r} is no {kind.__name__}; its default is {field.default!r}")
    return value


def _check(config: PretrainConfig) -> None:
    """Raises InputError for the first value that cannot work."""
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            raise InputError(f"{name}={value!r} is unknown.{nearest(value, choices)}")
    for name in (
        "tile_px",
        "global_px",
        "local_px",
        "prototypes",
        "head_hidden",
        "head_bottleneck",
        "steps",
        "batch_size",
        "checkpoint_every",
        "watch_tiles",
        "student_temperature",
        "teacher_temperature",
        "teacher_temperature_start",
        "base_lr",
    ):
        if getattr(config, name) <= 0:
            raise InputError(f"{name}={getattr(config, name)} must be above 0")
    for name in (
        "depth",
        "width",
        "heads",
        "local_views",
        "workers",
        "threads",
        "watch_every",
        "seed",
        "clip",
        "min_lr",
        "koleo",
        "stain",
        "weight_decay",
        "weight_decay_end",
        "brightness",
        "contrast",
        "saturation",
    ):
        if getattr(config, name) < 0:
            raise InputError(f"{name}={getattr(config, name)} must not be negative")
    for name in (
        "flip",
        "vertical_flip",
        "jitter",
        "grayscale",
        "solarise",
        "blur",
        "momentum",
        "centre_momentum",
        "drop_path",
        "warmup",
        "temperature_warmup",
        "freeze_last_layer",
        "min_tissue",
    ):
        value = getattr(config, name)
        if not all(0 <= part <= 1 for part in (value if isinstance(value, tuple) else (value,))):
            raise InputError(f"{name}={value} must be within 0 and 1")
    for name, length in (("global_scale", 2), ("local_scale", 2), ("blur_sigma_px", 2), ("blur", 3)):
        if len(getattr(config, name)) != length:
            raise InputError(f"{name}={getattr(config, name)} must have {length} numbers")
    for name in ("global_scale", "local_scale"):
        low, high = getattr(config, name)
        if not 0 < low <= high <= 1:
            raise InputError(f"{name}={(low, high)} must rise, within 0 and 1")
    if not config.mpp or min(config.mpp) <= 0:
        raise InputError(f"mpp={config.mpp} must be microns per pixel above 0, e.g. (0.5,)")
    if not 0 < config.blur_sigma_px[0] <= config.blur_sigma_px[1]:
        raise InputError(f"blur_sigma_px={config.blur_sigma_px} must rise, above 0")
    if config.stain >= 1:
        raise InputError(f"stain={config.stain} must be below 1, where a dye vanishes")
    if config.hue > 0.5:
        raise InputError(f"hue={config.hue} must be at most 0.5, half a turn")
    if config.width and config.heads and config.width % config.heads:
        raise InputError(f"width={config.width} is no multiple of heads={config.heads}")
    if config.batch_size == 1 and config.koleo:
        raise InputError("batch_size=1 leaves koleo no neighbour to keep away from; take 2 or koleo=0")
    if config.batch_size == 1 and config.head_norm:
        raise InputError("batch_size=1 leaves BatchNorm in the head nothing to normalise; take 2 or head_norm=False")
