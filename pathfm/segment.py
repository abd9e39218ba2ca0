"""Segmentation of nuclei on frozen patch tokens: a small decoder trained as eva trains it, its Dice by image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from pathfm import backbones, export
from pathfm.benchmarks import patient_column, patients
from pathfm.ensemble import Ensemble, apply
from pathfm.errors import InputError, nearest
from pathfm.scores import RESAMPLED, RESAMPLES, Difference, Interval, verdict
from pathfm.segmentation import DECODERS, dice, dice_loss, of_images
from pathfm.storage import progress
from pathfm.tasks.nuclei import NucleiSet


@dataclass(frozen=True)
class SegmentationProtocol:
    """How a decoder is trained: eva's of 2026, 73b61a7 configs/vision/pathology/online/segmentation."""

    decoder: str = "image"  # "image": tokens and pixels; "tokens": tokens alone
    window_px: int = 0  # pixels a side of the pieces that images are cut into; 0 keeps them whole
    input_px: int = 224  # short side to which a piece is brought, and side of its central square
    crops: bool = False  # train on random crops (8 to 100 % of the area) instead
    steps: int = 2000  # at most
    batch_size: int = 64
    lr: float = 2e-3  # AdamW
    patience: int = 200  # epochs without a better Dice on validate
    slow_epochs: int = 5  # at first, at a third of the rate: what torch's ConstantLR does when nothing is set
    runs: int = 5
    seed: int = 0  # of the first run


EVA = {
    "consep": SegmentationProtocol(window_px=250, patience=200),
    "monusac": SegmentationProtocol(crops=True, patience=100),
}


FLOATS = 450  # of a pixel of a piece, that wait for a decoder's gradient, as measured
# Of one step; runs are trained in groups that stay below, one at least. On a CPU one by one: convolutions in groups,
# which five runs at once are, take there 2.4 times the seconds of five, one after another.
BYTES_AT_ONCE = {"cpu": 0, "gpu": 2**35}


def protocol_of(images: NucleiSet) -> SegmentationProtocol:
    """eva's, of the task that `images` is, else the defaults."""
    return EVA.get(images.name.split(" ")[0].split(",")[0], SegmentationProtocol())


class Pieces(NamedTuple):
    """What a decoder is trained and scored on.

    images (P, px, px, 3) uint8, masks (P, px, px) uint8, and row (P,) of the image that each was cut from
    """

    images: np.ndarray
    masks: np.ndarray
    row: np.ndarray


def pieces(images: NucleiSet, rows: np.ndarray, protocol: SegmentationProtocol) -> Pieces:
    """The central squares, at input_px a side, of whole images or of all whole windows of them."""
    found = []
    for row in rows:
        for pixels, mask in _windows(images, row, protocol.window_px):
            both = v2.Resize(protocol.input_px, antialias=True)(*_pair(pixels, mask))
            pixels, mask = v2.CenterCrop(protocol.input_px)(*both)
            found.append((pixels.permute(1, 2, 0).numpy(), mask.numpy(), row))
    return Pieces(*map(np.stack, zip(*found, strict=True)))


def parts(images: NucleiSet, protocol: SegmentationProtocol) -> tuple[str, dict[str, Pieces]]:
    """The role that is reported, test or else validate, and the pieces of it, of validate and of probe-train.

    Raises InputError where no image has the role validate or probe-train.
    """
    rows = _roles(images)
    role = "test" if len(rows["test"]) else "validate"
    return role, {part: pieces(images, rows[part], protocol) for part in {"probe-train", "validate", role}}


def _windows(images: NucleiSet, row: int, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    pixels, mask = images.image(row), images.masks(row).types
    if not side or min(mask.shape) < side:
        yield pixels, mask
        return
    for top in range(0, mask.shape[0] - side + 1, side):
        for left in range(0, mask.shape[1] - side + 1, side):
            place = slice(top, top + side), slice(left, left + side)
            yield pixels[place], mask[place]


def _pair(pixels: np.ndarray, mask: np.ndarray) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """As transforms take them: what moves the image moves the mask, by nearest neighbour."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(mask)))


@dataclass(frozen=True, repr=False)
class Segmented:
    """Decoders of one backbone on one set, a run each, and what they score.

    each      (R, P, C) Dice of every reported piece by class, nan where it has none of the class
    clean     the same without the pixels of the ignored class
    reported  its pieces: of role test, else of validate, on which the runs were also stopped
    steps     (R,) of the best epoch; validate (R,) its score
    window_px of the protocol, which says how large a piece is
    predict   (B, px, px, 3) uint8 to (B, px, px) classes, by the first run; None of what looks at no pixels
    tokens    (P, D) mean token of every reported piece; None of floors
    mpp       effective um per pixel of a reported piece, their median; None where the images' is not known
    """

    name: str
    images: NucleiSet
    reported: Pieces
    role: str
    each: np.ndarray
    clean: np.ndarray
    steps: np.ndarray
    validate: np.ndarray
    window_px: int
    predict: Callable[[np.ndarray], np.ndarray] | None
    tokens: np.ndarray | None = None
    mpp: float | None = None

    @property
    def resampled(self) -> str:
        """What intervals are drawn over. Those by image are too narrow: images of one patient resemble each other."""
        return RESAMPLED[patient_column(self.images.table)]

    def interval(self, clean: bool = False, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
        """Dice as eva reports it, mean over runs and pieces, with its bootstrap by patient, or image if unknown."""
        return _bootstrapped(self._people(), self._scores(clean), resamples, seed)

    def gain(self, floor: Segmented, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
        """This Dice less that of other decoders on the same pieces; a draw takes the same patients for both."""
        if not np.array_equal(self.reported.row, floor.reported.row) or self.images.name != floor.images.name:
            raise InputError(f"{self.name} and {floor.name} were scored on different pieces; take one set for both")
        who = self._people()
        found, n = _bootstrapped(who, self._scores() - floor._scores(), resamples, seed), len(np.unique(who))
        n = None if patients(self.images.table) is None else n
        return Difference(*found, n, verdict(found.low, found.high, n))

    def _scores(self, clean: bool = False) -> np.ndarray:
        """(P,) of each piece, mean over runs and classes."""
        return np.nanmean([of_images(run) for run in (self.clean if clean else self.each)], axis=0)

    def _people(self) -> np.ndarray:
        """(P,) the patient of each piece, or its image."""
        known = patients(self.images.table)
        return self.reported.row if known is None else known[self.reported.row]

    def summary(self) -> pd.DataFrame:
        """One row: the score with its interval, each class, sizes, and what was left out."""
        found, by_class = self.interval(), pd.DataFrame(self.each.reshape(-1, self.each.shape[2])).mean()
        row = {"features": self.name, "dice": found.value, "low": found.low, "high": found.high}
        if self.images.ignored:
            row[f"dice without {self.images.ignored}"] = self.interval(clean=True).value
        row |= dict(zip(self.images.classes, by_class, strict=True)) | {"role": self.role}
        row |= {"stopped on report": self.role != "test", "runs": len(self.each), "n_pieces": len(self.reported.row)}
        row |= {
            "mpp": self.mpp,
            "n_images": len(np.unique(self.reported.row)),
            "n_quarantined": len(self.images.quarantined),
        }
        return pd.DataFrame([row])


def _bootstrapped(who: np.ndarray, score: np.ndarray, resamples: int, seed: int) -> Interval:
    """Mean over pieces with the interval of its bootstrap by `who`; pieces without a score are left out."""
    who, score = np.unique(who, return_inverse=True)[1][~np.isnan(score)], score[~np.isnan(score)]
    people = who.max() + 1
    drawn = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), resamples)[:, who]
    kept = drawn.sum(axis=1) > 0
    means = (drawn[kept] @ score) / drawn[kept].sum(axis=1)
    return Interval(float(score.mean()), *(float(q) for q in np.quantile(means, [0.025, 0.975])))


def fit(
    model: nn.Module | str | Path,
    images: NucleiSet,
    protocol: SegmentationProtocol | None = None,
    preprocess: Callable | None = None,
    name: str | None = None,
    device: str | None = None,
) -> Segmented:
    """Decoders on the frozen tokens of `model`, trained on probe-train, stopped on validate, reported on test.

    protocol    None: `protocol_of` the images
    preprocess  None takes the folder's; the pieces keep their size
    device      to move the model to, where the decoders are trained too; None leaves it where it is

    On a GPU all runs are trained side by side, as far as they fit (BYTES_AT_ONCE), each as if it were alone. The tokens
    are those of `backbones.patch_map`. Raises InputError for an unknown decoder, a role without images, a size that the
    patch does not divide, a network without patch tokens, and tokens that are not finite.
    """
    protocol = protocol or protocol_of(images)
    if protocol.decoder not in DECODERS:
        raise InputError(f"unknown decoder '{protocol.decoder}'.{nearest(protocol.decoder, DECODERS)}")
    label = name or (Path(model).name if isinstance(model, str | Path) else backbones.kind(model))
    if isinstance(model, str | Path):
        model, preprocess = export.load(model) if preprocess is None else (export.load(model)[0], preprocess)
    model = model.eval() if device is None else model.eval().to(device)
    seen = _Seen(model, preprocess or export.Preprocess(protocol.input_px), label)
    role, cut = parts(images, protocol)
    seen.check(cut["validate"])
    ignored = _ignored(images)
    outputs = len(images.classes) - (ignored is not None)
    held = {part: seen.batch(found) for part, found in cut.items() if part != "probe-train" or not protocol.crops}
    seeds = np.arange(protocol.runs) + protocol.seed
    group = _at_once(protocol, held["validate"].tokens.device)
    trained = [
        _train(seen, images, cut, held, protocol, outputs, ignored, seeds[at : at + group])
        for at in progress(range(0, len(seeds), group), f"{label} on {images.name}", unit="group")
    ]
    answers = np.concatenate([_predict(runs.model, runs.best, held[role], protocol) for runs in trained])
    each, clean = (by_class(answers, cut[role].masks, images, how) for how in (False, True))
    steps, validate = (np.concatenate([getattr(runs, name) for runs in trained]) for name in ("when", "score"))
    decoder, first = trained[0].model, {name: tensor[:1] for name, tensor in trained[0].best.items()}
    asked = lambda pixels: _predict(decoder, first, seen.batch(Pieces(pixels, pixels[..., 0], None)), protocol)[0]  # noqa: E731
    told = steps, validate, protocol.window_px, asked, held[role].tokens.mean(dim=(2, 3)).cpu().numpy()
    return Segmented(label, images, cut[role], role, each, clean, *told, effective_mpp(images, cut[role], protocol))


def effective_mpp(images: NucleiSet, some: Pieces, protocol: SegmentationProtocol) -> float | None:
    """Median um per pixel of pieces, as the network sees them; None where the images' mpp is not known."""
    table = images.table.iloc[some.row]
    side = table[["width_px", "height_px"]].min(axis=1).astype(float)
    side = side.clip(upper=protocol.window_px or np.inf)
    mpp = (table["mpp"].astype(float) * side / protocol.input_px).median()
    return None if np.isnan(mpp) else float(mpp)


class Batch(NamedTuple):
    """Tokens (P, D, h, w), normalised images (P, 3, px, px) and masks (P, px, px) int64 of pieces."""

    tokens: Tensor
    images: Tensor
    masks: Tensor

    def at(self, rows) -> Batch:
        return Batch(*(part[rows] for part in self))


class _Seen(NamedTuple):
    """A frozen backbone."""

    model: nn.Module
    preprocess: Callable
    name: str

    def check(self, some: Pieces) -> None:
        """Raises InputError where the network does not take the pieces."""
        try:
            self.batch(Pieces(*(part[:1] for part in some)))
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            px = some.images.shape[1]
            raise InputError(f"{backbones.kind(self.model)} refuses an input of {px} x {px} px: {error}") from None

    @torch.no_grad()
    def batch(self, some: Pieces, at_once: int = 64) -> Batch:
        device = next(self.model.parameters()).device
        parts = np.array_split(some.images, -(-len(some.images) // at_once))
        images = [self._normalised(part).to(device) for part in parts]
        tokens = torch.cat([backbones.patch_map(self.model, x, self.name) for x in images])
        if not tokens.isfinite().all():
            raise InputError(f"tokens of '{self.name}' hold NaN or infinity; look at the weights")
        return Batch(tokens, torch.cat(images), torch.from_numpy(some.masks).long().to(device))

    def _normalised(self, pixels: np.ndarray) -> Tensor:
        if isinstance(self.preprocess, export.Preprocess):
            return self.preprocess(pixels, resize=False)
        return self.preprocess(pixels)


def _train(seen, images, cut, held, protocol, outputs, ignored, seeds) -> Ensemble:
    """A group of runs, side by side; `when` they were best is counted in steps."""
    tokens, chances, decoders = held["validate"].tokens, [_Chance(seed) for seed in seeds], []
    for chance in chances:
        with chance.drawn():
            decoders.append(DECODERS[protocol.decoder](tokens.shape[1], outputs).to(tokens.device))
    runs, step = Ensemble(decoders, protocol.lr, protocol.slow_epochs, protocol.patience), 0
    losses = torch.func.vmap(lambda logits, masks: dice_loss(logits, masks, ignored))
    while step < protocol.steps and len(runs.numbers):
        runs.model.train()
        for batch in _epoch(seen, images, held, protocol, [chances[run] for run in runs.numbers]):
            runs.step(losses(apply(runs.model, runs.state, batch.tokens, batch.images), batch.masks))
            step += 1
            if step == protocol.steps:
                break
        answers = _predict(runs.model, runs.state, held["validate"], protocol)
        each = by_class(answers, cut["validate"].masks, images)
        runs.look(np.array([np.nanmean(of_images(one)) for one in each]), step)
    return runs


class _Chance:
    """The random numbers of one run: torch's own, which transforms draw from, kept apart from all others."""

    def __init__(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(int(seed)).get_state()

    @contextlib.contextmanager
    def drawn(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            yield
            self.state = torch.get_rng_state()


def _at_once(protocol: SegmentationProtocol, device: torch.device) -> int:
    """Runs of a group, as BYTES_AT_ONCE says."""
    one_run = 4 * FLOATS * protocol.input_px**2 * protocol.batch_size
    return max(1, BYTES_AT_ONCE["cpu" if device.type == "cpu" else "gpu"] // one_run)


def _epoch(seen, images, held, protocol, chances: Sequence[_Chance]) -> Iterator[Batch]:
    """Every training piece once, in a new order of each run's own; with `crops`, of every image a new crop.

    A batch has a leading A, a run each.
    """
    rows, orders = _roles(images)["probe-train"], []
    for chance in chances:
        with chance.drawn():
            orders.append(torch.randperm(len(rows if protocol.crops else held["probe-train"].masks)))
    for part in torch.stack(orders).split(protocol.batch_size, dim=1):
        if protocol.crops:
            yield _crops(seen, images, rows, part, protocol, chances)
        else:
            yield held["probe-train"].at(part)


def _crops(seen, images, rows: np.ndarray, part: Tensor, protocol, chances: Sequence[_Chance]) -> Batch:
    """Of image rows[part], (A, B), a random crop by each run's own chance."""
    crop, cut = v2.RandomResizedCrop(protocol.input_px, antialias=True), []
    for chance, own in zip(chances, part, strict=True):
        with chance.drawn():
            cut += [crop(*_pair(images.image(row), images.masks(row).types)) for row in rows[own.numpy()].tolist()]
    pixels, masks = (np.stack([one.numpy() for one in both]) for both in zip(*cut, strict=True))
    found = seen.batch(Pieces(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), masks, None))
    return Batch(*(tensor.unflatten(0, part.shape) for tensor in found))


@torch.no_grad()
def _predict(decoder: nn.Module, state: dict[str, Tensor], held: Batch, protocol: SegmentationProtocol) -> np.ndarray:
    """(A, P, px, px) uint8 classes, of the same pieces from every run."""
    decoder.eval()
    parts = zip(*(part.split(protocol.batch_size) for part in held[:2]), strict=True)
    found = [apply(decoder, state, *part, shared=True).argmax(dim=2).to(torch.uint8).cpu() for part in parts]
    return torch.cat(found, dim=1).numpy()


def by_class(answers: np.ndarray, truth: np.ndarray, images: NucleiSet, clean: bool = False) -> np.ndarray:
    """(A, P, C) Dice of every run's answers (A, P, px, px) by piece and class."""
    n, ignored = len(images.classes), _ignored(images)
    return np.array([[dice(a, t, n, ignored, clean) for a, t in zip(run, truth, strict=True)] for run in answers])


def _ignored(images: NucleiSet) -> int | None:
    return images.classes.index(images.ignored) if images.ignored else None


def _roles(images: NucleiSet) -> dict[str, np.ndarray]:
    role = images.table["role"] if "role" in images.table else pd.Series("", index=images.table.index)
    rows = {name: np.flatnonzero(role == name) for name in ("probe-train", "validate", "test")}
    for name in ("probe-train", "validate"):
        if not len(rows[name]):
            raise InputError(f"no image of {images.name} has the role {name}; draw roles with .split()")
    return rows
