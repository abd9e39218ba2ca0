"""Jobs in other processes: a worker killed, a scheduler gone, a cluster that lacks a module, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from processes import heeding_ctrl_c
from slide_files import cohort_of, tissue_pixels, write_slide

from pathfm import Cohort, InputError, SlideIndex, jobs, scan
from pathfm import index as index_module
from pathfm.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


def dask(*arguments: str) -> subprocess.Popen:
    """A Dask process of its own, as on another machine: it shares no memory and no working folder with the test."""
    command = [sys.executable, "-m", "dask", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    return subprocess.Popen(command, env=env, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Cluster:
    """A scheduler, and workers without a nanny: one that is killed stays dead."""

    def __init__(self, folder: Path):
        file = folder / "scheduler.json"
        self.scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        while not (file.is_file() and file.read_text()):
            time.sleep(0.05)
        self.address, self.workers = json.loads(file.read_text())["address"], []

    def start_worker(self) -> None:
        self.workers.append(dask("worker", "--no-nanny", "--nthreads", "1", "--no-dashboard", self.address))

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Ten slides and one that is none."""
    folder = tmp_path_factory.mktemp("slides")
    paths = {f"s{k}": write_slide(folder / f"s{k}.tiff", tissue_pixels(seed=k), 0.5, (1, 4)) for k in range(10)}
    (folder / "none.svs").write_text("no slide")
    return paths | {"none": folder / "none.svs"}


@pytest.fixture
def by_value():
    """Functions of this file travel to workers, which cannot import it."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def same(one: SlideIndex, other: SlideIndex) -> bool:
    """Table, masks, and where every compressed tile lies."""
    arrays = zip((one.words, *one.tiles), (other.words, *other.tiles), strict=True)
    return one.slides.equals(other.slides) and all(np.array_equal(a, b) for a, b in arrays)


def test_an_index_is_whole_and_equal_though_a_worker_is_killed_in_the_middle(slides, cluster, tmp_path, monkeypatch):
    """The workers write nothing: what they find comes back through Dask, and this process keeps it."""
    alone = SlideIndex.build(cohort_of(slides), tmp_path / "alone", workers=0)
    cluster.start_worker()
    cluster.start_worker()
    keep, kept = index_module._keep, []

    def kill_after_the_second(parts, name, found):
        kept.append(name)
        if len(kept) == 2:
            cluster.workers[0].send_signal(signal.SIGKILL)
            cluster.workers[0].wait()
        return keep(parts, name, found)

    monkeypatch.setattr(index_module, "_keep", kill_after_the_second)
    together = SlideIndex.build(cohort_of(slides), tmp_path / "together", scheduler=cluster.address)
    assert cluster.workers[0].returncode == -signal.SIGKILL
    assert len(kept) == len(slides) - 1  # each slide once
    assert same(alone, together)
    assert list(together.quarantined["slide_id"]) == ["none"]


def test_the_command_line_indexes_on_a_cluster(slides, cluster, tmp_path, capsys):
    cluster.start_worker()
    csv, folder = cohort_of(slides).write(tmp_path / "cohort.csv"), tmp_path / "index"
    assert main(["index", str(csv), "--folder", str(folder), "--scheduler", cluster.address]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert same(SlideIndex.open(folder), SlideIndex.build(Cohort.read(csv), tmp_path / "alone", workers=0))
    assert main(["index", str(csv), "--scheduler", cluster.address, "--workers", "2"]) == 2
    assert "give one of them" in capsys.readouterr().err


def crash_or_double(k: int) -> int:
    if k == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return 2 * k


@pytest.mark.parametrize("workers", [2, 3])
def test_only_the_job_that_crashes_its_process_counts_as_crashed(workers, by_value):
    found = dict(jobs.run(crash_or_double, {str(k): (k,) for k in range(8)}, lambda k: f"{k} crashed", workers))
    assert found == {str(k): 2 * k for k in range(8) if k != 3} | {"3": "3 crashed"}


def wait_or_tell(k: int, file: str) -> int:
    """The first job lasts until the last one has been done."""
    if k == 0:
        while not Path(file).exists():
            time.sleep(0.01)
    if k == 4:
        Path(file).touch()
    return 2 * k


@pytest.mark.parametrize("in_order", [False, True])
def test_results_come_as_they_finish_or_in_the_order_of_the_jobs(in_order, by_value, tmp_path):
    todo = {f"job {k}": (k, str(tmp_path / "told")) for k in range(5)}
    found = list(jobs.run(wait_or_tell, todo, str, workers=2, in_order=in_order))
    assert sorted(found) == [(f"job {k}", 2 * k) for k in range(5)]
    assert (found[0][0] == "job 0") == in_order
    assert found == sorted(found) or not in_order
    alone = jobs.run(crash_or_double, {"a": (1,), "b": (2,)}, str, in_order=True)
    assert list(alone) == [("a", 2), ("b", 4)]


def test_a_crashed_job_keeps_its_place_in_the_order(by_value):
    todo = {str(k): (k,) for k in range(5)}
    found = list(jobs.run(crash_or_double, todo, lambda k: f"{k} crashed", workers=2, in_order=True))
    assert found == [("0", 0), ("1", 2), ("2", 4), ("3", "3 crashed"), ("4", 8)]


def fail(k: int) -> int:
    raise InputError(f"job {k} says no")


def test_what_a_job_raises_is_raised_here(by_value):
    for workers in (0, 2):
        with pytest.raises(InputError, match="job 0 says no"):
            list(jobs.run(fail, {"0": (0,)}, str, workers=workers))
        with pytest.raises(InputError, match="job . says no"):
            list(jobs.run(fail, {"0": (0,), "1": (1,)}, str, workers=workers))


def test_a_worker_without_the_module_is_named_and_lives_on(cluster):
    """This file cannot be imported there: an error here, not the end of somebody's cluster."""
    cluster.start_worker()
    with pytest.raises(InputError, match=rf"a worker of {cluster.address} cannot import test_jobs; install"):
        list(jobs.run(crash_or_double, {"1": (1,)}, str, scheduler=cluster.address))
    assert list(jobs.run(len, {"a": ("four",)}, str, scheduler=cluster.address)) == [("a", 4)]
    assert cluster.workers[0].poll() is None


def test_a_scheduler_that_ends_is_named_and_what_is_finished_is_kept(slides, cluster, tmp_path, monkeypatch):
    cluster.start_worker()
    keep = index_module._keep

    def end(parts, name, found):
        cluster.scheduler.kill()
        return keep(parts, name, found)

    monkeypatch.setattr(index_module, "_keep", end)
    monkeypatch.setattr(jobs, "POLL_S", 0.5)
    with pytest.raises(InputError, match=rf"the scheduler {cluster.address} is gone.*what is finished is kept"):
        SlideIndex.build(cohort_of(slides), tmp_path / "index", scheduler=cluster.address)
    assert len(list((tmp_path / "index" / "parts").glob("*.npz"))) >= 1


def test_a_scheduler_without_workers_is_waited_for_and_then_named(cluster, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "POLL_S", 0.2)
    monkeypatch.setattr(jobs, "PATIENCE_S", 1)
    with pytest.raises(InputError, match=rf"had no worker for 1 s; start some with 'dask worker {cluster.address}'"):
        list(jobs.run(len, {"a": ("four",)}, str, scheduler=cluster.address))
    assert f"{cluster.address} has no worker now; waiting" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "no address", "smoke://signal"])
def test_an_address_without_a_scheduler(address, slides, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "CONNECT_S", 1)
    with pytest.raises(InputError, match=f"no Dask scheduler answers at {address}.*such as tcp://host:8786"):
        SlideIndex.build(cohort_of(slides), tmp_path / "index", scheduler=address)


def test_workers_are_of_this_machine_or_of_the_cluster(slides, tmp_path):
    with pytest.raises(InputError, match=r"workers=2 .* scheduler=tcp://a:1 .*give one of them"):
        SlideIndex.build(cohort_of(slides), tmp_path / "index", workers=2, scheduler="tcp://a:1")


def test_a_worker_of_another_version_is_refused(slides):
    with pytest.raises(InputError, match="a worker makes indexes of version .*install the same pathfm"):
        scan.scan_or_reason(str(slides["s0"]), None, False, "part", scan.VERSION + 1)


SLOW = """
import sys, time
from pathfm import index
keep = index._keep
def slowly(*part):
    kept = keep(*part)
    time.sleep(0.3)
    return kept
index._keep = slowly
from pathfm.__main__ import main
sys.exit(main(["index", {csv!r}, "--folder", {folder!r}, "--workers", "{workers}"]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(workers, slides, tmp_path):
    """As a terminal does, the signal goes to the whole process group."""
    csv, folder = cohort_of(slides).write(tmp_path / "cohort.csv"), tmp_path / "index"
    script = SLOW.format(csv=str(csv), folder=str(folder), workers=workers)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=env,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=heeding_ctrl_c,
    )
    while not list(folder.glob("parts/[!.]*.npz")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, error
    assert error.splitlines() == ["pathfm: interrupted; what is finished is kept, the same command goes on from here"]
    assert not (folder / "index.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("parts/*")}
    assert 0 < len(kept) < len(slides)
    assert len(SlideIndex.build(cohort_of(slides), folder, workers=0).usable) == 10
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
