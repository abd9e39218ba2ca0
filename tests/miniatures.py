"""Miniature copies of the public tasks in their official layouts, and the tasks with counts to match."""

from __future__ import annotations

import io
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import polars as pl
from PIL import Image
from scipy.io import savemat

from pathfm import tasks
from pathfm.tasks.folders import BREAKHIS_VAL
from pathfm.tasks.slides import CAMELYON_VAL

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def picture(path: Path, seed: int | None = None, side: int = 8) -> Path:
    """A small image of noise, another for every path."""
    seed = sum(map(ord, str(path))) if seed is None else seed
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, len(str(path))]).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def letters(n: int, length: int = 8) -> str:
    """The n-th word of capital letters."""
    return "".join(LETTERS[n // 26**place % 26] for place in range(length))


def bach(folder: Path):
    photos = folder / "ICIAR2018_BACH_Challenge" / "Photos"
    short = {"Benign": "b", "InSitu": "is", "Invasive": "iv", "Normal": "n"}
    numbers = [1, 2, 41, 42, 59, 60, 61, 90, 91, 100]
    for label, prefix in short.items():
        for number in (*numbers, 20, 40, 45, 46, 69, 70, 73, 74):
            picture(photos / label / f"{prefix}{number:03d}.tif")
    (photos / "microscopy_ground_truth.csv").write_text("b001.tif,Benign\n")
    n = len(numbers) + 8
    return tasks.with_counts("bach", {(None, label): n for label in short})


def crc(folder: Path, name: str = "crc", train: int = 10, val: int = 4):
    task = tasks.about(name)
    first = "NCT-CRC-HE-100K" + ("-NONORM" if name == "crc_nonorm" else "")
    for number, label in enumerate(task.classes):
        for i in range(train):
            picture(folder / first / label / f"{label}-{letters(100 * number + i)}.tif")
        for i in range(val):
            picture(folder / "CRC-VAL-HE-7K" / label / f"{label}-TCGA-{letters(100 * number + i)}.tif")
    return tasks.with_counts(
        name, {("train", c): train for c in task.classes} | {("val", c): val for c in task.classes}
    )


def mhist(folder: Path):
    rows = []
    for i in range(24):
        name, label = f"MHIST_{letters(i, 3).lower()}.png", ("HP", "SSA")[i % 2]
        picture(folder / "images" / name)
        rows.append((name, label, i % 8, "train" if i < 16 else "test"))
    columns = ["Image Name", "Majority Vote Label", "Number of Annotators who Selected SSA (Out of 7)", "Partition"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "annotations.csv", index=False)
    return tasks.with_counts("mhist", {("train", None): 16, ("val", None): 8, (None, "HP"): 12, (None, "SSA"): 12})


def breakhis(folder: Path):
    breast = folder / "BreaKHis_v1" / "histology_slides" / "breast"
    names = {"TA": "benign/SOB/tubular_adenoma", "MC": "malignant/SOB/mucinous_carcinoma",
             "F": "benign/SOB/fibroadenoma", "DC": "malignant/SOB/ductal_carcinoma"}  # fmt: skip
    for number, (label, place) in enumerate(names.items()):
        patients = [BREAKHIS_VAL[number], *(f"{number}{i}" for i in range(10, 16))]
        for patient in patients:
            kind = "B" if "benign" in place else "M"
            start = f"SOB_{kind}_{label}"
            home = breast / place / f"{start}_14-{patient}"
            for i in (1, 2):
                picture(home / "40X" / f"{start}-14-{patient}-40-{i:03d}.png")
            picture(home / "100X" / f"{start}-14-{patient}-100-001.png")
    picture(breast / "benign/SOB/adenosis/SOB_B_A_14-9/40X/SOB_B_A-14-9-40-001.png")
    return tasks.with_counts("breakhis", {("train", None): 48, ("val", None): 8})


def bracs(folder: Path):
    task, counts = tasks.about("bracs"), {}
    for place, (split, n) in enumerate({"train": 4, "val": 2, "test": 2}.items()):
        for label in task.classes:
            counts[(split, label)] = n
            code = label.split("_")[1]
            for i in range(n):
                slide = f"BRACS_{100 * place + i}"
                picture(folder / "BRACS_RoI" / "latest_version" / split / label / f"{slide}_{code}_{i}.png")
    return tasks.with_counts("bracs", counts)


def gleason(folder: Path):
    sizes = {"ZT111_4_B": 4, "ZT204_6_A": 4, "ZT76_39_A": 3, "ZT80_38_A": 3}
    for array, cores in sizes.items():
        for core in range(cores):
            name = f"{array}_{core}_6"
            parts = ("test_patches_750/patho_1", "test_patches_750/patho_2") if array.startswith("ZT80") else ()
            for part in parts or ("train_validation_patches_750",):
                for label in range(4):
                    picture(folder / part / name / f"{name}_patch_{label}_class_{label}.jpg")
    return tasks.with_counts("gleason", {("train", None): 32, ("val", None): 12, ("test", None): 12})


def til(folder: Path, leak: bool = False):
    home = folder / "TCGA-TILs" / "images-tcga-tils"
    for study in ("luad", "brca"):
        for number, split in enumerate(("train", "val", "test")):
            for i in range(4):
                who = i if leak else 10 * number + i
                for label in ("til-negative", "til-positive"):
                    file = f"{split}/{label}/TCGA-{study[:2].upper()}-A0{who:02d}_{i}.png"
                    picture(home / study / file)
                    picture(home / "pancancer" / file)  # ChampKit's second copy
    return tasks.with_counts("til", {(split, None): 16 for split in ("train", "val", "test")})


def msi(folder: Path, name: str = "msi_crc", patients: int = 10):
    cancer, counts = {"msi_crc": "CRC_DX", "msi_stad": "STAD"}[name], {}
    for number, part in enumerate(("TRAIN", "TEST")):
        for kind, label in enumerate(("MSIMUT", "MSS")):
            home = folder / f"{cancer}_{part}_{label}" / label
            for i in range(patients):
                slide = f"TCGA-A{kind}-{number}{i:03d}-01Z-00-DX1"
                for tile in range(2):
                    picture(home / f"blk-{letters(20 * i + tile, 12)}-{slide}.png")
            counts[({"TRAIN": "train", "TEST": "test"}[part], label)] = 2 * patients
    return tasks.with_counts(name, counts)


def pcam(folder: Path, name: str = "pcam", meta: bool = True, n: int = 40):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, part in enumerate(("train", "valid", "test")):
        start = f"camelyonpatch_level_2_split_{part}"
        with h5py.File(folder / f"{start}_x.h5", "w") as file:
            pixels = rng.integers(0, 255, (n, 96, 96, 3), np.uint8)
            file.create_dataset("x", data=pixels, chunks=(1, 96, 96, 3), compression="gzip", compression_opts=1)
        with h5py.File(folder / f"{start}_y.h5", "w") as file:
            file["y"] = (np.arange(n) % 2).astype(np.uint8).reshape(n, 1, 1, 1)
        if meta:
            slides = [f"camelyon16_train_{number}_{i // 4}" for i in range(n)]
            pd.DataFrame({"coord_x": 0, "wsi": slides}).to_csv(folder / f"{start}_meta.csv")
    return tasks.with_counts(name, {(split, None): n for split in ("train", "val", "test")})


def consep(folder: Path, side: int = 20):
    for part, n in (("Train", 10), ("Test", 4)):
        for i in range(1, n + 1):
            picture(folder / part / "Images" / f"{part.lower()}_{i}.png", side=side)
            instances, types = np.zeros((2, side, side))
            for kind in range(1, 8):
                instances[2 * kind : 2 * kind + 2, :3], types[2 * kind : 2 * kind + 2, :3] = kind, kind
            home = folder / part / "Labels"
            home.mkdir(parents=True, exist_ok=True)
            savemat(home / f"{part.lower()}_{i}.mat", {"inst_map": instances, "type_map": types})
    return tasks.with_counts("consep", {("train", None): 10, ("val", None): 4})


def nucleus(x: int, y: int, side: int) -> str:
    corners = ((x, y), (x + side, y), (x + side, y + side), (x, y + side))
    return (
        "<Region><Attributes/><Vertices>"
        + "".join(f'<Vertex X="{a}" Y="{b}"/>' for a, b in corners)
        + "</Vertices></Region>"
    )


def monusac_xml(nuclei: dict[str, list[tuple[int, int, int]]]) -> str:
    """An annotation file: class -> squares (x, y, side)."""
    parts = [
        f'<Annotation Id="{number}"><Attributes><Attribute Name="{kind}"/></Attributes><Regions>'
        + "".join(nucleus(*one) for one in squares) + "</Regions></Annotation>"
        for number, (kind, squares) in enumerate(nuclei.items())
    ]  # fmt: skip
    return "<Annotations>" + "".join(parts) + "</Annotations>"


def monusac(folder: Path):
    for part, n in (("MoNuSAC_images_and_annotations", 10), ("MoNuSAC Testing Data and Annotations", 4)):
        for i in range(n):
            slide = f"TCGA-{part[8]}A-{i:04d}-01Z-00-DX1"
            for image in (1, 2):
                path = picture(folder / part / slide / f"{slide}_{image}.tif", side=24)
                squares = {
                    "Epithelial": [(2, 5, 6)],
                    "Lymphocyte": [(12, 3, 4), (12, 10, 4)],
                    "Ambiguous": [(2, 16, 5)],
                }
                if image == 2:
                    squares |= {"Neutrophil": [(18, 18, 4)], "Macrophage": [(18, 2, 4)]}
                path.with_suffix(".xml").write_text(monusac_xml(squares))
    return tasks.with_counts("monusac", {("train", None): 20, ("val", None): 8})


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a slide")
    return path


def camelyon16(folder: Path):
    for kind in ("normal", "tumor"):
        held = CAMELYON_VAL[kind][:4]
        for number in {*held, 2, 3, 4, 110}:
            touch(folder / "training" / kind / f"{kind}_{number:03d}.tif")
    lines = []
    for number in range(1, 7):
        touch(folder / "testing" / "images" / f"test_{number:03d}.tif")
        lines.append(f"test_{number:03d},{('Normal', 'Tumor')[number % 2]},IDC,Macro")
    (folder / "testing" / "reference.csv").write_text("\n".join(lines))
    there = {kind: len({*CAMELYON_VAL[kind][:4], 2, 3, 4, 110}) for kind in ("normal", "tumor")}
    train = sum(there.values()) - 8
    return tasks.with_counts("camelyon16_small", {("train", None): train, ("val", None): 8, ("test", None): 6})


def panda(folder: Path, grades: int = 60):
    rows = []
    for grade in range(6):
        for i in range(grades + grade):
            name = f"{(7919 * (100 * grade + i)) % 2**32:032x}"
            rows.append((name, ("karolinska", "radboud")[i % 2], grade, float(i % 10 != 0)))
            touch(folder / "train_images" / f"{name}.tiff")
    columns = ["image_id", "data_provider", "isup_grade", "noise_ratio_10"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "train_with_noisy_labels.csv", index=False)
    return tasks.with_counts("panda_small", {})


def tcga_labels(path: Path, seed: int = 0, site_effect: float = 0.0, patients: int = 12) -> pd.DataFrame:
    """A labels.csv: three cancer types of ten sites each. site_effect 0: a coin, 1: the site decides."""
    rng = np.random.default_rng(seed)
    rows = []
    for cancer in ("BRCA", "LUAD", "COAD"):
        for site in range(10):
            code = f"{cancer[0]}{site}"
            rate = 0.5 + site_effect * (0.5 if site % 2 else -0.5)
            for i in range(patients):
                slide = f"TCGA-{code}-{i:04d}-01Z-00-DX1"
                rows.append((slide, ("wild", "mutated")[int(rng.random() < rate)], cancer))
    table = pd.DataFrame(rows, columns=["slide_id", "label", "cancer_type"])
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return table


def pathorob(folder: Path, name: str, slides: int = 4, tiles: int = 6, d: int = 16, seed: int = 0):
    """The metadata CSV and embeddings a centre, as PathoROB's code keeps them; features lean on class and centre."""
    from pathfm.tasks.pathorob import FILES, PAIRED

    rng = np.random.default_rng(seed)
    classes, centres = ("normal", "tumor"), ("RUMC", "UMCU")
    if name == "pathorob_tolkach":
        classes = tasks.about(name).classes[:2]
    rows, arrays = [], {}
    for c, label in enumerate(classes):
        for s, centre in enumerate(centres):
            for slide in range(slides):
                for tile in range(tiles):
                    slide_id = f"TCGA-{c}{s}-{slide:04d}-01Z-00-DX1"
                    rows.append(("ID", slide_id, f"{tile}_0", label, centre))
                    x = rng.normal(size=d) + np.eye(d)[c] * 2 + np.eye(d)[4 + s] * 2
                    arrays.setdefault(centre, {})[f"{slide_id}-{tile}_0"] = x.astype(np.float32)
    columns = ["subset", "slide_id", "patch_id", "biological_class", "medical_center"]
    table = pd.DataFrame(rows, columns=columns)
    if name in PAIRED:
        table = pd.concat([table.assign(subset=pair) for pair in ("one", "two")])
    else:
        table = pd.concat([table, table.head(3).assign(subset="OOD", patch_id="ood")])
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / FILES[name], index=False)
    for centre, found in arrays.items():
        np.savez(folder / f"{centre}.npz", **found)
    return tasks.with_counts(name, {(None, None): (2 if name in PAIRED else 1) * len(rows)})


def pathorob_shards(folder: Path, metadata: Path, shards: int = 2, side: int = 16, seed: int = 0) -> dict:
    """Parquet shards as Hugging Face gives PathoROB's sets out: every tile of the CSV once, in an order of their own.

    Returns file (slide-patch) -> pixels.
    """
    rng = np.random.default_rng(seed)
    table = pd.read_csv(metadata, dtype=str, keep_default_na=False).drop(columns="subset")
    table = table.drop_duplicates(["slide_id", "patch_id"]).sample(frac=1, random_state=seed)
    pixels, images = {}, []
    for row in table.itertuples():
        one = rng.integers(0, 255, (side, side, 3), np.uint8)
        pixels[f"{row.slide_id}-{row.patch_id}"] = one
        file = io.BytesIO()
        Image.fromarray(one).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": f"{row.patch_id}.png"})
    (folder / "data").mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(table)), shards)):
        columns = {"image": [images[i] for i in rows]} | {c: table[c].iloc[rows].tolist() for c in table}
        schema = {"image": pl.Struct({"bytes": pl.Binary, "path": pl.String})}
        file = folder / "data" / f"train-{number:05}-of-{shards:05}.parquet"
        pl.DataFrame(columns, schema_overrides=schema).write_parquet(file, row_group_size=7)
    return pixels
