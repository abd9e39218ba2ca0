"""Compiled functions are made anew when a function that they call has changed in another file."""

import subprocess
import sys

import pytest

from pathfm import kernels

CALLEE = "from pathfm.kernels import kernel\n\n@kernel()\ndef inner(x):\n    return x + {}\n"
CALLER = (
    "from callee import inner\nfrom pathfm.kernels import kernel\n\n@kernel()\ndef outer(x):\n    return inner(x)\n"
)
ASK = (
    "import pathlib, pathfm.kernels as k; k.HERE = pathlib.Path('.').resolve(); from caller import outer; print("
    "outer(1), sum(outer.stats.cache_hits.values()))"
)


def asked(folder) -> list[str]:
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join([str(folder), str(kernels.HERE.parent)])}
    done = subprocess.run([sys.executable, "-c", ASK], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_change_of_what_a_kernel_calls_is_seen(tmp_path):
    (tmp_path / "caller.py").write_text(CALLER)
    (tmp_path / "callee.py").write_text(CALLEE.format(1))
    assert asked(tmp_path) == ["2", "0"]  # compiled
    assert asked(tmp_path) == ["2", "1"]  # read from the disk
    (tmp_path / "callee.py").write_text(CALLEE.format(5))
    assert asked(tmp_path) == ["6", "0"]  # numba alone would say 2: caller.py is as it was
    assert len(list((tmp_path / "__pycache__").glob("kernels-*"))) == 2


def test_every_module_with_kernels_counts_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "HERE", tmp_path)
    (tmp_path / "a.py").write_text("from pathfm.kernels import kernel\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    found = []
    for name, text in (("b.py", "x = 2\n"), ("a.py", "from pathfm.kernels import kernel\n\n"), ("b.py", "x = 3\n")):
        kernels.folder.cache_clear()
        found.append(kernels.folder())
        (tmp_path / name).write_text(text)
    kernels.folder.cache_clear()
    assert found[0] == found[1] != found[2] == kernels.folder()
    monkeypatch.setattr(kernels.numba.config, "CACHE_DIR", str(tmp_path / "mine"))
    kernels.folder.cache_clear()
    assert kernels.folder().parent == tmp_path / "mine"
    kernels.folder.cache_clear()


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not made read-only there")
def test_code_that_cannot_be_written_to_still_runs(tmp_path):
    (tmp_path / "caller.py").write_text(CALLER)
    (tmp_path / "callee.py").write_text(CALLEE.format(1))
    (tmp_path / "__pycache__").write_text("no folder can be made here, by root either")
    assert asked(tmp_path) == ["2", "0"]
