"""A CSV file that grows by a row a step and is cut back where a run resumes."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from pathfm.storage import atomic, explained


class Logbook:
    """Rows at `path`, the first column `step`. Opened at a step it forgets what a killed run wrote after it."""

    def __init__(self, path: str | Path, step: int):
        self.path = Path(path)
        lines = self.path.read_text().splitlines(keepends=True) if step and self.path.exists() else []
        kept = lines[:1] + [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= step]
        with atomic(self.path, "w") as file:
            file.writelines(kept)
        self._file = open(self.path, "a")  # noqa: SIM115 (closed by `close`)
        self._empty = not kept

    def add(self, row: dict[str, float]) -> None:
        """Appends a row; floats read back to the same bits. Raises InputError where the disk is full."""
        header = ",".join(row) + "\n" if self._empty else ""
        with explained(self.path):
            self._file.write(header + ",".join(map(repr, row.values())) + "\n")
            self._file.flush()
        self._empty = False

    def settle(self) -> None:
        """The rows so far are on the disk: a checkpoint may count on them."""
        with explained(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: str | Path) -> pd.DataFrame:
    """The rows at `path`; none where nothing was written."""
    path = Path(path)
    return pd.read_csv(path) if path.exists() and path.stat().st_size else pd.DataFrame({"step": []}, dtype=int)
