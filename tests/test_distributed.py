"""Two processes, or parts of a batch one after the other, are one process with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from structured_tiles import StructuredTiles
from test_dinov2 import TINY as TINY_V2
from test_pretrain import TINY

import pathfm
from pathfm import checkpoint, logbook, training
from pathfm.augment import Views
from pathfm.config import make_config
from pathfm.dino import Dino
from pathfm.dinov2 import DinoV2
from pathfm.pretrain import Run, pretrain

STAINS = {"stain_transfer": 0.5, "randstain": 0.5, "rotate": True, "stain": 0.2}
DINO = {**TINY, **STAINS, "batch_size": 8, "steps": 3, "koleo": 0.1, "watch_every": 0}
SINKHORN = {**TINY_V2, "batch_size": 8, "steps": 3, "stain_transfer": 0.5, "kde": 0.1, "watch_every": 0}
CENTRE = {**SINKHORN, "centring": "centre", "separate_head": False}


class Double:
    """A method in float64, in which sums do not depend on their order to any digit that is looked at."""

    def __init__(self, config):
        super().__init__(config)
        self.double()

    def forward(self, views: Views, now):
        return super().forward(views._replace(global_=views.global_.double(), local=views.local.double()), now)


class DoubleDino(Double, Dino):
    pass


class DoubleDinoV2(Double, DinoV2):
    pass


def train(fields: dict, folder: Path, exact: bool = True) -> None:
    if exact:
        training.METHODS = {"dino": DoubleDino, "dinov2": DoubleDinoV2}
    config = make_config(**fields)
    pretrain(config, StructuredTiles(config.tile_px), StructuredTiles(config.tile_px, seed=1), folder)


def assert_same_log(folder: Path, wanted: Path, but: tuple[str, ...] = (), off: float = 1e-5) -> None:
    """Every number of two runs' log.csv, `but` some, to `off`."""
    log, want = (logbook.read(of / "log.csv").drop(columns=list(but), errors="ignore") for of in (folder, wanted))
    assert list(log) == list(want) and len(log) == len(want)
    assert ((log - want).abs() <= off * want.abs().clip(lower=1)).all().all()


def assert_same(folder: Path, wanted: Path, but: tuple[str, ...] = ()) -> None:
    """Of two runs: every number of log.csv `but` some to 1e-5, and all weights, moments and centres to 1e-5 of their
    size."""
    assert_same_log(folder, wanted, but)
    tensors, expected = (checkpoint.newest(of)[1] for of in (folder, wanted))
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        # A bias before BatchNorm has no gradient but rounding, which AdamW moves it by a little.
        least = 1e-12 if name.startswith("optimiser/") else 1e-7
        assert (tensors[name].double() - value).norm() <= 1e-5 * value.double().norm() + least, name


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Runs of one process, each made once."""
    made = {}

    def run(fields: dict) -> Path:
        name = repr(sorted(fields.items()))
        if name not in made:
            made[name] = tmp_path_factory.mktemp("one")
            assert processes.on_ranks(1, train, fields, made[name]) == [0]
        return made[name]

    return run


@pytest.mark.parametrize(
    "fields, more",
    [
        (DINO, {}),
        (SINKHORN, {}),
        (CENTRE, {}),
        (DINO, {"shard": True}),
        (SINKHORN, {"shard": True, "checkpoint_activations": True}),
    ],
    ids=["dino", "sinkhorn", "centre", "dino-shard", "sinkhorn-shard"],
)
def test_two_processes_are_one(fields, more, one, tmp_path):
    """With BatchNorm in the head, stochastic depth, colours of other tiles and laws of them, KoLeo or KDE, masks."""
    assert processes.on_ranks(2, train, {**fields, **more}, tmp_path) == [0, 0]
    assert_same(tmp_path, one(fields))
    assert Run(tmp_path).params["sessions"][0]["ranks"] == 2
    assert (tmp_path / "teacher" / "model.safetensors").exists()


@pytest.mark.parametrize("fields", [DINO, SINKHORN], ids=["dino", "sinkhorn"])
def test_two_processes_are_one_in_float32_as_far_as_it_rounds(fields, tmp_path):
    """As runs are made: log and AdamW's moments, each as a whole, to 1e-4, the teacher to 1e-3, the student to 1e-2.

    Not tensor by tensor: AdamW takes its first steps by the sign of a gradient, also of one that is nothing but
    rounding, as those of attention's key biases and of biases before BatchNorm.
    """
    bounds = {"student.": 1e-2, "teacher.": 1e-3, "optimiser/exp_avg/": 1e-4, "optimiser/exp_avg_sq/": 1e-4}
    for ranks in (1, 2):
        assert processes.on_ranks(ranks, train, fields, tmp_path / str(ranks), False) == [0] * ranks
    assert_same_log(tmp_path / "2", tmp_path / "1", off=1e-4)
    two, one = (checkpoint.newest(tmp_path / ranks)[1] for ranks in ("2", "1"))
    for part, off in bounds.items():
        names = [name for name in one if name.startswith(part) and one[name].is_floating_point()]
        found, want = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (two, one))
        assert want.dtype == torch.float32 and (found - want).norm() <= off * want.norm(), part


# Of a part alone: BatchNorm, Sinkhorn, KoLeo, KDE. All else is that of the whole batch.
APART = {"koleo": 0.0, "kde": 0.0, "head_norm": False}


@pytest.mark.parametrize("fields, ranks, parts", [(DINO, 1, 4), (CENTRE, 2, 2)], ids=["dino", "two-ranks"])
def test_a_batch_in_parts_is_the_batch(fields, ranks, parts, one, tmp_path):
    """Drops, masks, colours and centres included; entropies in the log are means over parts."""
    fields = {name: value for name, value in {**fields, **APART}.items() if name != "kde" or "kde" in fields}
    assert processes.on_ranks(ranks, train, {**fields, "accumulate": parts}, tmp_path) == [0] * ranks
    assert_same(tmp_path, one(fields), but=("prototype_entropy", "patch_entropy"))


def test_torchrun_trains_from_a_shell(cohort, tmp_path):
    """Rank 0 alone prints and writes."""
    cohort.table.to_csv(tmp_path / "cohort.csv", index=False)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pathfm", "pretrain"]
    told = ["cohort.csv", "run", "--recipe", "smoke", "--steps", "2", "--watch-every", "0", "--local-views", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATHFM_CACHE": str(tmp_path / "cache"),
                   "PYTHONPATH": str(Path(pathfm.__file__).parents[1])}  # fmt: skip

    command = [sys.executable, *launcher, *told, "--batch-size", "4"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines().count("run/teacher") == 1
    assert Run(tmp_path / "run").log["step"].tolist() == [1, 2]
    assert Run(tmp_path / "run").params["sessions"][0]["ranks"] == 2
