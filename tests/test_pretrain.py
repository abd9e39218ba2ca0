import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from structured_tiles import StructuredTiles

from pathfm import checkpoint
from pathfm.augment import MultiCrop
from pathfm.config import PretrainConfig
from pathfm.dino import Dino, clip_gradients
from pathfm.errors import InputError
from pathfm.export import load
from pathfm.feed import batches
from pathfm.pretrain import Run, pretrain
from pathfm.schedules import cosine, schedule
from pathfm.training import Training, key
from pathfm.watches import Watch

TINY = {
    "mpp": (1.0, 2.0), "tile_px": 36, "global_px": 32, "local_px": 16, "local_views": 2, "init": "random",
    "depth": 2, "width": 32, "heads": 2, "drop_path": 0.2, "prototypes": 32, "head_hidden": 32, "head_bottleneck": 16,
    "head_norm": True, "momentum": 0.9, "steps": 8, "batch_size": 4, "base_lr": 0.064, "precision": "float32",
    "device": "cpu", "threads": 1, "checkpoint_every": 3, "watch_every": 4, "watch_tiles": 40,
}  # fmt: skip


def tiny(**fields) -> PretrainConfig:
    return PretrainConfig.of(**{**TINY, **fields})


def numbers(folder: Path) -> tuple[bytes, bytes, bytes]:
    """Everything a run must repeat bit for bit."""
    return tuple((folder / name).read_bytes() for name in ("log.csv", "watches.csv", "teacher/model.safetensors"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """An uninterrupted tiny run, watched."""
    return pretrain(tiny(), StructuredTiles(), StructuredTiles(seed=1), tmp_path_factory.mktemp("whole"))


# What is asked for


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"global_px": 40}, "40 px is no multiple of the patch of 16 px; take 32 or 48"),
        ({"local_px": 24}, "local_px 24 px is no multiple"),
        ({"tile_px": 64}, "tiles are 36 px, but tile_px=64"),
        ({"model": "vit_smal_patch16_224"}, "Did you mean 'vit_small_patch16_224'"),
        ({"device": "mps" if not torch.backends.mps.is_available() else "cuda"}, "not on this machine"),
    ],
)
def test_a_config_that_does_not_fit_stops_before_training(fields, message, tmp_path):
    with pytest.raises(InputError, match=message):
        pretrain(tiny(**fields), StructuredTiles(), folder=tmp_path)
    assert not (tmp_path / "log.csv").exists()


@pytest.mark.parametrize("length, message", [(3, "fewer than a batch"), (31, "fewer than 8 steps")])
def test_a_stream_with_too_few_tiles_says_how_many(length, message, tmp_path):
    with pytest.raises(InputError, match=f"{length} tiles, {message}"):
        pretrain(tiny(), StructuredTiles(length=length), folder=tmp_path)


# Schedules, averages, groups


def test_schedules_equal_the_authors_code():
    """np.linspace warm-up, then half a cosine, as utils.cosine_scheduler of facebookresearch/dino."""
    steps, warmup = 100, 10
    iters = np.arange(steps - warmup)
    want = np.concatenate(
        [np.linspace(0, 5e-4, warmup), 1e-6 + 0.5 * (5e-4 - 1e-6) * (1 + np.cos(np.pi * iters / len(iters)))]
    )
    assert [cosine(s, steps, 5e-4, 1e-6, warmup) for s in range(steps)] == pytest.approx(want.tolist(), rel=1e-12)


def test_schedule_of_a_run():
    config = tiny(steps=100, momentum=0.9, warmup=0.1, freeze_last_layer=0.03, temperature_warmup=0.2,
                  teacher_temperature_start=0.04, teacher_temperature=0.07)  # fmt: skip
    first, middle, last = (schedule(config, step) for step in (0, 50, 99))
    assert (first.lr, first.weight_decay, first.momentum) == pytest.approx((0, 0.04, 0.9))
    assert max(schedule(config, s).lr for s in range(100)) == pytest.approx(config.lr)
    assert middle.weight_decay == pytest.approx(0.22) and middle.momentum == pytest.approx(0.95)
    assert last.momentum == pytest.approx(1 - 0.05 * (1 + math.cos(math.pi * 0.99)))
    assert [schedule(config, s).freeze_last_layer for s in range(5)] == [True, True, True, False, False]
    warm = np.linspace(0.04, 0.07, 20).tolist()
    assert [schedule(config, s).teacher_temperature for s in range(20)] == pytest.approx(warm)
    assert last.teacher_temperature == 0.07


def one_step(training: Training, step: int) -> dict[str, float]:
    batch = next(iter(batches(StructuredTiles(), training.config, 0)))
    return training._one(step, batch, MultiCrop(training.config))[0]


def test_teacher_is_the_moving_average_of_the_student_and_starts_equal(tmp_path):
    training = Training(tiny(), [], tmp_path)
    teacher, student = training.model.teacher.state_dict(), training.model.student.state_dict()
    assert all(torch.equal(teacher[name], student[name]) for name in teacher)
    name = "backbone.blocks.0.attn.qkv.weight"
    want = teacher[name].double().clone()
    for step in range(4):
        row = one_step(training, step)
        after = training.model.student.state_dict()[name].double()
        want = row["momentum"] * want + (1 - row["momentum"]) * after
    assert torch.allclose(training.model.teacher.state_dict()[name].double(), want, atol=1e-7)
    assert not any(p.requires_grad for p in training.model.teacher.parameters())


def test_no_weight_decay_on_biases_and_norms():
    model = Dino(tiny(norm_last_layer=False))
    decayed, bare = model.groups()
    bare_ids = {id(p) for p in bare["params"]}
    for name, p in model.student.named_parameters():
        assert (id(p) in bare_ids) == (name.endswith("bias") or "norm" in name or p.ndim == 1), name
    assert bare["weight_decay"] == 0 and "weight_decay" not in decayed
    assert len(decayed["params"]) + len(bare["params"]) == len(list(model.student.parameters()))


def test_gradients_are_clipped_parameter_by_parameter():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(5)) for _ in range(3)]
    for p, size in zip(parameters, (0.1, 2.0, 50.0), strict=True):
        p.grad = torch.randn(5) * size
    before = [p.grad.clone() for p in parameters]
    norm = clip_gradients(parameters, 3.0)
    assert norm == pytest.approx(torch.cat(before).norm().item())
    for p, was in zip(parameters, before, strict=True):
        assert torch.allclose(p.grad, was * min(1, 3.0 / (was.norm() + 1e-6)))


def test_prototypes_stand_still_as_long_as_they_are_frozen(tmp_path):
    config = tiny(freeze_last_layer=3 / 8, warmup=0.0)
    training = Training(config, [], tmp_path)
    layer = training.model.student.head.last_layer.direction
    start, moved = layer.detach().clone(), []
    for step in range(5):
        one_step(training, step)
        moved.append(not torch.equal(layer, start))
    assert moved == [False, False, False, True, True]
    assert torch.equal(training.model.student.head.last_layer.length, torch.ones(32, 1))


def test_only_the_student_drops_blocks():
    model = Dino(tiny(drop_path=0.5)).train()
    rates = {who: {getattr(m, "drop_prob", 0.0) for m in part.modules()} for who, part in model.named_children()}
    assert rates["student"] == {0.0, 0.5} and rates["teacher"] == {0.0}


def test_every_step_has_its_own_randomness():
    seeds = {key(seed, purpose, step) for seed in range(3) for purpose in range(3) for step in range(200)}
    assert len(seeds) == 3 * 3 * 200 and key(1, 2, 3) == key(1, 2, 3)


# A run


def test_a_run_tells_its_story(whole):
    assert whole.log["step"].tolist() == list(range(1, 9))
    told = {"loss", "lr", "weight_decay", "momentum", "teacher_entropy", "grad_norm", "tiles_per_s", "data_wait"}
    assert told <= set(whole.log) and whole.log.notna().all().all()
    assert whole.log["teacher_entropy"].between(0, math.log(32)).all()
    assert whole.log["mpp_global"].between(0.6, 2.3).all() and whole.log["mpp_local"].between(0.4, 3.0).all()
    assert whole.watches["step"].tolist() == [0, 4, 8]
    assert {"teacher_entropy", "rankme", "n", "d", "odcorr", "odcorr_floor"} <= set(whole.watches)
    params = whole.params
    assert params["init"] == "random weights" and params["config"]["width"] == 32
    assert (params["device"], params["precision"], params["attention"]) == ("cpu", "float32", "plain")
    assert params["sessions"][0]["from_step"] == 0 and "commit" in params["sessions"][0]
    assert {row["view"] for row in params["scales"]} == {"global", "local"}


def test_the_exported_teacher_is_the_checkpoints(whole):
    path, tensors, state = checkpoint.newest(whole.folder)
    assert state["step"] == 8 and path.name == "checkpoint-000000008.safetensors"
    for name, value in whole.backbone.state_dict().items():
        assert torch.equal(value, tensors[f"teacher.backbone.{name}"])
    x = torch.rand(2, 3, 32, 32)
    theirs = timm.create_model(f"local-dir:{whole.teacher}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(theirs(x), load(whole.teacher)[0](x))


def test_a_finished_run_is_returned_as_it_is(whole):
    before = [path.stat().st_mtime_ns for path in checkpoint.found(whole.folder)]
    again = pretrain(tiny(), StructuredTiles(), folder=whole.folder)
    assert [path.stat().st_mtime_ns for path in checkpoint.found(whole.folder)] == before
    pd.testing.assert_frame_equal(again.log, whole.log)


def test_without_a_folder_the_cache_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path))
    runs = [pretrain(tiny(steps=1, seed=seed), StructuredTiles()) for seed in (0, 1, 0)]
    assert runs[0].folder == runs[2].folder != runs[1].folder and runs[0].folder.is_relative_to(tmp_path)


def test_another_seed_is_another_run_and_the_callers_generator_is_left_alone(whole, tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    other = pretrain(tiny(seed=1), StructuredTiles(), folder=tmp_path)
    assert torch.equal(torch.rand(3), wanted)
    assert (other.log["loss"] - whole.log["loss"]).abs().min() > 0


def test_bfloat16_follows_float32(whole, tmp_path):
    half = pretrain(tiny(precision="bfloat16", watch_every=0), StructuredTiles(), folder=tmp_path)
    assert half.params["precision"] == "bfloat16"
    assert (half.log["loss"] - whole.log["loss"]).abs().max() < 0.2
    assert load(half.teacher)[0].cls_token.dtype == torch.float32


def test_structured_tiles_bring_the_loss_below_that_of_no_opinion(tmp_path):
    config = tiny(steps=100, batch_size=16, base_lr=0.016, momentum=0.95, drop_path=0.0, watch_every=0)
    log = pretrain(config, StructuredTiles(), folder=tmp_path).log
    assert log["loss"].tail(10).mean() < math.log(32) - 0.3
    assert log["prototype_entropy"].tail(10).mean() > 0.5  # more than one prototype is in use


# Streams


class Slides(StructuredTiles):
    """With the attributes of a TileStream."""

    min_tissue = 0.4
    weights: ClassVar = {1.0: 0.5, 2.0: 0.5}
    slides = pd.DataFrame({"slide_id": ["s0", "s1"], "patient_id": ["p0", "p1"], "centre": ["A", "B"]})
    mixture = pd.DataFrame({"mpp": [1.0, 2.0], "declared": 0.5, "achieved": 0.5})


def test_the_record_tells_what_the_stream_was(tmp_path):
    told = pretrain(tiny(steps=1), Slides(), folder=tmp_path).params["stream"]
    assert (told["slides"], told["patients"], told["centres"]) == (2, 2, ["A", "B"])
    assert told["mixture"][1] == {"mpp": 2.0, "declared": 0.5, "achieved": 0.5}
    assert len(told["first_tiles"]) == 8 and "Tiles" in (tmp_path / "teacher" / "README.md").read_text()


@pytest.mark.parametrize("fields, message", [({"mpp": (1.0,)}, "tiles at 2 mpp"), ({"min_tissue": 0.6}, "is 0.4, but")])
def test_a_stream_of_other_settings_is_refused(fields, message, tmp_path):
    with pytest.raises(InputError, match=message):
        pretrain(tiny(**fields), Slides(), folder=tmp_path)


def test_a_patient_is_never_both_trained_on_and_watched(tmp_path):
    watched = Tiles(tmp_path)
    watched.table["patient_id"] = np.where(watched.table["role"] == "validate", "p1", "p0")
    with pytest.raises(InputError, match="patient 'p1' is both"):
        pretrain(tiny(), Slides(), watched, tmp_path / "run")


def test_tiles_without_a_scale_leave_the_log_without_one(tmp_path):
    class Timeless(StructuredTiles):
        def __getitem__(self, i):
            return super().__getitem__(i)._replace(mpp=math.nan)

    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(watch_every=0), Timeless(breaks_at=21), folder=tmp_path)
    log = pretrain(tiny(watch_every=0), Timeless(), folder=tmp_path).log
    assert len(log) == 8 and log["mpp_global"].isna().all() and log["loss"].notna().all()


# Watches


class Tiles:
    """Enough of a TileSet: images of structured tiles with labels and roles."""

    def __init__(self, folder: Path, roles: tuple[str, ...] = ("probe-train", "validate", "test")):
        rows = []
        for i in range(60):
            tile = StructuredTiles(seed=2)[i]
            Image.fromarray(tile.image).save(folder / f"{i}.png")
            rows.append({"path": str(folder / f"{i}.png"), "label": tile.slide_id, "role": roles[i % len(roles)]})
        self.table = pd.DataFrame(rows)


def test_a_watch_looks_at_validate_and_compares_with_probe_train_only(tmp_path):
    tiles = Tiles(tmp_path)
    for path in tiles.table.loc[tiles.table["role"] == "test", "path"]:
        Path(path).unlink()  # a watch that read test tiles would fail
    watch = Watch.of(tiles, 100)
    assert len(watch.images) == len(watch.bank) == 20
    assert Watch.of(tiles, 7).images.shape == (7, 36, 36, 3)
    with pytest.raises(InputError, match="none of role 'validate'"):
        Watch.of(Tiles(tmp_path, ("probe-train", "test")), 100)


def test_a_watch_changes_nothing_and_knows_collapse(tmp_path):
    pytest.importorskip("pathfm.probe")
    config = tiny()
    torch.manual_seed(0)
    model, watch = Dino(config).train(), Watch.of(Tiles(tmp_path), 100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    healthy = watch.look(model, config)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert 0 <= healthy["knn"] <= 1 and healthy["n"] == 20 and healthy["d"] == 32
    torch.nn.init.zeros_(model.teacher.backbone.norm.weight)
    torch.nn.init.normal_(model.teacher.backbone.norm.bias)
    collapsed = watch.look(model, config)
    assert collapsed["rankme"] == pytest.approx(1, abs=0.01) and healthy["rankme"] > 2
    assert collapsed["constants"] == 32
