"""A run may die at any moment and goes on to the same numbers; what it cannot go on from, it names."""

import contextlib
import errno
import os
import random
import signal
import time
from pathlib import Path

import filelock
import pandas as pd
import processes
import pytest
import safetensors.torch
import torch
from structured_tiles import StructuredTiles
from test_pretrain import numbers, tiny

from pathfm import checkpoint, storage
from pathfm.__main__ import main
from pathfm.config import PretrainConfig
from pathfm.errors import InputError, Stopped
from pathfm.logbook import Logbook
from pathfm.pretrain import Run, pretrain


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """An uninterrupted tiny run, watched."""
    return pretrain(tiny(), StructuredTiles(), StructuredTiles(seed=1), tmp_path_factory.mktemp("whole"))


# Going on


@pytest.mark.parametrize("step", range(8))
def test_a_run_stopped_at_any_step_goes_on_to_the_same_bits(step, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(), StructuredTiles(breaks_at=4 * step + 1 + (step == 0) * 7), StructuredTiles(seed=1), tmp_path)
    run = pretrain(tiny(), StructuredTiles(), StructuredTiles(seed=1), tmp_path)
    assert numbers(run.folder) == numbers(whole.folder)
    if step >= 3:
        assert [s["from_step"] for s in run.params["sessions"]] == [0, step // 3 * 3]


def test_workers_change_no_number(whole, tmp_path):
    run = pretrain(tiny(workers=2), StructuredTiles(), StructuredTiles(seed=1), tmp_path)
    assert numbers(run.folder) == numbers(whole.folder)


@pytest.mark.parametrize("field, value", [("base_lr", 0.01), ("steps", 9), ("mpp", (0.5,)), ("seed", 4)])
def test_a_checkpoint_of_another_config_names_the_field(field, value, whole):
    with pytest.raises(InputError, match=rf"made with {field}=.*new folder"):
        pretrain(tiny(**{field: value}), StructuredTiles(), folder=whole.folder)


def test_a_checkpoint_of_another_stream_is_refused(whole):
    class Shifted(StructuredTiles):
        def __getitem__(self, i):
            return super().__getitem__(i + 1)

    with pytest.raises(InputError, match="another tile stream"):
        pretrain(tiny(), Shifted(), folder=whole.folder)


def test_a_checkpoint_of_another_precision_is_refused_while_steps_are_left(whole, tmp_path):
    _, tensors, state = checkpoint.newest(whole.folder)
    checkpoint.keep(tmp_path, tensors, {**state, "step": 5, "precision": "bfloat16"}, 1)
    with pytest.raises(InputError, match="made with precision='bfloat16', here it is 'float32'"):
        pretrain(tiny(), StructuredTiles(), folder=tmp_path)
    checkpoint.keep(tmp_path, tensors, {**state, "device": "cuda"}, 1)  # finished elsewhere
    assert pretrain(tiny(), StructuredTiles(), folder=tmp_path).teacher.exists()


# Killed, told to stop


def train(config: PretrainConfig, folder: Path, seconds: float = 0.0) -> None:
    """A run in a process of its own; a signal that it heeds is told by its exit status."""
    try:
        pretrain(config, StructuredTiles(seconds=seconds), StructuredTiles(seed=1), folder)
    except Stopped as stop:
        (folder / "said").write_text(str(stop))
        raise SystemExit(Stopped.STATUS) from None


def at_row(rows: int, folder: Path, running: list) -> None:
    """Waits until a run has logged that many steps."""
    log = folder / "log.csv"
    while not log.exists() or log.read_text().count("\n") < rows + 1:
        assert all(process.is_alive() for process in running)
        time.sleep(0.01)


DRAWN = random.Random(5).sample(range(1, 13), 4)


@pytest.mark.parametrize(
    "ranks, rows, more",
    [(1, DRAWN[0], {}), (1, DRAWN[1], {"workers": 2}), (2, DRAWN[2], {"workers": 1}), (2, DRAWN[3], {"shard": True})],
    ids=["one", "workers", "ranks", "shards"],
)
def test_a_run_killed_at_any_step_goes_on_to_the_same_bits(ranks, rows, more, tmp_path):
    """By kill -9, with workers, on two ranks, and where each holds half of the weights and moments; log.csv,
    watches.csv, weights and moments are those of a run left alone."""
    config = tiny(steps=14, **more)
    running = processes.started(ranks, train, config, tmp_path / "killed", 0.02)
    at_row(rows, tmp_path / "killed", running)
    for process in running:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert not (tmp_path / "killed" / "teacher").exists()
    assert processes.on_ranks(ranks, train, config, tmp_path / "killed") == [0] * ranks
    assert processes.on_ranks(ranks, train, config.replace(workers=0), tmp_path / "whole") == [0] * ranks
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert [one["from_step"] for one in Run(tmp_path / "killed").params["sessions"]][-1] > 0
    ends = [checkpoint.newest(tmp_path / name)[1] for name in ("killed", "whole")]
    assert ends[0].keys() == ends[1].keys() and any(name.startswith("optimiser/exp_avg_sq/") for name in ends[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_ends_a_run_after_its_step_and_loses_nothing(ranks, number, tmp_path):
    """Although only the last rank hears it, in the middle of a step, and no checkpoint is due."""
    config = tiny(steps=14, checkpoint_every=100, workers=1)
    running = processes.started(ranks, train, config, tmp_path / "stopped", 0.05)
    at_row(3, tmp_path / "stopped", running)
    os.kill(running[-1].pid, number)
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [Stopped.STATUS] * ranks
    step = checkpoint.newest(tmp_path / "stopped")[2]["step"]
    assert 3 <= step < 14 and len(Run(tmp_path / "stopped").log) == step
    said = (tmp_path / "stopped" / "said").read_text()
    assert f"saved after step {step} of 14; the same call goes on from there" in said
    assert processes.on_ranks(ranks, train, config, tmp_path / "stopped") == [0] * ranks
    assert processes.on_ranks(ranks, train, config, tmp_path / "whole") == [0] * ranks
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_a_stopped_run_is_told_to_the_shell_and_handlers_are_the_callers_again(monkeypatch, capsys, tmp_path):
    def stopped(*_):
        raise Stopped("SIGUSR1 came: saved")

    monkeypatch.setattr("pathfm.__main__.pretrain", stopped)
    assert main(["pretrain", "c.csv", "f"]) == 75 and "SIGUSR1 came: saved" in capsys.readouterr().err
    before = signal.getsignal(signal.SIGTERM)
    pretrain(tiny(steps=1, watch_every=0), StructuredTiles(), folder=tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_last_checkpoints_are_kept_and_a_damaged_one_is_passed_over(whole, tmp_path):
    assert [path.name[-9 - 12 : -12] for path in checkpoint.found(whole.folder)] == ["000000008", "000000006"]
    config = tiny(keep_checkpoints=3)
    pretrain(config, StructuredTiles(), StructuredTiles(seed=1), tmp_path)
    found = checkpoint.found(tmp_path)
    assert [path.name[-9 - 12 : -12] for path in found] == ["000000008", "000000006", "000000003"]
    damaged(found[0], "truncated")
    damaged(found[1], "one bit")
    with pytest.warns(UserWarning, match=r"000000008\.safetensors is damaged .* from checkpoint-000000003.*, step 3"):
        again = pretrain(config, StructuredTiles(), StructuredTiles(seed=1), tmp_path)
    assert [session["from_step"] for session in again.params["sessions"]] == [0, 3]
    assert numbers(tmp_path) == numbers(whole.folder)


def test_other_threads_or_ranks_are_said(whole, tmp_path):
    path, tensors, state = checkpoint.newest(whole.folder)
    assert (state["threads"], state["ranks"]) == (1, 1)
    checkpoint.keep(tmp_path, tensors, {**state, "step": 7, "ranks": 8}, 1)
    with pytest.warns(UserWarning, match="was made with ranks=8, here there are 1: the run goes on"):
        pretrain(tiny(), StructuredTiles(), folder=tmp_path)


# What cannot be gone on from


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "one bit":
        content[-1000] ^= 1
    elif how == "empty":
        content = b""
    elif how == "foreign":
        content = safetensors.torch.save({"w": torch.zeros(2)})
    elif how == "pickle":
        torch.save({"step": 3}, path)
        return
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "one bit", "empty", "foreign", "pickle"])
def test_a_damaged_checkpoint_is_named_and_never_unpickled(how, whole, tmp_path, monkeypatch):
    newest = checkpoint.found(whole.folder)[0]
    (tmp_path / newest.name).write_bytes(newest.read_bytes())
    damaged(tmp_path / newest.name, how)
    monkeypatch.setattr("pickle.Unpickler", None)
    with pytest.raises(InputError, match=r"checkpoint-000000008\.safetensors.*(damaged|not a checkpoint).*start over"):
        pretrain(tiny(), StructuredTiles(), folder=tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path, monkeypatch, whole):
    opened = []

    @contextlib.contextmanager
    def filling(path):
        with storage.atomic(path) as file:
            opened.append(path)
            if len(opened) == 2:
                file.write(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device")
            yield file

    monkeypatch.setattr(checkpoint, "atomic", filling)
    with pytest.raises(InputError, match=r"no space left while writing .*checkpoint"):
        pretrain(tiny(), StructuredTiles(), StructuredTiles(seed=1), tmp_path)
    assert checkpoint.newest(tmp_path)[2]["step"] == 3
    assert not list(tmp_path.glob(".*partial*"))
    monkeypatch.undo()
    pretrain(tiny(), StructuredTiles(), StructuredTiles(seed=1), tmp_path)
    assert numbers(tmp_path) == numbers(whole.folder)


def test_two_runs_in_one_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pathfm.pretrain.PATIENCE", 0.1)
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(InputError, match="another run is at work"):
        pretrain(tiny(), StructuredTiles(), folder=tmp_path)


def test_a_loss_that_is_no_number_stops_with_step_and_remedies(tmp_path):
    with pytest.raises(InputError, match=r"step \d+: loss .* lower base_lr .* precision='float32'"):
        pretrain(tiny(base_lr=1e30, warmup=0.0, checkpoint_every=1), StructuredTiles(), folder=tmp_path)
    _, tensors, _ = checkpoint.newest(tmp_path)
    assert Run(tmp_path).log["loss"].notna().all() and all(t.isfinite().all() for t in tensors.values())


def test_a_logbook_forgets_what_came_after_its_step(tmp_path):
    book = Logbook(tmp_path / "log.csv", 0)
    for step in range(1, 6):
        book.add({"step": step, "loss": 1 / 3 * step})
    book.close()
    with open(tmp_path / "log.csv", "a") as file:
        file.write("6,0.1")  # cut off in the middle
    Logbook(tmp_path / "log.csv", 3).close()
    log = pd.read_csv(tmp_path / "log.csv")
    assert log["step"].tolist() == [1, 2, 3] and log["loss"].tolist() == [1 / 3, 2 / 3, 1.0]


def test_a_full_disk_in_the_log_is_explained():
    book = Logbook.__new__(Logbook)
    book.path, book._empty = Path("/dev/full"), True
    book._file = open("/dev/full", "w")  # noqa: SIM115 (closing it fails too)
    with pytest.raises(InputError, match="no space left while writing /dev/full"):
        book.add({"step": 1, "loss": 0.5})
    with contextlib.suppress(OSError):
        book.close()
