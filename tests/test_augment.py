import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from pathfm import augment
from pathfm.augment import MultiCrop, random_boxes, scale_table
from pathfm.config import PretrainConfig
from pathfm.errors import InputError

PLAIN = {"jitter": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarise": 0.0, "flip": 0.0}
SMALL = {"init": "random", "tile_px": 72, "global_px": 64, "local_px": 32, "local_views": 3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=5, side=40, seed=0):
    return F.interpolate(torch.rand(n, 3, side // 4, side // 4, generator=seeded(seed)), (side, side), mode="bilinear")


def views_of(tiles, mpp=None, seed=0, **fields):
    mpp = torch.ones(len(tiles)) if mpp is None else mpp
    return MultiCrop(PretrainConfig.of(**{**SMALL, **fields}))(tiles, mpp, seeded(seed))


@pytest.mark.parametrize("px", [16, 40, 64])
def test_a_crop_equals_cutting_out_and_resizing_with_antialias(px):
    tiles = pictures()
    boxes = torch.tensor([[0, 0, 40, 40], [3, 5, 20, 30], [11, 2, 29, 17], [39, 0, 1, 40], [8, 8, 16, 16]]).float()
    crops = augment.crop(tiles, boxes, torch.zeros(2, 5, dtype=torch.bool), px)
    for tile, (top, left, height, width), got in zip(tiles, boxes.int().tolist(), crops, strict=True):
        cut = tile[None, :, top : top + height, left : left + width]
        want = F.interpolate(cut, (px, px), mode="bicubic", antialias=True).clamp(0, 1)[0]
        assert (got - want).abs().max() < 1e-4


def test_a_flipped_crop_is_the_flip_of_the_crop():
    tiles, boxes = pictures(3), torch.tensor([[3.0, 5, 20, 30]] * 3)
    plain = augment.crop(tiles, boxes, torch.zeros(2, 3, dtype=torch.bool), 24)
    flipped = augment.crop(tiles, boxes, torch.tensor([[True, False, True], [False, True, True]]), 24)
    assert torch.allclose(flipped[0], plain[0].flip(-2), atol=1e-6)
    assert torch.allclose(flipped[1], plain[1].flip(-1), atol=1e-6)
    assert torch.allclose(flipped[2], plain[2].flip(-1, -2), atol=1e-6)


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_follow_the_law_of_torchvisions_crops(scale):
    torch.manual_seed(0)
    image = torch.zeros(3, 256, 256)
    reference = np.array([RandomResizedCrop.get_params(image, scale, augment.RATIO) for _ in range(3000)])
    boxes = random_boxes(3000, 256, scale, seeded(1)).numpy()
    for column in range(4):
        assert stats.ks_2samp(boxes[:, column], reference[:, column]).pvalue > 1e-4
    area = boxes[:, 2] * boxes[:, 3] / 256**2
    assert area.min() > scale[0] - 0.01 and area.max() < scale[1] + 0.01
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 256 and boxes.min() >= 0


def test_colour_changes_equal_torchvisions_image_by_image():
    x = pictures(8)
    amounts = torch.linspace(0.6, 1.4, 8)
    pairs = [
        (augment.brightness, TF.adjust_brightness, amounts),
        (augment.contrast, TF.adjust_contrast, amounts),
        (augment.saturation, TF.adjust_saturation, amounts),
        (augment.hue, TF.adjust_hue, torch.linspace(-0.5, 0.5, 8)),
    ]
    for ours, reference, values in pairs:
        want = torch.stack([reference(image, float(value)) for image, value in zip(x, values, strict=True)])
        assert torch.allclose(ours(x.clone(), values[:, None, None, None]), want, atol=1e-4), ours.__name__
    assert torch.allclose(augment.saturation(x, torch.zeros(8, 1, 1, 1)), TF.rgb_to_grayscale(x, 3), atol=1e-4)
    assert torch.equal(augment.inverted_above(x, torch.full((8, 1, 1, 1), 0.5)), TF.solarize(x, 0.5))


def test_blur_is_gaussian_away_from_the_border():
    x, sigma = pictures(4), torch.tensor([0.1, 0.5, 1.0, 2.0])
    blurred = augment.gaussian_blur(x, sigma[:, None, None, None])
    for image, got, s in zip(x, blurred, sigma.tolist(), strict=True):
        want = TF.gaussian_blur(image, 25, s)
        assert torch.allclose(got[:, 12:-12, 12:-12], want[:, 12:-12, 12:-12], atol=1e-4)
    flat = torch.full((2, 3, 16, 16), 0.3)
    assert torch.allclose(augment.gaussian_blur(flat, torch.full((2, 1, 1, 1), 2.0)), flat)


def test_how_often_things_happen():
    """A left half darker than the right shows flips, colours show grayscale, means above one half solarisation."""
    tiles = torch.zeros(800, 72, 72, 3, dtype=torch.uint8)
    tiles[:, :, 36:] = torch.tensor([120, 60, 30], dtype=torch.uint8)
    tiles[:, :36] += 100
    seen = views_of(tiles, **{**PLAIN, "flip": 0.5, "vertical_flip": 0.25, "global_scale": (1.0, 1.0)}).global_
    x = seen.flatten(0, 1)
    assert (x[..., :8].mean((1, 2, 3)) > x[..., -8:].mean((1, 2, 3))).float().mean() == pytest.approx(0.5, abs=0.06)
    upside_down = x[:, :, :8].mean((1, 2, 3)) < x[:, :, -8:].mean((1, 2, 3))
    assert upside_down.float().mean() == pytest.approx(0.25, abs=0.06)

    tiles[:] = torch.tensor([200, 140, 180], dtype=torch.uint8)
    seen = views_of(tiles, **{**PLAIN, "grayscale": 0.2, "solarise": 0.2})
    for views, solarised in ((seen.global_[0], 0.0), (seen.global_[1], 0.2), (seen.local.flatten(0, 1), 0.0)):
        gray = (views[:, 0] - views[:, 1]).abs().amax((1, 2)) < 1e-3
        assert gray.float().mean() == pytest.approx(0.2, abs=0.06)
        assert (views.mean((1, 2, 3)) < 0).float().mean() == pytest.approx(solarised, abs=0.06)


def test_blur_falls_on_the_views_it_is_meant_for():
    noise = torch.randint(0, 256, (600, 72, 72, 3), generator=seeded(), dtype=torch.uint8)
    fields = {**PLAIN, "blur": (1.0, 0.1, 0.5), "blur_sigma_px": (1.0, 2.0), "global_scale": (1.0, 1.0)}
    seen = views_of(noise, local_px=64, local_scale=(1.0, 1.0), local_views=1, **fields)
    for views, share in ((seen.global_[0], 1.0), (seen.global_[1], 0.1), (seen.local[0], 0.5)):
        assert (views.std((1, 2, 3)) < 0.3).float().mean() == pytest.approx(share, abs=0.06)


def test_effective_mpp_is_what_a_ruler_in_the_view_measures():
    """A ramp of one grey value a pixel: its slope in the view is the number of tile pixels a view pixel covers."""
    ramp = torch.arange(72, dtype=torch.uint8)
    tiles = torch.stack([ramp.expand(72, 72), ramp[:, None].expand(72, 72), torch.zeros(72, 72, dtype=torch.uint8)], -1)
    mpp = torch.tensor([0.25, 0.5, 1.0, 2.0])
    seen = views_of(tiles.expand(4, -1, -1, -1), mpp, **PLAIN)
    for views, said in ((seen.global_, seen.effective_mpp[:2]), (seen.local, seen.effective_mpp[2:])):
        grey = (views + 1) / 2 * 255
        across, down = grey[:, :, 0, 0].diff()[..., 8:-8].mean(-1), grey[:, :, 1, :, 0].diff()[..., 8:-8].mean(-1)
        assert torch.allclose(mpp * (across * down).sqrt(), said, rtol=2e-3)
    assert seen.effective_mpp.shape == (5, 4)


def test_scale_table_tells_what_crops_do():
    config = PretrainConfig.of(**SMALL, mpp=(0.5,))
    table = scale_table(config).set_index("view")
    seen = views_of(torch.zeros(1000, 72, 72, 3, dtype=torch.uint8), torch.full((1000,), 0.5), **PLAIN).effective_mpp
    for view, values in (("global", seen[:2]), ("local", seen[2:])):
        row = table.loc[view]
        assert values.min().item() == pytest.approx(row.mpp_least, rel=0.03)
        assert values.max().item() == pytest.approx(row.mpp_greatest, rel=0.03)
        assert values.median().item() == pytest.approx(row.mpp_median, rel=0.03)
    assert table.loc["global", "mpp_greatest"] == pytest.approx(0.5 * 72 / 64, rel=0.01)


def test_views_have_their_shapes_and_range_and_follow_the_generator():
    tiles = torch.randint(0, 256, (6, 72, 72, 3), generator=seeded(), dtype=torch.uint8)
    first, again, other = views_of(tiles, seed=1), views_of(tiles, seed=1), views_of(tiles, seed=2)
    assert first.global_.shape == (2, 6, 3, 64, 64) and first.local.shape == (3, 6, 3, 32, 32)
    assert first.global_.min() >= -1 and first.global_.max() <= 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.global_, other.global_)


def test_each_image_and_view_has_its_own_parameters():
    one = torch.randint(0, 256, (1, 72, 72, 3), generator=seeded(), dtype=torch.uint8).expand(8, -1, -1, -1)
    seen = views_of(one)
    assert len(seen.effective_mpp.unique()) > 30
    flat = seen.global_.flatten(0, 1).flatten(1)
    assert (torch.cdist(flat, flat) + torch.eye(16) * 1e3).min() > 1


def test_without_local_views_there_are_two_global_ones():
    seen = views_of(torch.zeros(3, 72, 72, 3, dtype=torch.uint8), local_views=0)
    assert seen.local.shape == (0, 3, 3, 32, 32) and seen.effective_mpp.shape == (2, 3)


def test_other_amounts_of_dye_are_other_powers_of_the_light():
    x = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    ones, none = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.allclose(augment.stained(x, ones, none), x, atol=1e-5)
    assert torch.allclose(augment.stained(x, 2 * ones, none), x**2, atol=1e-4)  # twice of every dye
    dyes = torch.tensor(augment.DYES)
    dyes = dyes / dyes.norm(dim=1, keepdim=True)
    pure = (10 ** -(0.4 * dyes[0]))[None, :, None, None].expand(2, 3, 5, 4)  # haematoxylin alone
    amounts = torch.tensor([[0.5, 1.0, 1.0], [1.0, 0.0, 0.0]])
    thinner, same = augment.stained(pure, amounts, none)
    assert torch.allclose(thinner[:, 0, 0], 10 ** -(0.2 * dyes[0]), atol=1e-4)
    assert torch.allclose(same, pure[1], atol=1e-4)
    added = augment.stained(pure, ones, torch.tensor([[0.0, 0.3, 0.0]]).expand(2, 3))
    assert torch.allclose(added[0, :, 0, 0], 10 ** -(0.4 * dyes[0] + 0.3 * dyes[1]), atol=1e-4)


def test_the_stain_setting_changes_views_and_repeats():
    images = torch.full((3, 72, 72, 3), 150, dtype=torch.uint8)
    plain, turned, again = (views_of(images, **PLAIN, **more).global_ for more in ({}, {"stain": 0.3}, {"stain": 0.3}))
    assert plain.std() < 1e-6
    assert turned.std() > 0.02
    assert torch.equal(turned, again)
    with pytest.raises(InputError, match="stain=1.0 must be below 1"):
        views_of(images, stain=1.0)
