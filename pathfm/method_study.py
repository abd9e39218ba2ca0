"""DINO against DINOv2 on the synthetic cohort `study`: what results/methods.csv, ANSWERS and methods_watches.csv (looks
while training) hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from pathfm import answers, confounding, export, magnification, panels, scores, study, transfer, unsupervised
from pathfm.benchmarks import TileSet
from pathfm.errors import InputError
from pathfm.features import Features, extract, pools, random_twin
from pathfm.pretrain import Run
from pathfm.probe import FLOOR_NAMES, linear
from pathfm.runs import notebooks_dir, read_results, results_dir, stamp, write_results
from pathfm.scores import Prediction

COHORT = "study"
MPPS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)  # of the test tiles, half an octave apart
STEPS = 1200
# Arm -> recipe and steps. The last does the matrix products of DINO's STEPS: tests/test_method_study.py counts both.
ARMS = {
    "DINO": ("demo", STEPS),
    "DINOv2": ("dinov2-demo", STEPS),
    "DINOv2, equal FLOPs": ("dinov2-demo", 1130),
}
# The same questions after the longest runs; added when the answers of ARMS had been seen.
LONGEST = {f"{arm}, longest": (recipe, 2 * steps) for arm, (recipe, steps) in ARMS.items()}
EVERY = {**ARMS, **LONGEST}
# Written before any run on `study`.
QUESTION = "Does DINOv2 know more of tissue classes than DINO, on centres that neither saw?"
PRIMARY = (
    "balanced accuracy on the test tiles at 0.5 um/px of the two centres without any pretraining slide, DINOv2 minus "
    "DINO at as many tiles, paired by tile, bootstrap by patient crossed with three pretraining seeds; the same at as "
    "many FLOPs stands beside it; two points apart count as equal"
)
PRIMARY_MPP = 0.5
START = "start"
ANSWERS, REAL = "methods_arms.csv", "methods_real.csv"
TEXTURE = FLOOR_NAMES["colour+lbp"]
KNOWN = ("new_centres", "robustness_index", "centre_identity", "slide_dependence")


def trained(arm: str, seed: int) -> Run:
    """The run of one arm in runs/methods, which goes on where it was stopped."""
    recipe, steps = EVERY[arm]
    folder = notebooks_dir().parent / "runs" / "methods" / f"{'-'.join(arm.replace(',', '').split())}-{seed}"
    return study.pretrained(study.cohort(COHORT), study.config(recipe, steps=steps, seed=seed), folder=str(folder))


def judged(run: Run, arm: str, sets: dict[float, TileSet], fresh: Sequence[str]) -> Iterator[tuple[dict, Prediction]]:
    """A row and the answers for the run's start (the same network at random weights) and its teacher, at every mpp.

    sets   of `magnification.recut`: the same sites at each mpp
    fresh  centres without any pretraining slide: what `new_centres` is scored on

    The probe is fitted anew at each mpp, on the pooling that validates best; what the features know of centres and
    slides (`confounding.of`) is asked of that pooling, on the test tiles of all centres.
    """
    teacher, preprocess = export.load(run.teacher)
    seed = run.config.seed
    for when, model in ((START, random_twin(teacher, seed)), ("end", teacher)):
        for mpp, tiles in sets.items():
            features, fit = best_pool(model, tiles, preprocess, seed)
            answer = replace(fit, name=f"{START if when == START else arm} at {mpp:g}")
            new = scores.of_centres([answer], fresh)[0]
            known = confounding.of(features)
            known.pop("why")
            yield (
                {
                    "arm": arm,
                    "seed": seed,
                    "when": when,
                    "mpp": mpp,
                    "effective_mpp": features.provenance["effective_mpp"],
                    "pool": features.provenance["pool"],
                    "validation": fit.settings["validate"],
                    "new_centres": new.balanced_accuracy,
                    "all_centres": answer.balanced_accuracy,
                    **known,
                    "n_tiles": len(new.table),
                },
                answer,
            )


def best_pool(model: nn.Module, tiles: TileSet, preprocess: Callable, seed: int) -> tuple[Features, Prediction]:
    """Features of the pooling that validates best (CLS, mean of the patch tokens, or both), and their probe's answers.

    seed  of the pretraining behind the model
    """
    found = pools(extract(model, tiles, preprocess, "both"))
    fits = [linear(features, seed) for features in found]
    best = max(range(len(fits)), key=lambda k: fits[k].settings["validate"])
    return found[best], fits[best]


def point(arm: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trains one arm with one seed and judges it: its rows, and its answers."""
    torch.set_num_threads(1)
    slides = study.cohort(COHORT)
    run = trained(arm, seed)
    sets = magnification.recut(study.tiles(slides), slides, MPPS)
    rows, said = zip(*judged(run, arm, sets, study.new_centres(slides)), strict=True)
    log = run.log
    spent = {"steps": run.config.steps, "tiles_seen": run.config.steps * run.config.batch_size}
    spent |= {"loss_first": log["loss"].iloc[0], "loss_last": log["loss"].iloc[-1]}
    return pd.DataFrame(rows).assign(**spent, **stamp()), answers.table(said)


def texture() -> pd.DataFrame:
    """Answers of colour + LBP, the floor without a network, at every mpp."""
    slides = study.cohort(COHORT)
    sets = magnification.recut(study.tiles(slides), slides, MPPS)
    return answers.table(
        linear(extract("colour+lbp", tiles, name=f"{TEXTURE} at {mpp:g}")) for mpp, tiles in sets.items()
    )


def looks(points: Sequence[tuple[str, int]]) -> pd.DataFrame:
    """Points of `unsupervised.of_watches`: what runs saw of themselves while they trained, named by their folder.

    points  (arm, seed)
    """
    found = unsupervised.of_watches([trained(*one) for one in points], "methods")
    return found.assign(run=[Path(run).name for run in found["run"]])


def record(seeds: Sequence[int] = (0, 1, 2), workers: int = 1, arms: Sequence[str] = ()) -> pd.DataFrame:
    """Runs arms with every seed, `workers` at a time, one thread each; writes the three files of results/.

    arms  some of ARMS and LONGEST; all when empty. What is recorded of others stays as it is

    Raises InputError for another arm.
    """
    points = points_of(arms, seeds)
    floor = texture()  # which draws the tiles before the workers want them
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        found = list(pool.map(point, *zip(*points, strict=True)))
    table = beside_others("methods", pd.concat([rows for rows, _ in found]), ["arm", "seed"])
    seen = beside_others("methods_watches", looks(points).assign(**stamp()), ["run"])
    said = with_recorded(ANSWERS, together([*(wide for _, wide in found), floor]), points)
    write_results("methods", table)
    answers.write_table(results_dir() / ANSWERS, said)
    write_results("methods_watches", seen)
    return table


def points_of(arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Every arm, or every one there is where `arms` is empty, with every seed. Raises InputError for an unknown arm."""
    unknown = [arm for arm in arms if arm not in EVERY]
    if unknown:
        raise InputError(f"no arm is called '{unknown[0]}'; there are: {'; '.join(EVERY)}")
    return list(itertools.product(arms or EVERY, seeds))


def record_real(folder: str | Path, seeds: Sequence[int], arms: Sequence[str] = ()) -> Path:
    """Answers of `transfer.judged` on real tiles, each arm's teacher named as the arm; the path of REAL in results/.

    folder  of the tiles, as `transfer.read_tiles` reads it
    arms    some of ARMS and LONGEST; all when empty. What is recorded of others stays as it is

    Raises InputError for another arm, and for a folder that holds no labelled tiles.
    """
    torch.set_num_threads(1)
    tiles, wides, points = transfer.read_tiles(folder), [], points_of(arms, seeds)
    for arm, seed in points:
        teacher, preprocess = export.load(trained(arm, seed).teacher)
        said = transfer.judged(teacher, random_twin(teacher, seed), preprocess, tiles, seed)
        wides.append(answers.table(replace(one, name=one.name.replace("teacher", arm)) for one in said))
    return answers.write_table(results_dir() / REAL, with_recorded(REAL, together(wides), points))


def beside_others(name: str, rows: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """`rows`, after those of results/<name>.csv that have another key."""
    old, _ = read_results(name)
    if not old.empty:
        again = old.set_index(key).index.isin(rows.set_index(key).index)
        rows = pd.concat([old[~again], rows])
    return rows.reset_index(drop=True)


def with_recorded(name: str, wide: pd.DataFrame, points: Sequence[tuple[str, int]]) -> pd.DataFrame:
    """Answers of points (arm, seed) beside all that results/<name> has of others, their starts and floors among them.

    Raises InputError where those are of other tiles.
    """
    path = results_dir() / name
    if not path.is_file():
        return wide
    old = pd.read_csv(path, dtype=str)
    if list(old["file"]) != list(wide["file"]):
        raise InputError(f"{path} is of other tiles than these; move it away, and record every arm")
    again = [column for column in old if "|" in column and point_in(column) in points]
    return together([old.drop(columns=again), wide])


def point_in(column: str) -> tuple[str, int]:
    """The arm (of a start or floor, its name) and seed in the name of a column of ANSWERS or REAL."""
    features, _, seed, *_ = column.split("|")
    return features.split(" at ")[0].removesuffix(transfer.WITHIN), int(seed)


def together(wides: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Answers of all points side by side; the starts of arms with one seed are the same network, and kept once."""
    whole = wides[0]
    for other in wides[1:]:
        whole = whole.join(other.drop(columns=[name for name in other if name in whole]))
    return whole


def contrasts(said: dict[str, list[Prediction]], arms: Sequence[str] = ()) -> pd.DataFrame:
    """A row a contrast and mpp of the test tiles that was recorded, on centres without any pretraining slide.

    The gain of each arm over its start, and each arm against the first; where both have answers.

    said   of `study.recorded_answers("methods", "arms")`
    arms   ARMS when empty
    """
    said, arms = study.on_centres(said, name=COHORT), list(arms or ARMS)
    rows = []
    for mpp in MPPS:
        for arm in arms:
            for other in (START, *([arms[0]] if arm != arms[0] else [])):
                both = said.get(f"{arm} at {mpp:g}"), said.get(f"{other} at {mpp:g}")
                if all(both):
                    rows.append({"contrast": f"{arm} minus {other}", "mpp": mpp, **scores.paired(*both)._asdict()})
    return pd.DataFrame(rows)


def curve(said: dict[str, list[Prediction]], table: pd.DataFrame) -> pd.DataFrame:
    """Scores over the mpp of the test tiles, on centres without any pretraining slide: each arm beside its floors.

    A row an mpp and START, TEXTURE or arm: tile_mpp, effective_mpp (of what the network sees), and the columns of
    `scores.scores`: score with interval, and of an arm the gain over the better floor at that mpp, with verdict.

    said   of `study.recorded_answers("methods", "arms")`
    table  of results/methods.csv, which knows the effective mpp; its arms are shown
    """
    said, parts, arms = study.on_centres(said, name=COHORT), [], tuple(table["arm"].unique())
    for mpp, rows in table.groupby("mpp"):
        several = {name: said[f"{name} at {mpp:g}"] for name in (*arms, START, TEXTURE)}
        every = [replace(one, name=name, floor=name not in arms) for name, runs in several.items() for one in runs]
        scored = scores.scores(every).drop(columns="mpp")
        seen = scored["features"].map(lambda name, of=rows["effective_mpp"].iloc[0]: np.nan if name == TEXTURE else of)
        parts.append(scored.assign(tile_mpp=mpp, effective_mpp=seen))
    return pd.concat(parts, ignore_index=True)


def shares(said: dict[str, list[Prediction]], oracle: Prediction, arms: Sequence[str] = ()) -> pd.DataFrame:
    """How much of the way from START to the oracle each arm goes at PRIMARY_MPP, on the new centres; a row an arm.

    said    of `study.recorded_answers("methods", "arms")`
    oracle  a forest's answers on the generator's truth under each tile of PRIMARY_MPP, of the recorded pretraining.
            The arms were tested on those of its sites that every mpp can serve, and they alone count here; it learnt
            from all sites of probe-train, also those that a coarse tile cannot have
    arms    ARMS when empty

    Raises InputError where the oracle did not answer a tile, or knows another class for it.
    """
    said = study.on_centres(said, name=COHORT)
    start = said[f"{START} at {PRIMARY_MPP:g}"]
    top = asked_alone(oracle, start[0].table["file"])
    rows = {arm: scores.share_closed(said[f"{arm} at {PRIMARY_MPP:g}"], start, top)._asdict() for arm in arms or ARMS}
    return pd.DataFrame(rows).T.rename_axis("arm").assign(n_tiles=len(top.table), oracle=top.balanced_accuracy)


def asked_alone(answer: Prediction, files: Sequence[str]) -> Prediction:
    """The same answers on these tiles alone, in this order. Raises InputError where one was not asked."""
    table = answer.table.set_index("file")
    missing = set(files) - set(table.index)
    if missing:
        raise InputError(
            f"{answer.name} was not asked of {len(missing)} tiles such as {min(missing)}; record both anew"
        )
    return replace(answer, table=table.loc[list(files)].reset_index())


def split(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of results/methods.csv of ARMS, and of LONGEST."""
    if table.empty:
        return table, table
    longest = table["arm"].isin(LONGEST)
    return table[~longest], table[longest]


def known(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over the seeds, a row an arm and mpp, start beside end: score, and what features know of centre and slide.

    table  of results/methods.csv
    """
    wide = table.pivot_table(index=["arm", "mpp"], columns="when", values=list(KNOWN), sort=False)
    return wide[[(what, when) for what in KNOWN for when in (START, "end")]]


def rises(table: pd.DataFrame) -> pd.DataFrame:
    """In how many `runs` of an arm and mpp the score on new centres rose from start to end, centre identity, and both.

    table  of results/methods.csv
    """
    each = table.set_index(["arm", "mpp", "seed", "when"])[["new_centres", "centre_identity"]].unstack("when")
    up = each.xs("end", axis=1, level="when") > each.xs(START, axis=1, level="when")
    up = up.assign(both=up.all(axis=1), runs=True)
    return up.groupby(["arm", "mpp"], sort=False).sum()


def colours(names: Iterable[str]) -> dict[str, str]:
    """The colour of each arm of a table: one a method, and one for as many FLOPs."""
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    order = list(ARMS)
    return {name: cycle[order.index(name.removesuffix(", longest"))] for name in names}


def curve_figure(curve: pd.DataFrame) -> Figure:
    """Scores over mpp with their intervals, and the gain of each arm over the better floor at that mpp.

    The longest runs have filled marks where there are others.

    curve  of `curve`
    """
    named = list(curve["features"].unique())
    arms = colours(name for name in named if name not in (START, TEXTURE))
    every = {**arms, START: panels.method_colour("random weights"), TEXTURE: "0.5"}
    fig, (left, right) = plt.subplots(1, 2, figsize=(6.9, 3.2))
    for name, colour in every.items():
        rows = curve[curve["features"] == name]
        left.plot(rows["tile_mpp"], rows["balanced_accuracy"], color=colour, **marks(name, arms))
        left.fill_between(rows["tile_mpp"], rows["low"], rows["high"], color=colour, alpha=0.12, lw=0)
    for k, (arm, colour) in enumerate(arms.items()):
        rows = curve[curve["features"] == arm]
        error = 100 * np.array([rows["gain"] - rows["gain_low"], rows["gain_high"] - rows["gain"]])
        beside = rows["tile_mpp"] * 1.06 ** (k - (len(arms) - 1) / 2)  # so that intervals stand side by side
        right.errorbar(beside, 100 * rows["gain"], error, lw=1.2, color=colour, **{**marks(arm, arms), "ls": ""})
    panels.level(left, y=1 / curve["n_classes"].iloc[0])
    panels.level(right, y=0)
    left.set(ylim=(0, 1), ylabel="balanced accuracy\n(dashed: chance)")
    right.set(ylabel="points over the better floor")
    scales = curve.groupby("tile_mpp")["effective_mpp"].max()
    for ax in (left, right):
        ax.set(xscale="log", xlabel="µm per pixel of the test tiles\n(in brackets: of what the network sees)")
        ax.set_xticks(scales.index, [f"{mpp:g}\n({seen:g})" for mpp, seen in scales.items()], fontsize=7)
        ax.minorticks_off()
    names = {START: "random weights (their start)"}
    handles = [plt.Line2D([], [], color=colour, **marks(name, arms)) for name, colour in every.items()]
    fig.legend(handles, [names.get(name, name) for name in every], loc="outside lower center", ncols=3)
    return fig


def marks(name: str, arms: Iterable[str]) -> dict:
    """How an arm is drawn, or a floor: dashed. The longest runs are filled where there are others beside them."""
    longest = [arm for arm in arms if arm in LONGEST]
    hollow = name in arms and bool(longest) and name not in longest
    return {"marker": "o", "ms": 3.5, "ls": "-" if name in arms else "--"} | ({"mfc": "white"} if hollow else {})


def figure(table: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Gains over the start at every mpp with their intervals, and what the features know of centres before and after.

    table  of results/methods.csv, of the arms to show;  found  of `contrasts` of these
    """
    fig, axes = plt.subplots(1, 4, figsize=(6.9, 2.6), width_ratios=(2, 1, 1, 1))
    over_start = found[found["contrast"].str.endswith(f" minus {START}")]
    arms, mpps = colours(over_start["contrast"].str.removesuffix(f" minus {START}").unique()), sorted(set(found["mpp"]))
    for k, (arm, colour) in enumerate(arms.items()):
        rows = over_start[over_start["contrast"] == f"{arm} minus {START}"]
        at = rows["mpp"].map(mpps.index) + 0.18 * (k - (len(arms) - 1) / 2)
        error = 100 * np.array([rows["value"] - rows["low"], rows["high"] - rows["value"]])
        axes[0].errorbar(at, 100 * rows["value"], error, fmt="o", ms=4, color=colour, label=arm)
    axes[0].set_xticks(range(len(mpps)), [f"{mpp:g}" for mpp in mpps])
    axes[0].set(xlabel="µm per pixel of the test tiles", ylabel="points over the start")
    panels.level(axes[0], y=0)
    at = table[table["mpp"] == PRIMARY_MPP]
    for ax, column in zip(axes[1:], ("centre_identity", "slide_dependence", "robustness_index"), strict=True):
        for arm, colour in arms.items():
            for _, run in at[at["arm"] == arm].groupby("seed"):
                ax.plot([0, 1], run.set_index("when").loc[[START, "end"], column], "o-", ms=3, color=colour, alpha=0.7)
        ax.set(title=column.replace("_", "\n"), xlim=(-0.3, 1.3))
        ax.set_xticks([0, 1], [START, "end"])
    panels.level(axes[1], y=float(at["centre_chance"].iloc[0]))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return fig
