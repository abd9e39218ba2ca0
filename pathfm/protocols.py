"""The protocols of eva: how a linear head on frozen features is trained, stopped and chosen.

A protocol is more than a learning rate: when it looks at the validation score, for how long it waits and which head it
keeps decide the number. Both dates of eva are here as its code is, where its documentation says otherwise too; scores
of different dates must not stand in one column.

    eva-2024          tags 0.0.1 and 0.0.2, behind the tables of Kaiko 2024
    eva-2026          0.4.5, the current leaderboard
    eva-2026-10shot   its PatchCamelyon with 10 images a class
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pathfm.errors import InputError, nearest

PROTOCOLS = ("eva-2024", "eva-2026", "eva-2026-10shot")
MAX_STEPS = 12_500  # of all three
LARGE = 4096  # images of train from which eva-2024 has its large batch


@dataclass(frozen=True)
class Protocol:
    """How a head is trained and chosen. A step is one update, an epoch one pass over train.

    optimiser   "AdamW" (torch's own weight decay, 0.01) or "SGD" (momentum 0.9, no decay, not Nesterov)
    schedule    "constant": a third of lr for five epochs, then lr. "cosine": over max_steps, but moved once an epoch
    patience    looks at validate without a better score after which a run stops
    runs        repeats from other shuffles
    monitor     "balanced accuracy" or "accuracy" on validate; its best head is kept, the first of equals. eva-2024
                watches the plain accuracy of two classes (val/BinaryAccuracy in configs/vision/dino_vit/offline/
                mhist.yaml and patch_camelyon.yaml, eva 0a432fad and both tags) and reports the balanced one
    every       epochs between looks
    min_delta   by how much a score must be better to count for the patience; not for which head is kept
    shots       images a class that a run draws from train and keeps; 0 takes all
    one_start   every run starts from the same head, as deep copies of one model do. In eva 0.4.5 a head is built when
                the model is configured: `eva fit` copies first, so that each run has its own; `eva predict_fit` has
                configured it for predicting, and all runs share one (`replace(found, one_start=True)`)
    """

    name: str
    optimiser: str
    lr: float
    batch_size: int
    schedule: str
    patience: int
    runs: int = 5
    monitor: str = "balanced accuracy"
    max_steps: int = MAX_STEPS
    every: int = 1
    min_delta: float = 0.0
    shots: int = 0
    one_start: bool = False


def protocol(name: str, n_train: int, n_validate: int, classes: int, max_steps: int = MAX_STEPS) -> Protocol:
    """The protocol of that name for a data set of that size.

    The patience follows the rules that give every value in eva's configurations: eva-2026 20 % of the epochs, rounded
    up; eva-2024 5 % of the epochs as if they went over train and validate. Which sets have eva-2024's small batch is
    known of four; for others it is ours: those under 4,096 images. Slides have 20 runs: `replace(found, runs=20)`.

    Raises InputError for another name.
    """
    if name == "eva-2024":
        batch = 4096 if n_train >= LARGE else 256
        return Protocol(
            name,
            optimiser="SGD",
            lr=0.01 * batch / 4096,
            batch_size=batch,
            schedule="cosine",
            patience=math.ceil(max_steps * batch / (20 * (n_train + n_validate))),
            monitor="accuracy" if classes == 2 else "balanced accuracy",
            max_steps=max_steps,
            one_start=True,
        )
    found = Protocol(name, "AdamW", 3e-4, 256, "constant", patience=0, max_steps=max_steps)
    if name == "eva-2026":
        return replace(found, patience=math.ceil(max_steps / (5 * math.ceil(n_train / 256))))
    if name == "eva-2026-10shot":
        # Its 125 looks, one in ten epochs of one step, are 10 % of the steps.
        return replace(found, patience=max_steps // 100, runs=50, every=10, min_delta=1e-4, shots=10)
    raise InputError(f"unknown protocol '{name}'.{nearest(name, PROTOCOLS)}")
