"""Changes that tissue allows: turns, other tiles' colours, crops near the tile's own scale, blur in um."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from skimage.color import lab2rgb, rgb2lab

from pathfm import augment, lab
from pathfm.augment import MultiCrop
from pathfm.config import make_config
from pathfm.errors import InputError

PLAIN = {"jitter": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarise": 0.0, "flip": 0.0}
SMALL = {"init": "random", "tile_px": 72, "global_px": 64, "local_px": 32, "local_views": 2}
WHOLE = {**PLAIN, "global_scale": (1.0, 1.0)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def views_of(tiles, mpp=1.0, seed=0, patch_px=0, **fields):
    mpp = torch.full((len(tiles),), mpp)
    return MultiCrop(make_config(**{**SMALL, **fields}), patch_px)(tiles, mpp, seeded(seed))


def tissue(n=6, side=72, seed=0):
    """Tiles of as many colours, none of them near the edge of what a screen shows."""
    g = seeded(seed)
    base = 0.35 + 0.3 * torch.rand(n, 1, 1, 3, generator=g)
    return ((base + 0.03 * torch.randn(n, side, side, 3, generator=g)).clamp(0, 1) * 255).byte()


def test_lab_equals_scikit_images_both_ways():
    x = torch.rand(3, 3, 16, 16, generator=seeded(), dtype=torch.float64)
    want = np.stack([rgb2lab(image) for image in x.permute(0, 2, 3, 1).numpy()])
    assert np.allclose(lab.from_rgb(x).permute(0, 2, 3, 1).numpy(), want, atol=1e-2)
    back = np.stack([lab2rgb(image) for image in want])
    assert np.allclose(lab.to_rgb(torch.tensor(want).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy(), back, atol=1e-3)
    assert torch.allclose(lab.to_rgb(lab.from_rgb(x)), x, atol=1e-9)
    dark = torch.zeros(1, 3, 2, 2)
    assert torch.allclose(lab.to_rgb(lab.from_rgb(dark)), dark, atol=1e-6)


def test_a_tile_given_anothers_colours_has_them():
    tiles = tissue().permute(0, 3, 1, 2).double() / 255
    own = lab.colours(tiles)
    got = lab.given(tiles.clone(), torch.tensor([True] * 5 + [False]), own, own.roll(-1, 0))
    assert torch.allclose(lab.colours(got)[:5], own.roll(-1, 0)[:5], atol=0.1)
    assert torch.equal(got[5], tiles[5])
    flat = torch.full((1, 3, 8, 8), 0.9)  # background is moved, not blown up
    noisy = flat + 1e-4 * torch.randn(1, 3, 8, 8, generator=seeded())
    assert lab.given(noisy, torch.tensor([True]), lab.colours(noisy), own[:1].float()).std((2, 3)).max() < 0.01


def test_another_tile_is_never_the_own_one_and_all_others_are_alike():
    other = augment.other_tile(torch.arange(5), 5 * 4000, 5, seeded()).view(4000, 5)
    assert not (other == torch.arange(5)).any()
    for i in range(5):
        counts = torch.bincount(other[:, i], minlength=5).tolist()
        assert counts.pop(i) == 0 and stats.chisquare(counts).pvalue > 1e-4
    second_rank = augment.other_tile(torch.tensor([2, 3]), 200, 4, seeded())
    assert set(second_rank[::2].tolist()) == {0, 1, 3} and set(second_rank[1::2].tolist()) == {0, 1, 2}


def test_stain_transfer_gives_views_the_colour_of_another_tile_of_the_batch():
    tiles = tissue(4)
    seen = (views_of(tiles, **WHOLE, stain_transfer=1.0).global_ + 1) / 2
    means = tiles.float().mean((1, 2)) / 255
    distance = torch.cdist(seen.mean((3, 4)).flatten(0, 1), means)
    nearest = distance.argmin(1)
    assert distance.amin(1).max() < 0.02
    assert (nearest != torch.arange(4).repeat(2)).all() and len(nearest.unique()) > 1
    half = (views_of(tissue(400), **WHOLE, stain_transfer=0.5).global_[0] + 1) / 2
    own = (views_of(tissue(400), **WHOLE).global_[0] + 1) / 2
    assert ((half - own).abs().mean((1, 2, 3)) > 1e-3).float().mean() == pytest.approx(0.5, abs=0.08)


def test_a_drawn_stain_follows_the_law_of_tiles_colours():
    """Means of L over views are normal, with the mean and spread asked for."""
    law = (60.0, 5.0, -5.0, 6.0, 3.0, 3.0, 4.0, 2.0, 2.0, 0.5, 0.2, 0.2)  # means of (mean, spread), then their spread
    seen = (views_of(tissue(300), **WHOLE, randstain=1.0, randstain_lab=law).global_.flatten(0, 1) + 1) / 2
    got = lab.colours(seen.double())
    assert stats.kstest(got[:, 0, 0].numpy(), "norm", (60, 4)).pvalue > 1e-4
    assert stats.kstest(got[:, 0, 1].numpy(), "norm", (5, 2)).pvalue > 1e-4
    plain = lab.colours((views_of(tissue(300), **WHOLE).global_.flatten(0, 1).double() + 1) / 2)
    kept = plain[:, 1, 0] / lab.colours(tissue(300).permute(0, 3, 1, 2).double() / 255)[:, 1, 0].repeat(2)  # resizing
    assert (got[:, 1, 0] / kept).mean() == pytest.approx(6, abs=0.2)


def test_without_a_given_law_the_batchs_own_is_drawn_from():
    tiles = tissue(300)
    own = lab.colours(tiles.permute(0, 3, 1, 2) / 255)
    assert torch.allclose(lab.law(own)[0], own.mean(0)) and torch.allclose(lab.law(own)[1], own.std(0, correction=0))
    got = lab.colours((views_of(tiles, **WHOLE, randstain=1.0).global_[0] + 1) / 2)
    assert got[:, 0, 0].mean() == pytest.approx(own[:, 0, 0].mean().item(), abs=1)
    assert got[:, 0, 0].std() == pytest.approx(own[:, 0, 0].std().item(), rel=0.2)


def test_views_are_turned_by_quarters_equally_often():
    tiles = torch.zeros(800, 72, 72, 3, dtype=torch.uint8)
    tiles[:, :20] = 200  # bright on top
    seen = views_of(tiles, **WHOLE, rotate=True).global_.flatten(0, 1)[:, 0]
    sides = torch.stack([seen[:, :10].mean((1, 2)), seen[..., :10].mean((1, 2)), seen[:, -10:].mean((1, 2)),
                         seen[..., -10:].mean((1, 2))], 1)  # fmt: skip
    counts = torch.bincount(sides.argmax(1), minlength=4)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    x = torch.rand(4, 3, 5, 5)
    turned = augment.turned(x.clone(), torch.arange(4))
    assert all(torch.equal(turned[k], x[k].rot90(k, (1, 2))) for k in range(4))


def test_translated_crops_keep_the_tiles_scale_and_reach_everywhere():
    boxes = augment.translated_boxes(4000, 100, 40, (0.9, 1.1), (0.95, 1.05), seeded())
    top, left, height, width = boxes.T
    assert (boxes[:, :2] >= 0).all() and (top + height).max() == (left + width).max() == 100
    area = (height * width).sqrt()
    assert stats.kstest(area.numpy(), "uniform", (36, 8)).statistic < 0.05  # whole pixels
    ratio = (width / height).log()
    assert ratio.min() > math.log(0.95) - 0.03 and ratio.max() < math.log(1.05) + 0.03
    assert stats.kstest((top / (100 - height)).numpy(), "uniform").statistic < 0.03
    seen = views_of(tissue(50), 0.5, **PLAIN, crop="translate", global_px=48).effective_mpp
    assert seen.min() > 0.5 * 0.88 and seen.max() < 0.5 * 1.12  # local views too
    table = augment.scale_table(make_config(**{**SMALL, "crop": "translate", "global_px": 48}, mpp=(0.5,)))
    assert table["mpp_least"].min() > 0.44 and table["mpp_greatest"].max() < 0.56


def test_blur_in_um_is_as_wide_on_the_slide_at_any_magnification():
    """A step edge blurred by s um has slope 1 / (s sqrt(2 pi)) per um."""
    tiles = torch.zeros(2, 72, 72, 3, dtype=torch.uint8)
    tiles[:, :, 36:] = 200
    for mpp in (0.5, 1.0):
        fields = {**WHOLE, "blur": (1.0, 0.0, 0.0), "blur_sigma_um": (2.0, 2.0), "local_views": 0}
        x = (views_of(tiles, mpp, **fields).global_[0] + 1) / 2 * 255 / 200
        effective = mpp * 72 / 64
        slope = x[:, 0, 32].diff(dim=-1).max() / effective
        assert float(slope) == pytest.approx(1 / (2.0 * math.sqrt(2 * math.pi)), rel=0.06)
    with pytest.raises(InputError, match="blur_sigma_um needs tiles whose mpp is known"):
        views_of(tiles, math.nan, blur_sigma_um=(0.5, 1.0))


def test_defaults_draw_as_they_did_before_there_were_more_changes():
    """Of the published views nothing moved: sums of the first drawn at the commit before."""
    seen = views_of(tissue(3), vertical_flip=0.5, stain=0.3)
    got = [float(seen.global_.double().sum()), float(seen.local.double().sum()), float(seen.effective_mpp.sum())]
    assert got == pytest.approx(BEFORE, rel=1e-5) and seen.masks.numel() == 0


BEFORE = [-11076.073430299759, 141.6396879553795, 12.20995044708252]


def test_masks_come_with_dinov2s_views_and_change_nothing_else():
    fields = {"method": "dinov2", "drop_path": 0.0, "global_px": 56, "local_px": 28}
    plain, masked = views_of(tissue(4), **fields), views_of(tissue(4), patch_px=14, **fields)
    assert (
        plain.masks.shape == (2, 4, 0)
        and masked.masks.shape == (2, 4, 16)
        and masked.masks.flatten(0, 1).any(1).sum() <= 4
    )
    assert torch.equal(plain.global_, masked.global_) and torch.equal(plain.local, masked.local)
