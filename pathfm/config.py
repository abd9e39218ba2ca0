"""What a pretraining run is told: one flat dataclass a method, a unit and a source beside every default; recipes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pathfm.errors import InputError, nearest

# Sources: [dino] main_dino.py and vision_transformer.py of facebookresearch/dino (Caron et al. 2021), where the
# authors count in epochs of 100 this counts in shares of the run; [dinov2] Oquab et al. 2023 and their code
# (ssl_default_config.yaml where no file is named); [tellez] Tellez et al. 2019, Medical Image Analysis 58;
# [randstain] RandStainNA, Shen et al. 2022; [rudolfv] arXiv 2401.04079; [virchow2] arXiv 2408.00738; [midnight]
# arXiv 2504.05186; [kaiko] arXiv 2404.15217; [ours] our choice.
CHOICES = {
    "crop": ("resize", "translate"),
    "centring": ("centre", "sinkhorn"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "precision": ("auto", "float32", "bfloat16"),
    "attention": ("auto", "fused", "plain"),
    "on_collapse": ("warn", "stop", "ignore"),
}


def setting(default: Any, why: str) -> Any:
    """A field with its default, and its unit, reason and source for --help and for notebooks."""
    return dataclasses.field(default=default, metadata={"help": why})


@dataclass(frozen=True)
class PretrainConfig:
    """DINO as published, on tiles. `PretrainConfig.of(**fields)` names the nearest field when one is misspelt."""

    method: str = setting("dino", "'dino' or 'dinov2', each with a config of its own")
    # tiles
    mpp: tuple[float, ...] = setting(
        (0.25, 0.5, 1.0, 2.0), "microns per pixel of a tile, equal weights; [kaiko], weights [ours]"
    )
    tile_px: int = setting(256, "tile side in pixels before cropping; [kaiko]")
    min_tissue: float = setting(0.4, "least share of foreground in a tile; [kaiko]")
    # backbone
    model: str = setting("vit_small_patch16_224", "timm name; ViT-S/16 is [kaiko]'s ablation model")
    init: str = setting("imagenet", "'imagenet' (DINO's or DINOv2's), 'random', or a folder or file; [kaiko]")
    depth: int = setting(0, "blocks; 0 = the model's own")
    width: int = setting(0, "features; 0 = the model's own")
    heads: int = setting(0, "attention heads; 0 = the model's own")
    registers: int = setting(0, "tokens beside CLS that stand for no patch; 0 = the model's own")
    layer_scale: float = setting(0.0, "LayerScale at the start, of every block's output; 0 = the model's own")
    drop_path: float = setting(0.1, "stochastic depth of the student's last block, linear from 0; [dino]")
    # views
    global_px: int = setting(224, "side of a global view in pixels; [dino]")
    local_px: int = setting(96, "side of a local view in pixels; [dino]")
    local_views: int = setting(8, "small crops per tile; [dino]")
    global_scale: tuple[float, ...] = setting((0.4, 1.0), "share of the tile's area in a global crop; [dino]")
    local_scale: tuple[float, ...] = setting((0.05, 0.4), "share of the tile's area in a local crop; [dino]")
    crop: str = setting("resize", "'resize': crops of any scale; 'translate': near the tile's own scale; [virchow2]")
    translate_scale: tuple[float, ...] = setting((0.9, 1.1), "crop side over view side, 'translate' only; [virchow2]")
    translate_ratio: tuple[float, ...] = setting((0.95, 1.05), "width over height, 'translate' only; [virchow2]")
    flip: float = setting(0.5, "probability of a left-right flip; [dino]")
    vertical_flip: float = setting(0.0, "probability of an upside-down flip; [dino] has none, tissue allows 0.5")
    rotate: bool = setting(False, "turned by 0, 90, 180 or 270 degrees, equally likely; [dino] without, [rudolfv] with")
    stain_transfer: float = setting(0.0, "probability of the colours of another tile of the batch; [rudolfv]")
    randstain: float = setting(0.0, "probability of colours drawn from a law of tiles' colours; [randstain]")
    randstain_lab: tuple[float, ...] = setting(
        (), "that law, 12 numbers of `lab.law`; none = of each batch itself, [ours]"
    )
    jitter: float = setting(0.8, "probability of colour jitter; [dino]")
    brightness: float = setting(0.4, "factor within 1 +- this; [dino]")
    contrast: float = setting(0.4, "factor within 1 +- this; [dino]")
    saturation: float = setting(0.2, "factor within 1 +- this; [dino]")
    hue: float = setting(0.1, "turns of the colour circle, +- this; [dino]")
    stain: float = setting(0.0, "amount of each dye within 1 +- this, and a tenth of it added; 0 = none; [tellez]")
    grayscale: float = setting(0.2, "probability of losing colour; [dino]")
    blur: tuple[float, ...] = setting((1.0, 0.1, 0.5), "probability: first global, second global, local; [dino]")
    blur_sigma_px: tuple[float, ...] = setting((0.1, 2.0), "of the Gaussian, in view pixels; [dino]")
    blur_sigma_um: tuple[float, ...] = setting((), "the same in um of tissue, in its place where given; [ours]")
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
    compile: bool = setting(False, "blocks through torch.compile; needs a C++ compiler on a CPU")
    shard: bool = setting(False, "weights, gradients and moments shared out over the ranks (FSDP2); for large models")
    accumulate: int = setting(
        1, "parts in which a batch goes through the networks; Sinkhorn, KoLeo, KDE and BatchNorm are of a part"
    )
    checkpoint_activations: bool = setting(False, "blocks are computed again for their gradients: less memory, slower")
    workers: int = setting(0, "processes that read tiles, of each rank")
    checkpoint_every: int = setting(500, "steps; [ours]")
    keep_checkpoints: int = setting(2, "the last so many stay, should the newest be damaged; [ours]")
    on_collapse: str = setting("warn", "'warn', 'stop' or 'ignore', when a watch finds the teacher collapsed")
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
                raise InputError(f"{cls.__name__} has no field '{name}'.{nearest(name, known)}")
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

    @property
    def half_life_tiles(self) -> float:
        """Tiles after which half of the teacher is new, at the start: what `momentum` means at this batch size."""
        return self.batch_size * math.log(0.5) / math.log(self.momentum) if 0 < self.momentum < 1 else math.nan


@dataclass(frozen=True)
class DinoV2Config(PretrainConfig):
    """DINOv2 as published, on tiles: DINO and iBOT, KoLeo or KDE, a centre or Sinkhorn-Knopp."""

    method: str = setting("dinov2", "'dino' or 'dinov2', each with a config of its own")
    model: str = setting("vit_large_patch14_reg4_dinov2", "timm name; ViT-L/14 with 4 registers is [kaiko]'s")
    drop_path: float = setting(0.3, "stochastic depth of the student's blocks; [dinov2]")
    drop_path_uniform: bool = setting(True, "the same in every block, else linear from 0; [dinov2]")
    local_px: int = setting(98, "side of a local view in pixels; [dinov2] vitl14.yaml")
    global_scale: tuple[float, ...] = setting((0.32, 1.0), "share of the tile's area in a global crop; [dinov2]")
    local_scale: tuple[float, ...] = setting((0.05, 0.32), "share of the tile's area in a local crop; [dinov2]")
    # heads
    norm_last_layer: bool = setting(False, "prototypes of length 1; [dinov2] learns their lengths")
    separate_head: bool = setting(False, "hidden patches have a head of their own; [dinov2], True in vitl14.yaml")
    patch_prototypes: int = setting(65536, "outputs of the patches' own head; [dinov2]")
    patch_hidden: int = setting(2048, "width of its hidden layers; [dinov2]")
    patch_bottleneck: int = setting(256, "features before its last layer; [dinov2]")
    # masks
    mask_probability: float = setting(0.5, "share of the global views with hidden patches; [dinov2]")
    mask_ratio: tuple[float, ...] = setting((0.1, 0.5), "share of their patches that is hidden; [dinov2]")
    # teacher
    momentum: float = setting(0.992, "of the teacher's moving average, cosine to 1; [dinov2]")
    centring: str = setting("centre", "'centre' or 'sinkhorn' (Sinkhorn-Knopp); [dinov2], 'sinkhorn' in vitl14.yaml")
    sinkhorn_iterations: int = setting(3, "of Sinkhorn-Knopp; [dinov2]")
    teacher_temperature: float = setting(0.07, "of the teacher's softmax after warm-up; [dinov2]")
    temperature_warmup: float = setting(0.3, "share of the run; [dinov2] 30 of 100 epochs")
    # loss
    ibot: float = setting(1.0, "weight of the loss at hidden patches; [dinov2]")
    koleo: float = setting(0.1, "weight of the spread of a batch's features, by nearest neighbours; [dinov2]")
    kde: float = setting(0.0, "weight of their density, in place of koleo; [virchow2] and [midnight], weight [ours]")
    kde_kappa: float = setting(5.0, "concentration of that density's kernel; [virchow2]")
    # optimiser
    base_lr: float = setting(4e-3, "AdamW, at 1024 tiles a batch, scaled by the square root; [dinov2]")
    layer_decay: float = setting(0.9, "rate of a block over that of the one above; [dinov2]")
    patch_embed_lr: float = setting(0.2, "rate of the patch embedding over that of its layer; [dinov2]")
    clip: float = setting(3.0, "greatest gradient norm of backbone and of each head, 0 = none; [dinov2]")

    @property
    def lr(self) -> float:
        """Peak learning rate of this batch size."""
        return self.base_lr * math.sqrt(self.batch_size / 1024)


METHODS: dict[str, type[PretrainConfig]] = {"dino": PretrainConfig, "dinov2": DinoV2Config}


def make_config(**fields: Any) -> PretrainConfig:
    """The config of `method` ("dino" where none is named) with `fields` replaced, as a recipe or a record has them."""
    method = fields.get("method", "dino")
    if method not in METHODS:
        raise InputError(f"method={method!r} is unknown.{nearest(method, METHODS)}")
    return METHODS[method].of(**fields)


def recipe(name: str, **fields: Any) -> PretrainConfig:
    """A recipe of RECIPES with `fields` replaced. Raises InputError that offers the nearest name."""
    if name not in RECIPES:
        raise InputError(f"recipe='{name}' is unknown.{nearest(name, RECIPES)}")
    return make_config(**{**RECIPES[name], **fields})


def _read(path: Path) -> dict[str, Any]:
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


# A file each in recipes/, which says beside every value where it comes from.
RECIPES: dict[str, dict[str, Any]] = {
    path.stem: _read(path) for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))
}
SMOKE = RECIPES["smoke"]


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """`value` as the field's type: JSON and papermill bring lists for tuples and 1 for 1.0."""
    kind = type(field.default)
    if kind is tuple and isinstance(value, (list, tuple, int, float)) and not isinstance(value, bool):
        try:
            value = tuple(float(part) for part in (value if isinstance(value, (list, tuple)) else (value,)))
        except (TypeError, ValueError):
            raise InputError(f"{field.name}={value!r} are not numbers; its default is {field.default!r}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{field.name}={value!r} is no {kind.__name__}; its default is {field.default!r}")
    return value


ABOVE_0 = """tile_px global_px local_px prototypes head_hidden head_bottleneck steps batch_size checkpoint_every
    accumulate keep_checkpoints watch_tiles student_temperature teacher_temperature teacher_temperature_start base_lr
    patch_prototypes patch_hidden patch_bottleneck sinkhorn_iterations kde_kappa layer_decay""".split()  # noqa: SIM905
NOT_NEGATIVE = """depth width heads registers layer_scale local_views workers threads watch_every seed clip min_lr koleo
    kde ibot stain weight_decay weight_decay_end brightness contrast saturation patch_embed_lr""".split()  # noqa: SIM905
SHARES = """flip vertical_flip jitter grayscale solarise blur momentum centre_momentum drop_path warmup stain_transfer
    randstain temperature_warmup freeze_last_layer min_tissue mask_probability mask_ratio""".split()  # noqa: SIM905
RANGES = "global_scale local_scale translate_scale translate_ratio blur_sigma_px blur_sigma_um mask_ratio".split()  # noqa: SIM905
LENGTHS = {**dict.fromkeys(RANGES, (2,)), "blur": (3,), "blur_sigma_um": (0, 2), "randstain_lab": (0, 12)}


def _check(config: PretrainConfig) -> None:
    """Raises InputError for the first value that cannot work."""
    values = dataclasses.asdict(config)
    if METHODS.get(config.method) is not type(config):
        right = f"; take {METHODS[config.method].__name__}" if config.method in METHODS else ""
        raise InputError(f"method={config.method!r} is not of {type(config).__name__}{right}")
    for name, choices in CHOICES.items():
        if name in values and values[name] not in choices:
            raise InputError(f"{name}={values[name]!r} is unknown.{nearest(values[name], choices)}")
    for name, value in values.items():
        parts = value if isinstance(value, tuple) else (value,)
        if name in ABOVE_0 and value <= 0:
            raise InputError(f"{name}={value} must be above 0")
        if name in NOT_NEGATIVE and value < 0:
            raise InputError(f"{name}={value} must not be negative")
        if name in SHARES and not all(0 <= part <= 1 for part in parts):
            raise InputError(f"{name}={value} must be within 0 and 1")
        if name in LENGTHS and len(parts) not in LENGTHS[name]:
            raise InputError(f"{name}={value} must have {' or '.join(map(str, LENGTHS[name]))} numbers")
        if name in RANGES and value and not 0 < value[0] <= value[1]:
            raise InputError(f"{name}={value} must rise, above 0")
        if name in ("global_scale", "local_scale") and value[1] > 1:
            raise InputError(f"{name}={value} must rise, within 0 and 1")
    if not config.mpp or min(config.mpp) <= 0:
        raise InputError(f"mpp={config.mpp} must be microns per pixel above 0, e.g. (0.5,)")
    if config.stain >= 1:
        raise InputError(f"stain={config.stain} must be below 1, where a dye vanishes")
    if config.hue > 0.5:
        raise InputError(f"hue={config.hue} must be at most 0.5, half a turn")
    if config.width and config.heads and config.width % config.heads:
        raise InputError(f"width={config.width} is no multiple of heads={config.heads}")
    _check_translation(config)
    _check_batch(config)


def _check_translation(config: PretrainConfig) -> None:
    """Raises InputError where a view of near the tile's own scale does not fit into the tile."""
    stretch = config.translate_scale[1] * math.sqrt(max(config.translate_ratio[1], 1 / config.translate_ratio[0]))
    needed = math.ceil(stretch * max(config.global_px, config.local_px if config.local_views else 0))
    if config.crop == "translate" and needed > config.tile_px:
        raise InputError(f"crop='translate' cuts up to {needed} px, but tile_px={config.tile_px}; take larger tiles")


def _check_batch(config: PretrainConfig) -> None:
    """Raises InputError where a batch is too small for what compares its tiles."""
    if config.batch_size % config.accumulate:
        raise InputError(f"batch_size={config.batch_size} cannot be split into accumulate={config.accumulate} parts")
    parts = f" in accumulate={config.accumulate} parts" if config.accumulate > 1 else ""
    alone = f"batch_size={config.batch_size}{parts} leaves"
    if config.batch_size == config.accumulate and config.koleo:
        raise InputError(f"{alone} koleo no neighbour to keep away from; take {2 * config.accumulate} or koleo=0")
    if config.batch_size == config.accumulate and getattr(config, "kde", 0):
        raise InputError(f"{alone} kde no other tile to compare with; take {2 * config.accumulate} or kde=0")
    if config.batch_size == config.accumulate and config.head_norm:
        raise InputError(f"{alone} BatchNorm in the head nothing to normalise; take 2 or head_norm=False")
    if config.batch_size == 1 and config.stain_transfer:
        raise InputError("batch_size=1 leaves stain_transfer no other tile; take 2 or stain_transfer=0")
    if config.batch_size == 1 and config.randstain and not config.randstain_lab:
        raise InputError("batch_size=1 leaves randstain no law of colours; take 2, or give randstain_lab")
    if config.method == "dinov2" and config.ibot and int(2 * config.batch_size * config.mask_probability) < 1:
        raise InputError(
            f"mask_probability={config.mask_probability} of {2 * config.batch_size} global views hides none; take a "
            "greater one, a larger batch or ibot=0"
        )
    if config.method == "dinov2" and config.head_norm:
        raise InputError("head_norm=True would mix CLS and patches in one BatchNorm; DINOv2 has none, take False")
