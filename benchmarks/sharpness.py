"""What reading does to sharpness: distance from level 0, and how well the path a tile took can be told from it.

    python benchmarks/sharpness.py [slide.svs ...]

Sharpness is a shortcut for a model: where a tile's spectrum tells whether it was passed through, decoded at a
fraction, resampled or read from a coarser level, it may tell the slide's pyramid too. Two tables are printed:
decibels against level 0 averaged or filtered to the same scale, by mpp (68.1 where both are the same); and the
balanced accuracy of a logistic regression on the radial power spectrum, against chance, for resample="auto" and
"always". It is an upper bound: of its 8 folds several hold tiles of one slide, so that what a slide looks like counts
as what was done to it.

Without slides, those of the embedded synthetic cohort, and both tables are recorded in results/sharpness.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pathfm import InputError, Slide, runs  # noqa: E402
from pathfm.reading import Job, ReadPlan, read  # noqa: E402
from pathfm.resample import resample  # noqa: E402
from pathfm.synthetic import embedded  # noqa: E402

MPP = (0.25, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
SIDE_PX = 128
TILES = 48  # per slide and mpp


def path_of(slide: Slide, plan: ReadPlan) -> str:
    """How a tile came about, in a word."""
    words = ["coarser level"] * bool(plan.level) + ["fraction"] * (plan.scale > 1) + ["resampled"] * plan.resampled
    return " + ".join(words) or "as it is"


def from_level_0(slide: Slide, x: int, y: int, mpp: float) -> np.ndarray:
    """The same tile by the named filter from all of level 0."""
    step = mpp / slide.mpp
    reach = int(np.ceil(2 * max(step, 1))) + 1
    side = int(np.ceil(SIDE_PX * step)) + 2 * reach
    source = read([Job(slide, ReadPlan(0, 1.0, slide.mpp, 1, False), x - reach, y - reach, side, side)])[0]
    return resample(source, float(reach), float(reach), step, np.empty((SIDE_PX, SIDE_PX, 3), np.uint8))


def spectrum(image: np.ndarray) -> np.ndarray:
    """log10 of the power of the grey image in 24 rings of frequency."""
    grey = image.mean(axis=2) * np.hanning(SIDE_PX)[:, None] * np.hanning(SIDE_PX)
    power = np.abs(np.fft.fftshift(np.fft.fft2(grey - grey.mean()))) ** 2
    distance = np.hypot(*(np.indices(power.shape) - SIDE_PX // 2))
    ring = np.minimum(distance / (SIDE_PX / 2) * 24, 24).astype(int)
    return np.log10(np.bincount(ring.ravel(), power.ravel())[:24] / np.bincount(ring.ravel())[:24] + 1e-3)


def tiles(path: str, how: str, rng: np.random.Generator) -> list[dict]:
    """TILES tiles with something on them for each mpp."""
    rows = []
    with Slide.open(path) as slide:
        for mpp in MPP:
            try:
                plan = slide.plan(mpp, resample=how)
            except InputError:
                continue
            side, taken = SIDE_PX * plan.mpp / slide.mpp, 0
            if side + 16 > min(slide.width_px, slide.height_px):
                continue
            for _ in range(20 * TILES):
                room = (int((n - side) // plan.grid) for n in (slide.width_px, slide.height_px))
                x, y = (int(rng.integers(n)) * plan.grid for n in room)
                image = read([Job(slide, plan, x, y, SIDE_PX, SIDE_PX)])[0]
                if image.std() < 12:
                    continue
                row = {"slide": Path(path).stem, "mpp": mpp, "path": path_of(slide, plan), "spectrum": spectrum(image)}
                if taken < 6:
                    error = image - from_level_0(slide, x, y, plan.mpp).astype(float)
                    row["db"] = 10 * np.log10(255**2 / max((error**2).mean(), 1e-2))
                rows.append(row)
                taken += 1
                if taken == TILES:
                    break
    return rows


def told(rows: list[dict]) -> pd.DataFrame:
    """For each mpp that several paths serve: balanced accuracy and chance."""
    table, found = pd.DataFrame(rows), []
    for mpp, group in table.groupby("mpp"):
        kinds = group["path"].unique()
        if len(kinds) < 2:
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, class_weight="balanced"))
        guess = cross_val_predict(model, np.stack(group["spectrum"]), group["path"], cv=8)
        right = np.mean([(guess[group["path"] == kind] == kind).mean() for kind in kinds])
        found.append({"mpp": mpp, "path": " / ".join(kinds), "told": right, "chance": 1 / len(kinds)})
    return pd.DataFrame(found, columns=["mpp", "path", "told", "chance"])


def measured(paths: list[str], how: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Decibels against level 0 by mpp and path, with the number of slides and tiles; and `told`."""
    rows = [row for path in paths for row in tiles(path, how, np.random.default_rng(0))]
    groups = pd.DataFrame(rows).groupby(["mpp", "path"])
    decibels = groups["db"].agg(**{"mean dB": "mean", "least dB": "min"})
    return decibels.assign(slides=groups["slide"].nunique(), tiles=groups.size()).reset_index(), told(rows)


def long(table: pd.DataFrame, how: str) -> pd.DataFrame:
    """One row a number: resample, mpp, path, quantity, value."""
    rows = table.melt(["mpp", "path"], var_name="quantity")
    return rows.assign(resample=how)[["resample", "mpp", "path", "quantity", "value"]]


def main(named: list[str]) -> None:
    found = []
    for how in ("auto", "always"):
        tables = measured(named or embedded().table["path"].tolist(), how)
        print(f'\nresample="{how}"', *(table.round(2).to_string(index=False) for table in tables), sep="\n\n")
        found += [long(table, how) for table in tables]
    if not named:
        print(f"\n{runs.write_results('sharpness', pd.concat(found).assign(**runs.stamp()))}")


if __name__ == "__main__":
    main(sys.argv[1:])
