"""Panels show the numbers that they are given, where they belong."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from pathfm import figures, panels
from pathfm.representation import StreamTiles
from pathfm.scores import Prediction

pytestmark = pytest.mark.usefixtures("style")


def test_leaks_stand_beside_each_other_a_place_a_split():
    rows = [
        ("colour mean and spread", "tile", 0.7, 0.01),
        ("colour mean and spread", "patient", 0.6, 0.05),
        ("pretrained (both)", "tile", 0.8, 0.02),
        ("pretrained (both)", "patient", 0.5, np.nan),
    ]
    leaks = pd.DataFrame(rows, columns=["features", "split", "balanced_accuracy", "spread"])
    ax = panels.leakage(plt.subplots()[1], leaks, chance=0.125)
    points = [container.lines[0] for container in ax.containers]
    assert [line.get_ydata().tolist() for line in points] == [[0.7, 0.6], [0.8, 0.5]]
    assert np.allclose([line.get_xdata() for line in points], [[-0.08, 0.92], [0.08, 1.08]])
    assert points[1].get_color() == figures.METHOD_COLOURS["pretrained"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["tile\n(patients leak)", "patient"]


def test_shots_show_every_features_with_the_spread_of_its_episodes():
    table = pd.DataFrame({"shots": [1, 2, 4], "balanced_accuracy": [0.3, 0.4, 0.5], "low": 0.2, "high": 0.6})
    other = table.assign(balanced_accuracy=0.45, low=0.4, high=0.5)
    shots = pd.concat({"random weights (mean)": table, "pretrained (cls)": other}, names=["features"]).reset_index(0)
    ax = panels.few_shot(plt.subplots()[1], shots, chance=0.125)
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["random weights (mean)"].get_xdata().tolist() == [1, 2, 4]
    assert lines["pretrained (cls)"].get_ydata().tolist() == 3 * [0.45]
    assert set(lines["chance"].get_ydata()) == {0.125}
    bands = [band.get_paths()[0].get_extents() for band in ax.collections]
    assert np.allclose([(band.y0, band.y1) for band in bands], [(0.2, 0.6), (0.4, 0.5)])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4"]


def test_recorded_answers_are_shown_place_by_place():
    table = pd.DataFrame({"file": list("abcd"), "truth": list("xyxy"), "patient_id": list("pqrs")})
    right, half = (table.assign(predicted=list(said)) for said in ("xyxy", "xxxx"))
    two_seeds = [Prediction("teacher", "linear", right, seed) for seed in (0, 1)]
    said = {"teacher": two_seeds, "oracle": [Prediction("oracle", "forest", half)]}
    _, axes = plt.subplots(1, 2)
    panels.recorded(axes, {"here": said, "there": {"oracle": said["oracle"]}}, chance=0.5)
    assert [ax.get_title("left") for ax in axes] == ["here (dashed: chance)", "there (dashed: chance)"]
    assert [[label.get_text() for label in ax.get_yticklabels()] for ax in axes] == [
        ["oracle", "teacher, linear"],
        ["oracle"],
    ]
    dots = {line.get_xdata()[0]: line.get_markerfacecolor() for line in axes[0].lines if line.get_marker() == "o"}
    assert dots == {0.5: "white", 1.0: figures.METHOD_COLOURS["teacher"]}


def test_each_embedding_has_a_block_beside_the_query():
    table = pd.DataFrame({"file": list("abcd"), "label": list("xxyy"), "centre": list("1212"), "row": range(4)})
    pixels = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    tiles = StreamTiles("made", table.assign(mpp=0.5, slide_id="s"), pixels=pixels)
    found = {"colour + LBP": np.array([[1, 2], [3, -1]]), "pretrained": np.array([[2, 3], [0, 1]])}
    fig = panels.retrievals(tiles, np.array([0, 2]), found)
    blocks = [np.array(part.axes).reshape(2, -1) for part in fig.subfigs]
    assert [part.get_suptitle() for part in fig.subfigs] == ["query", "colour + LBP", "pretrained"]
    axes = np.concatenate(blocks, axis=1)
    shown = [[int(ax.images[0].get_array().max()) if ax.images else -1 for ax in line] for line in axes]
    assert shown == [[0, 1, 2, 2, 3], [2, 3, -1, 0, 1]]
    frames = [to_hex(ax.spines["left"].get_edgecolor()).upper() for ax in axes[0]]
    assert frames == ["#000000", panels.SAME, panels.OTHER, panels.OTHER, panels.OTHER]
