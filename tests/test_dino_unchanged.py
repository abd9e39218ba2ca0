"""A tiny DINO run has the numbers that it had before DINOv2 stood beside it (commit 7eac72a61d), and old runs go on."""

import dataclasses

import pytest
from structured_tiles import StructuredTiles
from test_pretrain import tiny

from pathfm import checkpoint
from pathfm.config import PretrainConfig
from pathfm.pretrain import pretrain

PUBLISHED = [4.861006, 4.938231, 4.504198, 4.487299, 5.170051, 4.880026, 4.604934, 4.697626]
CHANGED = [2.720352, 2.627954, 0.479431, 0.413679, 0.346413, 0.330128, 0.365889, 0.336188]
FIELDS = {"koleo": 0.1, "stain": 0.5, "vertical_flip": 0.5, "head_norm": False, "norm_last_layer": False}


@pytest.mark.parametrize("fields, losses", [({}, PUBLISHED), (FIELDS, CHANGED)])
def test_a_tiny_run_has_the_losses_it_had(fields, losses, tmp_path):
    log = pretrain(tiny(watch_every=0, **fields), StructuredTiles(), folder=tmp_path).log
    assert log["loss"].tolist() == pytest.approx(losses, rel=2e-4, abs=2e-4)
    first = "step loss lr weight_decay momentum teacher_temperature koleo teacher_entropy prototype_entropy grad_norm"
    assert list(log)[:10] == first.split()


def test_a_run_from_before_a_setting_existed_goes_on_where_the_setting_has_its_default(tmp_path):
    config = tiny(watch_every=0)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, StructuredTiles(breaks_at=21), folder=tmp_path / "old")
    path, tensors, state = checkpoint.newest(tmp_path / "old")
    path.unlink()
    newer = {"method", "rotate", "crop", "translate_scale", "randstain_lab", "blur_sigma_um", "registers"}
    assert newer <= {field.name for field in dataclasses.fields(PretrainConfig)}
    kept = {name: value for name, value in state["config"].items() if name not in newer}
    checkpoint.save(tmp_path / "old" / "checkpoint.safetensors", tensors, {**state, "config": kept})
    old = pretrain(config, StructuredTiles(), folder=tmp_path / "old")
    new = pretrain(config, StructuredTiles(), folder=tmp_path / "new")
    assert (old.folder / "log.csv").read_bytes() == (new.folder / "log.csv").read_bytes()
