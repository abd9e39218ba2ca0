"""Where a run stands, in one safetensors file that appears whole or not at all."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from pathfm.errors import InputError
from pathfm.storage import atomic

FORMAT = "pathfm checkpoint 1"


def save(path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes `tensors` and `state` (JSON values) to `path`. A full disk leaves the file that was there whole."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    meta = {"format": FORMAT, "state": json.dumps(state), "checksum": str(checksum(tensors))}
    with atomic(path) as file:
        file.write(safetensors.torch.save(tensors, meta))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the state. Raises InputError where the file is damaged or not ours."""
    advice = "delete it to start over, or bring back a whole one"
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # safetensors raises its own error, OSError or ValueError
        raise InputError(f"checkpoint {path} is damaged or no checkpoint ({type(error).__name__}); {advice}") from None
    if meta.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of pathfm ({FORMAT}); {advice}")
    if meta["checksum"] != str(checksum(tensors)):
        raise InputError(f"checkpoint {path} is damaged (its checksum does not hold); {advice}")
    return tensors, json.loads(meta["state"])


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 of all bytes, in the order of the names."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


def optimiser_tensors(optimiser: torch.optim.Optimizer, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """AdamW's moments as "optimiser/<moment>/<parameter>"; a parameter that never moved has none."""
    return {
        f"optimiser/{moment}/{name}": value
        for name, p in named.items()
        for moment, value in optimiser.state.get(p, {}).items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, named: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimiser_tensors`. The count of steps stays on the CPU, as AdamW keeps it."""
    for key, value in tensors.items():
        if key.startswith("optimiser/"):
            _, moment, name = key.split("/")
            p = named[name]
            optimiser.state[p][moment] = value if moment == "step" else value.to(p.device)
