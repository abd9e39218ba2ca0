"""Run folders, provenance, and notebooks run headlessly with parameters that are checked first."""

from __future__ import annotations

import ast
import contextlib
import datetime
import functools
import hashlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from pathfm.errors import InputError, nearest
from pathfm.storage import atomic, checkout, progress, read_json, write_json

Scalar = bool | int | float | str


def provenance() -> dict[str, Any]:
    """What a number needs beside it: commit, date (UTC), device, threads, versions, hash of the generator."""
    from importlib.metadata import version

    from pathfm.synthetic import GENERATOR_VERSION, generator_hash

    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "device": device_name(),
        "threads": _threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("pathfm", "torch", "timm", "openslide-python", "numpy")},
        "generator": f"{GENERATOR_VERSION}-{generator_hash()}",
    }


def stamp() -> dict[str, str]:
    """What stands in every row of results/: commit, date, device, generator."""
    facts = provenance()
    return {name: facts[name] for name in ("commit", "date", "device", "generator")}


def commit() -> str:
    """The short commit of the checkout, with '+' when pathfm/ or sweeps/ differ from it; 'unknown' without git."""
    root = checkout()
    if root is None:
        return "unknown"
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "pathfm", "sweeps"], capture_output=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + "+" * (dirty.returncode != 0) if head.returncode == 0 else "unknown"


@functools.cache
def code_hash() -> str:
    """Ten hex digits of the package's sources as this process started: what was cached by other code is not reused."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:10]


def device_name() -> str:
    """The accelerator's name, else the processor's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def notebooks_dir() -> Path:
    """The folder of numbered notebooks. Raises InputError outside a checkout."""
    root = checkout()
    if root is None:
        raise InputError("the notebooks are not installed with the package; clone the repository and run there")
    return root / "notebooks"


def results_dir() -> Path:
    """The folder of recorded tables."""
    return notebooks_dir().parent / "results"


def notebook_path(name: str | Path) -> Path:
    """The path of a notebook given as a path or a name such as 03_pretraining."""
    path = Path(name)
    if path.suffix == ".ipynb" and path.is_file():
        return path
    known = {p.stem: p for p in sorted(notebooks_dir().glob("[0-9][0-9]_*.ipynb"))}
    if path.stem not in known:
        raise InputError(f"no notebook '{name}'.{nearest(path.stem, known)}")
    return known[path.stem]


def declared_parameters(notebook: str | Path) -> dict[str, Scalar]:
    """Name and default of every parameter in the notebook's cell tagged `parameters`."""
    content = read_json(notebook_path(notebook))
    for cell in content["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            tree = ast.parse("".join(cell["source"]))
            return {
                node.target.id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.AnnAssign)
            }
    raise InputError(f"{notebook} has no cell tagged 'parameters'; tag one in JupyterLab's property inspector")


def check_parameters(notebook: str | Path, given: dict[str, Any]) -> None:
    """Raises InputError for a name the notebook does not declare or a value of another type than its default.

    papermill itself only warns about an unknown name and runs with the default.
    """
    declared = declared_parameters(notebook)
    stem = Path(notebook).stem
    for name, value in given.items():
        if name not in declared:
            raise InputError(f"notebook {stem} has no parameter '{name}'.{nearest(name, declared)}")
        default = declared[name]
        fits = isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)
        if not fits and not (isinstance(default, float) and type(value) is int):
            want = type(default).__name__
            raise InputError(
                f"notebook {stem}: parameter '{name}' is {value!r}; give a value of type {want}, like {default!r}"
            )


def begin(notebook: str, namespace: dict[str, Any], threads: int = 1) -> None:
    """First call of every notebook: checks its parameters, fixes seeds, threads and the figure style.

    namespace  the notebook's globals(); a plain name holding a literal that the parameters cell does not declare
               came from `papermill -p` and is refused, since papermill would ignore it.
    threads    of torch and of linear algebra; one makes stored numbers repeat to all shown digits, and two on busy
               cores are many times slower
    """
    import random

    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits

    from pathfm.figures import use_style

    given = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and type(value) in (bool, int, float, str, list, dict) and name not in ("In", "Out")
    }
    if "_begun" in namespace:  # run again in a live kernel, where the notebook's own variables are about
        given = {name: value for name, value in given.items() if name in declared_parameters(notebook)}
    check_parameters(notebook, given)
    namespace["_begun"] = True
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, umap and others still read the global generator
    torch.manual_seed(0)
    if threads:
        torch.set_num_threads(threads)
        threadpool_limits(threads)  # the BLAS under numpy, scipy and scikit-learn
    use_style()


def execute(
    notebook: str | Path,
    output: str | Path,
    parameters: dict[str, Any] | None = None,
    env: dict | None = None,
) -> Path:
    """Runs a notebook with checked parameters and stores it, executed, at `output`; returns that path.

    Raises InputError when a parameter is unknown, or with the failing cell's last line when a cell raises; the
    notebook as far as it came is then kept at `output`.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    path, output = notebook_path(notebook), Path(output)
    check_parameters(path, parameters or {})
    output.parent.mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    os.environ.update(env or {})
    try:
        papermill.execute_notebook(
            str(path),
            str(output),
            parameters=parameters or {},
            progress_bar=False,
            extra_arguments=["--log-level=40"],  # a kernel's own warnings are no part of the study
        )
    except PapermillExecutionError as error:
        raise InputError(f"{path.stem} stopped: {error.ename}: {error.evalue} (see {output})") from None
    finally:
        os.environ.clear()
        os.environ.update(before)
    return output


def profiles() -> dict[str, dict[str, dict[str, Any]]]:
    """Profile -> notebook -> parameters, from notebooks/profiles.yaml."""
    import yaml

    return yaml.safe_load((notebooks_dir() / "profiles.yaml").read_text())


def run_study(profile: str = "smoke", cohort: str = "", out: str | Path | None = None) -> Path:
    """Runs every notebook in order and returns the folder that holds them.

    profile  a parameter set of notebooks/profiles.yaml: smoke (minutes) or demo (longer and better)
    cohort   a cohort.csv, or a synthetic cohort such as "study"; the profile's own where empty, else the embedded one
    out      folder of the executed notebooks, runs/<date>-<profile> where None

    A notebook that fails does not stop the others; the failure is raised at the end.
    """
    known = profiles()
    if profile not in known:
        raise InputError(f"no profile '{profile}'.{nearest(profile, known)}")
    figures = checkout() / "figures"
    if cohort:
        from pathfm import study

        cohort = str(Path(cohort).expanduser().resolve()) if cohort.endswith(".csv") else cohort
        figures = figures / study.cohort(cohort).name
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    out = Path(out) if out else checkout() / "runs" / f"{now}-{profile}"
    failures, seconds = [], {}
    books = sorted(notebooks_dir().glob("[0-9][0-9]_*.ipynb"))
    bar = progress(books, desc="study", unit="notebook")
    for book in bar:
        if hasattr(bar, "set_description"):
            bar.set_description(book.stem)
        parameters = dict(known[profile].get(book.stem) or {})
        if cohort and "cohort" in declared_parameters(book):
            parameters["cohort"] = cohort
        start = time.monotonic()
        try:
            execute(
                book,
                out / book.name,
                parameters,
                env={"PATHFM_FIGURES": str(figures), "PATHFM_PROGRESS": "0"},
            )
        except InputError as error:
            failures.append(str(error))
        seconds[book.stem] = round(time.monotonic() - start, 1)
    write_json(out / "run.json", {"profile": profile, "cohort": cohort, "seconds": seconds, **provenance()})
    _say_where(out, figures, seconds)
    if failures:
        raise InputError(f"{len(failures)} of {len(books)} notebooks stopped:\n  " + "\n  ".join(failures))
    return out


def _say_where(out: Path, figures: Path, seconds: dict[str, float]) -> None:
    def short(path: Path) -> str:
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

    for name, spent in seconds.items():
        print(f"  {spent:6.1f} s  {name}")
    print(f"executed notebooks: {short(out)}\nfigures:            {short(figures)}")
    print(f"open them with:     make lab   (or: jupyter lab {short(out)})")


def record(folder: str | Path, **metrics: Scalar) -> None:
    """Adds metrics to <folder>/metrics.json; a sweep collects them. An empty folder name records nothing."""
    if not folder:
        return
    path = Path(folder) / "metrics.json"
    write_json(path, {**(read_json(path) if path.exists() else {}), **metrics})


def write_results(name: str, table) -> Path:
    """A sweep's table, each row with its own provenance, as results/<name>.csv, whole or not at all."""
    path = results_dir() / f"{name}.csv"
    with atomic(path, "w") as file:
        table.to_csv(file, index=False, float_format="%.4f")
    return path


def read_results(name: str) -> tuple[Any, int]:
    """results/<name>.csv: the rows of the generator that there is now, and how many others there are.

    Rows of another generator tell of other slides and are never mixed. No file is no rows.
    """
    import pandas as pd

    from pathfm.synthetic import GENERATOR_VERSION, generator_hash

    path = results_dir() / f"{name}.csv"
    if not path.is_file():
        return pd.DataFrame(), 0
    table = pd.read_csv(path, dtype={"commit": str})  # which may look like a number
    current = table["generator"] == f"{GENERATOR_VERSION}-{generator_hash()}"
    return table[current].reset_index(drop=True), int((~current).sum())


def store(name: str | Path) -> Path:
    """Runs a notebook at its defaults and stores its outputs in place, without papermill's notes and times."""
    import nbformat

    path = notebook_path(name)
    executed = execute(path, notebooks_dir().parent / "runs" / "stored" / path.name, env={"PATHFM_PROGRESS": "0"})
    book = nbformat.read(executed, as_version=4)
    book.metadata = {key: book.metadata[key] for key in ("kernelspec", "language_info") if key in book.metadata}
    book.metadata["language_info"] = {"name": "python"}
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
    with atomic(path, "w") as file:
        nbformat.write(book, file)
    return path
