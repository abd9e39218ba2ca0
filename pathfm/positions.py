"""The admissible positions of a square on a tissue mask: area covered, exact count, the k-th one.

A mask cell is `cell` x `cell` level-0 pixels, and a square of `side` level-0 pixels may start at any multiple
of `grid`. Areas are in level-0 pixels squared and exact while side is whole. Within a rectangle of positions
whose four corners stay in the same cells the covered area is bilinear in x and y, so it is extreme at the
rectangle's corners and monotone along a row: counting never visits the positions one by one.
"""

from __future__ import annotations

import math

import numpy as np

from pathfm.kernels import kernel

SLACK = 1e-9  # of the square's area: a position at exactly min_tissue stays in whatever the rounding
BLOCKS = 64  # of a summary, across and down: a word a row
_ONE, _FULL = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)


def pack(mask: np.ndarray) -> np.ndarray:
    """A (h, w) bool mask as (h, ceil(w / 64)) uint64, bit k of word j being column 64 j + k."""
    height, width = mask.shape
    words = -(-width // 64)
    padded = np.zeros((height, words * 64), bool)
    padded[:, :width] = mask
    return np.packbits(padded, axis=1, bitorder="little").view("<u8")


def unpack(words: np.ndarray, width: int) -> np.ndarray:
    """The (h, width) bool mask that `pack` packed."""
    rows = np.ascontiguousarray(words).view(np.uint8)
    return np.unpackbits(rows, axis=1, bitorder="little", count=width).astype(bool)


def integral(mask: np.ndarray) -> np.ndarray:
    """(h + 1, w + 1) int64: the number of True cells above and left of each cell corner."""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    np.cumsum(np.cumsum(mask, axis=0, dtype=np.int64), axis=1, out=sums[1:, 1:])
    return sums


def span(length_px: int, side: float, grid: int) -> int:
    """How many multiples of `grid` a square of `side` can start at within `length_px`."""
    return max(0, math.floor((length_px - side) / grid + 1e-9) + 1)


def least_area(side: float, min_tissue: float) -> float:
    """The area (level-0 px squared) that must be tissue under an admissible square."""
    return min_tissue * side * side - SLACK * side * side


def count(mask: np.ndarray, cell: int, size_px: tuple[int, int], side: float, grid: int, min_tissue: float) -> int:
    """The exact number of admissible positions on a (h, w) bool mask of a slide of size_px (width, height)."""
    columns, rows = (span(length, side, grid) for length in size_px)
    return int(search(integral(mask), cell, columns, rows, side, grid, least_area(side, min_tissue), -1)[0])


def kth(
    mask: np.ndarray, cell: int, size_px: tuple[int, int], side: float, grid: int, min_tissue: float, k: int
) -> tuple[int, int]:
    """The k-th admissible position (x, y), level-0 px, in the fixed order in which `count` counts them."""
    columns, rows = (span(length, side, grid) for length in size_px)
    found = search(integral(mask), cell, columns, rows, side, grid, least_area(side, min_tissue), k)
    if found[1] < 0:
        raise IndexError(f"position {k} of {found[0]}")
    return int(found[1]), int(found[2])


@kernel()
def _bits(word: np.uint64) -> np.int64:
    word = word - ((word >> _ONE) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel()
def _bits_between(words, start, first, stop) -> np.int64:
    """How many of the bits first..stop-1 of the row that begins at words[start] are set."""
    if stop <= first:
        return 0
    one, last = first >> 6, (stop - 1) >> 6
    head = _FULL << np.uint64(first & 63)
    tail = _FULL >> np.uint64(63 - ((stop - 1) & 63))
    if one == last:
        return _bits(words[start + one] & head & tail)
    total = _bits(words[start + one] & head) + _bits(words[start + last] & tail)
    for j in range(one + 1, last):
        total += _bits(words[start + j])
    return total


@kernel()
def covered(words, start, stride, cell, x, y, side) -> float:
    """Tissue under the square at (x, y), read from the packed mask whose rows begin `stride` words apart."""
    return covered_box(words, start, stride, cell, x, y, side, side)


@kernel()
def covered_box(words, start, stride, cell, x, y, across, down) -> float:
    """`covered` for a rectangle."""
    right, bottom = x + across, y + down
    i0, j0 = x // cell, y // cell
    i1, j1 = math.ceil(right / cell) - 1, math.ceil(bottom / cell) - 1
    first_width = min(right, (i0 + 1) * cell) - x
    last_width = right - i1 * cell
    area = 0.0
    for j in range(j0, j1 + 1):
        row = start + j * stride
        width = first_width * _bits_between(words, row, i0, i0 + 1)
        if i1 > i0:
            width += last_width * _bits_between(words, row, i1, i1 + 1)
            width += cell * _bits_between(words, row, i0 + 1, i1)
        area += width * (min(bottom, (j + 1) * cell) - max(y, j * cell))
    return area


@kernel()
def summarise(words, start, stride, width, height, out):
    """Sets bit i of out[j], (BLOCKS,) uint64, where block (i, j) of a packed mask has tissue; returns a block's cells.

    A few bytes that tell most squares without tissue, where the mask itself would be fetched from memory.
    """
    block = -(-max(width, height) // BLOCKS)
    for row in range(height):
        found = out[row // block]
        for k in range(stride):
            word = words[start + row * stride + k]
            if not word:
                continue
            for i in range(64 * k // block, (64 * k + 63) // block + 1):
                low, high = max(i * block, 64 * k) - 64 * k, min((i + 1) * block, 64 * k + 64) - 64 * k
                if word & (_FULL << np.uint64(low)) & (_FULL >> np.uint64(64 - high)):
                    found |= _ONE << np.uint64(i)
        out[row // block] = found
    return block


@kernel()
def at_most(blocks, reach, x, y, side) -> float:
    """What `covered` does not exceed: the square's area over blocks with tissue, `reach` level-0 px wide."""
    right, bottom = x + side, y + side
    first, stop = x // reach, min(math.ceil(right / reach), BLOCKS)
    area = 0.0
    for j in range(y // reach, min(math.ceil(bottom / reach), BLOCKS)):
        row, width = blocks[j] >> np.uint64(first), 0.0
        for i in range(first, stop):
            if row & _ONE:
                width += min(right, (i + 1) * reach) - max(x, i * reach)
            row >>= _ONE
        area += width * (min(bottom, (j + 1) * reach) - max(y, j * reach))
    return area


@kernel()
def extent(words, start, stride, height):
    """The box of a packed mask's tissue in cells: left, top, right, bottom; all 0 where there is none."""
    left, top, right, bottom = stride * 64, -1, 0, 0
    for row in range(height):
        at = start + row * stride
        first, last = -1, -1
        for j in range(stride):
            if words[at + j]:
                last = j
                if first < 0:
                    first = j
        if first < 0:
            continue
        bottom = row + 1
        if top < 0:
            top = row
        if first * 64 < left:
            left = min(left, first * 64 + _lowest(words[at + first]))
        if last * 64 + 64 > right:
            right = max(right, last * 64 + _highest(words[at + last]) + 1)
    return (left, top, right, bottom) if bottom else (0, 0, 0, 0)


@kernel()
def _lowest(word: np.uint64) -> np.int64:
    """The number of the lowest bit that is set."""
    return _bits((word & (~word + _ONE)) - _ONE)


@kernel()
def _highest(word: np.uint64) -> np.int64:
    """The number of the highest bit that is set."""
    k = 0
    while word > _ONE:
        word >>= _ONE
        k += 1
    return k


@kernel()
def _sum_to(sums, cell, x, y) -> float:
    """Tissue left of x and above y."""
    i, j = min(int(x // cell), sums.shape[1] - 2), min(int(y // cell), sums.shape[0] - 2)
    u, v = x - i * cell, y - j * cell
    here = sums[j, i]
    along, down = sums[j, i + 1] - here, sums[j + 1, i] - here
    cross = sums[j + 1, i + 1] - here - along - down
    return cell * (cell * here + u * along + v * down) + u * v * cross


@kernel()
def _area(sums, cell, x, y, width, height) -> float:
    right, bottom = x + width, y + height
    return (
        _sum_to(sums, cell, right, bottom)
        - _sum_to(sums, cell, x, bottom)
        - _sum_to(sums, cell, right, y)
        + _sum_to(sums, cell, x, y)
    )


@kernel()
def _segments(first, number, cell, side, grid):
    """Starts k >= first of runs of positions grid * k whose two ends stay within the same cells, `number` last."""
    starts = [first]
    k = first
    while k < number:
        near = (grid * k) // cell + 1
        far = math.floor((grid * k + side) / cell) + 1
        step = min(-((-near * cell) // grid), math.ceil((far * cell - side) / grid))
        k = min(max(step, k + 1), number)
        starts.append(k)
    return np.array(starts)


@kernel()
def _row(sums, cell, side, grid, need, y, k0, k1):
    """The admissible run (first k, one past the last) of a row on which the area is monotone in k."""
    begins = _area(sums, cell, grid * k0, y, side, side) >= need
    ends = _area(sums, cell, grid * (k1 - 1), y, side, side) >= need
    if begins == ends:
        return (k0, k1) if begins else (k0, k0)
    low, high = k0, k1 - 1
    while high - low > 1:
        middle = (low + high) // 2
        if (_area(sums, cell, grid * middle, y, side, side) >= need) == begins:
            low = middle
        else:
            high = middle
    return (k0, high) if begins else (high, k1)


@kernel()
def search(sums, cell, columns, rows, side, grid, need, wanted, left=0, top=0):
    """(number of admissible positions, -1, -1), or (.., x, y) of number `wanted` where that is not negative.

    Positions are the multiples left..columns - 1 and top..rows - 1 of `grid`. Rectangles of runs are halved until the
    tissue under all their squares together decides them as a whole.
    """
    xs, ys = _segments(left, columns, cell, side, grid), _segments(top, rows, cell, side, grid)
    stack = [(0, len(xs) - 1, 0, len(ys) - 1)]
    total = 0
    while len(stack):
        i0, i1, j0, j1 = stack.pop()
        if i1 <= i0 or j1 <= j0:
            continue
        x, y = grid * xs[i0], grid * ys[j0]
        width, height = grid * (xs[i1] - 1) - x + side, grid * (ys[j1] - 1) - y + side
        tissue = _area(sums, cell, x, y, width, height)
        across, here = xs[i1] - xs[i0], (xs[i1] - xs[i0]) * (ys[j1] - ys[j0])
        if tissue < need:
            continue
        if width * height - tissue <= side * side - need:
            if 0 <= wanted < total + here:
                return total, x + grid * ((wanted - total) % across), y + grid * ((wanted - total) // across)
            total += here
        elif i1 - i0 > 1 or j1 - j0 > 1:
            if i1 - i0 >= j1 - j0:
                middle = (i0 + i1) // 2
                stack.append((middle, i1, j0, j1))
                stack.append((i0, middle, j0, j1))
            else:
                middle = (j0 + j1) // 2
                stack.append((i0, i1, middle, j1))
                stack.append((i0, i1, j0, middle))
        else:
            for k in range(ys[j0], ys[j1]):
                first, stop = _row(sums, cell, side, grid, need, grid * k, xs[i0], xs[i1])
                if 0 <= wanted < total + stop - first:
                    return total, grid * (first + wanted - total), grid * k
                total += stop - first
    return total, -1, -1
