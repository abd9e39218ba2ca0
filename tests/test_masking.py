"""Block-wise masks: exact properties, and the law of an implementation written apart, from BEiT's algorithm."""

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from pathfm.masking import block_masks, hide_blocks

SIDE = 16


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_mask(side: int, n: int, rng: random.Random) -> set[tuple[int, int]]:
    """Blocks as sets of patches, one draw at a time."""
    hidden: set[tuple[int, int]] = set()
    while len(hidden) < n:
        for _ in range(10):
            left = min(n - len(hidden), side * side // 2)
            area, aspect = rng.uniform(4, left), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height >= side or width >= side:
                continue
            y, x = rng.randint(0, side - height), rng.randint(0, side - width)
            block = {(y + i, x + j) for i in range(height) for j in range(width)}
            if 0 < len(block - hidden) <= left:
                hidden |= block
                break
        else:
            break
    return hidden


@pytest.fixture(scope="module")
def ours() -> np.ndarray:
    return block_masks(1200, SIDE, 1.0, (0.3, 0.3), seeded()).view(-1, SIDE, SIDE).numpy()


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    rng, masks = random.Random(0), np.zeros((1200, SIDE, SIDE), dtype=bool)
    for mask in masks:
        for at in slow_mask(SIDE, int(0.3 * SIDE**2), rng):
            mask[at] = True
    return masks


def borders(masks: np.ndarray) -> np.ndarray:
    """Neighbouring patches of which one is hidden: few in blocks, many where patches are hidden one by one."""
    return (masks[:, 1:] ^ masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] ^ masks[:, :, :-1]).sum((1, 2))


def test_masks_follow_the_law_of_the_algorithm_written_out(ours, reference):
    for measure in (lambda m: m.sum((1, 2)), borders, lambda m: m.any(1).sum(1), lambda m: m.any(2).sum(1)):
        assert stats.ks_2samp(measure(ours), measure(reference)).pvalue > 1e-3
    assert np.abs(ours.mean(0) - reference.mean(0)).max() < 5 * math.sqrt(2 * 0.25 / 1200)


def test_hidden_patches_lie_in_blocks(ours):
    scattered = np.stack([np.random.default_rng(0).permutation(m.ravel()).reshape(SIDE, SIDE) for m in ours[:200]])
    assert borders(ours[:200]).mean() < 0.5 * borders(scattered).mean()


def test_as_many_views_are_masked_as_asked_and_their_shares_fill_the_range():
    masks = block_masks(80, SIDE, 0.5, (0.1, 0.5), seeded(1))
    assert masks.shape == (80, SIDE**2) and masks.dtype == torch.bool
    shares = np.sort(masks.float().mean(1).numpy())
    assert (shares > 0).sum() == 40 and shares[:40].max() == 0
    assert shares[40:].min() < 0.13 and 0.45 < shares[-1] <= 0.5
    wanted = 0.1 + 0.4 * (np.arange(40) + 0.5) / 40  # a share in each fortieth of the range
    assert np.abs(shares[40:] - wanted).mean() < 0.02


def test_the_masked_views_are_not_always_the_same():
    first = block_masks(40, SIDE, 0.5, (0.1, 0.5), seeded(1)).any(1)
    assert not torch.equal(first, block_masks(40, SIDE, 0.5, (0.1, 0.5), seeded(2)).any(1))
    assert torch.equal(first, block_masks(40, SIDE, 0.5, (0.1, 0.5), seeded(1)).any(1))


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_small_grids_never_hide_too_much_and_end(side):
    rng = np.random.default_rng(0)
    for n in range(side**2 + 1):
        mask = np.zeros((side, side), dtype=bool)
        hide_blocks(mask, n, rng)
        assert mask.sum() <= n
    assert not block_masks(4, side, 0.0, (0.1, 0.5), seeded()).any()
