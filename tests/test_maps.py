"""Attention over a slide: tiles lie where they were cut, bright where the weight is, with a true scale bar."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from pathfm import InputError, bags, figures, maps
from pathfm.bags import Cut
from pathfm.slide_probe import Fitted


@pytest.fixture
def fitted(index, tmp_path, monkeypatch):
    """A head whose attention is given: it grows along the rows of the grid."""
    found = bags.extract("colour", index, Cut(tile_px=48, mpp=1.0), folder=tmp_path / "bags")
    made = Fitted("abmil", "label", found, ["a", "b"], np.zeros((1, 4, 1)), {}, np.zeros(1), np.zeros(1))
    monkeypatch.setattr(Fitted, "attention", lambda self, row: np.arange(1, len(found[row]) + 1) / 1e3)
    return made


def test_ranks_are_shares_and_equals_share_theirs():
    assert maps.ranks(np.array([3.0, 1.0, 2.0])).tolist() == [1, 0, 0.5]
    assert maps.ranks(np.array([1.0, 1.0, 5.0])).tolist() == [0.25, 0.25, 1]
    assert maps.ranks(np.array([7.0])).tolist() == [0]


def test_tiles_are_tinted_where_they_are():
    picture = np.full((20, 30, 3), 200, np.uint8)
    found = maps.tinted(picture, np.array([[4, 2], [10, 2]]), np.array([6, 6]), np.array([0.0, 1.0]), alpha=1.0)
    dark, bright = (255 * np.array(plt.get_cmap("inferno")(value)[:3]) for value in (0.0, 1.0))
    assert np.allclose(found[2:8, 4:10], dark, atol=1) and np.allclose(found[2:8, 10:16], bright, atol=1)
    assert (found[8:] == 200).all() and (found[:, :4] == 200).all()


def test_a_slide_is_tinted_tile_by_tile(fitted, index, style, tmp_path):
    fig, ax = plt.subplots()
    maps.attention(ax, index, fitted, "tiny-001")
    shown, picture = np.asarray(ax.images[0].get_array()), index.picture("tiny-001")
    assert shown.shape == picture.shape
    um_per_px = 600 / picture.shape[1]
    changed = (shown != picture).any(axis=2)
    tiles = fitted.bags.slides["n_tiles"][1]
    assert changed.sum() * um_per_px**2 == pytest.approx(tiles * 48**2, rel=0.05)
    # The first tile is the darkest, the last the brightest.
    names = fitted.bags.names[1]
    ends = [(names[axis].to_numpy(float)[[0, -1]] * 0.25 + 24) / um_per_px for axis in "yx"]
    first, last = (shown[int(y), int(x)].astype(float) - picture[int(y), int(x)] for y, x in zip(*ends, strict=True))
    assert first.sum() < last.sum()
    bar = ax.lines[0].get_xdata()
    assert (bar[1] - bar[0]) * um_per_px == pytest.approx(figures.round_length(600 / 5), rel=0.02)
    figures.save(fig, "attention", tmp_path)
    with pytest.raises(InputError, match="no features of slide 'tiny-009': it is not in the index"):
        maps.attention(ax, index, fitted, "tiny-009")
