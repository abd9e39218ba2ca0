"""How often each slide comes, and each position on it: classes in balance, weights, maps of weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pathfm.cohort import patient_of
from pathfm.errors import InputError, nearest
from pathfm.storage import atomic_path, read_json, write_json


def shares(slides: pd.DataFrame, balance: Sequence[str] = (), weights=None) -> np.ndarray:
    """(S,) expected share of tiles of each slide, summing to 1.

    slides    one row a slide: slide_id and the columns that are spoken of
    balance   columns, outer to inner, whose classes share alike: every label as often as another, within it every
              patient, within the patient every slide (H2G-Net's order, arXiv 2112.03455). "patient" is patient_id
    weights   within the innermost class slides weigh the same (None), as a numeric column says ("tissue_mm2": by
              tissue area), or as {slide_id: weight} or (S,) numbers say; 0 leaves a slide out
    """
    own = slide_weights(slides, weights)
    groups = _groups(slides, balance)
    share, parent = np.ones(len(slides)), np.zeros(len(slides), np.int64)
    alive = own > 0
    for group in groups:
        # a class whose slides all weigh nothing takes no share of its parent's
        pairs = pd.DataFrame({"parent": parent, "group": group})[alive].drop_duplicates()
        siblings = pairs.groupby("parent")["group"].size().reindex(parent).to_numpy(float)
        share, parent = share / np.where(alive, siblings, np.inf), group
    inside = pd.Series(own).groupby(parent).transform("sum").to_numpy()
    share = np.where(alive, share * own / np.where(alive, inside, 1), 0.0)
    return share / share.sum()


def rounds(slides: pd.DataFrame, share: np.ndarray, balance: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(order, ends): slides by class, and where each one's share ends on a line of length S; empty where all are equal.

    A round is S tiles, at points j + u of that line, u drawn once a round and j = 0..S - 1 visited in a permuted
    order (systematic sampling). So a slide's tiles in a round differ from S times its share by less than one, and so do
    those of every class of `balance`, whose slides lie side by side on the line.
    """
    if np.ptp(share) <= 1e-12 * share.max():
        return np.zeros(0, np.int64), np.zeros(0)
    groups = _groups(slides, balance)
    order = np.lexsort(groups[::-1]) if groups else np.arange(len(share))
    ends = np.cumsum(share[order])
    return order.astype(np.int64), ends * (len(share) / ends[-1])


def columns_of(balance: str | Sequence[str] | None) -> tuple[str, ...]:
    """ "label,patient" or ["label", "patient"] -> ("label", "patient"); None and "" and "slide" -> ()."""
    given = balance.split(",") if isinstance(balance, str) else (balance or ())
    return tuple(name.strip() for name in given if name.strip() not in ("", "slide", "equal"))


def _groups(slides: pd.DataFrame, balance: Sequence[str]) -> list[np.ndarray]:
    """For each level the number of every slide's class, a class being told apart by all levels down to its own."""
    found, path = [], pd.Series("", index=slides.index)
    for name in balance:
        if name == "patient":
            value = patient_of(slides)
        elif name in slides:
            value = slides[name]
        else:
            raise InputError(f"cannot balance by '{name}': no such column.{nearest(name, ['patient', *slides])}")
        if value.isna().any():
            slide = slides["slide_id"].iloc[int(value.isna().to_numpy().argmax())]
            raise InputError(
                f"cannot balance by '{name}': slide '{slide}' has none; fill it in, or leave the slide out"
            )
        path = path + "\0" + value.astype(str)
        found.append(np.unique(path.to_numpy(str), return_inverse=True)[1])
    return found


def slide_weights(slides: pd.DataFrame, given) -> np.ndarray:
    """(S,) numbers of at least 0, not all 0."""
    ids = slides["slide_id"]
    if given is None:
        return np.ones(len(slides))
    if isinstance(given, str):
        if given not in slides:
            raise InputError(f"slide_weights='{given}' is no column.{nearest(given, list(slides))}")
        found = pd.to_numeric(slides[given], errors="coerce").to_numpy(float, na_value=np.nan)
    elif isinstance(given, Mapping | pd.Series):
        given = dict(given)
        unknown = sorted(set(map(str, given)) - set(ids))
        if unknown:
            raise InputError(f"slide_weights names the unknown slide '{unknown[0]}'.{nearest(unknown[0], ids[:200])}")
        found = np.array([given.get(slide_id, np.nan) for slide_id in ids], float)
    else:
        found = np.asarray(given, float)
        if found.shape != (len(slides),):
            raise InputError(f"slide_weights has shape {found.shape}; give a weight for each of {len(slides)} slides")
    wrong = ~((found >= 0) & (found < np.inf))
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(
            f"slide_weights gives slide '{ids.iloc[at]}' {found[at]:g}; a weight is a number of at least 0"
        )
    if not found.any():
        raise InputError("slide_weights are all 0; give at least one slide a positive weight")
    return found


class WeightMaps:
    """Weights of positions, a map a slide. For feature clusters, as in RudolfV (arXiv 2401.04079), a map is
    `weight_of_cluster[cluster_map]`.

    maps    {slide_id: (h, w) numbers >= 0}; h x w as the slide's tissue mask (`index.mask`), or as that mask in blocks
            of `cells` x `cells`, the last ones cut off at the slide's edge
    cells   mask cells along the side of a map's cell

    A position weighs what the map says where the tile's centre lies: cell (floor(cy / side), floor(cx / side)) of
    the map, with (cx, cy) the centre in level-0 pixels, x + half the footprint, and side = cells x cell_px. Given slide
    and mpp, a position is drawn in proportion to that among the admissible ones. Slides are not weighed by it.
    """

    def __init__(self, maps: Mapping[str, np.ndarray], cells: int = 1):
        if not (isinstance(cells, int | np.integer) and cells >= 1):
            raise InputError(f"cells={cells!r} must be a whole number of mask cells, at least 1")
        self.cells, self.folder, self.told = int(cells), None, None
        maps = {name: _checked_map(name, one) for name, one in maps.items()}
        sizes = [one.size for one in maps.values()]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.table = {name: (int(at), *one.shape) for (name, one), at in zip(maps.items(), starts[:-1], strict=True)}
        self.values = np.concatenate([one.ravel() for one in maps.values()] or [np.zeros(0, np.float32)])

    def save(self, folder: str | Path) -> Path:
        """The maps as weights.npy and weights.json, for `open`, which maps them from disk: for many slides."""
        folder = Path(folder)
        with atomic_path(folder / "weights.npy") as path:
            np.save(path, self.values)
        write_json(folder / "weights.json", {"cells": self.cells, "maps": self.table, "digest": self.digest()})
        return folder

    @classmethod
    def open(cls, folder: str | Path) -> WeightMaps:
        """Those that `save` wrote, mapped from disk; pickled as the folder's path alone."""
        about = read_json(Path(folder) / "weights.json")
        found = cls({}, about["cells"])
        found.told = about["digest"]
        found.folder, found.table = Path(folder), {name: tuple(row) for name, row in about["maps"].items()}
        found.values = np.asarray(np.load(found.folder / "weights.npy", mmap_mode="r"))
        return found

    @classmethod
    def of(cls, given) -> WeightMaps:
        """From a mapping of maps, a folder or WeightMaps."""
        if isinstance(given, WeightMaps):
            return given
        return cls.open(given) if isinstance(given, str | Path) else cls(given)

    def rows(self, slides: pd.DataFrame) -> np.ndarray:
        """(S, 4) int64 for the draws: start in `values`, height, width, side of a cell in level-0 px."""
        found = np.empty((len(slides), 4), np.int64)
        for k, row in enumerate(slides.itertuples()):
            if row.slide_id not in self.table:
                raise InputError(f"position_weights has no map for slide '{row.slide_id}'; give one, or leave it out")
            side = self.cells * int(row.cell_px)
            start, *shape = self.table[row.slide_id]
            wanted = [-(-int(row.height_px) // side), -(-int(row.width_px) // side)]
            if shape != wanted:
                raise InputError(
                    f"position_weights of slide '{row.slide_id}' is {shape[0]} x {shape[1]}, its mask in blocks of "
                    f"{self.cells} is {wanted[0]} x {wanted[1]}; make the map on the mask's own grid"
                )
            found[k] = start, *shape, side
        return found

    def tops(self, rows: np.ndarray) -> np.ndarray:
        """(S,) the greatest weight of each slide's map."""
        return np.array([self.values[at : at + h * w].max(initial=0) for at, h, w, _ in rows], np.float64)

    def digest(self) -> str:
        """By which a record tells one set of maps from another."""
        if self.told:
            return self.told
        mark = hashlib.blake2b(repr((self.cells, self.table)).encode(), digest_size=8)
        mark.update(np.ascontiguousarray(self.values).view(np.uint8))
        return mark.hexdigest()

    def __getstate__(self) -> dict:
        return self.__dict__ if self.folder is None else {**self.__dict__, "values": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.values is None:
            self.values = np.asarray(np.load(self.folder / "weights.npy", mmap_mode="r"))


def _checked_map(name: str, given) -> np.ndarray:
    found = np.asarray(given, np.float32)
    if found.ndim != 2 or not found.size:
        raise InputError(f"position_weights of slide '{name}' has shape {found.shape}; give one of (h, w)")
    if not (np.isfinite(found) & (found >= 0)).all():
        raise InputError(f"position_weights of slide '{name}' holds a number that is negative or none; mend the map")
    if not found.any():
        raise InputError(f"position_weights of slide '{name}' are all 0; leave the slide out instead")
    return found
