"""A sweep: one YAML in sweeps/, one notebook, a grid of its parameters; resumable, one row a point."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pathfm import answers
from pathfm.errors import InputError, nearest
from pathfm.runs import Scalar, check_parameters, code_hash, notebook_path, notebooks_dir, record, stamp
from pathfm.storage import progress, read_json, write_json

ANSWERS = ("answers", "real")  # tables of pathfm.answers that a point may write: on its cohort's tiles, on real ones


def read_sweep(name: str | Path) -> dict[str, Any]:
    """A sweep file: notebook, base parameters, grid (name -> list of values), question and primary contrast."""
    import yaml

    path = Path(name) if Path(name).suffix else notebooks_dir().parent / "sweeps" / f"{name}.yaml"
    if not path.is_file():
        known = [p.stem for p in (notebooks_dir().parent / "sweeps").glob("*.yaml")]
        raise InputError(f"no sweep '{name}'.{nearest(Path(name).stem, known)}")
    spec = yaml.safe_load(path.read_text())
    missing = {"notebook", "grid", "question", "primary_contrast"} - spec.keys()
    if missing:
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}; see the other files in sweeps/")
    return {"base": {}, **spec, "name": path.stem}


def sweep_points(spec: dict[str, Any]) -> list[dict[str, Scalar]]:
    """Every combination of the grid, in the order written."""
    return [dict(zip(spec["grid"], values, strict=True)) for values in itertools.product(*spec["grid"].values())]


def sweep(
    name: str | Path,
    folder: str | Path | None = None,
    workers: int | None = None,
    grid: dict[str, list] | None = None,
    **override: Scalar,
):
    """Runs the missing points of a sweep and returns one row a point: grid values, metrics, seconds.

    folder    holds one run folder a point (point.json, metrics.json, notebook.ipynb); runs/sweeps/<name> where None
    workers   points at a time, one thread each; the number of cores where None
    grid      replaces the file's grid, such as one without the mpp that a cohort cannot serve
    override  replaces base parameters; part of a point's identity, so that no result is mistaken for another

    `attrs["folders"]` are the points' run folders, in the order of the rows.
    Where points differ in nothing but their seed, `attrs["answers"]` holds what their probes answered, by ANSWERS.

    A point is finished when its notebook ran to the end; a killed sweep goes on where it stopped. A failing point does
    not stop the others and is raised at the end. Raises InputError for a parameter the notebook does not declare.
    """
    import pandas as pd

    spec = read_sweep(name)
    spec["grid"] = grid or spec["grid"]
    base = {**spec["base"], **override}
    points = sweep_points(spec)
    for point in points:
        check_parameters(spec["notebook"], {**base, **point})
    root = Path(folder) if folder else notebooks_dir().parent / "runs" / "sweeps" / spec["name"]
    folders = [root / _identity(spec["notebook"], {**base, **point}) for point in points]
    missing = [pair for pair in zip(points, folders, strict=True) if not _finished(pair[1])]
    failures = _run_points(spec["notebook"], base, missing, workers)
    if failures:
        raise InputError(f"{len(failures)} of {len(points)} points stopped:\n  " + "\n  ".join(failures))
    rows = [{**point, **read_json(path / "metrics.json")} for point, path in zip(points, folders, strict=True)]
    table = pd.DataFrame(rows)
    table.attrs["folders"] = folders
    if list(spec["grid"]) == ["seed"]:
        found = {name: answers.merged(folders, name) for name in ANSWERS}
        table.attrs["answers"] = {name: wide for name, wide in found.items() if wide is not None}
    return table


def _run_points(notebook: str, base: dict, points: list[tuple[dict, Path]], workers: int | None) -> list[str]:
    # Each point is a process of its own: papermill starts a kernel, and its event loop wants the main thread.
    if not points:
        return []
    workers = min(workers or os.cpu_count() or 1, len(points))
    failures = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(_run_point, notebook, {**base, **point}, path): point for point, path in points}
        for job in progress(concurrent.futures.as_completed(jobs), desc="sweep", total=len(jobs), unit="point"):
            if message := job.result():
                failures.append(f"{jobs[job]}: {message}")
    return failures


def _run_point(notebook: str, parameters: dict, folder: Path) -> str:
    """Runs one point in a process; returns what went wrong, or an empty string."""
    parameters = {**parameters, "run": str(folder)}
    write_json(folder / "point.json", parameters)
    command = [sys.executable, "-m", "pathfm", "notebook", str(notebook), str(folder / "notebook.ipynb")]
    env = {
        **os.environ,
        "PATHFM_FIGURES": str(folder / "figures"),
        "PATHFM_PROGRESS": "0",
        "OMP_NUM_THREADS": "1",
    }
    start = time.monotonic()
    done = subprocess.run([*command, json.dumps(parameters)], capture_output=True, text=True, env=env)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    if not (folder / "metrics.json").exists():
        return f"{notebook} recorded no metrics"
    record(folder, seconds=round(time.monotonic() - start, 1), **stamp())
    return ""


def _finished(folder: Path) -> bool:
    # The notebook writes metrics before its last cell; the seconds are added when all of it ran.
    return (folder / "metrics.json").exists() and "seconds" in read_json(folder / "metrics.json")


def _identity(notebook: str, parameters: dict) -> str:
    """A folder name from all parameters and the code behind a point, so that a stale result is never reused."""
    from pathfm.synthetic import generator_hash

    cells = read_json(notebook_path(notebook))["cells"]
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    parts = [source, parameters, code_hash(), generator_hash()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
