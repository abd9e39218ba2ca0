"""The slide at full resolution inside JupyterLab: pan, zoom, choose how tiles are drawn, click one.

Drawn by OpenSeadragon, the viewer that most slide servers use, in an anywidget: JavaScript that JupyterLab 4, VS Code
and Colab load without an extension of ours. OpenSeadragon 6.1.1 (BSD-3-Clause) lies in static/, so that nothing comes
from a network. Of the widgets made for slides, jupyter-islide (one author, since 2026) reads through OpenSlide itself
and would show other pixels than `Slide.region` gives to a model; localtileserver and the IIIF widgets open a port or
ask another server. Here every pixel travels as a message between kernel and page, as sliders do, which also works
behind JupyterHub and with remote kernels. The page asks for tiles in small batches and forgets those that its view has
left before it sends them; the kernel reads one after another and keeps the last ones encoded.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import anywidget
import cv2
import numpy as np
import traitlets as t

from pathfm import closeup
from pathfm.errors import InputError
from pathfm.explore import Explorer, Look, Settings, nothing
from pathfm.figures import compact, mpp_colour
from pathfm.slide import Slide
from pathfm.stream import Tile
from pathfm.tissue import area_mm2

SIDE_PX = 512  # of the squares that the page is drawn from
QUALITY = 90  # of their JPEG; a tile that was clicked is shown without loss
KEPT = 512  # encoded squares, some 30 MB
NAMES = 50  # slides offered while a name is typed
VEIL = (52, 38, 28)  # blue, green, red laid over what is no tissue; the tissue keeps its colours
HERE = Path(__file__).parent


def _script() -> str:
    """OpenSeadragon, kept from a page's own module loader, and our page."""
    library = (HERE / "static" / "openseadragon.min.js").read_text(encoding="utf-8")
    wrapped = f"const OpenSeadragon = (function (define, module) {{{library}\nreturn OpenSeadragon;}}).call({{}});"
    ours = [(HERE / name).read_text(encoding="utf-8") for name in ("viewer_slide.js", "viewer.js")]
    return "\n".join([wrapped, *ours])


class Pyramid:
    """A slide as squares of SIDE_PX that halve in resolution: step 0 is level 0, the last step is one square."""

    def __init__(self, slide: Slide):
        self.slide = slide
        self.steps = max(0, math.ceil(math.log2(max(slide.width_px, slide.height_px) / SIDE_PX)))

    def square(self, step: int, column: int, row: int) -> np.ndarray:
        """(h, w, 3) uint8 at 2^step times the slide's mpp; narrower at the right and lower edge.

        Raises InputError where there is no such square.
        """
        scale = 2**step
        width, height = (math.ceil(side / scale) for side in (self.slide.width_px, self.slide.height_px))
        left, top = column * SIDE_PX, row * SIDE_PX
        if not (0 <= step <= self.steps and 0 <= left < width and 0 <= top < height):
            raise InputError(f"{self.slide.path} has no square {column}, {row} at step {step}")
        size = min(SIDE_PX, width - left), min(SIDE_PX, height - top)
        return self.slide.region(left * scale, top * scale, *size, self.slide.mpp * scale)


class Viewer(anywidget.AnyWidget):
    """The viewer of an `Explorer`. Settings are traits: set one here or move its control, the page follows.

    slide_id, weights (one for each of `mpps`), min_tissue, tiles, seed   as in `pathfm.explore.Settings`
    chosen   number of the tile shown close up, -1 for none
    recipe   whose views are shown of it (`closeup.VIEWS`), and `draw`, another number, other views
    view     where the page looks: x, y of its middle in level-0 px, mpp on the screen
    message  what is wrong with the settings, in a line; empty where nothing is
    look     what follows from the settings (`pathfm.explore.Look`), None where that is nothing
    """

    _esm = _script()
    _css = (HERE / "viewer.css").read_text(encoding="utf-8")

    slide_id = t.Unicode().tag(sync=True)
    weights = t.List(t.Float()).tag(sync=True)
    min_tissue = t.Float(0.4).tag(sync=True)
    tiles = t.Int(24).tag(sync=True)
    seed = t.Int(0).tag(sync=True)
    chosen = t.Int(-1).tag(sync=True)
    recipe = t.Unicode(closeup.PUBLISHED).tag(sync=True)
    draw = t.Int(0).tag(sync=True)
    view = t.Dict().tag(sync=True)
    message = t.Unicode().tag(sync=True)
    mpps = t.List(t.Float()).tag(sync=True)  # what follows is for the page alone
    about = t.Dict().tag(sync=True)
    scene = t.Dict().tag(sync=True)
    veils = t.Dict().tag(sync=True)
    detail = t.Dict().tag(sync=True)

    def __init__(self, explorer: Explorer, settings: Settings):
        self._explorer, self.look = explorer, None
        self._square = lru_cache(KEPT)(self._read_square)
        weights = settings.mpp if isinstance(settings.mpp, dict) else dict.fromkeys(settings.mpp, 1.0)
        mpps = sorted({*explorer.mpps, *weights})
        super().__init__(
            slide_id=settings.slide_id,
            mpps=mpps,
            weights=[float(weights.get(mpp, 0)) for mpp in mpps],
            min_tissue=settings.min_tissue,
            tiles=settings.tiles,
            seed=settings.seed,
            about={
                "colours": [mpp_colour(mpp) for mpp in mpps],
                "side_px": SIDE_PX,
                "recipes": closeup.VIEWS,
            },
        )
        self._settings_changed()
        self.observe(self._settings_changed, ["slide_id", "weights", "min_tissue", "tiles", "seed"])
        self.observe(self._choice_changed, ["chosen", "recipe", "draw"])
        self.on_msg(self._asked)

    @property
    def settings(self) -> Settings:
        """As they stand; an mpp without weight is left out."""
        mixture = {mpp: weight for mpp, weight in zip(self.mpps, self.weights, strict=True) if weight > 0}
        return Settings(self.slide_id, mixture, self.min_tissue, self.tiles, self.seed)

    def _settings_changed(self, _=None) -> None:
        before, self.look = self.look, None
        try:
            self.look = self._looked()
        except Exception as error:  # whatever a slide or a setting does, the page goes on
            self._nothing(_line(error))
            return
        with self.hold_sync():
            if not _same_tile(before, self.look, self.chosen):
                self.chosen = -1
            self.message = " ".join(nothing(self.look).split()) if self.look.names.empty else ""
            self.scene = self._scene()
            self.veils = {"tissue": _veil(self.look.mask), "centres": _veil(self.look.centres)}

    def _nothing(self, message: str) -> None:
        """No tile; the slide stays where it is the settings that are wrong, and goes where it is the slide."""
        with self.hold_sync():
            self.chosen, self.message = -1, message
            shown = self.scene if self.scene.get("slide_id") == self.slide_id else {}
            self.scene = {**shown, "tiles": [], "positions": [0] * len(self.mpps)} if shown else {}

    def _looked(self) -> Look:
        if not self.slide_id and self._explorer.slide_ids:
            raise InputError(f"no slide is chosen; type a name, such as {self._explorer.slide_ids[0]}")
        if len(self.weights) != len(self.mpps):
            raise InputError(f"give {len(self.mpps)} weights, one for each of {self.mpps} um/px")
        if not self.settings.mpp:
            self._explorer.index.mask(self.slide_id)  # what is wrong with the slide comes first
            raise InputError("no magnification has a weight; raise one of the sliders")
        if not (self.tiles > 0 and self.seed >= 0):
            raise InputError(f"{self.tiles} tiles of seed {self.seed}: give at least one, and a seed of 0 or more")
        return self._explorer.look(self.settings)

    def _scene(self) -> dict:
        """What the page draws over the slide; lengths in level-0 px."""
        slide, names = self._explorer.index.slide(self.slide_id), self.look.names
        side = (self._explorer.tile_px * names["mpp"] / slide.mpp).tolist()
        kind = [int(np.abs(np.log(np.array(self.mpps) / mpp)).argmin()) for mpp in names["mpp"]]
        columns = names["i"].tolist(), names["x"].tolist(), names["y"].tolist(), side, kind
        height, width = self.look.mask.shape
        cell = self.look.um_per_px / slide.mpp
        area = area_mm2(self.look.mask, self.look.um_per_px)
        levels = "-".join(f"{down:g}" for down in slide.level_downsamples)
        return {
            "slide_id": self.slide_id,
            "width": slide.width_px,
            "height": slide.height_px,
            "mpp": slide.mpp,
            "steps": Pyramid(slide).steps,
            "mask": [width * cell, height * cell],
            "facts": f"{slide.width_px:,} × {slide.height_px:,} px of {slide.mpp:.3g} µm, levels {levels}, "
            f"{area:.1f} mm² of tissue",
            "tiles": [list(row) for row in zip(*columns, strict=True)],
            "positions": [int(self.look.positions.get(mpp, 0)) for mpp in self.mpps],
        }

    def _choice_changed(self, _=None) -> None:
        if self.chosen < 0 or self.look is None or not len(self.look.names):
            self.detail = {}
            return
        try:
            self.detail = self._closeup()
            self.message = ""
        except Exception as error:
            with self.hold_sync():
                self.detail, self.message = {}, _line(error)

    def _closeup(self) -> dict:
        if self.chosen >= len(self.look.names):
            raise InputError(f"no tile {self.chosen}; {len(self.look.names)} are drawn")
        tile = self.tile()
        slide, config = self._explorer.index.slide(tile.slide_id), closeup.recipe(self.recipe)
        around = closeup.neighbours(slide, tile, tuple(self.mpps))
        made = closeup.views(tile, config, self.draw)
        name = {field: getattr(tile, field) for field in ("slide_id", "i", "x", "y", "mpp", "tissue", "resampled")}
        return {
            "name": {**name, "mpp": f"{tile.mpp:.4g}", "tissue": f"{tile.tissue:.0%}"},
            "call": f"{self._call()}[{tile.i}]",
            "around": [_packed(picture) for picture in around],
            "views": [_packed(picture) for picture in made],
            "sees": f"2 global of {config.global_px} px and {config.local_views} local of {config.local_px} px, "
            f"out of {min(config.tile_px, len(tile.image))} px",
        }

    def tile(self) -> Tile:
        """The tile that is chosen, as `stream[i]` gives it. Raises InputError where none is."""
        if self.look is None or self.look.stream is None or self.chosen < 0:
            raise InputError("no tile is chosen; click one, or set `chosen` to its number")
        return self.look.stream[self.chosen]

    def _call(self) -> str:
        """The code that makes this stream."""
        s = self.settings
        mpp = ", ".join(f"{mpp:g}: {weight:g}" for mpp, weight in s.mpp.items() if self.look.positions[mpp])
        one = f"index.subset(['{s.slide_id}'])"
        return f"TileStream({one}, {self._explorer.tile_px}, {{{mpp}}}, {s.min_tissue:g}, {s.seed})"

    def _asked(self, _, content: dict, buffers) -> None:
        """A message of the page: squares to read, part of a slide's name, or a step to the next or previous slide."""
        if content.get("kind") == "squares":
            for number, step, column, row in content["squares"]:
                self._answer(content["page"], number, content["slide_id"], step, column, row)
        elif content.get("kind") == "names":
            self.send({"kind": "names", "page": content["page"], "names": self._names(content["text"])})
        elif content.get("kind") == "step":
            self._step(content["by"])

    def _answer(self, page: str, number: int, slide_id: str, *which: int) -> None:
        reply = {"kind": "square", "page": page, "number": number}
        try:
            self.send(reply, [self._square(slide_id, *which)])
        except Exception as error:
            self.send({**reply, "error": _line(error)})

    def _read_square(self, slide_id: str, step: int, column: int, row: int) -> bytes:
        """A square as JPEG, its colour as fine as its brightness."""
        pixels = Pyramid(self._explorer.index.slide(slide_id)).square(step, column, row)
        fine = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        return cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY, *fine])[1].tobytes()

    def _names(self, text: str) -> list[list[str]]:
        """Slides whose name holds `text`, at most NAMES, each with the reason where it is quarantined."""
        slides = self._explorer.index.slides
        found = slides[slides["slide_id"].str.contains(text, case=False, regex=False)].head(NAMES)
        return [[row.slide_id, "" if row.status == "ok" else "quarantined"] for row in found.itertuples()]

    def _step(self, by: int) -> None:
        """To the usable slide `by` further on in the index; round from the last to the first."""
        known = self._explorer.slide_ids
        if known:
            at = known.index(self.slide_id) + by if self.slide_id in known else 0
            self.slide_id = known[at % len(known)]

    def __repr__(self) -> str:
        return f"Viewer: {self.look or self.message}"

    def _repr_mimebundle_(self, **kwargs):
        """The widget, and for a page without a kernel the picture that `Explorer.figure` draws."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data, rest = bundle if isinstance(bundle, tuple) else (bundle, {})
        data = {**(data or {}), "text/plain": repr(self)}
        if self.look is not None:
            data["image/png"] = compact(self._explorer.png(self.look))
        return data, rest


def _veil(mask: np.ndarray) -> bytes:
    """A PNG, a pixel for each of the mask's, opaque where it is False."""
    pixels = np.empty((*mask.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = VEIL, np.where(mask, 0, 255)
    return cv2.imencode(".png", pixels)[1].tobytes()


def _packed(picture: closeup.Picture) -> dict:
    """A picture for the page: PNG, mpp and side in pixels."""
    png = cv2.imencode(".png", np.ascontiguousarray(picture.image[..., ::-1]))[1].tobytes()
    return {"kind": picture.kind, "png": png, "mpp": picture.mpp, "px": len(picture.image)}


def _same_tile(before: Look | None, now: Look, i: int) -> bool:
    """Whether both drew the same tile i."""
    if before is None or not 0 <= i < min(len(before.names), len(now.names)):
        return False
    return before.names.iloc[i].equals(now.names.iloc[i])


def _line(error: Exception) -> str:
    """An error in one line; the list of every known name is left to the slide picker."""
    text = " ".join(str(error).split()).split(" Known: ")[0]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
