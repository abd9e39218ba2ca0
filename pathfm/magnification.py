"""Scores as a curve over the scale of the test tiles: the same sites cut again from their slides, finer and coarser."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from torch import nn

from pathfm import probe, scores
from pathfm.benchmarks import TileSet
from pathfm.cohort import Cohort
from pathfm.errors import InputError
from pathfm.features import Features, extract, pools
from pathfm.panels import method_colour
from pathfm.slide import MAX_UPSAMPLE, Slide

MPPS = (0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the continuous-magnification study, arXiv:2601.02198
NEEDED = ("slide_id", "x", "y", "slide_mpp", "mpp")


@dataclass(frozen=True, repr=False)
class RecutTiles(TileSet):
    """Tiles read from slides: the table's column `path` is the slide; x, y, mpp and width_px are the square's."""

    def image(self, row: int) -> np.ndarray:
        """(side, side, 3) uint8."""
        return next(self._read(self.table.iloc[[row]]))

    def images(self, batch_size: int = 64) -> Iterator[list[np.ndarray]]:
        """Batches of images in the table's order; a slide is opened once a batch."""
        for start in range(0, len(self), batch_size):
            yield list(self._read(self.table.iloc[start : start + batch_size]))

    def _read(self, rows: pd.DataFrame) -> Iterator[np.ndarray]:
        found = {}
        for path, here in rows.groupby("path", sort=False):
            with Slide.open(path, here["slide_mpp"].iloc[0]) as slide:
                # One filter for all scales: pixels that pass as they are would be sharper than their neighbours.
                for one in here.itertuples():
                    found[one.Index] = slide.read(one.x, one.y, one.width_px, one.mpp, resample="always")
        yield from (found[index] for index in rows.index)


def recut(tiles: TileSet, slides: Cohort, mpps: Sequence[float] = MPPS) -> dict[float, RecutTiles]:
    """The sites of `tiles` at each mpp, as many pixels around the same centre; mpp -> tiles, row by row the same sites.

    tiles   with columns slide_id, x, y (level-0 px of the upper-left corner), slide_mpp and mpp, square
    slides  the cohort they were cut from

    A site stays where its slide serves every mpp and every square lies inside: else other sites would stand at other
    scales. `quarantined` of the result lists those left out, and why. A tile keeps the label that it has at its own
    mpp; a coarser one shows more of what is around. Raises InputError where no site of some class is left.
    """
    table = _located(tiles, slides)
    reason = _unserved(table, sorted(mpps))
    kept, lost = table[reason == ""].reset_index(drop=True), table.assign(reason=reason)[reason != ""]
    gone = sorted(set(table["label"]) - set(kept["label"]))
    if gone:
        why = lost.loc[lost["label"] == gone[0], "reason"].iloc[0]
        raise InputError(f"{tiles.name}: no site of class {gone[0]} serves {min(mpps):g} to {max(mpps):g} mpp ({why})")
    lost = lost[["file", "label", "reason"]].reset_index(drop=True)
    return {mpp: RecutTiles(f"{tiles.name} at {mpp:g} mpp", _square(kept, mpp), lost, tiles.leaky) for mpp in mpps}


def curve(
    model,
    sets: dict[float, TileSet],
    preprocess: Callable | None = None,
    fit: Callable[[Features], scores.Prediction] = probe.linear,
    trained_at: float | None = None,
    pool: str = "cls",
    name: str = "features",
    floors: Mapping[str, nn.Module | str] | None = None,
) -> pd.DataFrame:
    """A row an mpp of the test tiles: tile_mpp, trained_at, and the columns of `scores.scores`; `mpp` is the effective.

    model, preprocess, pool   as `features.extract` takes them; the name of a floor will do
    sets         of `recut`, with roles
    fit          a probe; at every scale it is fitted anew, or
    trained_at   on tiles of this mpp alone, and tested at all of them: what a change of scale costs
    floors       name -> network or floor's name, such as {"random weights": twin, "colour + LBP": "colour+lbp"}: probed
                 as the model is (a network on the pooling that validates best, after the same `preprocess`). They
                 have rows of their own, and the model's gain, interval and verdict are over the best at that mpp
    """
    if trained_at is not None and trained_at not in sets:
        raise InputError(f"no tiles of {trained_at:g} mpp to train on; there are {', '.join(f'{m:g}' for m in sets)}")
    asked = {name: {mpp: [extract(model, tiles, preprocess, pool, name)] for mpp, tiles in sets.items()}}
    for floor, what in (floors or {}).items():
        asked[floor] = {mpp: _poolings(what, tiles, preprocess, floor) for mpp, tiles in sets.items()}
    rows = []
    for mpp in sorted(sets):
        at = mpp if trained_at is None else trained_at
        answers = [_answer(found[mpp], found[at], fit) for found in asked.values()]
        answers = [replace(one, floor=one.floor or k > 0) for k, one in enumerate(answers)]
        rows += [{"tile_mpp": mpp, "trained_at": at, **row} for _, row in scores.scores(answers).iterrows()]
    return pd.DataFrame(rows)


def _poolings(what: nn.Module | str, tiles: TileSet, preprocess: Callable | None, name: str) -> list[Features]:
    """A descriptor's features, or a network's of every pooling that it has."""
    if isinstance(what, str):
        return [extract(what, tiles, name=name)]
    pool = "both" if getattr(what, "cls_token", None) is not None else "mean"
    return [replace(one, name=name) for one in pools(extract(what, tiles, preprocess, pool, name))]


def _answer(tested: list[Features], trained: list[Features], fit: Callable) -> scores.Prediction:
    """Test tiles of one scale, answered by a probe of another or the same; the pooling is that which validates best."""
    answers = []
    for there, here in zip(tested, trained, strict=True):
        test = (there.table["role"] == "test").to_numpy()
        answers.append(fit(replace(there, x=np.where(test[:, None], there.x, here.x))))
    return max(answers, key=lambda answer: answer.settings["validate"]) if len(answers) > 1 else answers[0]


def panel(ax: Axes, table: pd.DataFrame, chance: float | None = None) -> Axes:
    """Score over the mpp of the test tiles with its interval, a line a set of features; dashed: trained at one scale.

    table   of one `curve` or of several put together, each with its own name

    Under an mpp stands in brackets what a network sees of it; floors see the tile as it is.
    """
    for name, rows in table.groupby("features", sort=False):
        mpp = rows["tile_mpp"]
        style = "o--" if rows["trained_at"].nunique() < len(rows) else "o-"
        ax.plot(mpp, rows["balanced_accuracy"], style, ms=4, color=method_colour(name), label=name)
        ax.fill_between(mpp, rows["low"], rows["high"], color=method_colour(name), alpha=0.15, lw=0)
    if chance is not None:
        ax.axhline(chance, color="0.6", lw=0.9, ls="--")
    label = "µm per pixel of the test tiles\n(in brackets: of what the network sees)"
    ax.set(xscale="log", ylim=(0, 1), xlabel=label, ylabel="balanced accuracy")
    seen = table.assign(mpp=table["mpp"].astype(float)).groupby("tile_mpp")["mpp"].max()
    ticks = [f"{tile:g}" + ("" if np.isnan(mpp) else f"\n({mpp:.3g})") for tile, mpp in seen.items()]
    ax.set_xticks(seen.index, ticks, fontsize=7)
    ax.minorticks_off()
    return ax


def _located(tiles: TileSet, slides: Cohort) -> pd.DataFrame:
    """The tiles' table with their slide's path and its sides in level-0 px."""
    missing = [name for name in NEEDED if name not in tiles.table]
    if missing:
        raise InputError(f"{tiles.name} has no column {missing[0]}; only tiles whose place is known are cut again")
    if (tiles.table["width_px"] != tiles.table["height_px"]).any():
        raise InputError(f"{tiles.name} has tiles that are not square; their place at another scale is not known")
    unknown = set(tiles.table["slide_id"]) - set(slides.table["slide_id"])
    if unknown:
        raise InputError(f"slide {min(unknown)} of {tiles.name} is not in the cohort {slides.name}")
    paths = slides.table.set_index("slide_id")["path"]
    table = tiles.table.assign(path=tiles.table["slide_id"].map(paths))
    sides = {}
    for path, mpp in table.drop_duplicates("path")[["path", "slide_mpp"]].itertuples(index=False):
        with Slide.open(path, mpp) as slide:
            sides[path] = slide.width_px, slide.height_px
    width, height = zip(*(sides[path] for path in table["path"]), strict=True)
    return table.assign(slide_width_px=width, slide_height_px=height)


def _corner(table: pd.DataFrame, mpp: float) -> tuple[pd.Series, pd.Series]:
    """Upper-left corner in level-0 px of the square at `mpp` around each tile's centre, on whole pixels."""
    shift = table["width_px"] * (table["mpp"] - mpp) / table["slide_mpp"] / 2
    return (table["x"] + shift).round().astype(int), (table["y"] + shift).round().astype(int)


def _unserved(table: pd.DataFrame, mpps: Sequence[float]) -> pd.Series:
    """Why a site is left out, or ""."""
    reason = pd.Series("", index=table.index)
    for mpp in mpps:
        x, y = _corner(table, mpp)
        side = (table["width_px"] * mpp / table["slide_mpp"]).round()
        inside = (x >= 0) & (y >= 0) & (x + side <= table["slide_width_px"]) & (y + side <= table["slide_height_px"])
        coarse = table["slide_mpp"] > mpp * MAX_UPSAMPLE * (1 + 1e-9)
        reason[(reason == "") & coarse] = f"its slide does not serve {mpp:g} mpp"
        reason[(reason == "") & ~inside] = f"its square at {mpp:g} mpp leaves the slide"
    return reason


def _square(table: pd.DataFrame, mpp: float) -> pd.DataFrame:
    """The table of the squares at one mpp; the digest is of the slide's file and the square, and of no pixel."""
    x, y = _corner(table, mpp)
    table = table.assign(x=x, y=y, mpp=float(mpp)).drop(columns=["slide_width_px", "slide_height_px"])
    files = {
        path: f"{path} {Path(path).stat().st_size} {Path(path).stat().st_mtime_ns}" for path in table["path"].unique()
    }
    named = [f"{files[one.path]} {one.x} {one.y} {one.width_px} {mpp!r}" for one in table.itertuples()]
    return table.assign(digest=[hashlib.blake2b(name.encode(), digest_size=12).hexdigest() for name in named])
