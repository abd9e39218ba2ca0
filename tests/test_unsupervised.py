"""RankMe and ODCorr against downstream scores: within a sweep and method, runs as clusters, pooled with its warning."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
from PIL import Image
from scipy.stats import spearmanr

from pathfm import InputError, TileSet, metrics, runs, unsupervised
from pathfm.features import extract
from pathfm.pretrain import Run


def points(rankme, score, sweep="a", run=None, random=False, **more) -> pd.DataFrame:
    n = len(rankme)
    table = pd.DataFrame({"sweep": sweep, "method": "dino", "where": "in", "run": range(n) if run is None else run})
    told = {"step": 1, "random": random, "n": 100, "d": 8, "rankme": rankme, "odcorr": -np.asarray(rankme, float)}
    return table.assign(**told, score=score, **more)[unsupervised.POINT]


def test_the_correlation_is_spearmans_with_ties():
    x, y = [1, 2, 2, 4, 5, 6], [0.1, 0.3, 0.2, 0.2, 0.9, 0.5]
    table = unsupervised.correlations(points(x, y)).set_index("metric")
    assert table.loc["rankme", "rho"] == pytest.approx(spearmanr(x, y).statistic)
    assert table.loc["odcorr", "rho"] == pytest.approx(-spearmanr(x, y).statistic)
    assert table.loc["rankme", ["points", "runs"]].tolist() == [6, 6]
    assert table.loc["rankme", "low"] <= table.loc["rankme", "rho"] <= table.loc["rankme", "high"]


def test_random_weights_are_left_out():
    trained = points([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])
    both = pd.concat([trained, points([100, 101], [0, -1], random=True)])
    assert unsupervised.correlations(both).equals(unsupervised.correlations(trained))
    assert unsupervised.correlations(both)["rho"][0] == pytest.approx(-1)


def test_within_and_pooled_can_say_the_opposite_and_the_pooled_one_is_warned_of():
    """Simpson's: within each sweep a higher rank scores lower, over both it scores higher."""
    table = pd.concat(
        [points([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], "a"), points([11, 12, 13, 14, 15], [15, 14, 13, 12, 11], "b")]
    )
    found = unsupervised.correlations(table)
    found = found[found["metric"] == "rankme"].set_index("sweep")
    assert found.loc["a", "rho"] == found.loc["b", "rho"] == pytest.approx(-1)
    assert found.loc[unsupervised.POOLED, "rho"] == pytest.approx(0.5152, abs=1e-3)
    assert "depend on N, D and the method" in found.loc[unsupervised.POOLED, "note"]
    assert found.loc[["a", "b"], "note"].eq("").all()
    assert list(found.index)[-1] == unsupervised.POOLED


@pytest.mark.parametrize("column", ["method", "where", "n", "d"])
def test_what_does_not_compare_is_a_row_of_its_own(column):
    one, other = points([1, 2, 3], [1, 2, 3]), points([1, 2, 3], [3, 2, 1])
    found = unsupervised.correlations(pd.concat([one, other.assign(**{column: 77})]))
    found = found[found["metric"] == "rankme"]
    assert found["rho"].iloc[:2].tolist() == pytest.approx([1, -1]) and len(found) == 3


def test_the_interval_draws_whole_runs():
    """Five checkpoints a run that say nothing new leave the interval as it is; independent runs narrow it."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=8)
    y = x + rng.normal(size=8)
    alone = unsupervised.correlations(points(x, y)).iloc[0]
    repeated = unsupervised.correlations(points(np.repeat(x, 5), np.repeat(y, 5), run=np.repeat(range(8), 5))).iloc[0]
    independent = unsupervised.correlations(points(np.repeat(x, 5), np.repeat(y, 5))).iloc[0]
    assert repeated["runs"] == alone["runs"] == 8 and repeated["points"] == 40
    assert repeated[["low", "high"]].tolist() == pytest.approx(alone[["low", "high"]].tolist())
    assert independent["high"] - independent["low"] < 0.7 * (alone["high"] - alone["low"])


def test_the_bootstrap_is_that_of_whole_runs_written_out():
    x, y, run = (
        np.array([1, 3, 2, 5, 4, 6, 8, 7, 9, 0.0]),
        np.array([2, 1, 3, 4, 9, 5, 6, 8, 7, 0.0]),
        np.repeat(range(5), 2),
    )
    found = unsupervised.correlations(points(x, y, run=run), resamples=300).iloc[0]
    draws = np.random.default_rng(0).integers(5, size=(300, 5))
    rows = [np.concatenate([np.flatnonzero(run == r) for r in one]) for one in draws]
    drawn = [spearmanr(x[r], y[r]).statistic for r in rows]
    assert found[["low", "high"]].tolist() == pytest.approx(np.nanquantile(drawn, [0.025, 0.975]))


def test_what_is_too_little_is_said():
    found = unsupervised.correlations(points([1, 2, 3, 4], [1, 2, 4, 3]))
    assert found["low"].isna().all() and found["note"][0] == "no interval from 4 runs, it takes 5"
    found = unsupervised.correlations(points([1, 1, 1], [1, 2, 3]))
    assert np.isnan(found["rho"][0]) and found["note"][0] == "fewer than three points, or all alike"
    few = unsupervised.correlations(points([1, 2, 3, 5, 4], [1, 2, 3, 4, 5]).assign(n=70))
    assert few["note"].tolist() == ["N is under 10 D", ""]
    assert len(unsupervised.correlations(points([], []))) == 0
    with pytest.raises(InputError, match="no points"):
        unsupervised.figure(points([], []))


def run_with(folder, knn=True, init="random"):
    looks = pd.DataFrame(
        {"step": [0, 10], "n": 100, "d": 8, "rankme": [5.0, 7.0], "odcorr": [0.3, 0.2], "knn": [0.4, 0.6]}
    )
    folder.mkdir()
    (looks if knn else looks.drop(columns="knn")).to_csv(folder / "watches.csv", index=False)
    run = Run(folder)
    run.__dict__["params"] = {"config": {"method": "dino", "init": init}}
    return run


def test_looks_of_runs_are_points_and_a_fresh_start_is_random(tmp_path):
    found = unsupervised.of_watches([run_with(tmp_path / "a"), run_with(tmp_path / "b", init="weights")], "mine")
    assert list(found.columns) == unsupervised.POINT
    assert found["random"].tolist() == [True, False, False, False]
    assert found["score"].tolist() == [0.4, 0.6, 0.4, 0.6] and found["run"].nunique() == 2
    with pytest.raises(InputError, match="without labelled tiles"):
        unsupervised.of_watches([run_with(tmp_path / "c", knn=False)], "mine")


def test_recorded_sweeps_are_points(monkeypatch):
    """Those of results/ and sweeps/ today: a point a run, and one for each start from random weights."""
    found = unsupervised.of_results("mpp_init")
    table, _ = runs.read_results("mpp_init")
    assert (~found["random"]).sum() == len(table)
    assert found["random"].sum() == (table["init"] == "random").sum() if len(table) else found.empty
    assert set(found.loc[~found["random"], "score"]) == set(table.get("test", ()))
    monkeypatch.setattr(runs, "read_results", lambda name: (table.drop(columns="rankme"), 0))
    if len(table):
        with pytest.raises(InputError, match="has no column 'rankme'"):
            unsupervised.of_results("mpp_init")


def tile_set(folder, name, n, seed) -> TileSet:
    rng = np.random.default_rng(seed)
    for i in range(n):
        path = folder / name / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    return TileSet.from_folder(folder / name)


def test_both_domains_are_measured_with_one_number_of_tiles(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    sets = {"in": tile_set(tmp_path, "in", 30, 0), "out": tile_set(tmp_path, "out", 24, 1)}
    how = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **how)
    found = unsupervised.measure(model, sets).set_index("where")
    assert found["n"].tolist() == [24, 24] and not found["enough"].any()
    x = extract(model, sets["out"]).x
    assert found.loc["out", "rankme"] == metrics.rankme(x).value
    assert found.loc["out", "odcorr"] == metrics.odcorr(x).value
    teacher = SimpleNamespace(config=SimpleNamespace(method="dinov2", steps=7), teacher=model)
    monkeypatch.setattr(unsupervised, "Run", lambda folder: teacher)
    table = unsupervised.of_teachers({"run-a": 0.7, "run-b": 0.6}, sets, "mine")
    assert list(table.columns) == unsupervised.POINT and table["where"].tolist() == ["in", "out"] * 2
    assert table["score"].tolist() == [0.7, 0.7, 0.6, 0.6] and set(table["method"]) == {"dinov2"}


def test_correlations_stand_side_by_side_with_their_verdict():
    rng = np.random.default_rng(0)
    rising, noise = np.arange(8.0), rng.normal(size=8)
    table = pd.concat([points(rising, rising), points(rising[:3], noise[:3]).assign(method="dinov2")])
    table = pd.concat([table, points(rising, noise).assign(where="out")])
    found = unsupervised.correlations(table)
    assert found["verdict"].tolist()[:6] == ["positive", "negative", "", "", "undecided", "undecided"]
    wide = unsupervised.beside(found)
    assert list(wide.index) == [("in", 100), ("out", 100)]
    assert wide.loc[("in", 100), ("dino", "RankMe")] == "rho +1.00 [+1.00, +1.00], 8 runs: positive"
    assert wide.loc[("in", 100), ("dinov2", "RankMe")].endswith(", 3 runs")
    assert wide.loc[("out", 100), ("dino", "ODCorr")].endswith("8 runs: undecided")
    assert pd.isna(wide.loc[("out", 100), ("dinov2", "RankMe")])


def test_the_figure_has_every_point_and_says_what_counts(style):
    table = pd.concat([points([1, 2, 3], [1, 2, 3]), points([9], [0], random=True), points([4, 5], [1, 2], "b")])
    fig = unsupervised.figure(table)
    assert len(fig.axes) == 4
    shown = [len(line.get_xdata()) for line in fig.axes[0].lines if line.get_marker() == "o"]
    assert shown == [1, 3]
    assert fig.axes[0].get_title(loc="left") == "rho +1.00, 3 runs"
    assert fig.axes[2].get_title(loc="left") == "no rank correlation, 2 runs"
