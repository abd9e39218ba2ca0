"""Tiles without slides: four kinds of stripes, a stream that is a pure function of i, and a labelled set of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

COLOURS = np.array([[0.8, 0.3, 0.6], [0.6, 0.2, 0.5], [0.9, 0.6, 0.8], [0.4, 0.3, 0.6]])
PERIODS_PX = (4, 8, 16, 32)


class Tile(NamedTuple):
    image: np.ndarray
    slide_id: str
    x: int
    y: int
    mpp: float
    i: int


class StructuredTiles:
    """stream[i] is a tile whose kind, colour, angle and phase are drawn from (seed, i)."""

    def __init__(
        self, tile_px: int = 36, seed: int = 0, length: int = 10**9, seconds: float = 0.0, breaks_at: int = -1
    ):
        self.tile_px, self.seed, self.length, self.seconds, self.breaks_at = tile_px, seed, length, seconds, breaks_at

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Tile:
        if i == self.breaks_at:
            raise KeyboardInterrupt
        time.sleep(self.seconds)
        generator = np.random.Generator(np.random.Philox(key=[self.seed, i]))
        kind, angle = generator.integers(4), generator.uniform(0, np.pi)
        y, x = np.mgrid[: self.tile_px, : self.tile_px]
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / PERIODS_PX[kind])
        image = (0.6 + 0.3 * wave)[..., None] * COLOURS[kind] + generator.normal(0, 0.03, (*wave.shape, 3))
        image = (np.clip(image, 0, 1) * 255).astype(np.uint8)
        return Tile(image, f"slide{kind}", int(i), 0, float(generator.choice([1.0, 2.0])), int(i))


class LabelledTiles:
    """Enough of a TileSet: images of structured tiles with labels, roles, patients, two centres and their mpp."""

    def __init__(
        self, folder: Path, roles: tuple[str, ...] = ("probe-train", "validate", "test"), n: int = 60, tile_px: int = 36
    ):
        rows = []
        for i in range(n):
            tile = StructuredTiles(tile_px, seed=2)[i]
            Image.fromarray(tile.image).save(folder / f"{i}.png")
            about = {"role": roles[i % len(roles)], "patient_id": f"p{i % 12}", "centre": f"c{i % 12 % 2}"}
            rows.append({"path": str(folder / f"{i}.png"), "label": tile.slide_id, "mpp": tile.mpp, **about})
        self.table = pd.DataFrame(rows)
