"""Tiles by their pixels: the colour filter of Midnight."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from pathfm.errors import InputError, nearest


@dataclass(frozen=True)
class HsvFilter:
    """Accepts a tile of which at least `share` of the pixels lie in all three ranges, ends included.

    hue, saturation, value   in OpenCV's units for 8 bits: hue 0..179 (two degrees each), the others 0..255
    share                    of the tile's pixels
    redraws                  positions tried after the first before the last one is kept though it fails; [ours]

    The defaults are Midnight's (arXiv 2504.05186), which took them from Virchow (arXiv 2309.07778). What Midnight draws
    anew after a rejection is not known; here slide and mpp stay, so that their shares are those declared.
    """

    hue: tuple[int, int] = (90, 180)
    saturation: tuple[int, int] = (8, 255)
    value: tuple[int, int] = (103, 255)
    share: float = 0.6
    redraws: int = 16

    def __post_init__(self):
        for name in ("hue", "saturation", "value"):
            pair = getattr(self, name)
            if not (len(pair) == 2 and 0 <= pair[0] <= pair[1] <= 255):
                raise InputError(f"HsvFilter: {name}={pair!r} must be two rising numbers between 0 and 255")
        if not 0 <= self.share <= 1:
            raise InputError(f"HsvFilter: share={self.share!r} is no share between 0 and 1")
        if not (isinstance(self.redraws, int) and 0 <= self.redraws < 2**15):
            raise InputError(f"HsvFilter: redraws={self.redraws!r} must be a whole number from 0 to {2**15 - 1}")

    @classmethod
    def of(cls, given: HsvFilter | str | None) -> HsvFilter | None:
        """A filter, "midnight" or None."""
        if given is None or given == "" or isinstance(given, cls):
            return given or None
        if given != "midnight":
            raise InputError(f"tile_filter={given!r} is unknown.{nearest(given, ['midnight'])}")
        return cls()

    def __call__(self, image: np.ndarray) -> bool:
        """Whether an image (h, w, 3) uint8 passes."""
        low, high = zip(self.hue, self.saturation, self.value, strict=True)
        inside = cv2.inRange(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV), low, high)
        return cv2.countNonZero(inside) >= self.share * inside.size
