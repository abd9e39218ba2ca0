"""Does it look like tissue: sizes, counts and stain of each class beside published ranges and real tiles."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from skimage.color import rgb_from_hed

from pathfm.cohort import Cohort
from pathfm.errors import InputError
from pathfm.slide import Slide
from pathfm.synthetic.painters import CLASSES
from pathfm.synthetic.tiles import pure_positions
from pathfm.synthetic.truth import Truth

WHITE = 243.0  # grey level without any dye

_TEXTBOOK = "typical textbook range (Young et al., Wheater's Functional Histology)"
_ROSS = "typical textbook range (Ross & Pawlina, Histology: A Text and Atlas)"
_LIZARD = "around 7300 a mm2 over all colon in Lizard (Graham et al. 2021: 495,179 nuclei, 291 regions)"
_TUMOUR = "enlarged against normal; " + _TEXTBOOK
_OURS = "no published range known to us"
# (class, quantity) -> low, high, source. Section thickness, fixation and shrinkage move all of them.
PUBLISHED = {
    ("tumour", "nuclear diameter, um"): (7.0, 12.0, _TUMOUR),
    ("normal", "nuclear diameter, um"): (5.0, 8.5, _TEXTBOOK),
    ("stroma", "nuclear diameter, um"): (4.5, 8.0, _ROSS),
    ("muscle", "nuclear diameter, um"): (4.5, 9.0, _ROSS),
    ("lymphocytes", "nuclear diameter, um"): (5.0, 7.5, _TEXTBOOK),
    ("adipose", "nuclear diameter, um"): (4.0, 8.0, _ROSS),
    ("mucus", "nuclear diameter, um"): (4.0, 10.0, _OURS),
    ("necrosis", "nuclear diameter, um"): (1.0, 7.0, _OURS),
    ("tumour", "nuclei per mm2"): (3500, 10000, _LIZARD),
    ("normal", "nuclei per mm2"): (4000, 10000, _LIZARD),
    ("stroma", "nuclei per mm2"): (1000, 4500, _LIZARD),
    ("muscle", "nuclei per mm2"): (700, 3000, _ROSS),
    ("lymphocytes", "nuclei per mm2"): (9000, 20000, _TEXTBOOK),
    ("adipose", "nuclei per mm2"): (100, 900, _ROSS),
    ("mucus", "nuclei per mm2"): (50, 1500, _OURS),
    ("necrosis", "nuclei per mm2"): (0, 6000, _OURS),
    ("tumour", "gland size, um"): (60, 300, "wide by grade; " + _OURS),
    ("normal", "gland size, um"): (60, 100, "about 100 crypts a mm2 of mucosa; " + _ROSS),
    ("adipose", "cell size, um"): (50, 120, _ROSS),
}
_BUILT = {("tumour", "gland size, um"): "gland_um", ("normal", "gland size, um"): "crypt_um"}
# Folders of NCT-CRC-HE and sets like it.
REAL_NAMES = {
    "TUM": "tumour",
    "NORM": "normal",
    "STR": "stroma",
    "MUS": "muscle",
    "LYM": "lymphocytes",
    "ADI": "adipose",
    "MUC": "mucus",
    "DEB": "necrosis",
}


def optical_density(rgb: np.ndarray) -> tuple[float, float]:
    """Mean optical density (base 10) of haematoxylin and of eosin in an (h, w, 3) uint8 image.

    Unmixed with Ruifrok and Johnston's vectors, for every image alike: not with those it was drawn with.
    """
    density = -np.log10(np.clip(np.asarray(rgb, float) / WHITE, 1 / 255, 1))
    vectors = rgb_from_hed / np.linalg.norm(rgb_from_hed, axis=1, keepdims=True)
    amounts = np.clip(density.reshape(-1, 3) @ np.linalg.inv(vectors), 0, None)
    return float(amounts[:, 0].mean()), float(amounts[:, 1].mean())


def morphometry(cohort: Cohort, real: str | Path | None = None, tiles: int = 3, mpp: float = 0.5) -> pd.DataFrame:
    """One row a class and quantity: class, quantity, measured, published, inside, real, source.

    real    a folder per class of real tiles named as in REAL_NAMES, to measure the same stain densities on
    tiles   per class and slide, 224 px at `mpp`, for the densities

    Diameters (of the disc of equal area: median) and counts are the truth's, fat cells and stain are measured on
    pixels, gland sizes are those drawn. `inside` says whether the value lies in the published range.
    """
    counts, sizes, areas, built, stained, cells = ({name: [] for name in CLASSES} for _ in range(6))
    for row in cohort:
        truth = Truth.open(row.path)
        for code, name in enumerate(CLASSES, 1):
            area = float((truth.class_map == code).sum()) * truth.map_um**2 / 1e6
            if area > 0.01:
                diameters = truth.nuclei.loc[truth.nuclei["class"] == name, "diameter_um"]
                areas[name].append(area)
                counts[name].append(len(diameters))
                sizes[name].append(diameters)
                built[name].append(truth.latents["tissue"][name])
        _measure(row.path, truth, tiles, mpp, stained, cells)
    real_density = _real_densities(real)
    rows = []
    for name in CLASSES:
        if not areas[name]:
            continue
        rows.append((name, "nuclear diameter, um", np.median(np.concatenate(sizes[name]))))
        rows.append((name, "nuclei per mm2", sum(counts[name]) / sum(areas[name])))
        for (owner, quantity), field in _BUILT.items():
            if owner == name:
                rows.append((name, quantity, np.median([values[field] for values in built[name]])))
        if cells[name]:
            rows.append((name, "cell size, um", np.median(cells[name])))
        if stained[name]:
            rows += zip([name] * 2, ("H density", "E density"), np.mean(stained[name], 0), strict=True)
    return pd.DataFrame([_beside(*row, real_density) for row in rows])


def _beside(name: str, quantity: str, measured: float, real_density: dict) -> dict:
    low, high, source = PUBLISHED.get((name, quantity), (None, None, "measured alike on real tiles, where given"))
    return {
        "class": name,
        "quantity": quantity,
        "measured": float(measured),
        "published": "" if low is None else f"{low:g} to {high:g}",
        "inside": None if low is None else bool(low <= measured <= high),
        "real": real_density.get((name, quantity), np.nan),
        "source": source,
    }


def _measure(path: str, truth: Truth, tiles: int, mpp: float, stained: dict, cells: dict) -> None:
    """Add the stain densities of a few tiles of each class, and the sizes of fat cells, to the lists."""
    places = pure_positions(truth, 224 * mpp, 0.9)
    with Slide.open(path) as slide:
        for name, there in places.groupby("label"):
            for place in there.sample(min(tiles, len(there)), random_state=0).itertuples():
                image = slide.read(round(place.x_um / slide.mpp), round(place.y_um / slide.mpp), 224, mpp)
                stained[name].append(optical_density(image))
        fat = truth.class_mask("adipose", 2.0)
        if fat.any():
            cells["adipose"] += _fat_cells(slide.thumbnail(2.0), fat)


def _fat_cells(image: np.ndarray, fat: np.ndarray) -> list[float]:
    """Diameters in um of the disc with the area of each closed white space in fat, on 2 um pixels."""
    empty = (image.min(-1) > 222) & (cv2.erode(fat.astype(np.uint8), np.ones((3, 3))) > 0)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(empty.astype(np.uint8), connectivity=4)
    edge = np.unique(labels[cv2.dilate((~fat).astype(np.uint8), np.ones((5, 5))) > 0])
    area = np.delete(stats[:, cv2.CC_STAT_AREA], np.union1d(edge, [0])) * 4.0
    # A cell cut near its pole, and two whose shared wall is torn, say nothing about the diameter.
    return list(np.sqrt(4 / np.pi * area[(area > 400) & (area < 40000)]))


def _real_tiles(real: str | Path | None) -> dict[str, list[Path]]:
    """Class -> image files of the folders whose name is one of CLASSES or REAL_NAMES."""
    if real is None:
        return {}
    folders = [f for f in sorted(Path(real).expanduser().glob("*")) if f.is_dir()]
    found = {REAL_NAMES.get(f.name, f.name): sorted(p for p in f.iterdir() if p.is_file()) for f in folders}
    found = {name: files for name, files in found.items() if name in CLASSES and files}
    if not found:
        raise InputError(f"{real} holds no folder named like {', '.join(REAL_NAMES)} or {', '.join(CLASSES)}")
    return found


def _read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _real_densities(real: str | Path | None) -> dict[tuple[str, str], float]:
    densities = {}
    for name, files in _real_tiles(real).items():
        mean = np.mean([optical_density(_read(file)) for file in files], 0)
        densities |= {(name, "H density"): float(mean[0]), (name, "E density"): float(mean[1])}
    return densities


def contact_sheet(
    cohort: Cohort, real: str | Path | None = None, mpps=(0.25, 0.5, 1.0, 2.0), tile_px: int = 224, seed: int = 0
) -> tuple[list[str], dict[str, list[np.ndarray | None]]]:
    """Every class at every mpp, and a real tile where `real` has one: column titles, class -> images.

    Each image is (tile_px, tile_px, 3) uint8; the tiles of one row share their centre, deep inside the class, on
    a slide that serves the finest mpp. Real tiles are as they are in the folder.
    """
    files = _real_tiles(real)
    titles = [f"{mpp:g} um/px" for mpp in mpps] + (["real"] if files else [])
    fine = [row for row in cohort if row.mpp <= min(mpps) * 1.1]
    if not fine:
        raise InputError(f"no slide of {cohort.name} serves {min(mpps):g} mpp; ask for coarser ones")
    truths = [Truth.open(row.path) for row in fine]
    rng = np.random.default_rng(seed)
    rows: dict[str, list[np.ndarray | None]] = {}
    for name in CLASSES:
        depth, index, x_um, y_um = max(_deepest(truth, name, rng, k) for k, truth in enumerate(truths))
        if depth <= 0:
            continue
        with Slide.open(fine[index].path) as slide:
            corners = [(np.array([x_um, y_um]) - tile_px * mpp / 2) / slide.mpp for mpp in mpps]
            rows[name] = [
                slide.read(*np.round(at).astype(int), tile_px, mpp) for at, mpp in zip(corners, mpps, strict=True)
            ]
        if files:
            choice = files.get(name)
            rows[name].append(_read(choice[rng.integers(len(choice))]) if choice else None)
    return titles, rows


def _deepest(truth: Truth, name: str, rng: np.random.Generator, index: int) -> tuple[float, int, float, float]:
    """How far inside the class its deepest nucleus lies (um), and where; a little chance between slides."""
    mask = (truth.class_map == 1 + CLASSES.index(name)) & (truth.artefacts == 0)
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5) * truth.map_um
    nuclei = truth.nuclei[truth.nuclei["class"] == name]
    if nuclei.empty:
        return 0.0, index, 0.0, 0.0
    cells = (nuclei[["y_um", "x_um"]].to_numpy() / truth.map_um).astype(int)
    row, column = np.clip(cells, 0, np.array(mask.shape) - 1).T
    deep = depth[row, column] * rng.uniform(0.8, 1, len(nuclei))
    best = int(deep.argmax())
    return float(deep[best] * rng.uniform(0.7, 1)), index, *nuclei[["x_um", "y_um"]].to_numpy()[best]
