"""What to do when a step fails: a loss that is no number, memory that is full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pathfm.config import PretrainConfig
from pathfm.errors import InputError

PROBES = (2, 4)  # tiles whose peaks tell what a tile takes
# In the messages of PyTorch's allocators that raise a plain RuntimeError: a CPU's, and Apple's.
FULL = ("DefaultCPUAllocator", "MPS backend out of memory")
SPARE = 0.9  # of the memory that is planned with: allocators leave gaps; ours


def no_number(step: int, loss: float, norm: float, folder: Path, config: PretrainConfig) -> InputError:
    """A loss or gradient norm that is NaN or infinite at `step` (from 1)."""
    return InputError(
        f"step {step}: loss {loss} and gradient norm {norm} are not both numbers. The last checkpoint in "
        f"{folder} is sound. Take a lower base_lr (now {config.base_lr}), a longer warmup, clip=1.0 or "
        "precision='float32', in a new folder"
    )


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or, in PyTorch's words or Python's, elsewhere."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in FULL)


def full_memory(config: PretrainConfig, fits: int | None, ranks_: int, where: str = "a GPU") -> InputError:
    """Out of memory `where`; `fits` tiles a rank would go through at once, if that could be measured."""
    at_once = config.batch_size // (ranks_ * config.accumulate)
    said = f"out of memory with {at_once} tiles at once on {where} (batch_size={config.batch_size}"
    said += f", accumulate={config.accumulate}, {ranks_} ranks). "
    if fits is None and at_once > 1:
        said += f"Take accumulate={accumulate_for(config, at_once // 2, ranks_)} or a smaller batch_size"
    elif fits is None:
        said += "Take smaller views or a smaller model"
    elif fits < 1:
        said += "Not one tile would fit; take smaller views, a smaller model, or shard=True on several GPUs"
    else:
        parts = accumulate_for(config, fits, ranks_)
        said += f"{fits} would fit: take batch_size={fits * ranks_ * config.accumulate}, or accumulate={parts}"
    return InputError(f"{said}. checkpoint_activations=True or precision='bfloat16' need less memory too")


def accumulate_for(config: PretrainConfig, fits: int, ranks_: int) -> int:
    """The fewest equal parts of a rank's share of a batch, of at most `fits` tiles each."""
    own = config.batch_size // ranks_
    return next(parts for parts in range(1, own + 1) if own % parts == 0 and own // parts <= fits)


def tiles_that_fit(peak: Callable[[int], int], capacity: int) -> int | None:
    """How many tiles go through at once in `capacity` bytes, by the `peak` bytes of a few; None where they do not.

    Weights, gradients and moments take a fixed part, activations one for each tile.
    """
    try:
        few, more = (peak(tiles) for tiles in PROBES)
    except torch.OutOfMemoryError:
        return None
    each = max(1, (more - few) / (PROBES[1] - PROBES[0]))
    return int((SPARE * capacity - (few - PROBES[0] * each)) / each)


def capacity_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process has or could have."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def forget_peak(device: torch.device) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that was in use since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device)
