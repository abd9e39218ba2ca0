"""Processes ("ranks") that train one run together, each on its share of every batch: on GPUs, on machines.

A rank takes its slice of the global batch, and whatever is drawn for an image is drawn alike for any number of ranks.
So R ranks are one process with the same batch, up to the order in which sums are rounded: the centre, Sinkhorn-Knopp,
KoLeo, KDE, BatchNorm in the head and laws of colours are of the whole batch. Rank 0 alone watches and writes. What
ends one rank ends all, with the same error (`together`, `last_words`): a collapse, a full disk, a slide that cannot be
read, a folder that another run holds, a signal.

On one machine, a rank a GPU:

    torchrun --nproc-per-node 8 -m pathfm pretrain cohort.csv runs/l14 --recipe dinov2-vitl14 --workers 12

`batch_size` stays that of all ranks together. `--shard true` shares weights, gradients and moments out as well (FSDP2),
for models that a GPU cannot hold with their optimiser; the recipes of ViT-L and ViT-g do. Cohort, cache and run folder
must be one for all ranks.

On several machines with Slurm, a task a GPU. Signals reach every task, where torchrun would stand in between:

    #!/bin/bash
    #SBATCH --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=14 --time=24:00:00
    #SBATCH --signal=USR1@300 --requeue --open-mode=append
    export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500
    srun --wait=60 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
        python -m pathfm pretrain /data/cohort.csv /scratch/runs/l14 --recipe dinov2-vitl14 --workers 12'
    code=$?
    if [ $code -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit $code

Five minutes before its time is over the job gets USR1: every rank ends its step, rank 0 writes a checkpoint, all leave
with status 75, and the requeued job goes on from there. SIGTERM (scancel, preemption) does the same, if a step and a
checkpoint fit into the time until SIGKILL (KillWait, GraceTime). A job that dies without a word loses the steps since
its last checkpoint and no number: the same command goes on to the same weights. A rank that fails in the midst of a
step, out of memory, leaves others waiting in NCCL until they are ended: by torchrun at once, by srun after --wait.

In one process, without torch.distributed, each function here gives what that process holds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pathfm.errors import InputError, Stopped
from pathfm.storage import read_json, write_json

_apart = False


def rank() -> int:
    """This process's number, from 0; before the ranks have met, what their launcher says."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", 0))


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if several() else 1


def several() -> bool:
    """Whether there are other ranks, and they are asked."""
    return not _apart and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Inside, the processes that torchrun or Slurm started know each other; each waits for all at the end.

    Without a launcher, or where the caller has brought them together, nothing is done. Raises InputError where the
    launcher's variables do not fit together or a GPU is missing.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        yield
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is set, but {missing[0]} is not; start ranks with torchrun, or as pathfm.ranks says"
        )
    local, backend = int(os.environ["LOCAL_RANK"]), "gloo"
    if torch.cuda.is_available() and device in ("auto", "cuda"):
        if local >= torch.cuda.device_count():
            raise InputError(f"LOCAL_RANK={local}, but there are {torch.cuda.device_count()} GPUs; start a rank a GPU")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this rank asks no other: for what one does while the rest wait."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


@contextlib.contextmanager
def together() -> Iterator[None]:
    """At its end all ranks meet, and where the block raised on some, all raise what the first of them did.

    For what one rank does alone, or may fail at alone. Inside, no rank may wait for another.
    """
    wrong = None
    try:
        yield
    except Exception as error:
        wrong = error
    wrong = _agreed(wrong)
    if wrong is not None:
        raise wrong


def _agreed(wrong: Exception | None) -> Exception | None:
    """The error of the first rank that has one; None where all is well."""
    if not several():
        return wrong
    device = "cpu" if "gloo" in dist.get_backend_config() else "cuda"
    mine = torch.tensor(size() if wrong is None else rank(), device=device)
    first = int(_reduced(mine, dist.ReduceOp.MIN))
    if first == size():
        return None
    words = [_words(wrong)]
    dist.broadcast_object_list(words, src=first)
    return wrong if first == rank() else _spoken(*words[0])


@contextlib.contextmanager
def last_words(folder: Path) -> Iterator[None]:
    """What one rank raises in the block, where it can meet the others no more, they raise when they find it gone.

    Its words lie in `folder`, which all ranks see, before it leaves. `forget_words` takes away those of earlier runs.
    """
    try:
        yield
    except (Stopped, Elsewhere):  # known to all
        raise
    except Exception as error:
        if not several():
            raise
        others = [_words_of(folder, one) for one in range(size()) if one != rank()]
        heard = next((path for path in others if path.is_file()), None)
        if heard is not None and not isinstance(error, InputError):
            raise _spoken(*read_json(heard)) from error
        with contextlib.suppress(InputError):  # as of a full disk, which is no reason to hide `error`
            write_json(_words_of(folder, rank()), _words(error))
        raise


def forget_words(folder: Path) -> None:
    """Nothing in `folder` is said any more."""
    for path in folder.glob(_words_of(folder, "*").name):
        path.unlink()


def _words_of(folder: Path, of: int | str) -> Path:
    return folder / f".last-words-{of}.json"


def _words(error: Exception | None) -> tuple[str, str]:
    """Kind and text of an error."""
    return ("InputError", str(error)) if isinstance(error, InputError) else (type(error).__name__, str(error))


def _spoken(kind: str, text: str) -> Exception:
    """Another rank's error."""
    return InputError(text) if kind == "InputError" else Elsewhere(f"another rank: {kind}: {text}")


class Elsewhere(RuntimeError):
    """What another rank raised, where it was no InputError."""


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks (R B, ...), in their order, of `x` (B, ...) on each; B must be the same.

    The gradient of a row is the sum of what all ranks ask of it, and arrives at the rank that holds it. So where
    every rank takes the mean over its own rows, the mean of the ranks' gradients is that of one process with all rows.
    """
    return _Gather.apply(x) if several() else x


def total(x: Tensor) -> Tensor:
    """The sum over all ranks, with the gradient of `gathered`."""
    return gathered(x[None]).sum(0)


def own_rows(x: Tensor) -> Tensor:
    """Where the rows of `x` (B, ...) stand among the gathered ones (B,)."""
    return (rank() if several() else 0) * len(x) + torch.arange(len(x), device=x.device)


def share(x: Tensor, views: int, axis: int = 0) -> Tensor:
    """Of rows for the views of all ranks' tiles (V * R B), view by view, those of this rank's tiles (V * B)."""
    if not (several() and views):
        return x
    return x.unflatten(axis, (views, size(), -1)).select(axis + 1, rank()).flatten(axis, axis + 1)


def summed(x: Tensor) -> Tensor:
    """The sum over all ranks, without gradient."""
    return _reduced(x, dist.ReduceOp.SUM) if several() else x


def mean(x: Tensor) -> Tensor:
    """The mean over all ranks, without gradient."""
    return summed(x) / size() if several() else x


def mean_row(x: Tensor) -> Tensor:
    """The mean (...,) over the rows (B, ...) of all ranks, which may differ in B; 0 where there is none."""
    rows = summed(x.new_tensor(len(x), dtype=torch.float32))
    return summed(x.sum(0)) / rows.clamp(min=1)


def largest(x: Tensor) -> Tensor:
    """The greatest over all ranks, without gradient."""
    return _reduced(x, dist.ReduceOp.MAX) if several() else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a shard (FSDP2)."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shards(x: Tensor, like: Tensor) -> Tensor:
    """`x`, known to all ranks, on the device of `like`, and shared out as that is."""
    if not hasattr(like, "full_tensor"):
        return x.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class BatchNorm(nn.BatchNorm1d):
    """Of the rows (N, D) of all ranks, each with as many, on any device; PyTorch's own (SyncBatchNorm) needs GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and several()):
            return super().forward(x)
        rows, n = x.to(torch.promote_types(x.dtype, torch.float32)), len(x) * size()
        mean = total(rows.sum(0)) / n
        spread = total((rows - mean).square().sum(0)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(spread * n / (n - 1), self.momentum)
        return ((rows - mean) * (spread + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


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
