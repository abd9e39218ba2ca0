"""The benchmarks of online patching and of indexing run, at toy size."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from pathfm import Slide, reading

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
indexing, online_patching = map(importlib.import_module, ("indexing", "online_patching"))


def test_a_slide_is_scanned_near_and_far_away(cohort):
    path = Path(cohort.table["path"].iloc[0])
    found = indexing.timed(indexing.whole, path, 1)
    assert found["CPU ms"] > 0 and found["requests"] > 1
    assert found["waiting s"] > indexing.LATENCY  # requests that follow on one another


def test_one_thread_and_two_read_the_batches_of_a_stream(cohort, monkeypatch):
    slide = next(one for one in map(Slide.open, cohort.table["path"]) if one.mpp == online_patching.SLIDE_MPP)
    rng = np.random.default_rng(0)
    batches = [
        online_patching.jobs(slide, online_patching.corners_of(slide, 0.5, "any", 4, rng), 0.5)
        for _ in range(online_patching.BATCHES)
    ]
    begun, begin = [], reading.begin
    monkeypatch.setattr(reading, "begin", lambda jobs, threads: begun.append(threads) or begin(jobs, threads))
    ours, bare = online_patching.side_by_side(batches)
    assert ours > 0 and bare > 0
    assert [begun.count(threads) for threads in (1, 2)] == [2 * len(batches)] * 2  # each batch once a turn
    floor = online_patching.floor(slide, batches[0])
    assert floor.parts > 0 and floor.whole > 0 and floor.touched >= 4 and 0 < floor.share < 1


def test_a_part_takes_the_place_of_its_forerunner_and_of_no_other(tmp_path):
    def written(part, cpu, commit):
        table = online_patching.tidy(part, pd.DataFrame({"asked": [0.5], "cpu": [cpu]}), ["asked"])
        online_patching.write(tmp_path / "found.csv", table, {"commit": commit})
        return pd.read_csv(tmp_path / "found.csv")[["part", "value", "commit"]].values.tolist()

    assert written("views", 1.25, "a") == [["views", 1.25, "a"]]
    assert written("rates", 3.0, "b") == [["rates", 3.0, "b"], ["views", 1.25, "a"]]
    assert written("rates", 4.0, "c") == [["rates", 4.0, "c"], ["views", 1.25, "a"]]
