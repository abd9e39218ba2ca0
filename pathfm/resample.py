"""Resampling to any scale and position: Keys' cubic, widened where it shrinks so that nothing aliases."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

REACH = 2  # output pixels to either side, of the filter
STRIP = 32  # rows resampled together


def extent(start: float, step: float, number: int) -> tuple[int, int]:
    """First and one past the last source pixel that `number` output pixels need along one axis; see `resample`."""
    reach = REACH * max(step, 1.0)
    first = start + 0.5 * step - reach
    last = start + (number - 0.5) * step + reach
    return math.floor(first - 0.5) + 1, math.ceil(last - 0.5)


def resample(source: np.ndarray, left: float, top: float, step: float, out: np.ndarray) -> np.ndarray:
    """Fill out (h, w, 3) uint8 from source (H, W, 3) uint8 at `step` source pixels per output pixel, and return it.

    left, top   of out's upper-left corner in source pixels, from the source's own corner; both count the edges of
                pixels, so that output pixel i is centred on left + (i + 0.5) * step

    The filter is the cubic convolution of Keys 1981 with a = -0.5 along each axis, its argument divided by `step`
    where that is over 1, its weights summing to 1; in float32, rounded once. Beyond the source the filter is cut off
    and its weights scaled up: `extent` says what a source must hold so that this does not happen.
    """
    across = _weights(left, step, out.shape[1], source.shape[1])
    down = _weights(top, step, out.shape[0], source.shape[0])
    _apply(source, *across, *down, out)
    return out


@njit(cache=True, nogil=True)
def _weights(start, step, number, length):
    """(first source pixel (number,), weights (number, taps) float32) of each output pixel."""
    stretch = max(step, 1.0)
    reach = REACH * stretch
    taps = int(math.ceil(2 * reach))
    first = np.empty(number, np.int64)
    weights = np.zeros((number, taps), np.float32)
    for i in range(number):
        centre = start + (i + 0.5) * step
        low = min(max(int(math.floor(centre - reach - 0.5)) + 1, 0), max(length - taps, 0))
        first[i] = low
        total = 0.0
        for k in range(min(taps, length - low)):
            t = abs(low + k + 0.5 - centre) / stretch
            if t < 1:
                weight = (1.5 * t - 2.5) * t * t + 1
            elif t < 2:
                weight = ((-0.5 * t + 2.5) * t - 4) * t + 2
            else:
                weight = 0.0
            weights[i, k] = weight
            total += weight
        weights[i] /= total
    return first, weights


@njit(cache=True, nogil=True, fastmath=True)
def _apply(source, first_x, weights_x, first_y, weights_y, out):
    """Down the columns, then along the rows, both as sums of whole lines, which the processor adds eight at a time.

    STRIP rows of output at once, turned between the two passes with the three colours of a pixel kept together.
    """
    (height, width), (rows, columns) = source.shape[:2], out.shape[:2]
    lines = source.reshape(height, width * 3)
    line, sums = np.empty(width * 3, np.float32), np.empty(STRIP * 3, np.float32)
    turned, pixels = np.empty((width, STRIP * 3), np.float32), np.empty((columns, STRIP * 3), np.uint8)
    for top in range(0, rows, STRIP):
        for r in range(min(STRIP, rows - top)):
            line[:] = 0.5  # rounds to the nearest
            for k in range(weights_y.shape[1]):
                y, weight = first_y[top + r] + k, weights_y[top + r, k]
                if weight != 0:
                    _add(line, weight, lines[y])
            for x in range(width):
                turned[x, 3 * r], turned[x, 3 * r + 1], turned[x, 3 * r + 2] = line[3 * x : 3 * x + 3]
        for i in range(columns):
            sums[:] = 0
            for k in range(weights_x.shape[1]):
                weight = weights_x[i, k]
                if weight != 0:
                    _add(sums, weight, turned[first_x[i] + k])
            for n in range(STRIP * 3):
                pixels[i, n] = np.int32(min(max(sums[n], np.float32(0)), np.float32(255)))
        for r in range(min(STRIP, rows - top)):
            for i in range(columns):
                for c in range(3):
                    out[top + r, i, c] = pixels[i, 3 * r + c]


@njit(cache=True, nogil=True, fastmath=True)
def _add(sums, weight, values):
    for n in range(len(sums)):
        sums[n] += weight * np.float32(values[n])
