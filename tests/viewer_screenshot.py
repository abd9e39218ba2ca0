"""Makes figures/02_viewer.png: the viewer in JupyterLab on a slide of the synthetic cohort, as a person sees it.

python tests/viewer_screenshot.py
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import lab
import PIL.Image

from pathfm import figures, study
from pathfm.storage import atomic

SLIDE, SEED, WIDTH_PX = "embedded-000", 2, 1400
NAME = "02_viewer"
SHOW = """
from pathfm import SlideIndex
from pathfm.explore import Explorer
viewer = Explorer(SlideIndex.open({folder!r})).viewer(slide_id={slide!r}, mpp=(0.25, 0.5, 1, 2), seed={seed})
viewer"""


def take(folder: Path) -> bytes:
    """A PNG of the viewer alone, zoomed in and with a tile close up."""
    index = study.index(study.cohort())
    cell = SHOW.format(folder=str(index.folder), slide=SLIDE, seed=SEED).strip()
    with lab.notebook(folder, [cell], width=WIDTH_PX + 400, height=1500) as page:
        lab.run_cell(page, 0)
        viewer = lab.ViewerPage(page)
        viewer.root.wait_for()
        viewer.settled()
        viewer.moved(lambda: viewer.wheel(3))
        viewer.moved(lambda: viewer.drag(-40, 60))
        viewer.click_tile(nearest(viewer))
        page.mouse.move(0, 0)
        viewer.settled()
        return viewer.root.screenshot()


def nearest(viewer: lab.ViewerPage) -> int:
    """The tile of 0.5 um/px nearest to the middle of the view that no other one touches."""
    x, y = viewer.middle()
    green = figures.MPP_COLOURS[0.5]
    tiles = viewer.tiles()

    def alone(one):
        return not any(other is not one and overlap(one, other) for other in tiles)

    def far(one):
        return (one["x"] + one["width"] / 2 - x) ** 2 + (one["y"] + one["height"] / 2 - y) ** 2

    chosen = [one for one in tiles if one["colour"] == green]
    return min([one for one in chosen if alone(one)] or chosen, key=far)["i"]


def overlap(one: dict, other: dict) -> bool:
    return all(
        one[at] < other[at] + other[size] and other[at] < one[at] + one[size]
        for at, size in (("x", "width"), ("y", "height"))
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        png = take(Path(folder))
    print(PIL.Image.open(io.BytesIO(png)).size, len(png), "bytes before")
    with atomic(figures.figures_dir() / f"{NAME}.png") as file:
        file.write(figures.compact(png))
    print(figures.figures_dir() / f"{NAME}.png")
