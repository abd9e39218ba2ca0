"""Do RankMe and ODCorr, which need no label, rank models as downstream scores do? Within a sweep and a method only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import nn

from pathfm import metrics, runs, sweeps
from pathfm.benchmarks import TileSet
from pathfm.errors import InputError
from pathfm.features import extract
from pathfm.pretrain import Run
from pathfm.representation import thin

POINT = ["sweep", "method", "where", "run", "step", "random", "n", "d", "rankme", "odcorr", "score"]
GROUP = ["sweep", "method", "where", "n", "d"]  # RankMe and ODCorr compare within these alone
METRICS = ("rankme", "odcorr")
IN_DOMAIN = "validation tiles of the cohort"
MIN_RUNS = 5  # under this a bootstrap over runs says nothing
RESAMPLES = 2000
POOLED = "all sweeps and methods"
FEW_TILES = "N is under 10 D"
WARNING = "pooled over sweeps and methods: RankMe and ODCorr depend on N, D and the method, read it beside the others"


def measure(model: nn.Module | str | Path, sets: Mapping[str, TileSet], preprocess=None, seed: int = 0) -> pd.DataFrame:
    """RankMe and ODCorr of a model's CLS token on several sets of tiles, such as in-domain and out-of-domain ones.

    sets   where -> tiles; labels are not looked at. As many tiles of each, drawn by `seed`, as the smallest has, for
           both depend on N

    A row a set: where, and what `of_features` says of them.
    """
    n = min(map(len, sets.values()))
    found = {where: extract(model, thin(tiles, n, seed), preprocess).x for where, tiles in sets.items()}
    return pd.DataFrame([{"where": where, **of_features(x)} for where, x in found.items()])


def of_features(x: np.ndarray) -> dict:
    """RankMe and ODCorr of features (N, D), and what they must be read with.

    n, d, rankme, rankme_share (RankMe / D), enough (whether N is ten D or more, as RankMe asks), odcorr with its floor
    and the number of constant features left out, mean_r2 over the same pairs of features, tile_corr (the mean absolute
    correlation of pairs of tiles) with its floor.
    """
    rank, repeat = metrics.rankme(x), metrics.odcorr(x)
    return {
        "n": rank.n,
        "d": rank.d,
        "rankme": rank.value,
        "rankme_share": rank.share,
        "enough": rank.n >= 10 * rank.d,
        "odcorr": repeat.value,
        "odcorr_floor": repeat.floor,
        "constants": repeat.constants,
        "mean_r2": repeat.mean_r2,
        "tile_corr": repeat.tiles,
        "tile_corr_floor": repeat.tiles_floor,
    }


def of_watches(found: Iterable[Run | str | Path], sweep: str) -> pd.DataFrame:
    """A point (POINT) a look that runs took at validation tiles; the score is their kNN accuracy there.

    The looks of a run are its checkpoints, one cluster. One before any step of a run from random weights is `random`.
    """
    parts = []
    for run in found:
        run = run if isinstance(run, Run) else Run(Path(run))
        looks = run.watches
        if "knn" not in looks:
            raise InputError(f"{run.folder} was watched without labelled tiles: no kNN accuracy is in watches.csv")
        fresh = (looks["step"] == 0) & (run.config.init == "random")
        told = {"sweep": sweep, "method": run.config.method, "where": IN_DOMAIN, "run": str(run.folder)}
        parts.append(looks.assign(**told, random=fresh, score=looks["knn"]))
    return pd.concat(parts, ignore_index=True)[POINT] if parts else pd.DataFrame(columns=POINT)


def of_teachers(found: Mapping[str | Path, float], sets: Mapping[str, TileSet], sweep: str) -> pd.DataFrame:
    """A point (POINT) a run and set of tiles: its teacher, as `measure` sees it, with the downstream score given.

    found  folder of a run -> score
    """
    parts = []
    for folder, score in found.items():
        run = Run(Path(folder))
        told = {"sweep": sweep, "method": run.config.method, "run": str(folder), "step": run.config.steps}
        parts.append(measure(run.teacher, sets).assign(**told, random=False, score=score))
    return pd.concat(parts, ignore_index=True)[POINT] if parts else pd.DataFrame(columns=POINT)


def of_results(name: str, score: str = "test") -> pd.DataFrame:
    """Points (POINT) of results/<name>.csv: the last look of each run with its downstream score, balanced accuracy.

    The first look of a run from random weights is a point too, `random`, with the score of random weights; the last
    one's step is not recorded. Rows of another generator are left out.
    """
    table, _ = runs.read_results(name)
    if not len(table):
        return pd.DataFrame(columns=POINT)
    missing = {"rankme", "odcorr", "n", "d", score} - set(table)
    if missing:
        raise InputError(f"results/{name}.csv has no column '{min(missing)}'; no watch or no probe was recorded there")
    method = sweeps.read_sweep(name)["base"].get("method", "dino")
    own = {"method": table.get("method", method), "init": table.get("init", "random")}
    table = table.assign(sweep=name, where=IN_DOMAIN, run=[f"{name}-{i}" for i in table.index], **own)
    last = table.assign(step=np.nan, random=False, score=table[score])
    first = table[table["init"] == "random"]
    first = first.assign(step=0, random=True, score=first["random"], **{m: first[f"{m}_first"] for m in METRICS})
    return pd.concat([first, last], ignore_index=True)[POINT]


def correlations(points: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Spearman's rank correlation of each metric with the score, a row a GROUP and metric, then the pooled ones.

    rho, low, high  the interval is a bootstrap over runs, whose checkpoints come along together; NaN under 5 runs
    points, runs    that count: points with random weights are left out, and so is what has no score or metric
    verdict         positive or negative where the interval is clear of 0, else undecided; "" without an interval
    note            why there is no number or interval, or the warning that stands beside a pooled one

    A negative rho of ODCorr says that less redundant features score higher.
    """
    counted = points[~points["random"].astype(bool)].dropna(subset=["score"])
    rows = []
    for key, group in counted.groupby(GROUP, sort=False):
        rows += [{**dict(zip(GROUP, key, strict=True)), **_row(group, m, resamples, seed)} for m in METRICS]
    if len(rows) > len(METRICS):
        everywhere = {**dict.fromkeys(GROUP, pd.NA), "sweep": POOLED}
        for metric in METRICS:
            pooled = _row(counted, metric, resamples, seed)
            rows.append({**everywhere, **pooled, "note": "; ".join(filter(None, [WARNING, pooled["note"]]))})
    columns = [*GROUP, "metric", "rho", "low", "high", "verdict", "points", "runs", "note"]
    return pd.DataFrame(rows, columns=columns)


def _row(points: pd.DataFrame, metric: str, resamples: int, seed: int) -> dict:
    """Correlation, interval and note of one metric; few tiles for RankMe are noted too."""
    points = points.dropna(subset=[metric])
    few = metric == "rankme" and (points["n"] < 10 * points["d"]).any()
    clusters = [one[[metric, "score"]].to_numpy(float) for _, one in points.groupby(["sweep", "run"], sort=False)]
    row = {"metric": metric, "points": len(points), "runs": len(clusters)}
    row |= {"low": np.nan, "high": np.nan, "verdict": ""}
    row["note"] = FEW_TILES if few else ""
    row["rho"] = _spearman(np.concatenate(clusters)) if clusters else np.nan
    if np.isnan(row["rho"]):
        return {**row, "note": "fewer than three points, or all alike"}
    if len(clusters) < MIN_RUNS:
        why = f"no interval from {len(clusters)} runs, it takes {MIN_RUNS}"
        return {**row, "note": "; ".join(filter(None, [why, row["note"]]))}
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(clusters), size=(resamples, len(clusters)))
    drawn = [_spearman(np.concatenate([clusters[i] for i in one])) for one in draws]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    verdict = "positive" if low > 0 else "negative" if high < 0 else "undecided"
    return {**row, "low": float(low), "high": float(high), "verdict": verdict}


def _spearman(pairs: np.ndarray) -> float:
    """Of (n, 2), the correlation of ranks with ties shared; NaN under three points or where one side is constant."""
    if len(pairs) < 3 or (np.ptp(pairs, axis=0) == 0).any():
        return np.nan
    ranks = rankdata(pairs, axis=0)
    ranks -= ranks.mean(axis=0)
    return float(ranks[:, 0] @ ranks[:, 1] / np.sqrt((ranks**2).sum(axis=0).prod()))


def beside(found: pd.DataFrame) -> pd.DataFrame:
    """Correlations with their verdicts side by side, as text: a row a place and N, a column a method and metric.

    found  of `correlations`; the pooled ones are left out
    """
    within = found[found["sweep"] != POOLED]
    text = [f"{_said(row)}{row['verdict'] and ': ' + row['verdict']}" for _, row in within.iterrows()]
    wide = within.assign(text=text, metric=within["metric"].replace({"rankme": "RankMe", "odcorr": "ODCorr"}))
    index, columns = ["where", "n"], ["method", "metric"]
    order = [within[index].drop_duplicates(), wide[columns].drop_duplicates()]
    wide = wide.pivot(index=index, columns=columns, values="text")
    return wide.reindex(index=pd.MultiIndex.from_frame(order[0]), columns=pd.MultiIndex.from_frame(order[1]))


def figure(points: pd.DataFrame) -> Figure:
    """Score against RankMe and ODCorr, a row a GROUP: runs joined through their checkpoints, random weights open."""
    groups = list(points.groupby(GROUP, sort=False))
    if not groups:
        raise InputError("no points to draw; record a sweep first")
    told = correlations(points).set_index([*GROUP, "metric"])
    fig, axes = plt.subplots(len(groups), 2, figsize=(6.5, 0.5 + 2.1 * len(groups)), squeeze=False, sharey="row")
    for row, (key, group) in zip(axes, groups, strict=True):
        for ax, metric, label in zip(row, METRICS, ("RankMe", "ODCorr"), strict=True):
            for _, run in group.sort_values("step").groupby("run", sort=False):
                ax.plot(run[metric], run["score"], color="0.8", lw=0.8, zorder=1)
            for random, face in ((True, "white"), (False, "#0072B2")):
                one = group[group["random"] == random]
                ax.plot(one[metric], one["score"], "o", ms=4.5, mec="#0072B2", mfc=face, zorder=2)
            found = told.loc[(*key, metric)] if (*key, metric) in told.index else None
            ax.set(xlabel=f"{label}\n(N {key[3]:g}, D {key[4]:g})", title="" if found is None else _said(found))
        row[0].set_ylabel(f"score: {key[0]}, {key[1]}\n{key[2]}", fontsize=7)
    fig.suptitle("Filled: trained; open: random weights, not counted; grey: one run", fontsize=8)
    return fig


def _said(row: pd.Series) -> str:
    interval = "" if np.isnan(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
    value = "no rank correlation" if np.isnan(row["rho"]) else f"rho {row['rho']:+.2f}{interval}"
    return f"{value}, {row['runs']} runs"
