"""What the student is asked for, and how the teacher's answers are kept from collapsing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dino_loss(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of each student view against every *other* teacher view, in nats.

    student      (V, B, K) logits, the global views first
    teacher      (G, B, K) probabilities, centred and sharpened, G <= V
    temperature  of the student's softmax

    Caron et al. 2021, eq. 1 and algorithm 1.
    """
    log_p = F.log_softmax(full(student) / temperature, dim=-1)
    pairs = -torch.einsum("gbk,vbk->gv", teacher, log_p) / student.shape[1]
    same = torch.eye(len(teacher), len(student), dtype=torch.bool, device=pairs.device)
    return pairs[~same].mean()


def sharpened(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """The teacher's probabilities (..., K) in float32: logits less their centre, over a low temperature.

    Centring works against one prototype for all, sharpening against all prototypes equally (section 5.3).
    """
    return F.softmax((full(logits) - centre) / temperature, dim=-1)


def koleo(features: Tensor) -> Tensor:
    """How crowded `features` (B, D) are: minus the mean log distance to the nearest other one, all at length 1.

    Sablayrolles et al. 2019, eq. 2; DINOv2 (Oquab et al. 2023, section 4) adds it by view, for the global views' CLS.
    """
    x = F.normalize(full(features), dim=-1)
    with torch.no_grad():
        nearest = (x @ x.mT).fill_diagonal_(-2).argmax(1)
    return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()


def moved_centre(centre: Tensor, logits: Tensor, momentum: float) -> Tensor:
    """The centre (K,) after a batch of teacher logits (G, B, K): a moving average of their mean. Eq. 4."""
    return torch.lerp(full(logits).flatten(0, -2).mean(0), centre, momentum)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of probabilities (..., K), over the last axis; log K where they are uniform."""
    return -torch.xlogy(p, p).sum(-1)


def full(x: Tensor) -> Tensor:
    """`x` in float32 at least: half precisions cannot hold a softmax over many prototypes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
