"""How long a probe of a large public task takes here, and how much memory: features are drawn, nothing is downloaded.

    python benchmarks/probe_size.py [--cases crc pcam] [--threads 1]

crc     as many features as NCT-CRC-HE has tiles: 100,000 to train on and 7,180 to stop and report on, of 384 numbers,
        9 classes, eva-2026 with its 5 runs; classes overlap, so that a head trains to the end of its patience or steps
pcam    as many as PatchCamelyon: 262,144, 32,768 and 32,768 of 1,024 numbers, 2 classes, eva-2026

Features lie in a memory-mapped file, as `features.extract` leaves them. Each case runs in a process of its own: seconds
are of wall and of CPU time, memory is the process's peak less what importing takes (pages of the mapped file counted
while they are there). Results go to results/probe_size.csv.
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


def measured(folder: Path, name: str, threads: int) -> dict[str, float]:
    """One case in this process."""
    import psutil
    import torch

    from pathfm import heads
    from pathfm.metrics import balanced_accuracy
    from pathfm.protocols import protocol

    torch.set_num_threads(threads)
    n_train, n_validate, n_test, d, classes, _ = CASES[name]
    x, y = np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "y.npy")
    train, validate = np.arange(n_train), np.arange(n_train, n_train + n_validate)
    test = validate if n_test is None else np.arange(n_train + n_validate, n_train + n_validate + n_test)
    before = psutil.Process().memory_info().rss
    wall, cpu = time.perf_counter(), time.process_time()
    found = heads.fit(protocol("eva-2026", n_train, n_validate, classes), x, y, train, validate)
    score = [balanced_accuracy(y[test], one) for one in found.answers(x, test)[0]]
    row = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    row |= {"memory_gb": (1024 * int(peak.split()[1]) - before) / 1e9, "score": float(np.mean(score))}
    return row | {"stopped": float(found.stopped.mean()), "runs": found.protocol.runs, "threads": threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="of one case that was drawn before; its figures as JSON")
    told = parser.parse_args()
    if told.folder:
        print(json.dumps(measured(told.folder, told.cases[0], told.threads)))
        return
    from pathfm.runs import stamp, write_results

    rows = []
    for name in told.cases:
        with tempfile.TemporaryDirectory() as folder:
            n_train, n_validate, n_test, d, classes, signal = CASES[name]
            n = n_train + n_validate + (n_test or 0)
            np.save(f"{folder}/y.npy", clouds(Path(folder) / "x.npy", n, d, classes, signal))
            command = [sys.executable, __file__, "--folder", folder, "--cases", name, "--threads", str(told.threads)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        what, bar = BARS[name]
        rows.append({"case": name, "n": n, "d": d, "classes": classes, **found, "bar": f"{what} < {bar:g}"})
        rows[-1]["holds"] = found[what] < bar
        print(pd.Series(rows[-1]).to_string(), flush=True)
    print(write_results("probe_size", pd.DataFrame(rows).assign(**stamp())))


if __name__ == "__main__":
    main()
