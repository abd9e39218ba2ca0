"""Linear heads on frozen features: all runs and learning rates of a protocol are trained side by side, as if alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pathfm.errors import InputError
from pathfm.protocols import Protocol
from pathfm.rows import Rows, release

LOW, LOW_EPOCHS = 1 / 3, 5  # torch's ConstantLR as eva leaves it: a third of the learning rate for five epochs
READ_ROWS = 2048  # rows of features in memory at once while heads are judged
HELD_BYTES = 2**29  # of a memory-mapped file that may stay mapped from one epoch to the next


@dataclass(frozen=True, repr=False)
class Heads:
    """The heads that a protocol kept, of L learning rates and R runs; K outputs, one where there are two classes.

    weight, bias     (L, R, K, D) and (L, R, K) float32
    validate         (L, R) the monitored score of the head that was kept, 0 to 1
    kept, stopped    (L, R) the steps at which it stood, and at which its run ended
    looks, history   (T,) steps and (T, L, R) monitored scores; NaN once a run had ended
    """

    protocol: Protocol
    learning_rates: tuple[float, ...]
    weight: Tensor
    bias: Tensor
    validate: np.ndarray
    kept: np.ndarray
    stopped: np.ndarray
    looks: np.ndarray
    history: np.ndarray

    def answers(self, x: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """(L, R, n) classes as integers for `rows` (n,) of features x (N, D)."""
        rows = np.arange(len(x)) if rows is None else np.asarray(rows)
        parts = _judged(_Rows(x, self.weight.device), rows, self.weight, self.bias, self.protocol.batch_size)
        return np.moveaxis(np.concatenate([found.cpu().numpy() for _, found in parts]), 0, 2)


def fit(
    chosen: Protocol,
    x: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    validate: np.ndarray,
    seed: int = 0,
    learning_rates: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> Heads:
    """Trains all runs of all learning rates side by side, each as if it were alone, and keeps each one's best head.

    x               (N, D) float16 or float32, in memory or memory-mapped; rows are read as they are needed. On
                    another device than the CPU it is copied there whole
    y               (N,) classes as integers from 0; two classes make one output and a logistic loss, more a softmax
    train, validate (n,) rows of x
    seed            of starts and shuffles; run r is the same whatever the number of runs and learning rates
    learning_rates  in place of the protocol's; all see the same starts and shuffles

    Raises InputError where labels and features differ in length, features hold NaN, or a split lacks a class.
    """
    x, y = _checked(chosen, x, y, train, validate)
    train, validate = np.asarray(train), np.asarray(validate)
    rates = tuple(learning_rates or (chosen.lr,))
    rows, labels = _Rows(x, device), torch.from_numpy(y).to(device)
    draws = [_draw(seed, run) for run in range(chosen.runs)]
    weight, bias = (start.to(device) for start in _starts(chosen, draws, len(rates), x.shape[1], int(y.max()) + 1))
    pools = torch.stack([_pool(chosen, y, train, draw) for draw in draws])
    descent, watch = _Descent(chosen, rates, weight, bias), _Watch(chosen, weight, bias)
    steps = math.ceil(pools.shape[1] / chosen.batch_size)  # in an epoch; the last batch may be small
    # A pass that max_steps cuts short is never judged, so nothing of it can be kept: it is not trained either.
    for epoch in range(chosen.max_steps // steps):
        descent.set_rates(epoch)
        order = pools if chosen.shots else _shuffled(pools, draws)
        runs = torch.from_numpy(np.flatnonzero(watch.running.any(axis=0)))  # ended ones cost nothing
        for batch in order[runs].split(chosen.batch_size, dim=1):
            descent.step(rows[batch], labels[batch.to(device)], runs.to(device))
        rows.release()
        if (epoch + 1) % chosen.every == 0:
            watch.look((epoch + 1) * steps, _scores(chosen, rows, labels, validate, weight, bias))
            rows.release()
            if not watch.running.any():
                break
    return watch.heads(rates)


class _Rows:
    """Rows of features by their numbers, float32 on the device: from where they lie, or from a copy on a GPU."""

    def __init__(self, x: np.ndarray, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.x = x if self.device.type == "cpu" else self._copied(x)

    def _copied(self, x: np.ndarray) -> Tensor:
        """All rows on the device, in half precision where they are; a block at a time passes through this memory."""
        kind = torch.float16 if x.dtype == np.float16 else torch.float32
        held = torch.empty(x.shape, dtype=kind, device=self.device)
        for places, block in Rows(x).blocks():
            held[places] = torch.from_numpy(block).to(self.device, kind)
        return held

    def __getitem__(self, rows: Tensor | np.ndarray) -> Tensor:
        if isinstance(self.x, np.ndarray):
            return torch.from_numpy(self.x[np.asarray(rows)]).float()
        return self.x[torch.as_tensor(rows, device=self.device)].float()

    def release(self) -> None:
        """Gives back the pages of a large mapped file: they stay in the system's cache, but not in this process."""
        if isinstance(self.x, np.ndarray) and self.x.nbytes > HELD_BYTES:
            release(self.x)


class _Descent:
    """All heads, their gradients and one optimiser, whose arithmetic is element by element: no head sees another."""

    def __init__(self, chosen: Protocol, rates: Sequence[float], weight: Tensor, bias: Tensor) -> None:
        self.chosen, self.rates, self.weight, self.bias = chosen, rates, weight, bias
        self.slopes = torch.zeros_like(weight), torch.zeros_like(bias)
        groups = []
        for index in range(len(rates)):
            pair = weight[index], bias[index]
            for part, slope in zip(pair, self.slopes, strict=True):
                part.grad = slope[index]
            groups.append({"params": pair})
        kinds = {"AdamW": (torch.optim.AdamW, {}), "SGD": (torch.optim.SGD, {"momentum": 0.9})}
        kind, settings = kinds[chosen.optimiser]
        self.optimiser = kind(groups, lr=rates[0], fused=True, **settings)

    def set_rates(self, epoch: int) -> None:
        """Learning rates of an epoch from 0."""
        if self.chosen.schedule == "cosine":
            factor = (1 + math.cos(math.pi * epoch / self.chosen.max_steps)) / 2
        else:
            factor = LOW if epoch < LOW_EPOCHS else 1.0
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def step(self, x: Tensor, y: Tensor, runs: Tensor) -> None:
        """One update by the mean loss of each of `runs` (A,) over its own batch x (A, B, D), y (A, B)."""
        z = torch.einsum("abd,lakd->labk", x, self.weight[:, runs]) + self.bias[:, runs, None]
        if z.shape[-1] == 1:
            error = z.sigmoid() - y[..., None]
        else:
            error = z.softmax(-1) - torch.nn.functional.one_hot(y, z.shape[-1])
        error /= y.shape[1]
        self.slopes[0][:, runs] = torch.einsum("labk,abd->lakd", error, x)
        self.slopes[1][:, runs] = error.sum(2)
        self.optimiser.step()


class _Watch:
    """The best head of each run so far, and which runs still go on."""

    def __init__(self, chosen: Protocol, weight: Tensor, bias: Tensor) -> None:
        self.chosen, self.weight, self.bias = chosen, weight, bias
        self.best = weight.clone(), bias.clone()
        shape = tuple(weight.shape[:2])
        self.running = np.ones(shape, bool)
        self.validate, self.reference = np.full(shape, -np.inf), np.full(shape, -np.inf)
        self.waited, self.kept = np.zeros(shape, int), np.zeros(shape, int)
        self.stopped = np.full(shape, chosen.max_steps)
        self.looks, self.history = [], []

    def look(self, step: int, scores: np.ndarray) -> None:
        """Heeds the scores (L, R) of all heads as they stand after `step`."""
        better = self.running & (scores > self.validate)
        for best, now in zip(self.best, (self.weight, self.bias), strict=True):
            best[better] = now[better]
        self.validate[better], self.kept[better] = scores[better], step
        progress = scores > self.reference + self.chosen.min_delta
        self.reference = np.where(progress, scores, self.reference)
        self.waited = np.where(progress, 0, self.waited + 1)
        self.looks.append(step)
        self.history.append(np.where(self.running, scores, np.nan))
        ended = self.running & (self.waited >= self.chosen.patience)
        self.stopped[ended] = step
        self.running &= ~ended

    def heads(self, rates: tuple[float, ...]) -> Heads:
        looks, history = np.array(self.looks), np.stack(self.history)
        return Heads(self.chosen, rates, *self.best, self.validate, self.kept, self.stopped, looks, history)


def _draw(seed: int, run: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, run]).generate_state(1)[0]))


def _starts(chosen: Protocol, draws: list[torch.Generator], rates: int, d: int, classes: int) -> tuple[Tensor, Tensor]:
    """Weight (L, R, K, D) and bias (L, R, K) as torch's Linear starts: uniform within 1 / sqrt(D)."""
    k = 1 if classes == 2 else classes
    drawn = [(torch.rand(k, d + 1, generator=draw) * 2 - 1) / math.sqrt(d) for draw in draws]
    start = torch.stack(drawn[:1] * len(draws) if chosen.one_start else drawn).repeat(rates, 1, 1, 1)
    return start[..., :d].contiguous(), start[..., d].contiguous()


def _pool(chosen: Protocol, y: np.ndarray, train: np.ndarray, draw: torch.Generator) -> Tensor:
    """(n,) rows that one run trains on."""
    if not chosen.shots:
        return torch.from_numpy(train)
    parts = []
    for label in np.unique(y):
        there = train[y[train] == label]
        parts.append(there[torch.randperm(len(there), generator=draw)[: chosen.shots].numpy()])
    return torch.from_numpy(np.concatenate(parts))


def _shuffled(pools: Tensor, draws: list[torch.Generator]) -> Tensor:
    """(R, n) the rows of each run in a new order."""
    return torch.stack([p[torch.randperm(len(p), generator=draw)] for p, draw in zip(pools, draws, strict=True)])


def _judged(
    rows: _Rows, which: np.ndarray, weight: Tensor, bias: Tensor, batch_size: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Some rows of `which` and the classes (n, L, R) that the heads give them, until all had their turn."""
    flat = weight.flatten(0, 2).T
    block = batch_size * max(1, READ_ROWS // batch_size)
    for start in range(0, len(which), block):
        part = which[start : start + block]
        z = (rows[part] @ flat).view(-1, *bias.shape) + bias
        yield part, _classes(z, batch_size)


def _classes(z: Tensor, batch_size: int) -> Tensor:
    """(n, L, R) classes of logits z (n, L, R, K).

    Of two classes it is the second where its probability is above a half. torchmetrics takes numbers for
    probabilities where all of a batch lie within 0 and 1, and so does this.
    """
    if z.shape[-1] > 1:
        return z.argmax(-1)
    batches = z[..., 0].split(batch_size)
    return torch.cat([one > 0.5 * ((one >= 0) & (one <= 1)).all(0) for one in batches]).long()


def _scores(
    chosen: Protocol, rows: _Rows, labels: Tensor, which: np.ndarray, weight: Tensor, bias: Tensor
) -> np.ndarray:
    """(L, R) the monitored score of all heads on the rows `which`, 0 to 1."""
    classes = int(labels.max()) + 1
    hits = torch.zeros(classes, *weight.shape[:2], dtype=torch.float64, device=weight.device)
    n = torch.zeros(classes, dtype=torch.float64, device=weight.device)
    for part, found in _judged(rows, which, weight, bias, chosen.batch_size):
        truth = labels[torch.from_numpy(part).to(labels.device)]
        hits.index_add_(0, truth, (found == truth[:, None, None]).double())
        n += truth.bincount(minlength=classes)
    share = hits.sum(0) / n.sum() if chosen.monitor == "accuracy" else (hits / n[:, None, None]).mean(0)
    return share.cpu().numpy()


def _checked(chosen: Protocol, x, y, train, validate) -> tuple[np.ndarray, np.ndarray]:
    """Features as they are and labels as int64, or InputError."""
    x, y = x if isinstance(x, np.ndarray) else np.asarray(x, np.float32), np.asarray(y)
    if x.ndim != 2 or len(x) != len(y):
        raise InputError(
            f"features of shape {x.shape} need one label a row, but {y.shape} were given; are they of one file?"
        )
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() < 1:
        raise InputError("labels must be integers from 0, of at least two classes")
    Rows(x).finite()
    for name, rows, least in (("train", train, max(1, chosen.shots)), ("validate", validate, 1)):
        counts = np.bincount(y[rows], minlength=y.max() + 1)
        if counts.min() < least:
            raise InputError(
                f"class {counts.argmin()} has {counts.min()} images in {name}, {chosen.name} needs {least}"
            )
    size = len(train) if not chosen.shots else chosen.shots * (int(y.max()) + 1)
    if chosen.max_steps < chosen.every * math.ceil(size / chosen.batch_size):
        raise InputError(f"max_steps {chosen.max_steps} end before {chosen.name} first looks at validate; give more")
    return x, y.astype(np.int64)
