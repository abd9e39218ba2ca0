"""What a run saw, told from the numbers of its tiles."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pathfm.cohort import patient_of
from pathfm.errors import InputError


def audit(stream, numbers) -> dict[str, pd.DataFrame]:
    """What a run that used these tile numbers (a range) saw; no pixel is read unless a filter asks for it.

    "centre", "patient"   tiles, their share, and the share of slides: equal when every slide weighs the same
    "mpp"                 tiles and share beside the declared share
    "tissue"              tiles by share of tissue
    "slides"              per slide: tiles, tissue_mm2, coverage (share of its tissue seen at least once),
                          overlap (share of what was read that had been read before), disjoint_tiles (area seen
                          over the area of a tile)
    "filter"              of a stream with a tile_filter: share passed_at_once, mean redraws, and how many tiles were
                          kept_though_rejected because redraws ran out; its pixels are read for this
    "class"               where synthetic truth lies beside the slides: share of the area seen, and of the tissue
    """
    tiles = stream.names(numbers)
    slides = stream.slides.set_index("slide_id", drop=False)
    facts = pd.DataFrame({"patient": patient_of(slides)})
    if "centre" in slides:
        facts["centre"] = slides["centre"].fillna("unknown")
    tables = {name: _shares(tiles["slide_id"].map(facts[name]), facts[name]) for name in facts}
    tables["mpp"] = _by_mpp(tiles, stream)
    if "passes" in tiles:
        told = {"passed_at_once": (tiles["redraws"].eq(0) & tiles["passes"]).mean(), "redraws": tiles["redraws"].mean()}
        tables["filter"] = pd.DataFrame([{**told, "kept_though_rejected": (~tiles["passes"]).sum()}])
    steps = pd.cut(tiles["tissue"], [0, 0.4, 0.6, 0.8, 0.95, 1.0], include_lowest=True)
    tables["tissue"] = steps.value_counts(sort=False).rename("tiles").rename_axis("tissue").reset_index()
    groups = [(slides.loc[slide_id], group) for slide_id, group in tiles.groupby("slide_id", sort=True)]
    tables["slides"] = pd.DataFrame([_coverage(stream, row, group) for row, group in groups])
    classes = [found for found in (_classes(stream, row, group) for row, group in groups) if found is not None]
    if classes:
        seen, there = (pd.DataFrame(part).sum() for part in zip(*classes, strict=True))
        tables["class"] = pd.DataFrame({"seen": seen / seen.sum(), "tissue": there / there.sum()})
        tables["class"] = tables["class"].rename_axis("class").reset_index()
    return tables


def _shares(of_tiles: pd.Series, of_slides: pd.Series) -> pd.DataFrame:
    tiles = of_tiles.value_counts().reindex(sorted(of_slides.unique()), fill_value=0)
    return pd.DataFrame(
        {"tiles": tiles, "share": tiles / tiles.sum(), "of_slides": of_slides.value_counts(normalize=True)}
    ).rename_axis(of_slides.name).reset_index()  # fmt: skip


def _by_mpp(tiles: pd.DataFrame, stream) -> pd.DataFrame:
    """Each tile counted at the declared mpp nearest to its true one, or in its bin."""
    table = stream.mixture
    if "low" in table:  # bins of a continuous law
        nearest = np.searchsorted(table["low"], tiles["mpp"], "right").clip(1) - 1
    else:
        nearest = np.abs(np.log(tiles["mpp"].to_numpy()[:, None] / table["mpp"].to_numpy())).argmin(axis=1)
    tiles_at = np.bincount(nearest, minlength=len(table))
    return table.assign(tiles=tiles_at, share=tiles_at / max(tiles_at.sum(), 1))


def _coverage(stream, row, tiles: pd.DataFrame) -> dict:
    """How often each mask pixel's middle lay in a tile, summed up over a slide."""
    mask, um_per_px = stream.index.mask(row.slide_id)
    depth = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    low = np.ceil(tiles[["x", "y"]].to_numpy() / row.cell_px - 0.5).astype(int)
    side = stream.tile_px * tiles["mpp"].to_numpy()[:, None] / row.mpp
    high = np.ceil((tiles[["x", "y"]].to_numpy() + side) / row.cell_px - 0.5).astype(int)
    high = np.minimum(high, mask.shape[::-1])
    np.add.at(depth, (low[:, 1], low[:, 0]), 1)
    np.add.at(depth, (high[:, 1], high[:, 0]), 1)
    np.add.at(depth, (low[:, 1], high[:, 0]), -1)
    np.add.at(depth, (high[:, 1], low[:, 0]), -1)
    depth = depth.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
    tile_um2 = ((stream.tile_px * tiles["mpp"]) ** 2).mean()
    return {
        "slide_id": row.slide_id,
        "tiles": len(tiles),
        "tissue_mm2": row.tissue_mm2,
        "coverage": (depth > 0)[mask].mean(),
        "overlap": 1 - (depth > 0).sum() / max(depth.sum(), 1),
        "disjoint_tiles": (depth > 0).sum() * um_per_px**2 / tile_um2,
    }


def _classes(stream, row, tiles: pd.DataFrame) -> tuple[dict, dict] | None:
    """um2 of each class that the tiles showed, and that the slide has; None without truth."""
    from pathfm.synthetic import CLASSES, Truth

    try:
        truth = Truth.open(row.path)
    except InputError:
        return None
    scale = row.mpp / truth.map_um  # map pixels per level-0 pixel
    seen = np.zeros(len(CLASSES) + 1)
    for x, y, mpp in zip(tiles["x"], tiles["y"], tiles["mpp"], strict=True):
        left, top, side = round(x * scale), round(y * scale), round(stream.tile_px * mpp / truth.map_um)
        seen += np.bincount(truth.class_map[top : top + side, left : left + side].ravel(), minlength=len(seen))
    there = np.bincount(truth.class_map.ravel(), minlength=len(seen))
    return tuple(dict(zip(CLASSES, counts[1:] * truth.map_um**2, strict=True)) for counts in (seen, there))
