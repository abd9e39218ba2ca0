"""Labelled tiles of a synthetic cohort, as a folder per class that any reader of tile benchmarks can load."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pathfm.cohort import Cohort, check_roles
from pathfm.errors import InputError
from pathfm.slide import Slide
from pathfm.storage import atomic_path, cache_dir, progress
from pathfm.synthetic.painters import CLASSES
from pathfm.synthetic.truth import Truth, _window_sums, integral

MIN_PURITY = 0.75  # share of a labelled tile's area that its class covers
_MAX_SPOILT = 0.10  # share of a tile that artefacts may cover


def labelled_tiles(
    cohort: Cohort,
    folder: str | Path | None = None,
    tile_px: int = 224,
    mpp: float = 0.5,
    per_class: int = 6,
    min_purity: float = MIN_PURITY,
    seed: int = 0,
) -> Path:
    """A folder of PNG tiles, one subfolder per class, with manifest.csv; made once and then kept.

    per_class   tiles of one class from one slide at most; they never overlap
    The manifest's columns: file, label, slide_id, patient_id, centre, role, mpp (of the tile), x, y (level-0 px),
    slide_mpp, purity. Roles are the cohort's, so no patient has two. Raises InputError where no tile is pure.
    """
    from filelock import FileLock

    check_roles(cohort.table)
    asked = (tile_px, mpp, per_class, min_purity, seed)
    folder = Path(folder) if folder else _home(cohort, asked)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if (folder / "manifest.csv").is_file():
            return folder
        rows = []
        for row in progress(list(cohort), f"tiles at {mpp:g} mpp", unit="slide"):
            rows += _from_slide(row, folder, tile_px, mpp, per_class, min_purity, seed)
        if not rows:
            raise InputError(
                f"no {tile_px}-px tile at {mpp:g} mpp has {min_purity:.0%} of one class in {cohort.name}; "
                "ask for smaller tiles, a finer mpp or less purity"
            )
        with atomic_path(folder / "manifest.csv") as partial:
            pd.DataFrame(rows).to_csv(partial, index=False)
    return folder


def pure_positions(truth: Truth, side_um: float, min_purity: float = MIN_PURITY) -> pd.DataFrame:
    """Corners of squares that are mostly one class and hardly spoilt: x_um, y_um, label, purity.

    On a grid of a quarter of `side_um`, wholly inside the slide.
    """
    height, width = (side * truth.map_um for side in truth.class_map.shape)
    step = side_um / 4
    y, x = np.mgrid[0 : max(height - side_um, 0) + 1e-6 : step, 0 : max(width - side_um, 0) + 1e-6 : step]
    area = (side_um / truth.map_um) ** 2
    spoilt = _window_sums(integral(truth.artefacts > 0), x, y, side_um, truth.map_um) / area
    found = []
    for code, name in enumerate(CLASSES, 1):
        purity = _window_sums(integral(truth.class_map == code), x, y, side_um, truth.map_um) / area
        good = (purity >= min_purity) & (spoilt <= _MAX_SPOILT)
        found.append(pd.DataFrame({"x_um": x[good], "y_um": y[good], "label": name, "purity": purity[good]}))
    return pd.concat(found, ignore_index=True)


def _from_slide(row, folder: Path, tile_px: int, mpp: float, per_class: int, min_purity: float, seed: int):
    """Cut the tiles of one slide; their manifest rows."""
    truth, side_um = Truth.open(row.path), tile_px * mpp
    where = pure_positions(truth, side_um, min_purity)
    digest = hashlib.sha256(f"{seed} {row.slide_id}".encode()).digest()
    where = where.sample(frac=1, random_state=np.random.default_rng(list(digest[:8])))
    rows = []
    with Slide.open(row.path) as slide:
        for label, places in where.groupby("label", sort=True):
            for place in _apart(places, side_um, per_class):
                x, y = round(place.x_um / slide.mpp), round(place.y_um / slide.mpp)
                file = f"{label}/{row.slide_id}-{x}-{y}.png"
                with atomic_path(folder / file) as partial:
                    Image.fromarray(slide.read(x, y, tile_px, mpp)).save(partial, compress_level=3)
                rows.append(
                    {
                        "file": file,
                        "label": label,
                        "slide_id": row.slide_id,
                        "patient_id": row.patient_id,
                        "centre": row.centre,
                        "role": row.role,
                        "mpp": mpp,
                        "x": x,
                        "y": y,
                        "slide_mpp": slide.mpp,
                        "purity": round(place.purity, 3),
                    }
                )
    return rows


def _apart(places: pd.DataFrame, side_um: float, most: int) -> list:
    """The first `most` places of which no two overlap."""
    chosen: list = []
    for place in places.itertuples():
        if all(max(abs(place.x_um - c.x_um), abs(place.y_um - c.y_um)) >= side_um for c in chosen):
            chosen.append(place)
            if len(chosen) == most:
                break
    return chosen


def _home(cohort: Cohort, asked: tuple) -> Path:
    from pathfm.synthetic import generator_hash

    text = repr((generator_hash(), sorted(map(str, cohort.table["path"])), asked))
    return cache_dir() / f"tiles-{cohort.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
