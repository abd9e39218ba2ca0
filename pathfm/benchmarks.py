"""Labelled tiles as a table: a folder per class or a manifest, checked, with patients kept on one side."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from pathfm.cohort import ROLES, check_roles
from pathfm.errors import InputError, nearest
from pathfm.storage import progress

FRACTIONS = {"probe-train": 0.6, "validate": 0.2, "test": 0.2}
ORDERS = 20  # of units that a split tries before it gives up
UNITS = {"tile": None, "patient": "patient_id", "centre": "centre"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validate", "validation", "test"}
TEXT = ("file", "label", "patient_id", "slide_id", "centre", "role")  # columns of a manifest without empty cells
QUARANTINE = ["file", "label", "reason"]


@dataclass(frozen=True, repr=False)
class TileSet:
    """Images with labels.

    table        index 0..n-1; file, path, label, digest of the content, width_px, height_px; where known
                 mpp, patient_id, slide_id, centre, role and any further column of the manifest
    quarantined  file, label and reason of each image that could not be read
    leaky        its roles were drawn with patients on both sides, to show what that does
    """

    name: str
    table: pd.DataFrame
    quarantined: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=QUARANTINE))
    leaky: bool = False

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        mpp: float | None = None,
        patient: str | None = None,
        name: str | None = None,
    ) -> TileSet:
        """The images below `folder`: by its manifest.csv where it has one, else one folder per class.

        folder   or a CSV with columns file and label, and optionally patient_id, slide_id, centre, role
                 and mpp; files are relative to the CSV
        mpp      microns per pixel where the manifest gives none; unknown stays unknown
        patient  the manifest's column that plays the patient, such as a block of neighbouring images

        Every image is decoded once; one that is missing or broken is quarantined. Raises InputError for
        what makes the whole set unusable: no such folder, an empty class, one class, a wrong manifest.
        """
        folder = Path(folder).expanduser()
        if not folder.exists():
            raise InputError(f"tile folder {folder} does not exist; give a folder of class folders or a CSV")
        manifest = folder / "manifest.csv" if folder.is_dir() else folder
        table = _read_manifest(manifest) if manifest.is_file() else _read_class_folders(folder)
        if patient is not None:
            if patient not in table:
                raise InputError(f"{manifest} has no column '{patient}'.{nearest(patient, table.columns)}")
            table["patient_id"] = table[patient]
        table["mpp"] = _mpp(table, mpp, manifest)
        table, quarantined = decode_all(table)
        tiles = cls(name or manifest.parent.name, table, quarantined)
        _check(tiles, folder)
        return tiles

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return (
            f"TileSet({self.name}: {len(self)} tiles, {len(self.classes)} classes, {len(self.quarantined)} quarantined)"
        )

    @property
    def classes(self) -> list[str]:
        """The labels in sorted order; `y` counts in it."""
        return sorted(self.table["label"].unique())

    @property
    def y(self) -> np.ndarray:
        """(n,) class of each image as an integer from 0."""
        return np.searchsorted(np.array(self.classes), self.table["label"].to_numpy(str))

    @property
    def patients(self) -> np.ndarray | None:
        """(n,) whose tissue it is: patient_id, else slide_id, else None."""
        return patients(self.table)

    @property
    def xy_um(self) -> np.ndarray | None:
        """(n, 2) upper-left corners on the slide in um, from x, y (level-0 px) and slide_mpp; None without them."""
        if not {"x", "y", "slide_mpp"} <= set(self.table):
            return None
        return self.table[["x", "y"]].to_numpy(float) * self.table[["slide_mpp"]].to_numpy(float)

    def image(self, row: int) -> np.ndarray:
        """(h, w, 3) uint8. Raises InputError where the file changed since it was checked."""
        path = self.table["path"].iloc[row]
        try:
            return decode(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"{path} could be read before and now cannot ({error}); make the TileSet again") from None

    def images(self, batch_size: int = 64) -> Iterator[list[np.ndarray]]:
        """Batches of images in the table's order; sizes may differ within one."""
        with ThreadPoolExecutor(threads()) as pool:
            for start in range(0, len(self), batch_size):
                yield list(pool.map(self.image, range(start, min(start + batch_size, len(self)))))

    def subset(self, rows) -> TileSet:
        """The rows of a boolean mask or of integer positions."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else rows
        return replace(self, table=self.table.iloc[rows].reset_index(drop=True))

    def split(
        self,
        by: str = "patient",
        seed: int = 0,
        fractions: Mapping[str, float] = FRACTIONS,
        allow_leak: bool = False,
    ) -> TileSet:
        """The same tiles with a column `role`, drawn by whole tiles, patients or centres, classes in balance.

        Splitting by tile puts a patient on both sides: an error unless `allow_leak`, which is there to show
        what a leak does.
        """
        table = self.table.assign(role=draw_roles(self.table, by, seed, fractions))
        if by == "tile" and allow_leak:
            return replace(self, table=table, leaky=True)
        _check_sides(table)
        return replace(self, table=table, leaky=False)

    def folds(self, by: str = "centre", n: int | None = None, seed: int = 0) -> Iterator[tuple[str, TileSet]]:
        """(name, tiles) with each centre or patient, or each of `n` groups of them, as test once.

        Of the rest, a quarter is validate by the same unit, or by patient where the rest is two units or one.
        """
        column = _column(self.table, by)
        units = (self.table.index if column is None else self.table[column]).to_numpy(str)
        names = np.unique(units)
        n = len(names) if n is None else n
        if not 2 <= n <= len(names):
            raise InputError(f"{n} folds by {by} cannot be made: {self.name} has {len(names)}; take 2 or more")
        groups = (
            names[:, None] if n == len(names) else np.array_split(np.random.default_rng(seed).permutation(names), n)
        )
        smaller = "tile" if patient_column(self.table) is None else "patient"
        for group in groups:
            test = np.isin(units, group)
            rest = self.table[~test]
            inner = by if len(names) - len(group) > 2 else smaller
            role = pd.Series("test", index=self.table.index)
            role[~test] = draw_roles(rest, inner, seed, {"probe-train": 0.75, "validate": 0.25})
            table = self.table.assign(role=role)
            _check_sides(table)
            yield "+".join(group), replace(self, table=table, leaky=False)

    def summary(self) -> pd.DataFrame:
        """Tiles, patients and quarantined images per class, and tiles per role where roles are drawn."""
        rows = self.table.groupby("label")
        counts = pd.DataFrame({"tiles": rows.size()})
        if self.patients is not None:
            counts["patients"] = pd.Series(self.patients).groupby(self.table["label"]).nunique()
        if "role" in self.table:
            counts = counts.join(pd.crosstab(self.table["label"], self.table["role"]))
        bad = self.quarantined.groupby("label").size()
        counts["quarantined"] = bad.reindex(counts.index, fill_value=0)
        return counts


def patient_column(table: pd.DataFrame) -> str | None:
    """The column that says which rows are one patient's: patient_id, else slide_id, else None."""
    return next((column for column in ("patient_id", "slide_id") if column in table), None)


def patients(table: pd.DataFrame) -> np.ndarray | None:
    """(n,) strings of the `patient_column`, or None."""
    column = patient_column(table)
    return None if column is None else table[column].to_numpy(str)


def draw_roles(
    table: pd.DataFrame, by: str = "patient", seed: int = 0, fractions: Mapping[str, float] = FRACTIONS
) -> np.ndarray:
    """(n,) role of each row: whole units, in a seeded order, go where most is missing of their classes.

    Raises InputError where no order leaves every class in every role.
    """
    column = _column(table, by)
    if not fractions or min(fractions.values()) <= 0 or not np.isclose(sum(fractions.values()), 1):
        raise InputError(f"fractions must be positive and sum to 1, not {dict(fractions)}")
    unit = np.arange(len(table)) if column is None else np.unique(table[column].to_numpy(str), return_inverse=True)[1]
    found = balanced_roles(unit, table["label"].to_numpy(str), seed, fractions)
    if isinstance(found, tuple):
        absent, lacking = found
        holding = len(np.unique(unit[table["label"].to_numpy(str) == absent]))
        raise InputError(
            f"role {lacking} gets no tile of class {absent}: {holding} "
            f"{by}(s) hold that class; take another seed, other fractions or a finer unit than {by}"
        )
    return found


def balanced_roles(
    unit: np.ndarray, label: np.ndarray, seed: int, fractions: Mapping[str, float]
) -> np.ndarray | tuple[str, str]:
    """(n,) role of each row, whole units together, each class in every role; or a class and the role without it.

    unit, label   (n,), whose rows stay together and whose share of each role is to be as `fractions` says
    """
    unit = np.unique(unit, return_inverse=True)[1]
    classes, y = np.unique(label, return_inverse=True)
    count = np.zeros((unit.max() + 1, len(classes)))  # rows of each class in each unit
    np.add.at(count, (unit, y), 1)
    names, target = list(fractions), np.array(list(fractions.values()))
    for attempt in range(ORDERS):
        role = _assign(count, target, np.random.default_rng([seed, attempt]))
        rows = np.stack([count[role == index].sum(axis=0) for index in range(len(names))])
        if rows.all():
            return np.array(names)[role[unit]]
    lacking, absent = np.argwhere(rows == 0)[0]
    return str(classes[absent]), names[lacking]


def _assign(count: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(U,) role of each unit, from its tiles of each class (U, C) and each role's share (R,)."""
    share = count / count.sum(axis=0)
    missing = np.repeat(target[:, None], count.shape[1], axis=1)
    role = np.empty(len(count), int)
    order = rng.permutation(len(count))
    size = np.round(np.log2(share.sum(axis=1)))  # the large ones first, and chance among those of a size
    for one in order[np.argsort(-size[order], kind="stable")]:
        role[one] = np.argmax((missing / target[:, None]) @ share[one])
        missing[role[one]] -= share[one]
    return role


def _column(table: pd.DataFrame, by: str) -> str | None:
    if by not in UNITS:
        raise InputError(f"cannot split by '{by}'.{nearest(by, UNITS)}")
    column = (patient_column(table) or UNITS[by]) if by == "patient" else UNITS[by]
    if column is not None and column not in table:
        raise InputError(f"splitting by {by} needs a column {column}; give one in manifest.csv or split by tile")
    return column


def _check_sides(table: pd.DataFrame) -> None:
    if patients(table) is not None:
        check_roles(table.assign(patient=patients(table)), unit="patient")


def _check(tiles: TileSet, folder: Path) -> None:
    table = tiles.table
    lost = sorted(set(tiles.quarantined["label"]) - set(table["label"]))
    if lost:
        first = tiles.quarantined[tiles.quarantined["label"] == lost[0]].iloc[0]
        raise InputError(
            f"{folder}: no image of class {lost[0]} can be read ({first.file}: {first.reason}); unpack it again"
        )
    if len(tiles.classes) < 2:
        raise InputError(f"{folder} has the single class {tiles.classes[0]}; a probe needs two or more")
    if "role" in table:
        unknown = sorted(set(table["role"].astype(str)) - set(ROLES))
        if unknown:
            raise InputError(f"{folder}: unknown role '{unknown[0]}'.{nearest(unknown[0], ROLES)}")
        _check_sides(table)


def _read_manifest(path: Path) -> pd.DataFrame:
    try:
        # A class may be called None or NA; only an empty cell is missing.
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=[""])
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table ({error})") from None
    for column in ("file", "label"):
        if column not in table:
            raise InputError(f"{path} has no column '{column}'; it needs file and label")
    if table.empty:
        raise InputError(f"{path} lists no images")
    for column in TEXT:
        if column in table and table[column].isna().any():
            raise InputError(f"{path}: line {table[column].isna().argmax() + 2} has no {column}")
    if table["file"].duplicated().any():
        raise InputError(f"{path} lists {table['file'][table['file'].duplicated()].iloc[0]} twice")
    table["path"] = [str(path.parent / file) for file in table["file"]]
    return table


def _read_class_folders(folder: Path) -> pd.DataFrame:
    if not folder.is_dir():
        raise InputError(f"{folder} is neither a folder nor a CSV")
    names = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    if not names:
        raise InputError(f"{folder} has no class folders and no manifest.csv; expected {folder.name}/<class>/<image>")
    if all(name.name.lower() in SPLIT_FOLDERS for name in names):
        raise InputError(
            f"{folder} holds {', '.join(n.name for n in names)}, which are splits and not classes; "
            "give one of them, or a manifest.csv with columns file, label and role"
        )
    rows = []
    for name in names:
        files = sorted(p for p in name.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not files:
            raise InputError(f"class folder {name} has no image; fill it or remove it")
        rows += [(str(p.relative_to(folder)), name.name, str(p)) for p in files]
    return pd.DataFrame(rows, columns=["file", "label", "path"])


def _mpp(table: pd.DataFrame, mpp: float | None, source: Path) -> pd.Series:
    given = pd.to_numeric(table["mpp"], errors="coerce") if "mpp" in table else pd.Series(np.nan, table.index)
    if "mpp" in table and (given.isna() & table["mpp"].notna()).any():
        raise InputError(f"{source}: mpp '{table['mpp'][given.isna()].iloc[0]}' is not a number")
    given = given if mpp is None else given.fillna(float(mpp))
    if (given <= 0).any():
        raise InputError(f"{source}: mpp must be above 0, not {given.min()}")
    return given.astype(float)


def decode(data: bytes) -> np.ndarray:
    """(h, w, 3) uint8 of an encoded image. Raises what Pillow raises."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def _probe(path: str) -> tuple[str, int, int, str]:
    try:
        return probe(Path(path).read_bytes())
    except FileNotFoundError:
        return "", 0, 0, "missing"
    except OSError as error:
        return "", 0, 0, f"does not decode: {error}"


def probe(data: bytes) -> tuple[str, int, int, str]:
    """Digest of the bytes, width and height, and what is wrong with the image ('' for nothing)."""
    try:
        height, width = decode(data).shape[:2]
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return "", 0, 0, "not an image" if data else "empty file"
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for truncated files
        return "", 0, 0, f"does not decode: {error}"
    return hashlib.blake2b(data, digest_size=12).hexdigest(), width, height, ""


def decode_all(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows whose image (column path) decodes, with digest, width_px and height_px; and the rest, with a reason."""
    with ThreadPoolExecutor(threads()) as pool:
        found = list(progress(pool.map(_probe, table["path"]), "checking images", len(table), "image"))
    checked = table.assign(
        **dict(zip(("digest", "width_px", "height_px", "reason"), zip(*found, strict=True), strict=True))
    )
    good = checked["reason"] == ""
    return (
        checked[good].drop(columns="reason").reset_index(drop=True),
        checked.loc[~good, QUARANTINE].reset_index(drop=True),
    )


def threads() -> int:
    """How many threads decode images."""
    return min(8, os.cpu_count() or 1)
