"""The benchmark of pretraining at toy size: what it counts against closed forms, and that every part of it works."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

dino_peers, pretraining, online_patching = map(
    importlib.import_module, ("dino_peers", "pretraining", "online_patching")
)  # of benchmarks/, no package

TOY = {**pretraining.TOY, "global_px": 64, "local_px": 32}
TI = "vit_tiny_patch16_224"


def toy(batch=4, **fields):
    return pretraining.config_of("dino", TI, batch, **{**TOY, **fields})


def forward(px: int, depth: int, width: int, patch: int = 16) -> tuple[int, int]:
    """Operations of a ViT's blocks, and of its patch embedding, on one image."""
    patches = (px // patch) ** 2
    n = patches + 1
    return depth * (2 * 12 * n * width**2 + 2 * 2 * n**2 * width), 2 * patches * 3 * patch**2 * width


def test_operations_of_a_step_are_those_of_the_closed_form():
    """Backward is twice forward, but the images need no gradient; the teacher goes forward on global views only."""
    config, batch = toy(), 4
    (whole, stem), (part, small) = forward(64, 2, 32), forward(32, 2, 32)
    head = 2 * (32 * 32 + 32 * 32 + 32 * 16 + 16 * 64)
    student = 2 * (3 * whole + 2 * stem) + 2 * (3 * part + 2 * small) + 4 * 3 * head
    teacher = 2 * (whole + stem + head)
    assert pretraining.counted(config)["operations"] == batch * (student + teacher)


def test_bytes_grow_with_batch_views_and_ranks_as_they_must():
    one, two, halved = (pretraining.counted(toy(batch), ranks) for batch, ranks in ((4, 1), (8, 1), (8, 2)))
    model = pretraining.made(toy(), fused=False)
    learnt = sum(p.numel() for p in model.student.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    assert one["weights"] == 4 * (everything + 3 * learnt)
    assert two["weights"] == one["weights"] and halved == one
    assert two["operations"] == 2 * one["operations"]
    assert 1.9 * one["activations"] < two["activations"] <= 2 * one["activations"]
    fewer = pretraining.counted(toy(local_views=0))
    assert fewer["activations"] < one["activations"] and fewer["operations"] < one["operations"]


def test_dinov2_is_counted_with_its_masks():
    config = pretraining.config_of(
        "dinov2", "vit_large_patch14_reg4_dinov2", 4, **{**TOY, "global_px": 56, "local_px": 28}
    )
    need = pretraining.counted(config)
    without = pretraining.counted(config.replace(mask_ratio=(0.05, 0.1)))
    assert need["operations"] > without["operations"] > 0


@pytest.mark.parametrize("precision, off", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_plain_loop_does_what_ours_does(precision, off):
    """From the same weights, on the same views, both have the same loss; and both move."""
    config = toy(drop_path=0.0)
    torch.manual_seed(0)
    views, model = pretraining.views_of(config, 16), pretraining.made(config, fused=False)
    plain, own = (dino_peers.plain(config, False, precision, like=model), dino_peers.ours(config, model, precision))
    first = [float(step(views)) for step in (plain, own)]
    assert first[0] == pytest.approx(first[1], rel=off)
    assert all(float(step(views)) != loss for step, loss in zip((plain, own), first, strict=True))


def test_a_contender_is_timed_in_a_process_of_its_own():
    (spent,) = pretraining.alone(toy(), "pathfm", "float32", 1)
    assert 0 < spent < 60
    with pytest.raises(SystemExit, match="nobody in float32 ended with 1:(.|\n)*KeyError: 'nobody'"):
        pretraining.alone(toy(), "nobody", "float32", 1)  # a fault is no missing peer


def test_cpu_part_has_a_row_for_each_contender_and_says_how_ours_compares(monkeypatch):
    monkeypatch.setattr(pretraining, "alone", pretraining.stepped)
    without = {who: make for who, make in pretraining.CONTENDERS.items() if "lightly" not in who}
    monkeypatch.setattr(pretraining, "CONTENDERS", without)
    table, shares = pretraining.cpu([TI], 4, 1, 1, **TOY)
    ours = table[table["contender"] == "pathfm"].set_index("precision")
    others = table[(table["contender"] != "pathfm") & ~table["contender"].str.contains("kept")]
    others = others.groupby("precision")["images_per_s"].max()
    assert set(ours.index) == {"float32", "bfloat16"} and {"authors' loop"} <= set(table["contender"])
    assert np.allclose(ours["over_best_peer"], ours["images_per_s"] / others[ours.index])
    assert ours.loc["float32", "over_float32"] == 1
    assert np.allclose(table["images_per_s"], 4 / table["seconds"]) and table["of_products"].between(0, 1.5).all()
    assert np.allclose(shares.groupby("precision")["share"].sum(), 1) and "matrix products" in set(shares["kind"])


def test_growth_shows_model_crops_and_ranks(style):
    table = pretraining.growth(8, models=(TI, "vit_small_patch16_224"), measure=1, **TOY)
    ranks = table[table["axis"] == "ranks"].set_index("ranks")
    assert (ranks["activations"].diff().dropna() < 0).all() and ranks["weights"].nunique() == 1
    assert (
        ranks.loc[[2, 4, 8], "sharded"] < ranks.loc[[2, 4, 8], "weights"] + ranks.loc[[2, 4, 8], "activations"]
    ).all()
    assert table["seconds"].notna().sum() >= 2
    fig = pretraining.growth_figure(table)
    assert [ax.get_title(loc="left") for ax in fig.axes[:3]] == ["ViT", "local crops, ViT tiny", "ranks, ViT small"]


GPU_TOY = {**pretraining.TOY, "global_px": 112, "local_px": 112}  # patches of 16 and of 14 divide them


def test_gpu_part_works_on_a_cpu(monkeypatch):
    """Peers where there is one: DINO's; ours is compared with the better, row by row."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    table = pretraining.gpu("cpu", 1, ("pathfm", "pathfm, compiled", "authors' loop"), **GPU_TOY)
    assert table["model"].value_counts(sort=False).tolist() == [3, 3, 2]
    assert [name for _, name in pretraining.RECIPES] == list(table["model"].unique())
    assert (table["batch"] == 8).all() and (table["images_per_s"] > 0).all() and table["mfu"].isna().all()
    assert len(compiled) == 2 * 2 * len(pretraining.RECIPES) * 2  # networks, blocks, models, batches
    for _, rows in table.groupby("model"):
        ours, peers = (rows[rows["contender"].str.contains("pathfm") == mine] for mine in (True, False))
        want = ours["images_per_s"] / peers["images_per_s"].max()
        assert np.allclose(ours["over_best_peer"], want, equal_nan=True) and peers["over_best_peer"].isna().all()


def test_the_largest_batch_that_fits_is_found_up_to_2048(monkeypatch):
    """On a pretended GPU that holds 1,024 tiles of the smaller models, and 100 of the largest."""
    tried = []

    def pretended(device, config, who, repeats):
        tried.append(config.batch_size)
        if config.batch_size > (100 if "large" in config.model else 1500):
            raise torch.OutOfMemoryError
        return {"batch": config.batch_size, "images_per_s": 1.0}

    monkeypatch.setattr(pretraining, "_on", pretended)
    monkeypatch.setattr(pretraining.gc, "collect", int)
    table = pretraining.gpu("cuda")
    assert table["batch"].tolist() == [1024] * 8 + [64] * 2 and max(tried) == 2048
    assert list(table["contender"].unique()) == ["pathfm", "pathfm, compiled", "authors' loop", "lightly"]
    assert table["over_best_peer"].tolist()[:4] == pytest.approx([1, 1, np.nan, np.nan], nan_ok=True)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lightlys_step_is_dinos(precision):
    """Where lightly is installed: from our weights and on our views its loss is ours, and its next one another."""
    pytest.importorskip("lightly")
    config = toy(drop_path=0.0)
    torch.manual_seed(0)
    views, model = pretraining.views_of(config, 16), pretraining.made(config, fused=False)
    step, own = dino_peers.lightly(config, False, precision, like=model), dino_peers.ours(config, model, precision)
    first = float(step(views))
    assert first == pytest.approx(float(own(views)), rel={"float32": 1e-5, "bfloat16": 0.05}[precision])
    assert float(step(views)) != first


def test_a_run_fed_by_online_patching_says_how_long_it_waits(cohort, monkeypatch):
    monkeypatch.setattr(online_patching, "slide_path", lambda side: cohort.table["path"].iloc[0])
    row = pretraining.fed("cpu", 0, 0, 4, **TOY).iloc[0]
    assert 0 < row["data_wait"] < 1 and row["one_worker_tiles_per_s"] > 1 and row["images_per_s"] > 0
    assert row["workers_needed"] == pytest.approx(
        row["images_per_s"] / (1 - row["data_wait"]) / row["one_worker_tiles_per_s"]
    )
