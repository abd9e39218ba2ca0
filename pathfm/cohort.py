"""The table of slides: read, check, split by patient, subset."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from pathfm.errors import InputError, nearest
from pathfm.storage import atomic

ROLES = ("pretrain", "probe-train", "validate", "test")
REQUIRED = ("slide_id", "path")
TEXT = ("slide_id", "path", "patient_id", "centre", "scanner", "organ", "stain", "role", "project", "source_site")


class Cohort:
    """Slides and what is known of them. `table` has one row a slide and at least slide_id and path.

    Optional columns: patient_id, centre, scanner, organ, stain, mpp (microns per pixel where the file has
    none), role (one of ROLES), and any label. No patient has two roles.
    """

    def __init__(self, table: pd.DataFrame, name: str = "cohort"):
        self.table, self.name = _checked(table, name), name

    @classmethod
    def read(cls, csv: str | Path) -> Cohort:
        """The cohort in a CSV file; relative paths are relative to it.

        Raises InputError for an unreadable or empty table, a missing column and a repeated slide_id. Whether
        the slides exist is found when they are indexed.
        """
        csv = Path(csv)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
                table = pd.read_csv(csv, dtype=dict.fromkeys(TEXT, str), encoding="utf-8-sig", index_col=False)
        except FileNotFoundError:
            raise InputError(f"{csv} does not exist; give the path of the cohort's CSV") from None
        except pd.errors.EmptyDataError:
            raise InputError(f"{csv} is empty; it needs the columns {', '.join(REQUIRED)}") from None
        except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError, OSError) as error:
            raise InputError(f"{csv} is no CSV that can be read ({error}); save it as UTF-8 CSV") from None
        if "path" in table:
            folder = csv.resolve().parent
            table["path"] = [p if pd.isna(p) or "://" in p else str(folder / p) for p in table["path"]]
        return cls(_checked(table, str(csv)), csv.stem)

    @classmethod
    def from_gdc(cls, path: str | Path, folder: str | Path | None = None, sites: str | Path | None = None) -> Cohort:
        """The slides of a manifest or sample sheet of the Genomic Data Commons, described by their TCGA barcodes.

        folder   where GDC's client or `pathfm fetch` put them, as <folder>/<uuid>/<file>; None: beside the table
        sites    a table of source-site codes of one's own (`gdc.source_sites`); None: GDC's, which comes with pathfm

        Columns: slide_id (the barcode), path, patient_id, centre (the institution), project ("TCGA-BRCA"),
        source_site (the code), section ("FFPE", "frozen"), sample ("tumour", "normal", ...).
        Slides that are not in `folder` yet are counted and named in a warning, and stay. Raises InputError where
        none is there, a column is missing, a file is listed twice or is no slide, or a barcode or code is unknown.
        """
        from pathfm import gdc

        return cls(gdc.table(path, folder, sites), Path(path).stem)

    def write(self, csv: str | Path) -> Path:
        """The table as CSV, paths relative to it where they lie beside or below it."""
        csv = Path(csv)
        table = self.table.copy()
        table["path"] = [_relative(p, csv.resolve().parent) for p in table["path"]]
        with atomic(csv, "w") as file:
            table.to_csv(file, index=False)
        return csv

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator:
        return self.table.itertuples(index=False)

    def __repr__(self) -> str:
        patients = patient_of(self.table).nunique()
        return f"Cohort({self.name}: {len(self)} slides of {patients} patients)"

    def subset(self, which) -> Cohort:
        """Fewer slides: a query ("role == 'test'"), a boolean mask, or slide_ids."""
        return Cohort(select(self.table, which), self.name)

    def split(self, by: str = "patient", fractions: dict[str, float] | None = None, seed: int = 0) -> Cohort:
        """The same slides with a column `role`, drawn at random by "patient", "centre" or "slide".

        fractions   role -> share of the units; default 60 % pretrain, 20 % probe-train, 10 % validate, 10 % test

        The draw depends on seed and the units' names, not on the order of rows. Raises InputError where a
        patient would stand on two sides, or where there are fewer units than roles.

        With a column `project` (cancer types, see `from_gdc`), "centre" splits within each: every project has slides
        in every role, shares as near as its centres allow, and a centre has one role in all of them, for it brings
        its stain and scanner to each. Raises InputError that names a project for which that cannot be.
        """
        fractions = fractions or {"pretrain": 0.6, "probe-train": 0.2, "validate": 0.1, "test": 0.1}
        for role, share in fractions.items():
            if role not in ROLES:
                raise InputError(f"unknown role '{role}'.{nearest(role, ROLES)}")
            if not share > 0:
                raise InputError(f"fractions['{role}'] is {share}; give a positive share or leave the role out")
        table = self.table.copy()
        units = _units(table, by)
        if by == "centre" and "project" in table:
            table["role"] = _roles_within(table["project"], units, fractions, seed)
        else:
            table["role"] = units.map(_draw_roles(units.unique(), fractions, seed, by))
        return Cohort(table, self.name)


def patient_of(table: pd.DataFrame) -> pd.Series:
    """Each row's patient: patient_id, and slide_id where there is none."""
    if "patient_id" not in table:
        return table["slide_id"].astype(str)
    return table["patient_id"].fillna(table["slide_id"]).astype(str)


def check_roles(table: pd.DataFrame, unit: str = "patient_id") -> None:
    """Raises InputError that names a patient (or other unit) with two roles."""
    if "role" not in table:
        return
    table = table[table["role"].notna()]
    units = patient_of(table) if unit == "patient_id" else table[unit].astype(str)
    roles = table["role"].groupby(units).unique()
    for name, found in roles.items():
        if len(found) > 1:
            raise InputError(
                f"{unit.removesuffix('_id')} '{name}' is on two sides of the split ({', '.join(map(str, found))}); "
                "give all its rows one role, or split(by='patient')"
            )


def select(table: pd.DataFrame, which) -> pd.DataFrame:
    """Rows of a table of slides by query, boolean mask or slide_ids, in the table's order."""
    if isinstance(which, str):
        try:
            chosen = table.query(which)
        except Exception as error:
            raise InputError(f"the query {which!r} fails: {error}. Columns: {', '.join(table.columns)}") from None
    else:
        which = list(which)
        if all(isinstance(value, str) for value in which):
            known = set(table["slide_id"])
            for name in which:
                if name not in known:
                    raise InputError(f"no slide '{name}'.{nearest(name, list(known)[:200])}")
            which = table["slide_id"].isin(which)
        chosen = table[pd.Series(which).to_numpy(bool)]
    if chosen.empty:
        raise InputError(f"no slide is left by the subset {which if isinstance(which, str) else ''!r}")
    return chosen.reset_index(drop=True)


def _checked(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """The table with a fresh index and text ids, or an InputError naming what is wrong with it."""
    missing = [column for column in REQUIRED if column not in table]
    if missing:
        raise InputError(
            f"{source} has no column '{missing[0]}'; rename one or add it. "
            f"Found: {', '.join(map(str, table.columns)) or 'none'}"
        )
    if table.empty:
        raise InputError(f"{source} lists no slides")
    for column in REQUIRED:
        if table[column].isna().any():
            row = int(table[column].isna().to_numpy().argmax()) + 1
            raise InputError(f"{source} has no {column} in row {row}; fill it in")
    table = table.reset_index(drop=True)
    table["slide_id"], table["path"] = table["slide_id"].astype(str), table["path"].astype(str)
    twice = table["slide_id"][table["slide_id"].duplicated()]
    if len(twice):
        raise InputError(f"{source} has slide_id '{twice.iloc[0]}' more than once; every slide needs its own")
    if "role" in table:
        odd = set(table["role"].dropna()) - set(ROLES)
        if odd:
            name = sorted(map(str, odd))[0]
            raise InputError(f"{source} has the unknown role '{name}'.{nearest(name, ROLES)}")
        check_roles(table)
    return table


def _units(table: pd.DataFrame, by: str) -> pd.Series:
    if by == "patient":
        return patient_of(table)
    column = {"centre": "centre", "slide": "slide_id"}.get(by)
    if column is None:
        raise InputError(f"cannot split by '{by}'.{nearest(by, ('patient', 'centre', 'slide'))}")
    if column not in table:
        raise InputError(f"cannot split by centre: no column 'centre'; found: {', '.join(table.columns)}")
    if table[column].isna().any():
        row = int(table[column].isna().to_numpy().argmax())
        raise InputError(f"cannot split by {by}: slide '{table['slide_id'][row]}' has none")
    return table[column].astype(str)


def _draw_roles(units: Iterable[str], fractions: dict[str, float], seed: int, by: str) -> dict[str, str]:
    """unit -> role. Units are ordered by a keyed hash; every role gets at least one."""
    order = sorted(units, key=lambda name: hashlib.blake2b(f"{seed}\0{name}".encode()).digest())
    if len(order) < len(fractions):
        raise InputError(f"{len(order)} {by}s cannot fill {len(fractions)} roles; give fewer fractions or more slides")
    total, given = sum(fractions.values()), 0.0
    roles, start = {}, 0
    for left, (role, share) in zip(range(len(fractions) - 1, -1, -1), fractions.items(), strict=True):
        given += share
        stop = round(len(order) * given / total)
        stop = min(max(stop, start + 1), len(order) - left)
        roles.update(dict.fromkeys(order[start:stop], role))
        start = stop
    return roles


def _roles_within(project: pd.Series, centre: pd.Series, fractions: dict[str, float], seed: int) -> np.ndarray:
    """(n,) role of each slide: whole centres, so that each project has every role."""
    from pathfm.benchmarks import balanced_roles

    if project.isna().any():
        raise InputError(
            "cannot split by centre within projects: a slide has no project; fill in the column or drop it"
        )
    centres = centre.groupby(project).nunique()
    if centres.min() < len(fractions):
        raise InputError(
            f"project '{centres.idxmin()}' has {centres.min()} centre(s) for {len(fractions)} roles; "
            "give fewer fractions, leave the project out with subset, or split by patient"
        )
    total = sum(fractions.values())
    shares = {role: share / total for role, share in fractions.items()}
    found = balanced_roles(centre.to_numpy(str), project.to_numpy(str), seed, shares)
    if isinstance(found, tuple):
        raise InputError(
            f"no draw of whole centres gives every project every role: {found[0]} stays without {found[1]}; "
            "take another seed, give fewer fractions, or leave the project out with subset"
        )
    return found


def _relative(path: str, folder: Path) -> str:
    if "://" in path:
        return path
    relative = os.path.relpath(path, folder)
    return path if relative.startswith("..") else relative
