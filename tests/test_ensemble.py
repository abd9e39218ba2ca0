"""Networks trained side by side are the networks trained alone: losses, weights, statistics, ends and best epochs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pathfm.ensemble import Ensemble, apply

EPOCHS, PATIENCE, LR, SLOW = 12, 2, 1e-2, 3


def network(seed: int) -> nn.Module:
    """With what is hard to do side by side: convolutions, in groups too, and batch norm.

    In float64: a bias in front of batch norm has no gradient but rounding, which Adam would blow up to its steps.
    """
    torch.manual_seed(seed)
    layers = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=8)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 1)).double()


def batch(run: int, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of an epoch and a run: each sees its own."""
    chance = torch.Generator().manual_seed(1000 * int(run) + 10 * epoch + step)
    x = torch.randn(6, 4, 6, 6, generator=chance, dtype=torch.float64)
    return x, x[:, :2].mean(dim=(1, 2, 3))


HELD = torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def loss(said: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return (said[..., 0] - truth).square().mean(dim=-1)


def score(said: torch.Tensor) -> np.ndarray:
    """Rounded, so that ties and looks without progress are frequent."""
    return -loss(said, HELD[:, :2].mean(dim=(1, 2, 3))).numpy().round(2) + 1


def alone(run: int):
    model, losses, best, waited = network(run), [], (-1.0, 0, None), 0
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR)
    for epoch in range(EPOCHS):
        for group in optimiser.param_groups:
            group["lr"] = LR / (3 if epoch < SLOW else 1)
        model.train()
        for step in range(2):
            x, y = batch(run, epoch, step)
            losses.append(loss(model(x), y))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        model.eval()
        with torch.no_grad():
            now = float(score(model(HELD)))
        waited += 1
        if now > best[0]:
            best, waited = (now, epoch, copy.deepcopy(model.state_dict())), 0
        if waited == PATIENCE:
            break
    return torch.stack(losses).detach(), epoch, best


def test_networks_trained_side_by_side_are_those_trained_alone():
    runs, losses, ends = Ensemble([network(run) for run in range(4)], LR, SLOW, PATIENCE), {}, {}
    for epoch in range(EPOCHS):
        runs.model.train()
        for step in range(2):
            x, y = (torch.stack(part) for part in zip(*[batch(run, epoch, step) for run in runs.numbers], strict=True))
            now = loss(apply(runs.model, runs.state, x), y)
            runs.step(now)
            for run, one in zip(runs.numbers, now.detach(), strict=True):
                losses.setdefault(run, []).append(one)
        runs.model.eval()
        ends |= dict.fromkeys(runs.numbers.tolist(), epoch)
        with torch.no_grad():
            runs.look(score(apply(runs.model, runs.state, HELD, shared=True)), epoch)
        if not len(runs.numbers):
            break
    for run in range(4):
        each, end, (value, when, best) = alone(run)
        assert torch.allclose(torch.stack(losses[run]), each, atol=1e-9)
        assert (ends[run], runs.when[run]) == (end, when) and runs.score[run] == pytest.approx(value)
        for name, tensor in best.items():
            assert torch.allclose(runs.best[name][run], tensor, atol=1e-6), name
    assert len(set(ends.values())) > 1, "no run ended before another"
