"""What turns images into features: a frozen backbone with its preprocessing, or one of the floors it stands on."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from pathfm import backbones, export
from pathfm.benchmarks import TileSet
from pathfm.descriptors import DESCRIPTORS, VERSION
from pathfm.errors import InputError, nearest
from pathfm.metrics import balanced_accuracy, finite
from pathfm.neighbours import nearest as nearest_rows
from pathfm.neighbours import vote

FLOORS = ("chance", *DESCRIPTORS, "metadata")
POOLS = ("cls", "mean", "both")
PRECISIONS = ("float32", "bfloat16", "auto")
NO_MATTER = ("training", "fused_attn", "grad_checkpointing")  # of a module; none changes what it computes
SAME_NEIGHBOURS = 0.99  # of the 20 nearest: bfloat16 must leave so many as they are,
SAME_SCORE = 0.002  # and move the balanced accuracy of kNN and linear probe by no more than this
SAMPLE = 512  # images that "auto" compares on
WORTH_A_SAMPLE = 4 * SAMPLE  # images; fewer are done in float32 before the comparison pays


@dataclass(frozen=True)
class Extractor:
    """Images to features, under a name and a key that change when the features do.

    features  images (h, w, 3) uint8 and their rows of the table to (B, D)
    """

    name: str
    key: str
    features: Callable[[list[np.ndarray], pd.DataFrame], np.ndarray]
    provenance: dict
    preprocess: Callable | None = None


def backbone(
    model: nn.Module | str | Path,
    preprocess: Callable[[np.ndarray], Tensor] | None = None,
    pool: str = "cls",
    layers: int = 1,
    precision: str = "float32",
    device: str | None = None,
) -> Extractor:
    """The features of a network, or of one by any name that `backbones.load` takes.

    pool       "cls" token, "mean" of the patch tokens, or "both" side by side
    layers     the last so many blocks, each behind the final norm, side by side from early to late
    precision  "float32", or "bfloat16" products and float32 sums (autocast); "auto" belongs to whom has a sample
    device     to move the model to; None leaves it where it is

    Raises InputError for a name that is none, and for a pool, precision or layers that the model does not have.
    """
    return maker(model, preprocess, pool, layers, device)(precision)


def maker(
    model: nn.Module | str | Path,
    preprocess: Callable[[np.ndarray], Tensor] | None = None,
    pool: str = "cls",
    layers: int = 1,
    device: str | None = None,
) -> Callable[[str], Extractor]:
    """Precision -> `backbone`, of one network that is loaded once."""
    if pool not in POOLS:
        raise InputError(f"unknown pool '{pool}'.{nearest(pool, POOLS)}")
    if isinstance(model, str | Path):
        if isinstance(model, str) and ":" not in model and not Path(model).exists():
            raise InputError(f"'{model}' is neither a folder nor a floor.{nearest(model, FLOORS)}")
        name = Path(model).name
        model, preprocess = backbones.load(model) if preprocess is None else (backbones.network(model), preprocess)
    else:
        name = backbones.kind(model)
    if pool != "cls" and backbones.only_cls(model):
        raise InputError(f"{name} gives one vector an image and no patch tokens; take pool='cls'")
    backbones.check_layers(model, layers, name)
    preprocess = preprocess or _timm_preprocess(model)
    model = model if device is None else model.to(device)
    told = {"weights": fingerprint(model), "preprocess": repr(preprocess), "pool": pool}

    def of(precision: str) -> Extractor:
        if precision not in PRECISIONS:
            raise InputError(f"unknown precision '{precision}'.{nearest(precision, PRECISIONS)}")
        more = {k: v for k, v in (("layers", layers), ("precision", precision)) if v not in (1, "float32")}
        return Extractor(
            name=name,
            key=_hash(*told.values(), *(f"{k} {v}" for k, v in more.items())),
            features=lambda images, rows: _embed(model, preprocess, images, pool, layers, precision),
            provenance={"model": name, **told, "layers": layers, "precision": precision},
            preprocess=preprocess,
        )

    return of


class Agreement(NamedTuple):
    """How much two sets of features of the same images say the same."""

    neighbours: float  # share of the k nearest that both have, mean over images, 0 to 1
    score: float  # difference of the leave-one-out kNN's balanced accuracy; nan without two classes
    linear: float = np.nan  # the same of a linear probe, each half answered by what the other half teaches
    n: int = 0  # images

    @property
    def same(self) -> bool:
        moved = any(abs(score) > SAME_SCORE for score in (self.score, self.linear))  # nan is no movement
        return self.neighbours >= SAME_NEIGHBOURS and not moved

    def __str__(self) -> str:
        """What was compared, and what was found."""
        points = {"kNN": self.score, "a linear probe": self.linear}
        moved = [f"{name} by {100 * by:+.1f} points" for name, by in points.items() if not np.isnan(by)]
        probes = f"moves {' and '.join(moved)}" if moved else "no probe was asked, for want of labels"
        return f"bfloat16 leaves {self.neighbours:.1%} of the nearest neighbours of {self.n} images; {probes}"


def agreement(a: np.ndarray, b: np.ndarray, y: np.ndarray | None = None, k: int = 20) -> Agreement:
    """Of features a and b (N, D) of the same images, and their classes y (N,) where they have some.

    Raises InputError where a feature is not finite.
    """
    a, b = finite(a), finite(b)
    found = [nearest_rows(x, k=k) for x in (a, b)]
    ids = [one[0] for one in found]
    shared = float(np.mean([len(np.intersect1d(p, q)) / ids[0].shape[1] for p, q in zip(*ids, strict=True)]))
    if y is None or len(np.unique(y)) < 2:
        return Agreement(shared, np.nan, n=len(a))
    scores = [balanced_accuracy(y, vote(*one, y)) for one in found]
    if np.unique(y, return_counts=True)[1].min() < 2:  # a class of one image is in one half alone
        return Agreement(shared, scores[1] - scores[0], n=len(a))
    probes = [balanced_accuracy(y, _crossed(x, y)) for x in (a, b)]
    return Agreement(shared, scores[1] - scores[0], probes[1] - probes[0], len(a))


def choose(
    make: Callable[[str], Extractor],
    precision: str,
    n: int,
    sample: Callable[[Extractor], np.ndarray],
    y: np.ndarray | None = None,
) -> tuple[Extractor, Agreement | None]:
    """The extractor of "auto" or "bfloat16" for n images, and how far bfloat16 agreed with float32 where it was asked.

    sample  the features of up to SAMPLE of the images, and y their classes where they have some

    "auto" takes bfloat16 where it is as good, and float32 of fewer than WORTH_A_SAMPLE images without a look. Who
    says "bfloat16" has it, with a warning where it is not as good.
    """
    single = make("float32")
    known = "precision" in single.provenance  # of a network; a floor has one
    if not known or (precision == "auto" and n < WORTH_A_SAMPLE):
        return single, None
    half = make("bfloat16")
    agreed = agreement(sample(single), sample(half), y)
    if precision == "auto":
        return half if agreed.same else single, agreed
    if not agreed.same:
        warnings.warn(
            f"{single.name}: {agreed}, where {SAME_NEIGHBOURS:.0%} and {100 * SAME_SCORE:.1f} points are asked for; "
            "precision 'auto' takes float32 then",
            stacklevel=3,
        )
    return half, agreed


def compared(provenance: Mapping) -> str:
    """What the provenance of features says of their precision: "" for float32 that was never in question."""
    if "bfloat16" in provenance:
        return f"{provenance['precision']}: {Agreement(**provenance['bfloat16'])}"
    return "bfloat16, not compared with float32" if provenance.get("precision") == "bfloat16" else ""


def _crossed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,) classes by logistic regression on standardised features: each half of every class is asked of the other."""
    half = np.empty(len(y), int)
    half[np.argsort(y, kind="stable")] = np.arange(len(y)) % 2
    said = np.empty_like(y)
    for test in (0, 1):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        said[half == test] = probe.fit(x[half != test], y[half != test]).predict(x[half == test])
    return said


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
def _embed(model: nn.Module, preprocess, images, pool: str, layers: int, precision: str) -> np.ndarray:
    device = next(model.parameters()).device
    x = torch.cat([_prepared(preprocess, batch, device) for batch in _same_size(images)])
    training = model.training
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            levels = backbones.last_layers(model.eval(), x, layers)
    except torch.OutOfMemoryError:  # a RuntimeError that is no fault of the input
        raise
    except (AssertionError, RuntimeError) as error:  # timm asserts its input size, others find that tensors do not fit
        raise InputError(f"{backbones.kind(model)} refuses an input of {tuple(x.shape)}: {error}") from None
    finally:
        model.train(training)
    return _pooled(model, levels, pool).float().cpu().numpy()


def _prepared(preprocess: Callable, images: np.ndarray, device: torch.device) -> Tensor:
    """On the device; our own preprocessing also runs there, another's may want arrays."""
    if isinstance(preprocess, export.Preprocess):
        return preprocess(torch.from_numpy(images).to(device))
    return preprocess(images).to(device)


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


def _pooled(model: nn.Module, levels: list[Tensor], pool: str) -> Tensor:
    """(B, D): the CLS tokens of all levels, the means of all levels, or the one behind the other."""
    if pool != "mean" and getattr(model, "cls_token", None) is None:
        raise InputError(f"{type(model).__name__} has no CLS token; take pool='mean'")
    found = [tokens[:, 0] for tokens in levels] if pool != "mean" else []
    for tokens in levels if pool != "cls" else []:
        if tokens.ndim == 4:
            found.append(tokens.mean(dim=(2, 3)))
        else:
            found.append(tokens[:, getattr(model, "num_prefix_tokens", 0) :].mean(dim=1))
    return torch.cat(found, dim=1)


def floor(name: str, tiles: TileSet | None = None) -> Extractor:
    """One of FLOORS; only "metadata" looks at the tiles. Raises InputError where these say nothing."""
    if name == "chance":
        compute = _chance
    elif name == "metadata":
        columns = metadata_columns(tiles)
        if not columns:
            raise InputError(f"{tiles.name}: image size and mpp are the same everywhere; metadata say nothing")
        known = _hash(tiles.table[columns].to_csv(index=False))
        return Extractor(name, f"metadata {known}", lambda images, rows: _metadata(rows[columns]), {"model": name})
    else:
        descriptor = DESCRIPTORS[name]
        compute = lambda images, rows: np.stack([descriptor(image) for image in images])  # noqa: E731
    return Extractor(name, f"{name} {VERSION}", compute, {"model": name, "version": VERSION})


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


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()
