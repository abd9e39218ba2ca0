"""A tile's neighbours in scale share its centre; DINO's views of it are those that training would make."""

import numpy as np
import pytest
import torch

from pathfm import InputError, Slide, TileStream, closeup
from pathfm.augment import MultiCrop
from pathfm.stream import Tile

MPPS = (0.25, 0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def fine(index):
    """A slide of 0.25 mpp and a tile of 1 mpp in its middle."""
    row = index.usable.query("mpp < 0.3").iloc[0]
    slide = index.slide(row.slide_id)
    x, y = (4 * ((length - 128 * 4) // 8) for length in (slide.width_px, slide.height_px))
    return slide, Tile(slide.read(x, y, 128, 1.0), row.slide_id, x, y, 1.0, 1.0, False, 0)


def shrunk(image):
    h, w = image.shape[0] // 2, image.shape[1] // 2
    return image.reshape(h, 2, w, 2, 3).mean(axis=(1, 3))


def test_neighbours_come_fine_to_coarse_with_the_tile_among_them(fine):
    found = closeup.neighbours(*fine, MPPS)
    assert [picture.mpp for picture in found] == pytest.approx(MPPS)
    assert [picture.kind for picture in found] == ["neighbour", "neighbour", "tile", "neighbour"]
    assert np.array_equal(found[2].image, fine[1].image)
    assert all(picture.image.shape == (128, 128, 3) for picture in found)


def test_neighbours_share_the_centre(fine):
    """Half the size, a neighbour is the middle of the next coarser one; two pixels aside it is not."""
    found = [picture.image.astype(float) for picture in closeup.neighbours(*fine, MPPS)]
    for near, far in zip(found, found[1:], strict=False):
        aligned = np.abs(shrunk(near) - far[32:96, 32:96]).mean()
        aside = np.abs(shrunk(near) - far[32:96, 34:98]).mean()
        assert aligned < 0.75 * aside


def test_what_the_slide_is_too_coarse_for_is_left_out(index):
    row = index.usable.query("mpp > 0.4").iloc[0]
    slide = index.slide(row.slide_id)
    tile = Tile(slide.read(256, 256, 64, 0.5), row.slide_id, 256, 256, 0.5, 1.0, False, 0)
    assert [picture.mpp for picture in closeup.neighbours(slide, tile, (0.25, 0.5, 1.0))] == [0.5, 1.0]


def test_views_are_those_of_training(index):
    tile = TileStream(index, 256, 0.5)[3]
    config = closeup.recipe("published")
    made = closeup.views(tile, config, draw=7)
    generator = torch.Generator().manual_seed(7)
    truth = MultiCrop(config)(torch.from_numpy(tile.image)[None], torch.tensor([tile.mpp]), generator)
    assert [view.kind for view in made] == ["global"] * 2 + ["local"] * 8
    assert [view.mpp for view in made] == pytest.approx(truth.effective_mpp[:, 0].tolist())
    for view, exact in zip(made, [*truth.global_[:, 0], *truth.local[:, 0]], strict=True):
        assert np.abs(view.image / 127.5 - 1 - exact.permute(1, 2, 0).numpy()).max() <= 0.5 / 127.5 + 1e-6


def test_another_draw_makes_other_views_and_the_same_the_same(index):
    tile = TileStream(index, 256, 0.5)[3]
    one, again, other = (closeup.views(tile, closeup.recipe("demo"), draw)[0].image for draw in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


@pytest.mark.parametrize("name", ["smoke", "demo"])
def test_a_recipe_for_smaller_tiles_sees_the_middle_at_its_own_scale(name):
    config = closeup.recipe(name).replace(jitter=0.0, stain=0.0, grayscale=0.0, solarise=0.0, blur=(0.0, 0.0, 0.0))
    image = np.full((256, 256, 3), (255, 0, 0), np.uint8)
    low = (256 - config.tile_px) // 2
    image[low : low + config.tile_px, low : low + config.tile_px] = (0, 0, 255)
    for view in closeup.views(Tile(image, "s", 0, 0, 1.0, 1.0, False, 0), config):
        assert (view.image == (0, 0, 255)).all()
        px, scale = (
            (config.global_px, config.global_scale) if view.kind == "global" else (config.local_px, config.local_scale)
        )
        low_mpp, high_mpp = (np.sqrt(share) * config.tile_px / px for share in scale)
        assert low_mpp * 0.97 < view.mpp < high_mpp * 1.03


def test_an_unknown_recipe_is_named_with_the_nearest():
    with pytest.raises(InputError, match="no recipe 'smokey'. Did you mean 'smoke'"):
        closeup.recipe("smokey")


def test_a_position_that_is_off_every_grid_is_read_too(fine):
    slide: Slide = fine[0]
    tile = Tile(slide.read(501, 503, 64, 0.7), "s", 501, 503, 0.7, 1.0, True, 0)
    found = closeup.neighbours(slide, tile, (0.3, 0.7, 1.5))
    assert [picture.mpp for picture in found] == pytest.approx([0.3, 0.7, 1.5])
