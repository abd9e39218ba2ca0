"""Images that are no tissue, drawn from a formula: an honest stand-in for ImageNet where it cannot be had.

A backbone pretrained on them is called "non-histology initialisation" everywhere, never ImageNet.
"""

from __future__ import annotations

import sys

import cv2
import numpy as np

from pathfm.stream import Tile


class DeadLeaves:
    """An endless stream of textured dead-leaves images, index-addressed like a TileStream.

    Shapes of power-law size occlude one another and carry 1/f texture; Baradad et al. 2021, "Learning to see by
    looking at noise", found such images to be the best statistical stand-in for photographs.
    image i is a pure function of (seed, i): (tile_px, tile_px, 3) uint8
    """

    def __init__(self, tile_px: int = 256, seed: int = 0, shapes: int = 150):
        self.tile_px, self.seed, self.shapes = tile_px, seed, shapes

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: int) -> Tile:
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, i], np.uint64)))
        image = self._leaves(rng)
        return Tile(image, "dead-leaves", 0, 0, float("nan"), 1.0, False, int(i))

    def __getitems__(self, indices: list[int]) -> list[Tile]:
        return [self[i] for i in indices]

    def _leaves(self, rng: np.random.Generator) -> np.ndarray:
        side = self.tile_px
        canvas = np.full((side, side, 3), rng.uniform(0, 255, 3), np.float32)
        texture = pink_noise(rng, side)
        # Radii follow p(r) ~ r^-3 between 1/50 and 1/3 of the side, which makes the image scale-invariant.
        low, high = side / 50, side / 3
        radii = 1 / np.sqrt(1 / low**2 - rng.random(self.shapes) * (1 / low**2 - 1 / high**2))
        for radius in radii:
            mask = np.zeros((side, side), np.uint8)
            centre = rng.uniform(0, side, 2)
            cv2.fillPoly(mask, [self._outline(rng, centre, radius)], 1, lineType=cv2.LINE_8)
            inside = mask.astype(bool)
            shift = rng.integers(0, side, 2)
            grain = np.roll(texture, tuple(shift), (0, 1))[inside, None]
            canvas[inside] = rng.uniform(0, 255, 3) + rng.uniform(0, 45) * grain
        return np.clip(canvas, 0, 255).astype(np.uint8)

    @staticmethod
    def _outline(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
        """A disk or a polygon of 3 to 6 corners around `centre`."""
        corners = int(rng.choice([3, 4, 5, 6, 32]))
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 32 else np.linspace(0, 2 * np.pi, 32)
        around = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return np.round(centre + radius * around).astype(np.int32)


def pink_noise(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side) float32 noise with a 1/f amplitude spectrum, mean 0, standard deviation 1."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    spectrum = (rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)) / frequency
    noise = np.fft.irfft2(spectrum, s=(side, side))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)
