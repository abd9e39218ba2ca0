"""What ends one of two processes ends both, alike; the checkpoints stay whole, and the run goes on from there."""

import contextlib
import errno
import os
import re
import signal
from pathlib import Path

import filelock
import processes
import pytest
import torch
from structured_tiles import StructuredTiles
from test_pretrain import numbers, tiny

from pathfm import checkpoint, ranks, storage, training
from pathfm import pretrain as pretraining
from pathfm.dino import Dino
from pathfm.errors import InputError, Stopped
from pathfm.pretrain import pretrain
from pathfm.watches import Watch

CONFIG = tiny(checkpoint_every=2, watch_every=2, on_collapse="stop", head_norm=False)
WRONG = 3


class Unreadable(StructuredTiles):
    """Its tiles from the fourth step on cannot be read."""

    def __getitem__(self, i):
        if i >= 3 * CONFIG.batch_size:
            raise InputError(f"tile {i} cannot be read")
        return super().__getitem__(i)


class Failing(Dino):
    """From the fourth step on: a loss that is no number, memory that is full, an error of our own."""

    how, passes = "", 0

    def forward(self, views, now):
        type(self).passes += 1
        if self.passes > 3 and self.how == "memory":
            torch.empty(2**60, dtype=torch.uint8)
        if self.passes > 3 and self.how == "error":
            raise KeyError("of ours")
        outcome = super().forward(views, now)
        return outcome._replace(loss=outcome.loss * float("nan")) if self.passes > 3 and self.how == "nan" else outcome


def full(*_):
    raise InputError("no space left while writing it")


@contextlib.contextmanager
def filling(path):
    with storage.atomic(path) as file:
        yield file
        if "000000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")


def looking(self, *_, look=Watch.look):
    os.kill(os.getpid(), signal.SIGTERM)
    return look(self, *_)


def train(folder: Path, what: str = "", on: int = 0) -> None:
    """A run in which `what` happens to one rank; what it raises, each rank tells in a file and by its exit status."""
    stream, rank = StructuredTiles(), ranks.rank()
    pretraining.PATIENCE = 0.1
    if rank == on and what in ("nan", "memory", "error"):
        Failing.how, training.METHODS = what, {"dino": Failing}
    elif rank == on and what == "tile":
        stream = Unreadable()
    elif what == "collapse":
        training.collapsed = lambda first, seen, config: "it collapses" if seen["spread"] != first["spread"] else ""
    elif what == "disk":
        checkpoint.atomic = filling
    elif what == "log":
        training.Training._log = full
    elif what == "export":
        training.export = full
    elif what == "watch":
        Watch.of = full
    elif what == "signal":
        Watch.look = looking
    try:
        pretrain(CONFIG, stream, StructuredTiles(seed=1), folder)
    except Stopped:
        raise SystemExit(Stopped.STATUS) from None
    except Exception as error:
        (folder / f"said-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(WRONG) from None


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two ranks to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    assert processes.on_ranks(2, train, folder) == [0, 0]
    return folder


@pytest.mark.parametrize(
    "what, on, message, step",
    [
        ("collapse", 0, "InputError: step 2: it collapses. on_collapse='warn' would go on", None),
        ("nan", 1, "InputError: step 4: loss nan and gradient norm nan .* lower base_lr", 2),
        ("memory", 1, r"InputError: out of memory with 2 tiles at once .*2 ranks\)\. Take", 2),
        ("memory", 0, r"InputError: out of memory with 2 tiles at once .*2 ranks\)\. Take", 2),
        ("tile", 1, "InputError: tile 14 cannot be read", 2),
        ("disk", 0, "InputError: no space left while writing .*checkpoint-000000004", 2),
        ("log", 0, "InputError: no space left", None),
        ("watch", 0, "InputError: no space left", None),
        ("export", 0, "InputError: no space left", 8),
    ],
)
def test_what_ends_one_rank_ends_both_alike(what, on, message, step, whole, tmp_path):
    assert processes.on_ranks(2, train, tmp_path, what, on) == [WRONG, WRONG]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert re.match(message, said[0])
    newest = checkpoint.newest(tmp_path)
    assert (newest and newest[2]["step"]) == step
    if step is not None:  # there is something to go on from
        assert processes.on_ranks(2, train, tmp_path) == [0, 0]
        assert numbers(tmp_path) == numbers(whole)


def test_another_ranks_own_error_is_told_as_its(tmp_path):
    assert processes.on_ranks(2, train, tmp_path, "error", 1) == [WRONG, WRONG]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said == ["Elsewhere: another rank: KeyError: 'of ours'", "KeyError: 'of ours'"]


def test_a_folder_that_another_run_holds_is_refused_by_all_ranks(tmp_path):
    with filelock.FileLock(tmp_path / ".lock"):
        assert processes.on_ranks(2, train, tmp_path) == [WRONG, WRONG]
    said = {(tmp_path / f"said-{rank}").read_text() for rank in range(2)}
    assert len(said) == 1 and "another run is at work in" in said.pop()


def test_a_signal_to_one_rank_while_it_watches_alone_stops_both_after_their_step(whole, tmp_path):
    """Before the first step; the others wait for the look to end."""
    assert processes.on_ranks(2, train, tmp_path, "signal") == [Stopped.STATUS] * 2
    assert checkpoint.newest(tmp_path)[2]["step"] == 1
    assert processes.on_ranks(2, train, tmp_path) == [0, 0]
    assert numbers(tmp_path) == numbers(whole)
