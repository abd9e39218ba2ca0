"""The generator shown by its own means: one tissue under every centre, twins without an effect, classes that mimic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pathfm.figures import image, scale_bar
from pathfm.synthetic import CLASSES, appearance, render
from pathfm.synthetic.appearance import MIMICS, Knobs, Mimic, Origin
from pathfm.synthetic.slides import SlideSpec, tissue

BORDER = ("tumour", "stroma")
BORDER_UM = 250.0
PIECE_UM = 720.0  # side of the small slides that twins and mimics are drawn on
SCALES = {"fine_cues": (48.0, 0.25), "coarse_cues": (400.0, 1.0)}  # side in um and mpp of a field that shows the cue
BAR_UM = {48.0: 10, 250.0: 50, 400.0: 100}
WHITE = 215  # grey level from which on a pixel is empty glass, lumen or cleft


@dataclass(frozen=True)
class Twin:
    """A row of fields drawn twice: at default, and with `knobs` off."""

    knobs: tuple[str, ...]
    seen: str  # when they are off, in under 45 letters: it stands above the fields
    side_um: float = BORDER_UM
    mpp: float = 0.5
    shown: tuple[tuple[str, ...], ...] = (BORDER,) * 4  # classes of each field; each is of another patient

    @property
    def off(self) -> dict[str, str]:
        return dict.fromkeys(self.knobs, "off")


TWINS = (
    Twin(("centre",), "no laboratory's colour; runs may differ"),
    Twin(("patient", "slide", "variants"), "built and stained alike"),
    Twin(
        ("fine_cues",),
        "no chromatin, nucleoli, uneven outlines",
        *SCALES["fine_cues"],
        (("tumour",), ("normal",), ("lymphocytes",), ("stroma",)),
    ),
    Twin(
        ("coarse_cues",),
        "no lumina in glands, no collagen waves",
        *SCALES["coarse_cues"],
        (("tumour",), ("stroma",), ("tumour",), ("tumour",)),
    ),
)


@dataclass(frozen=True)
class TwinFields:
    """Fields of a Twin: labels, and two lists of (h, w, 3) uint8, at default and with the knobs off."""

    twin: Twin
    labels: list[str]
    default: list[np.ndarray]
    off: list[np.ndarray]


def piece(origin: Origin, classes: tuple[str, ...], **knobs) -> SlideSpec:
    """A slide of PIECE_UM a side at 0.5 mpp that holds `classes` only, at default knobs but for `knobs`."""
    side_px = round(PIECE_UM / 0.5)
    absent = tuple(name for name in CLASSES if name not in classes)
    return SlideSpec("piece", origin, 0.5, side_px, side_px, kind="core", absent=absent, knobs=Knobs.of(**knobs))


def place(spec: SlideSpec, classes: tuple[str, ...], side_um: float, by: str = "nuclei") -> tuple[float, float]:
    """Corner (x, y), um, of the square that holds much of each of `classes` and no glass.

    Among such squares the one with most nuclei of theirs or, by "structure", most glands, fascicles and follicles.
    """
    scene = tissue(spec).scene
    side = min(round(side_um / scene.map_um), *scene.class_map.shape)
    codes = [1 + CLASSES.index(name) for name in classes]
    shares = [_held(scene.class_map == code, side) for code in codes]
    mark = np.zeros(scene.class_map.shape, np.float32)
    if by == "nuclei":
        nuclei = scene.nuclei[np.isin(scene.nuclei["cls"], codes)]
        kinds, counts = np.unique(nuclei["kind"], return_counts=True)
        own = nuclei[np.isin(nuclei["kind"], kinds[counts > 0.3 * counts.max(initial=0)])]
        at = (np.stack([own["y_um"], own["x_um"]]) / scene.map_um).astype(int)
        np.add.at(mark, tuple(np.clip(at, 0, np.array(mark.shape)[:, None] - 1)), 1)
    else:
        mark[np.isin(scene.class_map, codes) & (scene.structure()[..., 0] > 0)] = 1
    much = _held(mark, side)
    score = np.min(shares, 0) * len(codes) - _held(scene.class_map == 0, side) + 0.2 * much / max(much.max(), 1e-9)
    row, column = np.unravel_index(score.argmax(), score.shape)
    return float(column * scene.map_um), float(row * scene.map_um)


def _held(mask: np.ndarray, side: int) -> np.ndarray:
    """Mean of `mask` in every square of `side` cells that lies wholly inside it."""
    sums = cv2.integral(mask.astype(np.float32), sdepth=cv2.CV_64F)
    return (sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]) / side**2


def colour_distance(fields: list[np.ndarray]) -> float:
    """Mean distance between the mean colours of two of `fields`, each (h, w, 3), in grey levels of 255; nan of one."""
    means = [field.reshape(-1, 3).mean(0) for field in fields]
    apart = [np.linalg.norm(a - b) for a, b in combinations(means, 2)]
    return float(np.mean(apart)) if apart else float("nan")


def fine_detail(field: np.ndarray, mpp: float) -> float:
    """Spread in grey levels of red, below about 2 um, inside nuclei: there where the smoothed field is darkest."""
    red = field[..., 0].astype(np.float32)
    smooth = cv2.GaussianBlur(red, (0, 0), 1.0 / mpp)
    inside = smooth < np.quantile(smooth, 0.15)
    return float((red - smooth)[inside].std())


def white_share(field: np.ndarray) -> float:
    """Share of the pixels that hold next to no dye: lumen, cleft or glass."""
    return float((field.min(-1) > WHITE).mean())


def under_every_centre(spec: SlideSpec, stain: str = "H&E", mpp: float = 0.5) -> list[np.ndarray]:
    """BORDER_UM of the border between tumour and stroma as every centre of the cohort would show it: (h, w, 3) each."""
    x, y = place(spec, BORDER, BORDER_UM)
    return [render(spec, k, x, y, BORDER_UM, BORDER_UM, mpp, stain) for k in range(spec.origin.centres)]


def centres_figure(spec: SlideSpec, mpp: float = 0.5) -> Figure:
    """Above, one field in H&E under every centre; below, the same in DAB."""
    columns = spec.origin.centres
    fig, axes = plt.subplots(2, columns, figsize=(6.5, 6.5 / columns * 2 + 0.1), squeeze=False)
    for row, stain in zip(axes, ("H&E", "DAB"), strict=True):
        for centre, (ax, pixels) in enumerate(zip(row, under_every_centre(spec, stain, mpp), strict=True)):
            image(ax, pixels)
            if stain == "H&E":
                ax.set_title(f"centre {centre}" + ", its own" * (centre == spec.origin.centre), fontsize=8)
        _name_row(row[0], stain)
        scale_bar(row[0], mpp, BAR_UM[BORDER_UM])
    return fig


def centres_table(spec: SlideSpec, mpp: float = 0.5) -> pd.DataFrame:
    """By centre: mean red, green and blue of that field, its nuclei, and how many of them are found in the pixels.

    A nucleus is found where its middle is darker in red than the field's median: by chance half of them are.
    """
    x, y = place(spec, BORDER, BORDER_UM)
    nuclei = tissue(spec).scene.nuclei
    at = np.floor((np.stack([nuclei["x_um"], nuclei["y_um"]], 1) - (x, y)) / mpp).astype(int)
    column, row = at[((at >= 0) & (at < round(BORDER_UM / mpp))).all(1)].T
    rows = []
    for centre, pixels in enumerate(under_every_centre(spec, mpp=mpp)):
        red = cv2.blur(pixels[..., 0], (5, 5))
        colour = dict(zip(("red", "green", "blue"), pixels.reshape(-1, 3).mean(0), strict=True))
        found = int((red[row, column] < np.median(red)).sum())
        rows.append({"centre": centre, **colour, "nuclei drawn": len(row), "nuclei found": found})
    return pd.DataFrame(rows).set_index("centre")


def twin_fields(specs: list[SlideSpec], twins: tuple[Twin, ...] = TWINS) -> list[TwinFields]:
    """The fields of each twin: of a patient of each centre of `specs` for the knob `centre`, else of patients of one.

    Where single classes are shown, patients on whom one class is drawn like another are left out.
    """
    return [_twin_fields(twin, specs) for twin in twins]


def _twin_fields(twin: Twin, specs: list[SlideSpec]) -> TwinFields:
    made = TwinFields(twin, [], [], [])
    by = "centre" if "centre" in twin.knobs else "patient"
    for classes, origin in zip(twin.shown, _origins(twin, by, specs), strict=False):
        default, off = piece(origin, classes), piece(origin, classes, **twin.off)
        by_what = "structure" if "coarse_cues" in twin.off else "nuclei"
        corner = place(default, classes, twin.side_um, by_what)
        made.default.append(render(default, None, *corner, twin.side_um, twin.side_um, twin.mpp))
        if "patient" in twin.off:  # areas of the classes go with the patient, so the border lies elsewhere
            corner = place(off, classes, twin.side_um)
        made.off.append(render(off, None, *corner, twin.side_um, twin.side_um, twin.mpp))
        made.labels.append(f"{by} {getattr(origin, by)}" if classes == BORDER else classes[0])
    return made


def _origins(twin: Twin, by: str, specs: list[SlideSpec]) -> list[Origin]:
    """The first slide of every centre; or of every patient, all at one centre, with further ones where few are."""
    one = specs[0].origin
    further = [] if by == "centre" else [replace(one, patient=number, slide=number) for number in range(100)]
    first: dict[int, Origin] = {}
    for origin in [spec.origin for spec in specs] + further:
        if BORDER in twin.shown or not appearance.mimics(origin, Knobs()):
            first.setdefault(getattr(origin, by), origin)
    return [origin if by == "centre" else replace(origin, centre=one.centre) for origin in first.values()]


def twins_figure(rows: list[TwinFields]) -> Figure:
    """A row a knob: on the left fields at default, on the right the same with the knob off, and what must vanish."""
    fig = plt.figure(figsize=(6.5, 1.22 * len(rows)))
    for strip, made in zip(np.ravel(fig.subfigures(len(rows), 1)), rows, strict=True):
        knobs = ", ".join(name.replace("_", " ") for name in made.twin.knobs)
        titles = ("default", f"{knobs} off: {made.twin.seen}")
        halves = strip.subfigures(1, 2, wspace=0.03)
        for half, title, fields in zip(halves, titles, (made.default, made.off), strict=True):
            half.suptitle(title, fontsize=7, x=0.01, ha="left", fontweight="bold")
            axes = half.subplots(1, len(fields), squeeze=False)[0]
            for ax, label, pixels in zip(axes, made.labels, fields, strict=True):
                image(ax, pixels)
                ax.set_title(label, fontsize=6, pad=1.5)
            scale_bar(axes[0], made.twin.mpp, BAR_UM[made.twin.side_um])
    fig.get_layout_engine().set(h_pad=0.01, w_pad=0.01, hspace=0.0, wspace=0.02)
    return fig


def twins_table(rows: list[TwinFields], spec: SlideSpec) -> pd.DataFrame:
    """What each knob governs, measured on the pixels at default and with it off; `spec` is seen under every centre."""
    made = {one.twin.knobs[0]: one for one in rows}
    apart, detail, white = "colour distance, grey levels", "spread below 2 µm, grey levels", "white, % of tumour"
    table = []
    seen = [
        under_every_centre(replace(piece(spec.origin, BORDER), knobs=Knobs.of(**off)))
        for off in ({}, {"centre": "off"})
    ]
    table.append(("centre", "one tissue under every centre", apart, *map(colour_distance, seen), len(seen[0])))
    for knob, what in (("centre", "a slide of every centre"), ("patient", "patients of one centre")):
        one = made[knob]
        table.append((knob, what, apart, colour_distance(one.default), colour_distance(one.off), len(one.off)))
    one = made["fine_cues"]
    sides = [np.mean([fine_detail(field, one.twin.mpp) for field in side]) for side in (one.default, one.off)]
    table.append(("fine_cues", "inside nuclei", detail, *sides, len(one.off)))
    one = made["coarse_cues"]
    tumour = [k for k, label in enumerate(one.labels) if label == "tumour"]
    sides = [100 * np.mean([white_share(side[k]) for k in tumour]) for side in (one.default, one.off)]
    table.append(("coarse_cues", "glands", white, *sides, len(tumour)))
    return pd.DataFrame(table, columns=["knob", "fields", "measured", "default", "off", "N"]).set_index("knob")


def patient_of(mimic: Mimic, like: Origin) -> Origin:
    """The first patient, of a cohort drawn with the seed of `like`, on whom `mimic` shows; at the centre of `like`."""
    patients = (replace(like, patient=patient, slide=patient) for patient in range(10_000))
    return next(origin for origin in patients if mimic in appearance.mimics(origin, Knobs()))


def mimic_fields(
    mimic: Mimic, like: Origin, side_um: float, mpp: float, settings=("default", "off", "strong")
) -> dict[str, np.ndarray]:
    """Title -> (h, w, 3) uint8: the painter's class, and the one that mimics it with its cue at each of `settings`."""
    origin, corners, fields = patient_of(mimic, like), {}, {}
    for name, setting in ((mimic.painted_as, "default"), *((mimic.name, setting) for setting in settings)):
        spec = piece(origin, (name,), **{mimic.family: setting})
        corner = corners.setdefault(name, place(spec, (name,), side_um))
        title = name if name == mimic.painted_as else f"{name}: cue {setting}"
        fields[title] = render(spec, None, *corner, side_um, side_um, mpp)
    return fields


def mimics_figure(like: Origin) -> Figure:
    """A row a confusable pair, at the scale of the one cue that tells it apart."""
    fig, axes = plt.subplots(len(MIMICS), 4, figsize=(6.5, 1.71 * len(MIMICS)))
    for row, mimic in zip(axes, MIMICS, strict=True):
        side_um, mpp = SCALES[mimic.family]
        for ax, (title, pixels) in zip(row, mimic_fields(mimic, like, side_um, mpp).items(), strict=True):
            image(ax, pixels, title=title)
        scale_bar(row[0], mpp, BAR_UM[side_um])
        _name_row(row[0], f"{mimic.name} as {mimic.painted_as}\n{mimic.family.replace('_', ' ')}")
    return fig


def mimics_table(like: Origin, side_um: float = 600, mpp: float = 2.0) -> pd.DataFrame:
    """By pair: which parameters differ, how many with the cue off, and the colours' distance at default and off."""
    rows = []
    for mimic in MIMICS:
        origin = patient_of(mimic, like)
        apart = {setting: _apart(mimic, origin, setting) for setting in ("default", "off")}
        painter, default, off = mimic_fields(mimic, like, side_um, mpp, tuple(apart)).values()
        rows.append(
            {
                "pair": f"{mimic.name} as {mimic.painted_as}",
                "cue": mimic.family.replace("_", " "),
                "differ": ", ".join(f"{name} {by:+.1f}" for name, by in apart["default"].items()),
                "differ, off": len(apart["off"]),
                "colour distance": colour_distance([painter, default]),
                "colour distance, off": colour_distance([painter, off]),
            }
        )
    return pd.DataFrame(rows).set_index("pair")


def _apart(mimic: Mimic, origin: Origin, setting: str) -> dict[str, float]:
    """Tissue parameters in which the mimic differs from the class that it is painted as, and by how much."""
    params = appearance.tissue(origin, Knobs.of(**{mimic.family: setting}))
    mine, theirs = vars(params[mimic.name]), vars(params[mimic.painted_as])
    return {name: mine[name] - theirs[name] for name in mine if mine[name] != theirs[name]}


def _name_row(ax, name: str) -> None:
    ax.text(-0.04, 0.5, name, rotation=90, ha="right", va="center", ma="center", fontsize=8, transform=ax.transAxes)
