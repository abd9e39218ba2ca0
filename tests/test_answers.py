"""Answers go through a file unchanged, and runs of a sweep are only put side by side where they fit."""

from dataclasses import replace

import pandas as pd
import pytest

from pathfm import answers
from pathfm.errors import InputError
from pathfm.scores import Prediction, paired


def predicted(name, said, seed=0, files=("a", "b", "c", "d")):
    tiles = pd.DataFrame({"file": files, "patient_id": ["p", "p", "q", "q"], "truth": ["x", "y", "x", "y"]})
    return Prediction(name, "linear", tiles.assign(predicted=said), seed)


TEACHER = predicted("teacher", ["x", "y", "x", "x"])
FLOOR = predicted("floor", ["x", "x", "x", "x"])


def test_predictions_survive_the_file(tmp_path):
    answers.write(tmp_path, [TEACHER, FLOOR])
    found = answers.read(answers.merged([tmp_path]))
    assert list(found) == ["teacher", "floor"]
    assert found["teacher"][0].balanced_accuracy == TEACHER.balanced_accuracy == 0.75
    assert paired(found["teacher"], found["floor"]) == paired(TEACHER, FLOOR)


def test_a_probe_that_was_fitted_several_times_keeps_the_score_of_its_fits(tmp_path):
    """Three fits, of which most are right about each tile: as one vote they would score 1 and beat themselves."""
    fits = replace(TEACHER, probe="eva-2026", table=TEACHER.table.assign(predicted=TEACHER.table["truth"], right=2 / 3))
    answers.write(tmp_path, [fits, FLOOR])
    found = answers.read(answers.merged([tmp_path]))
    assert found["teacher"][0].balanced_accuracy == fits.balanced_accuracy == pytest.approx(2 / 3)
    assert paired(found["teacher"], found["floor"]) == paired(fits, FLOOR)
    answers.write(tmp_path / "again", [fits, FLOOR])
    assert list(answers.read(answers.merged([tmp_path, tmp_path / "again"]))) == ["teacher", "floor"]


def test_seeds_of_a_sweep_stand_side_by_side_and_floors_once(tmp_path):
    for seed, said in enumerate((["x", "y", "x", "x"], ["x", "y", "x", "y"])):
        answers.write(tmp_path / str(seed), [predicted("teacher", said, seed), FLOOR])
    found = answers.read(answers.merged([tmp_path / "0", tmp_path / "1"]))
    assert [one.seed for one in found["teacher"]] == [0, 1]
    assert [one.balanced_accuracy for one in found["teacher"]] == [0.75, 1.0]
    assert len(found["floor"]) == 1


def test_runs_that_were_tested_on_other_tiles_or_differ_in_a_floor_are_refused(tmp_path):
    answers.write(tmp_path / "0", [FLOOR])
    answers.write(tmp_path / "1", [predicted("floor", ["y", "x", "x", "x"])])
    answers.write(tmp_path / "2", [predicted("teacher", ["x"] * 4, files=("a", "b", "c", "z"))])
    with pytest.raises(InputError, match="'floor.linear.0'"):
        answers.merged([tmp_path / "0", tmp_path / "1"])
    with pytest.raises(InputError, match="'file'"):
        answers.merged([tmp_path / "0", tmp_path / "2"])
    with pytest.raises(InputError, match="tested on different tiles"):
        answers.table([FLOOR, predicted("teacher", ["x"] * 4, files=("a", "b", "c", "z"))])


def test_without_a_folder_or_answers_there_is_nothing(tmp_path):
    answers.write("", [TEACHER])
    assert answers.merged([tmp_path]) is None
