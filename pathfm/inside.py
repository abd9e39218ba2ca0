"""Inside a field: what each network attends to, and which of its patches look alike to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pathfm import panels
from pathfm.backbones import only_cls
from pathfm.export import Preprocess
from pathfm.representation import token_colours
from pathfm.vit import attention_maps


class Inside(NamedTuple):
    """Of B fields; None where the network cannot say it.

    attention  (B, h, w) of the last block's CLS token, mean over heads, 1 where a patch gets an equal share
    colours    (B, h, w, 3) the first three principal components of the patch tokens over all fields, 0 to 1
    share      of the tokens' variance that the three hold, 0 to 1
    """

    attention: np.ndarray | None = None
    colours: np.ndarray | None = None
    share: float = math.nan


@torch.inference_mode()
def look(network: nn.Module, preprocess: Preprocess, fields: np.ndarray) -> Inside:
    """What a network sees in fields (B, px, px, 3) uint8: their own pixels, or resized where it takes one size alone.

    A patch that does not divide the field has it resized to the next multiple.
    """
    images = replace(preprocess, input_px=_side(network, preprocess, fields.shape[1]))(fields)
    tokens = _patches(network, images)
    if tokens is None:
        return Inside()
    attention = None
    if isinstance(network, VisionTransformer) and network.cls_token is not None:
        attention = attention_maps(network, images).mean(1)
        attention = (attention / attention.mean((1, 2), keepdim=True)).cpu().numpy()
    return Inside(attention, *token_colours(tokens.cpu().numpy()))


def _side(network: nn.Module, preprocess: Preprocess, px: int) -> int:
    if not getattr(network, "dynamic_img_size", False):
        return preprocess.input_px
    patch = network.patch_embed.patch_size[0]
    return max(1, round(px / patch)) * patch


def _patches(network: nn.Module, images: torch.Tensor) -> torch.Tensor | None:
    """The last layer's patch features (B, h, w, D); None of a network that gives no tokens of a square grid."""
    if only_cls(network):
        return None
    tokens = network.forward_features(images)
    if tokens.ndim != 3:
        return None
    tokens = tokens[:, getattr(network, "num_prefix_tokens", 0) :]
    side = math.isqrt(tokens.shape[1])
    return tokens.unflatten(1, (side, side)) if side**2 == tokens.shape[1] else None


def figure(
    fields: np.ndarray, um_per_px: float | None, seen: Mapping[str, Inside], masks: np.ndarray | None = None
) -> Figure:
    """A column a field; below it the attention of every network on one scale, then the colours of its patch tokens.

    um_per_px   None where the scale is unknown: no bar is drawn
    masks       (B, px, px) bool, what is known of the fields' nuclei: a row below the fields
    """
    attention = {name: one.attention for name, one in seen.items() if one.attention is not None}
    colours = {name: one.colours for name, one in seen.items() if one.colours is not None}
    known = [] if masks is None else [np.repeat(np.where(masks, 0.25, 0.95)[..., None], 3, axis=-1)]
    labels = ["field", *(["nuclei,\ntruth"] * len(known)), *(f"attention,\n{name}" for name in attention)]
    labels += [f"tokens,\n{name}" for name in colours]
    n, rows = len(fields), len(labels)
    fig, axes = plt.subplots(rows, n, figsize=(6.5, 5.75 / n * rows), squeeze=False)
    every = np.concatenate([grids.ravel() for grids in attention.values()]) if attention else [0, 1]
    limits = np.percentile(every, [1, 99])
    for k, column in enumerate(axes.T):
        grids = [grids[k] for grids in (*known, *attention.values(), *colours.values())]
        panels.field(column, fields[k], um_per_px, *grids, limits=limits)
    for ax, text in zip(axes[:, 0], labels, strict=True):
        panels.side_label(ax, text)
    if attention:
        first = 1 + len(known)
        shown = axes[first : first + len(attention), :]
        bar = fig.colorbar(shown[0, 0].images[-1], ax=shown, shrink=0.9, aspect=12 * len(attention), pad=0.01)
        bar.set_label("equal share = 1", fontsize=7)
    return fig


def on_nuclei(seen: Mapping[str, Inside], masks: np.ndarray, names) -> pd.DataFrame:
    """A row a network and field (of `names`): mean attention of its pixels on nuclei and elsewhere, 1 an equal share.

    masks   (B, px, px) bool, of the fields; a pixel has the attention of its patch
    """
    rows = []
    for network, one in seen.items():
        if one.attention is None:
            continue
        for name, grid, mask in zip(names, one.attention, masks, strict=True):
            at = np.arange(mask.shape[0]) * grid.shape[0] // mask.shape[0]
            pixels = grid[np.ix_(at, at)]
            told = {"network": network, "field": name, "nuclei": mask.mean()}
            rows.append({**told, "attention there": pixels[mask].mean(), "elsewhere": pixels[~mask].mean()})
    return pd.DataFrame(rows, columns=["network", "field", "nuclei", "attention there", "elsewhere"])


def table(seen: Mapping[str, Inside], names) -> pd.DataFrame:
    """A row a network and field (of `names`): patches, and the least, mean and greatest attention of one."""
    rows = [
        {
            "network": network,
            "field": name,
            "patches": grid.size,
            "min": grid.min(),
            "mean": grid.mean(),
            "max": grid.max(),
        }
        for network, one in seen.items()
        if one.attention is not None
        for name, grid in zip(names, one.attention, strict=True)
    ]
    return pd.DataFrame(rows, columns=["network", "field", "patches", "min", "mean", "max"])
