"""The explorer answers to each of its settings, without a widget and without a front end."""

import numpy as np
import pytest

from pathfm import InputError, TileStream, explore
from pathfm.explore import Explorer
from pathfm.positions import count


@pytest.fixture(scope="module")
def explorer(index):
    return Explorer(index, tile_px=128)


@pytest.fixture(scope="module")
def coarse(explorer):
    """A slide of 0.5 mpp."""
    return explorer.index.usable.query("mpp > 0.4")["slide_id"].iloc[0]


@pytest.fixture(scope="module")
def fine(explorer):
    """A slide of 0.25 mpp."""
    return explorer.index.usable.query("mpp < 0.3")["slide_id"].iloc[0]


def test_a_higher_threshold_admits_fewer_positions(explorer, coarse):
    looks = [explorer.look(slide_id=coarse, min_tissue=share) for share in (0, 0.4, 0.8, 1)]
    positions = [look.positions[0.5] for look in looks]
    assert positions == sorted(positions, reverse=True) and len(set(positions)) > 2
    assert all((b.centres <= a.centres).all() for a, b in zip(looks, looks[1:], strict=False))


def test_a_coarser_mpp_has_fewer_positions_and_larger_tiles(explorer, fine):
    looks = [explorer.look(slide_id=fine, mpp=(mpp,)) for mpp in (0.25, 0.5, 1.0)]
    positions = [look.positions.iloc[0] for look in looks]
    assert positions == sorted(positions, reverse=True)
    assert [look.names["mpp"].iloc[0] for look in looks] == pytest.approx([0.25, 0.5, 1.0])


def test_another_slide_has_another_mask(explorer, coarse, fine):
    assert explorer.look(slide_id=coarse).mask.tolist() != explorer.look(slide_id=fine).mask.tolist()


def test_more_tiles_begin_with_the_fewer(explorer, coarse):
    few, many = (explorer.look(slide_id=coarse, tiles=n).names for n in (5, 50))
    assert len(few) == 5 and len(many) == 50
    assert few.equals(many.head(5))


def test_another_seed_draws_other_tiles_from_the_same_positions(explorer, coarse):
    one, two = (explorer.look(slide_id=coarse, seed=seed) for seed in (0, 1))
    assert not one.names.equals(two.names)
    assert one.positions.equals(two.positions)


def test_tiles_are_those_of_a_stream_over_the_slide(explorer, coarse):
    look = explorer.look(slide_id=coarse, mpp=(0.5, 1.0), seed=3)
    stream = TileStream(explorer.index.subset([coarse]), 128, (0.5, 1.0), 0.4, 3)
    for tile in explorer.tiles(look, 4):
        assert np.array_equal(tile.image, stream[tile.i].image)


def test_an_mpp_that_the_slide_cannot_serve_is_left_out(explorer, coarse):
    look = explorer.look(slide_id=coarse, mpp=(0.25, 0.5))
    assert look.positions[0.25] == 0 < look.positions[0.5]
    assert set(look.names["mpp"]) == {0.5}


def test_nothing_admissible_is_a_picture_that_says_so(explorer, coarse):
    look = explorer.look(slide_id=coarse, mpp=(0.25,))
    assert look.stream is None and look.names.empty
    assert "0 positions at 0.25 mpp; no tile" in str(look)
    assert explorer.png(look).startswith(b"\x89PNG")


def test_an_unknown_slide_is_named_with_the_nearest(explorer):
    with pytest.raises(InputError, match="no slide 'tiny-00'"):
        explorer.look(slide_id="tiny-00")


def test_the_picture_repeats_byte_for_byte(index, coarse):
    one, two = (Explorer(index, 128).png(Explorer(index, 128).look(slide_id=coarse)) for _ in range(2))
    assert one == two and one.startswith(b"\x89PNG")


@pytest.mark.parametrize("tiles", [1, 2, 5, 12, 13])
def test_any_number_of_tiles_can_be_drawn(explorer, coarse, tiles):
    slide, sheet = explorer.figure(explorer.look(slide_id=coarse, tiles=tiles)).axes
    assert sum(patch.get_fill() is False for patch in slide.patches) == tiles
    assert len(sheet.patches) == min(tiles, explore.SHOWN)


def test_headless_it_shows_a_still_picture_with_stable_text(explorer, coarse, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    for name in explore.LIVE:
        monkeypatch.delenv(name, raising=False)
    explorer.show(slide_id=coarse)
    assert set(shown[0]) == {"text/plain", "image/png"}
    assert shown[0]["text/plain"].startswith(f"Explorer: {coarse}, foreground at least 40%: ")


def test_weights_are_those_of_the_stream(explorer, coarse):
    look = explorer.look(slide_id=coarse, mpp={0.5: 1, 1.0: 3}, tiles=400)
    assert look.stream.weights == {0.5: 0.25, 1.0: 0.75}
    assert 260 < (look.names["mpp"] == 1.0).sum() < 340


def test_an_index_without_a_usable_slide_is_refused(explorer):
    empty = Explorer(explorer.index.subset("slide_id == 'tiny-000'"), 128)
    empty.slide_ids = []
    with pytest.raises(InputError, match="no usable slide to explore"):
        empty.look()


@pytest.mark.parametrize("mpp", [0.5, 0.7, 1.0])
def test_every_admissible_position_is_found(index, coarse, mpp):
    exact, grid, side = explore.admissible(index, coarse, 128, mpp, 0.6)
    row = index.subset([coarse]).usable.iloc[0]
    mask, _ = index.mask(coarse)
    assert exact.sum() == count(mask, row.cell_px, (row.width_px, row.height_px), side, grid, 0.6)


def test_blocks_keep_every_tile_and_expect_what_is_uniform(index, coarse):
    exact, grid, _ = explore.admissible(index, coarse, 128, 1.0)
    every = np.argwhere(exact)
    seen, expected = explore.by_block(exact, every, blocks=8)
    assert seen.sum() == expected.sum() == len(every)
    assert np.allclose(seen, expected)
    assert ((expected == 0) | (expected >= 5)).all()


def test_uniform_positions_pass_and_centred_ones_do_not(index, coarse):
    exact, grid, side = explore.admissible(index, coarse, 128, 1.0)
    rng = np.random.default_rng(0)
    every = np.argwhere(exact)
    fair, _ = explore.uniformity(exact, every[rng.integers(len(every), size=20_000)])
    biased, z = explore.uniformity(exact, explore.centred_on_tissue(index, coarse, exact, grid, side, 20_000))
    assert fair["p"] > 1e-6 > biased["p"]
    assert np.nanmax(np.abs(z)) > 5


def test_centres_are_admissible_positions_seen_from_the_middle():
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    centres = explore.centre_map(mask, side=8, min_tissue=1.0)
    assert centres.sum() == 13 * 13  # of a 20-cell square, those at least a half side within
    assert explore.centre_map(mask, side=8, min_tissue=0)[4:37, 4:57].all()
    assert not explore.centre_map(mask, side=41, min_tissue=0).any()


def test_standard_magnifications_keep_their_colour_and_others_get_one():
    assert explore.mpp_colour(0.2525) == explore.mpp_colour(0.25)
    assert len({explore.mpp_colour(mpp) for mpp in (0.25, 0.36, 0.5, 1, 2, 4)}) == 6
