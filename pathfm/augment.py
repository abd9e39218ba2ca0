"""Multi-crop views, made in batches on the device that trains, each image with its own random parameters.

The parameters are drawn on the CPU, so that every device makes the same views of the same tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from skimage.color import rgb_from_hed
from torch import Generator, Tensor

from pathfm.config import PretrainConfig

RATIO = (3 / 4, 4 / 3)  # width over height of a crop; torchvision's default, which DINO uses
GRAY = (0.2989, 0.587, 0.114)
# Optical density in R, G, B of haematoxylin, eosin and DAB: Ruifrok & Johnston 2001.
DYES = rgb_from_hed.astype(np.float32)


class Views(NamedTuple):
    """Views of B tiles, normalised to [-1, 1]; G = 2 global ones, L local ones, V = G + L."""

    global_: Tensor  # (G, B, 3, global_px, global_px)
    local: Tensor  # (L, B, 3, local_px, local_px)
    effective_mpp: Tensor  # (V, B) microns per pixel of what the ViT sees, global views first; on the CPU


class MultiCrop:
    """The views of Caron et al. 2021 and of their code, for a batch."""

    def __init__(self, config: PretrainConfig):
        self.config = config

    def __call__(self, images: Tensor, mpp: Tensor, generator: Generator) -> Views:
        """Views of `images` (B, H, W, 3) uint8 at `mpp` (B,), drawn by a CPU `generator`."""
        c = self.config
        tiles = images.permute(0, 3, 1, 2).float() / 255
        n = len(tiles)
        big, big_mpp = self._crops(tiles, mpp, 2, c.global_scale, c.global_px, generator)
        big = self._colours(
            big,
            torch.tensor(c.blur[:2]).repeat_interleave(n),
            torch.tensor([0.0, c.solarise]).repeat_interleave(n),
            generator,
        )
        small, small_mpp = self._crops(tiles, mpp, c.local_views, c.local_scale, c.local_px, generator)
        small = self._colours(small, torch.full((len(small),), c.blur[2]), torch.zeros(len(small)), generator)
        return Views(big.unflatten(0, (2, n)), small.unflatten(0, (c.local_views, n)), torch.cat([big_mpp, small_mpp]))

    def _crops(
        self, tiles: Tensor, mpp: Tensor, views: int, scale: tuple[float, ...], px: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Resized and flipped crops (views * B, 3, px, px) in [0, 1] and their effective mpp (views, B)."""
        n, side = len(tiles), tiles.shape[-1]
        boxes = random_boxes(views * n, side, scale, generator)
        flips = torch.rand(2, views * n, generator=generator) < torch.tensor(
            [[self.config.vertical_flip], [self.config.flip]]
        )
        crops = [crop(tiles, boxes[v * n : (v + 1) * n], flips[:, v * n : (v + 1) * n], px) for v in range(views)]
        seen = effective_mpp(mpp.cpu().float().repeat(views), boxes, px)
        return torch.cat(crops) if crops else tiles.new_empty(0, 3, px, px), seen.view(views, n)

    def _colours(self, x: Tensor, blur: Tensor, solarise: Tensor, generator: Generator) -> Tensor:
        """Jitter, grayscale, blur, solarise, normalise; `blur` and `solarise` are probabilities by image."""
        c, n = self.config, len(x)

        def happens(probability: float | Tensor) -> Tensor:
            return torch.rand(n, generator=generator) < probability

        def between(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(n, generator=generator)

        jitter, order = happens(c.jitter), torch.rand(n, 4, generator=generator).argsort(1)
        changes = [
            (brightness, between(max(0, 1 - c.brightness), 1 + c.brightness)),
            (contrast, between(max(0, 1 - c.contrast), 1 + c.contrast)),
            (saturation, between(max(0, 1 - c.saturation), 1 + c.saturation)),
            (hue, between(-c.hue, c.hue)),
        ]
        for turn in range(4):  # each image has the four in its own order
            for kind, (change, amount) in enumerate(changes):
                x = where(x, jitter & (order[:, turn] == kind), change, amount)
        if c.stain:
            amounts = torch.stack([between(1 - c.stain, 1 + c.stain) for _ in DYES], 1)
            offsets = torch.stack([between(-0.1 * c.stain, 0.1 * c.stain) for _ in DYES], 1)
            x = stained(x, amounts.to(x.device), offsets.to(x.device))
        x = where(x, happens(c.grayscale), saturation, torch.zeros(n))
        x = where(x, happens(blur), gaussian_blur, between(*c.blur_sigma_px))
        x = where(x, happens(solarise), inverted_above, torch.full((n,), 128 / 255))
        return (x - 0.5) / 0.5


def random_boxes(n: int, side: int, scale: tuple[float, ...], generator: Generator) -> Tensor:
    """`n` boxes (n, 4) of top, left, height, width in whole pixels inside a square of `side`.

    Area uniform in `scale`, ratio log-uniform in RATIO, the first of ten that fits, else the whole square: as
    torchvision's RandomResizedCrop.
    """
    area = side**2 * (scale[0] + (scale[1] - scale[0]) * torch.rand(n, 10, generator=generator))
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(low + (high - low) * torch.rand(n, 10, generator=generator))
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width <= side) & (height <= side) & (width > 0) & (height > 0)
    width, height = width.where(fits, float(side)), height.where(fits, float(side))
    first = fits.int().argmax(1, keepdim=True)
    height, width = height.gather(1, first)[:, 0], width.gather(1, first)[:, 0]
    top = (torch.rand(n, generator=generator) * (side - height + 1)).floor()
    left = (torch.rand(n, generator=generator) * (side - width + 1)).floor()
    return torch.stack([top, left, height, width], 1)


def effective_mpp(mpp: Tensor, boxes: Tensor, px: int) -> Tensor:
    """Microns per pixel (n,) of crops `boxes` (n, 4) of tiles at `mpp` (n,) seen at `px` pixels a side.

    Tile mpp x crop side / view side; a crop that is not square has the geometric mean of its sides.
    """
    return mpp * (boxes[:, 2] * boxes[:, 3]).sqrt() / px


def scale_table(config: PretrainConfig, boxes: int = 4096) -> pd.DataFrame:
    """The scales that the ViT sees, by tile mpp and kind of view: effective mpp and the field of view in um.

    Least, median and greatest of that many crops, drawn from a fixed seed.
    """
    rows = []
    for view, scale, px in (
        ("global", config.global_scale, config.global_px),
        ("local", config.local_scale, config.local_px),
    ):
        drawn = random_boxes(boxes, config.tile_px, scale, torch.Generator().manual_seed(0))
        step = effective_mpp(torch.ones(boxes), drawn, px)
        for mpp in config.mpp:
            least, median, greatest = (mpp * float(q) for q in (step.min(), step.median(), step.max()))
            rows.append([mpp, view, px, least, median, greatest, median * px])
    names = ["tile_mpp", "view", "view_px", "mpp_least", "mpp_median", "mpp_greatest", "field_um_median"]
    return pd.DataFrame(rows, columns=names).sort_values(["tile_mpp", "view"], ignore_index=True)


def crop(tiles: Tensor, boxes: Tensor, flips: Tensor, px: int) -> Tensor:
    """Crops `boxes` (B, 4) of `tiles` (B, 3, S, S), flipped by `flips` (2, B), antialiased to (B, 3, px, px).

    Two matrix products an image: exact for any box, and quick on every device.
    """
    rows = bicubic(boxes[:, 0], boxes[:, 2], flips[0], tiles.shape[-2], px).to(tiles.device)
    columns = bicubic(boxes[:, 1], boxes[:, 3], flips[1], tiles.shape[-1], px).to(tiles.device)
    return (rows[:, None] @ tiles @ columns[:, None].mT).clamp(0, 1)


def bicubic(start: Tensor, length: Tensor, flip: Tensor, side: int, px: int) -> Tensor:
    """Weights (B, px, side) that resample `length` pixels from `start` into `px`, as Pillow's antialiased bicubic."""
    step = (length / px)[:, None, None]
    out = torch.arange(px) + 0.5
    centre = start[:, None, None] + step * torch.where(flip[:, None], px - out, out)[:, :, None]
    source = torch.arange(side)[None, None] + 0.5
    x = ((source - centre) / step.clamp(min=1)).abs()
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    inside = (source > start[:, None, None]) & (source < (start + length)[:, None, None]) & (x < 2)
    weights = weights * inside
    return weights / weights.sum(-1, keepdim=True)


def where(x: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor], amount: Tensor) -> Tensor:
    """`x` with `change(images, amounts)` applied to the images `chosen` (a CPU mask); x is written in place."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        at = rows.to(x.device)
        x[at] = change(x[at], amount[rows].to(x.device)[:, None, None, None])
    return x


def gray(x: Tensor) -> Tensor:
    """Luma (n, 1, h, w) of RGB (n, 3, h, w)."""
    return (x * x.new_tensor(GRAY)[:, None, None]).sum(1, keepdim=True)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(gray(x).mean((1, 2, 3), keepdim=True), x, factor).clamp(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(gray(x).expand_as(x), x, factor).clamp(0, 1)


def hue(x: Tensor, turns: Tensor) -> Tensor:
    """`x` with its hue in HSV moved by `turns` of the circle; value and saturation stay."""
    value, _ = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    safe = chroma.where(chroma > 0, 1)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    k = (x.new_tensor([5.0, 3.0, 1.0])[:, None, None] + sector + 6 * turns) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def stained(x: Tensor, amounts: Tensor, offsets: Tensor) -> Tensor:
    """`x` (n, 3, h, w) in [0, 1] with other amounts of its dyes: each times `amounts`, plus `offsets`, (n, 3).

    In optical density (base 10), along DYES. The augmentation "HED" of Tellez et al. 2019, section 3.2.
    """
    dyes = x.new_tensor(DYES)
    dyes = dyes / dyes.norm(dim=1, keepdim=True)
    mix = dyes.inverse() @ (amounts[:, :, None] * dyes)
    added = -math.log(10) * (offsets @ dyes)[:, :, None]
    light = x.clamp(min=1 / 255).log().flatten(2)  # minus the density, in natural units: exp is quicker than pow
    return torch.baddbmm(added, mix.mT, light).exp().clamp(0, 1).unflatten(2, x.shape[2:])


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """`x` blurred by `sigma` pixels (n, 1, 1, 1), the kernel cut and renormalised at the border."""

    def kernel(n: int) -> Tensor:
        at = torch.arange(n, device=x.device, dtype=x.dtype)
        weights = torch.exp(-0.5 * ((at - at[:, None]) / sigma) ** 2)
        return weights / weights.sum(-1, keepdim=True)

    return kernel(x.shape[-2]) @ x @ kernel(x.shape[-1]).mT


def inverted_above(x: Tensor, threshold: Tensor) -> Tensor:
    """Solarised: intensities at or above the threshold are inverted."""
    return torch.where(x >= threshold, 1 - x, x)
