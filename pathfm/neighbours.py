"""Nearest neighbours by cosine, and their vote."""

from __future__ import annotations

import numpy as np

BLOCK = 1024  # queries compared at once; bounds the memory at BLOCK x bank similarities


def unit_rows(x: np.ndarray) -> np.ndarray:
    """(N, D) float32 rows of length 1; a row of zeros stays zero."""
    x = np.asarray(x, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest(
    bank: np.ndarray,
    query: np.ndarray | None = None,
    k: int = 20,
    bank_group: np.ndarray | None = None,
    query_group: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `bank` (N, D) nearest to each row of `query` (Q, D): ids (Q, k) and cosines (Q, k), best first.

    query   None searches the bank with itself; a row is never its own neighbour
    groups  a neighbour of the query's own group (the same patient or slide) is left out
    Where fewer than k rows remain, the id is -1 and the cosine -inf.
    """
    itself = query is None
    bank = unit_rows(bank)
    query = bank if itself else unit_rows(query)
    query_group = bank_group if itself else query_group
    k = min(k, len(bank))
    ids, cosines = np.empty((len(query), k), np.int64), np.empty((len(query), k), np.float32)
    for start in range(0, len(query), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(query)))
        similarity = query[rows] @ bank.T
        if itself:
            similarity[rows - start, rows] = -np.inf
        if bank_group is not None:
            similarity[query_group[rows, None] == bank_group[None, :]] = -np.inf
        top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        found = np.take_along_axis(similarity, top, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        cosines[rows] = np.take_along_axis(found, order, axis=1)
        ids[rows] = np.take_along_axis(top, order, axis=1)
    ids[np.isneginf(cosines)] = -1
    return ids, cosines


def vote(ids: np.ndarray, cosines: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(Q,) the class that most neighbours have; the larger sum of cosines breaks a tie. -1 without neighbours.

    codes  (N,) classes of the bank as integers from 0
    """
    k = ids.shape[1]
    found = ids >= 0
    weight = np.where(found, 1 + np.where(found, cosines, 0) / (4 * k), 0)  # the cosines sum to under 1/2
    votes = np.zeros((len(ids), codes.max() + 1))
    np.add.at(votes, (np.arange(len(ids))[:, None], codes[ids]), weight)
    return np.where(found.any(axis=1), votes.argmax(axis=1), -1)
