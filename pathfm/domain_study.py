"""RankMe and ODCorr in the domain of the cohort `study` and outside it: what results/domains.csv holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from pathfm import export, method_study, panels, study, unsupervised
from pathfm.benchmarks import TileSet
from pathfm.errors import InputError
from pathfm.features import random_twin
from pathfm.representation import tiles_of
from pathfm.runs import notebooks_dir, stamp, write_results
from pathfm.stream import TileStream
from pathfm.transfer import test_data

COHORT = method_study.COHORT
ARMS = ("DINO", "DINOv2")  # of `method_study`
N = 4096  # tiles of each part of the cohort; ten D and more of every network here
TILE_PX, MPP = 128, 1.0  # of what they were pretrained on
REAL = "tiles/oral_oscc"
# Part -> its slides. The validation centre gave no slide to pretraining either: runs were watched on it alone.
PARTS = {
    "new patients, centres of pretraining": "role == 'test' and centre not in @new",
    "validation centre": "role == 'validate'",
    "test centres": "role == 'test' and centre in @new",
}
ORAL = "oral mucosa (real)"
RANDOM, LEAVES, TEXTURE = "random weights", "non-histology initialisation", "colour + LBP"
LEAVES_STEPS = 400  # a third of what the arms have: dead leaves take longer to draw than tiles to read
UNITLESS = ["odcorr", "odcorr_floor", "constants", "mean_r2"]  # what can be said of features in mixed units
ODCORR = "ODCorr (N {:,}; dashed: independent features)"


def sets(n: int = N) -> dict[str, TileSet]:
    """Unlabelled tiles: n of each part of the cohort, at the scale of pretraining."""
    slides = study.cohort(COHORT)
    index, new = study.index(slides), study.new_centres(slides)
    found = {}
    for where, rows in PARTS.items():
        chosen = index.subset(list(index.usable.query(rows, local_dict={"new": new})["slide_id"]))
        found[where] = tiles_of(TileStream(chosen, TILE_PX, MPP, seed=0), n)
    return found


def networks(seeds: Sequence[int]) -> Iterator[tuple[dict, nn.Module | str, object]]:
    """(network, seed, steps), what `features.extract` takes and its preprocessing, of everything that is measured.

    ARMS of `method_study`, trained where runs/methods does not hold them; for each seed the network that they
    start from; the same network trained by DINO on images that are no tissue, of the first seed; colour and texture.
    """
    recipe = method_study.ARMS["DINO"][0]
    for seed in seeds:
        for arm in ARMS:
            run = method_study.trained(arm, seed)
            teacher, preprocess = export.load(run.teacher)
            if arm == "DINO":
                yield {"network": RANDOM, "seed": seed, "steps": 0}, random_twin(teacher, seed), preprocess
            yield {"network": arm, "seed": seed, "steps": run.config.steps}, teacher, preprocess
    folder = notebooks_dir().parent / "runs" / "methods" / f"non-histology-{seeds[0]}"
    run = study.non_histology(study.config(recipe, steps=LEAVES_STEPS, seed=seeds[0]), folder)
    told = {"network": LEAVES, "seed": seeds[0], "steps": run.config.steps}
    yield told, *export.load(run.teacher)
    yield {"network": TEXTURE, "seed": 0, "steps": 0}, "colour+lbp", None


def measured(told: dict, model: nn.Module | str, preprocess, parts: dict[str, TileSet], real: TileSet) -> pd.DataFrame:
    """Rows of one network: at all tiles of the cohort's parts, and at as many as there are real ones beside these.

    Colour and texture mix units, so a spectrum of theirs says nothing and RankMe is left out.
    """
    found = [unsupervised.measure(model, parts, preprocess)]
    found.append(unsupervised.measure(model, {**parts, ORAL: real}, preprocess))
    table = pd.concat(found, ignore_index=True)
    if isinstance(model, str):
        table = table[["where", "n", "d", *UNITLESS]]
    return table.assign(**told)


def record(seeds: Sequence[int] = (0, 1, 2)) -> pd.DataFrame:
    """Measures everything and writes results/domains.csv. Raises InputError without the real tiles."""
    torch.set_num_threads(1)
    folder = test_data(REAL)
    if folder is None:
        raise InputError(f"no real tiles: set PATHFM_TEST_DATA to the folder that holds {REAL}")
    parts, real = sets(), TileSet.from_folder(Path(folder))
    rows = pd.concat([measured(*one, parts, real) for one in networks(seeds)], ignore_index=True)
    first = ["network", "seed", "steps", "where"]
    table = rows[[*first, *(name for name in rows if name not in first)]].assign(**stamp())
    write_results("domains", table)
    return table


def summary(table: pd.DataFrame, n: int | None = None) -> pd.DataFrame:
    """RankMe, ODCorr and mean r2 at `n` tiles (None: the fewest), mean over the seeds: networks by parts.

    table  of results/domains.csv
    """
    at = table[table["n"] == (n or table["n"].min())]
    names = {"rankme": "RankMe", "odcorr": "ODCorr", "mean_r2": "mean r²"}
    wide = at.pivot_table(index="network", columns="where", values=list(names), sort=False).rename(columns=names)
    wide = wide.reindex(columns=[(what, where) for what in names.values() for where in at["where"].unique()])
    wide[("seeds", "")] = at.groupby("network")["seed"].nunique()
    return wide


def points(table: pd.DataFrame, scored: pd.DataFrame) -> pd.DataFrame:
    """Points for `unsupervised.correlations`: every run of an arm on every part, scored on the test centres.

    table   of results/domains.csv;  scored  of results/methods.csv
    """
    at = scored[scored["mpp"] == method_study.PRIMARY_MPP]
    rows = []
    for arm in ARMS:
        for when, network in ((method_study.START, RANDOM), ("end", arm)):
            score = at[(at["arm"] == arm) & (at["when"] == when)].set_index("seed")["new_centres"]
            one = table[table["network"] == network]
            one = one.assign(score=one["seed"].map(score), step=one["steps"], random=network == RANDOM)
            rows.append(one.assign(method=arm, run=one["seed"]))
    return pd.concat(rows, ignore_index=True).assign(sweep="methods")[unsupervised.POINT]


def figure(table: pd.DataFrame) -> Figure:
    """RankMe and ODCorr on every part at one N: a dot a seed, a colour a network.

    table  of results/domains.csv
    """
    at = table[table["n"] == table["n"].min()]
    wheres, names = list(at["where"].unique()), list(at["network"].unique())
    colours = dict(zip(ARMS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    colours |= {RANDOM: panels.method_colour(RANDOM), LEAVES: "black", TEXTURE: "0.6"}  # its own is an arm's
    fig, axes = plt.subplots(1, 2, figsize=(6.9, 3.0), sharey=True)
    for ax, what, label in zip(axes, ("rankme", "odcorr"), ("RankMe (N {:,})", ODCORR), strict=True):
        for k, name in enumerate(names):
            rows = at[at["network"] == name]
            y = rows["where"].map(wheres.index) + 0.12 * (k - (len(names) - 1) / 2)
            ax.plot(rows[what], y, "o", ms=3.5, color=colours.get(name, "0.5"), label=name)
        ax.set(xlabel=label.format(at["n"].iloc[0]), ylim=(len(wheres) - 0.5, -0.5))
        ax.set_yticks(range(len(wheres)), [where.replace(", ", ",\n") for where in wheres])
        for between in np.arange(len(wheres) - 1) + 0.5:
            ax.axhline(between, color="0.9", lw=0.8, zorder=0)
    axes[0].set_xlim(left=0)
    panels.level(axes[1], x=float(at["odcorr_floor"].iloc[0]))
    axes[1].set_xlim(left=0)
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig
