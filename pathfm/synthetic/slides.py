"""One synthetic slide: what it is (SlideSpec), how it is drawn window by window, and its files."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import tifffile

from pathfm.errors import InputError
from pathfm.storage import atomic, atomic_path, read_json, write_json
from pathfm.synthetic import appearance, artefacts, layout, optics, painters
from pathfm.synthetic.appearance import Knobs, Origin
from pathfm.synthetic.nuclei import NUCLEUS

TILE_PX = 256
_BAND_PX = 1024  # rows drawn at a time: a multiple of TILE_PX and of every downsample
PYRAMIDS = {"1-4-16": (4, 16), "1-2-4-8": (2, 4, 8)}
_GAIN_UM = 24.0  # grid of the fields of section thickness and regional staining


@dataclass(frozen=True)
class SlideSpec:
    """Everything that decides a slide's bytes, given the generator."""

    slide_id: str
    origin: Origin
    mpp: float
    width_px: int
    height_px: int
    pyramid: str = "1-4-16"
    kind: str = "section"
    absent: tuple[str, ...] = ()  # classes this slide does not show
    artefacts: tuple[str, ...] = ()
    patient_id: str = "P00"
    role: str = "pretrain"
    knobs: Knobs = field(default_factory=Knobs)

    @property
    def width_um(self) -> float:
        return self.width_px * self.mpp

    @property
    def height_um(self) -> float:
        return self.height_px * self.mpp

    @classmethod
    def from_json(cls, values: dict) -> SlideSpec:
        values = dict(values)
        values["origin"], values["knobs"] = Origin(**values["origin"]), Knobs(**values["knobs"])
        values["absent"], values["artefacts"] = tuple(values["absent"]), tuple(values["artefacts"])
        return cls(**values)


@dataclass(frozen=True)
class Tissue:
    """What lies on the glass, whoever stains and scans it."""

    scene: painters.Scene
    marks: artefacts.Artefacts
    gain: np.ndarray  # (h, w, 2) factors on haematoxylin and eosin, on a grid of _GAIN_UM
    latents: dict


def _rng(spec: SlideSpec, part: int) -> np.random.Generator:
    origin = spec.origin
    return np.random.default_rng([origin.seed, 1000 + part, origin.patient, origin.slide])


@functools.lru_cache(maxsize=1)
def tissue(spec: SlideSpec) -> Tissue:
    """The tissue of `spec`, planned in um; the last one is kept, since counterfactuals ask for it again."""
    latent, labels = appearance.labels(spec.origin)
    wanted = appearance.shares(spec.origin, layout.TYPICAL, spec.knobs)
    wanted["lymphocytes"] *= float(np.exp(0.3 * latent["B1"]))
    wanted = {name: 0.0 if name in spec.absent else value for name, value in wanted.items()}
    distance = float(120 * np.exp(0.8 * latent["B3"]))
    plot = layout.Plot(spec.width_um, spec.height_um, wanted, spec.kind, distance)
    classes = layout.class_map(plot, _rng(spec, 0))
    params = appearance.tissue(spec.origin, spec.knobs, latent["B1"])
    seed = int(_rng(spec, 1).integers(1 << 31))
    painted_as = {mimic.name: mimic.painted_as for mimic in appearance.mimics(spec.origin, spec.knobs)}
    scene = painters.plan(classes, layout.MAP_UM, params, seed, appearance.departure(spec.knobs), painted_as)
    if spec.knobs.fine_cues != "off":
        _prominent_nucleoli(scene, latent["B2"])
    marks = artefacts.draw(_rng(spec, 2), spec.artefacts, classes > 0, spec.origin.slide)
    latents = {
        "labels": labels,
        "label_latents": latent,
        "shares": wanted,
        "lymphocytes_um": distance,
        "tissue": {name: asdict(value) for name, value in params.items()},
        "painted_as": painted_as,
        "variants": {name: appearance.variant(spec.origin, name) for name in painters.CLASSES},
    }
    return Tissue(scene, marks, _gain(spec), latents)


def _prominent_nucleoli(scene: painters.Scene, amount: float) -> None:
    """Add the label B2: more nucleoli the larger `amount`, in a tenth of the tumour's larger nuclei only."""
    rows = scene.cells.rows
    if len(rows) == 0:
        return
    x, y, radius, nucleoli, salt = (NUCLEUS.index(name) for name in ("x", "y", "a", "nucleoli", "salt"))
    height, width = scene.class_map.shape
    line = np.clip(rows[:, y] / scene.map_um, 0, height - 1).astype(int)
    column = np.clip(rows[:, x] / scene.map_um, 0, width - 1).astype(int)
    tumour = scene.class_map[line, column] == layout.CODE["tumour"]
    chosen = tumour & (rows[:, radius] > 3.5) & ((rows[:, salt] * 7.13) % 1 < 0.1)
    rows[chosen, nucleoli] = np.clip(rows[chosen, nucleoli] + 1.5 + 1.2 * amount, 0, 4)


def _gain(spec: SlideSpec) -> np.ndarray:
    """Thickness of the section and patches of uneven staining: (h, w, 2) factors on the two dyes."""
    rng = _rng(spec, 3)
    shape = tuple(int(np.ceil(side / _GAIN_UM)) + 2 for side in (spec.height_um, spec.width_um))
    noise = [layout.smooth_noise(rng, shape, um / _GAIN_UM) for um in (1500, 420, 420)]
    sd = appearance.region_sd(spec.knobs)
    log_gain = np.stack([0.03 * noise[0] + sd * noise[1], 0.03 * noise[0] + sd * noise[2]], -1)
    return np.exp(log_gain).astype(np.float32)


class Drawing:
    """A slide as one laboratory would stain and scan it; pixels are made when a window is asked for."""

    def __init__(self, spec: SlideSpec, centre: int | None = None, mpp: float | None = None, stain: str = "H&E"):
        origin = spec.origin
        if centre is not None:
            if not 0 <= centre < origin.centres:
                raise InputError(f"{spec.slide_id}: centre={centre}, its cohort has 0 to {origin.centres - 1}")
            origin = Origin(**{**asdict(origin), "centre": centre})
        self.spec, self.mpp = spec, mpp or spec.mpp
        self.tissue = tissue(spec)
        self.stain = appearance.stain(origin, spec.knobs)
        if stain != "H&E":
            self.stain = appearance.special_stain(self.stain, stain)
        self.scanner = appearance.scanner(origin, spec.knobs)
        self._matrix = optics.stain_matrix(self.stain)
        blur_um = 5.0 if self.tissue.marks.defocus is not None else 0.0
        self._margin = 4 + int(np.ceil(3 * max(3 * self.scanner["blur_um"], blur_um) / self.mpp))

    def window(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Pixels of the window with corner (x, y): (height, width, 3) uint8; coordinates in pixels of `mpp`."""
        pad, mpp = self._margin, self.mpp
        x_um, y_um = (x - pad) * mpp, (y - pad) * mpp
        shape = (height + 2 * pad, width + 2 * pad)
        h, e = self._dyes(x_um, y_um, shape)
        gain = artefacts.sample(self.tissue.gain, _GAIN_UM, x_um, y_um, shape, mpp)
        light = optics.transmitted(h, e, gain, self._matrix)
        light = self.tissue.marks.light(light, x_um, y_um, mpp)
        seed = [self.spec.origin.seed, self.spec.origin.slide, x + 1, y + 1]
        pixels = optics.scan(light.astype(np.float32, copy=False), self.scanner, mpp, seed)
        return pixels[pad : pad + height, pad : pad + width]

    def _dyes(self, x_um: float, y_um: float, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        size = (shape[1], shape[0], self.mpp)
        if not self._near_tissue(x_um, y_um, shape):
            return np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        h, e = painters.raster(self.tissue.scene, x_um, y_um, *size)
        marks = self.tissue.marks
        double = marks.window(marks.fold, x_um, y_um, shape, self.mpp)
        if double is not None:
            shift = marks.fold_shift_um
            over_h, over_e = painters.raster(self.tissue.scene, x_um + shift[0], y_um + shift[1], *size)
            h, e = h + double * (0.9 * over_h + 0.08), e + double * (0.9 * over_e + 0.15)
        return h, e

    def _near_tissue(self, x_um: float, y_um: float, shape: tuple[int, int]) -> bool:
        reach = 20.0
        top, left = (max(int((at - reach) / layout.MAP_UM), 0) for at in (y_um, x_um))
        bottom = int((y_um + shape[0] * self.mpp + reach) / layout.MAP_UM) + 1
        right = int((x_um + shape[1] * self.mpp + reach) / layout.MAP_UM) + 1
        return bool(self.tissue.scene.class_map[top:bottom, left:right].any()) if min(bottom, right) > 0 else False


def render(
    slide: str | Path | SlideSpec,
    centre: int | None = None,
    x_um: float = 0.0,
    y_um: float = 0.0,
    width_um: float | None = None,
    height_um: float | None = None,
    mpp: float | None = None,
    stain: str = "H&E",
) -> np.ndarray:
    """The same tissue as `slide` shows, stained and scanned by `centre` (its own by default): (h, w, 3) uint8.

    slide   a slide file of a synthetic cohort (its latents lie beside it) or a SlideSpec
    stain   "H&E", or "DAB" for brown in place of eosin
    Before JPEG. Raises InputError when the centre or stain does not exist or the generator has changed since.
    """
    spec = slide if isinstance(slide, SlideSpec) else read_spec(slide)
    drawing = Drawing(spec, centre, mpp, stain)
    step = drawing.mpp
    width = round((spec.width_um - x_um if width_um is None else width_um) / step)
    height = round((spec.height_um - y_um if height_um is None else height_um) / step)
    return drawing.window(round(x_um / step), round(y_um / step), width, height)


def sidecar(slide_path: str | Path, suffix: str) -> Path:
    """The file of a slide's truth: suffix ".truth.npz" (maps and nuclei) or ".latents.json"."""
    return Path(slide_path).with_suffix(suffix)


def read_spec(slide_path: str | Path) -> SlideSpec:
    """The SlideSpec a slide was drawn from. Raises InputError where it was drawn by another generator."""
    from pathfm.synthetic import generator_hash

    latents = read_json(sidecar(slide_path, ".latents.json"))
    if latents["generator"] != generator_hash():
        raise InputError(
            f"{slide_path} was drawn by generator {latents['generator']}, this is {generator_hash()}; "
            "make the cohort again"
        )
    return SlideSpec.from_json(latents["spec"])


def is_made(spec: SlideSpec, folder: Path) -> bool:
    """Whether just this slide is complete: its latents are written last and name the size of the other files."""
    try:
        latents = json.loads((folder / f"{spec.slide_id}.latents.json").read_text(encoding="utf-8"))
        same = SlideSpec.from_json(latents["spec"]) == spec
        return same and all((folder / name).stat().st_size == size for name, size in latents["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def make_slide(spec: SlideSpec, folder: Path) -> Path:
    """Draw `spec` into `folder`: <slide_id>.svs, .truth.npz and, last of all, .latents.json."""
    from pathfm.synthetic import GENERATOR_VERSION, generator_hash

    path, folder = Path(folder) / f"{spec.slide_id}.svs", Path(folder)
    drawing = Drawing(spec)
    with atomic_path(path) as partial:
        _write_pyramid(drawing, partial)
    scene, marks = drawing.tissue.scene, drawing.tissue.marks
    truth = sidecar(path, ".truth.npz")
    with atomic(truth) as file:
        np.savez_compressed(
            file,
            class_map=scene.class_map,
            artefacts=marks.mask,
            map_um=scene.map_um,
            nuclei=scene.nuclei,
            structure=scene.structure(),
        )
    record = {
        "generator": generator_hash(),
        "version": GENERATOR_VERSION,
        "spec": asdict(spec),
        **drawing.tissue.latents,
        "stain": drawing.stain,
        "scanner": drawing.scanner,
        "files": {file.name: file.stat().st_size for file in (path, truth)},
    }
    write_json(sidecar(path, ".latents.json"), record)
    return path


def _write_pyramid(drawing: Drawing, path: Path) -> None:
    """A tiled JPEG pyramid in Aperio's manner: level 0 streamed, the others averaged from it on the way."""
    spec = drawing.spec
    width, height = spec.width_px, spec.height_px
    factors = PYRAMIDS[spec.pyramid]
    levels = {f: np.empty((height // f, width // f, 3), np.uint8) for f in factors}
    quality = round(drawing.scanner["quality"])
    options = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": quality}, "metadata": None}
    options |= {"tile": (TILE_PX, TILE_PX), "maxworkers": 1, "dtype": np.uint8}
    with tifffile.TiffWriter(path, bigtiff=False, byteorder="<") as tiff:
        tiff.write(
            _tiles(_bands(drawing, levels), width),
            shape=(height, width, 3),
            description=_description(spec, width, height, quality),
            **options,
        )
        for factor, pixels in levels.items():
            size = pixels.shape[1], pixels.shape[0]
            note = f"{_description(spec, width, height, quality)} -> {size[0]}x{size[1]} 1/{factor}"
            tiff.write(_tiles([pixels], size[0]), shape=pixels.shape, description=note, **options)


def _bands(drawing: Drawing, levels: dict[int, np.ndarray]) -> Iterator[np.ndarray]:
    """Level 0 from top to bottom, _BAND_PX rows at a time; fills `levels` with area averages as it goes."""
    spec = drawing.spec
    for top in range(0, spec.height_px, _BAND_PX):
        rows = min(_BAND_PX, spec.height_px - top)
        band = np.empty((rows, spec.width_px, 3), np.uint8)
        for left in range(0, spec.width_px, _BAND_PX):
            cols = min(_BAND_PX, spec.width_px - left)
            band[:, left : left + cols] = drawing.window(left, top, cols, rows)
        for factor, pixels in levels.items():
            part = pixels[top // factor : (top + rows) // factor]
            size = (part.shape[1], part.shape[0])
            part[:] = cv2.resize(band[: size[1] * factor, : size[0] * factor], size, interpolation=cv2.INTER_AREA)
        yield band


def _tiles(bands, width: int) -> Iterator[np.ndarray]:
    """TIFF tiles in reading order; those over the edge are filled up with the last row and column."""
    for band in bands:
        for top in range(0, len(band), TILE_PX):
            for left in range(0, width, TILE_PX):
                tile = band[top : top + TILE_PX, left : left + TILE_PX]
                missing = (TILE_PX - tile.shape[0], TILE_PX - tile.shape[1])
                if any(missing):
                    tile = np.pad(tile, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge")
                yield tile


def _description(spec: SlideSpec, width: int, height: int, quality: int) -> str:
    return (
        f"Aperio Image Library pathfm synthetic\r\n{width}x{height} [0,0 {width}x{height}] "
        f"({TILE_PX}x{TILE_PX}) JPEG/RGB Q={quality}|AppMag = {round(10 / spec.mpp)}|MPP = {spec.mpp:g}"
        f"|ScanScope ID = centre {spec.origin.centre}|Filename = {spec.slide_id}"
    )
