"""Panels that more than one figure shows: scores beside their floors, confusions, maps, retrieved tiles, letters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pathfm import figures
from pathfm.benchmarks import TileSet
from pathfm.comparisons import Ranks
from pathfm.scores import Prediction
from pathfm.scores import scores as score

MARKERS = {"linear": "o", "kNN": "s"}
GREY = "#555555"
SAME, OTHER = "#009E73", "#E69F00"  # frames of retrieved tiles: of the query's class, of another
LABEL = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}


def method_colour(name: str) -> str:
    """The fixed colour of a set of features, whatever stands in brackets behind its name; black for others."""
    return figures.METHOD_COLOURS.get(name.split(" (")[0], "black")


def score_intervals(ax: Axes, scores: pd.DataFrame, chance: float) -> Axes:
    """Balanced accuracy with its 95 % interval, a line a row of `probe.scores`: floors open, others filled.

    chance  1 / number of classes, dashed
    """
    table = scores.iloc[::-1].reset_index(drop=True)
    for place, row in table.iterrows():
        colour = method_colour(row.features)
        ax.plot([row.low, row.high], [place, place], color=colour, lw=2.2, solid_capstyle="butt")
        face = "white" if row.floor else colour
        ax.plot(row.balanced_accuracy, place, MARKERS.get(row.probe, "o"), mfc=face, mec=colour, mew=1.4, ms=5.5)
    level(ax, x=chance)
    names = [row.features if row.floor else f"{row.features}, {row.probe}" for row in table.itertuples()]
    ax.set_yticks(range(len(table)), names)
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 1), ylim=(-0.6, len(table) - 0.4), xlabel=f"balanced accuracy\n({sizes(table)})")
    return ax


def recorded(axes, there: dict[str, dict[str, list[Prediction]]], chance: float) -> None:
    """Scores of recorded answers, an axis a place: name of the place -> name of the features -> answers, one a seed.

    All but the teacher are drawn as floors.
    """
    for ax, (where, by_features) in zip(axes, there.items(), strict=True):
        every = [replace(one, floor=name != "teacher") for name, several in by_features.items() for one in several]
        score_intervals(ax, score(every), chance)
        ax.set_title(f"{where} (dashed: chance)")


def sizes(scores: pd.DataFrame) -> str:
    """ "216 tiles of 4 patients" for a table of scores on one test set."""
    first = scores.iloc[0]
    known = pd.notna(first.n_patients)
    return f"{first.n_tiles} tiles of {first.n_patients} patients" if known else f"{first.n_tiles} tiles"


def mean_ranks(ax: Axes, ranks: Ranks) -> Axes:
    """Mean ranks with their bootstrap interval, best above; the bar is the critical difference of Nemenyi's test."""
    table = ranks.table
    places = -np.arange(len(table))
    ax.hlines(places, table["low"], table["high"], color=GREY, lw=2)
    ax.plot(table["mean_rank"], places, "o", color="black", ms=5)
    ax.set_yticks(places, table.index)
    ax.tick_params(axis="y", length=0)
    ax.plot([1, 1 + ranks.critical_difference], [1, 1], color="black", lw=2.5, solid_capstyle="butt")
    ax.text(1, 1.25, f"critical difference {ranks.critical_difference:.1f}", fontsize=7)
    ax.set(ylim=(0.4 - len(table), 2.2), xlim=(0.7, max(len(table), 1 + ranks.critical_difference) + 0.3))
    ax.set_xlabel(f"mean rank over {ranks.n_tasks} tasks, 1 the best")
    return ax


def confusion(ax: Axes, truth, predicted, classes: list[str]) -> Axes:
    """Shares of each true class (row) by predicted class (column), in per cent; zeros are left blank."""
    counts = pd.crosstab(np.asarray(truth), np.asarray(predicted)).reindex(index=classes, columns=classes, fill_value=0)
    share = 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0).to_numpy()
    ax.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="equal")
    for row, column in zip(*np.nonzero(share.round()), strict=True):
        colour = "white" if share[row, column] > 55 else "black"
        ax.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize="x-small", color=colour)
    ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(classes)), classes)
    ax.tick_params(length=0)
    ax.set_xlabel("predicted (% of the true class)")
    return ax


def level(ax: Axes, x: float | None = None, y: float | None = None, label: str | None = None) -> None:
    """A dashed line at what needs no learning, such as chance."""
    style = {"color": GREY, "lw": 0.9, "ls": (0, (4, 3)), "zorder": 0, "label": label}
    ax.axvline(x, **style) if y is None else ax.axhline(y, **style)


def leakage(ax: Axes, leaks: pd.DataFrame, chance: float) -> Axes:
    """Mean and spread of the draws of each split, features beside each other.

    leaks  of `probe.leakage`, with a column features
    """
    splits, names = list(dict.fromkeys(leaks["split"])), list(dict.fromkeys(leaks["features"]))
    for k, name in enumerate(names):
        rows = leaks[leaks["features"] == name]
        at = [splits.index(split) + 0.16 * (k - (len(names) - 1) / 2) for split in rows["split"]]
        style = {"color": method_colour(name), "fmt": "o", "ms": 5, "capsize": 0, "lw": 2}
        ax.errorbar(at, rows["balanced_accuracy"], rows["spread"], label=name, **style)
    level(ax, y=chance)
    ax.text(len(splits) - 0.52, chance + 0.02, "chance", fontsize=7, color=GREY, ha="right")
    ax.set_xticks(range(len(splits)), ["tile\n(patients leak)" if split == "tile" else split for split in splits])
    ax.set(xlabel="test tiles kept apart by", ylabel="balanced accuracy", ylim=(0, 1), xlim=(-0.5, len(splits) - 0.5))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 0.14), ncols=2)
    return ax


def few_shot(ax: Axes, shots: pd.DataFrame, chance: float) -> Axes:
    """Balanced accuracy against labelled tiles a class; the band holds 95 % of the episodes.

    shots  of `probe.few_shot`, with a column features
    """
    for name, rows in shots.groupby("features", sort=False):
        colour = method_colour(name)
        ax.plot(rows["shots"], rows["balanced_accuracy"], "o-", ms=3, color=colour, label=name)
        ax.fill_between(rows["shots"], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0)
    level(ax, y=chance, label="chance")
    counts = sorted(shots["shots"].unique())
    ax.set(xscale="log", xlabel="labelled tiles a class", ylabel="balanced accuracy", ylim=(0, 1))
    ax.set_xticks(counts, counts)
    ax.minorticks_off()
    ax.legend(loc="upper left", ncols=2)
    return ax


def group_map(ax: Axes, xy: np.ndarray, group: np.ndarray, title: str, legend: bool = True, most: int = 8) -> Axes:
    """A scatter of xy (N, 2) coloured by group; a legend below names them, where there are at most `most`."""
    names = list(np.unique(group))
    wheel = plt.get_cmap("turbo")(np.linspace(0.03, 0.97, len(names))) if len(names) > most else None
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    colours = [
        figures.CLASS_COLOURS.get(name, cycle[i % len(cycle)] if wheel is None else wheel[i])
        for i, name in enumerate(names)
    ]
    ax.scatter(*xy.T, c=[colours[i] for i in np.searchsorted(names, group)], s=5, lw=0, alpha=0.85, rasterized=True)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)
    ax.spines[:].set_visible(False)
    if legend and len(names) <= most:
        handles = [ax.plot([], [], "o", color=c, ms=4, label=n)[0] for c, n in zip(colours, names, strict=True)]
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncols": 2}
        ax.legend(handles=handles, fontsize="x-small", handletextpad=0.1, columnspacing=0.8, **place)
    return ax


def group_maps(maps: Mapping[str, np.ndarray], by: Mapping[str, np.ndarray]) -> Figure:
    """A row an embedding, of `maps` (N, 2) by its name; a column a grouping, of `by` (N,) by its name."""
    fig, axes = plt.subplots(len(maps), len(by), figsize=(2.2 * len(by), 2.6 * len(maps)), squeeze=False)
    for row, (name, xy) in zip(axes, maps.items(), strict=True):
        for ax, (group, values) in zip(row, by.items(), strict=True):
            group_map(ax, xy, values, f"{name}\nby {group}", legend=name == list(maps)[-1])
    return fig


def retrievals(tiles: TileSet, queries: np.ndarray, found: dict[str, np.ndarray]) -> Figure:
    """A row a query; beside it, a block an embedding, the tiles that it holds nearest.

    found  name of the embedding -> (n, k) rows of `tiles`, -1 for none, as `representation.retrieve` gives them
    Frames say same class (green) or another (orange); above a tile stands its class, below it the centre.
    """
    blocks = {"query": np.asarray(queries)[:, None], **found}
    widths = [ids.shape[1] for ids in blocks.values()]
    fig = plt.figure(figsize=(6.9, len(queries) * (6.9 / sum(widths) + 0.2) + 0.3))
    for part, (name, ids) in zip(
        fig.subfigures(1, len(blocks), width_ratios=widths, wspace=0.02), blocks.items(), strict=True
    ):
        part.suptitle(name, fontsize=8, weight="bold", x=0.02, ha="left")
        for line, query, rows in zip(part.subplots(*ids.shape, squeeze=False), queries, ids, strict=True):
            for ax, row in zip(line, rows, strict=True):
                _retrieved(ax, tiles, row, query)
    return fig


def _retrieved(ax: Axes, tiles: TileSet, row: int, query: int) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(row >= 0)
    if row < 0:
        return
    table = tiles.table
    labelled = table["label"].nunique() > 1
    ax.imshow(tiles.image(row))
    entry = table.iloc[row]
    same = entry["label"] == table["label"].iloc[query]
    edge = "black" if row == query else "0.7" if not labelled else SAME if same else OTHER
    ax.spines[:].set(color=edge, linewidth=1.8)
    ax.set_title(entry["label"] if labelled else entry["slide_id"], fontsize=6, loc="center", pad=2.5)
    ax.set_xlabel(entry.get("centre", ""), fontsize=6, labelpad=2)
    if row == query and pd.notna(entry["mpp"]):
        figures.scale_bar(ax, entry["mpp"])
        ax.texts[-1].set_fontsize(5)


def field(axes, image: np.ndarray, um_per_px: float, *grids: np.ndarray, limits: tuple[float, float] = (0, 1)) -> None:
    """A field and below it what is known of its patches, down a column of axes.

    grids  (h, w) values, drawn from dark to light between `limits`, or (h, w, 3) colours
    """
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    figures.image(axes[0], image, um_per_px)
    for ax, grid in zip(axes[1:], grids, strict=True):
        ax.imshow(grid, cmap="inferno", vmin=limits[0], vmax=limits[1], extent=extent)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)


def side_label(ax: Axes, text: str) -> None:
    """A name for a row of images, read upwards at its left, also where the axes are off."""
    ax.text(-0.04, 0.5, text, transform=ax.transAxes, rotation=90, ha="right", va="center", fontsize=8)


def letter(ax: Axes, name: str) -> None:
    """A bold panel letter before the title that the panel has."""
    ax.set_title(rf"$\mathbf{{{name}}}$  {ax.get_title(loc='left')}")


def views(axes, seen, global_px: int) -> None:
    """The first tile's views with the microns per pixel that a network sees in each; as many as there are axes.

    seen  what `pathfm.augment.MultiCrop` returns
    """
    pictures = [*seen.global_[:, 0], *seen.local[:, 0]]
    for ax, view, mpp in zip(axes, pictures, seen.effective_mpp[:, 0].tolist(), strict=False):
        kind = "global" if view.shape[-1] == global_px else "local"
        pixels = (view.permute(1, 2, 0).numpy() * 0.5 + 0.5).clip(0, 1)
        figures.image(ax, pixels, mpp, f"{kind}\n{mpp:.2f} µm/px")


def sampled(ax, thumbnail, um_per_px, mask, mask_um, names, tile_px: int, slide_mpp: float) -> None:
    """A slide with the outline of its foreground and the squares of tiles drawn from it, coloured by mpp.

    thumbnail  (h, w, 3) at um_per_px;  mask  (h, w) bool at mask_um
    names      of the tiles, from `TileStream.names`
    """
    figures.image(ax, thumbnail, um_per_px, "foreground, tiles drawn")
    (height, width), scale = mask.shape, mask_um / um_per_px
    x, y = ((np.arange(n) + 0.5) * scale - 0.5 for n in (width, height))
    ax.contour(x, y, mask, [0.5], colors="black", linewidths=0.7)
    for tile in names.itertuples():
        side = tile_px * tile.mpp / um_per_px
        corner = np.array([tile.x, tile.y]) * slide_mpp / um_per_px - 0.5
        ax.add_patch(plt.Rectangle(corner, side, side, fill=False, lw=1.1, ec=figures.mpp_colour(tile.mpp)))


def nested(ax: Axes, tiles: dict[float, np.ndarray]) -> None:
    """Tiles of one place, finest to coarsest, on a two-by-two board; each coarser one frames the next finer.

    tiles  mpp -> (side, side, 3) uint8, all of one side in pixels and one centre
    """
    figures.image(ax, np.full((100, 100, 3), 255, np.uint8), title="one place, by µm/px")
    order = sorted(tiles)
    for place, mpp in enumerate(order[:4]):
        inset = ax.inset_axes([0.51 * (place % 2), 0.51 * (1 - place // 2), 0.49, 0.49])
        figures.image(inset, tiles[mpp], mpp)
        inset.set_axis_on()
        inset.set(xticks=[], yticks=[])
        inset.spines[:].set(visible=True, color=figures.mpp_colour(mpp), linewidth=2)
        if place:
            side = tiles[mpp].shape[0]
            inner = side * order[place - 1] / mpp
            corner = [(side - inner) / 2] * 2
            inset.add_patch(
                plt.Rectangle(corner, inner, inner, fill=False, lw=1.2, ec=figures.mpp_colour(order[place - 1]))
            )
        inset.text(0.96, 0.95, f"{mpp:g}", transform=inset.transAxes, ha="right", va="top", bbox=LABEL)


def sweep_points(ax: Axes, table: pd.DataFrame, x: str, y: str, hue: str) -> None:
    """Every run of a sweep as a point, by setting x and coloured by hue; says so where nothing is recorded."""
    if table.empty:
        ax.text(0.5, 0.5, "not recorded yet:\nmake sweep", transform=ax.transAxes, ha="center", va="center")
        ax.set(xticks=[])
        return
    places = list(dict.fromkeys(table[x].astype(str)))
    starts = list(dict.fromkeys(table[hue].astype(str)))
    for number, start in enumerate(starts):
        rows = table[table[hue].astype(str) == start]
        shift = 0.16 * (number - (len(starts) - 1) / 2)
        ax.plot([places.index(str(v)) + shift for v in rows[x]], rows[y], "o", ms=4, label=start)
    ax.set_xticks(range(len(places)), [place.replace(",", ", ") for place in places])
    ax.set(xlabel="µm/px of the tiles", xlim=(-0.5, len(places) - 0.5))
    ax.legend(loc="upper left")
