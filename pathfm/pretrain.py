"""Pretraining: tiles i = s B to (s + 1) B - 1 are step s, its randomness is keyed by (seed, s), and so a killed run
goes on to the same numbers from its weights and one integer."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
import warnings
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
from torch.utils.data import DataLoader

from pathfm import card, checkpoint, logbook, stores
from pathfm.augment import MultiCrop, scale_table
from pathfm.cohort import patient_of
from pathfm.config import SMOKE, PretrainConfig, make_config
from pathfm.dino import Dino
from pathfm.dinov2 import DinoV2
from pathfm.errors import InputError
from pathfm.export import export, load
from pathfm.schedules import schedule, set_rates
from pathfm.storage import cache_dir, read_json, write_json
from pathfm.story import Progress, Story, memory_gb
from pathfm.vit import set_attention
from pathfm.watches import Watch, collapsed

__all__ = ["SMOKE", "PretrainConfig", "Run", "pretrain"]

METHODS = {"dino": Dino, "dinov2": DinoV2}
CHECKPOINT = "checkpoint.safetensors"
FREE = ("workers", "checkpoint_every")  # may differ when a run goes on: they change no number
WEIGHTS, STEP_VIEWS, STEP_DEPTH = range(3)


@dataclass(frozen=True)
class Run:
    """What a run left in its folder."""

    folder: Path

    @cached_property
    def params(self) -> dict[str, Any]:
        """config, stream, init, device, precision, attention, scales, and a session for every start of the run."""
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

    Raises InputError where config and stream do not fit, another run is at work in the folder or left a checkpoint
    of another config, a checkpoint is damaged, the disk is full, or the loss is no number.
    """
    _check_stream(config, stream)
    _check_sides(stream, validation)
    tiles = first_tiles(stream)
    settings = json.loads(json.dumps(getattr(stream, "settings", {}), default=str))
    folder = Path(folder) if folder else _cached(config, [tiles, settings], stream[0].image)
    with _alone(folder), _settings(config):
        training = Training(config, tiles, folder, settings)
        if training.step < config.steps or not (folder / "teacher" / "config.json").exists():
            training.run(stream, Watch.of(validation, config.watch_tiles) if config.watch_every else None)
    return Run(folder)


class Training:
    """A run in the making: model, optimiser and the number of steps that are done."""

    def __init__(self, config: PretrainConfig, tiles: list, folder: Path, source: dict | None = None):
        self.config, self.tiles, self.folder, self.source = config, tiles, folder, source or {}
        self.device = device_of(config)
        self.fused, self.precision = kernels_of(config, self.device)
        saved = self._saved()
        torch.manual_seed(key(config.seed, WEIGHTS))
        # A resumed run has its weights; it must not depend on where the first ones came from.
        self.model = METHODS[config.method](
            config if saved is None or config.init == "random" else config.replace(init="random")
        )
        self.model.to(self.device).train()
        set_attention(self.model, self.fused)
        self.named = {name: p for name, p in self.model.student.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(self.model.groups(), lr=config.lr)
        self.step, self.story = 0, None
        if saved is not None:
            self._restore(*saved)

    def run(self, stream: Any, watch: Watch | None) -> None:
        """Does the steps that are left, then exports the teacher."""
        config, folder = self.config, self.folder
        self._describe(stream)
        log, speed, looks = (logbook.Logbook(folder / f"{name}.csv", self.step) for name in ("log", "speed", "watches"))
        self.story = Story(folder, self.step)
        if watch and not self.step:
            self._look(watch, looks)
        batches = iter(self._batches(stream))
        multicrop = MultiCrop(config, self.model.patch_px)
        steps = range(self.step, config.steps)
        bar = Progress(steps, f"{folder.name}, step {self.step} to {config.steps}")
        for step in bar:
            start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - start
            row = self._one(step, batch, multicrop)
            self.step = step + 1
            spent = time.perf_counter() - start
            pace = {
                "tiles_per_s": round(config.batch_size / spent, 3),
                "data_wait": round(waited / spent, 4),
                "seconds": round(spent, 4),
                "memory_gb": round(memory_gb(self.device), 3),
            }
            for name, book, numbers in (("train", log, row), ("speed", speed, pace)):
                book.add({"step": self.step, **numbers})
                self.story.add(name, self.step, numbers)
            bar.tell(f"loss {row['loss']:.3f}, {config.batch_size / spent:.0f} tiles/s, {waited / spent:.0%} waiting")
            if watch and (self.step % config.watch_every == 0 or self.step == config.steps):
                self._look(watch, looks)
            if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                for book in (log, speed, looks):
                    book.settle()
                self._save()
        for book in (log, speed, looks, self.story):
            book.close()
        about = card.of_run(read_json(folder / "params.json"), logbook.read(folder / "watches.csv"))
        export(self.model.teacher.backbone, folder / "teacher", about)

    def _look(self, watch: Watch, looks: logbook.Logbook) -> None:
        """A look at the validation tiles; warns where the teacher is collapsing."""
        seen = watch.look(self.model, self.config)
        looks.add({"step": self.step, **seen})
        self.story.add("watch", self.step, seen)
        wrong = collapsed(logbook.read(looks.path).iloc[0], seen, self.config)
        if wrong:
            warnings.warn(f"step {self.step}: {wrong}", stacklevel=2)

    def _one(self, step: int, batch: Any, multicrop: MultiCrop) -> dict[str, float]:
        """One optimiser step, and its row of the log."""
        config, model, now = self.config, self.model, schedule(self.config, step)
        torch.manual_seed(key(config.seed, STEP_DEPTH, step))
        images = batch.image.to(self.device, non_blocking=True)
        views = multicrop(images, batch.mpp, torch.Generator().manual_seed(key(config.seed, STEP_VIEWS, step)))
        if self.story and not step:
            self.story.show(views)
        set_rates(self.optimiser.param_groups, now)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            outcome = model(views, now)
        self.optimiser.zero_grad(set_to_none=True)
        outcome.loss.backward()
        model.hold_prototypes(now)
        norm = model.clip()
        numbers = torch.stack([outcome.loss.detach(), norm, *(value.float() for value in outcome.log.values())])
        loss, norm, *parts = numbers.tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise InputError(
                f"step {step + 1}: loss {loss} and gradient norm {norm} are not both numbers. The last checkpoint in "
                f"{self.folder} is sound. Take a lower base_lr (now {config.base_lr}), a longer warmup, clip=1.0 or "
                "precision='float32', in a new folder"
            )
        self.optimiser.step()
        model.follow(outcome, now.momentum)
        seen = views.effective_mpp
        return {
            "loss": loss,
            "lr": now.lr,
            "weight_decay": now.weight_decay,
            "momentum": now.momentum,
            "teacher_temperature": now.teacher_temperature,
            **dict(zip(outcome.log, parts, strict=True)),
            "grad_norm": norm,
            "mpp_tile": float(batch.mpp.float().mean()),
            "mpp_global": float(seen[:2].mean()),
            "mpp_local": float(seen[2:].mean()),
        }

    def _batches(self, stream: Any) -> DataLoader:
        """Batches of the steps that are left, in order, whatever the number of workers."""
        size = self.config.batch_size
        return DataLoader(
            stream,
            batch_size=size,
            sampler=range(self.step * size, self.config.steps * size),
            num_workers=self.config.workers,
            multiprocessing_context="forkserver" if self.config.workers and _far(stream) else None,
            pin_memory=self.device.type == "cuda",
        )

    def _save(self) -> None:
        tensors = {**self.model.state_dict(), **checkpoint.optimiser_tensors(self.optimiser, self.named)}
        checkpoint.save(
            self.folder / CHECKPOINT,
            tensors,
            {
                "step": self.step,
                "config": dataclasses.asdict(self.config),
                "tiles": self.tiles,
                "source": self.source,
                "init": self.model.provenance,
                "precision": self.precision,
                "attention": self._attention(),
                "device": self.device.type,
            },
        )

    def _saved(self) -> tuple[dict, dict] | None:
        """The folder's checkpoint. Raises InputError where it is of another config or stream."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        tensors, state = checkpoint.load(path)
        now = json.loads(json.dumps(dataclasses.asdict(self.config)))
        before = {field.name: field.default for field in dataclasses.fields(self.config)}  # what older runs had
        for name in [*now, *sorted(set(state["config"]) - set(now))]:
            was, wanted = state["config"].get(name, before.get(name)), now.get(name, "absent")
            was = list(was) if isinstance(was, tuple) else was
            if name not in FREE and was != wanted:
                raise InputError(f"{path} was made with {name}={was!r}, not {wanted!r}; use that, or a new folder")
        for was, wanted in zip(state["tiles"], self.tiles, strict=False):
            if was != wanted:
                raise InputError(
                    f"{path} was made on another tile stream: its first tiles have {was}, this has "
                    f"{wanted}; use that stream, or a new folder"
                )
        before = state.get("source") or {}
        for name in sorted(set(before) & set(self.source)):
            if before[name] != self.source[name]:
                raise InputError(
                    f"{path} was made on another tile stream: its {name} was {before[name]!r}, now it is "
                    f"{self.source[name]!r}; use that stream, or a new folder"
                )
        return tensors, state

    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimiser/")})
        checkpoint.restore_optimiser(self.optimiser, self.named, tensors)
        self.model.provenance, self.step = state["init"], state["step"]
        for name, now in (("device", self.device.type), ("precision", self.precision)):
            if self.step < self.config.steps and state[name] != now:
                raise InputError(
                    f"{self.folder / CHECKPOINT} was made with {name}={state[name]!r}, here it is {now!r}; go on where "
                    f"{name}={state[name]!r} can be had, or use a new folder"
                )

    def _attention(self) -> str:
        return "fused" if self.fused else "plain"

    def _describe(self, stream: Any) -> None:
        """params.json: what was asked for, what was chosen, and where and when each session of the run began."""
        path = self.folder / "params.json"
        before = read_json(path).get("sessions", []) if self.step and path.exists() else []
        write_json(
            path,
            {
                "config": dataclasses.asdict(self.config),
                "init": self.model.provenance,
                "parameters": sum(p.numel() for p in self.model.teacher.backbone.parameters()),
                "device": self.device.type,
                "precision": self.precision,
                "attention": self._attention(),
                "stream": {**_told(stream), "first_tiles": self.tiles},
                "scales": scale_table(self.config).round(4).to_dict("records"),
                "sessions": [*before, {"from_step": self.step, **_provenance()}],
            },
        )


def key(seed: int, *names: int) -> int:
    """A 63-bit seed for torch, of its own for every (seed, *names)."""
    return int(np.random.SeedSequence([seed, *names]).generate_state(1, np.uint64)[0] >> 1)


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
    """Raises InputError where another process trains in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            yield
    except filelock.Timeout:
        raise InputError(f"another run is at work in {folder}; wait for it, or use a new folder") from None


def first_tiles(stream: Any, n: int = 8) -> list[list]:
    """Names of the first tiles, by which a stream is known again: slide_id, x, y, mpp."""
    tiles = [stream.name(i) if hasattr(stream, "name") else stream[i] for i in range(min(n, len(stream)))]
    return [[str(tile.slide_id), int(tile.x), int(tile.y), f"{tile.mpp:.6g}"] for tile in tiles]


def _check_stream(config: PretrainConfig, stream: Any) -> None:
    """Raises InputError where the stream is too short or its tiles are not those that the config speaks of."""
    if len(stream) < config.steps * config.batch_size:
        least = "a batch" if len(stream) < config.batch_size else f"{config.steps} steps"
        raise InputError(
            f"the stream has {len(stream)} tiles, fewer than {least} of batch_size={config.batch_size} "
            "needs; add slides, or take a smaller batch or fewer steps"
        )
    side = np.shape(stream[0].image)[0]
    if side != config.tile_px:
        raise InputError(f"the stream's tiles are {side} px, but tile_px={config.tile_px}; make them agree")
    foreign = sorted(set(getattr(stream, "weights", ())) - set(config.mpp))
    if foreign:
        raise InputError(f"the stream has tiles at {foreign[0]:g} mpp, but mpp={config.mpp}; make them agree")
    law = getattr(stream, "law", None)
    if hasattr(law, "cdf") and not (min(config.mpp) <= law.low and law.high <= max(config.mpp)):
        raise InputError(f"the stream's mpp is {law}, beyond mpp={config.mpp}; give both ends of it in mpp")
    least = getattr(stream, "min_tissue", None)
    if least is not None and least != config.min_tissue:
        raise InputError(f"the stream's min_tissue is {least}, but min_tissue={config.min_tissue}; make them agree")


def _check_sides(stream: Any, validation: Any) -> None:
    """Raises InputError that names a patient whose slides train the model and whose tiles are to watch it."""
    watched = validation.table if hasattr(validation, "table") else getattr(validation, "slides", None)
    if watched is None or not hasattr(stream, "slides") or not {"slide_id", "patient_id"} & set(watched):
        return
    if hasattr(validation, "table") and "role" in watched:
        watched = watched[watched["role"] == "validate"]
    names = patient_of(watched) if "slide_id" in watched else watched["patient_id"].astype(str)
    both = sorted(set(patient_of(stream.slides)) & set(names))
    if both:
        raise InputError(f"patient '{both[0]}' is both in the pretraining stream and watched; split by patient first")


def _told(stream: Any) -> dict[str, Any]:
    """What a record says of a stream."""
    told = {"stream": type(stream).__name__}
    if hasattr(stream, "slides"):
        slides = stream.slides
        told |= {"settings": repr(stream), "slides": len(slides), "patients": patient_of(slides).nunique()}
        told |= {"centres": sorted(map(str, slides["centre"].unique()))} if "centre" in slides else {}
        told |= {"tissue": card.tissue_of(slides)}
    if hasattr(stream, "mixture"):
        told |= {"mixture": stream.mixture.round(4).to_dict("records")}
    if hasattr(stream, "settings"):
        told |= {"options": stream.settings}
    return told


def _cached(config: PretrainConfig, tiles: list, pixels: np.ndarray) -> Path:
    """The folder of a run by all that decides its numbers: settings of the run and of its tiles, names and pixels of
    the first of them, code."""
    from pathfm.runs import code_hash

    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    mark = hashlib.sha256(json.dumps([settings, tiles, code_hash()]).encode())
    mark.update(pixels.tobytes())
    return cache_dir() / "pretrain" / mark.hexdigest()[:12]


def _provenance() -> dict[str, Any]:
    from pathfm.runs import provenance

    return provenance()


def _far(stream: Any) -> bool:
    """Whether a stream's slides lie in a store: then a forked worker could not read them (`stores.same_process`)."""
    slides = getattr(stream, "slides", None)
    return slides is not None and any(stores.is_address(path) for path in slides.get("path", ()))
