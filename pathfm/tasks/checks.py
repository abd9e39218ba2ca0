"""Is this the data set it should be, whole and in its layout? What is missing is named and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from pathfm.benchmarks import decode_all
from pathfm.errors import InputError
from pathfm.storage import atomic, cache_dir
from pathfm.tasks.task import Task

SHOWN = 6  # missing classes that a message lists
FOUND = {"digest": str, "reason": str}


def root(task: Task, folder: str | Path, parts: Iterable[str], optional: Iterable[str] = ()) -> Path:
    """`folder`, once everything in `parts` is below it. Raises InputError that says what was expected where."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{task.name}: {folder} is not a folder; give the one that holds {task.files[0]}")
    parts = list(parts)
    missing = [part for part in parts if not (folder / part).exists()]
    if not missing:
        return folder
    near = [folder.parent, folder.parent.parent, *sorted(p for p in folder.iterdir() if p.is_dir())]
    hint = next((f"; it is in {one}: give that folder" for one in near if all((one / p).exists() for p in parts)), "")
    packed = next((p.name for p in folder.glob("*") if p.name.startswith(Path(missing[0]).name + ".")), None)
    hint = f"; unpack {packed} first" if packed and not hint else hint
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:SHOWN]) or "nothing"
    raise InputError(
        f"{task.name}: expected {missing[0]} in {folder}, which holds {there}{hint or f'; get it from {task.url}'}"
    )


def partial(task: Task, table: pd.DataFrame, folder: Path, allow_partial: bool = False) -> str:
    """ "" for a whole data set, else how much is there, for the name. `table` has columns split and label.

    Images that do not decode are in `table` too: they are there. Raises InputError for a partial data set unless
    `allow_partial`, and for one that holds more than the official one.
    """
    found = {key: _found(table, *key) for key in task.counts}
    more = next((key for key in found if found[key] > task.counts[key]), None)
    if more is not None:
        raise InputError(
            f"{task.name}: {folder} holds {found[more]:,} of {_words(*more)}, the official set has "
            f"{task.counts[more]:,}; two versions may be mixed: unpack it into an empty folder"
        )
    short = [key for key in found if found[key] < task.counts[key]]
    if not short:
        return ""
    whole = task.count(None)
    finest = [key for key in short if key[1] is not None] or short
    listed = "; ".join(f"{_words(*key)}: {found[key]:,} of {task.counts[key]:,}" for key in finest[:SHOWN])
    listed += f"; and {len(finest) - SHOWN} more" if len(finest) > SHOWN else ""
    if not allow_partial:
        lacking = "" if whole is None else f" {whole - len(table):,} of {whole:,} are missing."
        raise InputError(
            f"{task.name}: {folder} is a partial download.{lacking} {listed}. Get the rest from {task.url}, or pass "
            "allow_partial=True, which names the set partial wherever it is shown"
        )
    return f"partial: {len(table):,}" + ("" if whole is None else f" of {whole:,}")


def classes(name: str, table: pd.DataFrame, expected: Iterable[str] = ()) -> None:
    """Every class is in every role, with two samples or more. Raises InputError that names the first that is not."""
    if "role" not in table:
        return
    expected = list(expected) or sorted(table["label"].unique())
    count = pd.crosstab(table["label"], table["role"]).reindex(expected, fill_value=0)
    for role in count:
        for label in expected:
            if count.loc[label, role] < 2:
                n = "no sample" if count.loc[label, role] == 0 else "a single sample"
                raise InputError(
                    f"{name}: role {role} has {n} of class {label}; a score needs two or more of every class in every "
                    "role: complete the data, or split it again"
                )


def named(task: Task, paths: list[str], wrong: list[str], folder: Path) -> None:
    """Raises InputError where files do not have the names of this data set, or none do."""
    if wrong:
        raise InputError(
            f"{task.name}: {wrong[0]} in {folder} has no name of this data set, nor have {len(wrong) - 1} others; "
            f"expected {task.files[-1]}. Are these the images or labels of another set?"
        )
    if not paths:
        raise InputError(f"{task.name}: {folder} has no images; expected {task.files[-1]}")


def decoded(table: pd.DataFrame, check: Callable = decode_all) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`decode_all`, remembered: files of the same path, size and time are not decoded a second time.

    check   (table) -> (good rows with digest, width_px and height_px; quarantined), as decode_all
    """
    stats = {path: _stat(path) for path in table["path"].unique()}
    within = table["row"].astype(str) if "row" in table else [""] * len(table)
    lines = "\n".join(f"{p}|{stats[p]}|{row}" for p, row in zip(table["path"], within, strict=True))
    path = cache_dir() / "checks" / f"{hashlib.blake2b(lines.encode(), digest_size=12).hexdigest()}.csv"
    if not path.exists():
        good, bad = check(table)
        columns = ["file", "digest", "width_px", "height_px"]
        lost = bad[["file", "reason"]].assign(digest="", width_px=0, height_px=0)
        known = pd.concat([good[columns].assign(reason=""), lost])
        with atomic(path, "w") as file:
            known.to_csv(file, index=False)
    known = pd.read_csv(path, dtype={"file": str, **FOUND}, keep_default_na=False).set_index("file")
    known = known.loc[table["file"]].reset_index(drop=True)
    fine = (known["reason"] == "").to_numpy()
    sizes = known[["digest", "width_px", "height_px"]]
    good = pd.concat([table.reset_index(drop=True), sizes], axis=1)[fine].reset_index(drop=True)
    bad = table[["file", "label"]].reset_index(drop=True).assign(reason=known["reason"])[~fine]
    return good, bad.reset_index(drop=True)


def _stat(path: str) -> str:
    try:
        found = Path(path).stat()
    except OSError:
        return "missing"
    return f"{found.st_size}-{found.st_mtime_ns}"


def _found(table: pd.DataFrame, split: str | None, label: str | None) -> int:
    rows = pd.Series(True, index=table.index)
    if split is not None:
        rows &= table["split"] == split
    if label is not None:
        rows &= table["label"] == label
    return int(rows.sum())


def _words(split: str | None, label: str | None) -> str:
    return " ".join(part for part in (split, label) if part) or "all"
