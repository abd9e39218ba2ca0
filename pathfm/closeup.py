"""One tile looked at closely: the same centre at other scales, and the views that DINO makes of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pathfm.augment import MultiCrop
from pathfm.config import RECIPES, PretrainConfig, make_config
from pathfm.errors import InputError, nearest
from pathfm.slide import Slide, plan_read
from pathfm.stream import Tile

PUBLISHED = "published"  # DINO's own crops, on tiles of 256 px
VIEWS = (PUBLISHED, *RECIPES)


class Picture(NamedTuple):
    """Pixels and their scale."""

    kind: str  # "tile", "neighbour", "global" or "local"
    image: np.ndarray  # (side, side, 3) uint8
    mpp: float  # microns per pixel of `image`


def neighbours(slide: Slide, tile: Tile, mpps: tuple[float, ...]) -> list[Picture]:
    """The tile among squares of as many pixels about the same centre at `mpps`, fine to coarse.

    What the slide is too coarse for is left out; the tile stands in for an mpp within 1 % of its own.
    """
    side_px = tile.image.shape[0]
    half = side_px * tile.mpp / slide.mpp / 2
    found = [Picture("tile", tile.image, tile.mpp)]
    for mpp in mpps:
        plan = plan_read(slide.mpp, slide.level_downsamples, mpp)
        if plan is not None and abs(plan.mpp / tile.mpp - 1) > 0.01:
            shift = half - side_px * plan.mpp / slide.mpp / 2
            x, y = (plan.grid * round((at + shift) / plan.grid) for at in (tile.x, tile.y))
            found.append(Picture("neighbour", slide.read(x, y, side_px, mpp), plan.mpp))
    return sorted(found, key=lambda picture: picture.mpp)


def recipe(name: str) -> PretrainConfig:
    """The settings called "published" (DINO's own), or a recipe. Raises InputError for another name."""
    if name not in VIEWS:
        raise InputError(f"no recipe '{name}'.{nearest(name, VIEWS)}")
    return make_config(**RECIPES.get(name, {}))


def views(tile: Tile, config: PretrainConfig, draw: int = 0) -> list[Picture]:
    """The global and then the local views of a tile, each with its effective mpp; another `draw`, other views.

    A recipe for smaller tiles sees the middle of this one, as many pixels as it trains on, so that the scales are
    those of its training.
    """
    import torch

    margin = max(0, tile.image.shape[0] - config.tile_px) // 2
    middle = tile.image[margin:, margin:][: config.tile_px, : config.tile_px]
    generator = torch.Generator().manual_seed(draw)
    images = torch.from_numpy(np.ascontiguousarray(middle))[None]
    made = MultiCrop(config)(images, torch.tensor([tile.mpp]), generator)
    kinds = ["global"] * len(made.global_) + ["local"] * len(made.local)
    pixels = [_bytes(view) for view in (*made.global_[:, 0], *made.local[:, 0])]
    return [Picture(*one) for one in zip(kinds, pixels, made.effective_mpp[:, 0].tolist(), strict=True)]


def _bytes(view) -> np.ndarray:
    """A normalised view (3, px, px) as (px, px, 3) uint8."""
    return (view * 127.5 + 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
