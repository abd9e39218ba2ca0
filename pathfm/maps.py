"""Pictures of what a head says: where attention looks on a slide, predicted nuclei beside the true ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from skimage.segmentation import find_boundaries

from pathfm import figures
from pathfm.index import SlideIndex
from pathfm.segment import Segmented
from pathfm.slide_probe import Fitted

COLOURS = ("#000000", "#E69F00", "#332288", "#D55E00", "#009E73", "#888888")  # of types; the background has none
TINT = "inferno"  # of attention


def attention(ax: Axes, index: SlideIndex, fitted: Fitted, slide_id: str) -> Axes:
    """The slide with each tile tinted by the rank of its attention, dark low and bright high, and a scale bar."""
    row = fitted.bags.row(slide_id)
    names, slide = fitted.bags.names[row], index.slides.set_index("slide_id").loc[slide_id]
    picture = index.picture(slide_id)
    um_per_px = slide["width_px"] * slide["mpp"] / picture.shape[1]
    corners = names[["x", "y"]].to_numpy(float) * slide["mpp"] / um_per_px
    side = fitted.bags.provenance["tile_px"] * names["mpp"].to_numpy() / um_per_px
    figures.image(ax, tinted(picture, corners, side, ranks(fitted.attention(row))), um_per_px, slide_id)
    scale = ax.figure.colorbar(ScalarMappable(cmap=TINT), ax=ax, orientation="horizontal", shrink=0.5, aspect=30)
    scale.set_ticks([0, 1], labels=["least", "most attention"], fontsize=7)
    return ax


def ranks(values: np.ndarray) -> np.ndarray:
    """(n,) 0 for the lowest to 1 for the highest; equal values share the mean of theirs."""
    low, high = (np.searchsorted(np.sort(values), values, side) for side in ("left", "right"))
    return (low + high - 1) / 2 / max(len(values) - 1, 1)


def tinted(picture: np.ndarray, corners: np.ndarray, side: np.ndarray, values: np.ndarray, alpha: float = 0.55):
    """The picture (h, w, 3) uint8 under squares of colour: corners (n, 2) x, y and side (n,) in its pixels."""
    found = picture.astype(float)
    colours = 255 * colormaps[TINT](values)[:, :3]
    for (x, y), length, colour in zip(corners, side, colours, strict=True):
        place = slice(round(y), round(y + length)), slice(round(x), round(x + length))
        found[place] = (1 - alpha) * picture[place] + alpha * colour
    return found.round().astype(np.uint8)


def predicted_nuclei(found: Segmented, n: int = 4) -> Figure:
    """Columns of pieces: the image, its true types, those predicted, and the share of pixels that are right."""
    import matplotlib.pyplot as plt

    some = np.linspace(0, len(found.reported.row) - 1, n).round().astype(int)
    images, truth = found.reported.images[some], found.reported.masks[some]
    said = found.predict(images)
    fig, axes = plt.subplots(3, n, figsize=(1.7 * n, 5.6), squeeze=False)
    for column, axis in enumerate(axes.T):
        table = found.images.table.iloc[found.reported.row[some[column]]]
        figures.image(axis[0], images[column], _um_per_px(found, table), Path(str(table["file"])).stem[:24])
        for ax, types in zip(axis[1:], (truth[column], said[column]), strict=True):
            figures.image(ax, outlined(images[column], types))
        axis[2].set_title(f"{(said[column] == truth[column]).mean():.0%} of the pixels right", fontsize=7)
    for ax, name in zip(axes[:, 0], ("image", "truth", f"predicted ({found.name})"), strict=True):
        ax.text(-0.06, 0.5, name, rotation=90, va="center", ha="right", fontsize=8, transform=ax.transAxes)
    handles = [
        plt.Line2D([], [], color=c, label=k) for c, k in zip(COLOURS[1:], found.images.classes[1:], strict=False)
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7, frameon=False)
    return fig


def outlined(image: np.ndarray, types: np.ndarray) -> np.ndarray:
    """The image, paler, with the types (h, w) tinted and outlined in their colours."""
    found = 255 - 0.6 * (255.0 - image)
    edges = find_boundaries(types, mode="inner") & (types > 0)
    for kind in np.unique(types[types > 0]):
        colour, inside = 255 * np.array(to_rgb(COLOURS[kind])), types == kind
        found[inside] = 0.7 * found[inside] + 0.3 * colour
        found[inside & edges] = colour
    return found.round().astype(np.uint8)


def _um_per_px(found: Segmented, table) -> float | None:
    """Of a piece: its window, or the image's short side, was brought to input_px."""
    if not table["mpp"] > 0:
        return None
    short = min(table["width_px"], table["height_px"])
    window = found.window_px if 0 < found.window_px <= short else short
    return float(table["mpp"]) * window / found.reported.images.shape[1]
