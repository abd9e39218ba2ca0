"""Notebooks are run with parameters that were checked first; runs, sweeps and the command line say what went wrong."""

import json
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
import yaml

from pathfm import InputError, runs, storage, sweeps
from pathfm.__main__ import main


def write_notebook(
    path, *cells, parameters="steps: int = 3  # steps\nrate: float = 0.5  # per step\nrun: str = ''  # folder"
):
    first = nbformat.v4.new_code_cell(parameters)
    first.metadata["tags"] = ["parameters"]
    book = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)
    return path


def last_text(path):
    return nbformat.read(path, as_version=4).cells[-1].outputs[0]["text"]


@pytest.fixture
def book(tmp_path):
    begin = "from pathfm import runs; runs.begin(r'{}', globals())".format(tmp_path / "book.ipynb")
    return write_notebook(tmp_path / "book.ipynb", begin, "print(steps, rate)")


def test_parameters_reach_the_notebook(book, tmp_path):
    out = runs.execute(book, tmp_path / "out" / "book.ipynb", {"steps": 7, "rate": 1})
    assert last_text(out) == "7 1\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 5}, "no parameter 'stepz'. Did you mean 'steps'"),
        ({"steps": "five"}, "parameter 'steps' is 'five'; give a value of type int"),
        ({"steps": True}, "parameter 'steps' is True"),
        ({"rate": "0.1"}, "give a value of type float"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(book, tmp_path, given, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        runs.execute(book, tmp_path / "out.ipynb", given)
    assert not (tmp_path / "out.ipynb").exists()


def test_papermill_by_hand_is_refused_too_inside_the_notebook(book, tmp_path):
    command = [sys.executable, "-m", "papermill", str(book), str(tmp_path / "out.ipynb"), "-p", "stepz", "5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "no parameter 'stepz'. Did you mean 'steps'?" in done.stderr


def test_a_failing_cell_is_named_and_the_notebook_kept(tmp_path):
    book = write_notebook(tmp_path / "bad.ipynb", "1 / 0")
    with pytest.raises(InputError, match="bad stopped: ZeroDivisionError"):
        runs.execute(book, tmp_path / "out.ipynb")
    assert (tmp_path / "out.ipynb").exists()


def sweep_file(tmp_path, notebook, grid):
    path = tmp_path / "toy.yaml"
    spec = {
        "question": "q",
        "primary_contrast": "steps",
        "notebook": str(notebook),
        "base": {"rate": 0.25},
        "grid": grid,
    }
    path.write_text(yaml.safe_dump(spec))
    return path


def test_a_sweep_runs_its_grid_once_and_resumes(tmp_path):
    record = "from pathfm import runs; runs.record(run, score=steps * rate)"
    book = write_notebook(tmp_path / "toy.ipynb", record)
    spec = sweep_file(tmp_path, book, {"steps": [1, 2]})
    table = sweeps.sweep(spec, tmp_path / "points", workers=1)
    pd.testing.assert_frame_equal(table[["steps", "score"]], pd.DataFrame({"steps": [1, 2], "score": [0.25, 0.5]}))
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "points").glob("*/metrics.json")}
    assert len(made) == 2
    next(iter(made)).unlink()
    again = sweeps.sweep(spec, tmp_path / "points", workers=1)
    pd.testing.assert_frame_equal(table[["steps", "score"]], again[["steps", "score"]])
    kept = [p for p, when in made.items() if p.stat().st_mtime_ns == when]
    assert len(kept) == 1, "only the missing point ran again"
    assert {"point.json", "notebook.ipynb"} <= {p.name for p in kept[0].parent.iterdir()}


def test_a_point_whose_notebook_stopped_after_its_metrics_runs_again(tmp_path):
    cells = [
        "from pathfm import runs; runs.record(run, score=1)",
        "import pathlib; assert pathlib.Path(r'{}').exists()",
    ]
    flag = tmp_path / "flag"
    book = write_notebook(tmp_path / "toy.ipynb", cells[0], cells[1].format(flag))
    spec = sweep_file(tmp_path, book, {"steps": [1]})
    with pytest.raises(InputError, match="1 of 1 points stopped"):
        sweeps.sweep(spec, tmp_path / "points", workers=1)
    flag.touch()
    assert sweeps.sweep(spec, tmp_path / "points", workers=1)["commit"].notna().all()


def test_a_changed_notebook_is_another_point(tmp_path):
    first = write_notebook(tmp_path / "toy.ipynb", "1")
    name = sweeps._identity(str(first), {"steps": 1})
    assert sweeps._identity(str(first), {"steps": 1}) == name
    write_notebook(tmp_path / "toy.ipynb", "2")
    assert sweeps._identity(str(first), {"steps": 1}) != name


def test_cells_may_be_run_again_in_a_live_kernel(book):
    namespace = {"steps": 3, "rate": 0.5, "run": ""}
    runs.begin(str(book), namespace)
    runs.begin(str(book), {**namespace, "seen": 12, "steps": 5})
    with pytest.raises(InputError, match="no parameter 'seen'"):
        runs.begin(str(book), {"seen": 12})


def test_a_sweep_refuses_a_parameter_that_the_notebook_lacks(tmp_path):
    book = write_notebook(tmp_path / "toy.ipynb", "1")
    with pytest.raises(InputError, match="no parameter 'depth'"):
        sweeps.sweep(sweep_file(tmp_path, book, {"depth": [1]}), tmp_path / "points")
    assert not (tmp_path / "points").exists()


def test_a_sweep_reports_the_point_that_stopped_and_keeps_the_others(tmp_path):
    cell = "from pathfm import runs\nassert steps != 2, 'two is odd'\nruns.record(run, score=steps)"
    book = write_notebook(tmp_path / "toy.ipynb", cell)
    with pytest.raises(InputError, match="1 of 2 points stopped(.|\n)*two is odd"):
        sweeps.sweep(sweep_file(tmp_path, book, {"steps": [1, 2]}), tmp_path / "points", workers=1)
    assert len(list((tmp_path / "points").glob("*/metrics.json"))) == 1


def test_an_unknown_sweep_offers_the_nearest():
    with pytest.raises(InputError, match="no sweep 'nothing'"):
        sweeps.read_sweep("nothing")


def test_every_sweep_in_the_repository_is_valid():
    for path in (runs.notebooks_dir().parent / "sweeps").glob("*.yaml"):
        spec = sweeps.read_sweep(path)
        for point in sweeps.sweep_points(spec):
            runs.check_parameters(spec["notebook"], {**spec["base"], **point})


def test_provenance_names_commit_device_date_and_generator():
    facts = runs.provenance()
    assert {"commit", "date", "device", "threads", "versions", "generator"} <= facts.keys()
    json.dumps(facts)


def test_import_is_instant_and_brings_no_torch():
    code = "import sys, time; t = time.perf_counter(); import pathfm; s = time.perf_counter() - t; "
    code += "print(s, 'torch' in sys.modules, 'pandas' in sys.modules)"
    seconds = []
    for _ in range(3):
        printed = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        assert printed[1:] == ["False", "False"]
        seconds.append(float(printed[0]))
    assert min(seconds) < 1


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    assert main(["index", "nowhere.csv"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pathfm: ")
    assert "nowhere.csv" in error
    assert error.count("\n") == 1


def test_every_verb_explains_itself(capsys):
    for verb in ("run", "notebook", "sweep", "cohort", "index", "embed", "probe", "store", "pretrain"):
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0
    assert "--batch-size" in capsys.readouterr().out


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "kept.json"
    storage.write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), storage.atomic(target, "w") as file:
        file.write("half")
        raise RuntimeError
    assert storage.read_json(target) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(InputError, match="no space left while writing .*new.json"):
        storage.write_json(tmp_path / "new.json", {})
    assert list(tmp_path.iterdir()) == []


def test_progress_is_silent_where_output_is_stored(monkeypatch, capsys):
    monkeypatch.setenv("PATHFM_PROGRESS", "0")
    assert list(storage.progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PATHFM_PROGRESS", "1")
    for _ in storage.progress(range(2), desc="slides"):
        time.sleep(0.01)
    assert "slides" in capsys.readouterr().err


def test_a_sweep_over_seeds_alone_collects_the_answers(tmp_path):
    said = (
        "from pathfm import answers, runs, scores; import pandas as pd\n"
        "tiles = pd.DataFrame({'file': ['a', 'b'], 'truth': ['x', 'y'], 'predicted': ['x', 'x']})\n"
        "answers.write(run, [scores.Prediction('teacher', 'linear', tiles, seed)]); runs.record(run, score=1)"
    )
    parameters = "seed: int = 0\nrun: str = ''\nrate: float = 0.5"
    book = write_notebook(tmp_path / "toy.ipynb", said, parameters=parameters)
    table = sweeps.sweep(sweep_file(tmp_path, book, {"seed": [0, 1]}), tmp_path / "seeds", workers=1)
    assert list(table.attrs["answers"]["answers"]) == ["file", "truth", "teacher|linear|0", "teacher|linear|1"]
    table = sweeps.sweep(sweep_file(tmp_path, book, {"rate": [0.1]}), tmp_path / "rates", workers=1)
    assert "answers" not in table.attrs
