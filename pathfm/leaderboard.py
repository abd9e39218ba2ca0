"""The leaderboard: our recorded scores beside published ones, a table a protocol, never two protocols in one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from filelock import FileLock
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pathfm import confounding, figures, panels, runs, scores, study, tables, tasks
from pathfm.comparisons import Ranks, mean_ranks
from pathfm.errors import InputError, nearest
from pathfm.scores import Prediction
from pathfm.storage import atomic
from pathfm.tasks.task import SOURCES_OF_TISSUE

RESULTS = "probes"  # results/probes.csv, a row a model, task, part and protocol
KEY = ["model", "task", "part", "protocol"]
COLUMNS = [
    "model", "pretrained_on", "task", "part", "metric", "score", "low", "high", "spread", "runs", "protocol",
    "published", "floor", "n_tiles", "n_patients", "n_quarantined", "best_floor", "gain", "gain_low", "gain_high",
    "verdict", "auc", "auc_low", "auc_high", *confounding.COLUMNS, "seen", "source", "note",
]  # fmt: skip
ABOUT = ("model", "published", "pretrained_on", "seen")  # columns of `wide` that are no score
STAMP = ["commit", "date", "device", "generator"]
NO_TISSUE = {"none", "ImageNet", "natural images", "synthetic"}  # pretrained on these: no patient was seen
SWEEPS = {"answers": "tiles (synthetic)", "real": "real tiles"}  # what the files of sweeps.ANSWERS were tested on
FLOORS = {"random weights": "random weights", "colour": "colour mean and spread", "colour + LBP": "colour + LBP"}
PART = {"validate": "val", "test": "test"}  # of the role that a probe says it is reported on
# What the readers of tasks add to a name: the split, a draw, what is missing, a leak.
ADDED = re.compile(r"(?: \(clean split\)|, run \d+|, partial: [\d,]+(?: of [\d,]+)?|, patients on two sides)+$")


def published() -> pd.DataFrame:
    """Scores as their authors print them, COLUMNS, with the source of each; pathfm/published.csv."""
    table = pd.read_csv(Path(__file__).with_name("published.csv"), keep_default_na=False, na_values=[""])
    text = {name: table[name].fillna("") for name in ("note", "source")}
    return _whole(table.assign(published=True, **text))


def recorded() -> pd.DataFrame:
    """Our scores, COLUMNS: those of results/probes.csv and of the sweeps whose answers are recorded.

    Rows on synthetic tiles of another generator are left out.
    """
    path, found = runs.results_dir() / f"{RESULTS}.csv", []
    if path.is_file():
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
        missing = [name for name in (*KEY, "score", "generator", "pretrained_on") if name not in table]
        if missing:
            raise InputError(f"{path} has no column '{missing[0]}'; `pathfm evaluate` writes it, take out what did not")
        other = table["generator"] != runs.stamp()["generator"]
        synthetic = (table["pretrained_on"] == "synthetic") | table["task"].str.contains("synthetic")
        found.append(table[~(other & synthetic)])
    found += [_of_sweep(csv) for csv in sorted(runs.results_dir().glob("*_*.csv"))]
    found = [table for table in found if len(table)]
    return _whole(pd.concat(found, ignore_index=True).assign(published=False)) if found else _whole(pd.DataFrame())


def rows(protocol: str | None = None) -> pd.DataFrame:
    """Published and recorded scores, of one protocol or all of them; COLUMNS.

    Raises InputError for a protocol that nothing is scored by.
    """
    table = pd.concat([one for one in (published(), recorded()) if len(one)], ignore_index=True)
    if protocol is not None and protocol not in set(table["protocol"]):
        raise InputError(f"no score is by the protocol '{protocol}'.{nearest(protocol, table['protocol'].unique())}")
    return table if protocol is None else table[table["protocol"] == protocol].reset_index(drop=True)


def plain(task: str) -> str:
    """The task that a recorded name is of: "til, partial: 48 of 304,097" is til, "mhist (clean split)" mhist."""
    return ADDED.sub("", task)


def seen(pretrained_on: str, task: str) -> str:
    """Whether a model may have seen a task's patients or slides: "no", "unknown", or the source that both are of.

    task           as it was recorded, `plain` or not
    pretrained_on  sources joined by +, such as "TCGA+GTEx"; "none", "ImageNet" or "synthetic" saw none
    """
    sources = set(str(pretrained_on).split("+"))
    known = tasks.TASKS.get(plain(task))
    overlap = dict.fromkeys(SOURCES_OF_TISSUE, "unknown") if known is None else known.overlap
    both = [source for source in SOURCES_OF_TISSUE if overlap[source] == "yes" and source in sources]
    if both:
        return "+".join(both)
    if sources <= NO_TISSUE:
        return "no"
    stated = sources <= {*SOURCES_OF_TISSUE, *NO_TISSUE}
    doubtful = [s for s in SOURCES_OF_TISSUE if overlap[s] != "no" and (s in sources or not stated)]
    return "unknown" if doubtful else "no"


def row_of(
    predictions: Sequence[Prediction], model: str, pretrained_on: str, task: str, floors: Sequence[Prediction] = ()
) -> dict:
    """A recorded row: the score of one model on one task with interval, sizes, gain over the best floor, and verdict.

    predictions  of one probe, whose name is the protocol, a pretraining seed each

    The spread is the standard deviation over seeds, or of one prediction over the fits whose `scores` its settings
    hold; runs is how many there were.
    """
    table = scores.scores([*predictions, *floors])
    one, first = table.iloc[0], predictions[0]
    best = table[table["floor"]].sort_values("balanced_accuracy").tail(1)["features"]
    each = [run.balanced_accuracy for run in predictions]
    each = first.settings.get("scores", each) if len(each) == 1 else each
    return {
        "model": model,
        "pretrained_on": pretrained_on,
        "task": task,
        "part": PART[first.settings.get("reported on", "test")],
        "metric": "balanced accuracy",
        "score": one["balanced_accuracy"],
        **one[["low", "high", "n_tiles", "n_patients", "n_quarantined", "gain", "gain_low", "gain_high", "verdict"]],
        "runs": len(each),
        "spread": np.std(each, ddof=1) if len(each) > 1 else np.nan,
        "protocol": one["probe"],
        "floor": bool(one["floor"]),
        "best_floor": best.iloc[0] if len(best) and not one["floor"] else "",
        "note": one["interval"] + ("; transductive" if one["transductive"] else ""),
    }


def record(found: list[dict]) -> Path:
    """Adds rows to results/probes.csv, stamped; one of the same model, task, part and protocol is replaced."""
    path = runs.results_dir() / f"{RESULTS}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        new = pd.DataFrame(found).assign(**runs.stamp())
        before = pd.read_csv(path, keep_default_na=False, na_values=[""]) if path.is_file() else new.iloc[:0]
        table = pd.concat([one for one in (before, new) if len(one)], ignore_index=True)
        table = table.drop_duplicates(KEY, keep="last")
        kept = [name for name in (*COLUMNS, *STAMP) if name in table and name not in ("published", "seen")]
        with atomic(path, "w") as file:
            table[kept].to_csv(file, index=False, float_format="%.4f")
    return path


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """A row a model and a column a task and part, of scores by one protocol; best mean rank of shared tasks first.

    Columns published ("published", or "" for ours), pretrained_on and seen (tasks whose tissue the model may have
    seen, with the source, "?" where unknown) stand beside them. Raises InputError where protocols are mixed, or two
    metrics of one task.
    """
    several = sorted(table["protocol"].unique())
    if len(several) != 1:
        raise InputError(f"scores by {len(several)} protocols do not compare: {', '.join(several)}; take one at a time")
    table = table.assign(column=[_column(one) for one in table.itertuples()])
    mixed = table.groupby("column")["metric"].nunique(dropna=False)
    if (mixed > 1).any():
        raise InputError(f"{mixed.index[mixed > 1][0]} is scored by two metrics; keep one of them")
    order = list(dict.fromkeys(table["column"]))
    index = ["model", "published"]
    found = table.pivot_table(index=index, columns="column", values="score", aggfunc="last")[order]
    told = table.groupby(index).apply(_told, include_groups=False)
    found = told.join(found)
    ranks = found[order].rank(ascending=False).mean(axis=1)
    found = found.loc[ranks.sort_values(kind="stable").index].reset_index()
    return found.assign(published=np.where(found["published"], "published", ""))


def ours(table: pd.DataFrame) -> pd.DataFrame:
    """What `wide` has no room for, a row a recorded score of `rows`: intervals, the gain over the best floor, verdict.

    Sizes, the images that could not be read, the AUC and what features know of centre and slide (`confounding`) stand
    beside them where any row has them. Floors, which have no gain, are left out.
    """
    mine = table[~table["published"] & ~table["floor"]]
    found = pd.DataFrame(
        {
            "model": mine["model"],
            "on": [_column(one) for one in mine.itertuples()],
            "score": _reach(mine, "score", "low", "high"),
            "gain": _reach(mine, "gain", "gain_low", "gain_high"),
            "over": mine["best_floor"].astype(object).fillna(""),
            "verdict": mine["verdict"].astype(object).fillna(""),
        }
    )
    found["auc"] = _reach(mine, "auc", "auc_low", "auc_high")
    for name in ("n_tiles", "n_patients", "n_quarantined"):
        found[name] = mine[name].astype("Int64")
    found[list(confounding.COLUMNS)] = mine[list(confounding.COLUMNS)].astype(float)
    empty = [name for name in found if found[name].isna().all() or (found[name] == "").all()]
    return found.drop(columns=empty).reset_index(drop=True)


def _reach(table: pd.DataFrame, value: str, low: str, high: str) -> list[str]:
    """'0.812 (0.790 to 0.834)' of each row, without the brackets where no interval is known, "" without a value."""
    said = []
    for a, b, c in table[[value, low, high]].astype(float).itertuples(index=False):
        said.append("" if np.isnan(a) else f"{a:.3f}" + ("" if np.isnan(b) else f" ({b:.3f} to {c:.3f})"))
    return said


def _told(rows: pd.DataFrame) -> pd.Series:
    """Of one model: what it was pretrained on, and the tasks whose patients it may have seen."""
    named = [
        f"{one.task} ({'?' if one.seen == 'unknown' else one.seen})" for one in rows.itertuples() if one.seen != "no"
    ]
    return pd.Series(
        {"pretrained_on": rows["pretrained_on"].iloc[0], "seen": ", ".join(dict.fromkeys(named)) or "none"}
    )


def _column(row) -> str:
    return row.task if row.part in ("not stated", "all", "") else f"{row.task} {row.part}"


def _of_sweep(csv: Path) -> pd.DataFrame:
    """The rows of results/<sweep>_<answers|real>.csv, floors among them; none where it is no such file or not current.

    The oracle, which is told the truth under each tile, is no model and has no row.
    """
    name, _, which = csv.stem.rpartition("_")
    if which not in SWEEPS or not len(runs.read_results(name)[0]):
        return pd.DataFrame()
    said = study.recorded_answers(name, which)
    floors = {
        title: [replace(one, floor=True, name=title) for one in said[floor]]
        for floor, title in FLOORS.items()
        if floor in said
    }
    task = f"{name} {SWEEPS[which]}"
    found = [row_of(said["teacher"], f"{name} teacher", "synthetic", task, sum(floors.values(), []))]
    found += [row_of(mine, floor, "none", task) for floor, mine in floors.items()]
    return pd.DataFrame(found).assign(source=f"results/{csv.name}", n_quarantined=np.nan)  # answers do not say it


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """All of COLUMNS, empty where they are not known, and who has seen what."""
    table = table.reindex(columns=COLUMNS)
    for name in ("floor", "published"):
        table[name] = table[name].eq(True)
    table["seen"] = [seen(one.pretrained_on, one.task) for one in table.itertuples()]
    return table


def write(folder: str | Path, protocol: str | None = None) -> list[Path]:
    """The board in a folder: rows.csv with every score and its source; of each protocol a CSV, LaTeX and figure."""
    folder, table = Path(folder), rows(protocol)
    written = [_csv(table, folder / "rows.csv")]
    for name, scored in table.groupby("protocol", sort=False):
        board, stem = wide(scored), name.replace(", ", "-")
        written.append(_csv(board.round(4), folder / f"{stem}.csv"))
        caption = f"Protocol {name}. Published scores are marked; seen: tasks whose patients a model may have seen."
        with atomic(folder / f"{stem}.tex", "w") as file:
            file.write(tables.latex(board, caption, f"tab:{stem}", decimals=3))
        drawn = figure(scored)
        written += [folder / f"{stem}.tex", figures.save(drawn, stem, folder)]
        plt.close(drawn)
    return written


def _csv(table: pd.DataFrame, path: Path) -> Path:
    with atomic(path, "w") as file:
        table.to_csv(file, index=False)
    return path


def figure(table: pd.DataFrame, tasks_shown: Sequence[str] = ()) -> Figure:
    """A panel a task and part, a line a model, best mean rank above: published scores open, ours filled with interval.

    table  rows of one protocol;  tasks_shown  columns of `wide`, all of them where empty
    """
    order = wide(table)
    shown = list(tasks_shown) or [name for name in order.columns if name not in ABOUT]
    unknown = set(shown) - set(order.columns)
    if unknown:
        raise InputError(f"no scores of '{min(unknown)}'.{nearest(min(unknown), order.columns.difference(ABOUT))}")
    place = {key: -i for i, key in enumerate(zip(order["model"], order["published"], strict=True))}
    width, height = 1.6 + 1.25 * len(shown), 0.9 + 0.19 * len(order)
    fig, axes = plt.subplots(1, len(shown), figsize=(width, height), sharey=True, squeeze=False)
    for ax, column in zip(axes[0], shown, strict=True):
        for one in table.itertuples():
            if _column(one) == column:
                _dot(ax, one, place[one.model, "published" if one.published else ""])
        ax.set_title("\n".join(column.rsplit(" ", 1)), fontsize=8)
        ax.set_xlabel(table.loc[[_column(o) == column for o in table.itertuples()], "metric"].iloc[0], fontsize=7)
        ax.grid(axis="y", lw=0.4, color="0.9")
        ax.margins(x=0.12)
        ax.tick_params(axis="y", length=0)
    names = [f"{model} (ours)" if not known else model for model, known in place]
    axes[0, 0].set_yticks(list(place.values()), names)
    axes[0, 0].set_ylim(0.6 - len(order), 0.6)
    fig.suptitle(f"Protocol {table['protocol'].iloc[0]}: published scores open, recorded here filled", fontsize=9)
    return fig


def _dot(ax: Axes, one, y: float) -> None:
    colour = "0.35" if one.published else panels.method_colour("pretrained" if not one.floor else one.model)
    reach = [one.low, one.high] if not one.published else [one.score - one.spread, one.score + one.spread]
    if np.isfinite(reach).all():
        ax.plot(reach, [y, y], color=colour, lw=1.6, solid_capstyle="butt")
    ax.plot(one.score, y, "o", ms=4.5, mec=colour, mew=1.2, mfc="white" if one.published else colour)


def ranked(table: pd.DataFrame, tasks_shown: Sequence[str] = ()) -> Ranks:
    """`comparisons.mean_ranks` of one protocol's models over tasks, all of them where empty.

    Models that lack a score of one of these tasks are left out: a rank among others is no rank.
    """
    board = wide(table)
    names = [f"{one.model} (ours)" if not one.published else one.model for one in board.itertuples()]
    scored = board.drop(columns=list(ABOUT)).set_axis(names)
    return mean_ranks((scored[list(tasks_shown)] if tasks_shown else scored).dropna())
