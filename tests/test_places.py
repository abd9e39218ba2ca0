"""One place at several mpp, tile after tile: same centre, every mpp, places drawn as tiles of the coarsest."""

import pickle

import numpy as np
import pytest

from pathfm.errors import InputError
from pathfm.places import Places
from pathfm.stream import TileStream

MPPS = (2.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def places(index):
    return Places(index, tile_px=64, mpp=MPPS, seed=3)


def test_tiles_in_a_row_have_one_centre_and_every_mpp_and_lie_within_the_coarsest(places, index):
    names = places.names(range(60))
    assert names["i"].tolist() == list(range(60))
    for _, row in names.groupby(np.arange(60) // 3):
        assert row["slide_id"].nunique() == 1
        slide = index.slide(row["slide_id"].iloc[0])
        assert row["mpp"].to_numpy() == pytest.approx([0.5, 1.0, 2.0], rel=0.01)
        side = 64 * row["mpp"].to_numpy() / slide.mpp
        steps = [slide.plan(mpp).grid for mpp in (0.5, 1.0, 2.0)]
        for at in ("x", "y"):
            middle = row[at].to_numpy() + side / 2
            assert (abs(middle - middle[2]) <= np.array(steps) / 2 + 1e-9).all()
            assert (row[at].to_numpy() >= row[at].iloc[2]).all()
            assert (row[at].to_numpy() + side <= row[at].iloc[2] + side[2] + 1e-9).all()


def test_places_are_the_tiles_of_a_stream_at_the_coarsest_mpp(places, index):
    """Of slides that serve each mpp; so their law is the stream's, whose tests are test_sampling.py."""
    serving = TileStream(index, 64, MPPS, common_mpp=True).slides["slide_id"]
    stream = TileStream(index.subset(list(serving)), 64, 2.0, seed=3)
    assert set(places.slides["slide_id"]) == set(serving) and len(serving) > 1
    coarse = places.names(range(2, 90, 3)).drop(columns="i")
    assert coarse.equals(stream.names(range(30)).drop(columns="i"))
    assert (coarse["tissue"] >= 0.4).all()


def test_pixels_are_the_slides_whatever_is_asked_for_together(places, index):
    together = places.__getitems__([7, 0, 8, 1])
    for tile, i in zip(together, (7, 0, 8, 1), strict=True):
        asked = (0.5, 1.0, 2.0)[i % 3]
        want = index.slide(tile.slide_id).read(tile.x, tile.y, 64, asked)
        assert np.array_equal(tile.image, want) and tile[1:] == places[i][1:] == places.name(i)
    again = pickle.loads(pickle.dumps(places))
    assert np.array_equal(again[7].image, together[0].image)


def test_what_a_run_asks_of_a_stream_is_known(places):
    assert places.weights == dict.fromkeys((0.5, 1.0, 2.0), 1 / 3) and places.mixture["declared"].sum() == 1
    assert places.settings["same_place"] and places.settings["mpp"] == "2, 0.5, 1" and places.settings["seed"] == 3
    assert "0.5, 1, 2 um/px" in repr(places) and len(places) == 2**53


@pytest.mark.parametrize("mpp", ["0.5", "0.5:1,1:3", "uniform(0.5,1)"])
def test_a_law_that_is_no_list_of_mpp_is_refused(mpp, index):
    with pytest.raises(InputError, match="same_place has each place at every mpp; .* no list without weights"):
        Places(index, 64, mpp)
