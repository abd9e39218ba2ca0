"""The rows of the leaderboard: our recorded scores and published ones, with what each needs beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock

from pathfm import confounding, runs, scores, study, tasks
from pathfm.errors import InputError, nearest
from pathfm.scores import Prediction
from pathfm.storage import atomic
from pathfm.tasks.task import SOURCES_OF_TISSUE
from pathfm.transfer import WITHIN

RESULTS = "probes"  # results/probes.csv, a row a model, task, part and protocol
KEY = ["model", "task", "part", "protocol"]
COLUMNS = [
    "model", "pretrained_on", "task", "part", "metric", "score", "low", "high", "spread", "runs", "protocol",
    "published", "floor", "mpp", "n_tiles", "n_patients", "n_quarantined", "best_floor", "gain", "gain_low",
    "gain_high", "verdict", "auc", "auc_low", "auc_high", *confounding.COLUMNS, "seen", "source", "note",
]  # fmt: skip
STAMP = ["commit", "date", "device", "generator"]
NO_TISSUE = {"none", "ImageNet", "natural images", "synthetic"}  # pretrained on these: no patient was seen
SWEEPS = {"answers": "tiles (synthetic)", "real": "real tiles"}  # what the files of sweeps.ANSWERS were tested on
FLOORS = {"random weights": "random weights", "colour": "colour mean and spread", "colour + LBP": "colour + LBP"}
CRC = "a colour histogram alone scores over 0.82 on real NCT-CRC-HE"
CAVEATS = {"crc": CRC, "crc_nonorm": CRC}  # what stands in the note of every row of a task, and under tables of it
PART = {"validate": "val", "test": "test"}  # of the role that a probe says it is reported on
# What the readers of tasks add to a name: the split, a draw, what is missing, a leak.
ADDED = re.compile(
    r"(?: \(clean split\)|, \d+ folds by site|, run \d+|, partial: [\d,]+(?: of [\d,]+)?|, patients on two sides)+$"
)


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


def noted(task: str, *said: str) -> str:
    """What is said of a row, with the task's caveat, which stands there once."""
    caveat = CAVEATS.get(plain(task), "")
    return "; ".join(filter(None, [*said, "" if any(caveat in one for one in said) else caveat]))


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
        "metric": first.settings.get("metric", "balanced accuracy"),
        "score": one["balanced_accuracy"],
        **one[
            ["low", "high", "mpp", "n_tiles", "n_patients", "n_quarantined", "gain", "gain_low", "gain_high", "verdict"]
        ],
        "runs": len(each),
        "spread": np.std(each, ddof=1) if len(each) > 1 else np.nan,
        "protocol": one["probe"],
        "floor": bool(one["floor"]),
        "best_floor": best.iloc[0] if len(best) and not one["floor"] else "",
        "note": noted(task, one["interval"], "transductive" if one["transductive"] else ""),
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


def _of_sweep(csv: Path) -> pd.DataFrame:
    """The rows of results/<sweep>_<answers|real>.csv, floors among them; none where it is no such file or not current.

    The oracle, which is told the truth under each tile, is no model and has no row; nor have probes that saw a part of
    the tiles alone.
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
    trained = [one for one in said if one not in (*FLOORS, "oracle") and not one.endswith(WITHIN)]
    found = [row_of(said[one], f"{name} {one}", "synthetic", task, sum(floors.values(), [])) for one in trained]
    found += [row_of(mine, floor, "none", task) for floor, mine in floors.items()]
    unknown = "answers alone are recorded: effective mpp, centre and slide are not known"
    notes = [noted(task, one["note"], unknown) for one in found]
    return pd.DataFrame(found).assign(source=f"results/{csv.name}", n_quarantined=np.nan, note=notes)


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """All of COLUMNS, empty where they are not known, and who has seen what."""
    table = table.reindex(columns=COLUMNS)
    table["mpp"] = table["mpp"].astype(float)
    for name in ("floor", "published"):
        table[name] = table[name].eq(True)
    table["seen"] = [seen(one.pretrained_on, one.task) for one in table.itertuples()]
    table["note"] = [noted(one.task, one.note) for one in table.fillna({"note": ""}).itertuples()]
    return table
