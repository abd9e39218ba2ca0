"""Logistic regression as scikit-learn has it, on features that pass by a block at a time and are never copied whole."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from pathfm.rows import Rows

MAX_ITER = 500  # of L-BFGS
SOLVER = {"maxls": 50, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps}  # scikit-learn's


class Linear(NamedTuple):
    """A linear classifier: weight (C, D) and bias (C,), with the value of its objective."""

    weight: np.ndarray
    bias: np.ndarray
    objective: float

    def answers(self, x: np.ndarray | Rows) -> np.ndarray:
        """(n,) classes as integers for features x (n, D). Raises InputError where one is not finite."""
        parts = (block @ self.weight.T + self.bias for _, block in Rows.of(x).finite().blocks())
        return np.concatenate([part.argmax(axis=1) for part in parts])


def balanced(x: np.ndarray | Rows, y: np.ndarray, c: float, start: Linear | None = None) -> Linear:
    """The weights that LogisticRegression(C=c, class_weight="balanced", max_iter=MAX_ITER) finds, as far as it goes.

    x, y   (N, D) features and (N,) classes as integers from 0, each of which is there
    start  of the search, such as the last one of a path of c

    Two classes have one logit, that of the second: the first row of `weight` is zero.
    """
    x, counts = Rows.of(x), np.bincount(y)
    first = int(len(counts) == 2)  # the first class that has weights
    share = (1 / (len(counts) * counts))[y]  # of each row in the mean loss, in which classes weigh alike

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = np.zeros((len(counts), x.d + 1))
        weights[first:] = flat.reshape(-1, x.d + 1)
        slopes, loss = np.zeros_like(weights), 0.0
        for places, block in x.blocks():
            block, truth = block.astype(np.float64), (np.arange(len(block)), y[places])
            log_p = log_softmax(block @ weights[:, :-1].T + weights[:, -1], axis=1)
            loss -= share[places] @ log_p[truth]
            error = np.exp(log_p)
            error[truth] -= 1
            error *= share[places, None]
            slopes[:, :-1] += error.T @ block
            slopes[:, -1] += error.sum(axis=0)
        pull = weights[:, :-1] / (c * len(y))
        slopes[:, :-1] += pull
        return loss + (pull * weights[:, :-1]).sum() / 2, slopes[first:].ravel()

    begin = np.zeros((len(counts), x.d + 1)) if start is None else np.c_[start.weight, start.bias]
    found = minimize(
        objective, begin[first:].ravel(), jac=True, method="L-BFGS-B", options={"maxiter": MAX_ITER, **SOLVER}
    )
    weights = np.zeros_like(begin)
    weights[first:] = found.x.reshape(-1, x.d + 1)
    return Linear(weights[:, :-1], weights[:, -1], float(found.fun))
