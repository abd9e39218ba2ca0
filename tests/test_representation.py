"""Neighbours, maps and pictures of an embedding, on features whose structure is known."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch

from pathfm import SlideIndex, TileStream, panels, representation
from pathfm.benchmarks import TileSet
from pathfm.errors import InputError
from pathfm.export import Preprocess
from pathfm.synthetic import tiny_cohort


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    cohort = tiny_cohort(folder, n=4)
    return TileStream(SlideIndex.build(cohort, folder / "index", workers=0), tile_px=64, mpp=1.0)


def clusters(groups: int = 3, each: int = 20, seed: int = 0):
    """Features in tight directions, one a group, and the group of each row."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), each)
    return np.eye(groups)[group] + 0.01 * rng.normal(size=(len(group), groups)), group.astype(str)


def tile_set(**columns) -> TileSet:
    n = len(next(iter(columns.values())))
    return TileSet("made", pd.DataFrame({"file": map(str, range(n)), **columns}))


def test_neighbours_share_the_group_that_features_follow_and_no_other():
    x, group = clusters()
    other = np.tile(["a", "b"], 30)
    table = representation.neighbour_share(x, {"group": group, "other": other}, k=10).set_index("same")
    assert table.loc["group", "share"] == 1
    assert table.loc["group", "chance"] == pytest.approx(19 / 59)
    assert table.loc["other", "share"] == pytest.approx(table.loc["other", "chance"], abs=0.1)


def test_neighbours_of_one_patient_do_not_count():
    x, patient = clusters(groups=2)
    centre = np.array(["only"] * len(x))
    table = representation.neighbour_share(x, {"patient": patient, "centre": centre}, k=5, apart=patient)
    assert np.isnan(table.loc[0, "share"]) and table.loc[0, "n"] == 0
    assert table.loc[1, "share"] == 1 and table.loc[1, "chance"] == 1


def test_random_features_show_chance():
    rng = np.random.default_rng(0)
    group = rng.choice(["a", "b", "c"], 600)
    row = representation.neighbour_share(rng.normal(size=(600, 16)), {"group": group}, k=10).iloc[0]
    assert row["share"] == pytest.approx(row["chance"], abs=0.03)


def test_retrieval_takes_other_patients_and_says_when_there_are_none():
    x, group = clusters(groups=2, each=3)
    assert set(representation.retrieve(x, [0], k=2)[0]) == {1, 2}
    patient = np.array(["p", "p", "q", "p", "p", "p"])
    found = representation.retrieve(x, [0], k=3, patient=patient)[0]
    assert found[0] == 2 and (found[1:] == -1).all()


def test_groups_are_those_that_vary():
    tiles = tile_set(label=["a", "b"], slide_id=["s", "s"], centre=["x", "y"])
    assert list(representation.groups(tiles)) == ["class", "centre"]
    assert list(representation.groups(tile_set(label=["a", "a"], slide_id=["s", "s"]))) == ["slide"]


def test_examples_take_every_class_before_any_twice():
    tiles = tile_set(label=["a"] * 8 + ["b"] + ["c"])
    rows = representation.examples(tiles, 5)
    assert sorted(tiles.table["label"].iloc[rows[:3]]) == ["a", "b", "c"]
    assert len(set(rows)) == 5


def test_thinning_keeps_the_order_and_repeats():
    tiles = tile_set(label=["a", "b"] * 20)
    fewer = representation.thin(tiles, 10, seed=1)
    files = fewer.table["file"].astype(int)
    assert len(fewer) == 10 and files.is_monotonic_increasing
    assert fewer.table.equals(representation.thin(tiles, 10, seed=1).table)
    assert representation.thin(tiles, 100) is tiles


def test_the_map_keeps_clusters_apart_and_repeats():
    x, group = clusters(each=15)
    xy = representation.umap_map(x, seed=0)
    assert xy.shape == (45, 2)
    assert np.array_equal(xy, representation.umap_map(x, seed=0))
    nearest = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(nearest, np.inf)
    assert (group[nearest.argmin(axis=1)] == group).mean() > 0.9


def test_a_map_of_few_tiles_is_refused():
    with pytest.raises(InputError, match="at least 10"):
        representation.umap_map(np.zeros((9, 4)))


def test_one_colour_means_one_thing_in_all_images():
    tissue = np.random.default_rng(0).normal(size=(4, 8))
    which = np.arange(32).reshape(2, 4, 4) % 4
    colours, share = representation.token_colours(tissue[which])
    assert colours.shape == (2, 4, 4, 3) and colours.min() >= 0 and colours.max() <= 1
    assert share == pytest.approx(1)  # four points span three directions
    assert np.allclose(colours[0], colours[1])


def test_tiles_of_a_stream_are_its_tiles(stream):
    tiles = representation.tiles_of(stream, 9)
    assert len(tiles) == 9 and set(tiles.table["label"]) == {representation.UNLABELLED}
    assert np.array_equal(tiles.image(4), stream[4].image)
    fewer = tiles.subset([7, 2])
    assert np.array_equal(fewer.image(0), stream[7].image)
    assert list(tiles.table["slide_id"]) == [stream[i].slide_id for i in range(9)]
    assert tiles.patients is not None and "centre" in representation.groups(tiles)
    assert "class" not in representation.groups(tiles)


def test_positions_are_microns_whatever_the_slides_own_resolution(stream):
    tiles = representation.tiles_of(stream, 8)
    assert tiles.table["slide_mpp"].nunique() == 2
    assert tiles.xy_um.min() >= 0 and tiles.xy_um.max() < 600
    assert tile_set(label=["a", "b"]).xy_um is None


def test_confusion_shows_shares_of_the_truth():
    fig, ax = plt.subplots()
    panels.confusion(ax, ["a", "a", "a", "b"], ["a", "a", "b", "b"], ["a", "b"])
    assert np.allclose(ax.images[0].get_array(), [[200 / 3, 100 / 3], [0, 100]])
    assert [text.get_text() for text in ax.texts] == ["67", "33", "100"]
    plt.close(fig)


def test_a_sweep_shows_every_run_and_says_when_there_is_none():
    fig, axes = plt.subplots(1, 2)
    runs = pd.DataFrame({"mpp": ["1", "1", "0.5,1"], "init": ["random", "other", "random"], "score": [0.2, 0.3, 0.4]})
    panels.sweep_points(axes[0], runs, x="mpp", y="score", hue="init")
    drawn = np.concatenate([line.get_ydata() for line in axes[0].lines])
    assert sorted(drawn) == [0.2, 0.3, 0.4]
    panels.sweep_points(axes[1], pd.DataFrame(), x="mpp", y="score", hue="init")
    assert "not recorded" in axes[1].texts[0].get_text()
    plt.close(fig)


def test_embeddings_are_of_pixels_and_of_every_network(stream):
    tiles = representation.tiles_of(stream, 6)
    preprocess, small = Preprocess(64), {"img_size": 64, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 0}
    with_cls = timm.create_model("vit_tiny_patch16_224", **small).eval()
    without = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", **small).eval()
    found = representation.embed(tiles, {"cls": (with_cls, preprocess), "no cls": (without, preprocess)})
    assert list(found) == ["colour + LBP", "cls", "no cls"] and all(len(one.x) == 6 for one in found.values())
    with torch.inference_mode():
        tokens = {"cls": with_cls.forward_features(preprocess(tiles.pixels))[:, 0]}
        tokens["no cls"] = without.forward_features(preprocess(tiles.pixels)).mean(1)
    for name, expected in tokens.items():
        assert np.allclose(found[name].x, expected, atol=1e-4)


def test_a_map_for_every_embedding_and_grouping(style):
    rng, by = np.random.default_rng(0), {"class": np.array(list("aabb")), "block": np.array(list("xyxy"))}
    fig = panels.group_maps({name: rng.normal(size=(4, 2)) for name in ("one", "two")}, by)
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles == ["one\nby class", "one\nby block", "two\nby class", "two\nby block"]
    assert [ax.get_legend() is not None for ax in fig.axes] == [False, False, True, True]
    plt.close(fig)
