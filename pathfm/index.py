"""Built once per cohort: each slide's geometry and tissue mask, memory-mapped afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import pandas as pd
from filelock import FileLock

from pathfm import jobs, positions, scan, tilemap, tissue
from pathfm.cohort import TEXT, Cohort, select
from pathfm.errors import InputError, nearest
from pathfm.scan import ARRAYS, STANDARD_MPP, VERSION
from pathfm.slide import Slide
from pathfm.source import open_all
from pathfm.storage import atomic, cache_dir, explained, progress, read_json, write_json
from pathfm.tilemap import Shift, TileMap

HEADER_BYTES = 1024  # of a .npy whose length is known when it is written
OPEN_SLIDES = 32  # that OpenSlide reads, kept per process
WORTH_PROCESSES = 300 * 2**20  # bytes of slides; fewer are indexed sooner than processes start

# Columns that hold whole numbers.
WHOLE = ["width_px", "height_px", "cell_px", "mask_start", "mask_words", "first_level", "bytes"]
WHOLE += [f"positions@{mpp}" for mpp in STANDARD_MPP]
READING = ["reader", "fallback", "codec", "scales", "tag"]  # columns that say how a slide is read


class SlideIndex:
    """A cohort ready to be sampled. Read-only; `build` makes it and `open` opens it.

    folder   where it is stored
    slides   DataFrame, one row a slide of the cohort with its columns and: status ("ok", "quarantined"),
             reason, width_px, height_px, mpp, levels ("1 4 16"), cell_px (level-0 px per mask pixel),
             tissue_mm2, pen_mm2, bubble_mm2, fold_mm2, edge_mm2, blur_mm2, positions@0.25 ... (256 px tiles, 40 %
             tissue), reader ("ranges", "openslide"), fallback (why OpenSlide reads), codec, scales ("1 2 4 8", the
             fractions of its size that a level decodes to), bytes and tag (of the version of the file that was
             indexed), part (the file of its scan)
    usable   the rows that are ok
    tiles    TileMap: where the compressed tiles of all slides lie, memory-mapped

    Picklable: a worker process maps masks and tiles and opens the slides itself.
    """

    def __init__(self, folder: Path, slides: pd.DataFrame):
        self.folder, self.slides = Path(folder), slides
        self._words = self._tiles = self._where = None
        self._held: dict[str, Slide] = {}

    @classmethod
    def build(
        cls,
        cohort: Cohort,
        folder: str | Path | None = None,
        workers: int | None = None,
        scheduler: str | None = None,
        checksums: bool | None = None,
    ) -> SlideIndex:
        """The index of a cohort, made in parallel; what an earlier, interrupted build finished is kept.

        folder     None: cache_dir()/index/<hash of the cohort>
        workers    processes on this machine; None: one per core where the cohort is worth it, 0: this process
        scheduler  address of a Dask scheduler, such as "tcp://host:8786", whose workers scan the slides. They see
                   the slides under the same paths and have the same pathfm; `folder` is written here alone
        checksums  store a CRC-32 of every compressed tile, 4 bytes each, against which every read is held: any
                   changed byte is then an error. All files are read once. Without, damage is found where the file
                   or the decoder can show it in the rows that a read needs, and a flipped bit may pass as
                   another picture. Slides that OpenSlide reads have none. None: as the index that is in `folder`
                   already, no where there is none

        A slide that cannot be read is quarantined with its reason, and so is one that ends the process reading it.
        Raises InputError where that is every one, `folder` cannot be written, or the scheduler is not to be had.
        """
        folder = Path(folder) if folder else cache_dir() / "index" / _cohort_key(cohort)
        checksums = _checked(folder) if checksums is None else bool(checksums)
        found, todo, size = {}, {}, 0
        for row, source in zip(cohort, open_all(cohort.table["path"].tolist()), strict=True):
            if isinstance(source, InputError):
                found[row.slide_id] = str(source).replace(row.path, scan.shown_name(row.path))
                continue
            mpp = getattr(row, "mpp", None)
            part = folder / "parts" / _part(source.identity, mpp, checksums)
            if part.is_file():
                found[row.slide_id] = part
            else:
                todo[row.slide_id] = row.path, mpp, checksums, part.name, VERSION
                size += source.size
            source.close()
        results = jobs.run(scan.scan_or_reason, todo, _crash, _workers(size, workers, scheduler), scheduler)
        with contextlib.closing(results):
            for slide_id, result in progress(results, "indexing", len(todo), "slide"):
                found[slide_id] = result if isinstance(result, str) else _keep(folder / "parts", *result)
        _merge(cohort, folder, found, checksums)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> SlideIndex:
        """The index stored in a folder. Raises InputError where there is none, or one of another version."""
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise InputError(f"{folder} holds no index; make one with SlideIndex.build(cohort, folder)")
        about = read_json(folder / "index.json")
        if about.get("version") != VERSION:
            raise InputError(
                f"{folder} holds an index of version {about.get('version')}, this is {VERSION}; build it again"
            )
        types = dict.fromkeys([*TEXT, *READING, "status", "reason", "levels", "part"], str)
        types |= dict.fromkeys(WHOLE, "Int64")
        slides = pd.read_csv(folder / "slides.csv", dtype=types)
        slides[READING] = slides[READING].fillna("")
        return cls(folder, slides)

    @property
    def usable(self) -> pd.DataFrame:
        return self.slides[self.slides["status"] == "ok"].reset_index(drop=True)

    @property
    def quarantined(self) -> pd.DataFrame:
        """slide_id, path and reason of what could not be read."""
        return self.slides.loc[self.slides["status"] != "ok", ["slide_id", "path", "reason"]].reset_index(drop=True)

    @property
    def words(self) -> np.ndarray:
        """All packed masks, one after another, memory-mapped."""
        if self._words is None:
            self._words = np.asarray(np.load(self.folder / "masks.npy", mmap_mode="r"))
        return self._words

    @property
    def tiles(self) -> TileMap:
        if self._tiles is None:
            self._tiles = tilemap.load(self.folder)
        return self._tiles

    def mask(self, slide_id: str) -> tuple[np.ndarray, float]:
        """The tissue mask of a slide, (h, w) bool, and its um/px."""
        row = self._row(slide_id)
        width, height = -(-row.width_px // row.cell_px), -(-row.height_px // row.cell_px)
        words = self.words[row.mask_start : row.mask_start + height * row.mask_words]
        return positions.unpack(words.reshape(height, row.mask_words), width), row.cell_px * row.mpp

    def artefacts(self, slide_id: str) -> dict[str, np.ndarray]:
        """What was left out of the mask, by tissue.KINDS, each (h, w) bool on the mask's grid."""
        flags = cv2.imdecode(self._stored(slide_id, "spoilt"), cv2.IMREAD_UNCHANGED)
        return {kind: flags & (1 << bit) != 0 for bit, kind in enumerate(tissue.KINDS)}

    def picture(self, slide_id: str) -> np.ndarray:
        """The slide as its scan saw it, (h, w, 3) uint8, scan.PICTURE_PX on its longer side unless its mask is smaller.

        Covers what the mask covers. The slide itself is not opened.
        """
        return cv2.imdecode(self._stored(slide_id, "picture"), cv2.IMREAD_COLOR)[..., ::-1]

    def slide(self, slide_id: str) -> Slide:
        """The slide. One that is read by byte ranges holds no file and stays; of others a process keeps OPEN_SLIDES."""
        held = self._held.get(slide_id)
        if held is not None:
            return held
        row = self._row(slide_id)
        if row.reader == "ranges":
            return self._held.setdefault(slide_id, self._slide(row))
        return _OPEN.get((row.path, row.mpp, row.tag), lambda: self._slide(row))

    def _slide(self, row) -> Slide:
        downsamples, scales = _numbers(row.levels, float), _numbers(row.scales, int)
        tiles = self.tiles if row.reader == "ranges" else None
        first = row.first_level if tiles is not None else 0
        size = row.width_px, row.height_px, row.mpp
        version = row.tag, int(row.bytes)
        return Slide(row.path, *size, downsamples, tiles, first, scales, version, fallback=row.fallback)

    def subset(self, which) -> SlideIndex:
        """Fewer slides of the same folder: a query ("role == 'pretrain'"), a mask over `slides`, or slide_ids."""
        fewer = SlideIndex(self.folder, select(self.slides, which))
        fewer._words, fewer._tiles = self._words, self._tiles
        return fewer

    def __len__(self) -> int:
        return len(self.slides)

    def __repr__(self) -> str:
        usable = int((self.slides["status"] == "ok").sum())
        return f"SlideIndex({usable} slides, {len(self) - usable} quarantined)"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_words": None, "_tiles": None, "_where": None, "_held": {}}

    def _stored(self, slide_id: str, what: str) -> np.ndarray:
        part = self.folder / "parts" / self._row(slide_id).part
        if not part.is_file():
            raise InputError(f"{part}, the scan of '{slide_id}', is gone; build the index again")
        with np.load(part, allow_pickle=False) as stored:
            return stored[what]

    def _row(self, slide_id: str):
        """A slide's row as a named tuple; the table is turned into rows once, for looking one up in it is slow."""
        if self._where is None:
            self._where = {row.slide_id: row for row in self.slides.itertuples(index=False)}
        if slide_id not in self._where:
            raise InputError(f"no slide '{slide_id}' in the index.{nearest(slide_id, self._where)}")
        row = self._where[slide_id]
        if row.status != "ok":
            raise InputError(f"slide '{slide_id}' is quarantined: {row.reason}")
        return row


@lru_cache(maxsize=1024)
def _numbers(text: str, kind: type) -> tuple:
    return tuple(map(kind, text.split()))


def _columns(rows: list[dict]) -> list[str]:
    """Every fact's name once: status and reason first, then as a usable slide lists them."""
    return ["status", "reason", *dict.fromkeys(key for row in rows for key in row if key not in ("status", "reason"))]


class _Open:
    """At most OPEN_SLIDES open slides of this process, least recently used first."""

    def __init__(self):
        self._slides: OrderedDict[tuple, Slide] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple, make: Callable[[], Slide]) -> Slide:
        """The slide kept under (path, mpp, tag), or a new one."""
        with self._lock:
            slide = self._slides.pop(key, None) or make()
            self._slides[key] = slide
            if len(self._slides) > OPEN_SLIDES:
                self._slides.popitem(last=False)  # closed when the last reader lets go of it
            return slide


_OPEN = _Open()


def _cohort_key(cohort: Cohort) -> str:
    text = "\n".join(f"{row.slide_id}\t{row.path}\t{getattr(row, 'mpp', '')}" for row in cohort)
    return f"{cohort.name}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def _checked(folder: Path) -> bool:
    """Whether the index in a folder has checksums, so that whoever opens it next does not make it anew without."""
    about = folder / "index.json"
    return about.is_file() and bool(read_json(about).get("checksums"))


def _part(identity: str, mpp, checksums: bool) -> str:
    """Name of the finished scan of one version of a file."""
    return f"{hashlib.blake2b(f'{VERSION} {identity} {mpp} {checksums}'.encode(), digest_size=16).hexdigest()}.npz"


def _keep(parts: Path, name: str, found: dict) -> Path:
    with atomic(parts / name) as file:
        np.savez(file, **found)
    return parts / name


def _workers(size: int, workers: int | None, scheduler: str | None) -> int:
    """Processes on this machine for files of `size` bytes together."""
    if scheduler and workers is not None:
        raise InputError(
            f"workers={workers} are of this machine and scheduler={scheduler} has its own; give one of them"
        )
    if scheduler or workers is not None:
        return workers or 0
    return (os.cpu_count() or 1) if size > WORTH_PROCESSES else 0


def _crash(path: str, *_) -> str:
    return f"{scan.shown_name(path)} crashes its reader; fetch the file again or leave it out"


def _merge(cohort: Cohort, folder: Path, found: dict[str, Path | str], checksums: bool) -> None:
    """Write slides.csv, the arrays and, last, index.json from the parts; nothing where they are there already.

    One part is in memory at a time.
    """
    rows, parts, words, levels = [], [], 0, 0
    for row in cohort:
        result = found[row.slide_id]
        if isinstance(result, str):
            rows.append({"status": "quarantined", "reason": result})
            continue
        with np.load(result, allow_pickle=False) as part:
            facts = {key: part[key].item() for key in part.files if key not in ARRAYS}
            rows.append({"status": "ok", **facts, "part": result.name, "mask_start": words, "first_level": levels})
            words, levels = words + len(part["mask"]), levels + len(part["tilemap.levels"])
        parts.append(result)
    reasons = [row["reason"] for row in rows if row["status"] != "ok"]
    if len(reasons) == len(rows):
        raise InputError(
            f"none of the {len(rows)} slides of {cohort.name} can be used. The first: " + "; ".join(reasons[:3])
        )
    facts = pd.DataFrame(rows).reindex(columns=_columns(rows))
    facts[WHOLE] = facts[WHOLE].astype("Int64")
    kept = cohort.table.drop(columns=[column for column in facts if column in cohort.table])
    table = pd.concat([kept, facts], axis=1).to_csv(index=False)
    content = hashlib.blake2b("".join([table, *map(str, found.values())]).encode(), digest_size=16).hexdigest()
    about = {"version": VERSION, "cohort": cohort.name, "slides": len(rows), "content": content, "checksums": checksums}
    if (folder / "index.json").is_file() and read_json(folder / "index.json") == about:
        return
    with explained(folder / "index.json"), FileLock(folder / ".lock"):
        (folder / "index.json").unlink(missing_ok=True)  # so that no mixture of two indexes is ever opened
        with contextlib.ExitStack() as files:
            names = {"mask": "masks.npy"} | {name: f"{name}.npy" for name in tilemap.FILES}
            _append({name: files.enter_context(atomic(folder / file)) for name, file in names.items()}, parts)
        with atomic(folder / "slides.csv", "w") as file:
            file.write(table)
        write_json(folder / "index.json", about)


def _append(files: dict[str, IO], parts: Iterable[Path]) -> None:
    """Write each array of all parts, one after another, as one .npy."""
    before = Shift()
    lengths, dtypes = dict.fromkeys(files, 0), dict.fromkeys(files)
    for file in files.values():
        file.write(bytes(HEADER_BYTES))
    for path in parts:
        with np.load(path, allow_pickle=False) as part:
            tiles = TileMap(*(part[name] for name in tilemap.FILES))
            arrays = {"mask": part["mask"], **scan.named(before.move(tiles))}
            before = before.after(tiles)
        for name, array in arrays.items():
            files[name].write(np.ascontiguousarray(array).view(np.uint8).data)
            lengths[name], dtypes[name] = lengths[name] + len(array), array.dtype
    for name, file in files.items():
        file.seek(0)
        about = {"descr": np.lib.format.dtype_to_descr(dtypes[name]), "fortran_order": False, "shape": (lengths[name],)}
        text = repr(about).encode().ljust(HEADER_BYTES - 11) + b"\n"
        file.write(np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text)
