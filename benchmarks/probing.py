"""Our probes against eva's own, on the same embeddings: scores, the steps of stopping, seconds.

    PATHFM_EVA_PYTHON=<python of eva> python benchmarks/probing.py --protocols eva-2026 eva-2024 --tiles <folder>
    PATHFM_EVA_PYTHON=<...> python benchmarks/probing.py --steps 250 --runs 20 --sets oral_oscc --tiles <folder>

In full, as the first line asks, eva takes two CPU hours; the second shortens the protocol.

Three data sets, none of them easy: two classes and nine classes of clouds that overlap (drawn here), and real tiles of
oral mucosa as a small ViT of random weights sees them. eva reads one file an image, as its own configurations do, here
in the process itself, which takes it less CPU time than its four workers. Its start-up is measured by a run of one step
and taken off. `steps` shortens the protocol in proportion: the patience is 20 % of it (eva-2024: 5 %). Means agree
where they differ by at most half a point or two standard errors; so do the steps at which the best head stood and at
which the run stopped, by at most one look at validate or two standard errors. A look is an epoch. Runs of eva-2024
have heads of their own on both sides, as eva has them today. times_faster is of CPU seconds, all processes; wall
seconds, beside them, depend on what else the machine did, and rows before 22 November 2026 have none. Rows of the same
data set, protocol, steps and runs replace those of an earlier call in --out.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import timm
import torch

EVENTS = ("kept", "stopped")  # of a run, in steps
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pathfm import eva, heads  # noqa: E402
from pathfm.benchmarks import TileSet  # noqa: E402
from pathfm.features import extract  # noqa: E402
from pathfm.metrics import balanced_accuracy  # noqa: E402
from pathfm.protocols import MAX_STEPS, Protocol, protocol  # noqa: E402
from pathfm.runs import stamp  # noqa: E402
from pathfm.storage import atomic  # noqa: E402


class Embedded(NamedTuple):
    name: str
    x: np.ndarray
    y: np.ndarray
    splits: dict[str, np.ndarray]  # train, val, test -> rows


def clouds(name: str, classes: int, signal: float, sizes: tuple[int, int, int], d: int = 768) -> Embedded:
    """Gaussian clouds around one centre a class."""
    rng = np.random.default_rng(classes)
    y = rng.integers(0, classes, sum(sizes))
    x = signal * rng.normal(size=(classes, d))[y] + rng.normal(size=(len(y), d))
    cut = np.split(np.arange(len(y)), np.cumsum(sizes)[:2])
    return Embedded(name, x.astype(np.float32), y, dict(zip(("train", "val", "test"), cut, strict=True)))


def real(folder: Path | None) -> Embedded:
    """Tiles of oral mucosa, half of them to train on."""
    if folder is None:
        raise SystemExit("give the folder of oral_oscc as --tiles, or leave it out of --sets")
    tiles = TileSet.from_folder(folder).split("tile", fractions={"probe-train": 0.5, "validate": 0.25, "test": 0.25})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
    found = extract(model, tiles, pool="both", name="random ViT")
    role = found.table["role"].to_numpy()
    names = {"train": "probe-train", "val": "validate", "test": "test"}
    x = (found.x - found.x.mean(0)) / found.x.std(0)  # of a random network the means say nothing
    return Embedded("oral_oscc", x, found.y, {split: np.flatnonzero(role == name) for split, name in names.items()})


def spent() -> np.ndarray:
    """CPU seconds of this process and its children, and those of the clock."""
    children = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    return np.array([time.process_time() + children, time.perf_counter()])


def timed(work: Callable) -> tuple[object, np.ndarray]:
    """What `work` returns and what it `spent`."""
    start = spent()
    return work(), spent() - start


def ours(data: Embedded, chosen: Protocol) -> pd.DataFrame:
    train, validate, test = data.splits.values()
    found = heads.fit(chosen, data.x, data.y, train, validate)
    score = [balanced_accuracy(data.y[test], one) for one in found.answers(data.x, test)[0]]
    return pd.DataFrame({"test": score, "kept": found.kept[0], "stopped": found.stopped[0]})


def theirs(data: Embedded, chosen: Protocol, folder: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """eva's rows, and what it `spent` without the start."""
    classes = int(data.y.max()) + 1
    files = eva.write_embeddings(folder / "embeddings", data.x, data.y, data.splits)
    settings = {"d": data.x.shape[1], "classes": classes}
    once = replace(chosen, runs=1, max_steps=-(-len(data.splits["train"]) // chosen.batch_size))
    _, start = timed(lambda: eva.run("fit", eva.configuration(once, files, folder / "start", **settings)))
    table, seconds = timed(lambda: eva.run("fit", eva.configuration(chosen, files, folder / "eva", **settings)))
    return table, seconds - start


def compared(data: Embedded, name: str, steps: int, runs: int, folder: Path) -> dict:
    train, validate, test = data.splits.values()
    chosen = protocol(name, len(train), len(validate), int(data.y.max()) + 1, max_steps=steps)
    chosen = replace(chosen, runs=runs or chosen.runs, one_start=False)
    mine, seconds = timed(lambda: ours(data, chosen))
    its, its_seconds = theirs(data, chosen, folder)
    row = {"task": data.name, "protocol": name, "max_steps": steps, "patience": chosen.patience, "runs": chosen.runs}
    row |= {"classes": int(data.y.max()) + 1, "d": data.x.shape[1]}
    row |= {"n_train": len(train), "n_validate": len(validate), "n_test": len(test)}
    for who, table in (("eva", its), ("ours", mine)):
        row |= {f"{who}_mean": table["test"].mean(), f"{who}_sd": table["test"].std(ddof=1)}
        row |= {f"{who}_{step}": " ".join(map(str, table[step])) for step in EVENTS}
    row["difference"], row["allowed"] = apart(mine["test"], its["test"], 0.005)
    row["agree"] = abs(row["difference"]) <= row["allowed"]
    row |= looks(mine, its, -(-len(train) // chosen.batch_size) * chosen.every)
    for who, (cpu, wall) in (("eva", its_seconds), ("ours", seconds)):
        row |= {f"{who}_cpu_s": cpu, f"{who}_wall_s": wall}
    return row | {"times_faster": row["eva_cpu_s"] / row["ours_cpu_s"]}


def apart(mine: pd.Series, its: pd.Series, least: float) -> tuple[float, float]:
    """The difference of the means, and the largest that is allowed: `least`, or two of its standard errors."""
    return mine.mean() - its.mean(), max(least, 2 * np.sqrt(mine.var() / len(mine) + its.var() / len(its)))


def looks(mine: pd.DataFrame, its: pd.DataFrame, steps: int) -> dict:
    """Are the steps at which heads were kept and runs stopped the same? In looks at validate, one every `steps`."""
    row = {}
    for event in EVENTS:
        row[f"{event}_looks"], row[f"{event}_allowed"] = apart(mine[event] / steps, its[event] / steps, 1)
    return row | {"steps_agree": all(abs(row[f"{event}_looks"]) <= row[f"{event}_allowed"] for event in EVENTS)}


def record(path: Path, row: dict) -> None:
    """Puts a row into the table, in place of one of the same comparison."""
    key = ["task", "protocol", "max_steps", "runs"]
    rows = pd.DataFrame([row]).round(4)
    if path.is_file():
        rows = pd.concat([pd.read_csv(path), rows]).drop_duplicates(key, keep="last")
    with atomic(path, "w") as file:
        rows.to_csv(file, index=False)


SETS = {
    "two clouds": lambda _: clouds("two clouds", 2, 0.065, (2000, 400, 1000)),
    "nine clouds": lambda _: clouds("nine clouds", 9, 0.1, (2000, 400, 1000)),
    "oral_oscc": real,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--tiles", type=Path, help="the folder of oral_oscc")
    parser.add_argument("--steps", type=int, default=MAX_STEPS)
    parser.add_argument("--runs", type=int, default=0, help="of both; 0: the protocol's. More, a narrower bar")
    parser.add_argument("--protocols", nargs="+", default=["eva-2026"])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "probing_parity.csv")
    given = parser.parse_args()
    torch.set_num_threads(1)
    about = stamp()
    for name in given.sets:
        data = SETS[name](given.tiles)
        for protocol_name in given.protocols:
            with tempfile.TemporaryDirectory() as folder:
                row = compared(data, protocol_name, given.steps, given.runs, Path(folder)) | about
            print(pd.Series(row).to_string(), flush=True)
            record(given.out, row)


if __name__ == "__main__":
    main()
