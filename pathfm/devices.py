"""What a run computes on: its device, and the kernels and precision that are quick there."""

from __future__ import annotations

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
