"""What nbval takes as the same output: one unit in the last digit is another processor, two are another result."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = "print('score {a}')\n'gain {b}, n {n}'"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.44 of 12", "0.43 of 12", True),
        ("a   0.05\nb -0.00", "a 0.04\nb  0.01", True),
        ("0.44", "0.46", False),
        ("0.44", "0.440", False),
        ("12 tiles", "13 tiles", False),  # whole numbers are counts
        ("better 0.44", "worse 0.44", False),
        ("0.44 0.50", "0.44", False),
        ("torch 2.13.0", "torch 2.12.0", False),  # a version
    ],
)
def test_decimals_one_unit_apart_are_alike_and_nothing_else(one, other, same):
    sys.path.insert(0, str(ROOT / "tests"))
    from nbval_digits import alike

    assert alike(one, other) is same is alike(other, one)


def test_nbval_lets_a_last_digit_pass_and_no_more(tmp_path):
    """Stored 0.44 and 0.3 with n = 5; each notebook prints its own."""
    cases = {"same": (0.43, 0.4, 5), "score": (0.46, 0.3, 5), "gain": (0.44, 0.1, 5), "count": (0.44, 0.3, 6)}
    for name, (a, b, n) in cases.items():
        cell = nbformat.v4.new_code_cell(CODE.format(a=a, b=b, n=n), execution_count=1)
        text = {"text/plain": "'gain 0.3, n 5'"}
        cell.outputs = [
            nbformat.v4.new_output("stream", name="stdout", text="score 0.44\n"),
            nbformat.v4.new_output("execute_result", text, execution_count=1),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "tests.nbval_digits", "--nbval", "--nbval-current-env", "-q", "-c"]
    done = subprocess.run(
        [*command, os.devnull, "--rootdir", str(tmp_path), str(tmp_path), "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    failed = {line.split("::")[0].split("/")[-1] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {"score.ipynb", "gain.ipynb", "count.ipynb"}, done.stdout + done.stderr
