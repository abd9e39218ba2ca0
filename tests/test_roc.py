"""Areas under ROC curves: differences of two on the same slides against brute force, and what cannot be asked."""

import itertools

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from pathfm import InputError, roc
from pathfm.comparisons import holm


def made(n=24, gain=(1.5, 0.5), seed=0, runs=2):
    """Truth, scores of two models, one better, and a patient a slide but for the last, who has two of one class."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2 == 0
    scores = [rng.normal(size=(runs, n)) + strength * truth for strength in gain]
    return truth, *scores, np.append(np.arange(n - 1), n - 3)


def area(truth, score):
    return np.mean([roc_auc_score(truth, one) for one in np.atleast_2d(score)])


def test_the_difference_is_that_of_the_areas_with_one_draw_of_patients_for_both():
    truth, a, b, who = made(60)
    found = roc.paired(truth, a, b, who, resamples=200)
    assert found.value == pytest.approx(area(truth, a) - area(truth, b)) and found.n_patients == 59
    assert found.low < found.value < found.high
    assert roc.paired(truth, a, a, who)[:3] == (0, 0, 0)
    swapped = roc.paired(truth, b, a, who, resamples=200)
    assert swapped[:3] == pytest.approx((-found.value, -found.high, -found.low))
    own, guess = roc.auc(truth, a, who, resamples=200), roc.paired(truth, a, np.zeros(60), who, resamples=200)
    assert guess[:3] == pytest.approx([bound - 0.5 for bound in own[:3]])  # all equal is half won in every draw


def test_p_is_the_share_of_exchanges_by_brute_force():
    """All exchanges of the ranks of two models, patient by patient, areas counted anew each time."""
    truth, a, b, _ = made(20, (2.0, 0.2), runs=1)
    who = np.repeat(np.arange(10), 2)  # two slides a patient, one of each class
    truth = np.tile([True, False], 10)
    a, b = (np.random.default_rng(k).normal(size=(1, 20)) + s * truth for k, s in ((1, 2.0), (2, 0.2)))
    ranks = [rankdata(one, axis=1) for one in (a, b)]
    seen, extreme = abs(area(truth, a) - area(truth, b)), 0
    for flips in itertools.product((False, True), repeat=10):
        moved = np.array(flips)[who]
        one, other = np.where(moved, ranks[1], ranks[0]), np.where(moved, ranks[0], ranks[1])
        extreme += abs(area(truth, one) - area(truth, other)) >= seen - 1e-12
    assert roc.exchanged(truth, a, b, who) == pytest.approx(extreme / 2**10)
    assert roc.exchanged(truth, a, a, who) == 1


def test_several_runs_are_averaged_whatever_their_order_and_number():
    truth, a, b, who = made(40, runs=3)
    assert roc.exchanged(truth, a, b, who) == pytest.approx(roc.exchanged(truth, a[::-1], b, who))
    twice = np.concatenate([a, a])
    assert roc.exchanged(truth, twice, b, who) == pytest.approx(roc.exchanged(truth, a, b, who))
    assert roc.paired(truth, twice, b, who)[:3] == pytest.approx(roc.paired(truth, a, b, who)[:3])


def test_pairs_are_corrected_for_their_number():
    truth, a, b, who = made(80, (2.5, 0.0))
    rng = np.random.default_rng(5)
    models = {"good": a, "none": b, "chance": np.zeros(80), "noise": rng.normal(size=80)}
    table = roc.pairwise(truth, models, who)
    assert len(table) == 6 and table["p_holm"].tolist() == pytest.approx(holm(table["p"]).tolist())
    good = table[table["a"] == "good"]
    assert (good["p_holm"] < 0.05).all() and (good["difference"] > 0.2).all()
    assert (table.loc[table["a"] != "good", "p_holm"] > 0.05).all()
    with pytest.raises(InputError, match="make no pair"):
        roc.pairwise(truth, {"good": a}, who)


def test_too_few_patients_are_no_area():
    truth, a, b, who = made(18)
    found = roc.paired(truth, a, b, who)
    assert np.isnan(found.value) and found.verdict == "not informative"
    assert np.isnan(roc.exchanged(truth, a, b, who))
    table = roc.pairwise(truth, {"a": a, "b": b}, who)
    assert table["p_holm"].isna().all() and table["verdict"].tolist() == ["not informative"]
