"""Which patches of a view are hidden from the student, to be told from the rest: blocks of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

LEAST_BLOCK = 4  # patches; DINOv2's code
RATIO = (0.3, 1 / 0.3)  # height over width of a block; BEiT (Bao et al. 2022, algorithm 1)
TRIES = 10  # for a block that fits; then the mask stays as it is


def block_masks(
    images: int,
    side: int,
    probability: float,
    ratio: tuple[float, float],
    generator: Generator,
    wanted: Sequence[int] | None = None,
) -> Tensor:
    """Masks (images, side * side), True where a patch is hidden, row by row, drawn by a CPU `generator`.

    side         patches along a side of the view
    probability  share of the images that have a mask at all, rounded down
    ratio        least and greatest share of patches hidden; the masked images' shares are spread evenly over it
    wanted       numbers of the images whose masks are returned, each the same whatever else is wanted; None: all

    DINOv2's code; a mask may fall short of its share by a few patches where no further block fits.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator))
    rng, masked = np.random.default_rng(seed), int(images * probability)
    low, high = ratio
    shares = np.zeros(images)
    shares[:masked] = low + (high - low) * (np.arange(masked) + rng.random(masked)) / max(1, masked)
    shares = rng.permutation(shares)
    wanted = range(images) if wanted is None else wanted
    masks = np.zeros((len(wanted), side, side), dtype=bool)
    for mask, image in zip(masks, wanted, strict=True):
        hide_blocks(mask, int(shares[image] * side**2), np.random.default_rng([seed, image]))
    return torch.from_numpy(masks.reshape(len(wanted), side**2))


def hide_blocks(mask: np.ndarray, n: int, rng: np.random.Generator) -> None:
    """Hides up to `n` patches of `mask` (side, side) in blocks, in place.

    A block's area is uniform from LEAST_BLOCK to what is left to hide, its shape log-uniform in RATIO, its place
    uniform; it is taken where it hides something new and not too much.
    """
    side, hidden = len(mask), 0
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    while hidden < n:
        left = min(n - hidden, mask.size // 2)
        for area, shape, top, across in rng.random((TRIES, 4)).tolist():
            area, shape = LEAST_BLOCK + (left - LEAST_BLOCK) * area, math.exp(low + (high - low) * shape)
            height, width = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if not (height < side and width < side):
                continue
            top, across = int(top * (side - height + 1)), int(across * (side - width + 1))
            block = mask[top : top + height, across : across + width]
            new = block.size - int(block.sum())
            if 0 < new <= left:
                block[:] = True
                hidden += new
                break
        else:
            return
