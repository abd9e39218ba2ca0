"""Laws of mpp: closed forms against quadrature, a linear programme and what they claim to be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import linprog

from pathfm import InputError, scales

LAWS = [scales.Uniform(0.25, 2), scales.LogUniform(0.25, 2), scales.MaxAvg(0.25, 2, 0.3), scales.MinMax(0.25, 2)]


def kernel(x, y):
    """How much a tile at x um/px tells of one at y."""
    return (np.minimum(x, y) / np.maximum(x, y)) ** 2


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_quantile_inverts_the_distribution_function(law):
    u = np.linspace(0, 1, 501)
    x = law.quantile(u)
    assert x.min() == law.low and x.max() == pytest.approx(law.high, abs=0)
    assert (np.diff(x) >= 0).all()
    assert (law.cdf(x) >= u - 1e-9).all() and (law.before(x) <= u + 1e-9).all()
    assert law.before(law.low) == 0 and law.cdf(law.high) == 1
    assert law.cdf(law.low - 0.01) == 0 and law.cdf(law.high + 0.01) == 1


@pytest.mark.parametrize(
    ("law", "density"),
    [
        (scales.Uniform(0.25, 2), lambda x: 1.0),
        (scales.LogUniform(0.25, 2), lambda x: 1 / x),
        (scales.MaxAvg(0.25, 2, 0.3), lambda x: np.exp(quad(lambda y: kernel(x, y), 0.25, 2, points=[x])[0] / 0.3)),
    ],
    ids=["uniform", "loguniform", "maxavg"],
)
def test_distribution_functions_integrate_their_densities(law, density):
    total = quad(density, 0.25, 2, limit=100)[0]
    for x in (0.3, 0.5, 1.1, 1.9):
        assert law.cdf(x) == pytest.approx(quad(density, 0.25, x, limit=100)[0] / total, abs=1e-6)


def test_a_weaker_entropy_term_gathers_maxavg_in_the_middle():
    wide, narrow = scales.MaxAvg(0.25, 2, 10.0), scales.MaxAvg(0.25, 2, 0.05)
    middle = [law.cdf(1.7) - law.cdf(0.8) for law in (scales.Uniform(0.25, 2), wide, narrow)]
    assert middle[0] == pytest.approx(middle[1], abs=0.02)
    assert middle[2] > 0.9
    assert wide.reach(1.0) == pytest.approx(quad(lambda y: kernel(1.0, y), 0.25, 2, points=[1])[0])


def test_minmax_solves_its_linear_programme():
    """On a grid of n values: greatest t with K p >= t, as the paper states it."""
    law, n = scales.MinMax(0.25, 2), 121
    x = np.geomspace(0.25, 2, n)
    k = kernel(x[:, None], x)
    found = linprog(
        np.append(np.zeros(n), -1), np.column_stack([-k, np.ones(n)]), np.zeros(n),
        np.append(np.ones(n), 0)[None], [1.0], [(0, None)] * n + [(None, None)], method="highs",
    )  # fmt: skip
    least = 2 * law.atom  # 1 / (1 + log(high / low)): the same at every mpp
    assert -found.fun == pytest.approx(least, rel=1e-3)
    assert np.abs(np.cumsum(found.x[:n]) - law.cdf(x)).max() < 0.01
    for at in (0.25, 0.4, 1.0, 2.0):
        inside = quad(lambda y, at=at: kernel(at, y) / y, 0.25, 2, points=[at])[0]
        assert law.atom * (kernel(at, 0.25) + kernel(at, 2) + 2 * inside) == pytest.approx(least)
    uniform = [quad(lambda y, at=at: kernel(at, y) / 1.75, 0.25, 2, points=[at])[0] for at in (0.25, 2)]
    assert min(uniform) < 0.5 * least


def test_what_a_person_writes():
    assert scales.of(0.5) == scales.of("0.5") == scales.Values((0.5,), (1.0,))
    assert scales.of((0.25, 0.5)) == scales.of("0.25, 0.5") == scales.of([0.25, 0.5])
    assert scales.of({0.5: 1, 1: 3}) == scales.of("0.5:1,1:3") == scales.Values((0.5, 1.0), (0.25, 0.75))
    assert scales.of("LogUniform(0.25, 2)") == scales.LogUniform(0.25, 2)
    assert scales.of("maxavg(0.25,2,0.5)") == scales.MaxAvg(0.25, 2, 0.5)
    for law in [*LAWS, scales.of((0.25, 1)), scales.of({0.5: 1, 1: 3})]:
        assert scales.of(str(law)) == law


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("uniform(2, 0.25)", "0 < low < high"),
        ("uniform(0.5, 0.5)", "0 < low < high"),
        ("uniform(0.5)", "give low and high"),
        ("minmax(0.25, 2, 1)", "give low and high"),
        ("maxavg(0.25, 2, 0)", "strength=0.0 must be above 0"),
        ("loguniformly(0.25, 2)", "Did you mean 'loguniform'"),
        ("uniform(fine, 2)", "give a positive number"),
        ("fine", "give a positive number"),
        ("", "give a positive number"),
        ({0.5: 0}, "positive weight"),
        (float("nan"), "positive"),
        (None, "positive"),
    ],
)
def test_what_no_law_can_be(wrong, message):
    with pytest.raises(InputError, match=message):
        scales.of(wrong)
