"""Tiles cut to disk beforehand, as a folder of images or as WebDataset shards, and read again as a source of tiles."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pathfm import scales
from pathfm.cohort import TEXT, patient_of
from pathfm.errors import InputError, nearest
from pathfm.philox import permuted
from pathfm.storage import atomic, progress, read_json, write_json
from pathfm.stream import ENDLESS, Tile, TileName

VERSION = 1
FORMS, IMAGES, ORDERS = ("folder", "shards"), ("png", "jpg"), ("written", "shuffled")
STREAMS = ("TileStream", "Places")  # whose order is a draw already
CHUNK = 64  # tiles read together
KNOWN = ("patient_id", "centre")  # of a slide; go into the manifest


def write(
    source,
    out: str | Path,
    n: int | None = None,
    form: str = "folder",
    by: str = "slide_id",
    image: str = "png",
    quality: int = 95,
    per_shard: int = 1000,
) -> Path:
    """Writes the first n tiles of a source and its manifest.csv; goes on where an earlier call was stopped.

    source      a TileStream, or a Grid
    n           None: all, where the source ends
    form        "folder": <by's value>/<i>.png, a folder a slide or a class. "shards": tiles-<k>.tar of `per_shard`
                tiles, <i>.png and <i>.json each, which is the layout of WebDataset
    by          column of the cohort that names the folder and the tile's label: slide_id, or a class
    image       "png", the very pixels; or "jpg" of `quality` (1..95), four to ten times smaller and no longer the same

    manifest.csv has a row a tile: file, label, slide_id, x, y (level-0 px), mpp, tissue, resampled, i, slide_mpp, where
    known patient_id and centre, and for shards the byte range of the image. It comes last: a folder without one is
    unfinished. What is there already is whole and is kept; a source or settings other than those it was begun with
    are refused. With a tile_filter what is there is read again, to know its names.

    Shards are plain POSIX tar files from Python's tarfile: WebDataset needs nothing else, and the place of every image
    is known, so that they can be read in any order.
    """
    _check(form, image, quality, per_shard, source, n)
    out, total = Path(out), int(n if n is not None else len(source))
    about = {"version": VERSION, "form": form, "image": image, "quality": quality if image == "jpg" else None}
    about |= {"by": by, "per_shard": per_shard if form == "shards" else None, "source": type(source).__name__}
    about = json.loads(json.dumps({**about, "settings": source.settings}))
    _begin(out, about)
    labels, facts = _labels(source.slides, by), _facts(source.slides)
    made = _folder if form == "folder" else _shards
    rows = pd.concat(list(made(source, out, total, labels, facts, about)), ignore_index=True)
    with atomic(out / "manifest.csv", "w") as file:
        rows.to_csv(file, index=False)
    return out / "manifest.csv"


def _check(form, image, quality, per_shard, source, n) -> None:
    for name, value, known in (("form", form, FORMS), ("image", image, IMAGES)):
        if value not in known:
            raise InputError(f"{name}={value!r} is unknown.{nearest(value, known)}")
    if not 1 <= quality <= 95 or per_shard < 1:
        raise InputError(f"quality={quality} must be within 1 and 95, and per_shard={per_shard} at least 1")
    if n is None and len(source) >= ENDLESS:
        raise InputError("the stream has no end; give n, the number of tiles to write")
    if n is not None and not 1 <= n <= len(source):
        raise InputError(f"n={n}: the source has {len(source)} tiles; give a number from 1 to that")


def _begin(out: Path, about: dict) -> None:
    """about.json, and no manifest; refuses a folder of other things."""
    path = out / "about.json"
    if path.is_file():
        before = read_json(path)
        for name, wanted in about.items():
            if before.get(name) != wanted:
                raise InputError(
                    f"{out} was begun with {name}={before.get(name)!r}, not {wanted!r}; use another folder"
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and holds no tiles begun here; give a new or empty folder")
    write_json(path, about)
    (out / "manifest.csv").unlink(missing_ok=True)


def _labels(slides: pd.DataFrame, by: str) -> dict[str, str]:
    """slide_id -> the folder's name."""
    if by not in slides:
        raise InputError(f"by='{by}' is no column of the cohort.{nearest(by, list(slides))}")
    if slides[by].isna().any():
        slide = slides["slide_id"].iloc[int(slides[by].isna().to_numpy().argmax())]
        raise InputError(f"slide '{slide}' has no '{by}'; fill it in, or leave the slide out")
    names = slides[by].astype(str)
    safe = names.str.replace(r"[^\w.+ -]", "_", regex=True).str.strip(" .")
    if safe.nunique() != names.nunique() or (safe == "").any():
        raise InputError(f"by='{by}': two of its values give one folder name; rename one")
    return dict(zip(slides["slide_id"], safe, strict=True))


def _facts(slides: pd.DataFrame) -> pd.DataFrame:
    known = slides[["slide_id", "mpp", *(name for name in KNOWN if name in slides)]]
    return known.rename(columns={"mpp": "slide_mpp"}).set_index("slide_id")


def _described(names: pd.DataFrame, labels: dict[str, str], facts: pd.DataFrame) -> pd.DataFrame:
    columns = ["slide_id", "x", "y", "mpp", "tissue", "resampled", "i"]
    names = names[columns].reset_index(drop=True)
    names.insert(0, "label", names["slide_id"].map(labels))
    return names.join(facts, on="slide_id")


def _names(tiles: Sequence[Tile]) -> pd.DataFrame:
    return pd.DataFrame([tile[1:] for tile in tiles], columns=TileName._fields)


def _folder(source, out: Path, total: int, labels, facts, about):
    """Rows of the manifest, a chunk at a time, as its files are written."""
    filtered = getattr(source, "tile_filter", None)
    bar = progress(range(0, total, CHUNK), "tiles", unit=f"x{CHUNK} tiles")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in bar:
            numbers = range(first, min(first + CHUNK, total))
            tiles = source.__getitems__(numbers) if filtered else None
            rows = _described(_names(tiles) if filtered else source.names(numbers), labels, facts)
            rows.insert(0, "file", [f"{row.label}/{row.i:09d}.{about['image']}" for row in rows.itertuples()])
            todo = [k for k, file in enumerate(rows["file"]) if not (out / file).is_file()]
            if todo:
                tiles = [tiles[k] for k in todo] if filtered else source.__getitems__([numbers[k] for k in todo])
                list(pool.map(_save, [out / rows["file"][k] for k in todo], tiles, [about] * len(todo)))
            yield rows


def _save(path: Path, tile: Tile, about: dict) -> None:
    with atomic(path) as file:
        file.write(_encoded(tile.image, about))


def _encoded(image: np.ndarray, about: dict) -> bytes:
    file = io.BytesIO()
    if about["image"] == "png":
        Image.fromarray(image).save(file, "PNG")
    else:  # no chroma subsampling: stains are told apart by colour
        Image.fromarray(image).save(file, "JPEG", quality=about["quality"], subsampling=0)
    return file.getvalue()


def _shards(source, out: Path, total: int, labels, facts, about):
    """Rows of the manifest, a shard at a time, as it is written; a table beside each says that it is whole."""
    size = about["per_shard"]
    for k, first in enumerate(progress(range(0, total, size), "shards", unit="shard")):
        numbers = range(first, min(first + size, total))
        tar, table = out / f"tiles-{k:06d}.tar", out / f"tiles-{k:06d}.csv"
        if tar.is_file() and table.is_file():
            rows = pd.read_csv(table, dtype=dict.fromkeys((*TEXT, "label"), str), keep_default_na=False, na_values=[""])
            if rows["i"].tolist() == list(numbers):
                yield rows
                continue
        table.unlink(missing_ok=True)
        with atomic(tar) as file:
            rows = pd.concat(_fill(file, source, numbers, labels, facts, about), ignore_index=True)
        rows.insert(0, "file", tar.name)
        with atomic(table, "w") as file:
            rows.to_csv(file, index=False)
        yield rows


def _fill(file, source, numbers: range, labels, facts, about) -> list[pd.DataFrame]:
    """One tar file's samples; rows with the byte range of each image."""
    parts = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for at in range(0, len(numbers), CHUNK):
            tiles = source.__getitems__(numbers[at : at + CHUNK])
            rows = _described(_names(tiles), labels, facts)
            places = []
            for tile, row in zip(tiles, rows.to_dict("records"), strict=True):
                data = _encoded(tile.image, about)
                places.append((tar.offset + tarfile.BLOCKSIZE, len(data)))
                _add(tar, f"{tile.i:09d}.{about['image']}", data)
                _add(tar, f"{tile.i:09d}.json", json.dumps(row).encode())
            parts.append(rows.assign(offset=[at for at, _ in places], bytes=[size for _, size in places]))
    return parts


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0 and no owner: same tiles, same bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


class OfflineTiles:
    """Tiles that `write` wrote, or any images with a manifest.csv, as a source for pretraining.

    folder   the one given to `write`; or one whose manifest.csv has at least columns file and mpp
    order    "written": tile i is row i of the manifest, and the source ends with it; "shuffled": endless, every epoch
             all tiles in another order, by a keyed permutation. None: "written" where a stream was written, so that
             training sees what it would have seen online; "shuffled" otherwise
    seed     of the orders

    `table` is the manifest, `slides` a row a slide with its patient, `settings` what was written, and its digest.
    """

    def __init__(self, folder: str | Path, order: str | None = None, seed: int = 0):
        self.folder, self.seed = Path(folder), int(seed)
        if not (self.folder / "manifest.csv").is_file():
            begun = (self.folder / "about.json").is_file()
            raise InputError(
                f"{folder} holds tiles that were not finished; run the same `pathfm tiles` again"
                if begun
                else f"{folder} has no manifest.csv; write tiles with `pathfm tiles`, or a table with file and mpp"
            )
        self.about = read_json(self.folder / "about.json") if (self.folder / "about.json").is_file() else {}
        if self.about.get("version", VERSION) != VERSION:
            raise InputError(
                f"{folder} was written by version {self.about['version']}, this is {VERSION}; write it anew"
            )
        self.table, self.digest = _read_manifest(self.folder / "manifest.csv")
        self.order = order or ("written" if self.about.get("source") in STREAMS else "shuffled")
        if self.order not in ORDERS:
            raise InputError(f"order={order!r} is unknown.{nearest(order, ORDERS)}")
        self.tile_px = self[0].image.shape[0]

    @property
    def settings(self) -> dict:
        """What was written, how, and in which order it is read."""
        how = {name: self.about.get(name) for name in ("form", "image", "quality")}
        return {"tiles": self.digest, "order": self.order, "seed": self.seed, **how, **self.about.get("settings", {})}

    @property
    def law(self) -> scales.Values | scales.Continuous:
        """Of mpp, as declared when they were written; the values found where nothing was."""
        told = self.about.get("settings", {}).get("mpp")
        return scales.of(told if told else sorted(self.table["mpp"].round(3).unique()))

    @property
    def weights(self) -> dict[float, float]:
        """mpp -> declared weight of a mixture; empty for a continuous law."""
        law = self.law
        return dict(zip(law.mpp, law.share, strict=True)) if isinstance(law, scales.Values) else {}

    @property
    def min_tissue(self) -> float | None:
        """As declared; None where nothing was."""
        return self.about.get("settings", {}).get("min_tissue")

    @property
    def slides(self) -> pd.DataFrame:
        """slide_id and, where known, patient_id and centre."""
        return self.table[["slide_id", *(name for name in KNOWN if name in self.table)]].drop_duplicates("slide_id")

    def __len__(self) -> int:
        return len(self.table) if self.order == "written" else ENDLESS

    def __getitem__(self, i: int) -> Tile:
        name, row = self.name(i), self._row(i)
        path = self.folder / self.table["file"].iloc[row]
        return Tile(self._image(path, row), *name)

    def __getitems__(self, numbers: Sequence[int]) -> list[Tile]:
        return [self[i] for i in numbers]

    def name(self, i: int) -> TileName:
        """What tile i is, without reading it."""
        row = self.table.iloc[self._row(i)]
        place = int(row["x"]), int(row["y"]), float(row["mpp"]), float(row["tissue"]), bool(row["resampled"])
        return TileName(str(row["slide_id"]), *place, int(i))

    def names(self, numbers: Iterable[int]) -> pd.DataFrame:
        """One row a tile, as TileStream has them."""
        return pd.DataFrame([self.name(i) for i in numbers], columns=TileName._fields)

    def _row(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"tile numbers lie between 0 and {len(self) - 1}")
        if self.order == "written":
            return int(i)
        turn, at = divmod(int(i), len(self.table))
        return int(permuted(np.uint64(self.seed % 2**64), np.uint64(turn), at, len(self.table)))

    def _image(self, path: Path, row: int) -> np.ndarray:
        try:
            with open(path, "rb") as file:
                if "offset" in self.table:
                    file.seek(int(self.table["offset"].iloc[row]))
                    file = io.BytesIO(file.read(int(self.table["bytes"].iloc[row])))
                with Image.open(file) as image:
                    return np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(
                f"{path} (tile in row {row + 1}) cannot be read ({error}); write the tiles again"
            ) from None

    def __repr__(self) -> str:
        return f"OfflineTiles({len(self.table)} tiles of {self.tile_px} px at {self.law} um/px, {self.order})"


def _read_manifest(path: Path) -> tuple[pd.DataFrame, str]:
    """The table with every column that a tile needs, and a digest of the file."""
    try:
        content = path.read_bytes()
        types = dict.fromkeys((*TEXT, "label", "file"), str)
        table = pd.read_csv(io.BytesIO(content), dtype=types, keep_default_na=False, na_values=[""])
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table ({error})") from None
    for name in ("file", "mpp"):
        if name not in table:
            raise InputError(f"{path} has no column '{name}'; a source of tiles needs file and mpp")
    mpp = pd.to_numeric(table["mpp"], errors="coerce")
    if table.empty or not (mpp > 0).all():
        raise InputError(f"{path} lists no tiles, or one without a positive mpp; training must know the scale of each")
    if "slide_id" not in table:
        table["slide_id"] = patient_of(table) if "patient_id" in table else table["file"]
    for name, default in {"x": 0, "y": 0, "tissue": 1.0, "resampled": False}.items():
        if name not in table:
            table[name] = default
    return table.assign(mpp=mpp), hashlib.blake2b(content, digest_size=8).hexdigest()
