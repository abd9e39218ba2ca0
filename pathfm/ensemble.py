"""Networks of one kind trained side by side as one batch, each as if it were alone: its weights, its end, its best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

LOW = 1 / 3  # of the learning rate in the first epochs: what torch's ConstantLR does when nothing is set


def apply(model: nn.Module, state: dict[str, Tensor], *inputs: Tensor, shared: bool = False, **how) -> Tensor:
    """What each of A networks says: a leading A before what one would say.

    model   whose code is run; state has the parameters and buffers of all, each with a leading A
    inputs  with a leading A, each network's own; shared: the same for all, without it
    how     as keywords, the same for all
    """
    where = (0, *[None if shared else 0] * len(inputs))
    return vmap(lambda own, *given: functional_call(model, own, given, how), in_dims=where)(state, *inputs)


class Ensemble:
    """R networks in training: AdamW, whose arithmetic is element by element, so that no network sees another.

    models       fresh networks of one kind, on one device
    slow_epochs  at first, at a third of `lr`
    patience     looks without a better score after which a run ends; it costs nothing from then on

    model        whose code all share; its train() and eval() are those of all
    numbers      (A,) the runs that go on; what goes in and out of calls and steps has a leading A
    state        parameters and buffers as they stand, with a leading A
    best         the same with a leading R, of the look at which each run scored highest
    score, when  (R,) that score, and what `look` was told of it
    """

    def __init__(self, models: Sequence[nn.Module], lr: float, slow_epochs: int, patience: int) -> None:
        self.model, self.patience = models[0], patience
        self.parameters, self.buffers = stack_module_state(list(models))
        self.optimiser = torch.optim.AdamW(self.parameters.values(), lr=lr)
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimiser, LOW, slow_epochs)
        self.best = {name: tensor.detach().clone() for name, tensor in self.state.items()}
        self.numbers = np.arange(len(models))
        self.score, self.when = np.full(len(models), -1.0), np.zeros(len(models), int)
        self.waited = np.zeros(len(models), int)

    @property
    def state(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}

    def step(self, losses: Tensor) -> None:
        """One update of every network by its own loss, (A,)."""
        self.optimiser.zero_grad()
        losses.sum().backward()
        self.optimiser.step()

    def look(self, scores: np.ndarray, when: int) -> None:
        """Ends an epoch, by the scores (A,) of the networks as they stand: the best are kept, the tired end."""
        self.schedule.step()
        better = scores > self.score[self.numbers]
        rows = self.numbers[better]
        for name, tensor in self.state.items():
            self.best[name][_index(rows, tensor)] = tensor.detach()[_index(np.flatnonzero(better), tensor)]
        self.score[rows], self.when[rows] = scores[better], when
        self.waited[self.numbers] += 1
        self.waited[rows] = 0
        going = self.waited[self.numbers] < self.patience
        if not going.all():
            self._go_on(np.flatnonzero(going))

    def _go_on(self, kept: np.ndarray) -> None:
        """Lets go of every other network, and of what the optimiser remembers of it."""
        self.numbers = self.numbers[kept]
        for name, old in self.parameters.items():
            rows, memory = _index(kept, old), self.optimiser.state.pop(old, {})
            self.parameters[name] = new = old.detach()[rows].requires_grad_()
            # The count of steps is one for all.
            self.optimiser.state[new] = {key: held[rows] if held.ndim else held for key, held in memory.items()}
        self.optimiser.param_groups[0]["params"] = list(self.parameters.values())
        self.buffers = {name: tensor[_index(kept, tensor)] for name, tensor in self.buffers.items()}


def _index(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)
