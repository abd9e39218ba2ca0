"""The stored notebooks are executed, thin, clean, and hold something that nbval compares."""

import ast
import json
import re
from pathlib import Path

import pytest

from pathfm import InputError, runs

ROOT = Path(__file__).resolve().parent.parent
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [
    "00_quickstart",
    "01_data_exploration",
    "02_online_patching",
    "03_pretraining",
    "04_ablations",
    "05_probing",
    "06_representation",
    "07_paper_figures",
]
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}


def faults(book: dict) -> list[str]:
    """What keeps a stored notebook from guarding anything or from being read."""
    code = [c for c in book["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c["outputs"]]
    compared = [c for c in code if c["outputs"] and not UNCOMPARED & set(c["metadata"].get("tags", []))]
    tables = [o for c in compared for o in c["outputs"] if "text/plain" in o.get("data", {}) or o.get("text")]
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    lines = sum(len("".join(c["source"]).splitlines()) for c in code)
    text = json.dumps(outputs)
    found = {
        "a code cell was not executed": any(c["execution_count"] is None for c in code),
        "a cell shows an error": any(o["output_type"] == "error" for o in outputs),
        "a warning or log is stored": any(o.get("name") == "stderr" for o in outputs),
        "nothing that nbval compares": not tables,
        "not exactly one cell tagged parameters": len(tagged) != 1,
        "over 1.5 MB": len(json.dumps(book)) > 1_500_000,
        f"{lines} lines of code, over 200": lines > 200,
        "an absolute path is stored": bool(re.search(r"(?<![\w.:/])/(?:root|home|tmp|work|usr|opt)/\w", text)),
    }
    return [name for name, wrong in found.items() if wrong]


def test_the_study_is_complete_and_in_order():
    assert [p.stem for p in BOOKS] == NAMES


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_a_stored_notebook_has_no_fault(path):
    assert faults(json.loads(path.read_text())) == []


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_every_parameter_is_typed_and_explained(path):
    book = json.loads(path.read_text())
    cell = next(c for c in book["cells"] if "parameters" in c["metadata"].get("tags", []))
    source = "".join(cell["source"])
    names = [node.target.id for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)]
    assert names == list(runs.declared_parameters(path))
    assert all("#" in line for line in source.splitlines() if line.strip()), "each parameter says its unit or meaning"


def _book(**cell):
    base = {
        "cell_type": "code",
        "execution_count": 1,
        "metadata": {"tags": ["parameters"]},
        "outputs": [],
        "source": "a: int = 1",
    }
    table = {"output_type": "execute_result", "data": {"text/plain": ["1"]}, "metadata": {}, "execution_count": 2}
    shown = {"cell_type": "code", "execution_count": 2, "metadata": {}, "outputs": [table], "source": "1"}
    return {"cells": [base, {**shown, **cell}]}


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ({}, None),
        ({"execution_count": None}, "a code cell was not executed"),
        ({"outputs": [{"output_type": "error", "ename": "E"}]}, "a cell shows an error"),
        ({"outputs": []}, "nothing that nbval compares"),
        ({"metadata": {"tags": ["nbval-ignore-output"]}}, "nothing that nbval compares"),
        ({"source": "x\n" * 201}, "202 lines of code, over 200"),
        (
            {"outputs": [{"output_type": "stream", "name": "stdout", "text": "/home/me/x"}]},
            "an absolute path is stored",
        ),
        ({"outputs": [{"output_type": "stream", "name": "stderr", "text": "warn"}]}, "a warning or log is stored"),
        ({"source": "x" * 1_600_000}, "over 1.5 MB"),
    ],
)
def test_each_fault_is_noticed(cell, fault):
    found = faults(_book(**cell))
    assert (fault in found) if fault else found == []


def test_profiles_name_existing_notebooks_and_declared_parameters():
    for notebooks in runs.profiles().values():
        for name, parameters in notebooks.items():
            runs.check_parameters(name, parameters or {})


def test_an_unknown_profile_is_named_with_the_known_ones():
    with pytest.raises(InputError, match="no profile 'smok'. Did you mean 'smoke'"):
        runs.run_study("smok")
