"""A cohort on pages that a person can check in one look: each slide, its mask, what was taken for an artefact."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pathfm import tissue
from pathfm.errors import InputError, nearest
from pathfm.figures import scale_bar
from pathfm.index import SlideIndex
from pathfm.storage import atomic, explained, progress

COLOURS = {"pen": "#009E73", "fold": "#D55E00", "bubble": "#56B4E9", "edge": "#CC79A7", "blur": "#E6C229"}
LINE, ALARM = "#0072B2", "#C00000"
SCALES = 2.5  # slides that differ more in length are not shown at one scale
CAPTION = 0.26  # inches above a slide
SORTS = ("suspicious", "slide_id")
STANDS_OUT = 3.0  # robust standard deviations


class Page(NamedTuple):
    """Columns and rows of slides, and the width in inches."""

    columns: int
    rows: int
    width: float


PAGES = {"a4": Page(6, 7, 7.5), "letter": Page(6, 6, 7.7), "screen": Page(10, 4, 13.0)}


def write(index: SlideIndex, out: str | Path, sort: str = "suspicious", page: str = "a4") -> Path:
    """Pages <out>/montage-001.png ... of every slide, usable or not, and <out>/index.csv, whose path is returned.

    index.csv   `listing` with page, row and column (from 1) of each slide

    Pages are drawn one by one from what the scan of each slide kept, so that thousands of slides need neither
    their files nor much memory. Pages of an earlier, longer run are removed. Raises InputError where no slide is
    usable, or the folder cannot be written.
    """
    check(sort, page)
    columns, rows, width = PAGES[page]
    table, out = listing(index, sort), _writable(Path(out))
    number, place = np.divmod(np.arange(len(table)), columns * rows)
    table["page"], table["row"], table["column"] = number + 1, place // columns + 1, place % columns + 1
    for number, part in progress(table.groupby("page"), "montage", unit="page"):
        fig = figure(index, part["slide_id"].tolist(), columns=columns, width=width, notes=table)
        with atomic(out / f"montage-{number:03d}.png") as file:
            fig.savefig(file, format="png", dpi=200, metadata={"Software": None})
    for old in out.glob("montage-[0-9][0-9][0-9]*.png"):
        if int(old.stem.split("-")[1]) > table["page"].max():
            old.unlink()
    with atomic(out / "index.csv", "w") as file:
        table.to_csv(file, index=False)
    return out / "index.csv"


def check(sort: str, page: str) -> None:
    """Raises InputError where there is no such order or page."""
    if sort not in SORTS:
        raise InputError(f"slides are not sorted by '{sort}'.{nearest(sort, SORTS)}")
    if page not in PAGES:
        raise InputError(f"no page is called '{page}'.{nearest(page, PAGES)}")


def listing(index: SlideIndex, sort: str = "suspicious") -> pd.DataFrame:
    """One row a slide: slide_id, status, tissue_mm2, rejected, the area of each kind of artefact, why.

    rejected   area taken for artefacts, over that and the tissue's
    why        the reason of a quarantined slide, or in what this one stands out from the cohort
    sort       "suspicious": quarantined ones, then what stands out most; or "slide_id"
    """
    check(sort, "a4")
    if index.usable.empty:
        reasons = index.quarantined["reason"]
        raise InputError(f"none of the {len(reasons)} slides can be shown. The first: {'; '.join(reasons[:3])}")
    slides, kinds = index.slides, [f"{kind}_mm2" for kind in tissue.KINDS]
    spoilt = slides[kinds].sum(axis=1)
    table = slides[["slide_id", "status", "tissue_mm2"]].assign(rejected=spoilt / (spoilt + slides["tissue_mm2"]))
    table[kinds] = slides[kinds]
    share = slides["tissue_mm2"] * 1e6 / (slides["width_px"] * slides["height_px"] * slides["mpp"] ** 2).astype(float)
    far = pd.DataFrame(
        {
            "much rejected": _standing_out(table["rejected"], 0.03),
            "little tissue": _standing_out(-np.log(slides["tissue_mm2"].clip(1e-3)), 0.5),
            "nearly all of it tissue": _standing_out(share, 0.1),
        }
    )
    far.loc[slides["status"] != "ok"] = np.inf
    told = far.idxmax(axis=1).where(far.max(axis=1) > STANDS_OUT, "")
    table["why"] = slides["reason"].where(slides["status"] != "ok", told)
    if sort == "suspicious":
        table = table.assign(far=far.max(axis=1)).sort_values(["far", "slide_id"], ascending=[False, True])
        return table.drop(columns="far").reset_index(drop=True)
    return table.sort_values("slide_id").reset_index(drop=True)


def figure(
    index: SlideIndex,
    slide_ids: list[str],
    masks: bool = True,
    columns: int = 6,
    width: float = 6.5,
    notes: pd.DataFrame | None = None,
) -> Figure:
    """These slides on one page `width` inches wide; with `masks` their tissue outlined and artefacts filled.

    notes   `listing` of the cohort, made here where it is not given

    At one scale with one bar, unless some slide is SCALES times as long as another: then each has its own.
    A quarantined slide is an empty frame with its reason.
    """
    notes = (listing(index) if notes is None else notes).set_index("slide_id")
    slides = index.slides.set_index("slide_id").loc[list(slide_ids)]
    longest = (slides[["width_px", "height_px"]].max(axis=1) * slides["mpp"]).dropna().astype(float)
    common = longest.max() if len(longest) and longest.max() <= SCALES * longest.min() else None
    rows = -(-len(slide_ids) // columns)
    cell = width / columns
    height = rows * (cell + CAPTION) + 0.3
    fig = Figure(figsize=(width, height), layout=PlaceHolderLayoutEngine(True, False))
    for place, name in enumerate(slide_ids):
        left, top = place % columns * cell, 0.02 + place // columns * (cell + CAPTION) + CAPTION
        side = cell - 0.08
        ax = fig.add_axes([(left + 0.04) / width, 1 - (top + side) / height, side / width, side / height])
        _slide(ax, index, name, notes.loc[name], masks, common, place == 0)
    if masks:
        _legend(fig, notes.loc[list(slide_ids)])
    return fig


def _slide(ax: Axes, index: SlideIndex, name: str, note, masks: bool, common: float | None, first: bool) -> None:
    alarm = masks and bool(note["why"])
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(visible=True, color=ALARM if alarm else "0.8", linewidth=1.2 if alarm else 0.4)
    shown = name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"
    _caption(ax, shown, 9, fontsize=5.5, weight="bold")
    if note["status"] != "ok":
        ax.set_facecolor("0.95")
        reason = "\n".join(textwrap.wrap(note["why"], 26)[:9])
        ax.text(0.5, 0.5, reason, transform=ax.transAxes, fontsize=4.5, ha="center", va="center", color=ALARM)
        _caption(ax, "quarantined", 2.5, fontsize=5, color=ALARM)
        return
    mask, um_per_px = index.mask(name)
    high, wide = (side * um_per_px for side in mask.shape)
    pixels = index.picture(name)
    if masks:
        pixels = _filled(pixels, index.artefacts(name))
        ax.add_collection(LineCollection(_outlines(mask, pixels.shape, um_per_px), colors=LINE, linewidths=0.6))
    ax.imshow(pixels, extent=(0, wide, high, 0), interpolation="antialiased")
    room = common or max(high, wide)
    ax.set(xlim=((wide - room) / 2, (wide + room) / 2), ylim=((high + room) / 2, (high - room) / 2), aspect="equal")
    about = f"{note['tissue_mm2']:.3g} mm²" + f", {100 * note['rejected']:.0f} % rejected" * bool(note["rejected"] > 0)
    said = f"{about}: {note['why']}" if alarm and note["why"] != "much rejected" else about
    _caption(ax, said, 2.5, fontsize=5, color=ALARM if alarm else "0.3")
    if first or common is None:
        _bar(ax, room)


def _caption(ax: Axes, text: str, points: float, **style) -> None:
    """A line of text that many points above the frame."""
    ax.annotate(text, (0, 1), (0, points), xycoords="axes fraction", textcoords="offset points", va="bottom", **style)


def _bar(ax: Axes, room: float) -> None:
    """A small scale bar, for a picture as wide as a stamp."""
    known = set(ax.texts)
    scale_bar(ax, 1.0)
    ax.lines[-1].set_linewidth(1.4)
    for text in set(ax.texts) - known:
        text.set_fontsize(4.5)


def _filled(pixels: np.ndarray, artefacts: dict[str, np.ndarray]) -> np.ndarray:
    """The picture with each kind of artefact tinted in its colour."""
    pixels = pixels.astype(np.float32)
    for kind, where in artefacts.items():
        if where.any():
            cover = cv2.resize(where.astype(np.float32), pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
            pixels += 0.65 * cover[..., None] * (255 * np.float32(to_rgb(COLOURS[kind])) - pixels)
    return pixels.round().astype(np.uint8)


def _outlines(mask: np.ndarray, shape: tuple[int, ...], um_per_px: float) -> list[np.ndarray]:
    """The borders of a mask in um, each (n, 2), closed; within half a pixel of the picture that they are drawn on."""
    small = cv2.resize(mask.astype(np.float32), shape[1::-1], interpolation=cv2.INTER_AREA) >= 0.5
    scale = um_per_px * np.array(mask.shape[::-1]) / shape[1::-1]
    lines = cv2.findContours(small.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
    simple = [cv2.approxPolyDP(line, 0.5, closed=True)[:, 0] for line in lines]
    return [(np.concatenate([line, line[:1]]) + 0.5) * scale for line in simple if len(line) > 2]


def _legend(fig: Figure, notes: pd.DataFrame) -> None:
    there = [kind for kind in COLOURS if notes[f"{kind}_mm2"].sum() > 0]
    handles = [Line2D([], [], color=LINE, lw=1, label="tissue")]
    handles += [Patch(fc=COLOURS[kind], alpha=0.8, label=f"taken for {kind}") for kind in there]
    if notes["why"].ne("").any():
        handles.append(Patch(fc="none", ec=ALARM, lw=1.2, label="stands out, or cannot be read"))
    fig.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=6, handlelength=1.2, frameon=False)


def _standing_out(values: pd.Series, least: float) -> pd.Series:
    """How far above the median, in robust standard deviations of at least `least`."""
    values = values.astype(float)
    apart = values - values.median()
    return apart / max(1.4826 * apart.abs().median(), least)


def _writable(folder: Path) -> Path:
    """The folder, made if need be. Raises InputError where nothing can be written there."""
    try:
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / "probe", "w"):
            pass
        (folder / "probe").unlink()
    except OSError as error:
        raise InputError(f"cannot make the folder {folder} ({error.strerror}); choose another") from None
    return folder
