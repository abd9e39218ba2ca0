"""Resampling to any scale and position: Keys' cubic, widened where it shrinks so that nothing aliases."""

from __future__ import annotations

import math

import numpy as np

from pathfm.kernels import kernel

REACH = 2  # output pixels to either side, of the filter
TAPS = 2 * REACH  # source pixels in the filter where it does not shrink
STRIP = 32  # rows resampled together
ROUND = np.float32(0.5)  # to the nearest


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
    if _alike(first_x, weights_x) and weights_x.shape[1] == TAPS <= min(source.shape[:2]):
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
    """`_apply` where all pixels of a row have the same TAPS weights: both passes line by line, nothing turned."""
    rows, width, start = len(out), 3 * out.shape[1], 3 * first_x[0]
    lines, pixels = source.reshape(len(source), -1)[:, start:], out.reshape(rows, width)
    line = np.empty(width + 9, np.float32)  # three pixels more than `out` has
    second, third, fourth = line[3:], line[6:], line[9:]
    a, b, c, d = weights_x[0, 0], weights_x[0, 1], weights_x[0, 2], weights_x[0, 3]
    for r in range(rows):
        e, f, g, h = weights_y[r, 0], weights_y[r, 1], weights_y[r, 2], weights_y[r, 3]
        p, q, s, t = lines[first_y[r]], lines[first_y[r] + 1], lines[first_y[r] + 2], lines[first_y[r] + 3]
        for n in range(width + 9):
            line[n] = ROUND + (e * p[n] + f * q[n]) + (g * s[n] + h * t[n])
        row = pixels[r]
        for n in range(width):
            row[n] = _grey((a * line[n] + b * second[n]) + (c * third[n] + d * fourth[n]))


@kernel(fastmath=True)
def _apply(source, first_x, weights_x, first_y, weights_y, out):
    """Down the columns, then along the rows, both as sums of whole lines, which the processor adds eight at a time.

    STRIP rows of output at once, turned between the two passes with the three colours of a pixel kept together.
    """
    (height, width), (rows, columns), taps = source.shape[:2], out.shape[:2], weights_x.shape[1]
    lines, strip = source.reshape(height, width * 3), np.zeros((STRIP, width * 3), np.float32)
    sums, turned = np.empty(STRIP * 3, np.float32), np.empty((width, STRIP * 3), np.float32)
    pixels, flat = np.empty((columns, STRIP * 3), np.uint8), out.reshape(rows, columns * 3)
    for top in range(0, rows, STRIP):
        number = min(STRIP, rows - top)
        for r in range(number):
            first = first_y[top + r]
            _weighted(strip[r], weights_y[top + r], lines[first : first + taps])
        _turn(strip, turned)
        for i in range(columns):
            _across(sums, weights_x[i], turned, first_x[i])
            for n in range(STRIP * 3):
                pixels[i, n] = _grey(sums[n])
        _turn(pixels, flat[top : top + number])


@kernel()
def _turn(lines, turned):
    """turned[x, 3 * r + c] = lines[r, 3 * x + c] for the three colours of each pixel, of as many as both have."""
    for x in range(len(turned)):
        row = turned[x]
        for r in range(min(len(lines), len(row) // 3)):
            row[3 * r] = lines[r, 3 * x]
            row[3 * r + 1] = lines[r, 3 * x + 1]
            row[3 * r + 2] = lines[r, 3 * x + 2]


@kernel(fastmath=True)
def _weighted(sums, weights, lines):
    """Fill `sums` with ROUND and the weighted sum of lines: four at a time, so that sums are seldom stored."""
    sums[:] = ROUND
    k = 0
    while k + 4 <= len(lines):
        a, b, c, d = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        p, q, s, t = lines[k], lines[k + 1], lines[k + 2], lines[k + 3]
        for n in range(len(sums)):
            sums[n] += (a * np.float32(p[n]) + b * np.float32(q[n])) + (c * np.float32(s[n]) + d * np.float32(t[n]))
        k += 4
    while k < len(lines):
        if weights[k] != 0:
            a, p = weights[k], lines[k]
            for n in range(len(sums)):
                sums[n] += a * np.float32(p[n])
        k += 1


@kernel(fastmath=True)
def _across(sums, weights, lines, first):
    """`_weighted` of STRIP pixels that hold ROUND: in half the time, for their number is known when compiled."""
    sums[:] = 0
    k, taps = 0, min(len(weights), len(lines) - first)
    while k + 4 <= taps:
        a, b, c, d = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        p, q, s, t = lines[first + k], lines[first + k + 1], lines[first + k + 2], lines[first + k + 3]
        for n in range(STRIP * 3):
            sums[n] += (a * p[n] + b * q[n]) + (c * s[n] + d * t[n])
        k += 4
    while k < taps:
        a, p = weights[k], lines[first + k]
        for n in range(STRIP * 3):
            sums[n] += a * p[n]
        k += 1


@kernel(fastmath=True)
def _grey(value):
    return np.int32(min(max(value, np.float32(0)), np.float32(255)))
