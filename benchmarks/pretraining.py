"""How fast a step of pretraining is: beside peers, beside the machine's own matrix products, as model and crops grow.

    python benchmarks/pretraining.py [--parts cpu growth gpu fed] [--models vit_tiny_patch16_224 vit_small_patch16_224]
                                     [--batch 16] [--repeats 3] [--out results/pretraining_speed.csv]

A peer is optional, and the table names it where it is missing:  pip install lightly --no-deps

cpu     A DINO step on given views (2 x 224 and 8 x 96 px, 65,536 prototypes), ours, lightly's modules and a plain loop
        after the authors' (dino_peers.py), in turn, `repeats` times each in a process of its own, one thread, float32
        and bfloat16; medians of CPU time of steps after two that are not counted. `pretrain` keeps freed memory
        (devices.kept_memory) and so does ours here; the peers are measured as they come and, "memory kept", as ours.
        "of matrix products": the floating-point operations of a step (counted by torch, only in products),
        over its time, as a share of what one large product reaches here in that precision. What the rest is: the
        table of operators, by torch's profiler. Bars: ours not slower than the better peer; bfloat16 1.5 x float32.
growth  Bytes and operations of one step by model, crops and ranks, counted without doing them (meta tensors), and the
        time at the rate of products measured here, beside what steps took where they are small enough to do. A figure.
gpu     The same step for ViT-S/16 and B/16 (DINO) and L/14 (DINOv2) in bfloat16 at the largest batch that fits, a power
        of 2 up to 2,048, blocks compiled and not; for DINO lightly and the authors' loop too. images/s, peak memory,
        model-FLOP utilisation (of PEAK), and how many times as fast as the better peer ours is. Bars: 0.45 of PEAK for
        L/14, 0.35 for B/16, 1.3 times the better peer.
fed     A run fed by online patching from an SVS file: the share of time that it waits for data, and how fast workers
        alone read, which says how many cores would do.

Without a GPU, gpu and fed run at toy size on the CPU, to show that they work; nothing of that is written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import dino_peers  # noqa: E402

from pathfm import figures  # noqa: E402
from pathfm.augment import Views  # noqa: E402
from pathfm.config import PretrainConfig, make_config  # noqa: E402
from pathfm.devices import kept_memory  # noqa: E402
from pathfm.dino import Dino  # noqa: E402
from pathfm.dinov2 import DinoV2  # noqa: E402
from pathfm.masking import block_masks  # noqa: E402
from pathfm.runs import stamp  # noqa: E402
from pathfm.storage import atomic_path  # noqa: E402
from pathfm.vit import set_attention  # noqa: E402

METHODS = {"dino": Dino, "dinov2": DinoV2}
OURS, KEPT = "pathfm", ", memory kept"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16 operations a second, by the maker
LINK = 450e9  # bytes a second between GPUs of one machine, one way (NVLink 4); assumed in "growth"
PEERS = {"authors' loop": dino_peers.plain, "lightly": dino_peers.lightly}  # on a GPU
ON_GPU = (OURS, f"{OURS}, compiled", *PEERS)
BATCHES = (4, 8, 32, 64, 128, 256, 512, 1024, 2048)  # the first two at toy size
RECIPES = (
    ("dino", "vit_small_patch16_224"),
    ("dino", "vit_base_patch16_224"),
    ("dinov2", "vit_large_patch14_reg4_dinov2"),
)
LADDER = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
TOY = {
    "depth": 2, "width": 32, "heads": 2, "prototypes": 64, "head_hidden": 32, "head_bottleneck": 16, "local_views": 2,
}  # fmt: skip


def config_of(method: str, model: str, batch: int, **fields: Any) -> PretrainConfig:
    """The method's published values; DINOv2 as vitl14.yaml where it differs from the defaults."""
    sharp = {"separate_head": True, "centring": "sinkhorn", "prototypes": 131072}
    published = sharp if method == "dinov2" else {}
    fields = {"init": "random", "batch_size": batch, "steps": 100, **published, **fields}
    if method == "dinov2":
        fields["patch_prototypes"] = fields["prototypes"]
    return make_config(method=method, model=model, **fields)


def views_of(config: PretrainConfig, patch: int, device: str = "cpu") -> Views:
    """Views of noise, of the sizes and masks that the config asks for."""
    shape = config.batch_size, 3
    whole = torch.randn(2, *shape, config.global_px, config.global_px, device=device)
    parts = torch.randn(config.local_views, *shape, config.local_px, config.local_px, device=device)
    masks = torch.zeros(2, config.batch_size, 0, dtype=torch.bool)
    if config.method == "dinov2":
        images, side = 2 * config.batch_size, config.global_px // patch
        drawn = block_masks(images, side, config.mask_probability, config.mask_ratio, torch.Generator().manual_seed(0))
        masks = drawn.unflatten(0, (2, -1))
    return Views(whole, parts, torch.ones(config.views, config.batch_size), masks)


def made(config: PretrainConfig, fused: bool, device: str = "cpu") -> Dino:
    model = METHODS[config.method](config).to(device).train()
    set_attention(model, fused)
    return model


# What a step takes, counted


def counted(config: PretrainConfig, ranks: int = 1) -> dict[str, float]:
    """Operations and bytes of a step of `config` on each of `ranks`, without doing it: meta tensors have no values.

    operations  in matrix products and convolutions, forward and backward
    weights     bytes of student, teacher, gradients and AdamW's two moments, in float32
    activations  bytes that the forward pass keeps for the backward one, in float32
    """
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    own = config.replace(batch_size=config.batch_size // ranks)
    with torch.device("meta"):
        model = made(own, fused=False, device="meta")
    views = views_of(own, model.patch_px, "meta")  # masks stay on the CPU: they decide shapes
    learnt = sum(p.numel() for p in model.student.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    masked = (views.masks,) if config.method == "dinov2" else ()
    with FlopCounterMode(display=False) as flops:
        with torch.no_grad():
            nothing = (views.local[:0], *masked, False) if masked else ()
            model.teacher(views.global_, *nothing)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            _, *logits = model.student(views.global_, views.local, *masked, *((True,) if masked else ()))
            loss = sum(torch.log_softmax(one.float(), -1).sum() for one in logits)
        loss.backward()
    held = sum(size for storage, size in kept.items() if storage not in parameters)
    return {"operations": flops.get_total_flops(), "weights": 4 * (everything + 3 * learnt), "activations": held}


def product_rate(precision: str, device: str = "cpu", side: int = 2048, tries: int = 5) -> float:
    """Operations a second of one large matrix product, the best of a few."""
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, device) for _ in range(tries))


def timed(work: Callable, device: str = "cpu") -> float:
    """Seconds: of CPU time on a CPU, which other processes do not lengthen; of wall time on a GPU."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


# The parts


def cpu(models: list[str], batch: int, repeats: int, steps: int = 3, **toy: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a model, precision and contender; and where the time of ours goes."""
    rows, shares = [], []
    for name in models:
        config = config_of("dino", name, batch, **toy)
        operations, times = counted(config)["operations"], {}
        pairs = [(who, precision) for precision in DTYPES for who in CONTENDERS]
        for turn in range(repeats):
            for who, precision in pairs[turn % len(pairs) :] + pairs[: turn % len(pairs)]:
                spent = alone(config, who, precision, steps)
                if spent:
                    times.setdefault((who, precision), []).append(float(np.median(spent)))
        rates = {precision: product_rate(precision) for precision in DTYPES}
        for (who, precision), spent in times.items():
            median = float(np.median(spent))
            rows.append(
                {"part": "cpu", "model": name, "contender": who, "precision": precision, "batch": batch}
                | {"images_per_s": batch / median, "seconds": median, "n": len(spent)}
                | {"seconds_low": min(spent), "seconds_high": max(spent)}
                | {"of_products": operations / median / rates[precision], "products_gflops": rates[precision] / 1e9}
            )
        views = views_of(config, 16)
        for precision in DTYPES:
            step = CONTENDERS[OURS](config, precision)
            step(views)
            shares += [{"model": name, "precision": precision, **row} for row in profiled(step, views)]
    return _beside(pd.DataFrame(rows)), pd.DataFrame(shares)


def alone(config: PretrainConfig, who: str, precision: str, steps: int) -> list[float]:
    """`stepped` in a process of its own, as a user of one loop has it; nothing where the peer is not installed."""
    told = [json.dumps(dataclasses.asdict(config)), who, precision, str(steps)]
    done = subprocess.run([sys.executable, __file__, "--one", *told], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1:]
    if done.returncode and last and last[0].startswith("ModuleNotFoundError"):
        print(f"{who} is left out: {last[0]}")
        return []
    if done.returncode:
        raise SystemExit(f"{who} in {precision} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def stepped(config: PretrainConfig, who: str, precision: str, steps: int) -> list[float]:
    """CPU seconds of steps after two that are not counted: they make AdamW's moments and find their memory."""
    torch.set_num_threads(1)
    views = views_of(config, 16)
    with kept_memory(torch.device("cpu")) if who == OURS or who.endswith(KEPT) else contextlib.nullcontext():
        step = CONTENDERS[who](config, precision)
        for _ in range(2):
            step(views)
        return [timed(lambda: step(views)) for _ in range(steps)]


def _ours(config: PretrainConfig, precision: str) -> Callable:
    return dino_peers.ours(config, made(config, fused=False), precision)


def _authors(config: PretrainConfig, precision: str) -> Callable:
    return dino_peers.plain(config, False, precision)


def _lightly(config: PretrainConfig, precision: str) -> Callable:
    return dino_peers.lightly(config, False, precision)


CONTENDERS = {
    OURS: _ours,
    "authors' loop": _authors,
    "authors' loop" + KEPT: _authors,
    "lightly": _lightly,  # with plain attention: timm's default one is slower here
    "lightly" + KEPT: _lightly,
}


def _beside(table: pd.DataFrame) -> pd.DataFrame:
    """Adds how many times as fast ours is as the best peer of the row's precision, as it comes and with its memory kept
    as ours is, and as its own float32."""
    is_ours, kept = table["contender"] == OURS, table["contender"].str.endswith(KEPT)
    by = ["model", "precision"]
    best, alike = (table[rows].groupby(by)["images_per_s"].max() for rows in (~is_ours & ~kept, kept))
    own = table[is_ours].set_index(by)["images_per_s"]
    for row in table[is_ours].itertuples():
        table.loc[row.Index, "over_best_peer"] = row.images_per_s / best[row.model, row.precision]
        table.loc[row.Index, "over_best_peer_kept"] = row.images_per_s / alike[row.model, row.precision]
        table.loc[row.Index, "over_float32"] = row.images_per_s / own[row.model, "float32"]
    return table


KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "matmul"),
    "GELU": ("gelu",),
    "softmax": ("softmax",),
    "normalisation": ("norm",),
    "optimiser and moving average": ("_foreach", "addcdiv", "addcmul", "lerp"),
    "copies and casts": ("copy", "cat", "contiguous", "to_", "clone", "fill", "zero"),
}


def profiled(step: Callable, views: Views) -> list[dict]:
    """Shares of a step's CPU time by kind of operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step(views)
    spent: dict[str, float] = {}
    for one in seen.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in one.key for part in parts)), "the rest")
        spent[kind] = spent.get(kind, 0.0) + one.self_cpu_time_total
    total = sum(spent.values())
    return [{"kind": kind, "share": value / total} for kind, value in sorted(spent.items(), key=lambda kv: -kv[1])]


def growth(batch: int = 16, models: tuple[str, ...] = LADDER, measure: int = 1, **toy: Any) -> pd.DataFrame:
    """What a step takes as model, crops and ranks grow; `measure` of the smallest are also done, in float32."""
    rate, rows = product_rate("float32"), []

    def add(axis: str, at: str, config: PretrainConfig, ranks: int = 1, do: bool = False) -> None:
        need = counted(config, ranks)
        row = {"part": "growth", "axis": axis, "at": at, "batch": config.batch_size, "ranks": ranks, **need}
        row["seconds_of_products"] = need["operations"] / rate
        row["sharded"] = need["weights"] / ranks + need["activations"]
        row["link_seconds"] = 2 * (ranks - 1) / ranks * (need["weights"] / 5) / LINK
        if do:
            row["seconds"] = stepped(config, OURS, "float32", 1)[0]
        rows.append(row)

    for k, name in enumerate(models):
        add("model", name.split("_")[1], config_of("dino", name, batch, **toy), do=k < measure)
    for local in (0, 4, 8, 12):
        add(
            "local crops",
            str(local),
            config_of("dino", models[0], batch, **{**toy, "local_views": local}),
            do=measure > 0,
        )
    for ranks in (1, 2, 4, 8):
        add("ranks", str(ranks), config_of("dino", models[-1], batch, **toy), ranks)
    return pd.DataFrame(rows)


def growth_figure(table: pd.DataFrame) -> Figure:
    """Three columns: model, crops, ranks. Above memory, below time."""
    figures.use_style()
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(7, 4.6), layout="constrained")
    biggest = table["at"][table["axis"] == "model"].iloc[-1]
    titles = {
        "model": "ViT",
        "local crops": f"local crops, ViT {table['at'].iloc[0]}",
        "ranks": f"ranks, ViT {biggest}",
    }
    for (axis, rows), memory, speed in zip(table.groupby("axis", sort=False), axes[0], axes[1], strict=True):
        x = np.arange(len(rows))
        memory.bar(x, rows["weights"] / 1e9, label="weights, gradients, AdamW")
        memory.bar(x, rows["activations"] / 1e9, bottom=rows["weights"] / 1e9, label="activations")
        if axis == "ranks":
            memory.plot(x, rows["sharded"] / 1e9, "k_", ms=14, ls="", label="all of it, weights sharded")
        speed.plot(x, rows["seconds_of_products"], "o-", label="matrix products alone, at this machine's rate")
        if "seconds" in rows and rows["seconds"].notna().any():
            speed.plot(x, rows["seconds"], "ks", label="measured")
        memory.set(title=titles[axis], ylabel="GB a rank, float32")
        speed.set(ylabel="s a step, one core")
        if axis == "local crops":
            speed.set_ylim(0, 1.1 * np.nanmax(rows[[c for c in ("seconds_of_products", "seconds") if c in rows]]))
        else:
            speed.set_yscale("log")
            speed.yaxis.set_major_formatter("{x:g}")
            speed.yaxis.set_minor_formatter("")
        for ax in (memory, speed):
            ax.set_xticks(x, rows["at"])
    handles = [pair for ax in (axes[0, 2], axes[1, 0]) for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    fig.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=2, fontsize=7)
    fig.suptitle(f"One step of DINO, {table['batch'].iloc[0]} tiles, 2 views of 224 px and 8 of 96 px", fontsize=9)
    return fig


def gpu(device: str, repeats: int = 5, contenders: tuple[str, ...] = ON_GPU, **toy: Any) -> pd.DataFrame:
    """A row a model, compiled or not, and a peer: at the largest batch of BATCHES that fits."""
    rows = []
    for method, name in RECIPES:
        for who in contenders:
            if who in PEERS and method == "dinov2":
                continue  # lightly has modules for it and no loop to follow; the authors' loop here is DINO's
            found = None
            for batch in BATCHES[:2] if toy else BATCHES[2:]:
                try:
                    found = _on(device, config_of(method, name, batch, **toy), who, repeats)
                except (torch.OutOfMemoryError, ImportError) as error:
                    print(f"{who}, {name}, batch {batch}: {type(error).__name__}")
                    break
                finally:
                    if device == "cuda":  # what a contender held is free before the next one is measured
                        gc.collect()
                        torch.cuda.empty_cache()
            rows += [{"part": "gpu", "model": name, "method": method, "contender": who, **found}] if found else []
    table = pd.DataFrame(rows, columns=None if rows else ["model", "contender", "images_per_s"])
    best = table[table["contender"].isin(PEERS)].groupby("model")["images_per_s"].max()
    ours = ~table["contender"].isin(PEERS)
    return table.assign(over_best_peer=(table["images_per_s"] / table["model"].map(best)).where(ours))


def _on(device: str, config: PretrainConfig, who: str, repeats: int) -> dict[str, float]:
    """images/s, peak memory and utilisation of one contender at one batch."""
    precision = "bfloat16"
    if who in PEERS:
        step = PEERS[who](config, True, precision, device)
    else:
        model = made(config, fused=True, device=device)
        if who.endswith("compiled"):
            for network in (model.student, model.teacher):
                for block in network.backbone.blocks:
                    block.compile()
        step = dino_peers.ours(config, model, precision)
    views = views_of(config, 14 if "patch14" in config.model else 16, device)
    for _ in range(3):
        step(views)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    median = float(np.median([timed(lambda: step(views), device) for _ in range(repeats)]))
    peak = next(
        (value for mark, value in PEAK.items() if device == "cuda" and mark in torch.cuda.get_device_name()), np.nan
    )
    operations = counted(config)["operations"]
    return {
        "batch": config.batch_size,
        "images_per_s": config.batch_size / median,
        "seconds": median,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else np.nan,
        "mfu": operations / median / peak,
        "of_products": operations / median / product_rate(precision, device, 8192 if device == "cuda" else 512),
    }


def fed(device: str, side: int, workers: int, steps: int, **toy: Any) -> pd.DataFrame:
    """How long a run waits for tiles of an SVS file, and how fast one worker reads them alone."""
    from online_patching import slide_path

    from pathfm import Cohort, SlideIndex, TileStream
    from pathfm.pretrain import pretrain

    with tempfile.TemporaryDirectory() as folder:
        pd.DataFrame({"slide_id": ["one"], "path": [slide_path(side)]}).to_csv(f"{folder}/cohort.csv", index=False)
        index = SlideIndex.build(Cohort.read(f"{folder}/cohort.csv"), f"{folder}/index", workers=0)
        config = config_of("dino", "vit_small_patch16_224", 8 if toy else 256, mpp=(0.5,), **toy)
        config = config.replace(steps=steps, workers=workers, watch_every=0, device=device)
        stream = TileStream(index, config.tile_px, config.mpp, config.min_tissue)
        alone = 64 / timed(lambda: [stream[i] for i in range(64)])
        log = pretrain(config, stream, folder=f"{folder}/run").log.iloc[steps // 2 :]
    rate = float(log["tiles_per_s"].median())
    row = {"part": "fed", "contender": "online patching", "workers": workers, "batch": config.batch_size}
    row |= {"images_per_s": rate, "data_wait": float(log["data_wait"].mean()), "one_worker_tiles_per_s": alone}
    return pd.DataFrame([row | {"workers_needed": rate / (1 - row["data_wait"]) / alone}])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["cpu", "growth", "gpu", "fed"])
    parser.add_argument("--models", nargs="+", default=list(LADDER[:2]))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=4, help="config as JSON, contender, precision, steps: its seconds as JSON")
    parser.add_argument("--out", default=str(ROOT / "results" / "pretraining_speed.csv"))
    given = parser.parse_args()
    if given.one:
        config, who, precision, steps = given.one
        print(json.dumps(stepped(make_config(**json.loads(config)), who, precision, int(steps))))
        return
    device, tables = "cuda" if torch.cuda.is_available() else "cpu", []
    toy = {} if device == "cuda" else {**TOY, "global_px": 112, "local_px": 56}
    if "cpu" in given.parts:
        torch.set_num_threads(1)
        table, shares = cpu(given.models, given.batch, given.repeats)
        print(table.round(3).to_string(index=False), shares.round(3).to_string(index=False), sep="\n\n")
        tables += [table, shares.assign(part="profile")]
    if "growth" in given.parts:
        tables.append(growth(given.batch))
        print(tables[-1].round(3).to_string(index=False))
        figures.save(growth_figure(tables[-1]), "pretraining_growth", Path(given.out).parent.parent / "figures")
    if "gpu" in given.parts:
        table = gpu(device, given.repeats, **({} if device == "cuda" else {**TOY, "global_px": 112, "local_px": 112}))
        print("toy size, nothing recorded" * (device == "cpu"), table.round(3).to_string(index=False), sep="\n")
        tables += [table] * (device == "cuda")
    if "fed" in given.parts:
        sizes = (2048, 0, 4) if toy else (30_000, os.cpu_count() or 16, 60)
        table = fed(device, *sizes, **toy)
        print("toy size, nothing recorded" * bool(toy), table.round(3).to_string(index=False), sep="\n")
        tables += [table] * (not toy)
    if tables:
        found = pd.concat(tables).assign(**stamp())
        if Path(given.out).is_file():  # parts that were not run again stay
            before = pd.read_csv(given.out)
            found = pd.concat([before[~before["part"].isin(found["part"])], found])
        with atomic_path(Path(given.out)) as partial:
            found.to_csv(partial, index=False, float_format="%.6g")
        print(given.out)


if __name__ == "__main__":
    main()
