"""How often slides come: shares by class and weight, and rounds that keep them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2
from test_stream import LEVEL, MaskIndex, irregular

from pathfm import InputError, TileStream, balance

LABELS = ["tumour"] * 5 + ["normal"] * 2
PATIENTS = ["a", "a", "a", "b", "b", "a", "c"]
AREAS = [1.0, 2.0, 4.0, 8.0, 1.0, 3.0, 5.0]


@pytest.fixture(scope="module")
def seven() -> MaskIndex:
    """Seven slides, two labels, three patients; all the same mask."""
    index = MaskIndex({f"s{k}": irregular(0) for k in range(7)})
    index.slides = index.slides.assign(label=LABELS, patient_id=PATIENTS, tissue_mm2=AREAS)
    return index


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1 / 7] * 7),
        ({"slide_weights": "tissue_mm2"}, np.array(AREAS) / 24),
        ({"balance": "patient"}, [1 / 12] * 3 + [1 / 6] * 2 + [1 / 12, 1 / 3]),
        ({"balance": "label"}, [0.1] * 5 + [0.25] * 2),
        ({"balance": ("label", "patient")}, [1 / 12] * 3 + [1 / 8] * 2 + [1 / 4] * 2),
        ({"balance": "label", "slide_weights": "tissue_mm2"}, [1 / 32, 2 / 32, 4 / 32, 8 / 32, 1 / 32, 3 / 16, 5 / 16]),
        ({"slide_weights": [0, 1, 0, 1, 2, 0, 0]}, [0, 0.25, 0, 0.25, 0.5, 0, 0]),
        ({"balance": "label", "slide_weights": {f"s{k}": float(k < 5) for k in range(7)}}, [0.2] * 5 + [0, 0]),
    ],
)
def test_shares_are_those_asked_for(seven, settings, expected):
    stream = TileStream(seven, tile_px=32, mpp=1.0, **settings)
    expected = pd.Series(expected, [f"s{k}" for k in range(7)])
    assert stream.share.to_dict() == pytest.approx(expected[expected > 0].to_dict())
    assert stream.left_out["reason"].tolist() == ["weight 0"] * int((expected == 0).sum())
    first = stream.names(range(0, 20_000 * len(stream.slides), len(stream.slides)))["slide_id"]  # one of each round
    seen, wanted = first.value_counts().reindex(stream.share.index, fill_value=0), stream.share * 20_000
    assert chi2.sf(((seen - wanted) ** 2 / wanted).sum(), len(wanted) - 1) > LEVEL


@pytest.mark.parametrize("settings", [{"slide_weights": "tissue_mm2"}, {"balance": ("label", "patient")}])
def test_a_round_holds_every_slide_and_class_within_one_of_its_share(seven, settings):
    stream = TileStream(seven, tile_px=32, mpp=1.0, seed=3, **settings)
    ids = stream.names(range(7 * 500))["slide_id"].to_numpy().reshape(500, 7)
    facts = seven.slides.set_index("slide_id")
    classes = {name: [name] for name in stream.share.index}
    if "balance" in settings:
        classes |= {label: list(rows.index) for label, rows in facts.groupby("label")}
        classes |= {pair: list(rows.index) for pair, rows in facts.groupby(["label", "patient_id"])}
    for members in classes.values():
        wanted = 7 * stream.share[members].sum()
        counts = np.isin(ids, members).sum(axis=1)
        assert set(counts) <= {int(np.floor(wanted + 1e-9)), int(np.ceil(wanted - 1e-9))}
        assert counts.mean() == pytest.approx(wanted, abs=0.12)  # five standard errors of 500 rounds
    assert len({tuple(row) for row in ids}) > 400  # in another order each time, as far as seven slides allow


def test_two_tiles_of_a_round_are_drawn_as_systematic_sampling_says(seven):
    """Their joint distribution, by integrating over the start: not that of independent draws."""
    stream = TileStream(seven, tile_px=32, mpp=1.0, slide_weights="tissue_mm2", seed=5)
    rounds = 20_000
    numbers = np.arange(rounds) * 7
    code = {name: k for k, name in enumerate(stream.share.index)}
    pairs = [stream.names(numbers + k)["slide_id"].map(code).to_numpy() for k in (0, 1)]
    seen = np.zeros((7, 7))
    np.add.at(seen, tuple(pairs), 1)
    ends, wanted, starts = np.cumsum(stream.share.to_numpy()) * 7, np.zeros((7, 7)), (np.arange(2400) + 0.5) / 2400
    for start in starts:
        hit = np.minimum(np.searchsorted(ends, np.arange(7) + start, "right"), 6)
        for j in range(7):
            for k in range(7):
                if j != k:
                    wanted[hit[j], hit[k]] += rounds / len(starts) / 42
    assert seen[wanted == 0].sum() == 0
    there = wanted > 0

    def p(expected) -> float:
        return chi2.sf(((seen - expected)[there] ** 2 / expected[there]).sum(), there.sum() - 1)

    assert p(wanted) > LEVEL
    assert p(rounds * np.outer(stream.share, stream.share)) < LEVEL  # what independent draws would give


def test_equal_weights_are_the_plain_stream(seven):
    plain = TileStream(seven, tile_px=32, mpp=(1.0, 2.0), seed=4).names(range(200))
    for settings in ({"slide_weights": np.full(7, 3.0)}, {"balance": "slide_id"}, {"balance": "slide"}):
        pd.testing.assert_frame_equal(TileStream(seven, 32, (1.0, 2.0), seed=4, **settings).names(range(200)), plain)


def test_slide_mpp_and_position_are_drawn_in_this_order(seven):
    """The joint distribution of slide, mpp and block: share of the slide x of the mpp given it x of the block."""
    masks = {"lakes": irregular(0), "small": np.ones((11, 11), bool), "isles": irregular(1)}
    index = MaskIndex(masks)
    weights = {"lakes": 1.0, "small": 2.0, "isles": 5.0}
    declared = {1.0: 0.2, 1.5: 0.3, 2.0: 0.5}
    stream = TileStream(index, tile_px=48, mpp=declared, slide_weights=weights, seed=8)
    n = 60_000
    tiles = stream.names(range(n))
    counts, observed, expected = stream.positions(), [], []
    for name in masks:
        served = {mpp: w for mpp, w in declared.items() if counts.loc[name, mpp]}
        for mpp, w in served.items():
            share = weights[name] / 8 * w / sum(served.values())
            own = tiles[(tiles["slide_id"] == name) & (tiles["mpp"] == mpp)]
            left = exact_left(masks[name], int(48 * mpp), 0.4, 2 if mpp == 2 else 1)
            middle = 8 * masks[name].shape[1] // 2 - int(24 * mpp)
            observed += [(own["x"] < middle).sum(), (own["x"] >= middle).sum()]
            expected += [n * share * part for part in left(middle)]
    observed, expected = np.array(observed), np.array(expected)
    assert observed.sum() == n and expected.sum() == pytest.approx(n)
    assert observed[expected == 0].sum() == 0
    there = expected > 0
    assert chi2.sf(((observed - expected)[there] ** 2 / expected[there]).sum(), there.sum() - 1) > LEVEL
    by_area = expected * np.repeat([1, 1, 1, 0.5, 0.5, 2, 2, 2], 2)  # another share of slides would be seen
    by_area *= n / by_area.sum()
    assert chi2.sf(((observed - by_area)[there] ** 2 / by_area[there]).sum(), there.sum() - 1) < LEVEL


def exact_left(mask: np.ndarray, side: int, min_tissue: float, grid: int):
    """x -> the shares of admissible corners left of it and from it on, by trying every one."""
    fine = np.kron(mask, np.ones((8, 8))).astype(np.int64)
    sums = np.pad(fine.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    area = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    xs = np.nonzero(area[::grid, ::grid] >= min_tissue * side**2)[1] * grid
    return lambda middle: ((xs < middle).mean(), (xs >= middle).mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": "lable"}, "cannot balance by 'lable'.*Did you mean 'label'"),
        ({"balance": ("label", "centre")}, "cannot balance by 'centre': slide 's1' has none"),
        ({"slide_weights": "tissue_mm"}, "no column.*Did you mean 'tissue_mm2'"),
        ({"slide_weights": "label"}, "slide 's0' nan"),
        ({"slide_weights": [1, 2, -1, 1, 1, 1, 1]}, "slide 's2' -1"),
        ({"slide_weights": [1, 2]}, r"shape \(2,\); give a weight for each of 7"),
        ({"slide_weights": [0] * 7}, "are all 0"),
        ({"slide_weights": {"s9": 1}}, "unknown slide 's9'"),
        ({"slide_weights": {"s0": 1}}, "slide 's1' nan"),
    ],
)
def test_weights_that_cannot_be(seven, settings, message):
    index = seven.subset([f"s{k}" for k in range(7)])
    index.slides["centre"] = ["x", None, "x", "y", "y", "x", "y"]
    with pytest.raises(InputError, match=message):
        TileStream(index, tile_px=32, mpp=1.0, **settings)


def test_shares_without_a_stream():
    table = pd.DataFrame({"slide_id": list("abc"), "label": [1, 1, 2]})
    assert balance.shares(table, ("label",)) == pytest.approx([0.25, 0.25, 0.5])
    assert balance.columns_of("label, patient") == ("label", "patient")
    assert balance.columns_of(None) == balance.columns_of("") == balance.columns_of("equal") == ()
