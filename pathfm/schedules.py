"""Values that change over a run, as closed forms of the step, so that a resumed run needs no history."""

from __future__ import annotations

import math
from typing import NamedTuple

from pathfm.config import PretrainConfig


def cosine(step: int, steps: int, start: float, end: float, warmup: int = 0) -> float:
    """The value at `step` of `steps`: from 0 linearly to `start` over `warmup` steps, then half a cosine to `end`.

    As `cosine_scheduler` of facebookresearch/dino: the warm-up reaches `start` at its last step.
    """
    if step < warmup:
        return start * step / max(1, warmup - 1)
    share = (step - warmup) / max(1, steps - warmup)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))


def linear(step: int, start: float, end: float, over: int) -> float:
    """The value at `step`: from `start` to `end` over the first `over` steps, `end` afterwards."""
    return end if step >= over else start + (end - start) * step / max(1, over - 1)


class Schedule(NamedTuple):
    """What holds at one step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher
    teacher_temperature: float
    freeze_last_layer: bool


def schedule(config: PretrainConfig, step: int) -> Schedule:
    """The values of step `step` (from 0). Caron et al. 2021, section 3.2 and their code."""
    n = config.steps
    return Schedule(
        lr=cosine(step, n, config.lr, config.min_lr, warmup=round(config.warmup * n)),
        weight_decay=cosine(step, n, config.weight_decay, config.weight_decay_end),
        momentum=cosine(step, n, config.momentum, 1.0),
        teacher_temperature=linear(
            step,
            config.teacher_temperature_start,
            config.teacher_temperature,
            over=round(config.temperature_warmup * n),
        ),
        freeze_last_layer=step < round(config.freeze_last_layer * n),
    )


def set_rates(groups: list[dict], now: Schedule) -> None:
    """Gives an optimiser's parameter groups their learning rate and weight decay of this step.

    A group's `rate` and `decay` (1 where it has none) scale them; one with `prototypes` stands still while those do.
    """
    for group in groups:
        still = group.get("prototypes", False) and now.freeze_last_layer
        group["lr"] = 0.0 if still else now.lr * group.get("rate", 1.0)
        group["weight_decay"] = now.weight_decay * group.get("decay", 1.0)
