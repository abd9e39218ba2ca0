"""Features that pass by a block at a time give the answers of whole matrices, in a fraction of their memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from test_probe import make_features, study

from pathfm import neighbours, probe, regression, rows, uni
from pathfm.errors import InputError
from pathfm.neighbours import nearest
from pathfm.rows import Rows


def clouds(n=500, d=12, classes=3, signal=0.7):
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(n) % classes)
    return (2 + signal * rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))).astype(np.float32), y


def mapped(x, path):
    np.save(path, x)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_rows_are_those_of_the_matrix(tmp_path, monkeypatch, kind):
    x = clouds()[0].astype(kind)
    monkeypatch.setattr(rows, "HELD_BYTES", 200)  # pages go while rows are still read
    which = np.random.default_rng(1).permutation(500)[:200]
    some = Rows(mapped(x, tmp_path / "x.npy")).take(which).changed(np.abs).changed(np.sqrt)
    parts = list(some.blocks(33))
    assert [places.stop - places.start for places, _ in parts] == [33] * 6 + [2]
    found = np.concatenate([block for _, block in parts])
    assert found.dtype == np.float32 and np.array_equal(found, np.sqrt(np.abs(x[which].astype(np.float32))))
    plain = Rows(x)
    assert plain.mean() == pytest.approx(x.astype(float).mean(axis=0), rel=1e-6)
    assert np.array_equal(plain.take(x[:, 0] > 2)[:], x[x[:, 0] > 2].astype(np.float32))
    assert (len(plain), plain.d, len(some)) == (500, 12, 200)


def test_rows_that_are_no_features_are_named():
    x = clouds()[0]
    x[[7, 33]] = np.nan
    assert len(Rows(x, np.arange(7)).finite()) == 7
    with pytest.raises(InputError, match="1 of 20 feature rows hold NaN or infinity, first row 33"):
        Rows(x, np.arange(20, 40)).finite()
    with pytest.raises(InputError, match=r"must be a matrix .* not of shape \(500,\)"):
        Rows(x[:, 0])


@pytest.mark.parametrize("classes", [2, 4])
def test_the_balanced_regression_is_that_of_scikit_learn(monkeypatch, classes):
    monkeypatch.setattr(rows, "BLOCK_BYTES", 4 * 12 * 70)  # eight blocks
    x, y = clouds(classes=classes)
    y[y == 1] = np.where(np.arange((y == 1).sum()) % 3, 0, 1)  # unlike sizes
    found, theirs = None, LogisticRegression(class_weight="balanced", max_iter=500, warm_start=True)
    for c, near in ((1e-3, 1e-9), (1e-1, 1e-6), (10.0, 1e-2)):  # the last search ends where the ground is flat
        found, theirs = regression.balanced(x, y, c, found), theirs.set_params(C=c).fit(x.astype(float), y)
        wanted = theirs.coef_ if classes > 2 else np.r_[0 * theirs.coef_, theirs.coef_]
        assert found.weight == pytest.approx(wanted, abs=near)
        assert (found.answers(x) == theirs.predict(x)).all()
    assert 0.3 < (found.answers(x) == y).mean() < 1


def _top(x, k, apart):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = np.where(apart, -np.inf, x @ x.T)
    ids = np.argsort(-cosines, axis=1)[:, :k]
    cosines = np.take_along_axis(cosines, ids, axis=1)
    return np.where(np.isinf(cosines), -1, ids), cosines


@pytest.mark.parametrize(("queries", "keys"), [(64, 7), (33, 100), (1000, 1000)])
def test_neighbours_found_in_blocks_are_those_of_all_pairs(monkeypatch, queries, keys):
    monkeypatch.setattr(neighbours, "QUERIES", queries)
    monkeypatch.setattr(neighbours, "KEYS", keys)
    x = clouds(n=150)[0]
    group = np.arange(150) // 50  # a block of keys may hold none but the query's own
    for own, apart in ((None, np.eye(150, dtype=bool)), (group, group[:, None] == group)):
        ids, cosines = nearest(x, k=20, bank_group=own)
        wanted, similar = _top(x, 20, apart)
        assert (ids == wanted).all() and cosines == pytest.approx(similar, abs=1e-6)
    ids, cosines = nearest(x[:5], x[5:], k=20)
    assert ids.shape == (145, 5) and (np.sort(ids) == np.arange(5)).all() and (np.diff(cosines) <= 0).all()


def whole_logistic(x, y):
    """The regression on one matrix, as it was before it came in blocks."""
    import torch

    x, y = torch.from_numpy(x), torch.from_numpy(y)
    weight, bias = torch.zeros(int(y.max()) + 1, x.shape[1], requires_grad=True), None
    bias = torch.zeros(len(weight), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=1000, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        entropy = torch.nn.functional.cross_entropy(x @ weight.T + bias, y)
        value = entropy + weight.norm() * 100 / (2 * x.shape[1] * len(weight))
        value.backward()
        return value

    optimiser.step(closure)
    return weight.detach().numpy(), closure().item()


def test_blocks_change_no_answer(tmp_path, monkeypatch):
    """Every protocol on a mapped file in small blocks, against the same in one piece in memory."""
    features = study(signal=0.6).split("patient", seed=1)
    small = replace(features, x=mapped(features.x, tmp_path / "x.npy"))
    ask = probe.linear, probe.knn, probe.logistic, probe.simpleshot, lambda f: probe.knn(f, centred=True)
    whole = [one(features) for one in ask]
    episodes, found = probe.few_shot(features, (4,), 20), probe.retrieval(features)
    x, y = clouds(n=300, d=40)
    one_piece = uni.logistic(x, y)
    weight, objective = whole_logistic(x, y)
    assert np.array_equal(one_piece.weight, weight) and one_piece.objective == pytest.approx(objective, abs=1e-7)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 4 * 8 * 50)
    monkeypatch.setattr(rows, "HELD_BYTES", 1000)
    monkeypatch.setattr(neighbours, "QUERIES", 40)
    monkeypatch.setattr(neighbours, "KEYS", 64)
    assert uni.logistic(x, y).objective == pytest.approx(objective, abs=1e-6)
    assert uni.logistic(x, y).weight == pytest.approx(weight, abs=1e-3)  # the search ends on a flat ground
    for one, wanted in zip(ask, whole, strict=True):
        assert one(small).table["predicted"].tolist() == wanted.table["predicted"].tolist()
        assert one(small).settings.get("C") == wanted.settings.get("C")
    assert probe.few_shot(small, (4,), 20)["balanced_accuracy"][0] == pytest.approx(
        episodes["balanced_accuracy"][0], abs=1e-6
    )
    assert probe.retrieval(small) == pytest.approx(found, abs=1e-6)


PEAKS = """
import json, sys
import numpy as np
from pathlib import Path
from test_rows import made_large
from pathfm import probe

def status(what):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])

features, found = made_large(sys.argv[1]), {}
asked = {
    "linear": lambda: probe.linear(features, grid=(1e-2,)),
    "kNN": lambda: probe.knn(features),
    "logistic": lambda: probe.logistic(features),
    "SimpleShot": lambda: probe.simpleshot(features),
    "few shots": lambda: probe.few_shot(features, (4,), 20),
    "retrieval": lambda: probe.retrieval(features),
}
probe.linear(made_large(sys.argv[1], 2000))  # what the first call loads belongs to the imports
for name, ask in asked.items():
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    ask()
    found[name] = status("VmHWM") - before
print(json.dumps(found))
"""
LARGE = 100_000, 512


def made_large(path: str, n: int = LARGE[0]):
    """The first n features of a file, two classes, two hundred tiles each to choose and to answer on."""
    roles = np.array(["probe-train", "validate", "test"])[np.where(np.arange(n) < 400, np.arange(n) % 2 + 1, 0)]
    features = make_features(np.zeros((n, 1)), np.arange(n) // 2 % 2)
    table = features.table.assign(role=roles)
    return replace(features, x=np.load(path, mmap_mode="r")[:n], tiles=replace(features.tiles, table=table))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_no_protocol_holds_half_of_the_features(tmp_path, kind):
    """Peak memory of a process of its own above what it took before, pages of the mapped file counted."""
    rng = np.random.default_rng(0)
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", kind, LARGE)
    for start in range(0, len(x), 10_000):
        x[start : start + 10_000] = rng.standard_normal((10_000, LARGE[1]), np.float32)
    x[np.arange(len(x)) // 2 % 2 == 1, :20] += 0.5
    x.flush()
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path / "x.npy")],
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole = 4 * LARGE[0] * LARGE[1]
    peaks = {name: peak / whole for name, peak in json.loads(done.stdout).items()}
    assert len(peaks) == 6 and max(peaks.values()) < 0.5, peaks
