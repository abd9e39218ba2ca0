"""Synthetic images with the nuclei that were drawn on them, as the readers of real ones give them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock
from PIL import Image

from pathfm.cohort import Cohort
from pathfm.errors import InputError
from pathfm.slide import Slide
from pathfm.storage import atomic, cache_dir, progress
from pathfm.synthetic.truth import Truth
from pathfm.tasks.nuclei import Masks, NucleiSet, check

CLASSES = ("background", "other", "inflammatory", "epithelial", "spindle-shaped")  # as CoNSeP's
KINDS = {
    "lymphocyte": 2, "plasma cell": 2, "eosinophil": 2, "epithelial": 3, "mitosis": 3,
    "fibroblast": 4, "myocyte": 4, "endothelium": 4, "adipocyte": 4,
}  # fmt: skip
KEPT = ("slide_id", "patient_id", "centre", "role")  # of a slide, in the manifest
STEP = 8  # a mask's pixel is STEP times the nucleus plus its type
LEAST = 15  # nuclei in an image


def synthetic_nuclei(
    cohort: Cohort, per_slide: int = 4, tile_px: int = 250, mpp: float = 0.5, seed: int = 0, folder: str | Path = ""
) -> NucleiSet:
    """Images of synthetic slides with instance and type of every nucleus, roles and patients as the cohort has them.

    per_slide  at most, drawn from a grid of places with 15 nuclei or more; slides of role pretrain are left out
    folder     where they are kept; the cache when empty

    A nucleus is an ellipse in its mask; what is drawn has harmonics on its outline. Raises InputError where a slide
    is not synthetic, or no place has nuclei enough.
    """
    asked = [*cohort.table["path"].astype(str), per_slide, tile_px, mpp, seed]
    name = hashlib.blake2b("\n".join(map(str, asked)).encode(), digest_size=6).hexdigest()
    home = Path(folder) if folder else cache_dir() / f"nuclei-{name}"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".lock"):
        if not (home / "manifest.csv").is_file():
            rows = [row for row in cohort if getattr(row, "role", "") != "pretrain"]
            made = [
                one for row in progress(rows, "nuclei") for one in _of_slide(row, home, per_slide, tile_px, mpp, seed)
            ]
            if not made:
                raise InputError(
                    f"no place of {tile_px * mpp:g} um in {cohort.name} has {LEAST} nuclei; take larger images"
                )
            with atomic(home / "manifest.csv", "w") as file:
                pd.DataFrame(made).to_csv(file, index=False)
    table = pd.read_csv(home / "manifest.csv", dtype=str)
    table["path"], table["mask"] = (
        [str(home / part / file) for file in table["file"]] for part in ("images", "labels")
    )
    good, bad = check(table, read_mask)
    return NucleiSet(f"synthetic nuclei of {cohort.name}", good.assign(mpp=mpp), CLASSES, read_mask, None, bad)


def read_mask(path: str, size: tuple[int, int]) -> Masks:
    """A 16-bit PNG of STEP times the nucleus plus its type."""
    with Image.open(path) as image:
        value = np.array(image).astype(np.int32)
    return Masks(value // STEP, (value % STEP).astype(np.uint8))


def draw(nuclei: pd.DataFrame, x_um: float, y_um: float, side_px: int, mpp: float) -> np.ndarray:
    """(side_px, side_px) uint16: the ellipses in a square with its corner at (x_um, y_um), numbered from 1.

    A pixel is a nucleus's where its centre is; a later one covers an earlier one.
    """
    found = np.zeros((side_px, side_px), np.uint16)
    reach = nuclei["major_um"] / 2
    inside = nuclei["x_um"].between(x_um - reach, x_um + side_px * mpp + reach)
    inside &= nuclei["y_um"].between(y_um - reach, y_um + side_px * mpp + reach)
    for number, one in enumerate(nuclei[inside].itertuples(), start=1):
        x, y, half = (one.x_um - x_um) / mpp, (one.y_um - y_um) / mpp, one.major_um / 2 / mpp
        left, top = max(int(x - half), 0), max(int(y - half), 0)
        there = found[top : int(y + half) + 1, left : int(x + half) + 1]
        dy, dx = np.indices(there.shape) + 0.5 - np.array([y - top, x - left])[:, None, None]
        along, across = dx * np.cos(one.angle) + dy * np.sin(one.angle), dy * np.cos(one.angle) - dx * np.sin(one.angle)
        within = (along / one.major_um) ** 2 + (across / one.minor_um) ** 2 <= (0.5 / mpp) ** 2
        there[within] = STEP * number + KINDS.get(one.kind, 1)
    return found


def _of_slide(row, home: Path, per_slide: int, tile_px: int, mpp: float, seed: int) -> list[dict]:
    """The images and masks of one slide, written; a row of the manifest each."""
    truth, side_um = Truth.open(row.path), tile_px * mpp
    nuclei = truth.nuclei
    with Slide.open(row.path, getattr(row, "mpp", None)) as slide:
        size_um = slide.width_px * slide.mpp, slide.height_px * slide.mpp
        bins = [np.arange(0, size // side_um + 1) * side_um for size in size_um]
        count = np.histogram2d(nuclei["x_um"], nuclei["y_um"], bins=bins)[0]
        places = np.argwhere(count >= LEAST)
        rng = np.random.default_rng(
            [seed, int.from_bytes(hashlib.blake2b(row.slide_id.encode(), digest_size=8).digest())]
        )
        made = []
        for column, line in places[np.sort(rng.permutation(len(places))[:per_slide])]:
            x_um, y_um = column * side_um, line * side_um
            pixels = slide.read(x_um / slide.mpp, y_um / slide.mpp, tile_px, mpp)
            file = f"{row.slide_id}-{column}-{line}.png"
            for part, content in (("images", pixels), ("labels", draw(nuclei, x_um, y_um, tile_px, mpp))):
                _write_png(home / part / file, content)
            known = {
                name: getattr(row, name) for name in ("slide_id", "patient_id", "centre", "role") if hasattr(row, name)
            }
            made.append({"file": file, **known})
    return made


def _write_png(path: Path, pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    with atomic(path) as file:
        file.write(buffer.getbuffer())
