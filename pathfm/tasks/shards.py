"""Images inside the Parquet shards that Hugging Face gives out, read where they lie.

The hub's image type is a struct of `bytes` (the encoded file) and `path`; a split of N shards lies in the files
data/<split>-<number>-of-<N>.parquet (huggingface.co/docs/hub/datasets-image, and what `datasets` writes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl

from pathfm.benchmarks import QUARANTINE, TileSet, decode, probe, threads
from pathfm.errors import InputError
from pathfm.storage import progress

NAME = re.compile(r"(?P<split>\w+)-(?P<number>\d{5})-of-(?P<of>\d{5})(-[0-9a-f]+)?\.parquet")
BLOCK = 256  # images read at once while they are checked, some 5 MB


@dataclass(frozen=True, repr=False)
class ShardTiles(TileSet):
    """Tiles inside Parquet shards: the table's column `path` is the shard and `row` the place in it."""

    def image(self, row: int) -> np.ndarray:
        """(h, w, 3) uint8. Raises InputError where the shard changed since it was checked."""
        return self._read(self.table.iloc[[row]])[0]

    def images(self, batch_size: int = 64) -> Iterator[list[np.ndarray]]:
        """Batches of images in the table's order."""
        for start in range(0, len(self), batch_size):
            yield self._read(self.table.iloc[start : start + batch_size])

    def _read(self, table: pd.DataFrame) -> list[np.ndarray]:
        with ThreadPoolExecutor(threads()) as pool:
            try:
                return list(pool.map(decode, encoded(table)))
            except OSError as error:
                raise InputError(f"a tile of {self.name} could be read before and now cannot ({error})") from None


def find(folder: str | Path) -> list[Path]:
    """The shards in `folder` or `folder`/data, in order; [] where there is none.

    Raises InputError where their numbers say that some are missing, naming the first.
    """
    folder = Path(folder).expanduser()
    named = [
        (match, path) for path in [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")] if (match := _of(path))
    ]
    if not named:
        return []
    count, found = max(int(match["of"]) for match, _ in named), {int(match["number"]): path for match, path in named}
    lacking = sorted(set(range(count)) - set(found))
    if lacking:
        match, path = named[0]
        raise InputError(
            f"{path.parent} is a partial download: {len(lacking)} of {count} shards are missing, first "
            f"{match['split']}-{lacking[0]:05}-of-{count:05}.parquet"
        )
    return [found[number] for number in sorted(found)]


def _of(path: Path) -> re.Match | None:
    return NAME.fullmatch(path.name)


def table(paths: Sequence[Path], columns: Sequence[str], image: str = "image") -> pd.DataFrame:
    """A row an image: path (of the shard), row (in it) and the columns, as text; no image is read.

    Raises InputError for a shard that is cut off, or lacks a column or the images' bytes.
    """
    parts = []
    for path in paths:
        there = _collect(path, pl.LazyFrame.collect_schema)
        lacking = [column for column in (image, *columns) if column not in there]
        if lacking:
            raise InputError(f"{path} has no column '{lacking[0]}'; found: {', '.join(there)}")
        kind = there[image]
        if not (isinstance(kind, pl.Struct) and pl.Field("bytes", pl.Binary) in kind.fields):
            raise InputError(f"{path}: column {image} is {kind}, not images as the hub stores them (bytes and path)")
        texts = [pl.col(column).cast(pl.String).fill_null("") for column in columns]
        frame = _collect(path, lambda scan, texts=texts: scan.select(texts).collect())
        part = pd.DataFrame({column: frame[column].to_list() for column in columns}, dtype=object)
        parts.append(part.assign(path=str(path), row=np.arange(len(part))))
    return pd.concat(parts, ignore_index=True)


def encoded(table: pd.DataFrame, image: str = "image") -> list[bytes]:
    """The encoded images of a table with columns path and row, in its order; b"" where the shard has none."""
    found: dict[int, bytes] = {}
    for path, rows in table.groupby("path", sort=False)["row"]:
        first, count = int(rows.min()), int(rows.max() - rows.min()) + 1
        pieces = [(first, count)] if count <= 4 * len(rows) else [(int(row), 1) for row in rows]
        at: dict[int, bytes] = {}
        for start, length in pieces:
            take = pl.col(image).struct.field("bytes")
            read = _collect(path, lambda scan, a=start, n=length, take=take: scan.slice(a, n).select(take).collect())
            at |= {start + i: data or b"" for i, data in enumerate(read["bytes"].to_list())}
        found |= {index: at.get(row, b"") for index, row in rows.items()}
    return [found[index] for index in table.index]


def check(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every image decoded once, as `benchmarks.decode_all` does with files: the good rows, and those quarantined."""
    table, found = table.reset_index(drop=True), []
    with ThreadPoolExecutor(threads()) as pool:
        for start in progress(range(0, len(table), BLOCK), "checking images", unit="block"):
            found += pool.map(probe, encoded(table.iloc[start : start + BLOCK]))
    columns = ("digest", "width_px", "height_px", "reason")
    checked = table.assign(**dict(zip(columns, zip(*found, strict=True), strict=True)))
    good = checked["reason"] == ""
    return checked[good].drop(columns="reason").reset_index(drop=True), checked.loc[~good, QUARANTINE]


def _collect(path: str | Path, take):
    """take(lazy frame) of a shard. Raises InputError where it is missing, cut off or a pointer to the file."""
    try:
        return take(pl.scan_parquet(path, glob=False))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(
            f"{path} is no whole Parquet file ({str(error).splitlines()[0]}); download it again, by git with git-lfs"
        ) from None
