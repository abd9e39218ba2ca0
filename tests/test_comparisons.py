"""Holm's correction, exchanged answers, every pair of models, and mean ranks: closed forms and scipy beside them."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pathfm import InputError, comparisons
from pathfm.scores import Prediction, paired


def answers(right, patients=30, name="a", seed=0) -> Prediction:
    """A prediction that is right where `right` (tiles,); two classes in every patient."""
    n = len(right)
    truth = np.where(np.arange(n) % 2, "x", "y")
    wrong = np.where(truth == "x", "y", "x")
    patient = [f"p{i * patients // n}" for i in range(n)]
    table = pd.DataFrame({"file": np.arange(n).astype(str), "patient_id": patient, "truth": truth})
    return Prediction(name, "linear", table.assign(predicted=np.where(right, truth, wrong)), seed)


def drawn(accuracy, draw, patients=30, tiles=10, **how) -> Prediction:
    return answers(np.random.default_rng(draw).random(patients * tiles) < accuracy, patients, **how)


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 no less than the one before."""
    assert comparisons.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparisons.holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert len(comparisons.holm([])) == 0
    with pytest.raises(InputError, match="between 0 and 1"):
        comparisons.holm([0.1, 1.2])


def test_holm_finds_what_was_not_there_in_one_of_twenty_families():
    p = np.random.default_rng(0).random((4000, 10))
    false = np.mean([(comparisons.holm(one) <= 0.05).any() for one in p])
    assert false == pytest.approx(1 - 0.995**10, abs=0.012)  # of independent tests; 0.40 without a correction


def test_exchanging_answers_is_scipys_permutation_test():
    a, b = drawn(0.8, 1, patients=10, tiles=6), drawn(0.6, 2, patients=10, tiles=6)

    def by_patient(one):
        hit = (one.table["truth"] == one.table["predicted"]).astype(float)
        share = hit / one.table.groupby("truth")["truth"].transform("size")
        return share.groupby(one.table["patient_id"]).sum().to_numpy() / 2

    assert by_patient(a).sum() == pytest.approx(a.balanced_accuracy)
    reference = stats.permutation_test(
        (by_patient(a), by_patient(b)),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
    )
    assert comparisons.sign_flip(a, b) == pytest.approx(reference.pvalue)
    assert comparisons.sign_flip(a, b, flips=1000) == pytest.approx(reference.pvalue, abs=0.03)
    assert comparisons.sign_flip(a, a) == 1


def test_equal_models_are_called_different_as_often_as_was_agreed():
    p = [comparisons.sign_flip(drawn(0.7, 2 * i), drawn(0.7, 2 * i + 1), flips=500) for i in range(300)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.03)


def test_every_pair_is_asked_once_and_corrected():
    models = {name: drawn(accuracy, i, 60) for i, (name, accuracy) in enumerate({"a": 0.9, "b": 0.9, "c": 0.6}.items())}
    table = comparisons.pairwise(models).set_index(["a", "b"])
    assert list(table.index) == list(itertools.combinations("abc", 2))
    assert table["p_holm"].to_numpy() == pytest.approx(comparisons.holm(table["p"]))
    assert (table["p_holm"] >= table["p"]).all()
    assert table.loc[("a", "c"), "verdict"] == table.loc[("b", "c"), "verdict"] == "better"
    one = paired(models["a"], models["c"])
    assert (table.loc[("a", "c"), ["difference", "low", "high"]] == [one.value, one.low, one.high]).all()
    assert table.loc[("a", "c"), "n_patients"] == 60


def test_a_finding_that_the_correction_takes_away_is_undecided():
    """Alone the pair differs; one of thirty-six questions it does not."""
    models = {f"m{i}": drawn(0.7, i, 40, 40) for i in range(9)}
    alone = {pair: paired(models[pair[0]], models[pair[1]]).verdict for pair in itertools.combinations(models, 2)}
    table = comparisons.pairwise(models).set_index(["a", "b"])["verdict"]
    lost = [pair for pair, verdict in alone.items() if verdict in ("better", "worse") and table[pair] == "undecided"]
    assert lost  # nine models of one accuracy: some pair differs by chance, and is taken back
    assert not table.isin(["better", "worse"]).any()


def test_seeds_of_pretraining_are_averaged():
    a = [drawn(0.8, seed, seed=seed) for seed in (0, 1)]
    b = drawn(0.6, 5, name="b")
    table = comparisons.pairwise({"a": a, "b": b})
    assert table["difference"][0] == pytest.approx(np.mean([x.balanced_accuracy for x in a]) - b.balanced_accuracy)
    with pytest.raises(InputError, match="two predictions of one seed"):
        comparisons.pairwise({"a": [a[0], a[0]], "b": b})
    with pytest.raises(InputError, match="make no pair"):
        comparisons.pairwise({"a": a})


def scores(n_tasks=8):
    base = np.random.default_rng(0).normal(size=n_tasks)
    better = {f"m{i}": base + 0.3 * i + 0.2 * np.random.default_rng(i + 1).normal(size=n_tasks) for i in range(4)}
    return pd.DataFrame(better, index=[f"t{i}" for i in range(n_tasks)]).T


def test_mean_ranks_are_friedmans_and_ties_share():
    wide = scores()
    found = comparisons.mean_ranks(wide)
    reference = np.mean([stats.rankdata(-wide[task]) for task in wide], axis=0)
    assert found.table["mean_rank"][wide.index].to_numpy() == pytest.approx(reference)
    assert found.p == pytest.approx(stats.friedmanchisquare(*wide.to_numpy()).pvalue)
    assert found.table.index[0] == "m3" and found.table["mean_rank"].is_monotonic_increasing
    assert ((found.table["low"] <= found.table["mean_rank"]) & (found.table["mean_rank"] <= found.table["high"])).all()
    tied = comparisons.mean_ranks(pd.DataFrame({"t": [1, 1, 0], "u": [1, 1, 0]}, index=list("abc")))
    assert tied.table["mean_rank"].to_dict() == {"a": 1.5, "b": 1.5, "c": 3}


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_is_the_published_one(k, q):
    """Demšar 2006, table 5a."""
    wide = pd.DataFrame(np.random.default_rng(0).random((k, 10)))
    assert comparisons.mean_ranks(wide).critical_difference == pytest.approx(q * np.sqrt(k * (k + 1) / 60), rel=1e-3)


def test_a_task_that_a_model_lacks_is_left_out_and_named():
    wide = scores()
    wide.loc["m1", "t2"] = np.nan
    found = comparisons.mean_ranks(wide)
    assert (found.n_tasks, found.left_out) == (7, ("t2",))
    with pytest.raises(InputError, match="two models and two tasks .* not 4 and 1; t1"):
        comparisons.mean_ranks(wide[["t0", "t1"]].assign(t1=np.nan))


def test_two_models_are_compared_by_the_sign_test():
    wide = pd.DataFrame([[1.0] * 6, [0.5] * 6])
    assert comparisons.mean_ranks(wide).p == pytest.approx(2 / 2**6)
