"""Multi-crop views, made in batches on the device that trains, each image with its own random parameters.

The parameters are drawn on the CPU, so that every device makes the same views of the same tiles, and for the tiles of
all ranks, of which each takes its own: so their number changes no view.
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

from pathfm import lab
from pathfm.config import DinoV2Config, PretrainConfig
from pathfm.errors import InputError
from pathfm.masking import block_masks
from pathfm.ranks import gathered, share, size

RATIO = (3 / 4, 4 / 3)  # width over height of a crop; torchvision's default, which DINO uses
GRAY = (0.2989, 0.587, 0.114)
# Optical density in R, G, B of haematoxylin, eosin and DAB: Ruifrok & Johnston 2001.
DYES = rgb_from_hed.astype(np.float32)


class Views(NamedTuple):
    """Views of B tiles, normalised to [-1, 1]; G = 2 global ones, L local ones, V = G + L."""

    global_: Tensor  # (G, B, 3, global_px, global_px)
    local: Tensor  # (L, B, 3, local_px, local_px)
    effective_mpp: Tensor  # (V, B) microns per pixel of what the ViT sees, global views first; on the CPU
    masks: Tensor  # (G, B, N) True where a patch is hidden from the student, row by row, on the CPU; DINO: (G, B, 0)

    def parts(self, n: int) -> list[Views]:
        """The views of the tiles in `n` equal parts."""
        return [Views(*part) for part in zip(*(field.chunk(n, 1) for field in self), strict=True)]


class MultiCrop:
    """The views of Caron et al. 2021 and of their code, for a batch; for DINOv2 with masks of patches of `patch_px`."""

    def __init__(self, config: PretrainConfig, patch_px: int = 0):
        self.config, self.patch_px = config, patch_px

    def __call__(self, images: Tensor, mpp: Tensor, generator: Generator) -> Views:
        """Views of `images` (B, H, W, 3) uint8 at `mpp` (B,), drawn by a CPU `generator`."""
        c = self.config
        tiles = images.permute(0, 3, 1, 2).float() / 255
        n, colours = len(tiles), self._colours_of(tiles)
        big, big_mpp = self._crops(tiles, mpp, 2, c.global_scale, c.global_px, generator)
        big = self._changed(
            self._restained(big, colours, generator),
            big_mpp,
            torch.tensor(c.blur[:2]).repeat_interleave(n),
            torch.tensor([0.0, c.solarise]).repeat_interleave(n),
            generator,
        )
        small, small_mpp = self._crops(tiles, mpp, c.local_views, c.local_scale, c.local_px, generator)
        small = self._changed(
            self._restained(small, colours, generator),
            small_mpp,
            torch.full((len(small),), c.blur[2]),
            torch.zeros(len(small)),
            generator,
        )
        return Views(
            big.unflatten(0, (2, n)),
            small.unflatten(0, (c.local_views, n)),
            torch.cat([big_mpp, small_mpp]),
            self._masks(n, generator),
        )

    def _crops(
        self, tiles: Tensor, mpp: Tensor, views: int, scale: tuple[float, ...], px: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Resized, flipped and turned crops (views * B, 3, px, px) in [0, 1] and their effective mpp (views, B)."""
        n, side, every = len(tiles), tiles.shape[-1], views * len(tiles) * size()
        boxes = share(boxes_for(self.config, every, side, px, scale, generator), views)
        flips = share(torch.rand(2, every, generator=generator), views, axis=1) < torch.tensor(
            [[self.config.vertical_flip], [self.config.flip]]
        )
        crops = [crop(tiles, boxes[v * n : (v + 1) * n], flips[:, v * n : (v + 1) * n], px) for v in range(views)]
        seen = effective_mpp(mpp.cpu().float().repeat(views), boxes, px)
        x = torch.cat(crops) if crops else tiles.new_empty(0, 3, px, px)
        if self.config.rotate:
            x = turned(x, share(torch.randint(4, (every,), generator=generator), views))
        return x, seen.view(views, n)

    def _colours_of(self, tiles: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and spread in CIELAB of these tiles (B, 2, 3) and of all ranks', where something asks for them."""
        if not (self.config.stain_transfer or self.config.randstain):
            return None
        own = lab.colours(tiles)
        return own, gathered(own)

    def _restained(self, x: Tensor, colours: tuple[Tensor, Tensor] | None, generator: Generator) -> Tensor:
        """`x` (V * B, 3, h, w) with the colours of another tile of the batch, or with drawn ones."""
        c = self.config
        if colours is None or not len(x):
            return x
        own, everyone = colours
        views, tiles = len(x) // len(own), len(everyone)
        n = views * tiles
        if c.stain_transfer:
            chosen = share(torch.rand(n, generator=generator), views) < c.stain_transfer
            others = share(other_tile(torch.arange(tiles), n, tiles, generator), views)
            x = lab.given(x, chosen, own, everyone[others])
        if c.randstain:
            chosen = share(torch.rand(n, generator=generator), views) < c.randstain
            law = own.new_tensor(c.randstain_lab).view(2, 2, 3) if c.randstain_lab else lab.law(everyone)
            drawn = share(torch.randn(n, 2, 3, generator=generator), views).to(law)
            x = lab.given(x, chosen, own, law[0] + drawn * law[1])
        return x

    def _masks(self, n: int, generator: Generator) -> Tensor:
        """Masks (2, B, N) for DINOv2, where the patch is given."""
        c = self.config
        if not isinstance(c, DinoV2Config) or not self.patch_px:
            return torch.zeros(2, n, 0, dtype=torch.bool)
        side, images = c.global_px // self.patch_px, torch.arange(2 * n * size())
        own = share(images, 2).tolist()
        return block_masks(len(images), side, c.mask_probability, c.mask_ratio, generator, own).unflatten(0, (2, n))

    def _changed(self, x: Tensor, mpp: Tensor, blur: Tensor, solarise: Tensor, generator: Generator) -> Tensor:
        """Jitter, grayscale, blur, solarise, normalise; `blur` and `solarise` are probabilities by image."""
        c, n, views = self.config, len(x), len(mpp)

        def drawn(*shape: int) -> Tensor:
            return share(torch.rand(n * size(), *shape, generator=generator), views)

        def happens(probability: float | Tensor) -> Tensor:
            return drawn() < probability

        def between(low: float, high: float) -> Tensor:
            return low + (high - low) * drawn()

        jitter, order = happens(c.jitter), drawn(4).argsort(1)
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
            x = stained(x, amounts, offsets)
        x = where(x, happens(c.grayscale), saturation, torch.zeros(n))
        blurred, sigma = happens(blur), between(*(c.blur_sigma_um or c.blur_sigma_px))
        x = where(x, blurred, gaussian_blur, self._in_pixels(sigma, mpp.flatten()))
        x = where(x, happens(solarise), inverted_above, torch.full((n,), 128 / 255))
        return (x - 0.5) / 0.5

    def _in_pixels(self, sigma: Tensor, mpp: Tensor) -> Tensor:
        """Sigma in pixels of each view, of one in um where the settings say so."""
        if not self.config.blur_sigma_um:
            return sigma
        if not mpp.isfinite().all():
            raise InputError("blur_sigma_um needs tiles whose mpp is known; take blur_sigma_px and blur_sigma_um=()")
        return sigma / mpp


def boxes_for(
    config: PretrainConfig, n: int, side: int, px: int, scale: tuple[float, ...], generator: Generator
) -> Tensor:
    """`n` boxes (n, 4) for views of `px` pixels a side, as `config.crop` says: of any `scale`, or of the tile's own."""
    if config.crop == "translate":
        return translated_boxes(n, side, px, config.translate_scale, config.translate_ratio, generator)
    return random_boxes(n, side, scale, generator)


def translated_boxes(
    n: int, side: int, px: int, scale: tuple[float, ...], ratio: tuple[float, ...], generator: Generator
) -> Tensor:
    """`n` boxes (n, 4), as `random_boxes`, of near `px` pixels a side anywhere in a square of `side`.

    So a view shows cells at nearly the tile's own scale, undistorted: the extended-context translation of Virchow2
    (Zimmermann et al. 2024, section 5.1). `scale` is uniform and of sides (ours: whether of sides or area is not said).
    """
    length = px * (scale[0] + (scale[1] - scale[0]) * torch.rand(n, generator=generator))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    stretch = torch.exp((low + (high - low) * torch.rand(n, generator=generator)) / 2)
    height, width = (length / stretch).round(), (length * stretch).round()
    top = (torch.rand(n, generator=generator) * (side - height + 1)).floor()
    left = (torch.rand(n, generator=generator) * (side - width + 1)).floor()
    return torch.stack([top, left, height, width], 1)


def other_tile(own: Tensor, n: int, tiles: int, generator: Generator) -> Tensor:
    """For each of `n` views of the tiles `own` (B,), view by view, another of `tiles`, all equally likely (n,)."""
    step = 1 + torch.randint(max(1, tiles - 1), (n,), generator=generator)
    return (own.repeat(n // len(own)) + step) % tiles


def turned(x: Tensor, quarters: Tensor) -> Tensor:
    """Square images (n, 3, px, px) turned by `quarters` (n,) of a circle; written in place."""
    for k in (1, 2, 3):
        at = (quarters == k).nonzero()[:, 0].to(x.device)
        x[at] = x[at].rot90(k, (-2, -1))
    return x


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
        drawn = boxes_for(config, boxes, config.tile_px, px, scale, torch.Generator().manual_seed(0))
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
    """`x` (n, 3, h, w) in [0, 1] with other amounts of its dyes: times `amounts`, plus `offsets`, (n, 3) on the CPU.

    In optical density (base 10), along DYES. The augmentation "HED" of Tellez et al. 2019, section 3.2.
    """
    dyes = torch.tensor(DYES, dtype=x.dtype)  # on the CPU, as the amounts: an inverse there keeps no GPU waiting
    dyes = dyes / dyes.norm(dim=1, keepdim=True)
    mix = (dyes.inverse() @ (amounts[:, :, None] * dyes)).to(x.device)
    added = (-math.log(10) * (offsets @ dyes)[:, :, None]).to(x.device)
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
