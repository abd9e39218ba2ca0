"""Slide labels: runs trained at once are the runs trained alone, AUC against other libraries, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pathfm import InputError, scores, slide_probe
from pathfm.bags import Bags
from pathfm.metrics import balanced_accuracy
from pathfm.mil import HEADS
from pathfm.roc import auc
from pathfm.slide_probe import SlideProtocol, fit, table

RATES = {"transmil": 2e-4}
QUICK = SlideProtocol(runs=3, epochs=12, patience=4, batch_size=16)


def made(folder, n=96, d=6, signal=1.2, classes=2, seed=0) -> Bags:
    """Slides of 4 to 12 tiles; of a slide of class c one tile in three has `signal` more in feature c."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    files, names = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for slide in range(n):
        x = rng.normal(size=(rng.integers(4, 13), d)).astype(np.float32)
        x[::3, y[slide]] += signal
        np.save(folder / f"{slide}.npy", x)
        files.append(folder / f"{slide}.npy")
        names.append(pd.DataFrame({"slide_id": f"s{slide}", "x": range(len(x)), "y": 0, "mpp": 0.5}))
    roles = np.array(["probe-train"] * 3 + ["validate"] + ["test"] * 2)[np.arange(n) // classes % 6]
    columns = {"slide_id": [f"s{k}" for k in range(n)], "patient_id": [f"p{k}" for k in range(n)], "role": roles}
    slides = pd.DataFrame({**columns, "label": [f"c{c}" for c in y], "n_tiles": [len(one) for one in names]})
    return Bags("made", slides, files, names, pd.DataFrame(columns=["slide_id", "reason"]))


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    return made(tmp_path_factory.mktemp("bags"))


def alone(bags: Bags, head: str, protocol: SlideProtocol, seed: int):
    """One run as a plain loop would train it, one bag after another without padding: best state, epoch, score."""
    y = (bags.slides["label"] == "c1").to_numpy()
    train, validate = (np.flatnonzero(bags.slides["role"] == role) for role in ("probe-train", "validate"))
    torch.manual_seed(seed)
    model, rng, lr = HEADS[head](bags[0].shape[1], 1), np.random.default_rng(seed), RATES.get(head, 1e-3)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999))
    best, score, when, waited = None, -1, 0, 0

    def ask(row):
        x = torch.tensor(np.array(bags[row]))[None]
        return model(x, torch.ones(x.shape[:2], dtype=torch.bool))[0, 0]

    for epoch in range(protocol.epochs):
        for group in optimiser.param_groups:
            group["lr"] = lr / (3 if epoch < 5 else 1)
        order = rng.permutation(train)
        for start in range(0, len(order), protocol.batch_size):
            rows = order[start : start + protocol.batch_size]
            logits = torch.stack([ask(row) for row in rows])
            optimiser.zero_grad()
            torch.nn.BCEWithLogitsLoss()(logits, torch.tensor(y[rows], dtype=torch.float32)).backward()
            optimiser.step()
        with torch.no_grad():
            now = balanced_accuracy(y[validate], np.array([ask(row) > 0 for row in validate]))
        if now > score:
            best, score, when, waited = {k: v.clone() for k, v in model.state_dict().items()}, now, epoch, 0
        else:
            waited += 1
        if waited >= protocol.patience:
            break
    return best, when, score


@pytest.mark.parametrize("head, n, runs", [("abmil", 60, 3), ("transmil", 36, 2)])
def test_runs_trained_at_once_are_the_runs_trained_alone(head, n, runs, tmp_path, monkeypatch):
    """Early stopping at different epochs included: the bags are hard enough that runs differ."""
    monkeypatch.setattr(slide_probe, "BYTES_AT_ONCE", {"cpu": 2**40})
    bags, protocol = made(tmp_path / "hard", n=n, signal=0.9), replace(QUICK, runs=runs)
    together = fit(bags, head=head, protocol=protocol)
    for run in range(runs):
        best, when, score = alone(bags, head, protocol, seed=run)
        assert together.epochs[run] == when and together.validate[run] == pytest.approx(score)
        for name, tensor in best.items():
            assert torch.allclose(together.state[name][run], tensor, atol=2e-4), name
        model = HEADS[head](6, 1)
        model.load_state_dict(best)
        with torch.no_grad():
            said = [model(torch.tensor(np.array(bag))[None], torch.ones(1, len(bag), dtype=torch.bool)) for bag in bags]
        assert np.allclose(together.logits[run], torch.cat(said), atol=1e-3)
    assert len(set(together.epochs)) > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("head", ["abmil", "transmil"])
def test_heads_of_a_gpu_are_those_of_the_cpu(bags, head):
    few = replace(QUICK, runs=2, epochs=3)
    one, two = (fit(bags, head=head, protocol=few, device=device) for device in ("cpu", "cuda"))
    assert np.allclose(one.logits, two.logits, atol=1e-2) and (one.epochs == two.epochs).all()
    assert not any(tensor.is_cuda for tensor in two.state.values())


def test_groups_of_runs_change_nothing(bags, monkeypatch):
    together = fit(bags, protocol=QUICK)
    monkeypatch.setattr(slide_probe, "BYTES_AT_ONCE", {"cpu": 1})
    apart = fit(bags, protocol=QUICK)
    assert np.allclose(together.logits, apart.logits, atol=1e-4) and (together.epochs == apart.epochs).all()


@pytest.mark.parametrize("head", ["abmil", "mean", "max"])
def test_what_bags_say_is_learnt_and_what_they_do_not_say_is_not(bags, head, tmp_path):
    found = table([fit(bags, head=head, protocol=SlideProtocol(runs=2, epochs=40, patience=15))]).iloc[0]
    assert found["auc"] > 0.7 and found["low"] < found["auc"] < found["high"]
    assert (found["n_slides"], found["n_patients"], found["n_quarantined"], found["runs"]) == (32, 32, 0, 2)
    coin = table([fit(made(tmp_path / "coin", signal=0), head=head, protocol=QUICK)]).iloc[0]
    assert coin["low"] < 0.5 < coin["high"]


def test_standardised_features_forget_their_scale(bags, tmp_path):
    """Features 1,000 times as large and far from 0 give the same answers, and the same attention."""
    shifted = made(tmp_path / "shifted")
    for file in shifted.files:
        np.save(file, (1000 * np.load(file) + 50).astype(np.float32))
    protocol = SlideProtocol(runs=2, epochs=10, patience=10, standardise=True)
    one, two = (fit(each, protocol=protocol) for each in (bags, shifted))
    assert np.allclose(one.logits, two.logits, atol=1e-2) and np.allclose(one.attention(3), two.attention(3), atol=1e-3)
    tiles = np.concatenate([bag for bag, role in zip(bags, bags.slides["role"], strict=True) if role == "probe-train"])
    assert np.allclose(one.scaling, [tiles.mean(axis=0), tiles.std(axis=0)], atol=1e-5)


def test_transmil_learns_a_bag_too(bags):
    few = SlideProtocol(runs=1, epochs=3, patience=3, batch_size=8, slow_epochs=0)
    assert table([fit(bags, head="transmil", protocol=few)])["auc"].iloc[0] > 0.7


def test_many_classes_are_scored_as_tiles_are(tmp_path):
    bags = made(tmp_path / "three", classes=3, signal=3.0)
    fitted = fit(bags, protocol=SlideProtocol(runs=2, epochs=30, patience=20))
    predictions = fitted.predictions()
    assert fitted.logits.shape == (2, 96, 3) and [one.seed for one in predictions] == [0, 1]
    assert set(predictions[0].table["truth"]) == {"c0", "c1", "c2"} and len(predictions[0].table) == 30
    assert scores.interval(predictions).value > 0.6
    with pytest.raises(InputError, match="has 3 classes, an AUC has two"):
        table([fitted])


def test_attention_is_a_share_of_each_tile_and_finds_the_tiles_that_tell(bags):
    fitted = fit(bags, protocol=SlideProtocol(runs=2, epochs=40, patience=20))
    assert all(fitted.attention(row).sum() == pytest.approx(1, abs=1e-5) for row in range(3))
    test = np.flatnonzero(bags.slides["role"] == "test")
    telling = [fitted.attention(row)[::3].mean() > fitted.attention(row).mean() for row in test]
    assert np.mean(telling) > 0.7
    with pytest.raises(InputError, match="'mean' has no attention over tiles; take abmil"):
        fit(bags, head="mean", protocol=SlideProtocol(runs=1, epochs=1)).attention(0)


def test_auc_is_scikit_learns_and_its_interval_a_plain_bootstraps():
    rng = np.random.default_rng(0)
    truth = np.arange(60) % 2 == 1
    score = np.round(rng.normal(size=(3, 60)) + truth, 1)  # with ties
    patient = np.arange(60) // 4 * 2 + truth  # two slides of each of 30 patients
    found = auc(truth, score, patient)
    each = [roc_auc_score(truth, one) for one in score]
    assert found.value == pytest.approx(np.mean(each)) and found.spread == pytest.approx(np.std(each, ddof=1))
    assert found.n_patients == (15, 15)
    drawn, rng = [], np.random.default_rng(1)
    for _ in range(200):
        rows = np.concatenate([np.flatnonzero(patient == one) for one in rng.choice(30, 30)])
        drawn.append(np.mean([roc_auc_score(truth[rows], one[rows]) for one in score]))
    assert np.allclose([found.low, found.high], np.quantile(drawn, [0.025, 0.975]), atol=0.04)


def test_an_auc_of_few_patients_is_not_shown():
    truth = np.arange(30) < 9
    found = auc(truth, np.arange(30), np.arange(30))
    assert math.isnan(found.value) and math.isnan(found.low)
    assert found.reason == "21 + 9 test patients, fewer than 10 of a class"
    one_patient = auc(np.arange(40) < 20, np.arange(40), np.r_[np.zeros(20), np.arange(1, 21)])
    assert math.isnan(one_patient.value) and one_patient.reason.startswith("20 + 1 ")


def test_a_fold_gives_bags_its_roles_and_labels(bags):
    labels = pd.DataFrame({"slide_id": ["s3", "s1"], "role": ["test", "validate"], "label": ["yes", "no"]})
    found = bags.of(labels)
    assert found.slides[["slide_id", "role", "label"]].to_numpy().tolist() == [
        ["s1", "validate", "no"],
        ["s3", "test", "yes"],
    ]
    assert np.array_equal(found[1], bags[3]) and found.slides["patient_id"].tolist() == ["p1", "p3"]
    with pytest.raises(InputError, match="1 slides of the labels are not among made's, first other"):
        bags.of(pd.DataFrame({"slide_id": ["s1", "other"]}))


def relabelled(bags: Bags, **columns) -> Bags:
    return bags.of(bags.slides[["slide_id"]].assign(**columns))


def test_wrong_calls_say_what_would_be_right(bags, tmp_path):
    with pytest.raises(InputError, match="no head 'abmill'. Did you mean 'abmil'"):
        fit(bags, head="abmill")
    with pytest.raises(InputError, match="no column 'lable'. Did you mean 'label'"):
        fit(bags, "lable")
    with pytest.raises(InputError, match="slide s2 has no label"):
        fit(relabelled(bags, label=bags.slides["label"].where(bags.slides["slide_id"] != "s2")))
    with pytest.raises(InputError, match="have the label c0; a probe needs two classes"):
        fit(relabelled(bags, label="c0"))
    with pytest.raises(InputError, match="no slide has the role validate"):
        fit(relabelled(bags, role=bags.slides["role"].replace("validate", "test")))
    only = bags.slides["label"].where(bags.slides["role"] != "validate", "c0")
    with pytest.raises(InputError, match="no slide of label c1 has the role validate"):
        fit(relabelled(bags, label=only))
    with pytest.raises(InputError, match="patient 'p' is on two sides"):
        fit(relabelled(bags, patient_id="p"))
    spoilt = made(tmp_path / "spoilt", n=12)
    np.save(spoilt.files[5], np.full((3, 6), np.nan, np.float32))
    with pytest.raises(InputError, match="hold NaN or infinity, first for s5"):
        fit(spoilt)
