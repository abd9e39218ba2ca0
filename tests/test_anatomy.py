"""What notebook 03 shows of the methods: each drawing's numbers against the losses they stand for."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from structured_tiles import StructuredTiles
from test_dinov2 import tiny, views
from test_pretrain import tiny as tiny_dino

from pathfm import anatomy
from pathfm.augment import MultiCrop
from pathfm.dinov2 import DinoV2
from pathfm.losses import kde, koleo
from pathfm.schedules import schedule
from pathfm.vit import make_backbone


@pytest.mark.parametrize("fields", [{}, {"centring": "centre", "separate_head": False}])
def test_the_map_of_costs_has_the_ibot_loss_as_its_mean(fields, style):
    config = tiny(drop_path=0.0, **fields)
    torch.manual_seed(0)
    model = DinoV2(config).train()
    seen = views(model)
    seen = seen._replace(global_=seen.global_.float(), local=seen.local.float())
    now = schedule(config, 4)
    costs = anatomy.ibot_map(model, seen, now.teacher_temperature)
    assert costs.shape == (2, 4, 3, 3) and torch.equal(costs.flatten(2).isnan(), ~seen.masks)
    by_view = costs.flatten(2).nanmean(-1).nan_to_num(0)
    assert float(by_view.mean()) == pytest.approx(float(model(seen, now).log["ibot"]), rel=1e-5)
    assert model.training
    assert len(anatomy.ibot_figure(seen, costs, 3.0).axes) % 3 == 1  # rows of three, and a scale


def test_a_lopsided_teacher_under_each_treatment(style):
    p = anatomy.answers(anatomy.lopsided())
    assert all(torch.allclose(one.sum(1), torch.ones(64)) for one in p.values())
    shares = anatomy.answers_table(p)
    assert shares.loc["softmax"].min() > 0.97  # no opinion of any tile
    assert shares.loc["sharpened", "mean of batch"] < 0.5  # one answer for all
    assert (shares.loc[["centred too", "Sinkhorn"], "mean of batch"] > 0.95).all()
    assert (shares.loc[["centred too", "Sinkhorn"], "one tile"] < 0.7).all()
    many = anatomy.answers(anatomy.lopsided(), iterations=50)["Sinkhorn"]
    assert torch.allclose(many.mean(0), torch.full((8,), 1 / 8), atol=1e-4)
    assert len(anatomy.answers_figure(p).axes) == 8


@pytest.mark.parametrize("spreader", [koleo, kde])
def test_a_crowd_on_a_circle_spreads(spreader, style):
    path = anatomy.on_circle(spreader)
    start, end = anatomy.gaps(path[0]), anatomy.gaps(path[-1])
    assert start[0] < 0.3 and start[-1] > 5  # a crowd
    assert end[-1] < 0.5 * start[-1] and end.sum() == pytest.approx(12)
    assert len(anatomy.circle_figure({"it": path}).axes) == 2


def test_even_points_have_even_gaps():
    assert np.allclose(anatomy.gaps(np.linspace(0, 2 * np.pi, 7)[:-1] + 1.3), 1)


def test_views_of_both_methods_stand_under_one_another(style):
    by_method = {}
    for name, config, patch in (("DINO", tiny_dino(local_views=3), 0), ("DINOv2", tiny(), 14)):
        image = torch.as_tensor(StructuredTiles(config.tile_px)[0].image)[None].repeat(2, 1, 1, 1)
        by_method[name] = MultiCrop(config, patch)(image, torch.ones(2), torch.Generator().manual_seed(0))
    fig = anatomy.views_figure(by_method)
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert sum("DINO," in title for title in titles) == 5 and sum("DINOv2, local" in title for title in titles) == 2
    grey = [np.isclose(ax.get_images()[0].get_array(), 0.5).all(-1).mean() > 0.05 for ax in fig.axes if ax.get_images()]
    assert any(grey[5:]) and not any(grey[:5])  # DINOv2 hides something of the tile that is shown


def test_maps_have_a_row_a_tile_and_two_columns_a_network(style):
    torch.manual_seed(0)
    network = make_backbone("vit_small_patch16_224", "random", img_size=64, depth=2, width=32, heads=2)[0].eval()
    fig = anatomy.maps_figure({"before": network, "after": network}, torch.rand(3, 3, 64, 64) * 2 - 1)
    assert len(fig.axes) == 15 and fig.axes[1].get_images()[0].get_array().shape == (4, 4)


def run(spread: float, teacher: float, prototype: float):
    looks = pd.DataFrame(
        {"step": [0, 8], "teacher_entropy": [2.0, teacher], "prototype_entropy": [3.0, prototype]}
        | {"spread": [0.2, spread], "rankme": [8.0, 4.0], "knn": [0.4, 0.5]}
    )
    log = pd.DataFrame({"step": [1, 8], "loss": [3.0, 2.0], "koleo": [0.0, 0.0]})
    return SimpleNamespace(watches=looks, log=log, config=tiny_dino())


def test_tables_of_runs_say_what_the_watches_saw(style):
    runs = {"fine": run(0.4, 1.0, 2.0), "one answer": run(0.01, 0.0, 0.0), "alike": run(0.01, 2.0, 3.0)}
    table = anatomy.collapse_table(runs)
    assert table["verdict"].tolist() == [
        "healthy", "it gives every tile the same answer", "its features of all tiles are alike",
    ]  # fmt: skip
    assert table.loc["fine", "spread / first"] == 2 and table.loc["fine", "RankMe / first"] == 0.5
    both = anatomy.compared(runs)
    assert (
        both.loc["fine", "tiles"] == 32 and np.isnan(both.loc["fine", "ibot"]) and both.loc["fine", "knn, last"] == 0.5
    )
    assert [len(ax.lines) for ax in anatomy.collapse_figure(runs).axes] == [3, 3, 3]


def test_training_is_drawn_with_the_looks_that_there_are(style):
    one = run(0.4, 1.0, 2.0)
    one.log = one.log.assign(teacher_entropy=[2.0, 1.0], prototype_entropy=[2.0, 1.5])
    assert [len(ax.lines) for ax in anatomy.training_figure(one).axes] == [2, 2, 1]
    one.watches = pd.DataFrame()
    assert [len(ax.lines) for ax in anatomy.training_figure(one).axes] == [2, 2, 0]
