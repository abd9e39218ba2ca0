"""How UNI is evaluated: logistic regression by L-BFGS, nearest class mean, few-shot episodes, retrieval.

Chen et al. 2024 and the code released with it. But for the regression, features are centred on the mean of those that
are learned from and brought to length 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pathfm.errors import InputError
from pathfm.neighbours import nearest, unit_rows, vote
from pathfm.regression import Linear
from pathfm.rows import Rows

MAX_ITER = 1000  # of L-BFGS
BLOCK = 4_000_000  # similarities in memory at once while episodes are answered


def logistic(x: np.ndarray | Rows, y: np.ndarray, max_iter: int = MAX_ITER) -> Linear:
    """Logistic regression by L-BFGS with strong Wolfe line search, from zero, on features as they are.

    x, y  (N, D) features and (N,) classes as integers from 0

    It minimises the mean cross-entropy plus |weight| / (2 C), C = D classes / 100; in UNI's code the norm is
    not squared. Features pass by a block at a time, and their gradients are summed.
    """
    x, y = Rows.of(x).finite(), torch.from_numpy(np.asarray(y, np.int64))
    classes = int(y.max()) + 1
    weight = torch.zeros(classes, x.d, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=max_iter, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        """The value; its slopes are added to those of weight and bias."""
        value = weight.norm() * 100 / (2 * x.d * classes)
        value.backward()
        for places, block in x.blocks():
            entropy = torch.nn.functional.cross_entropy(torch.from_numpy(block) @ weight.T + bias, y[places])
            part = entropy * (len(block) / len(x))
            part.backward()
            value = value.detach() + part.detach()
        return value.detach()

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        return objective()

    optimiser.step(closure)
    return Linear(weight.detach().numpy(), bias.detach().numpy(), float(objective()))


def centred(train_x: np.ndarray | Rows, *others: np.ndarray | Rows) -> list[Rows]:
    """All features minus the mean of `train_x`, rows of length 1."""
    train_x, *others = (Rows.of(x).finite() for x in (train_x, *others))
    mean = train_x.mean()
    return [x.changed(lambda block: unit_rows(block - mean)) for x in (train_x, *others)]


def simpleshot(train_x: np.ndarray | Rows, train_y: np.ndarray, x: np.ndarray | Rows) -> np.ndarray:
    """(n,) the class of `train_y`, integers from 0, whose mean is nearest to each row of x. Wang et al. 2019."""
    train_x, x = centred(train_x, x)
    share = np.diag(1 / np.bincount(train_y))  # (C, C): of an image in the mean of its class
    means = sum(share[train_y[places]].T @ block for places, block in train_x.blocks()).astype(np.float32)
    return np.concatenate([_nearest_mean(block @ means.T, means) for _, block in x.blocks()])


class Episodes(NamedTuple):
    """scores (n,) balanced accuracy of each, 0 to 1; votes (M, C) how many say each class of each test image."""

    scores: np.ndarray
    votes: np.ndarray


def episodes(
    train_x: np.ndarray | Rows,
    train_y: np.ndarray,
    test_x: np.ndarray | Rows,
    test_y: np.ndarray,
    shots: int,
    n: int = 1000,
    seed: int = 0,
) -> Episodes:
    """n times `simpleshot` from `shots` images of each class, drawn anew for each episode.

    Every test image is asked in each. Raises InputError where a class has too few images, or none on test.
    """
    asked = np.bincount(test_y, minlength=train_y.max() + 1)
    if asked.min() == 0:
        raise InputError(f"class {asked.argmin()} has no image on test")
    share = np.eye(len(asked), dtype=np.float32)[test_y] / asked  # (M, C)
    scores, votes = [], np.zeros((len(test_y), len(asked)), int)
    for said in _answered(Rows.of(train_x).finite(), train_y, Rows.of(test_x).finite(), shots, n, seed):
        scores.append((share.T @ (said == test_y[:, None]).astype(np.float32)).mean(axis=0))
        votes += np.stack([(said == label).sum(axis=1) for label in range(len(asked))], axis=1)
    return Episodes(np.concatenate(scores), votes)


def _answered(train_x: Rows, train_y: np.ndarray, test_x: Rows, shots: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """(M, E) classes of every test image in the next E episodes."""
    centre = train_x.mean()  # what is common to all changes no answer
    train_x, test_x = (x.changed(lambda block: block - centre) for x in (train_x, test_x))
    counts = np.bincount(train_y)
    if counts.min() < shots:
        raise InputError(f"class {counts.argmin()} has {counts.min()} images to learn from; {shots} shots need {shots}")
    rng = np.random.default_rng(seed)
    places = [np.flatnonzero(train_y == label) for label in range(len(counts))]
    step = max(1, BLOCK // (len(test_x) * len(counts)))
    for start in range(0, n, step):
        drawn = [_support(train_x, places, shots, rng) for _ in range(min(step, n - start))]
        means = np.stack([mean for mean, _ in drawn])  # (E, C, D)
        origin = np.stack([o for _, o in drawn])  # (E, D)
        yield np.concatenate([_said(block, means, origin) for _, block in test_x.blocks()])


def _said(x: np.ndarray, means: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """(M, E) classes of x (M, D) in episodes of class means (E, C, D), centred on origins (E, D)."""
    # (q - o) m / |q - o|, without a centred copy of the test images for each episode
    towards = np.einsum("md,ecd->mec", x, means, optimize=True) - np.einsum("ed,ecd->ec", origin, means)
    distance = (x**2).sum(axis=1)[:, None] - 2 * x @ origin.T + (origin**2).sum(axis=1)
    towards /= np.sqrt(np.maximum(distance, 1e-12))[..., None]
    return _nearest_mean(towards, means)


def retrieval(
    key_x: np.ndarray | Rows,
    key_y: np.ndarray,
    query_x: np.ndarray | Rows,
    query_y: np.ndarray,
    ks: Sequence[int] = (1, 3, 5),
) -> dict[str, float]:
    """The share of queries whose class one of the k nearest keys has ("acc@k"), or most of the last k have, 0 to 1."""
    hit, said = hits(key_x, key_y, query_x, query_y, max(ks))
    return {f"acc@{k}": float(hit[:, k - 1].mean()) for k in ks} | {
        f"majority@{max(ks)}": float((said == query_y).mean())
    }


def hits(key_x, key_y, query_x, query_y, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """(M, k) whether a query's class is among its 1, 2, ... k nearest keys, and (M,) what most of the k are.

    A query that lies on the mean of the keys has no direction and none nearest: of it stands how often as many keys,
    drawn at random, hold its class.
    """
    key_y, query_y = np.asarray(key_y), np.asarray(query_y)
    key_x, query_x = centred(key_x, query_x)
    ids, cosines = nearest(key_x, query_x, k)
    found = np.maximum.accumulate(key_y[ids] == query_y[:, None], axis=1).astype(float)
    lost = np.concatenate([~block.any(axis=1) for _, block in query_x.blocks()])
    others = (key_y[None, :] != query_y[lost, None]).sum(axis=1, keepdims=True) - np.arange(found.shape[1])
    found[lost] = 1 - np.cumprod(np.maximum(others, 0) / (len(key_y) - np.arange(found.shape[1])), axis=1)
    return found, vote(ids, cosines, key_y)


def _support(x: Rows, places: list[np.ndarray], shots: int, rng: np.random.Generator) -> tuple:
    """Class means (C, D) of one episode, and the origin (D,) that they were centred on."""
    rows = np.concatenate([rng.choice(there, shots, replace=False) for there in places])
    support = x[rows]
    origin = support.mean(axis=0)
    return unit_rows(support - origin).reshape(len(places), shots, -1).mean(axis=1), origin


def _nearest_mean(towards: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Where |q - m| is least, from q m (..., C) of queries of length 1 and means (..., C, D)."""
    return (towards - (means**2).sum(axis=-1) / 2).argmax(axis=-1)
