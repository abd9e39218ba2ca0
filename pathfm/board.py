"""The leaderboard as it is shown: a table a protocol, never two protocols in one; terminal, CSV, LaTeX and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pathfm import confounding, figures, leaderboard, panels, tables
from pathfm.comparisons import Ranks, mean_ranks
from pathfm.errors import InputError, nearest
from pathfm.storage import atomic

ABOUT = ("model", "published", "pretrained_on", "seen")  # columns of `wide` that are no score
INDEX = ["model", "published"]


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """A row a model and a column a task and part, of scores by one protocol; best mean rank of shared tasks first.

    Columns published ("published", or "" for ours), pretrained_on and seen (tasks whose tissue the model may have
    seen, with the source, "?" where unknown) stand beside them. Raises InputError where protocols are mixed, or two
    metrics of one task.
    """
    several = sorted(table["protocol"].unique())
    if len(several) != 1:
        raise InputError(f"scores by {len(several)} protocols do not compare: {', '.join(several)}; take one at a time")
    mixed = _named(table).groupby("column")["metric"].nunique(dropna=False)
    if (mixed > 1).any():
        raise InputError(f"{mixed.index[mixed > 1][0]} is scored by two metrics; keep one of them")
    scored = _pivoted(table, "score")
    found = table.groupby(INDEX).apply(_told, include_groups=False).join(scored)
    ranks = scored.rank(ascending=False).mean(axis=1)
    found = found.loc[ranks.sort_values(kind="stable").index].reset_index()
    return found.assign(published=np.where(found["published"], "published", ""))


def _named(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(column=[_column(one) for one in table.itertuples()])


def _pivoted(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """One value of a row, by model and whether it is published, a column a task and part in their order."""
    named = _named(table)
    found = named.pivot_table(index=INDEX, columns="column", values=value, aggfunc="last")
    return found.reindex(columns=list(dict.fromkeys(named["column"])))


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """`wide` with columns "<task> low", "<task> high" (95 %) and "<task> spread" behind each score, where known."""
    board = wide(table)
    keys = pd.MultiIndex.from_arrays([board["model"], board["published"] == "published"])
    beside = {name: _pivoted(table, name).reindex(keys) for name in ("low", "high", "spread")}
    found = board[list(ABOUT)]
    for column in board.columns.drop(list(ABOUT)):
        told = {f"{column} {name}": one[column].to_numpy(float) for name, one in beside.items()}
        found = found.assign(**{column: board[column]}, **{name: x for name, x in told.items() if np.isfinite(x).any()})
    return found


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """`wide` as text: our scores with their interval, published ones with their standard deviation over runs."""
    board = numbers(table)
    for column in wide(table).columns.drop(list(ABOUT)):
        low, high, spread = (
            board.get(f"{column} {name}", np.nan * board[column]) for name in ("low", "high", "spread")
        )
        cells = []
        for score, a, b, sd in zip(board[column], low, high, spread, strict=True):
            reach = f" [{a:.3f}, {b:.3f}]" if np.isfinite(a) else f" ± {sd:.3f}" if np.isfinite(sd) else ""
            cells.append("--" if np.isnan(score) else f"{score:.3f}{reach}")
        board[column] = cells
    return board[wide(table).columns]


def ours(table: pd.DataFrame) -> pd.DataFrame:
    """What `wide` has no room for, a row a recorded score of `rows`: intervals, the gain over the best floor, verdict.

    The effective mpp, sizes, the images that could not be read, the AUC and what features know of centre and slide
    (`confounding`) stand beside them where any row has them. Floors, which have no gain, are left out.
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
    found["mpp"] = mine["mpp"].astype(float)
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


def caveats(table: pd.DataFrame) -> list[str]:
    """What is to be known of the tasks in a table: "crc: a colour histogram alone ..."."""
    known = {
        task: leaderboard.CAVEATS[task] for task in map(leaderboard.plain, table["task"]) if task in leaderboard.CAVEATS
    }
    return [f"{task}: {caveat}" for task, caveat in known.items()]


def write(folder: str | Path, protocol: str | None = None) -> list[Path]:
    """The board in a folder: rows.csv with every score and its source; of each protocol a CSV, LaTeX and figure.

    Where two models or more have scores of two tasks or more, <protocol>-ranks too: their mean ranks.
    """
    folder, table = Path(folder), leaderboard.rows(protocol)
    written = [_csv(table, folder / "rows.csv")]
    for name, scored in table.groupby("protocol", sort=False):
        stem = name.replace(", ", "-")
        caption = (
            f"Protocol {name}. Published scores are marked, with the standard deviation over runs where it is printed; "
            "ours have 95 % intervals. Seen: tasks whose patients a model may have seen."
        ) + "".join(f" {said}." for said in caveats(scored))
        written.append(_csv(numbers(scored).round(4), folder / f"{stem}.csv"))
        written.append(_latex(printed(scored), caption, folder / f"{stem}.tex"))
        written.append(_figure(figure(scored), stem, folder))
        ranks = _ranks(scored)
        if ranks is not None:
            board, stem = ranks.table.rename_axis("model").reset_index(), f"{stem}-ranks"
            caption = (
                f"Mean ranks by protocol {name} over {ranks.n_tasks} tasks with 95 % intervals over tasks, 1 the best; "
                f"critical difference {ranks.critical_difference:.2f}, Friedman's p {ranks.p:.2g}."
            )
            fig, ax = plt.subplots(figsize=(5, 1 + 0.19 * len(board)))
            panels.mean_ranks(ax, ranks)
            ax.set_title(f"Protocol {name}", fontsize=9)
            written.append(_csv(board.round(4), folder / f"{stem}.csv"))
            written += [_latex(board, caption, folder / f"{stem}.tex", 2), _figure(fig, stem, folder)]
    return written


def _ranks(scored: pd.DataFrame) -> Ranks | None:
    """`ranked`, or None where no two models have scores of the same two tasks."""
    board = wide(scored).drop(columns=list(ABOUT)).dropna()
    return ranked(scored) if min(board.shape) > 1 else None


def _latex(board: pd.DataFrame, caption: str, path: Path, decimals: int = 3) -> Path:
    with atomic(path, "w") as file:
        file.write(tables.latex(board, caption, f"tab:{path.stem}", decimals))
    return path


def _figure(drawn: Figure, stem: str, folder: Path) -> Path:
    path = figures.save(drawn, stem, folder)
    plt.close(drawn)
    return path


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
