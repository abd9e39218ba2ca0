"""Where a run stands, in one safetensors file that appears whole or not at all; the last few are kept."""

from __future__ import annotations

import dataclasses
import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from pathfm import ranks
from pathfm.config import PretrainConfig
from pathfm.errors import InputError
from pathfm.storage import atomic

FORMAT = "pathfm checkpoint 1"
NAME = "checkpoint-{:09d}.safetensors"  # by the number of steps done; runs of older versions have the one below
OLD_NAME = "checkpoint.safetensors"
# May differ when a run goes on: they change no number, or none but by rounding.
FREE = "workers checkpoint_every keep_checkpoints on_collapse checkpoint_activations shard".split()  # noqa: SIM905


def found(folder: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest first."""
    folder = Path(folder)
    return [*sorted(folder.glob("checkpoint-*.safetensors"), reverse=True), *folder.glob(OLD_NAME)]


def step_of(path: Path) -> int:
    """The number of steps done that a checkpoint's name tells."""
    return int(path.stem.removeprefix("checkpoint-"))


def keep(folder: str | Path, tensors: dict[str, Tensor], state: dict[str, Any], last: int) -> None:
    """Writes the checkpoint of step state["step"], and only then removes all but the `last` newest."""
    save(Path(folder) / NAME.format(state["step"]), tensors, state)
    for path in found(folder)[last:]:
        path.unlink()


def newest(folder: str | Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
    """The newest sound checkpoint in a folder: its path, tensors and state; None where there is none at all.

    A damaged one is passed over with a warning. Raises InputError where all are damaged.
    """
    damage = []
    for path in found(folder):
        try:
            tensors, state = load(path)
        except InputError as error:
            damage.append(error)
            continue
        if damage and not ranks.rank():
            warnings.warn(f"{damage[0]}. Going on from {path.name}, step {state['step']}", stacklevel=2)
        return path, tensors, state
    if damage:
        raise damage[0]
    return None


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


def check_same(path: Path, state: dict[str, Any], config: PretrainConfig, tiles: list, source: dict) -> None:
    """Raises InputError that names the first difference, where a run is not the one that the checkpoint is of.

    tiles, source  names of the stream's first tiles and its settings
    """
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    defaults = {field.name: field.default for field in dataclasses.fields(config)}  # what older runs had
    for name in [*now, *sorted(set(state["config"]) - set(now))]:
        was, wanted = state["config"].get(name, defaults.get(name)), now.get(name, "absent")
        was = list(was) if isinstance(was, tuple) else was
        if name not in FREE and was != wanted:
            raise InputError(f"{path} was made with {name}={was!r}, not {wanted!r}; use that, or a new folder")
    before = state.get("source") or {}
    for name in sorted(set(before) & set(source)):
        if before[name] != source[name]:
            raise InputError(
                f"{path} was made on another tile stream: its {name} was {before[name]!r}, now it is "
                f"{source[name]!r}; use that stream, or a new folder"
            )
    for was, wanted in zip(state["tiles"], tiles, strict=False):
        if was != wanted:
            raise InputError(
                f"{path} was made on another tile stream: its first tiles have {was}, this has "
                f"{wanted}; use that stream, or a new folder"
            )


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
    """The inverse of `optimiser_tensors`, shared out as the parameters are. The count of steps stays on the CPU, as
    AdamW keeps it."""
    for key, value in tensors.items():
        if key.startswith("optimiser/"):
            _, moment, name = key.split("/")
            p = named[name]
            optimiser.state[p][moment] = value if moment == "step" else ranks.shards(value, p)
