"""Pictures of a cohort: artefacts, ground truth, morphometry, tissue at several scales, what a run saw."""

from __future__ import annotations

from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from pathfm import montage, tissue
from pathfm.cohort import Cohort
from pathfm.figures import CLASS_COLOURS, image, scale_bar
from pathfm.index import SlideIndex
from pathfm.montage import COLOURS
from pathfm.slide import Slide
from pathfm.storage import checkout
from pathfm.stream import TileStream
from pathfm.synthetic import CLASSES, Truth
from pathfm.synthetic.artefacts import KINDS as ARTEFACTS

MASK_UM = tissue.UM_PER_PX
PAGE = 24  # slides of a figure in a notebook


def pages(index: SlideIndex, slide_ids: list[str], most: int, folder: str | Path) -> list[list[str]]:
    """The slides of the first `most` pages, PAGE each; where there are more, all pages of the cohort go to `folder`.

    They are those of `montage.write`, the suspicious first, with their list; and it is said where they are.
    """
    parts = [slide_ids[start : start + PAGE] for start in range(0, len(slide_ids), PAGE)]
    if len(parts) > most:
        home = montage.write(index, folder).parent
        root = checkout()
        short = home.relative_to(root) if root and home.is_relative_to(root) else home
        shown = f"page{'s' if most > 1 else ''} 1{f' to {most}' if most > 1 else ''} of {len(parts)}"
        print(f"Here {shown}; every slide, the suspicious first, is in {short}/montage-001.png and so on.")
    return parts[:most]


def artefact_sheet(cohort: Cohort, truths: dict[str, Truth], side_um: float = 900) -> Figure:
    """One example of every kind of artefact, outlined by its truth."""
    found = {kind: [t.artefact_mask(kind, MASK_UM).sum() for t in truths.values()] for kind in ARTEFACTS}
    found = {kind: areas for kind, areas in found.items() if max(areas)}
    fig, axes = plt.subplots(1, len(found), figsize=(6.5, 1.95), squeeze=False)
    for ax, (kind, areas) in zip(axes[0], found.items(), strict=True):
        name = list(truths)[int(np.argmax(areas))]
        path = cohort.table.set_index("slide_id")["path"][name]
        mask = truths[name].artefact_mask(kind, MASK_UM)
        x, y = _densest(mask, side_um / MASK_UM) * MASK_UM
        with Slide.open(path) as slide:
            pixels = slide.read(x / slide.mpp, y / slide.mpp, round(side_um / 2), 2.0)
        ax.imshow(pixels, extent=(x, x + side_um, y + side_um, y), interpolation="antialiased")
        height, width = mask.shape
        outline = {"extent": (0, width * MASK_UM, 0, height * MASK_UM), "linewidths": 1.0, "linestyles": "--"}
        ax.contour(mask, [0.5], colors=[COLOURS[kind]], **outline)
        ax.set(xlim=(x, x + side_um), ylim=(y + side_um, y))
        ax.set_title(kind, fontsize=8)
        ax.set_axis_off()
        scale_bar(ax, 1.0, 200)
    return fig


def truth_figure(cohort: Cohort, truths: dict[str, Truth], side_um: float = 180) -> Figure:
    """A slide, its class map, and the nuclei of a square where many classes meet."""
    many = {
        name: np.count_nonzero(np.bincount(t.class_map.ravel(), minlength=9)[1:] > 4000) for name, t in truths.items()
    }
    fine = cohort.table.set_index("slide_id")["mpp"].sort_values(kind="stable")
    name = max(fine.index[fine <= fine.iloc[0] * 1.1], key=lambda one: many[one])
    truth = truths[name]
    x, y = _busiest(truth, side_um)
    with Slide.open(cohort.table.set_index("slide_id")["path"][name]) as slide:
        width, height = _size_um(slide)
        thumbnail = slide.thumbnail(MASK_UM / 2)
        close = slide.read(x / slide.mpp, y / slide.mpp, round(side_um / slide.mpp), slide.mpp)
    wide = width / height
    size = (6.5, 6.5 / (2 * wide + 1) + 0.35)
    fig, axes = plt.subplots(1, 3, figsize=size, width_ratios=(wide, wide, 1))
    axes[0].imshow(thumbnail, extent=(0, width, height, 0), interpolation="antialiased")
    colours = ListedColormap(["white", *(CLASS_COLOURS[one] for one in CLASSES)])
    axes[1].imshow(truth.class_map, cmap=colours, vmin=-0.5, vmax=8.5, extent=(0, width, height, 0))
    for ax in axes[:2]:
        ax.add_patch(Rectangle((x, y), side_um, side_um, fill=False, ec="black", lw=1.2))
        scale_bar(ax, 1.0, _round_mm(width))
    image(axes[2], close, None)
    _nuclei(axes[2], truth, x, y, side_um, truth.mpp)
    scale_bar(axes[2], truth.mpp, 50)
    for ax, title in zip(axes, (name, "tissue classes", "nuclei, by class"), strict=True):
        ax.set_title(title, fontsize=8)
        ax.set_axis_off()
    handles = [Patch(fc=CLASS_COLOURS[one], label=one) for one in CLASSES]
    fig.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=6.5, handlelength=1, columnspacing=1)
    return fig


def morphometry_figure(measures: pd.DataFrame) -> Figure:
    """Measured values (dots) in published ranges (bars) or beside real tiles (crosses), a panel a quantity."""
    quantities = ["nuclear diameter, um", "nuclei per mm2", "H density", "E density"]
    fig, axes = plt.subplots(1, 4, figsize=(6.5, 2.5), sharey=True)
    at = {name: len(CLASSES) - n for n, name in enumerate(CLASSES)}
    for ax, quantity in zip(axes, quantities, strict=True):
        for row in measures[measures["quantity"] == quantity].itertuples():
            if row.published:
                low, high = (float(end) for end in row.published.split(" to "))
                ax.barh(at[row[1]], high - low, left=low, height=0.45, color="0.85", zorder=0)
            ax.plot(row.measured, at[row[1]], "o", color=CLASS_COLOURS[row[1]], ms=5)
            ax.plot(row.real, at[row[1]], "x", color="black", ms=5)
        ax.set_title(quantity.replace("um", "µm").replace("mm2", "mm²"), fontsize=8)
        ax.set_xlim(left=0)
    axes[0].set_yticks(list(at.values()), list(at))
    axes[0].set_xlabel("bar: published", fontsize=7)
    axes[1].set_xlabel("bar: published", fontsize=7)
    real = measures["real"].notna().any()
    for ax in axes[2:]:
        ax.set_xlabel("cross: real tiles" if real else "no real tiles at hand", fontsize=7)
    return fig


def read_around(slide: Slide, middle, side_px: int, mpp: float, shift_px: float = 0) -> np.ndarray:
    """The square of tissue about `middle` (level-0 px), moved by `shift_px` of them: (side_px, side_px, 3) uint8."""
    x, y = np.round(np.asarray(middle) - side_px * mpp / slide.mpp / 2) + shift_px
    return slide.read(x, y, side_px, mpp)


def detailed_place(index: SlideIndex, slide_id: str, mpps, tile_px: int = 256, seed: int = 0) -> np.ndarray:
    """Middle (x, y), level-0 px, of a tile that is tissue at the coarsest of `mpps` and shows much at the finest."""
    slide = index.slide(slide_id)
    coarse = TileStream(index.subset([slide_id]), tile_px, max(mpps), seed=seed).names(range(32)).nlargest(12, "tissue")
    middles = coarse[["x", "y"]].to_numpy() + tile_px * max(mpps) / slide.mpp / 2
    # Haematoxylin takes red away: nuclei are where the darkest fifth is dark.
    return min(middles, key=lambda middle: np.quantile(read_around(slide, middle, tile_px, min(mpps))[..., 0], 0.2))


def scales_figure(slide: Slide, middle, mpps, tile_px: int = 256) -> Figure:
    """Above, tiles of the same pixels at each mpp; below, the same microns at each mpp; all about one place."""
    fig, axes = plt.subplots(2, len(mpps), figsize=(6.5, 6.5 / len(mpps) * 2 + 0.35), squeeze=False)
    for above, below, mpp in zip(*axes, mpps, strict=True):
        side_px = round(tile_px * min(mpps) / mpp)
        image(above, read_around(slide, middle, tile_px, mpp), mpp, f"{mpp:g} µm/px: {tile_px * mpp:g} µm")
        image(below, read_around(slide, middle, side_px, mpp), mpp, f"{mpp:g} µm/px: {side_px} px")
    return fig


def agreement(slide: Slide, middle, mpps, tile_px: int = 256) -> pd.DataFrame:
    """How far a square read at each coarser mpp is from the finest one averaged down, in grey levels of 255: as it
    was read, and read one level-0 pixel to the side.
    """
    fine = read_around(slide, middle, tile_px, min(mpps))
    rows = []
    for mpp in mpps[1:]:
        side_px = round(tile_px * min(mpps) / mpp)
        down = cv2.resize(fine, (side_px, side_px), interpolation=cv2.INTER_AREA).astype(float)
        apart = [np.abs(read_around(slide, middle, side_px, mpp, shift) - down).mean() for shift in (0, 1)]
        rows.append({"µm/px": mpp, "pixels": side_px, "mean difference": apart[0], "one pixel to the side": apart[1]})
    return pd.DataFrame(rows)


def draw_audit(axes, audit: dict[str, pd.DataFrame]) -> None:
    """Three panels of `sampling.audit`: tiles by patient, by share of tissue, and tissue classes seen and there."""
    patients, steps = audit["patient"], audit["tissue"]
    axes[0].bar(range(len(patients)), patients["share"], color="0.75", label="of the tiles", width=0.7)
    axes[0].plot(range(len(patients)), patients["of_slides"], "_", ms=14, mew=2, label="of the slides")
    axes[0].set(xticks=[], xlabel=f"{len(patients)} patients", ylabel="share", ylim=(0, 1.35 * patients["share"].max()))
    axes[0].legend(loc="upper center", ncols=2)
    steps = steps[(steps["tiles"] > 0) | (np.arange(len(steps)) > 0)]
    labels = [f"{100 * max(step.left, 0):.0f} to {100 * step.right:.0f}" for step in steps["tissue"]]
    axes[1].bar(labels, steps["tiles"], color="0.75", width=0.7)
    axes[1].set(xlabel="% of a tile that is tissue", ylabel="tiles")
    if "class" not in audit:
        axes[2].text(0.5, 0.5, "no ground truth of the classes", ha="center", transform=axes[2].transAxes)
        axes[2].set_axis_off()
        return
    classes = audit["class"].sort_values("tissue")
    axes[2].barh(classes["class"], classes["seen"], color=[CLASS_COLOURS[name] for name in classes["class"]])
    there = axes[2].plot(classes["tissue"], classes["class"], "k|", ms=9, mew=1.6, label="in the slides")
    axes[2].set(xlabel="share of the area")
    axes[2].legend(handles=[Patch(fc="0.75", label="in the tiles"), *there], loc="lower right")


def _nuclei(ax: Axes, truth: Truth, x: float, y: float, side_um: float, mpp: float) -> None:
    """Outlines of the nuclei in a square, in pixels of `mpp`."""
    table = truth.nuclei
    inside = table[table["x_um"].between(x, x + side_um) & table["y_um"].between(y, y + side_um)]
    at = (inside[["x_um", "y_um"]].to_numpy() - (x, y)) / mpp
    size = inside[["major_um", "minor_um"]].to_numpy().T / mpp
    colours = [CLASS_COLOURS[name] for name in inside["class"]]
    style = {"units": "xy", "facecolors": "none", "edgecolors": colours, "linewidths": 1.1}
    angle = np.rad2deg(inside["angle"].to_numpy())
    outlines = EllipseCollection(*size, angle, offsets=at, offset_transform=ax.transData, **style)
    ax.add_collection(outlines, autolim=False)


def _busiest(truth: Truth, side_um: float) -> tuple[float, float]:
    """Corner, in um, of the square whose nuclei are many and of many classes."""
    height, width = (side * truth.map_um for side in truth.class_map.shape)
    edges = [np.arange(0, length, side_um / 2) for length in (height, width)]
    score = np.zeros([len(edge) - 2 for edge in edges])
    for _, nuclei in truth.nuclei.groupby("class"):
        count = np.histogram2d(nuclei["y_um"], nuclei["x_um"], bins=edges)[0]
        score += np.log1p(count[:-1, :-1] + count[1:, :-1] + count[:-1, 1:] + count[1:, 1:])
    row, column = np.unravel_index(score.argmax(), score.shape)
    return edges[1][column], edges[0][row]


def _densest(mask: np.ndarray, side: float) -> np.ndarray:
    """Corner (x, y), in pixels of the mask, of a square of `side` within it that holds nearly the most of it."""
    cells = min(round(side), *mask.shape)
    sums = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    held = sums[cells:, cells:] - sums[:-cells, cells:] - sums[cells:, :-cells] + sums[:-cells, :-cells]
    best = np.argwhere(held >= 0.99 * held.max())
    middle = (np.array(held.shape) - 1) / 2
    return best[np.abs(best - middle).sum(axis=1).argmin()][::-1].astype(float)


def _size_um(slide: Slide) -> tuple[float, float]:
    return slide.width_px * slide.mpp, slide.height_px * slide.mpp


def _round_mm(width_um: float) -> float:
    """A round length near a third of the width."""
    power = 10.0 ** np.floor(np.log10(width_um / 3))
    return max(step * power for step in (1, 2, 5) if step * power <= width_um / 3)
