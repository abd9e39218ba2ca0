"""Closed forms, and references written from the definitions."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from pathfm import metrics
from pathfm.errors import InputError
from pathfm.neighbours import nearest, vote


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_rankme_counts_equal_orthogonal_directions(rng):
    orthogonal = np.linalg.qr(rng.normal(size=(64, 16)))[0]
    assert float(metrics.rankme(orthogonal)) == pytest.approx(16, rel=1e-4)


def test_rankme_of_one_direction_is_one(rng):
    z = np.outer(rng.normal(size=200), rng.normal(size=32))
    assert float(metrics.rankme(z)) == pytest.approx(1, abs=1e-3)


def test_rankme_is_the_published_formula_on_raw_features(rng):
    z = (rng.normal(size=(300, 20)) * np.arange(1, 21) + 50).astype(np.float32)  # neither centred nor normalised
    sigma = np.linalg.svd(z.astype(np.float64), compute_uv=False)
    p = sigma / np.abs(sigma).sum() + 1e-7
    found = metrics.rankme(z)
    assert found.value == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-5)
    assert (found.n, found.d, found.share) == (300, 20, found.value / 20)
    assert abs(found.value - float(metrics.rankme(z - z.mean(axis=0)))) > 1  # centring would change it


def test_odcorr_of_independent_features_is_its_floor(rng):
    found = metrics.odcorr(rng.normal(size=(2000, 60)))
    assert found.value == pytest.approx(found.floor, rel=0.05)
    assert found.floor == math.sqrt(2 / (math.pi * 2000))
    assert found.mean_r2 == pytest.approx(1 / 1999, rel=0.1)
    assert found.tiles == pytest.approx(found.tiles_floor, rel=0.05)


def test_odcorr_of_copies_is_one(rng):
    one = rng.normal(size=(50, 1))
    found = metrics.odcorr(one * [1, -2, 30, 0.1] + [0, 1, 2, 3])
    assert (found.value, found.mean_r2) == pytest.approx((1, 1), abs=1e-5)


def test_odcorr_is_the_mean_of_the_correlation_matrix(rng):
    z = rng.normal(size=(80, 30)) @ rng.normal(size=(30, 30))
    off = ~np.eye(30, dtype=bool)
    assert metrics.odcorr(z).value == pytest.approx(np.abs(np.corrcoef(z.T))[off].mean(), abs=1e-5)
    off = ~np.eye(80, dtype=bool)
    assert metrics.odcorr(z).tiles == pytest.approx(np.abs(np.corrcoef(z))[off].mean(), abs=1e-5)


def test_odcorr_does_not_depend_on_its_blocks(rng):
    columns, _ = metrics._standard(rng.normal(size=(40, 33)))
    assert metrics._off_diagonal(columns, 10) == pytest.approx(metrics._off_diagonal(columns, 1000), rel=1e-6)


def test_odcorr_leaves_out_constants_and_counts_them(rng):
    z = rng.normal(size=(100, 10)).astype(np.float32)
    with_constants = np.c_[z, np.zeros(100), np.full(100, 0.1, np.float32), 1e-9 * z[:, 0] + 3]
    found = metrics.odcorr(with_constants)
    assert found.constants == 3
    assert found.value == pytest.approx(metrics.odcorr(z).value)
    assert math.isnan(metrics.odcorr(np.ones((10, 4))).value)


@pytest.mark.parametrize("metric", [metrics.rankme, metrics.odcorr])
def test_features_that_are_not_finite_are_refused_by_row(metric, rng):
    z = rng.normal(size=(10, 3))
    z[4, 1] = np.nan
    with pytest.raises(InputError, match="first row 4"):
        metric(z)
    with pytest.raises(InputError, match="matrix"):
        metric(z[0])


def test_balanced_accuracy_is_sklearns(rng):
    truth, predicted = rng.choice(["a", "b", "c"], size=(2, 200), p=[0.7, 0.2, 0.1])
    assert metrics.balanced_accuracy(truth, predicted) == pytest.approx(balanced_accuracy_score(truth, predicted))
    with pytest.raises(InputError, match="200 true labels but 3"):
        metrics.balanced_accuracy(truth, predicted[:3])


def test_neighbours_are_those_of_a_full_sort(rng):
    bank, query = rng.normal(size=(50, 6)), rng.normal(size=(7, 6))
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)  # noqa: E731
    ids, cosines = nearest(bank, query, k=5)
    expected = unit(query) @ unit(bank).T
    assert np.array_equal(ids, np.argsort(-expected, axis=1)[:, :5])
    assert np.allclose(cosines, -np.sort(-expected, axis=1)[:, :5], atol=1e-6)


def test_neighbours_leave_out_the_own_group(rng):
    group = np.repeat(np.arange(4), 3)
    ids, cosines = nearest(rng.normal(size=(12, 4)), k=12, bank_group=group)
    assert (ids >= 0).sum(axis=1).tolist() == [9] * 12
    assert np.isneginf(cosines[ids < 0]).all()
    assert not any(group[row] in group[found[found >= 0]] for row, found in enumerate(ids))


def test_a_tie_goes_to_the_nearer():
    ids, cosines = np.array([[0, 1, 2, 3]]), np.array([[0.9, 0.8, 0.7, 0.1]], dtype=np.float32)
    assert vote(ids, cosines, np.array([1, 0, 0, 1])) == [0]
    assert vote(ids, cosines, np.array([1, 1, 0, 0])) == [1]
    assert vote(np.full((1, 4), -1), np.full((1, 4), -np.inf), np.array([0])) == [-1]


def brute_force_robustness(x, label, centre, patient, k):
    """From the definition, a loop over pairs."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    so = os = 0
    for i in range(len(x)):
        others = [j for j in range(len(x)) if patient[j] != patient[i]]
        for j in sorted(others, key=lambda j: -(x[i] @ x[j]))[:k]:
            so += label[i] == label[j] and centre[i] != centre[j]
            os += label[i] != label[j] and centre[i] == centre[j]
    return so / (so + os)


def study(rng, signal, leak, each=8):
    """Features that know the class by `signal` and the centre by `leak`: 3 classes x 4 centres x `each` tiles."""
    label, centre, number = (a.ravel() for a in np.meshgrid(range(3), range(4), range(each), indexing="ij"))
    patient = centre * 10 + number // 2
    x = signal * np.eye(3)[label] @ rng.normal(size=(3, 12)) + leak * np.eye(4)[centre] @ rng.normal(size=(4, 12))
    return x + 0.3 * rng.normal(size=(len(x), 12)), label, centre, patient


def test_robustness_index_is_the_brute_force_one(rng):
    x, label, centre, patient = study(rng, 0.1, 0.1)
    found = metrics.robustness_index(x, label, centre, patient, k=(1, 5, 20)).set_index("k")["robustness_index"]
    for k in (1, 5, 20):
        assert found[k] == pytest.approx(brute_force_robustness(x, label, centre, patient, k))


def test_robustness_index_tells_biology_from_centre(rng):
    robust = metrics.robustness_index(*study(rng, 2, 0), k=(5,))["robustness_index"][0]
    follows = metrics.robustness_index(*study(rng, 0, 2), k=(5,))["robustness_index"][0]
    assert robust > 0.95
    assert follows < 0.05


def test_robustness_index_draws_every_class_equally_from_every_centre(rng):
    x, label, centre, patient = study(rng, 1, 1)
    fewer = ~((label == 0) & (centre == 0)) | (np.arange(len(x)) < 3)
    found = metrics.robustness_index(x[fewer], label[fewer], centre[fewer], patient[fewer], k=(1, 5))
    assert set(found["n"]) == {3 * 4 * 3}


def test_robustness_index_says_why_there_is_none(rng):
    x, label, centre, patient = study(rng, 1, 1)
    rows = (label > 0) | (centre == 0)
    found = metrics.robustness_index(x[rows], label[rows], centre[rows], patient[rows], k=(1,))
    assert found["robustness_index"].isna().all()
    assert found["reason"][0] == "class 0 has one centre"
    found = metrics.robustness_index(x, label, centre, patient, k=(5, 5000))
    assert found["robustness_index"].isna().tolist() == [False, True]
    assert "neighbours of other patients" in found["reason"][1]


def test_slide_dependence_sees_slides_and_nothing_where_there_is_none(rng):
    slide, label = np.repeat(np.arange(12), 20), np.repeat(np.arange(12) % 2, 20)
    own = rng.normal(size=(12, 10))[slide] + 0.1 * rng.normal(size=(240, 10))
    found = metrics.slide_dependence(own, label, slide)
    assert found.identity > 0.95
    assert found.dependence > 0.3
    none = metrics.slide_dependence(rng.normal(size=(240, 10)), label, slide)
    assert none.identity < none.identity_chance + 0.1
    assert abs(none.dependence) < 0.15


def test_slide_dependence_takes_tiles_half_a_millimetre_apart(rng):
    x, label, slide = rng.normal(size=(40, 4)), np.arange(40) % 2, np.repeat([0, 1], 20)
    xy_um = np.c_[np.tile(np.arange(20) * 100.0, 2), np.zeros(40)]
    assert metrics.slide_dependence(x, label, slide, xy_um).n == 8  # 0, 500, 1000, 1500 um on each slide
    with pytest.raises(InputError, match="at least two slides"):
        metrics.slide_dependence(x, label, np.zeros(40))


def test_centre_identity_is_of_the_centre_and_not_of_the_patient(rng):
    centre, patient = np.repeat(np.arange(4), 60), np.repeat(np.arange(48), 5)
    by_patient = rng.normal(size=(48, 16))[patient]
    assert float(metrics.centre_identity(by_patient, centre, patient)) < 0.45  # chance is 0.25
    by_centre = rng.normal(size=(4, 16))[centre] + 0.1 * rng.normal(size=(240, 16))
    assert float(metrics.centre_identity(by_centre, centre, patient)) > 0.95
    with pytest.raises(InputError, match="two centres"):
        metrics.centre_identity(by_patient, np.zeros(240), patient)
