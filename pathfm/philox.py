"""Random numbers by key and counter, with no state: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"). The lower half of the counter is a tile's number or a round's, the upper half says what for."""

from __future__ import annotations

import numpy as np

from pathfm.kernels import kernel

ROUNDS = 40  # of swap-or-not; each halves what is left of the order before
SLIDE, MPP, PLACE, RANK, PAIR, KEEP, START = (np.uint64(k << 32) for k in range(7))  # purposes
_LOW, _HALF, _ONE = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(1)


@kernel()
def philox(key: np.uint64, low: np.uint64, high: np.uint64):
    """Two 64-bit random words for a 64-bit key and a 128-bit counter (low, high)."""
    c0, c1, c2, c3 = low & _LOW, low >> _HALF, high & _LOW, high >> _HALF
    k0, k1 = key & _LOW, key >> _HALF
    for _ in range(10):
        one, two = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (two >> _HALF) ^ c1 ^ k0, two & _LOW, (one >> _HALF) ^ c3 ^ k1, one & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return c0 | (c1 << _HALF), c2 | (c3 << _HALF)


@kernel()
def fair(word: np.uint64, number: np.uint64) -> bool:
    """Whether word % number is unbiased: the first 2^64 mod number words are redrawn."""
    return word >= (np.uint64(0) - number) % number


@kernel()
def below(key, i, purpose, number):
    """A whole number in [0, number), every one equally likely."""
    counter, number = purpose, np.uint64(number)
    word, _ = philox(key, i, counter)
    while not fair(word, number):
        counter += _ONE
        word, _ = philox(key, i, counter)
    return np.int64(word % number)


@kernel()
def unit(key, i, purpose) -> float:
    """A number in [0, 1) with 53 random bits."""
    word, _ = philox(key, i, purpose)
    return np.float64(np.int64(word >> np.uint64(11))) * 2.0**-53


@kernel()
def permuted(key, turn, j, number):
    """Where j goes in permutation number `turn` of range(number).

    Swap-or-not (Hoang, Morris, Rogaway 2012): any number of slides, no table, the same cost for 10 as for 30,000.
    """
    for k in range(ROUNDS):
        draw = SLIDE + np.uint64(2 * k)
        word, _ = philox(key, turn, draw)
        other = np.int64(word % np.uint64(number)) - j
        if other < 0:
            other += number
        pair = np.uint64(max(j, other))
        coin, _ = philox(key ^ (pair << _HALF) ^ pair, turn, draw + _ONE)
        if coin & _ONE:
            j = other
    return j
