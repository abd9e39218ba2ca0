"""How figures look and where they go: one style, one palette, a scale bar, `show`."""

from __future__ import annotations

import base64
import io
import math
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pathfm.errors import InputError, nearest
from pathfm.storage import atomic, checkout

LARGE = 400_000  # bytes of a PNG from which on it is kept in 256 colours
# One colour a tissue class, from Okabe and Ito's and Tol's colour-blind-safe palettes, dark for what stains dark.
CLASS_COLOURS = {
    "tumour": "#882255",
    "normal": "#0072B2",
    "stroma": "#CC79A7",
    "muscle": "#D55E00",
    "lymphocytes": "#332288",
    "adipose": "#E6C229",
    "mucus": "#56B4E9",
    "necrosis": "#6B6B6B",
}
# One colour a method or set of features, everywhere.
METHOD_COLOURS = {
    "chance": "#BBBBBB",
    "size and mpp alone": "#999999",
    "colour mean and spread": "#E6C229",
    "colour histogram": "#E69F00",
    "texture": "#CC79A7",
    "colour + LBP": "#D55E00",
    "random weights": "#56B4E9",
    "pretrained": "#0072B2",
    "teacher": "#0072B2",  # of a recorded run
    "oracle": "#009E73",
    "released": "#6A3D9A",
}
PALETTE = {**CLASS_COLOURS, **METHOD_COLOURS}
MPP_COLOURS = {0.25: "#0072B2", 0.5: "#009E73", 1.0: "#E69F00", 2.0: "#D55E00"}


def colour(name: str) -> str:
    """The fixed colour of a class or method. Raises InputError for a name without one."""
    if name not in PALETTE:
        raise InputError(f"no colour is fixed for '{name}'.{nearest(name, PALETTE)}")
    return PALETTE[name]


def mpp_colour(mpp: float) -> str:
    """The fixed colour of the nearest standard mpp within a tenth, else one by its logarithm."""
    nearest = min(MPP_COLOURS, key=lambda known: abs(np.log(known / mpp)))
    if abs(np.log(nearest / mpp)) < 0.1:
        return MPP_COLOURS[nearest]
    return to_hex(colormaps["viridis"](np.clip((np.log2(mpp) + 3) / 6, 0, 1)))


def use_style() -> None:
    """The style of every figure here (pathfm.mplstyle), for notebooks and scripts."""
    plt.style.use(Path(__file__).with_name("pathfm.mplstyle"))


def figures_dir() -> Path:
    """$PATHFM_FIGURES, else figures/ of the checkout, else figures/ of the working folder."""
    if os.environ.get("PATHFM_FIGURES"):
        return Path(os.environ["PATHFM_FIGURES"]).expanduser()
    return (checkout() or Path.cwd()) / "figures"


def save(fig: Figure, name: str, folder: str | Path | None = None, dpi: int | None = None) -> Path:
    """Writes <folder>/<name>.svg and .png and returns the PNG's path. Same figure, same bytes.

    Large pictures of tissue become JPEG in the SVG and 256 colours in the PNG, so that a repository can hold them.
    """
    folder = Path(folder) if folder else figures_dir()
    # A date in the metadata would change the file at every run.
    svg, png = io.BytesIO(), io.BytesIO()
    fig.savefig(svg, format="svg", metadata={"Date": None}, dpi=dpi)
    fig.savefig(png, format="png", metadata={"Software": None}, dpi=dpi)
    with atomic(folder / f"{name}.svg") as file:
        file.write(re.sub(rb"data:image/png;base64,([^\"]+)", _smaller, svg.getvalue()))
    with atomic(folder / f"{name}.png") as file:
        file.write(png.getvalue() if len(png.getvalue()) < LARGE else compact(png.getvalue()))
    return folder / f"{name}.png"


def _smaller(embedded: re.Match) -> bytes:
    """An embedded PNG, as JPEG where that is smaller; charts stay exact, since as PNG they are smaller."""
    png = base64.b64decode(embedded[1])
    if len(png) < LARGE // 40:
        return embedded[0]
    with PIL.Image.open(io.BytesIO(png)) as picture:
        if _transparent(picture):
            return embedded[0]
        jpeg = io.BytesIO()
        picture.convert("RGB").save(jpeg, "JPEG", quality=90, subsampling=0)
    if len(jpeg.getvalue()) >= len(png):
        return embedded[0]
    return b"data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue())


def show(fig: Figure, name: str, dpi: int | None = None) -> None:
    """Saves the figure under `name` and displays it as a PNG of modest size in the notebook."""
    from IPython.display import Image, display

    save(fig, name, dpi=dpi)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    plt.close(fig)
    display(Image(data=compact(buffer.getvalue())))


def _transparent(picture: PIL.Image.Image) -> bool:
    return picture.convert("RGBA").getextrema()[3][0] < 255


def compact(png: bytes) -> bytes:
    """A picture in 256 colours: for histology a third of the size, and at a notebook's size no loss to be seen.

    One that is transparent anywhere stays as it is.
    """
    with PIL.Image.open(io.BytesIO(png)) as picture:
        if _transparent(picture):
            return png
        # Maximum coverage keeps the rare colours of legends and frames, which the median cut would merge.
        small = picture.convert("RGB").quantize(256, PIL.Image.Quantize.MAXCOVERAGE, kmeans=1)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def scale_bar(ax: Axes, um_per_px: float, length_um: float | None = None, colour: str = "black") -> None:
    """A bar of `length_um` microns in the lower left of an image axis, labelled.

    um_per_px  microns per displayed data unit (image pixel)
    length_um  a round length near a fifth of the width where none is given
    """
    width_px = abs(ax.get_xlim()[1] - ax.get_xlim()[0])
    height_px = abs(ax.get_ylim()[1] - ax.get_ylim()[0])
    length_um = length_um or round_length(width_px * um_per_px / 5)
    length_px = length_um / um_per_px
    left, low = min(ax.get_xlim()) + 0.04 * width_px, max(ax.get_ylim()) - 0.05 * height_px
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    box = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}
    ax.plot([left, left + length_px], [low, low], color=colour, lw=2.2, solid_capstyle="butt")
    ax.text(left, low - 0.03 * height_px, label, color=colour, fontsize=7, va="bottom", ha="left", bbox=box)


def round_length(um: float) -> float:
    """The largest of 1, 2, 5 times a power of ten not above `um`."""
    power = 10.0 ** math.floor(math.log10(um))
    return max(step * power for step in (1, 2, 5) if step * power <= um * (1 + 1e-9))


def image(ax: Axes, pixels, um_per_px: float | None = None, title: str | None = None) -> Axes:
    """An image without axes, with a scale bar where its physical scale is known."""
    ax.imshow(pixels)
    ax.set_axis_off()
    if um_per_px:
        scale_bar(ax, um_per_px)
    if title:
        ax.set_title(title, fontsize=8)
    return ax
