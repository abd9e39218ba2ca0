"""The tile explorer: where tiles can come from on one slide, which are drawn, and what they look like.

`Explorer.look` computes what a choice of settings leads to and `Explorer.figure` draws it; neither knows of
widgets. `Explorer.show` is the viewer of `pathfm.viewer` in a live notebook and a still picture anywhere else.
"""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from scipy.stats import chi2

from pathfm.errors import InputError
from pathfm.figures import compact, mpp_colour, round_length, scale_bar
from pathfm.index import SlideIndex
from pathfm.positions import count, integral, least_area, span
from pathfm.sampling import footprint
from pathfm.slide import MAX_UPSAMPLE
from pathfm.stream import Tile, TileName, TileStream
from pathfm.tissue import area_mm2

SHOWN = 12  # tiles shown large; all are drawn on the slide
OVERVIEW_PX = 640  # longest side of the slide's picture
GAP_PX = 18  # between tiles
VEIL = 0.72  # how white it gets where no tile can be centred
TISSUE_LINE = "#333333"
LIVE = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")  # set where a person sits before the kernel


@dataclass(frozen=True)
class Settings:
    """What a person chooses."""

    slide_id: str
    mpp: tuple[float, ...] | dict[float, float] = (0.5,)  # microns per pixel: equal weights, or {mpp: weight}
    min_tissue: float = 0.4  # least share of a tile that is foreground
    tiles: int = 24  # drawn
    seed: int = 0


@dataclass(frozen=True)
class Look:
    """What follows from the settings.

    positions   mpp -> number of admissible positions; 0 where the slide cannot serve it
    mask        (h, w) bool tissue of the slide, `um_per_px` apart
    centres     (h, w) bool, where the centre of a tile of any of the mpp may lie
    slide_mpp   of its level 0
    names       one row a tile: slide_id, x, y, mpp, tissue, resampled, i
    stream      which they were drawn from, None where no position is admissible
    """

    settings: Settings
    positions: pd.Series
    mask: np.ndarray
    centres: np.ndarray
    um_per_px: float
    slide_mpp: float
    names: pd.DataFrame
    stream: TileStream | None

    def __str__(self) -> str:
        """One line, the same on every machine."""
        s = self.settings
        counted = ", ".join(f"{n:,} positions at {mpp:g} mpp" for mpp, n in self.positions.items())
        drawn = "no tile" if self.names.empty else f"{len(self.names)} tiles of seed {s.seed}"
        return f"{s.slide_id}, foreground at least {s.min_tissue:.0%}: {counted}; {drawn}"


class Explorer:
    """Looks at the slides of an index, one choice of settings after another.

    mpps   offered in the controls
    """

    def __init__(self, index: SlideIndex, tile_px: int = 256, mpps: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)):
        self.index, self.tile_px, self.mpps = index, tile_px, tuple(mpps)
        self.slide_ids = list(index.usable["slide_id"])
        self._overview = lru_cache(8)(self._read_overview)
        self._tile = lru_cache(256)(self._read_tile)

    def look(self, settings: Settings | None = None, **changes) -> Look:
        """What `settings` (the first slide's where None), with `changes`, lead to. No slide pixel is read."""
        if not self.slide_ids:
            raise InputError("the index has no usable slide to explore; see index.slides for the reasons")
        settings = replace(settings or Settings(self.slide_ids[0]), **changes)
        mask, um_per_px = self.index.mask(settings.slide_id)
        row = self.index.subset([settings.slide_id]).usable.iloc[0]
        counts, centres = {}, np.zeros_like(mask)
        for mpp in settings.mpp:
            found = footprint(row.mpp, [float(d) for d in row.levels.split()], self.tile_px, mpp)
            counts[mpp] = 0
            if found is not None:
                grid, side = found
                size = int(row.width_px), int(row.height_px)
                counts[mpp] = count(mask, int(row.cell_px), size, side, grid, settings.min_tissue)
                centres |= centre_map(mask, side / row.cell_px, settings.min_tissue)
        stream = self._stream(settings, [mpp for mpp, n in counts.items() if n])
        names = stream.names(range(settings.tiles)) if stream else pd.DataFrame(columns=TileName._fields)
        return Look(settings, pd.Series(counts), mask, centres, um_per_px, row.mpp, names, stream)

    def tiles(self, look: Look, n: int = SHOWN) -> list[Tile]:
        """The first n of the tiles, read."""
        return [self._tile(*name) for name in look.names.head(n).itertuples(index=False, name=None)]

    def figure(self, look: Look) -> Figure:
        """The slide with its tissue outlined, positions veiled where none is, tiles to scale; and the tiles."""
        fig = Figure(figsize=(11, 4.9), layout="none")
        self.draw_slide(fig.add_axes((0.005, 0.01, 0.43, 0.88)), look)
        self._draw_tiles(fig.add_axes((0.44, 0.01, 0.56, 0.88)), look)
        fig.text(0.005, 0.945, _headline(look), fontsize=9, va="center")
        handles = [
            Line2D([], [], marker="s", ls="", mfc="none", mew=2, color=mpp_colour(m)) for m in look.positions.index
        ]
        labels = [f"{_short(n)} at {mpp:g} mpp" for mpp, n in look.positions.items()]
        fig.legend(handles, labels, loc="center left", bbox_to_anchor=(0.44, 0.945), ncols=4, borderpad=0,
                   handletextpad=0.3, columnspacing=1.2, fontsize=7.5)  # fmt: skip
        return fig

    def png(self, look: Look, dpi: int = 100) -> bytes:
        """`figure` as a PNG file."""
        fig, buffer = self.figure(look), io.BytesIO()
        fig.set_dpi(dpi)
        FigureCanvasAgg(fig).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()

    def viewer(self, settings: Settings | None = None, **changes):
        """The slide to pan and zoom, with controls for every setting: a `pathfm.viewer.Viewer`, for JupyterLab."""
        from pathfm.viewer import Viewer

        return Viewer(self, replace(settings or Settings(next(iter(self.slide_ids), "")), **changes))

    def show(self, settings: Settings | None = None, **changes) -> None:
        """Displays the explorer: the viewer before a person, else one picture with a text that is always the same."""
        from IPython.display import display

        if any(name in os.environ for name in LIVE):
            display(self.viewer(settings, **changes))
            return
        look = self.look(settings, **changes)
        png = base64.b64encode(compact(self.png(look))).decode()
        display({"text/plain": f"Explorer: {look}", "image/png": png}, raw=True)

    def _stream(self, settings: Settings, served: list[float]) -> TileStream | None:
        if not served:
            return None
        one = self.index.subset([settings.slide_id])
        weights = settings.mpp if isinstance(settings.mpp, dict) else dict.fromkeys(settings.mpp, 1.0)
        mixture = {mpp: weights[mpp] for mpp in served}
        return TileStream(one, self.tile_px, mixture, settings.min_tissue, settings.seed)

    def _read_overview(self, slide_id: str) -> tuple[np.ndarray, float]:
        """The slide's picture and its um/px: at most OVERVIEW_PX wide or high, never finer than the slide."""
        slide = self.index.slide(slide_id)
        um_per_px = max(slide.width_px, slide.height_px) * slide.mpp / OVERVIEW_PX
        return slide.thumbnail(max(um_per_px, slide.mpp)), max(um_per_px, slide.mpp)

    def _read_tile(self, *name) -> Tile:
        name = TileName(*name)
        return Tile(self.index.slide(name.slide_id).read(name.x, name.y, self.tile_px, name.mpp), *name)

    def draw_slide(self, ax: Axes, look: Look, numbered: int = SHOWN) -> None:
        """The slide, tissue outlined, white where no tile can be centred, tiles to scale and the first `numbered`."""
        pixels, um_per_px = self._overview(look.settings.slide_id)
        size = pixels.shape[1], pixels.shape[0]
        mask, centres = (_resized(m, look.um_per_px / um_per_px, size) for m in (look.mask, look.centres))
        veil = np.where(centres, 0, VEIL)[..., None]
        ax.imshow((pixels * (1 - veil) + 255 * veil).astype(np.uint8), interpolation="antialiased")
        ax.contour(mask, [0.5], colors=TISSUE_LINE, linewidths=0.7)
        to_picture = look.slide_mpp / um_per_px
        for row in look.names.itertuples():
            x, y, side = row.x * to_picture, row.y * to_picture, self.tile_px * row.mpp / um_per_px
            width = 1.8 if row.i < numbered else 0.9
            ax.add_patch(Rectangle((x, y), side, side, fill=False, ec=mpp_colour(row.mpp), lw=width))
            if row.i < numbered:
                ax.text(x + side / 2, y + side / 2, row.i, **_LABEL)
        ax.set(xlim=(0, size[0]), ylim=(size[1], 0), anchor="NW")
        ax.set_axis_off()
        scale_bar(ax, um_per_px)

    def _draw_tiles(self, ax: Axes, look: Look) -> None:
        ax.set_axis_off()
        ax.set(anchor="NW")
        tiles = self.tiles(look)
        if not tiles:
            ax.text(0.5, 0.5, nothing(look), ha="center", va="center", fontsize=10, transform=ax.transAxes)
            return
        columns = {1: 1, 2: 2, 3: 2, 4: 2}.get(len(tiles), 4 if len(tiles) > 6 else 3)
        step = self.tile_px + GAP_PX
        sheet = np.full((step * -(-len(tiles) // columns), step * columns, 3), 255, np.uint8)
        for n, tile in enumerate(tiles):
            x, y = step * (n % columns), step * (n // columns)
            sheet[y : y + self.tile_px, x : x + self.tile_px] = tile.image
            frame = Rectangle((x, y), self.tile_px, self.tile_px, fill=False, ec=mpp_colour(tile.mpp), lw=2.2)
            ax.add_patch(frame)
            ax.text(x + 12, y + 12, tile.i, **{**_LABEL, "ha": "left", "va": "top"})
            _bar(ax, x + 14, y + self.tile_px - 16, self.tile_px, tile.mpp)
        ax.imshow(sheet, interpolation="antialiased")
        ax.set(xlim=(-4, sheet.shape[1]), ylim=(sheet.shape[0], -4))


_LABEL = {
    "fontsize": 7,
    "ha": "center",
    "va": "center",
    "bbox": {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.8},
}


def centre_map(mask: np.ndarray, side: float, min_tissue: float) -> np.ndarray:
    """Mask cells in which a square of `side` cells, wholly inside, has its centre and at least min_tissue: bool.

    For pictures: squares are taken to the nearest whole number of cells; `positions.count` counts exactly.
    """
    cells = max(1, round(side))
    if cells > min(mask.shape):
        return np.zeros_like(mask)
    share = cv2.boxFilter(mask.astype(np.float32), -1, (cells, cells), borderType=cv2.BORDER_CONSTANT)
    inside = np.zeros_like(mask)
    low, high = cells // 2, (cells - 1) // 2
    inside[low : mask.shape[0] - high, low : mask.shape[1] - high] = True
    return inside & (share >= min_tissue - 1e-6)


def admissible(
    index: SlideIndex, slide_id: str, tile_px: int, mpp: float, min_tissue: float = 0.4
) -> tuple[np.ndarray, int, float]:
    """Every position of one slide, (rows, columns) bool, with its grid and the tile's side in level-0 px.

    Holds the whole grid in memory, to check a sampler on a small slide; `positions.count` counts without.
    """
    row = index.subset([slide_id]).usable.iloc[0]
    mask, _ = index.mask(slide_id)
    grid, side = footprint(row.mpp, [float(d) for d in row.levels.split()], tile_px, mpp)
    y, x = (grid * np.arange(span(int(length), side, grid)) for length in (row.height_px, row.width_px))
    sums = integral(mask).astype(float)
    near, far = (_along(sums, at / row.cell_px) for at in (y, y + side))
    band = (far - near).T
    near, far = (_along(band, at / row.cell_px) for at in (x, x + side))
    area = (far - near).T * row.cell_px**2
    return area >= least_area(side, min_tissue), grid, side


def centred_on_tissue(
    index: SlideIndex, slide_id: str, exact: np.ndarray, grid: int, side: float, n: int, seed: int = 0
):
    """Positions (up to n, 2) as row and column of `exact` from a biased sampler: it draws a cell of the mask, centres a
    tile on it and keeps what is admissible. To show that a test of uniformity notices.
    """
    mask, um_per_px = index.mask(slide_id)
    rng = np.random.default_rng(seed)
    cells = np.argwhere(mask)[rng.integers(mask.sum(), size=2 * n)] + rng.random((2 * n, 2))
    yx = np.round((cells * um_per_px / index.slide(slide_id).mpp - side / 2) / grid).astype(int)
    yx = yx[((yx >= 0) & (yx < exact.shape)).all(axis=1)]
    return yx[exact[tuple(yx.T)]][:n]


def uniformity(exact: np.ndarray, yx: np.ndarray) -> tuple[dict, np.ndarray]:
    """Chi-square of positions yx (n, 2) against uniform over `exact`, by block: a table's row, and each block's
    residual in standard deviations, NaN where nothing is expected.
    """
    seen, expected = by_block(exact, yx)
    z = (seen - expected) / np.sqrt(expected, where=expected > 0, out=np.full(expected.shape, np.nan))
    statistic, blocks = np.nansum(z**2), np.count_nonzero(expected)
    p = chi2.sf(statistic, blocks - 1)
    return {"positions": exact.sum(), "tiles": len(yx), "chi-square": round(statistic), "blocks": blocks, "p": p}, z


def by_block(exact: np.ndarray, yx: np.ndarray, blocks: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """How many of the positions yx (n, 2) lie in each of blocks x blocks parts of the grid, and how many of a uniform
    sampler's would. Parts that expect fewer than 5 join the fullest one, so that chi-square holds.
    """
    edges = [np.linspace(0, length, blocks + 1) for length in exact.shape]
    seen = np.histogram2d(*yx.T, bins=edges)[0]
    there = np.histogram2d(*np.nonzero(exact), bins=edges)[0]
    expected = there / there.sum() * len(yx)
    rare = (expected > 0) & (expected < 5)
    fullest = np.unravel_index(expected.argmax(), expected.shape)
    for counts in (seen, expected):
        counts[fullest] += counts[rare].sum()
        counts[rare] = 0
    return seen, expected


def _along(sums: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of `sums` at fractional numbers, bilinear and so exact within a cell; past the last row, the last."""
    low = np.minimum(at.astype(int), len(sums) - 2)
    part = np.minimum(at - low, 1)[:, None]
    return sums[low] * (1 - part) + sums[low + 1] * part


def _resized(mask: np.ndarray, factor: float, size: tuple[int, int]) -> np.ndarray:
    """A mask at `factor` times its resolution, cropped to the picture's (width, height)."""
    to_picture = np.array([[factor, 0, 0], [0, factor, 0]])
    return cv2.warpAffine(mask.astype(np.uint8), to_picture, size, flags=cv2.INTER_NEAREST).astype(bool)


def _bar(ax: Axes, x: float, y: float, tile_px: int, mpp: float) -> None:
    """A scale bar in a tile whose bar would start at (x, y)."""
    length_um = round_length(tile_px * mpp / 3)
    ax.plot([x, x + length_um / mpp], [y, y], color="black", lw=2, solid_capstyle="butt")
    label = f"{length_um:g} µm" if length_um < 1000 else f"{length_um / 1000:g} mm"
    ax.text(x, y - 8, label, **{**_LABEL, "fontsize": 6, "ha": "left", "va": "bottom"})


def _headline(look: Look) -> str:
    s, area = look.settings, area_mm2(look.mask, look.um_per_px)
    share = look.centres[look.mask].mean()
    return f"{s.slide_id}: {area:.1f} mm² of tissue, tiles can be centred on {share:.0%}. Positions:"


def _short(n: int) -> str:
    return f"{n / 1e6:.1f} million" if n >= 1e6 else f"{n:,}"


def nothing(look: Look) -> str:
    """Why a look has no tile, and what to do."""
    mpps = list(look.settings.mpp)
    scales = " + ".join(f"{mpp:g}" for mpp in mpps)
    text = f"No position has {look.settings.min_tissue:.0%} foreground at {scales} µm/px.\n"
    if max(mpps) * MAX_UPSAMPLE < look.slide_mpp:
        return (
            text
            + f"This slide was scanned at {look.slide_mpp:.3g} µm/px and serves no finer scale. Choose a coarser one."
        )
    return text + "Lower the threshold, or choose a finer scale, whose tiles are smaller."
