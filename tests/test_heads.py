"""Heads trained side by side are those that torch trains one at a time; stopping, choosing and bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from pathfm import heads
from pathfm.errors import InputError
from pathfm.metrics import balanced_accuracy
from pathfm.protocols import protocol


def clouds(classes=3, n=700, d=12, signal=0.5, seed=0):
    """Features, labels, and rows of train (5/7) and validate; classes unequally often."""
    rng = np.random.default_rng(seed)
    y = np.sort(rng.integers(0, classes * 2, n) % classes)[rng.permutation(n)]
    y[rng.random(n) < 0.2] = 0
    x = signal * rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))
    return x.astype(np.float32), y, np.arange(n * 5 // 7), np.arange(n * 5 // 7, n)


def one_at_a_time(chosen, x, y, train, validate, seed, run, rate):
    """One run with torch's own layer, loss, optimiser and schedule, as a training loop would be written."""
    classes = int(y.max()) + 1
    draw, d, k = heads._draw(seed, run), x.shape[1], 1 if classes == 2 else classes
    start = torch.rand(k, d + 1, generator=draw)
    if chosen.one_start:
        start = torch.rand(k, d + 1, generator=heads._draw(seed, 0))
    start = (start * 2 - 1) / math.sqrt(d)
    head = nn.Linear(d, k)
    head.load_state_dict({"weight": start[:, :d], "bias": start[:, d]})
    if chosen.optimiser == "SGD":
        optimiser = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
        schedule = lr_scheduler.CosineAnnealingLR(optimiser, T_max=chosen.max_steps)
    else:
        optimiser = torch.optim.AdamW(head.parameters(), lr=rate)
        schedule = lr_scheduler.ConstantLR(optimiser)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    best, kept, waited, step, epoch = -1.0, 0, 0, 0, 0
    while step < chosen.max_steps:
        order = torch.from_numpy(train)[torch.randperm(len(train), generator=draw)]
        batches = order.split(chosen.batch_size)
        for rows in batches:
            z = head(x[rows]).squeeze(-1)
            binary = nn.functional.binary_cross_entropy_with_logits
            loss = nn.functional.cross_entropy(z, y[rows]) if k > 1 else binary(z, y[rows].float())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step == chosen.max_steps:
                break
        schedule.step()
        epoch += 1
        if step < epoch * len(batches):
            break
        with torch.no_grad():
            z = head(x[validate])
        said = z.argmax(1) if k > 1 else (z[:, 0] > 0).long()
        truth = y[validate]
        score = (said == truth).double().mean().item()
        if chosen.monitor != "accuracy":
            score = balanced_accuracy(truth, said)
        waited = 0 if score > best else waited + 1
        if score > best:
            best, kept, weight = score, step, head.weight.detach().clone()
        if waited >= chosen.patience:
            break
    return best, kept, step, weight


@pytest.mark.parametrize("name", ["eva-2024", "eva-2026"])
@pytest.mark.parametrize("classes", [2, 3])
def test_side_by_side_is_as_alone(name, classes):
    x, y, train, validate = clouds(classes)
    chosen = protocol(name, len(train), len(validate), classes, max_steps=101)
    chosen = replace(chosen, runs=3, batch_size=64, patience=4)
    rates = (chosen.lr, 30 * chosen.lr)
    found = heads.fit(chosen, x, y, train, validate, seed=5, learning_rates=rates)
    assert len(set(found.stopped.flat)) > 1  # some stop early: they must not disturb the rest
    for column, rate in enumerate(rates):
        for run in range(3):
            best, kept, stopped, weight = one_at_a_time(chosen, x, y, train, validate, 5, run, rate)
            assert found.validate[column, run] == pytest.approx(best)
            assert (found.kept[column, run], found.stopped[column, run]) == (kept, stopped)
            assert torch.allclose(found.weight[column, run], weight, atol=2e-5)


def test_a_run_is_the_same_whatever_runs_beside_it():
    x, y, train, validate = clouds()
    chosen = replace(protocol("eva-2026", len(train), len(validate), 3, max_steps=60), patience=5)
    many = heads.fit(chosen, x, y, train, validate, learning_rates=(1e-3, 1e-2))
    few = heads.fit(replace(chosen, runs=2), x, y, train, validate, learning_rates=(1e-2,))
    assert torch.allclose(many.weight[1:, :2], few.weight, atol=1e-6)
    assert (many.stopped[1:, :2] == few.stopped).all() and (many.kept[1:, :2] == few.kept).all()
    other = heads.fit(chosen, x, y, train, validate, seed=1)
    assert not torch.allclose(other.weight[0, 0], other.weight[0, 1], atol=1e-3)


def test_runs_of_2024_share_their_start_and_those_of_2026_do_not():
    x, y, train, validate = clouds()
    for name, shared in (("eva-2024", True), ("eva-2026", False)):
        chosen = replace(protocol(name, len(train), len(validate), 3), runs=3)
        weight, bias = heads._starts(chosen, [heads._draw(0, run) for run in range(3)], 2, 12, 3)
        assert torch.equal(weight[0, 0], weight[0, 1]) is shared and torch.equal(bias[0, 0], bias[0, 1]) is shared
        assert torch.equal(weight[0], weight[1])  # learning rates do
        assert weight.abs().max() <= 1 / math.sqrt(12) and weight.abs().max() > 0.9 / math.sqrt(12)


def test_answers_are_those_of_the_kept_heads():
    x, y, train, validate = clouds(signal=1.5)
    chosen = replace(protocol("eva-2026", len(train), len(validate), 3, max_steps=400), patience=10, lr=1e-2)
    found = heads.fit(chosen, x, y, train, validate)
    said = found.answers(x, validate)
    assert said.shape == (1, 5, len(validate))
    each = [balanced_accuracy(y[validate], one) for one in said[0]]
    assert each == pytest.approx(found.validate[0]) and min(each) > 0.8
    places = np.searchsorted(found.looks, found.kept[0])
    assert found.history[places, 0, np.arange(5)] == pytest.approx(found.validate[0])
    assert (found.answers(x)[..., validate] == said).all()


def test_ten_shots_a_class_drawn_anew_for_each_run():
    x, y, train, validate = clouds(2, n=900)
    chosen = replace(protocol("eva-2026-10shot", len(train), len(validate), 2, max_steps=300), runs=4)
    pools = torch.stack([heads._pool(chosen, y, train, heads._draw(0, run)) for run in range(4)]).numpy()
    assert pools.shape == (4, 20) and (np.diff(np.sort(pools)) > 0).all()
    assert (np.bincount(y[pools].ravel()) == 40).all() and np.isin(pools, train).all()
    assert len({tuple(sorted(pool)) for pool in pools}) == 4
    found = heads.fit(chosen, x, y, train, validate)
    assert (np.diff(found.looks) == 10).all() and found.looks[0] == 10
    assert set(found.stopped.flat) <= set(range(10, 301, 10)) and chosen.patience == 3


def test_a_small_step_forward_is_kept_but_does_not_count_as_patience():
    chosen = replace(protocol("eva-2026", 100, 50, 2), runs=1, patience=2, min_delta=0.1)
    weight, bias = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1)
    watch = heads._Watch(chosen, weight, bias)
    for step, score in enumerate((0.5, 0.55, 0.6), start=1):
        weight += 1
        watch.look(step, np.array([[score]]))
    assert watch.kept.item() == 3 and watch.stopped.item() == 3 and not watch.running.any()
    assert watch.best[0].max() == 3


def test_logits_of_a_batch_within_0_and_1_are_taken_for_probabilities():
    z = torch.tensor([0.2, 0.7, 0.4, -0.1, 0.7, 0.4])[:, None, None, None]
    assert heads._classes(z, 3).flatten().tolist() == [0, 1, 0, 0, 1, 1]


def test_half_precision_and_memory_maps_are_read_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "HELD_BYTES", 0)  # pages are given back after each epoch
    x, y, train, validate = clouds()
    half = x.astype(np.float16)
    np.save(tmp_path / "x.npy", half)
    chosen = replace(protocol("eva-2026", len(train), len(validate), 3, max_steps=40), patience=9, runs=2)
    mapped = heads.fit(chosen, np.load(tmp_path / "x.npy", mmap_mode="r"), y, train, validate)
    whole = heads.fit(chosen, half.astype(np.float32), y, train, validate)
    assert torch.equal(mapped.weight, whole.weight)
    for own in (half, x):  # what another device than the CPU gets
        held = heads._Rows(own, "cpu")._copied(np.load(tmp_path / "x.npy", mmap_mode="r") if own is half else own)
        assert held.dtype == torch.from_numpy(own).dtype and np.array_equal(held.numpy(), own)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (np.where(np.arange(len(x))[:, None] == 33, np.nan, x), y), "NaN or infinity, first row 33"),
        (lambda x, y: (x, y[:-1]), "one label a row"),
        (lambda x, y: (x, np.where(np.arange(len(y)) < 500, np.minimum(y, 1), y)), "class 2 has 0 images in train"),
        (lambda x, y: (x, np.where(np.arange(len(y)) >= 500, np.maximum(y, 1), y)), "class 0 has 0 images in validate"),
        (lambda x, y: (x, y.astype(str)), "integers from 0"),
        (lambda x, y: (x, y * 0), "at least two classes"),
    ],
)
def test_bad_input_is_named(change, said):
    x, y, train, validate = clouds()
    chosen = protocol("eva-2026", len(train), len(validate), 3)
    with pytest.raises(InputError, match=said):
        heads.fit(chosen, *change(x, y), train, validate)


def test_too_few_shots_and_too_few_steps_are_named():
    x, y, train, validate = clouds(2)
    shots = protocol("eva-2026-10shot", len(train), len(validate), 2)
    few = np.flatnonzero(y == 1)[:4]
    with pytest.raises(InputError, match="class 1 has 4 images in train, eva-2026-10shot needs 10"):
        heads.fit(shots, x, y, np.concatenate([np.flatnonzero(y == 0), few]), validate)
    with pytest.raises(InputError, match="max_steps 1 end before"):
        heads.fit(replace(protocol("eva-2026", 500, 200, 2), max_steps=1), x, y, train, validate)


def test_one_image_of_a_class_is_enough():
    x, y, train, validate = clouds(signal=3)
    alone = np.flatnonzero(y == 2)
    train = np.setdiff1d(train, alone[1:])
    if alone[0] not in train:
        train = np.append(train, alone[0])
    chosen = replace(protocol("eva-2026", len(train), len(validate), 3, max_steps=300), lr=1e-2)
    found = heads.fit(chosen, x, y, train, np.setdiff1d(validate, alone[:1]))
    assert np.isfinite(found.validate).all() and (y[train] == 2).sum() == 1
