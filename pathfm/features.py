"""Frozen features: one row a tile, computed once and kept under a key of weights, preprocessing and data."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor, nn

from pathfm import export
from pathfm.benchmarks import TileSet
from pathfm.descriptors import DESCRIPTORS, VERSION
from pathfm.errors import InputError, nearest
from pathfm.storage import atomic, cache_dir, progress, read_json, write_json

FLOORS = ("chance", *DESCRIPTORS, "metadata")
POOLS = ("cls", "mean", "both")
NO_MATTER = ("training", "fused_attn", "grad_checkpointing")  # of a module; none changes what it computes


@dataclass(frozen=True, repr=False)
class Features:
    """Features and the tiles they belong to.

    x           (N, D) float32, memory-mapped from the cache, read-only
    tiles       the TileSet, row by row
    provenance  what made them: model, pool, key, effective mpp, ...
    """

    name: str
    x: np.ndarray
    tiles: TileSet
    provenance: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        return f"Features({self.name}: {self.x.shape[0]} x {self.x.shape[1]} of {self.tiles.name})"

    @property
    def y(self) -> np.ndarray:
        """(N,) classes as integers from 0, in the order of `tiles.classes`."""
        return self.tiles.y

    @property
    def table(self) -> pd.DataFrame:
        """The tiles' table."""
        return self.tiles.table

    def split(self, by: str = "patient", **settings) -> Features:
        """The same features with roles drawn by `TileSet.split`."""
        return replace(self, tiles=self.tiles.split(by, **settings))

    def of(self, tiles: TileSet) -> Features:
        """The same features with the roles in `tiles`, which must be the same images in the same order."""
        if not np.array_equal(tiles.table["digest"], self.table["digest"]):
            raise InputError(f"features {self.name} belong to other images than those of {tiles.name}")
        return replace(self, tiles=tiles)


def extract(
    model: nn.Module | str | Path,
    tiles: TileSet,
    preprocess: Callable[[np.ndarray], Tensor] | None = None,
    pool: str = "cls",
    name: str | None = None,
    folder: str | Path | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> Features:
    """Features of every tile, from the cache where these weights have seen these images before.

    model       a timm-like network, a folder that `pathfm.export` or timm wrote, or the name of a floor:
                chance, colour, histogram, lbp, colour+lbp, metadata
    preprocess  uint8 (B, h, h, 3) to float (B, 3, H, W); None takes the folder's or timm's own mean, standard
                deviation and input size. Tiles that are not square are cut to their central square
    pool        "cls" token, "mean" of the patch tokens, or "both" side by side
    folder      of the cache; None is <cache_dir>/features
    device      to move the model to; None leaves it where it is

    Raises InputError for an unknown floor or pool, a model without the token asked for, an input size it
    refuses, and features that are not finite.
    """
    extractor = _extractor(model, tiles, preprocess, pool, device)
    key = _hash(extractor.key, *tiles.table["digest"])
    folder = Path(folder) if folder else cache_dir() / "features"
    path, record = folder / f"{key}.npy", folder / f"{key}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        if _stale(path, record, len(tiles)):
            width = _write(path, extractor, tiles, batch_size, name or extractor.name)
            write_json(record, {"n": len(tiles), "d": width, "key": key, **extractor.provenance})
    provenance = {**read_json(record), "effective_mpp": _effective_mpp(extractor, tiles)}
    return Features(name or extractor.name, np.load(path, mmap_mode="r"), tiles, provenance)


def pools(features: Features) -> list[Features]:
    """CLS, mean and both, in the order of POOLS, from features of pool "both": one pass makes the three.

    Features of another pool come back alone. The pool is added to the name.
    """
    pool, d = features.provenance["pool"], features.x.shape[1] // 2
    parts = (
        {"cls": slice(None, d), "mean": slice(d, None), "both": slice(None)} if pool == "both" else {pool: slice(None)}
    )
    return [
        replace(
            features,
            name=f"{features.name} ({part})",
            x=features.x[:, columns],
            provenance={**features.provenance, "pool": part},
        )
        for part, columns in parts.items()
    ]


def random_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same architecture with weights drawn anew by its own initialisation: the floor of every backbone."""
    twin = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in twin.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if hasattr(twin, "init_weights"):  # timm: position embeddings, tokens and its own ranges
            twin.init_weights()
    return twin.eval()


@dataclass(frozen=True)
class _Extractor:
    name: str
    key: str
    features: Callable[[list[np.ndarray], pd.DataFrame], np.ndarray]  # images and their rows to (B, D)
    provenance: dict
    preprocess: Callable | None = None


def _extractor(model, tiles: TileSet, preprocess, pool: str, device: str | None) -> _Extractor:
    if isinstance(model, str) and model in FLOORS:
        return _floor(model, tiles)
    name = type(model).__name__
    if isinstance(model, str | Path):
        if isinstance(model, str) and not Path(model).exists():
            raise InputError(f"'{model}' is neither a folder nor a floor.{nearest(model, FLOORS)}")
        name = Path(model).name
        model, preprocess = export.load(model) if preprocess is None else (export.load(model)[0], preprocess)
    if pool not in POOLS:
        raise InputError(f"unknown pool '{pool}'.{nearest(pool, POOLS)}")
    preprocess = preprocess or _timm_preprocess(model)
    weights = fingerprint(model)
    model = model if device is None else model.to(device)
    return _Extractor(
        name=name,
        key=_hash(weights, repr(preprocess), pool),
        features=lambda images, rows: _embed(model, preprocess, images, pool),
        provenance={"model": name, "weights": weights, "preprocess": repr(preprocess), "pool": pool},
        preprocess=preprocess,
    )


def fingerprint(model: nn.Module) -> str:
    """A hash of every weight and of the architecture that they sit in, down to what no weight shows (heads)."""
    digest = hashlib.blake2b(repr(model).encode(), digest_size=12)
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str) and k not in NO_MATTER}
        digest.update(f"{name} {sorted(plain.items())}".encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _timm_preprocess(model: nn.Module) -> export.Preprocess:
    config = getattr(model, "pretrained_cfg", None)
    if not config:
        raise InputError(f"{type(model).__name__} does not say how it wants its input; give preprocess")
    patch_embed = getattr(model, "patch_embed", None)
    side = patch_embed.img_size[0] if getattr(patch_embed, "img_size", None) else config["input_size"][-1]
    return export.Preprocess(side, tuple(config["mean"]), tuple(config["std"]))


@torch.inference_mode()
def _embed(model: nn.Module, preprocess: Callable, images: list[np.ndarray], pool: str) -> np.ndarray:
    x = torch.cat([preprocess(batch) for batch in _same_size(images)]).to(next(model.parameters()).device)
    training = model.training
    try:
        tokens = model.eval().forward_features(x)
    except AssertionError as error:  # timm asserts its input size
        raise InputError(f"{type(model).__name__} refuses an input of {tuple(x.shape)}: {error}") from None
    finally:
        model.train(training)
    return _pooled(model, tokens, pool).float().cpu().numpy()


def _same_size(images: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Runs of consecutive images of one size, as (B, side, side, 3)."""
    images = [_square(image) for image in images]
    start = 0
    for stop in range(1, len(images) + 1):
        if stop == len(images) or images[stop].shape != images[start].shape:
            yield np.stack(images[start:stop])
            start = stop


def _square(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _pooled(model: nn.Module, tokens: Tensor, pool: str) -> Tensor:
    if tokens.ndim == 4:  # a convolutional map (B, D, h, w)
        tokens, prefix = tokens.flatten(2).mT, 0
    else:
        prefix = getattr(model, "num_prefix_tokens", 0)
    if pool == "mean":
        return tokens[:, prefix:].mean(dim=1)
    if getattr(model, "cls_token", None) is None:
        raise InputError(f"{type(model).__name__} has no CLS token; take pool='mean'")
    if pool == "cls":
        return tokens[:, 0]
    return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(dim=1)], dim=1)


def _floor(name: str, tiles: TileSet) -> _Extractor:
    if name == "chance":
        compute = _chance
    elif name == "metadata":
        columns = metadata_columns(tiles)
        if not columns:
            raise InputError(f"{tiles.name}: image size and mpp are the same everywhere; metadata say nothing")
        known = _hash(tiles.table[columns].to_csv(index=False))
        return _Extractor(name, f"metadata {known}", lambda images, rows: _metadata(rows[columns]), {"model": name})
    else:
        descriptor = DESCRIPTORS[name]
        compute = lambda images, rows: np.stack([descriptor(image) for image in images])  # noqa: E731
    return _Extractor(name, f"{name} {VERSION}", compute, {"model": name, "version": VERSION})


def _chance(images: list[np.ndarray], rows: pd.DataFrame) -> np.ndarray:
    return np.zeros((len(images), 1))


def metadata_columns(tiles: TileSet) -> list[str]:
    """Which of width_px, height_px, mpp and magnification vary between the tiles, where known."""
    known = [c for c in ("width_px", "height_px", "mpp", "magnification") if c in tiles.table]
    return [c for c in known if tiles.table[c].notna().all() and tiles.table[c].nunique() > 1]


def _metadata(rows: pd.DataFrame) -> np.ndarray:
    """Logarithms of sizes; a magnification may be written 20, 20x or 20X."""
    numbers = rows.apply(lambda column: pd.to_numeric(column.astype(str).str.rstrip("xX"), errors="coerce"))
    return np.log(numbers.to_numpy(float))


def _effective_mpp(extractor: _Extractor, tiles: TileSet) -> float | None:
    """Median um per pixel that the model saw; None where the tiles' mpp or the view's side is not known."""
    side = tiles.table[["width_px", "height_px"]].min(axis=1)
    if not hasattr(extractor.preprocess, "effective_mpp") or tiles.table["mpp"].isna().all():
        return None
    return float(extractor.preprocess.effective_mpp(tiles.table["mpp"], side).median())


def _write(path: Path, extractor: _Extractor, tiles: TileSet, batch_size: int, name: str) -> int:
    """Writes the features as .npy batch by batch and returns how many a tile has.

    Through plain writes: a memory map would end the process, not raise, where the disk is full.
    """
    start = width = 0
    batches = progress(tiles.images(batch_size), name, -(-len(tiles) // batch_size), "batch")
    with atomic(path) as file:
        for images in batches:
            rows = tiles.table.iloc[start : start + len(images)]
            x = np.ascontiguousarray(extractor.features(images, rows), dtype="<f4")
            bad = ~np.isfinite(x).all(axis=1)
            if bad.any():
                first = rows["file"].iloc[int(bad.argmax())]
                raise InputError(f"features '{name}' hold NaN or infinity, first for {first}; look at the weights")
            if not start:
                width = x.shape[1]
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(tiles), width)}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(x.tobytes())
            start += len(images)
    return width


def _stale(path: Path, record: Path, n: int) -> bool:
    """Whether the cached pair is missing or not what its record says."""
    try:
        said = read_json(record)
        return np.load(path, mmap_mode="r").shape != (n, said["d"])
    except (InputError, OSError, ValueError, KeyError):
        return True


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()
