"""A run in the making. Its randomness at step s is keyed by (seed, s), and so weights and one integer are all it takes
to go on to the same numbers; on several ranks each does its share of every step (`pathfm.ranks`)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pathfm import card, checkpoint, logbook, ranks, remedies
from pathfm.augment import MultiCrop, Views, scale_table
from pathfm.config import PretrainConfig
from pathfm.devices import device_of, kernels_of
from pathfm.dino import Dino, Outcome
from pathfm.dinov2 import DinoV2
from pathfm.errors import InputError, Stopped
from pathfm.export import export
from pathfm.feed import batches, feeding, told_of
from pathfm.runs import provenance
from pathfm.schedules import Schedule, schedule, set_rates
from pathfm.signals import Ear
from pathfm.storage import read_json, write_json
from pathfm.story import Journal, Progress, memory_gb, say
from pathfm.vit import set_attention
from pathfm.watches import Watch, collapsed

METHODS = {"dino": Dino, "dinov2": DinoV2}
WEIGHTS, STEP_VIEWS, STEP_DEPTH = range(3)


class Training:
    """Model, optimiser and the number of steps that are done."""

    def __init__(self, config: PretrainConfig, tiles: list, folder: Path, source: dict | None = None):
        self.config, self.tiles, self.folder, self.source = config, tiles, folder, source or {}
        with ranks.together():
            saved = self._begun()
        self.net = self._prepared()
        self.named = {name: p for name, p in self.model.student.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(self.model.groups(), lr=config.lr)
        if saved is not None:
            checkpoint.restore_optimiser(self.optimiser, self.named, saved[1])

    def _begun(self) -> tuple[Path, dict, dict] | None:
        """The model on its device, as the folder's checkpoint has it where there is one, which is returned."""
        config = self.config
        _check_ranks(config)
        self.device = device_of(config)
        self.fused, self.precision = kernels_of(config, self.device)
        self.sharded = config.shard and ranks.several()  # alone, a rank holds all there is
        saved = self._saved()
        torch.manual_seed(key(config.seed, WEIGHTS))
        # A resumed run has its weights; it must not depend on where the first ones came from.
        self.model = METHODS[config.method](
            config if saved is None or config.init == "random" else config.replace(init="random")
        )
        self.step, self.journal = 0, None
        if saved is not None:
            self._restore(*saved)
        self.model.to(self.device).train()
        return saved

    def _prepared(self) -> torch.nn.Module:
        """What is called in place of the model: its blocks as the settings ask, its gradients those of all ranks."""
        model, config = self.model, self.config
        set_attention(model, self.fused)
        model.student.backbone.set_grad_checkpointing(config.checkpoint_activations)
        if self.sharded:
            shard(model, self.device)
        if config.compile:
            for network in (model.student, model.teacher):
                for block in network.backbone.blocks:
                    block.compile()
        if self.sharded or not ranks.several():
            return model
        return DistributedDataParallel(model)

    def run(self, stream: Any, validation: Any = None) -> None:
        """Does the steps that are left, then exports the teacher. Raises Stopped where a signal ended it before."""
        config, first = self.config, ranks.rank() == 0
        self.watching = config.watch_every > 0 and validation is not None
        with Ear() as ear, contextlib.ExitStack() as opened:
            with ranks.together():
                if first:
                    self._open(stream, validation, opened)
            if not self.step:
                self._look()
            loader = batches(stream, config, self.step, pin=self.device.type == "cuda")
            multicrop, steps = MultiCrop(config, self.model.patch_px), range(self.step, config.steps)
            said = f"{self.folder.name}, step {self.step} to {config.steps}"
            self.bar = Progress(steps, said) if first else steps
            with ranks.last_words(self.folder), feeding(loader) as feed:
                for step in self.bar:
                    self._advance(step, feed, multicrop, ear)
            with ranks.together():
                opened.close()
            self._export()

    def _open(self, stream: Any, validation: Any, opened: contextlib.ExitStack) -> None:
        """What rank 0 alone holds: the run's record, its journal until `opened` is closed, the tiles to watch."""
        ranks.forget_words(self.folder)
        self.watch = Watch.of(validation, self.config.watch_tiles) if self.watching else None
        self._describe(stream)
        self.journal = opened.enter_context(Journal(self.folder, self.step))

    def _advance(self, step: int, feed: Iterator, multicrop: MultiCrop, ear: Ear) -> None:
        """One step with all that is written of it."""
        config, start = self.config, time.perf_counter()
        with ranks.together():
            batch = next(feed)
            waited = time.perf_counter() - start
        row, stopping = self._fitting(step, batch, multicrop, bool(ear.heard))
        self.step, last = step + 1, step + 1 == config.steps
        with ranks.together():
            self._log(row, time.perf_counter() - start, waited)
        if self.step % max(1, config.watch_every) == 0 or last:
            self._look()
        if self.step % config.checkpoint_every == 0 or last or stopping:
            self._save()
        if stopping and not last:
            raise Stopped(
                f"{ear.heard or 'a signal to another rank'} came: the run in {self.folder} is saved after step "
                f"{self.step} of {config.steps}; the same call goes on from there"
            )

    def _fitting(self, step: int, batch: Any, multicrop: MultiCrop, stop: bool) -> tuple[dict[str, float], bool]:
        """`_one`. Raises InputError that says what would fit, where there is no memory for it."""
        try:
            return self._one(step, batch, multicrop, stop)
        except (RuntimeError, MemoryError) as error:
            if not remedies.is_full(error):
                raise
            full = type(error)  # and no more of it: what the failed step holds is free again below
        raise self._too_large(batch, multicrop, measure=full is torch.OutOfMemoryError)

    def _one(self, step: int, batch: Any, multicrop: MultiCrop, stop: bool = False) -> tuple[dict[str, float], bool]:
        """One optimiser step: its row of the log, and whether any rank wants to `stop`."""
        model, now = self.model, schedule(self.config, step)
        images = batch.image.to(self.device, non_blocking=True)
        views = multicrop(images, batch.mpp, self._drawn(step))
        if not step:
            with ranks.together():
                if self.journal:
                    self.journal.story.show(views)
        set_rates(self.optimiser.param_groups, now)
        self.optimiser.zero_grad(set_to_none=True)
        parts = views.parts(self.config.accumulate)
        outcomes = [self._pass(step, k, part, now) for k, part in enumerate(parts)]
        model.hold_prototypes(now)
        norm = float(model.clip())
        names = ("loss", *outcomes[0].log)
        told = [torch.stack([one.loss, *one.log.values()]).float() for one in outcomes]
        seen = views.effective_mpp
        scales = torch.stack([batch.mpp.float().mean(), seen[:2].mean(), seen[2:].mean(), torch.tensor(float(stop))])
        *parts, tile, global_, local, stop = ranks.mean(
            torch.cat([torch.stack(told).mean(0), scales.to(self.device)])
        ).tolist()
        loss = parts[0]
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise remedies.no_number(step + 1, loss, norm, self.folder, self.config)
        self.optimiser.step()
        model.follow(outcomes, now.momentum)
        row = {
            "loss": loss,
            "lr": now.lr,
            "weight_decay": now.weight_decay,
            "momentum": now.momentum,
            "teacher_temperature": now.teacher_temperature,
            **dict(zip(names[1:], parts[1:], strict=True)),
            "grad_norm": norm,
            "mpp_tile": tile,
            "mpp_global": global_,
            "mpp_local": local,
        }
        return row, stop > 0

    def _drawn(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(key(self.config.seed, STEP_VIEWS, step))

    def _pass(self, step: int, k: int, views: Views, now: Schedule) -> Outcome:
        """Part `k` of a batch, forwards and backwards; gradients add up, and reach other ranks with the last part."""
        config = self.config
        torch.manual_seed(key(config.seed, STEP_DEPTH, step))  # every part draws for the whole batch
        self._aim(k, views.global_.shape[1])
        half = torch.autocast(
            self.device.type, torch.bfloat16, self.precision == "bfloat16", cache_enabled=not self.sharded
        )
        waits = isinstance(self.net, DistributedDataParallel) and k < config.accumulate - 1
        with self.net.no_sync() if waits else contextlib.nullcontext():
            with half:
                outcome = self.net(views, now)
            (outcome.loss / config.accumulate).backward()
        return outcome._replace(loss=outcome.loss.detach())

    def _aim(self, k: int, tiles: int) -> None:
        """Tells stochastic depth which tiles of the whole batch part `k`, of `tiles` tiles, has."""
        size = self.config.batch_size
        start = ranks.rank() * (size // ranks.size()) + k * tiles
        own = torch.arange(start, start + tiles, device=self.device)
        for drop in self.model.drops:
            drop.tiles, drop.own = (size, own) if tiles < size else (0, None)

    def _log(self, row: dict[str, float], spent: float, waited: float) -> None:
        if not self.journal:
            return
        pace = {
            "tiles_per_s": round(self.config.batch_size / spent, 3),
            "data_wait": round(waited / spent, 4),
            "seconds": round(spent, 4),
            "memory_gb": round(memory_gb(self.device), 3),
        }
        self.journal.add("train", self.step, row)
        self.journal.add("speed", self.step, pace)
        speed = self.config.batch_size / spent
        self.bar.tell(f"loss {row['loss']:.3f}, {speed:.0f} tiles/s, {waited / spent:.0%} waiting")

    def _look(self) -> None:
        """A look at the validation tiles, by rank 0 while the others wait; heeds a teacher that collapses."""
        if not self.watching:
            return
        model = self._whole()
        with ranks.together():
            if self.journal:
                self._judge(model)

    def _judge(self, model: Dino) -> None:
        with ranks.apart():
            seen = self.watch.look(model, self.config)
        self.journal.add("watch", self.step, seen)
        wrong = collapsed(logbook.read(self.folder / "watches.csv").iloc[0], seen, self.config)
        if wrong and self.config.on_collapse == "stop":
            raise InputError(f"step {self.step}: {wrong}. on_collapse='warn' would go on")
        if wrong and self.config.on_collapse == "warn":
            warnings.warn(f"step {self.step}: {wrong}", stacklevel=2)

    def _whole(self) -> Dino | None:
        """The model, or one whose weights are whole where each rank holds a shard: then on rank 0 alone."""
        if not self.sharded:
            return self.model
        tensors = self._gathered(self.model.state_dict())
        if ranks.rank():
            return None
        with torch.random.fork_rng(devices=[]):
            model = METHODS[self.config.method](self.config.replace(init="random"))
        model.load_state_dict(tensors)
        return model.to(self.device)

    def _gathered(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors on rank 0, on the CPU; every rank must ask."""
        whole = ((name, ranks.whole(value)) for name, value in tensors.items())
        return {name: value.cpu() for name, value in whole if not ranks.rank()}

    def _export(self) -> None:
        model = self._whole()
        with ranks.together():
            if not ranks.rank():
                about = card.of_run(read_json(self.folder / "params.json"), logbook.read(self.folder / "watches.csv"))
                export(model.teacher.backbone, self.folder / "teacher", about)

    def _save(self) -> None:
        tensors = {**self.model.state_dict(), **checkpoint.optimiser_tensors(self.optimiser, self.named)}
        if self.sharded:
            tensors = self._gathered(tensors)
        with ranks.together():
            if self.journal:
                self._keep(tensors)

    def _keep(self, tensors: dict[str, torch.Tensor]) -> None:
        self.journal.settle()
        state = {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "tiles": self.tiles,
            "source": self.source,
            "init": self.model.provenance,
            "precision": self.precision,
            "attention": self._attention(),
            "device": self.device.type,
            **_shares(),
        }
        checkpoint.keep(self.folder, tensors, state, self.config.keep_checkpoints)
        self.journal.story.settle()

    def _saved(self) -> tuple[Path, dict, dict] | None:
        """The folder's checkpoint. Raises InputError where it is of another config or stream."""
        found = checkpoint.newest(self.folder)
        if found is not None:
            path, _, state = found
            checkpoint.check_same(path, state, self.config, self.tiles, self.source)
        return found

    def _restore(self, path: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimiser/")})
        self.model.provenance, self.step = state["init"], state["step"]
        if self.step == self.config.steps:
            return
        for name, now in (("device", self.device.type), ("precision", self.precision)):
            if state[name] != now:
                raise InputError(
                    f"{path} was made with {name}={state[name]!r}, here it is {now!r}; go on where "
                    f"{name}={state[name]!r} can be had, or use a new folder"
                )
        for name, now in _shares().items():
            if state.get(name, now) != now and not ranks.rank():
                warnings.warn(
                    f"{path} was made with {name}={state[name]}, here there are {now}: the run goes on, but sums are "
                    "rounded in another order, and so its numbers are not to the bit those of a run that never stopped",
                    stacklevel=2,
                )

    def _too_large(self, batch: Any, multicrop: MultiCrop, measure: bool) -> InputError:
        """What to say of a step that did not fit into memory: how many tiles would, measured on a few on a GPU."""
        self.optimiser.zero_grad(set_to_none=True)
        fits, at_once = None, self.config.batch_size // (ranks.size() * self.config.accumulate)
        if measure and not self.sharded and at_once > remedies.PROBES[1]:
            with ranks.apart():
                capacity = remedies.capacity_bytes(self.device)
                fits = remedies.tiles_that_fit(lambda tiles: self._peak(batch, multicrop, tiles), capacity)
            fits = fits and min(fits, at_once - 1)
        return remedies.full_memory(self.config, fits, ranks.size(), "a GPU" if measure else "this machine")

    def _peak(self, batch: Any, multicrop: MultiCrop, tiles: int) -> int:
        """Bytes that a pass of `tiles` tiles takes at most, with gradients and AdamW's two moments."""
        for drop in self.model.drops:
            drop.tiles = 0
        remedies.forget_peak(self.device)
        views = multicrop(batch.image[:tiles].to(self.device), batch.mpp[:tiles], self._drawn(self.step))
        with torch.autocast(self.device.type, torch.bfloat16, self.precision == "bfloat16"):
            outcome = self.model(views, schedule(self.config, self.step))
        parameters = list(self.named.values())
        torch.autograd.grad(outcome.loss, parameters)  # not .backward(), which other ranks would hear of
        return remedies.peak_bytes(self.device) + self._moments()

    def _moments(self) -> int:
        """Bytes of what AdamW will hold and, before its first step, does not."""
        parameters = self.named.values()
        return 0 if self.optimiser.state else 2 * sum(p.numel() * p.element_size() for p in parameters)

    def _attention(self) -> str:
        return "fused" if self.fused else "plain"

    def _describe(self, stream: Any) -> None:
        """params.json: what was asked for, what was chosen, and where and when each session of the run began."""
        path = self.folder / "params.json"
        before = read_json(path).get("sessions", []) if self.step and path.exists() else []
        features, asked = self.model.teacher.backbone.num_features, self.config.watch_tiles
        watched = self.watch.record(features, asked) if self.watch else []
        for row in watched:
            if row["few"]:
                say(row["few"])
        write_json(
            path,
            {
                "config": dataclasses.asdict(self.config),
                "init": self.model.provenance,
                "parameters": sum(p.numel() for p in self.model.teacher.backbone.parameters()),
                "device": self.device.type,
                "precision": self.precision,
                "attention": self._attention(),
                "stream": {**told_of(stream), "first_tiles": self.tiles},
                "watched": watched,
                "scales": scale_table(self.config).round(4).to_dict("records"),
                "sessions": [*before, {"from_step": self.step, **_shares(), **provenance()}],
            },
        )


def key(seed: int, *names: int) -> int:
    """A 63-bit seed for torch, of its own for every (seed, *names)."""
    return int(np.random.SeedSequence([seed, *names]).generate_state(1, np.uint64)[0] >> 1)


def shard(model: Dino, device: torch.device) -> None:
    """Shares out the weights of student and teacher over the ranks, block by block (FSDP2), in place."""
    # The heads' answers are views, of which it warns; nothing here changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (ranks.size(),))
    for network in (model.student, model.teacher):
        for module in (*network.backbone.blocks, network):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)  # the teacher has no backward to do it


def _check_ranks(config: PretrainConfig) -> None:
    """Raises InputError where the ranks cannot have equal parts of a batch."""
    parts = ranks.size() * config.accumulate
    if config.batch_size % parts:
        raise InputError(
            f"batch_size={config.batch_size} cannot be split over {ranks.size()} ranks in accumulate="
            f"{config.accumulate} equal parts; take a multiple of {parts}"
        )


def _shares() -> dict[str, int]:
    """What the order of sums hangs on."""
    return {"threads": torch.get_num_threads(), "ranks": ranks.size()}
