"""What the processes of a run hold together: rows gathered with their gradients, and sums.

In one process, without torch.distributed, each function gives what that process holds.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _several() else 0


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks (R B, ...), in their order, of `x` (B, ...) on each; B must be the same.

    The gradient of a row is the sum of what all ranks ask of it, and arrives at the rank that holds it. So where
    every rank takes the mean over its own rows, the mean of the ranks' gradients is that of one process with all rows.
    """
    return _Gather.apply(x) if _several() else x


def own_rows(x: Tensor) -> Tensor:
    """Where the rows of `x` (B, ...) stand among the gathered ones (B,)."""
    return rank() * len(x) + torch.arange(len(x), device=x.device)


def summed(x: Tensor) -> Tensor:
    """The sum over all ranks, without gradient."""
    return _reduced(x, dist.ReduceOp.SUM) if _several() else x


def largest(x: Tensor) -> Tensor:
    """The greatest over all ranks, without gradient."""
    return _reduced(x, dist.ReduceOp.MAX) if _several() else x


def mean_row(x: Tensor) -> Tensor:
    """The mean (...,) over the rows (B, ...) of all ranks, which may differ in B; without gradient."""
    return summed(x.sum(0)) / row_count(x) if _several() else x.mean(0)


def row_count(x: Tensor) -> int:
    """How many rows (B, ...) all ranks have together."""
    return int(summed(torch.tensor(len(x), device=x.device))) if _several() else len(x)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reduced(x: Tensor, how: dist.ReduceOp) -> Tensor:
    x = x.detach().clone()
    dist.all_reduce(x, how)
    return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]
