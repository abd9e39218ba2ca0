"""How long a probe of a large public task takes here, and how much memory: features are drawn, nothing is downloaded.

    python benchmarks/probe_size.py [--cases crc pcam] [--protocols linear kNN logistic SimpleShot eva-2026] [--shared]

crc     as many features as NCT-CRC-HE has tiles: 100,000 to train on and 7,180 to stop and report on, of 384 numbers,
        9 classes; classes overlap, so that a head trains to the end of its patience or steps
pcam    as many as PatchCamelyon: 262,144, 32,768 and 32,768 of 1,024 numbers, 2 classes

Protocols are those of `pathfm evaluate`; eva-2026 has its 5 runs, linear its whole search. Those that
choose on validate and answer on test are left out where there are no test tiles. Features lie in a memory-mapped file,
as `features.extract` leaves them. Each protocol runs in a process of its own: seconds are of wall and of CPU time,
memory is the process's peak less what it held before, which is what importing takes and the table of tiles (pages of
the mapped file counted while they are there). Rows of results/probe_size.csv are replaced one by one, by case and
protocol.

--shared    others work on this machine: the seconds of the wall are left out, and a bar on them is not judged
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CASES = {  # train, validate, test (None: the same images as validate), features, classes, signal
    "crc": (100_000, 7_180, None, 384, 9, 0.10),
    "pcam": (262_144, 32_768, 32_768, 1024, 2, 0.03),
}
BARS = {"crc": ("seconds", 60.0), "pcam": ("memory_gb", 2.0)}
KEYS = ["case", "protocol"]


def clouds(path: Path, n: int, d: int, classes: int, signal: float) -> np.ndarray:
    """Writes features (n, d) float32, Gaussian clouds around a centre a class; returns the classes."""
    rng = np.random.default_rng(0)
    y, centres = rng.integers(0, classes, n), signal * rng.standard_normal((classes, d), np.float32)
    x = np.lib.format.open_memmap(path, "w+", np.float32, (n, d))
    for start in range(0, n, 8192):
        part = y[start : start + 8192]
        x[start : start + 8192] = centres[part] + rng.standard_normal((len(part), d), np.float32)
    x.flush()
    return y


def features(folder: Path, name: str):
    """The drawn features with roles."""
    from pathfm.benchmarks import TileSet
    from pathfm.features import Features

    n_train, n_validate, n_test, *_ = CASES[name]
    x, y = np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "y.npy")
    role = np.repeat(["probe-train", "validate", "test"], [n_train, n_validate, n_test or 0])
    files = np.arange(len(y)).astype(str)
    table = pd.DataFrame({"file": files, "digest": files, "label": np.char.add("class", y.astype(str)), "role": role})
    return Features(name, x, TileSet(name, table.assign(mpp=0.5, width_px=224, height_px=224)))


def status(what: str) -> int:
    """Bytes of this process that Linux tells: VmRSS, or VmHWM, its peak since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def measured(folder: Path, name: str, protocol: str, threads: int) -> dict[str, float]:
    """One protocol on one case, in this process."""
    import torch

    from pathfm import evaluation

    torch.set_num_threads(threads)
    drawn = features(folder, name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    found = evaluation.PROTOCOLS[protocol](drawn)
    row = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    row |= {"memory_gb": (status("VmHWM") - before) / 1e9, "score": found.balanced_accuracy}
    if "stopped" in found.settings:
        row |= {"stopped": float(np.mean(found.settings["stopped"])), "runs": len(found.settings["scores"])}
    return row | {"threads": threads}


def merged(rows: pd.DataFrame) -> pd.DataFrame:
    """results/probe_size.csv with these rows in place of their forerunners."""
    from pathfm.runs import read_results

    table = pd.concat([read_results("probe_size")[0], rows], ignore_index=True).drop_duplicates(KEYS, keep="last")
    return table.astype({"runs": "Int64"}).sort_values(KEYS, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--protocols", nargs="+", default=["SimpleShot", "linear", "logistic", "kNN", "eva-2026"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--folder", type=Path, help="of one case that was drawn before; its figures as JSON")
    told = parser.parse_args()
    if told.folder:
        print(json.dumps(measured(told.folder, told.cases[0], told.protocols[0], told.threads)))
        return
    from pathfm.evaluation import ON_TEST
    from pathfm.runs import stamp, write_results

    for name in told.cases:
        with tempfile.TemporaryDirectory() as folder:
            n_train, n_validate, n_test, d, classes, signal = CASES[name]
            n = n_train + n_validate + (n_test or 0)
            np.save(f"{folder}/y.npy", clouds(Path(folder) / "x.npy", n, d, classes, signal))
            what, bar = BARS[name]
            for protocol in told.protocols:
                if n_test is None and protocol in ON_TEST:
                    print(f"{name} has no test tiles, which {protocol} answers on: left out")
                    continue
                command = [sys.executable, __file__, "--folder", folder, "--cases", name, "--protocols", protocol]
                command += ["--threads", str(told.threads)]
                found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
                row = {"case": name, "protocol": protocol, "n": n, "d": d, "classes": classes, **found}
                row |= {"bar": f"{what} < {bar:g}", "holds": found[what] < bar}
                if told.shared:
                    row |= {"seconds": np.nan} | ({"holds": np.nan} if what == "seconds" else {})
                print(pd.Series(row).to_string(), flush=True)
                print(write_results("probe_size", merged(pd.DataFrame([row]).assign(**stamp()))), flush=True)


if __name__ == "__main__":
    main()
