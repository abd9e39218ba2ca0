"""What a perfect encoder would know: the generator's own latent variables, as features for the same probes."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pathfm.cohort import Cohort
from pathfm.errors import InputError, nearest
from pathfm.storage import read_json
from pathfm.synthetic.slides import sidecar
from pathfm.synthetic.truth import Truth

KINDS = ("stain", "scanner", "tissue", "labels")
_FILLS = ("dark", "vesicle", "grain", "nucleoli", "rough")
_NUCLEI = ("epithelial", "lymphocyte", "fibroblast", "myocyte", "adipocyte", "pyknotic", "ghost", "dust", "mitosis")


def slide_oracle(cohort: Cohort, kind: str) -> pd.DataFrame:
    """The latents of every slide, one row a slide in the cohort's order: the ceiling of any slide-level score.

    kind   "stain" or "scanner" (the centre), "tissue" (the patient: parameters of all classes) or "labels"
    """
    if kind not in KINDS:
        raise InputError(f"no oracle is called {kind!r}.{nearest(kind, KINDS)}")
    rows = []
    for row in cohort:
        latents = read_json(sidecar(row.path, ".latents.json"))
        if kind == "labels":
            rows.append(latents["label_latents"])
        elif kind == "tissue":
            rows.append({f"{c}.{name}": v for c, values in latents["tissue"].items() for name, v in values.items()})
        else:
            rows.append(latents[kind])
    return pd.DataFrame(rows, index=cohort.table["slide_id"])


def tile_oracle(cohort: Cohort, tiles: pd.DataFrame, tile_px: int) -> pd.DataFrame:
    """What the true nuclei and glands of every tile say, one row a tile in the order of `tiles`; no class is looked up.

    tiles   slide_id, x, y (level-0 px) and mpp, as in the manifest of labelled tiles
    Counts per mm2, kinds, sizes, what fills them, elongation and common direction of the nuclei, how they cluster; and
    how deep the tile lies in the structure of its tissue and in lumina (quantiles of both depths, um).
    """
    paths = dict(zip(cohort.table["slide_id"], cohort.table["path"], strict=True))
    found = {}
    for slide_id, there in tiles.groupby("slide_id"):
        truth = Truth.open(paths[slide_id])
        nuclei = truth.nuclei
        for tile in there.itertuples():
            side = tile_px * tile.mpp
            dx, dy = nuclei["x_um"] - tile.x * truth.mpp, nuclei["y_um"] - tile.y * truth.mpp
            inside = nuclei[dx.between(0, side) & dy.between(0, side)]
            found[tile.Index] = _described(inside, side) | _structured(_window(truth, tile, side))
    return pd.DataFrame([found[index] for index in tiles.index], index=tiles.index)


def _described(nuclei: pd.DataFrame, side_um: float) -> dict[str, float]:
    size, long = nuclei["diameter_um"], nuclei["major_um"] / nuclei["minor_um"]
    direction = np.abs(np.exp(2j * nuclei["angle"].to_numpy()) @ (long - 1).to_numpy()) / max((long - 1).sum(), 1e-6)
    per_cell = np.histogram2d(nuclei["x_um"], nuclei["y_um"], bins=4)[0]
    values = {
        **nuclei[list(_FILLS)].astype(float).mean(),
        "count": len(nuclei) / (side_um**2 / 1e6),
        "size": size.mean(),
        "size_sd": size.std(ddof=0),
        "elongation": long.mean(),
        "direction": float(direction),
        "clumping": per_cell.var() / max(per_cell.mean(), 1e-6),
        **{kind: (nuclei["kind"] == kind).mean() for kind in _NUCLEI},
    }
    return {name: float(np.nan_to_num(value)) for name, value in values.items()}  # a tile without nuclei is all 0


def _window(truth: Truth, tile, side_um: float) -> np.ndarray:
    """The structure maps under a tile, (n, 2) um."""
    left, top = (int(at * truth.mpp / truth.map_um) for at in (tile.x, tile.y))
    n = int(side_um / truth.map_um)
    return truth.structure[top : top + n, left : left + n].reshape(-1, 2)


def _structured(depths: np.ndarray) -> dict[str, float]:
    """Quantiles of the depth into a structure and into lumina, and the share of the tile in each."""
    values = {}
    for name, depth in zip(("depth", "hollow"), depths.T.astype(float), strict=True):
        values |= {f"{name} {q}": float(np.quantile(depth, q / 100)) for q in (5, 25, 50, 75, 95)}
        values[f"in {name}"] = float((depth > 0).mean())
    return values
