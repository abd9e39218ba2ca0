"""What a run computes on: its device, and the kernels and precision that are quick there."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from pathfm.config import PretrainConfig
from pathfm.errors import InputError


def device_of(config: PretrainConfig) -> torch.device:
    """The device asked for. Raises InputError where this machine has none such."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[config.device]:
        raise InputError(f"device='{config.device}' is not on this machine; take device='auto' or 'cpu'")
    return torch.device(config.device)


def kernels_of(config: PretrainConfig, device: torch.device) -> tuple[bool, str]:
    """Fused attention or not, and the precision of the networks. On a CPU bfloat16 only where it has instructions."""
    fused = config.attention == "fused" or (config.attention == "auto" and device.type != "cpu")
    if config.precision != "auto":
        return fused, config.precision
    fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False))
    return fused, "bfloat16" if fast else "float32"


_TRIM, _MMAP_FROM, _MMAPS = -1, -3, -4  # options of glibc's mallopt: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX


_depth = 0  # of blocks that keep memory, one in another: the outermost gives it back


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """On a CPU, memory that tensors let go of stays with the process, to be used again, until the end of this block.

    glibc gives every tensor of 32 MB and more fresh pages and returns them at once, and page faults take time: without
    it steps of DINO by two peers take 3 and 16 % less in float32, 6 and 36 % less in bfloat16
    (results/pretraining_speed.csv, "memory kept"). Elsewhere than on glibc nothing is changed.
    """
    global _depth
    mallopt = _libc("mallopt") if device.type == "cpu" else None
    if not mallopt:
        yield
        return
    mallopt(_MMAPS, 0)
    mallopt(_TRIM, 2**31 - 1)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:  # as glibc has set itself once a large block was returned
            mallopt(_MMAPS, 65536)
            mallopt(_MMAP_FROM, 2**25)
            mallopt(_TRIM, 2**26)
            _libc("malloc_trim")(0)


def _libc(name: str):
    """A function of glibc, None where it is not there."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # TypeError: Windows
        return None
