"""Images with an instance and a type for every pixel: CoNSeP, MoNuSAC, and any folder of images and masks."""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from skimage.draw import polygon

from pathfm.benchmarks import FRACTIONS, SUFFIXES, draw_roles, patients
from pathfm.cohort import check_roles
from pathfm.errors import InputError
from pathfm.storage import progress
from pathfm.tasks import checks
from pathfm.tasks.folders import of_tcga, with_roles
from pathfm.tasks.listed import csv_table
from pathfm.tasks.task import SPLITS, Task

QUARANTINE = ["file", "reason"]
CONSEP_MERGED = np.array([0, 1, 2, 3, 3, 4, 4, 4])  # its seven types as the paper and eva use them
UNREADABLE = (  # what Pillow, scipy and the XML parser raise for files that are cut off or something else
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    SyntaxError,
    EOFError,
    NotImplementedError,
    zlib.error,
    MatReadError,
    Image.DecompressionBombError,
)


class Masks(NamedTuple):
    """What stands at each pixel of an image, each (h, w)."""

    instances: np.ndarray  # int32, 0 the background, 1.. a nucleus each
    types: np.ndarray  # uint8, the place of its class in `classes`; 0 the background


@dataclass(frozen=True, repr=False)
class NucleiSet:
    """Images with masks.

    table        index 0..n-1; file, path, mask (path), digest of both, width_px, height_px, types (those in the
                 mask), mpp; where known patient_id, slide_id, centre, role
    classes      the first is the background; `Masks.types` counts in this order
    ignored      a class whose pixels no score counts, or None
    read_mask    (path, (h, w) of the image) -> Masks
    quarantined  file and reason of each pair that could not be read
    """

    name: str
    table: pd.DataFrame
    classes: tuple[str, ...]
    read_mask: Callable[[str, tuple[int, int]], Masks]
    ignored: str | None = None
    quarantined: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=QUARANTINE))

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"NucleiSet({self.name}: {len(self)} images, {len(self.classes)} classes, {len(self.quarantined)} bad)"

    def image(self, row: int) -> np.ndarray:
        """(h, w, 3) uint8. Raises InputError where the file changed since it was checked."""
        return _again(_image, self.table["path"].iloc[row])

    def masks(self, row: int) -> Masks:
        """Instances and types of an image, each (h, w). Raises InputError where the file changed."""
        one = self.table.iloc[row]
        return _again(self.read_mask, one["mask"], (int(one["height_px"]), int(one["width_px"])))

    def subset(self, rows) -> NucleiSet:
        """The images of a boolean mask or of integer positions."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else rows
        return replace(self, table=self.table.iloc[rows].reset_index(drop=True))

    def split(self, by: str = "patient", seed: int = 0, fractions: Mapping[str, float] = FRACTIONS) -> NucleiSet:
        """The same images with a column `role`, drawn by whole patients, or by "tile" where none is known."""
        table = self.table.assign(role=draw_roles(self.table.assign(label="image"), by, seed, fractions))
        if patients(table) is not None:
            check_roles(table.assign(patient=patients(table)), unit="patient")
        return replace(self, table=table)

    def summary(self) -> pd.DataFrame:
        """A row a class: nuclei, and the share of the pixels; every mask is read."""
        nuclei, pixels = np.zeros(len(self.classes), int), np.zeros(len(self.classes), int)
        for row in range(len(self)):
            instances, types = self.masks(row)
            pixels += np.bincount(types.ravel(), minlength=len(self.classes))
            _, first = np.unique(instances, return_index=True)
            kinds = types.ravel()[first[instances.ravel()[first] > 0]]
            nuclei += np.bincount(kinds, minlength=len(self.classes))
        return pd.DataFrame({"nuclei": nuclei, "pixels": pixels / max(pixels.sum(), 1)}, index=list(self.classes))


def read(task: Task, folder: str | Path, split: str = "official", allow_partial: bool = False) -> NucleiSet:
    """CoNSeP or MoNuSAC as they unpack, with roles; every image and mask is decoded once."""
    listed, read_mask = {"consep": (_consep, consep_masks), "monusac": (_monusac, monusac_masks)}[task.name]
    folder = Path(folder).expanduser()
    table, parts = listed(task, folder)
    note = checks.partial(task, table.assign(label=""), parts, allow_partial)
    good, bad = check(table, read_mask)
    if good.empty:
        raise InputError(f"{task.name}: no image in {folder} can be read ({bad['file'][0]}: {bad['reason'][0]})")
    good = with_roles(task, good.assign(label="image"), split).drop(columns="label")
    clean = " (clean split)" if split == SPLITS[1] and task.clean else ""
    name = ", ".join(filter(None, [task.name + clean, note]))
    ignored = "Ambiguous" if task.name == "monusac" else None
    found = NucleiSet(name, good.assign(mpp=task.mpp), task.classes, read_mask, ignored, bad)
    _present(found)
    return found


def from_folder(folder: str | Path, mpp: float | None = None, name: str | None = None) -> NucleiSet:
    """Any images/ and labels/ with files of the same name: labels are instances, 0 the background, one class.

    A manifest.csv beside them, with a column file, adds its columns (patient_id, slide_id, role, ...); then its
    images are the set, and one that is missing is quarantined.
    """
    folder = Path(folder).expanduser()
    for part in ("images", "labels"):
        if not (folder / part).is_dir():
            raise InputError(f"expected {part}/ in {folder}: images/<name> and labels/<name>, of instances")
    files = sorted(p.name for p in (folder / "images").iterdir() if p.suffix.lower() in SUFFIXES)
    table = pd.DataFrame({"file": files})
    if (folder / "manifest.csv").is_file():
        table = csv_table(folder / "manifest.csv", {"file": "file"})
    if table.empty:
        raise InputError(f"{folder / 'images'} has no images")
    stems = {p.stem: str(p) for p in sorted((folder / "labels").iterdir()) if p.suffix.lower() in SUFFIXES}
    table["path"] = [str(folder / "images" / file) for file in table["file"]]
    table["mask"] = [stems.get(Path(file).stem, str(folder / "labels" / file)) for file in table["file"]]
    good, bad = check(table, instance_masks)
    if good.empty:
        raise InputError(f"no image in {folder} can be read with its mask ({bad['file'][0]}: {bad['reason'][0]})")
    if "role" in good and patients(good) is not None:
        check_roles(good.assign(patient=patients(good)), unit="patient")
    good["mpp"] = np.nan if mpp is None else float(mpp)
    found = NucleiSet(name or folder.name, good, ("background", "nucleus"), instance_masks, None, bad)
    _present(found)
    return found


def check(table: pd.DataFrame, read_mask: Callable) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The pairs that decode and agree in size, with digest, size and the mask's types; file and reason of others."""
    found = [_pair(one.path, one.mask, read_mask) for one in progress(list(table.itertuples()), "checking masks")]
    names = ("digest", "width_px", "height_px", "types", "reason")
    columns = dict(zip(names, zip(*found, strict=True), strict=True))
    checked = table.reset_index(drop=True).assign(**columns)
    good = checked["reason"] == ""
    return (
        checked[good].drop(columns="reason").reset_index(drop=True),
        checked.loc[~good, QUARANTINE].reset_index(drop=True),
    )


def _present(images: NucleiSet) -> None:
    """Raises InputError where a role has no pixel of a class that is scored."""
    if "role" not in images.table:
        return
    for role, types in images.table.groupby("role")["types"]:
        lacking = set(range(1, len(images.classes))) - {kind for each in types for kind in each}
        lacking = sorted({images.classes[kind] for kind in lacking} - {images.ignored})
        if lacking:
            raise InputError(f"{images.name}: role {role} has no {lacking[0]} in any of its {len(types)} images")


def consep_masks(path: str, size: tuple[int, int]) -> Masks:
    """inst_map and type_map of a .mat of CoNSeP, its types 3 and 4 merged, and 5, 6 and 7."""
    maps = loadmat(path, variable_names=["inst_map", "type_map"])
    raw = np.asarray(maps["type_map"]).round().astype(int)
    if raw.min() < 0 or raw.max() >= len(CONSEP_MERGED):
        raise ValueError(f"type {raw.max()} is none of CoNSeP's seven")
    return Masks(np.asarray(maps["inst_map"]).round().astype(np.int32), CONSEP_MERGED[raw].astype(np.uint8))


def monusac_masks(path: str, size: tuple[int, int]) -> Masks:
    """The polygons of a MoNuSAC XML, filled in the order they stand there; a later one covers an earlier one.

    A class that is none of the four is Ambiguous, as in eva.
    """
    height, width = size
    instances, types = np.zeros((2, height, width), np.int32)
    names = {"epithelial": 1, "lymphocyte": 2, "neutrophil": 3, "macrophage": 4}
    number = 0
    for annotation in ET.parse(path).getroot().iter("Annotation"):
        attribute = next(annotation.iter("Attribute"), None)
        if attribute is None:
            raise ValueError("an annotation without the name of its class")
        kind = names.get(attribute.get("Name", "").strip().lower(), 5)
        for region in annotation.iter("Region"):
            corners = np.array([(float(v.get("X")), float(v.get("Y"))) for v in region.iter("Vertex")])
            if len(corners) < 3:
                continue  # a stray click covers no pixel
            x, y = polygon(corners[:, 0], corners[:, 1], (width, height))
            number += 1
            instances[y, x], types[y, x] = number, kind
    return Masks(instances, types.astype(np.uint8))


def instance_masks(path: str, size: tuple[int, int]) -> Masks:
    """An image whose pixels are instances, 8 or 16 bits, 0 the background."""
    with Image.open(path) as image:
        instances = np.array(image).astype(np.int32)
    if instances.ndim != 2:
        raise ValueError(f"a mask has one channel, not the shape {instances.shape}")
    return Masks(instances, (instances > 0).astype(np.uint8))


def _consep(task: Task, folder: Path) -> tuple[pd.DataFrame, Path]:
    folder = checks.root(
        task, folder, [f"{part}/{kind}" for part in ("Train", "Test") for kind in ("Images", "Labels")]
    )
    rows = []
    for part, split in (("Train", "train"), ("Test", "val")):
        images = sorted((folder / part / "Images").glob("*.png"))
        wrong = [str(p.relative_to(folder)) for p in images if not p.stem.startswith(f"{part.lower()}_")]
        checks.named(task, images, wrong, folder)
        rows += [
            (f"{part}/Images/{p.name}", str(p), str(folder / part / "Labels" / f"{p.stem}.mat"), split) for p in images
        ]
    return pd.DataFrame(rows, columns=["file", "path", "mask", "split"]), folder


def _monusac(task: Task, folder: Path) -> tuple[pd.DataFrame, Path]:
    parts = {"MoNuSAC_images_and_annotations": "train", "MoNuSAC Testing Data and Annotations": "val"}
    folder, rows = checks.root(task, folder, parts), []
    for part, split in parts.items():
        images = sorted((folder / part).glob("*/*.tif"))
        wrong = [str(p.relative_to(folder)) for p in images if not p.name.startswith(f"{p.parent.name}_")]
        checks.named(task, images, wrong, folder)
        rows += [
            (
                p.relative_to(folder).as_posix(),
                str(p),
                str(p.with_suffix(".xml")),
                split,
                p.parent.name,
                p.parent.name[:12],
            )
            for p in images
        ]
    return of_tcga(pd.DataFrame(rows, columns=["file", "path", "mask", "split", "slide_id", "patient_id"])), folder


def _image(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def _pair(path: str, mask: str, read_mask: Callable) -> tuple[str, int, int, tuple[int, ...], str]:
    """Digest, width, height and types of a pair, and what is wrong with it ('' for nothing)."""
    try:
        pixels = _image(path)
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=12)
    except FileNotFoundError:
        return "", 0, 0, (), "missing"
    except UNREADABLE as error:
        return "", 0, 0, (), f"does not decode: {error}"
    height, width = pixels.shape[:2]
    try:
        found = read_mask(mask, (height, width))
    except FileNotFoundError:
        return "", 0, 0, (), "its mask is missing"
    except UNREADABLE as error:
        return "", 0, 0, (), f"its mask does not decode: {error}"
    if found.types.shape != (height, width) or found.instances.shape != (height, width):
        return "", 0, 0, (), f"its mask is {found.types.shape[1]} x {found.types.shape[0]} px, it {width} x {height}"
    digest.update(found.types.tobytes() + found.instances.tobytes())
    return digest.hexdigest(), width, height, tuple(np.unique(found.types).tolist()), ""


def _again(read: Callable, path: str, *rest):
    try:
        return read(path, *rest)
    except UNREADABLE as error:
        raise InputError(f"{path} could be read before and now cannot ({error}); read the task again") from None
