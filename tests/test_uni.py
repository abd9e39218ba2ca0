"""UNI's evaluation against scikit-learn, scipy and plain loops."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from pathfm import uni
from pathfm.errors import InputError
from pathfm.metrics import balanced_accuracy
from pathfm.neighbours import nearest, vote


def clouds(n=400, d=10, classes=3, signal=0.8, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    x = 3 + signal * rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))
    return x.astype(np.float32), y


def test_the_regression_finds_the_least_of_its_objective():
    x, y = clouds(n=150, d=40)
    found = uni.logistic(x, y)
    wide, cost = x.astype(float), 40 * 3 / 100

    def objective(flat):
        weight, bias = flat[:120].reshape(3, 40), flat[120:]
        log_p = log_softmax(wide @ weight.T + bias, axis=1)
        error = (np.exp(log_p) - np.eye(3)[y]) / len(y)
        norm = np.linalg.norm(weight)
        slope = error.T @ wide + weight / norm / (2 * cost)
        return norm / (2 * cost) - log_p[np.arange(len(y)), y].mean(), np.r_[slope.ravel(), error.sum(axis=0)]

    least = minimize(
        objective, np.full(123, 0.01), jac=True, method="BFGS", options={"gtol": 1e-8, "maxiter": 2000}
    ).fun
    assert np.linalg.norm(found.weight) > 0.5  # not the trivial solution
    assert found.objective == pytest.approx(least, abs=1e-4)
    assert objective(np.r_[found.weight.ravel(), found.bias])[0] == pytest.approx(found.objective, abs=1e-5)


def test_the_regression_learns_where_its_penalty_allows():
    x, y = clouds(n=600, d=300, signal=0.5)
    found = uni.logistic(x[:400], y[:400])
    assert np.abs(found.weight).max() > 0 and balanced_accuracy(y[400:], found.answers(x[400:])) > 0.9


def test_simpleshot_is_the_nearest_centroid_of_centred_unit_features():
    x, y = clouds(signal=0.4)
    train, test = (rows[:] for rows in uni.centred(x[:300], x[300:]))
    assert np.allclose(np.linalg.norm(test, axis=1), 1, atol=1e-6)
    expected = NearestCentroid().fit(train, y[:300]).predict(test)
    found = uni.simpleshot(x[:300], y[:300], x[300:])
    assert (found == expected).all() and 0.5 < (found == y[300:]).mean() < 1


def test_neighbours_of_centred_features_vote_as_in_scikit_learn():
    x, y = clouds(signal=0.4, classes=2)
    train, test = (rows[:] for rows in uni.centred(x[:300], x[300:]))
    expected = KNeighborsClassifier(21).fit(train, y[:300]).predict(test)  # an odd number: no ties
    assert (vote(*nearest(train, test, 21), y[:300]) == expected).all()


@pytest.mark.parametrize("shots", [1, 4])
def test_episodes_are_simpleshot_on_what_was_drawn(shots, monkeypatch):
    x, y = clouds(signal=0.6)
    monkeypatch.setattr(uni, "BLOCK", 5 * 100 * 3)  # several blocks
    found = uni.episodes(x[:300], y[:300], x[300:], y[300:], shots, n=12, seed=3).scores
    rng, expected = np.random.default_rng(3), []
    for _ in range(12):
        rows = np.concatenate([rng.choice(np.flatnonzero(y[:300] == c), shots, replace=False) for c in range(3)])
        expected.append(balanced_accuracy(y[300:], uni.simpleshot(x[rows], y[rows], x[300:])))
    assert found == pytest.approx(expected, abs=1e-6)
    assert len(set(found)) > 3


def test_more_shots_are_better():
    x, y = clouds(n=900, signal=0.5)
    means = [uni.episodes(x[:600], y[:600], x[600:], y[600:], shots, n=60).scores.mean() for shots in (1, 8, 64)]
    assert means[0] < means[1] < means[2]


def test_too_few_images_for_the_shots():
    x, y = clouds(n=90)
    with pytest.raises(InputError, match="class 2 has 3 images to learn from; 4 shots need 4"):
        keep = np.concatenate([np.flatnonzero(y != 2), np.flatnonzero(y == 2)[:3]])
        uni.episodes(x[keep], y[keep], x, y, shots=4)
    with pytest.raises(InputError, match="class 1 has no image on test"):
        uni.episodes(x, y, x[y != 1], y[y != 1], shots=1)


def test_votes_are_the_episodes_answers():
    x, y = clouds(signal=0.6)
    found = uni.episodes(x[:300], y[:300], x[300:], y[300:], 2, n=30, seed=1)
    assert (found.votes.sum(axis=1) == 30).all()
    share = found.votes[np.arange(len(y[300:])), y[300:]] / 30
    each = [share[y[300:] == label].mean() for label in range(3)]
    assert np.mean(each) == pytest.approx(found.scores.mean())  # the mean of the episodes' scores


def test_a_query_without_direction_hits_as_often_as_keys_drawn_at_random():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    hit, _ = uni.hits(np.ones((10, 3)), labels, np.ones((2, 3)), np.array([0, 1]), k=3)
    assert hit[0] == pytest.approx([3 / 10, 1 - 7 / 10 * 6 / 9, 1 - 7 / 10 * 6 / 9 * 5 / 8])
    assert hit[1] == pytest.approx([2 / 10, 1 - 8 / 10 * 7 / 9, 1 - 8 / 10 * 7 / 9 * 6 / 8])


def test_retrieval_counts_hits_among_the_nearest():
    angles = np.deg2rad([0, 10, 20, 180, 190, 200])
    keys, labels = np.stack([np.cos(angles), np.sin(angles)], axis=1), np.array([0, 1, 1, 2, 0, 2])
    queries = np.stack([np.cos(np.deg2rad([-1, 181])), np.sin(np.deg2rad([-1, 181]))], axis=1)
    keys, queries = keys - keys.mean(axis=0) + 7, queries - keys.mean(axis=0) + 7
    found = uni.retrieval(keys, labels, queries, np.array([1, 2]), ks=(1, 3))
    assert found == {"acc@1": 0.5, "acc@3": 1.0, "majority@3": 1.0}
