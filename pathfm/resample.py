"""Resampling to any scale and position: Keys' cubic, widened where it shrinks so that nothing aliases."""

from __future__ import annotations

import math

import numpy as np

from pathfm.kernels import kernel

REACH = 2  # output pixels to either side, of the filter
STRIP = 32  # rows resampled together


def extent(start: float, step: float, number: int) -> tuple[int, int]:
    """First and one past the last source pixel that `number` output pixels need along one axis; see `resample`."""
    reach = REACH * max(step, 1.0)
    first = start + 0.5 * step - reach
    last = start + (number - 0.5) * step + reach
    return math.floor(first - 0.5) + 1, math.ceil(last - 0.5)


@kernel()
def resample(source: np.ndarray, left: float, top: float, step: float, out: np.ndarray) -> np.ndarray:
    """Fill out (h, w, 3) uint8 from source (H, W, 3) uint8 at `step` source pixels per output pixel, and return it.

    left, top   of out's upper-left corner in source pixels, from the source's own corner; both count the edges of
                pixels, so that output pixel i is centred on left + (i + 0.5) * step

    The filter is the cubic convolution of Keys 1981 with a = -0.5 along each axis, its argument divided by `step`
    where that is over 1, its weights summing to 1; in float32, rounded once. Beyond the source the filter is cut off
    and its weights scaled up: `extent` says what a source must hold so that this does not happen.
    """
    first_x, weights_x = _weights(left, step, out.shape[1], source.shape[1])
    first_y, weights_y = _weights(top, step, out.shape[0], source.shape[0])
    if _alike(first_x, weights_x):
        _shift(source, first_x, weights_x, first_y, weights_y, out)
    else:
        _apply(source, first_x, weights_x, first_y, weights_y, out)
    return out


@kernel()
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


@kernel()
def _alike(first, weights):
    """Whether every output pixel is the same sum of its neighbours: at a step of 1."""
    for i in range(1, len(first)):
        if first[i] != first[0] + i:
            return False
        for k in range(weights.shape[1]):
            if weights[i, k] != weights[0, k]:
                return False
    return True


@kernel(fastmath=True)
def _shift(source, first_x, weights_x, first_y, weights_y, out):
    """`_apply` where all pixels of a row have the same weights: both passes are sums of whole lines."""
    (height, width), (rows, columns) = source.shape[:2], out.shape[:2]
    lines, pixels = source.reshape(height, width * 3), out.reshape(rows, columns * 3)
    line, sums = np.empty(width * 3, np.float32), np.empty(columns * 3, np.float32)
    for r in range(rows):
        _down(line, lines, first_y[r], weights_y[r])
        sums[:] = 0
        for k in range(weights_x.shape[1]):
            weight, start = weights_x[0, k], 3 * (first_x[0] + k)
            if weight != 0:
                _add(sums, weight, line[start : start + columns * 3])
        for n in range(columns * 3):
            pixels[r, n] = np.int32(min(max(sums[n], np.float32(0)), np.float32(255)))


@kernel(fastmath=True)
def _apply(source, first_x, weights_x, first_y, weights_y, out):
    """Down the columns, then along the rows, both as sums of whole lines, which the processor adds eight at a time.

    STRIP rows of output at once, turned between the two passes with the three colours of a pixel kept together.
    """
    (height, width), (rows, columns) = source.shape[:2], out.shape[:2]
    lines = source.reshape(height, width * 3)
    line, sums = np.empty(width * 3, np.float32), np.empty(STRIP * 3, np.float32)
    turned, pixels = np.zeros((width, STRIP * 3), np.float32), np.empty((columns, STRIP * 3), np.uint8)
    for top in range(0, rows, STRIP):
        number = min(STRIP, rows - top)
        for r in range(number):
            _down(line, lines, first_y[top + r], weights_y[top + r])
            for x in range(width):
                turned[x, 3 * r] = line[3 * x]
                turned[x, 3 * r + 1] = line[3 * x + 1]
                turned[x, 3 * r + 2] = line[3 * x + 2]
        for i in range(columns):
            sums[:] = 0
            for k in range(weights_x.shape[1]):
                weight = weights_x[i, k]
                if weight != 0:
                    _add_strip(sums, weight, turned[first_x[i] + k])
            for n in range(STRIP * 3):
                pixels[i, n] = np.int32(min(max(sums[n], np.float32(0)), np.float32(255)))
        for r in range(number):
            for i in range(columns):
                out[top + r, i, 0] = pixels[i, 3 * r]
                out[top + r, i, 1] = pixels[i, 3 * r + 1]
                out[top + r, i, 2] = pixels[i, 3 * r + 2]


@kernel(fastmath=True)
def _down(line, lines, first, weights):
    """Fill `line` with the weighted sum of lines from `first` on."""
    line[:] = 0.5  # rounds to the nearest
    for k in range(len(weights)):
        if weights[k] != 0:
            _add(line, weights[k], lines[first + k])


@kernel(fastmath=True)
def _add_strip(sums, weight, values):
    """`_add` for STRIP pixels: in half the time, for its length is known when it is compiled."""
    for n in range(STRIP * 3):
        sums[n] += weight * values[n]


@kernel(fastmath=True)
def _add(sums, weight, values):
    for n in range(len(sums)):
        sums[n] += weight * np.float32(values[n])
