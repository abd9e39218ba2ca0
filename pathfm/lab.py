"""Colours in CIELAB, where equal distances look alike: those of a tile, and a tile with those of another."""

from __future__ import annotations

import torch
from torch import Tensor

# Linear sRGB to XYZ over the white of daylight D65, so that white is (1, 1, 1): IEC 61966-2-1, CIE 15.
WHITE = (0.95047, 1.0, 1.08883)
XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
TO_XYZ = torch.tensor(XYZ, dtype=torch.float64) / torch.tensor(WHITE, dtype=torch.float64)[:, None]
TO_RGB = TO_XYZ.inverse()
BEND = 6 / 29  # where the cube root gives way to a line
LEAST_SPREAD = 1.0  # of L, a, b: a tile without contrast is moved, not blown up; ours


def from_rgb(x: Tensor) -> Tensor:
    """L, a, b (n, 3, h, w) of sRGB in [0, 1]: L from 0 to 100, a and b some -100 to 100."""
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = torch.einsum("ij,njhw->nihw", TO_XYZ.to(x), linear)
    f = torch.where(xyz > BEND**3, xyz.clamp(min=1e-6) ** (1 / 3), xyz / (3 * BEND**2) + 4 / 29)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def to_rgb(x: Tensor) -> Tensor:
    """The inverse of `from_rgb`; what no screen can show is cut to [0, 1]."""
    y = (x[:, 0] + 16) / 116
    f = torch.stack([y + x[:, 1] / 500, y, y - x[:, 2] / 200], 1)
    xyz = torch.where(f > BEND, f**3, 3 * BEND**2 * (f - 4 / 29))
    linear = torch.einsum("ij,njhw->nihw", TO_RGB.to(x), xyz).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=1e-6) ** (1 / 2.4) - 0.055, 12.92 * linear)


def colours(tiles: Tensor) -> Tensor:
    """Mean and standard deviation (B, 2, 3) of L, a, b over the pixels of tiles (B, 3, h, w) in [0, 1]."""
    x = from_rgb(tiles).flatten(2)
    return torch.stack([x.mean(2), x.std(2, correction=0)], 1)


def law(colours: Tensor) -> Tensor:
    """Mean and standard deviation over tiles (2, 2, 3) of their `colours` (B, 2, 3), of a normal law of colours.

    RandStainNA (Shen et al. 2022, section 2.2) fits such a law to a data set.
    """
    return torch.stack([colours.mean(0), colours.std(0, correction=0)])


def given(x: Tensor, chosen: Tensor, own: Tensor, wanted: Tensor) -> Tensor:
    """Views with other colours: in L, a, b stretched and moved so that their whole tile would have those `wanted`.

    x       (V * B, 3, h, w) in [0, 1], view by view; written in place
    chosen  (V * B,) which are changed, on the CPU
    own     (B, 2, 3) colours of the tiles that the views are of
    wanted  (V * B, 2, 3)

    Reinhard et al. 2001, eq. 10 and 11, in CIELAB; by the tile's colours and not the view's, so that a view of mostly
    background is not stretched to the contrast of tissue (ours). Background moves with the rest.
    """
    rows = chosen.nonzero()[:, 0].to(x.device)
    if len(rows):
        mean, spread = own[rows % len(own)].unbind(1)
        target, width = wanted[rows].unbind(1)
        stretch = width.clamp(min=0) / spread.clamp(min=LEAST_SPREAD)
        y = (from_rgb(x[rows]) - mean[..., None, None]) * stretch[..., None, None] + target[..., None, None]
        x[rows] = to_rgb(y)
    return x
