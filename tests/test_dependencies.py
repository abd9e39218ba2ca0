"""One dependency list: pyproject.toml, constraints.txt, environment.yml and the imports agree."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LISTED = [Requirement(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
PINNED = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1].strip()
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line
}


@pytest.mark.parametrize("listed", LISTED, ids=lambda r: r.name)
def test_every_dependency_is_pinned_to_a_version_its_range_admits(listed):
    assert listed.specifier.contains(PINNED[canonicalize_name(listed.name)], prereleases=True)


@pytest.mark.parametrize("listed", LISTED, ids=lambda r: r.name)
def test_the_pinned_version_is_the_one_that_runs(listed):
    assert importlib.metadata.version(listed.name).split("+")[0] == PINNED[canonicalize_name(listed.name)]


def test_constraints_hold_no_address():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|@|file:|--", text)


def test_environment_gives_the_interpreter_and_defers_to_both_files():
    names = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {"pip": ["-c constraints.txt", "-e .[dev]"]} in names
    python = next(n for n in names if isinstance(n, str) and n.startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.split("=")[1] + ".0")
    assert len(names) == 3  # python, pip and the pip section: nothing listed twice


def test_owner_packages_are_listed():
    owner = {
        "jupyterlab",
        "papermill",
        "torch",
        "timm",
        "openslide-python",
        "matplotlib",
        "seaborn",
        "umap-learn",
        "nbval",
    }
    assert owner <= {r.name for r in LISTED}


def test_every_import_is_listed():
    distributions = importlib.metadata.packages_distributions()
    used = set()
    for path in [*ROOT.glob("pathfm/**/*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                used.add(node.module.split(".")[0])
    local = {"pathfm", "conftest"} | {p.stem for folder in ("tests", "benchmarks") for p in ROOT.glob(f"{folder}/*.py")}
    outside = used - set(sys.stdlib_module_names) - local
    listed = {canonicalize_name(r.name) for r in LISTED}
    unlisted = {m for m in outside if not {canonicalize_name(d) for d in distributions.get(m, [m])} & listed}
    # pytest brings packaging, boto3 brings botocore, jupyterlab the others.
    assert unlisted <= {"packaging", "botocore", "IPython", "nbformat", "nbclient", "ipykernel"}


def test_the_readme_names_every_notebook_with_its_run_time():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert re.search(rf"\[{path.stem}\]\(notebooks/{path.name}\) \| .+ \| \d+ s \|", readme), path.stem
