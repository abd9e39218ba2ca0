"""Laws of mpp: which microns per pixel a tile has. A list of values with weights, or continuous between two.

`of` makes one from what a person writes: 0.5, (0.25, 0.5), {0.5: 1, 1: 3}, LogUniform(0.25, 2), or text: "0.25,0.5",
"0.5:1,1:3", "uniform(0.25, 2)", "loguniform(0.25, 2)", "maxavg(0.25, 2)", "minmax(0.25, 2)".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pathfm.errors import InputError, nearest

DECIMALS = 6  # of a drawn mpp, so that its name in a table is the value itself, on every machine
KNOTS = 8193  # of a distribution function without closed form
BINS = 8  # equal in log mpp, by which a continuous law is reported


@dataclass(frozen=True)
class Values:
    """Some values of mpp; weights sum to 1."""

    mpp: tuple[float, ...]
    share: tuple[float, ...]

    @property
    def low(self) -> float:
        return min(self.mpp)

    @property
    def high(self) -> float:
        return max(self.mpp)

    def __str__(self) -> str:
        if len(set(self.share)) == 1:
            return ", ".join(f"{value:g}" for value in self.mpp)
        return ", ".join(f"{value:g}:{share:.4g}" for value, share in zip(self.mpp, self.share, strict=True))


@dataclass(frozen=True)
class Continuous:
    """A law on [low, high] um/px. `cdf(x)` is P(mpp <= x), `before(x)` is P(mpp < x), `quantile` inverts the first."""

    low: float
    high: float

    def __post_init__(self):
        if not 0 < self.low < self.high < np.inf:
            raise InputError(f"{self}: give two numbers of um/px, 0 < low < high")

    def cdf(self, mpp):
        raise NotImplementedError

    def quantile(self, u):
        raise NotImplementedError

    def before(self, mpp):
        return self.cdf(mpp)

    def between(self, low: float, high: float) -> tuple[float, float]:
        """P(mpp < low) and P(mpp <= high): the law given low <= mpp <= high is `quantile` between the two."""
        return float(self.before(low)), float(self.cdf(high))

    @cached_property
    def bins(self) -> np.ndarray:
        """(BINS + 1,) edges, a bin holding its lower one, the last bin both."""
        edges = np.geomspace(self.low, self.high, BINS + 1)
        edges[[0, -1]] = self.low, self.high
        return edges

    @cached_property
    def at_bins(self) -> np.ndarray:
        """(BINS + 1,) probability below each edge; 1 at the last."""
        return np.append(self.before(self.bins[:-1]), 1.0)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}({self.low:g}, {self.high:g})"


class Uniform(Continuous):
    """Every um/px equally likely."""

    def cdf(self, mpp):
        return np.clip((np.asarray(mpp) - self.low) / (self.high - self.low), 0, 1)

    def quantile(self, u):
        return self.low + np.asarray(u) * (self.high - self.low)


class LogUniform(Continuous):
    """Every ratio equally likely: as many tiles between 0.25 and 0.5 as between 1 and 2."""

    def cdf(self, mpp):
        return np.clip(np.log(np.asarray(mpp) / self.low) / np.log(self.high / self.low), 0, 1)

    def quantile(self, u):
        return self.low * (self.high / self.low) ** np.asarray(u)


@dataclass(frozen=True)
class MaxAvg(Continuous):
    """Density over mpp ~ exp(R(x) / strength), which favours what helps most others: most tiles lie in the middle.

    R(x) = integral over [low, high] of (min(x, y) / max(x, y))^2 dy = 4x/3 - low^3 / (3 x^2) - x^2 / high is how much
    a tile at x tells of all others. arXiv 2601.02198, eq. 10, as two open repositories give it; the strength of its
    entropy term is not known to us: 1 is a third party's default and so [ours]. A larger one is closer to uniform.
    """

    strength: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.strength < np.inf:
            raise InputError(f"maxavg: strength={self.strength!r} must be above 0")

    def reach(self, mpp):
        x = np.asarray(mpp, float)
        return 4 * x / 3 - self.low**3 / (3 * x**2) - x**2 / self.high

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        x = np.linspace(self.low, self.high, KNOTS)
        reach = self.reach(x) / self.strength
        density = np.exp(reach - reach.max())
        total = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
        return x, total / total[-1]

    def cdf(self, mpp):
        return np.interp(mpp, *self._table)

    def quantile(self, u):
        return np.interp(u, *self._table[::-1])

    def __str__(self) -> str:
        return f"maxavg({self.low:g}, {self.high:g}, {self.strength:g})"


class MinMax(Continuous):
    """The law whose worst-served mpp is served best: log-uniform with an atom at either end.

    It maximises the least value over x of the mean over y ~ p of (min(x, y) / max(x, y))^2: the linear programme of
    arXiv 2601.02198, eq. 11. The closed form is [ours]: with u = log mpp the kernel is exp(-2 |u - v|), and half an
    atom at either end plus du in between makes the mean the same at every x, which is the optimum of such a game.
    Each atom has 1 / (2 + 2 log(high / low)); the rest is log-uniform.
    """

    @property
    def atom(self) -> float:
        return 0.5 / (1 + np.log(self.high / self.low))

    def cdf(self, mpp):
        inside = self.atom * (1 + 2 * np.log(np.maximum(mpp, self.low) / self.low))
        return np.where(mpp < self.low, 0.0, np.where(mpp >= self.high, 1.0, inside))

    def before(self, mpp):
        inside = self.atom * (1 + 2 * np.log(np.clip(mpp, self.low, self.high) / self.low))
        return np.where(mpp <= self.low, 0.0, np.where(mpp > self.high, 1.0, inside))

    def quantile(self, u):
        steps, most = (np.asarray(u) / self.atom - 1) / 2, np.log(self.high / self.low)
        return np.where(steps >= most, self.high, self.low * np.exp(np.clip(steps, 0, most)))


LAWS = {law.__name__.lower(): law for law in (Uniform, LogUniform, MaxAvg, MinMax)}
WAYS = 'a positive number, several, {mpp: positive weight}, or a law such as "uniform(0.25, 2)"'


def of(mpp) -> Values | Continuous:
    """The law that a number, several, {mpp: weight}, text or a law means. Raises InputError where it means none."""
    if isinstance(mpp, Values | Continuous):
        return mpp
    if isinstance(mpp, str):
        return _parsed(mpp)
    try:
        weights = mpp if isinstance(mpp, dict) else dict.fromkeys(np.atleast_1d(mpp).tolist(), 1.0)
        weights = {float(value): float(weight) for value, weight in weights.items()}
    except (TypeError, ValueError):
        raise InputError(f"mpp={mpp!r}: give {WAYS}") from None
    if not weights or any(not (0 < number < np.inf) for pair in weights.items() for number in pair):
        raise InputError(f"mpp={mpp!r}: give {WAYS}")
    total = sum(weights.values())
    return Values(tuple(weights), tuple(weight / total for weight in weights.values()))


def _parsed(text: str) -> Values | Continuous:
    called = re.fullmatch(r"\s*([a-z]+)\s*\((.*)\)\s*", text, re.IGNORECASE)
    if called:
        name, inside = called[1].lower(), _numbers(called[2].split(","), text)
        if name not in LAWS:
            raise InputError(f"mpp='{text}': no law '{name}'.{nearest(name, LAWS)}")
        if not 2 <= len(inside) <= (3 if name == "maxavg" else 2):
            raise InputError(f"mpp='{text}': give low and high, as in '{name}(0.25, 2)'")
        return LAWS[name](*inside)
    pairs = [part.partition(":") for part in text.split(",")]
    weights = [1.0 if not colon else _numbers([weight], text)[0] for _, colon, weight in pairs]
    return of(dict(zip(_numbers([value for value, _, _ in pairs], text), weights, strict=True)))


def _numbers(parts: list[str], text: str) -> list[float]:
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise InputError(f"mpp='{text}': give {WAYS}") from None
