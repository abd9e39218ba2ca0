"""Nearest neighbours by cosine, and their vote."""

from __future__ import annotations

import numpy as np
import torch

from pathfm.rows import Rows

QUERIES, KEYS = 2048, 4096  # compared at once: their similarities, and these rows, are all that is in memory


def unit_rows(x: np.ndarray) -> np.ndarray:
    """(N, D) float32 rows of length 1; a row of zeros stays zero."""
    x = np.asarray(x, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest(
    bank: np.ndarray | Rows,
    query: np.ndarray | Rows | None = None,
    k: int = 20,
    bank_group: np.ndarray | None = None,
    query_group: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `bank` (N, D) nearest to each row of `query` (Q, D): ids (Q, k) and cosines (Q, k), best first.

    query   None searches the bank with itself; a row is never its own neighbour
    groups  a neighbour of the query's own group (the same patient or slide) is left out
    Where fewer than k rows remain, the id is -1 and the cosine -inf. Both sides are read a block at a time.
    """
    itself = query is None
    bank = Rows.of(bank).changed(unit_rows)
    query = bank if itself else Rows.of(query).changed(unit_rows)
    query_group = bank_group if itself else query_group
    k = min(k, len(bank))
    ids, cosines = np.full((len(query), k), -1), np.full((len(query), k), -np.inf, np.float32)
    for asked, rows in query.blocks(QUERIES):
        for there, keys in bank.blocks(KEYS):
            similarity = rows @ keys.T
            if itself:
                same = np.arange(max(asked.start, there.start), min(asked.stop, there.stop))
                similarity[same - asked.start, same - there.start] = -np.inf
            if bank_group is not None:
                similarity[query_group[asked, None] == bank_group[None, there]] = -np.inf
            new, places = _top(similarity, k)
            both = np.concatenate([cosines[asked], new], axis=1), np.concatenate([ids[asked], places + there.start], 1)
            cosines[asked], best = _top(both[0], k)
            ids[asked] = np.take_along_axis(both[1], best, axis=1)
    ids[np.isneginf(cosines)] = -1
    return ids, cosines


def _top(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, or all where there are fewer, and their places; largest first."""
    found = torch.topk(torch.from_numpy(values), min(k, values.shape[1]), dim=1)
    return found.values.numpy(), found.indices.numpy()


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
