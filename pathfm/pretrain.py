"""Pretraining: tiles i = s B to (s + 1) B - 1 are step s, its randomness is keyed by (seed, s), and so a killed run
goes on to the same numbers from its weights and one integer."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer

from pathfm import logbook, ranks
from pathfm.checkpoint import FREE
from pathfm.config import SMOKE, PretrainConfig, make_config
from pathfm.devices import device_of, kept_memory
from pathfm.errors import InputError
from pathfm.export import load
from pathfm.feed import check_sides, check_stream, first_tiles
from pathfm.storage import cache_dir, read_json
from pathfm.training import METHODS, Training

__all__ = ["METHODS", "SMOKE", "PretrainConfig", "Run", "pretrain"]


PATIENCE = 8  # seconds: workers of a run that was killed hold its lock until they see that, within 5


@dataclass(frozen=True)
class Run:
    """What a run left in its folder."""

    folder: Path

    @cached_property
    def params(self) -> dict[str, Any]:
        """config, stream, init, device, precision, attention, scales, watched (a row a magnification), and a session
        for every start of the run."""
        return read_json(self.folder / "params.json")

    @property
    def config(self) -> PretrainConfig:
        """What the run was told."""
        return make_config(**self.params["config"])

    @cached_property
    def log(self) -> pd.DataFrame:
        """A row a step: loss, rates, entropies, mpp of the views (log.csv), tiles_per_s and data wait (speed.csv)."""
        return logbook.read(self.folder / "log.csv").merge(logbook.read(self.folder / "speed.csv"), "left", "step")

    @cached_property
    def watches(self) -> pd.DataFrame:
        """A row a look at the validation tiles, the first at step 0, before any training."""
        return logbook.read(self.folder / "watches.csv")

    @property
    def teacher(self) -> Path:
        """The exported backbone; `timm.create_model("local-dir:<teacher>", pretrained=True)` loads it."""
        return self.folder / "teacher"

    @cached_property
    def backbone(self) -> VisionTransformer:
        """The teacher's backbone, in eval mode, on the CPU."""
        return load(self.teacher)[0]


def pretrain(config: PretrainConfig, stream: Any, validation: Any = None, folder: str | Path | None = None) -> Run:
    """Trains DINO or DINOv2 on a tile stream; goes on where `folder` holds an unfinished run, returns a finished one.

    config      a PretrainConfig for DINO, a DinoV2Config for DINOv2
    stream      a TileStream, OfflineTiles, or anything whose [i] is a Tile of (tile_px, tile_px, 3) uint8
    validation  tiles to watch: a TileSet with roles (RankMe, ODCorr, entropy, kNN) or a TileStream (without kNN)
    folder      where the run lives; None: the cache, by config and stream

    Started by torchrun or Slurm it trains on all ranks together (`pathfm.ranks`).

    Raises InputError where config and stream do not fit, another run is at work in the folder or left a checkpoint
    of another config, all checkpoints are damaged, the disk or the memory is full, or the loss is no number; and
    Stopped where SIGTERM or SIGUSR1 came: then a checkpoint was written, and the same call goes on from there.
    """
    with ranks.joined(config.device):
        with ranks.together():
            check_stream(config, stream)
            check_sides(stream, validation)
            tiles = first_tiles(stream)
            settings = json.loads(json.dumps(getattr(stream, "settings", {}), default=str))
            folder = Path(folder) if folder else _cached(config, [tiles, settings], stream[0].image)
        with _alone(folder), _settings(config), kept_memory(device_of(config)):
            training = Training(config, tiles, folder, settings)
            if training.step < config.steps or not (folder / "teacher" / "config.json").exists():
                training.run(stream, validation)
    return Run(folder)


@contextlib.contextmanager
def _settings(config: PretrainConfig) -> Iterator[None]:
    """Threads as asked for; torch's own generators and threads are the caller's again afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises InputError where another run trains in the folder; rank 0 holds the lock for all."""
    with contextlib.ExitStack() as held:
        with ranks.together():
            if not ranks.rank():
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(_locked(folder))
        yield


def _locked(folder: Path) -> filelock.AcquireReturnProxy:
    try:
        return filelock.FileLock(folder / ".lock").acquire(timeout=PATIENCE)
    except filelock.Timeout:
        raise InputError(f"another run is at work in {folder}; wait for it, or use a new folder") from None


def _cached(config: PretrainConfig, tiles: list, pixels: np.ndarray) -> Path:
    """The folder of a run by all that decides its numbers: settings of the run and of its tiles, names and pixels of
    the first of them, code."""
    from pathfm.runs import code_hash

    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    mark = hashlib.sha256(json.dumps([settings, tiles, code_hash()]).encode())
    mark.update(pixels.tobytes())
    return cache_dir() / "pretrain" / mark.hexdigest()[:12]
