"""Features with roles in, answers out: eva's protocols, UNI's regression and nearest mean, episodes, retrieval."""

from dataclasses import replace

import numpy as np
import pytest
from test_probe import study

from pathfm import heads, probe, uni
from pathfm.errors import InputError
from pathfm.metrics import balanced_accuracy
from pathfm.protocols import protocol
from pathfm.scores import interval, paired, scores

QUICK = {"max_steps": 120, "lr": 1e-2, "patience": 20}


def rows_of(features, role):
    return np.flatnonzero(features.table["role"] == role)


def without(features, role):
    """The same features where tiles of that role train instead."""
    table = features.table.assign(role=features.table["role"].replace(role, "probe-train"))
    return replace(features, tiles=replace(features.tiles, table=table))


@pytest.fixture(scope="module")
def features():
    return study(signal=0.7).split("patient", seed=1)


def test_the_score_of_eva_is_the_mean_of_its_runs(features):
    found = probe.eva(features, "eva-2026", runs=3, **QUICK)
    train, validate, test = (rows_of(features, role) for role in ("probe-train", "validate", "test"))
    chosen = replace(protocol("eva-2026", len(train), len(validate), 3), runs=3, **QUICK)
    alone = heads.fit(chosen, features.x, features.y, train, validate)
    each = [balanced_accuracy(features.y[test], one) for one in alone.answers(features.x, test)[0]]
    assert found.settings["scores"] == pytest.approx(each) and len(set(each)) > 1
    assert found.balanced_accuracy == pytest.approx(np.mean(each))
    assert (found.settings["kept"], found.settings["stopped"]) == (alone.kept[0].tolist(), alone.stopped[0].tolist())
    assert (found.settings["reported on"], found.settings["optimiser"], found.probe) == ("test", "AdamW", "eva-2026")
    assert found.table["right"].isin(np.arange(4) / 3).all()
    low, high = interval(found)[1:]
    assert low < found.balanced_accuracy < high
    table = scores([found, replace(probe.knn(features), floor=True)])
    assert table["balanced_accuracy"][0] == pytest.approx(np.mean(each)) and table["seeds"][0] == 1


def test_runs_do_not_move_a_paired_difference_but_by_their_share(features):
    found = probe.eva(features, "eva-2026", runs=4, **QUICK)
    same = paired(found, found)
    assert same[:3] == (0, 0, 0)
    wrong = replace(found, table=found.table.assign(right=0.0))
    assert paired(found, wrong).value == pytest.approx(found.balanced_accuracy)


def test_without_test_tiles_the_score_is_of_the_tiles_that_chose(features):
    seen = without(features, "test")
    found = probe.eva(seen, "eva-2024", max_steps=60)
    assert found.settings["reported on"] == "validate" and set(found.table["role"]) == {"validate"}
    assert found.balanced_accuracy == pytest.approx(found.settings["validate"])
    assert probe.simpleshot(seen).settings["reported on"] == "validate"
    fitted = uni.logistic(seen.x[rows_of(seen, "probe-train")], seen.y[rows_of(seen, "probe-train")])
    assert probe.logistic(seen).settings["objective"] == fitted.objective


def test_of_several_learning_rates_the_best_on_validate_answers(features):
    rates = (1e-5, 1e-2, 3e-2)
    alone = [probe.eva(features, "eva-2026", runs=3, **{**QUICK, "lr": rate}) for rate in rates]
    best = max(alone, key=lambda one: one.settings["validate"])
    found = probe.eva(features, "eva-2026", runs=3, learning_rates=rates, **QUICK)
    assert (found.settings["lr"], found.settings["learning rates"]) == (best.settings["lr"], rates)
    assert alone[0].settings["validate"] < found.settings["validate"] == pytest.approx(best.settings["validate"])
    assert found.settings["scores"] == pytest.approx(best.settings["scores"])
    assert (best.probe, found.probe) == ("eva-2026", "eva-2026, learning rate searched")


def test_slides_have_twenty_runs(features):
    assert len(probe.eva(features, slides=True, max_steps=40).settings["scores"]) == 20


def test_logistic_learns_from_train_and_validate(features):
    both = np.sort(np.concatenate([rows_of(features, "probe-train"), rows_of(features, "validate")]))
    fitted = uni.logistic(features.x[both], features.y[both])
    found = probe.logistic(features)
    expected = np.array(features.tiles.classes)[fitted.answers(features.x[rows_of(features, "test")])]
    assert (found.table["predicted"] == expected).all()


def test_simpleshot_and_centred_neighbours_do_not_mind_a_shift(features):
    moved = replace(features, x=features.x + 50)
    for judge in (probe.simpleshot, lambda f: probe.knn(f, centred=True)):
        assert judge(moved).balanced_accuracy == pytest.approx(judge(features).balanced_accuracy, abs=0.02)
        assert judge(features).balanced_accuracy > 0.6
    assert probe.knn(features, centred=True).probe == "kNN (centred)"


def test_few_shots_and_retrieval(features):
    table = probe.few_shot(features, episodes=40)
    counts = np.bincount(features.y[rows_of(features, "probe-train")])
    assert table["shots"].tolist() == [1, 2, 4, 8, 16, 32, 64] and 64 <= counts.min() < 128
    assert table["balanced_accuracy"].is_monotonic_increasing
    assert (table["low"] <= table["balanced_accuracy"]).all() and (table["balanced_accuracy"] <= table["high"]).all()
    found = probe.retrieval(features)
    assert found["acc@1"] <= found["acc@3"] <= found["acc@5"] and found["majority@5"] > 1 / 3
    with pytest.raises(InputError, match="200 shots need 200"):
        probe.few_shot(features, shots=[200])


def test_roles_without_a_class_and_unknown_protocols_are_named(features):
    table = features.table.copy()
    table.loc[(table["label"] == "class1") & (table["role"] == "test"), "role"] = "probe-train"
    lacking = replace(features, tiles=replace(features.tiles, table=table))
    for ask in (probe.eva, probe.few_shot):
        with pytest.raises(InputError, match="no tile of class class1 has the role test"):
            ask(lacking)
    with pytest.raises(InputError, match="Did you mean 'eva-2026'"):
        probe.eva(features, "eva-2025")
    bad = replace(features, x=np.full_like(features.x, np.nan))
    for ask in (probe.eva, probe.logistic, probe.simpleshot, probe.few_shot, probe.retrieval):
        with pytest.raises(InputError, match="NaN"):
            ask(bad)
