"""RankMe and ODCorr in the domain of the cohort `study` and outside it: what results/domains.csv holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from pathfm import checkpoint, export, magnification, method_study, panels, scores, study, unsupervised
from pathfm.benchmarks import TileSet
from pathfm.errors import InputError
from pathfm.features import extract, random_twin
from pathfm.method_study import EVERY, TEXTURE
from pathfm.probe import linear
from pathfm.representation import sample, tiles_of
from pathfm.runs import notebooks_dir, read_results, stamp, write_results
from pathfm.stream import TileStream
from pathfm.transfer import test_data

COHORT = method_study.COHORT
N = 4096  # tiles of each part of the cohort; ten D and more of every network here
TILE_PX = 128  # of what they were pretrained on
MPPS = (1.0, method_study.PRIMARY_MPP)  # of the tiles measured: as in pretraining, and as the primary contrast's
REAL = "tiles/oral_oscc"
# Part -> its slides. The validation centre gave no slide to pretraining either: runs were watched on it alone.
PARTS = {
    "new patients, centres of pretraining": "role == 'test' and centre not in @new",
    "validation centre": "role == 'validate'",
    "test centres": "role == 'test' and centre in @new",
}
ORAL = "oral mucosa (real)"
RANDOM, LEAVES = "random weights", "non-histology initialisation"
LEAVES_STEPS = 400  # a third of what the arms have: dead leaves take longer to draw than tiles to read
UNITLESS = ["odcorr", "odcorr_floor", "constants", "mean_r2"]  # what can be said of features in mixed units
ODCORR = "ODCorr (N {:,}; dashed: independent features)"
NETWORK = ["network", "seed", "steps"]  # tells apart what is measured


def sets(mpp: float = MPPS[0], n: int = N) -> dict[str, TileSet]:
    """Unlabelled tiles: n of each part of the cohort at one scale."""
    slides = study.cohort(COHORT)
    index, new = study.index(slides), study.new_centres(slides)
    found = {}
    for where, rows in PARTS.items():
        chosen = index.subset(list(index.usable.query(rows, local_dict={"new": new})["slide_id"]))
        found[where] = tiles_of(TileStream(chosen, TILE_PX, mpp, seed=0), n)
    return found


def networks(seeds: Sequence[int], arms: Sequence[str] = ()) -> Iterator[tuple[dict, Callable[[], tuple]]]:
    """(NETWORK and method), and what makes the model and its preprocessing, of everything that is measured.

    arms  of `method_study`; all when empty

    The teacher of every checkpoint of the arms with each seed, trained where runs/methods does not hold them, and of
    each seed the network that DINO starts from; the same network trained by DINO on images that are no tissue, of the
    first seed; colour and texture.
    """
    started = set()
    for arm, seed in method_study.points_of(arms, seeds):
        run = method_study.trained(arm, seed)
        if run.config.method == "dino" and seed not in started:
            started.add(seed)
            yield {"network": RANDOM, "seed": seed, "steps": 0}, partial(_start, run.teacher, seed)
        for path in reversed(checkpoint.found(run.folder)):
            told = {"network": arm, "seed": seed, "steps": checkpoint.step_of(path), "method": run.config.method}
            yield told, partial(export.of_checkpoint, path)
    yield {"network": LEAVES, "seed": seeds[0], "steps": LEAVES_STEPS}, partial(_leaves, seeds[0])
    yield {"network": TEXTURE, "seed": 0, "steps": 0}, lambda: ("colour+lbp", None)


def _start(teacher: Path, seed: int) -> tuple[nn.Module, Callable]:
    model, preprocess = export.load(teacher)
    return random_twin(model, seed), preprocess


def _leaves(seed: int) -> tuple[nn.Module, Callable]:
    folder = notebooks_dir().parent / "runs" / "methods" / f"non-histology-{seed}"
    recipe = method_study.ARMS["DINO"][0]
    return export.load(study.non_histology(study.config(recipe, steps=LEAVES_STEPS, seed=seed), folder).teacher)


def measured(
    model: nn.Module | str, preprocess: Callable | None, parts: dict[str, TileSet], real: TileSet
) -> pd.DataFrame:
    """Rows of one network: at all tiles of the cohort's parts, and at as many as there are real ones beside these.

    Colour and texture mix units, so a spectrum of theirs says nothing and RankMe is left out.
    """
    rows = []
    for where, tiles in {**parts, ORAL: real}.items():
        x = np.asarray(extract(model, tiles, preprocess).x)
        few = x if len(x) <= len(real) else x[sample(len(x), len(real))]
        for some in (x, few) if len(few) < len(x) else (x,):
            rows.append({"where": where, **unsupervised.of_features(some)})
    table = pd.DataFrame(rows)
    return table[["where", "n", "d", *UNITLESS]] if isinstance(model, str) else table


def score(model: nn.Module | str, preprocess: Callable | None, tiles: TileSet, fresh: Sequence[str]) -> float:
    """Balanced accuracy on the test centres as `method_study` has it: linear probe, pooling chosen on validate.

    tiles  labelled, with roles;  fresh  centres without any pretraining slide
    """
    if isinstance(model, str):
        answer = linear(extract(model, tiles))
    else:
        _, answer = method_study.best_pool(model, tiles, preprocess, 0)
    return scores.of_centres([answer], fresh)[0].balanced_accuracy


def record(seeds: Sequence[int] = (0, 1, 2), arms: Sequence[str] = ()) -> pd.DataFrame:
    """Measures what results/domains.csv lacks, and writes it after each network: a killed recording goes on there.

    arms  some of `method_study`; all when empty. What is recorded of others stays as it is

    A network is known by NETWORK and the scale of its tiles; take its rows from the file to have it measured anew.
    Raises InputError without the real tiles, and for another arm.
    """
    torch.set_num_threads(1)
    folder = test_data(REAL)
    if folder is None:
        raise InputError(f"no real tiles: set PATHFM_TEST_DATA to the folder that holds {REAL}")
    real, slides = TileSet.from_folder(Path(folder)), study.cohort(COHORT)
    labelled = magnification.recut(study.tiles(slides), slides, method_study.MPPS)[method_study.PRIMARY_MPP]
    table, _ = read_results("domains")
    for mpp in MPPS:
        parts = sets(mpp)
        for told, make in networks(seeds, arms):
            once = told["network"] in (LEAVES, TEXTURE)  # no run of a method: they only stand beside
            if is_recorded(table, told, mpp) or (once and mpp != MPPS[0]):
                continue
            model, preprocess = make()
            rows = measured(model, preprocess, parts, real)
            rows["score"] = score(model, preprocess, labelled, study.new_centres(slides))
            rows.insert(0, "mpp", rows["where"].map(lambda where, mpp=mpp: np.nan if where == ORAL else mpp))
            if mpp != MPPS[0]:
                rows = rows[rows["where"] != ORAL]  # real tiles have one scale, and stand with the first
            table = pd.concat([table, rows.assign(**told, **stamp())], ignore_index=True)
            table = table[[*NETWORK, *(name for name in table if name not in NETWORK)]]
            write_results("domains", table)
    return table


def is_recorded(table: pd.DataFrame, told: dict, mpp: float) -> bool:
    """Whether a table of results/domains.csv has a network (`told`, with NETWORK) on tiles of this scale."""
    if table.empty:
        return False
    same = (table[NETWORK] == pd.Series({name: told[name] for name in NETWORK})).all(axis=1)
    return bool((table.loc[same, "mpp"] == mpp).any())


def ended(table: pd.DataFrame, n: int | None = None, mpp: float = MPPS[0]) -> pd.DataFrame:
    """Rows of the last checkpoint of every network, on tiles of one scale, at one N (None: the fewest).

    With MPPS[0] come the rows on real tiles.

    Networks come in one order, whatever was recorded first.
    """
    order = [RANDOM, *EVERY, LEAVES, TEXTURE]
    table = table.sort_values("network", key=lambda names: names.map(order.index), kind="stable")
    last = table["steps"] == table.groupby(["network", "seed"])["steps"].transform("max")
    seen = (table["mpp"] == mpp) | (table["mpp"].isna() & (mpp == MPPS[0]))
    return table[last & seen & (table["n"] == (n or table["n"].min()))]


def summary(table: pd.DataFrame, n: int | None = None, mpp: float = MPPS[0]) -> pd.DataFrame:
    """RankMe, RankMe / D, ODCorr and mean r2 of `ended`, mean over the seeds: networks by parts.

    table  of results/domains.csv
    """
    at = ended(table, n, mpp)
    names = {"rankme": "RankMe", "rankme_share": "RankMe / D", "odcorr": "ODCorr", "mean_r2": "mean r²"}
    wide = at.pivot_table(index="network", columns="where", values=list(names), sort=False).rename(columns=names)
    wide = wide.reindex(columns=[(what, where) for what in names.values() for where in at["where"].unique()])
    wide[("D", "")] = at.groupby("network")["d"].first()
    wide[("seeds", "")] = at.groupby("network")["seed"].nunique()
    return wide


def points(table: pd.DataFrame) -> pd.DataFrame:
    """Points for `unsupervised.correlations`: every checkpoint of an arm on every part, scored on the test centres.

    Checkpoints of a run are one cluster. Arms of one method are that method: DINO has the runs of two, DINOv2 those of
    three. The start of a run is a point of it, `random`.

    table  of results/domains.csv
    """
    rows, start = [], table[table["network"] == RANDOM]
    for arm in EVERY:
        one = table[table["network"] == arm]
        begun = start[start["seed"].isin(one["seed"])].assign(method=one["method"].iloc[0] if len(one) else "")
        both = pd.concat([begun.assign(random=True), one.assign(random=False)])
        rows.append(both.assign(run=arm + ", seed " + both["seed"].astype(str)))
    every = pd.concat(rows, ignore_index=True)
    scale = every["mpp"].map(lambda mpp: "" if np.isnan(mpp) else f", {mpp:g} µm/px")
    return every.assign(sweep="methods", step=every["steps"], where=every["where"] + scale)[unsupervised.POINT]


def figure(table: pd.DataFrame) -> Figure:
    """RankMe and ODCorr of `ended` on every part, at the fewest tiles: a dot a seed, a colour a network.

    The longest runs have filled marks where there are others.

    table  of results/domains.csv
    """
    at = ended(table)
    wheres, names = list(at["where"].unique()), list(at["network"].unique())
    arms = method_study.colours(name for name in names if name in EVERY)
    colours = {**arms, RANDOM: panels.method_colour(RANDOM), LEAVES: "black", TEXTURE: "0.6"}  # its own is an arm's
    fig, axes = plt.subplots(1, 2, figsize=(6.9, 3.4), sharey=True)
    for ax, what, label in zip(axes, ("rankme", "odcorr"), ("RankMe (N {:,})", ODCORR), strict=True):
        for k, name in enumerate(names):
            rows = at[at["network"] == name]
            y = rows["where"].map(wheres.index) + 0.8 / len(names) * (k - (len(names) - 1) / 2)
            ax.plot(rows[what], y, label=name, color=colours[name], **{**method_study.marks(name, arms), "ls": ""})
        ax.set(xlabel=label.format(at["n"].iloc[0]), ylim=(len(wheres) - 0.5, -0.5))
        ax.set_yticks(range(len(wheres)), [where.replace(", ", ",\n") for where in wheres])
        for between in np.arange(len(wheres) - 1) + 0.5:
            ax.axhline(between, color="0.9", lw=0.8, zorder=0)
    axes[0].set_xlim(left=0)
    panels.level(axes[1], x=float(at["odcorr_floor"].iloc[0]))
    axes[1].set_xlim(left=0)
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig
