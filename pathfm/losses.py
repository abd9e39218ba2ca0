"""What the student is asked for, and how the teacher's answers and the features are kept from collapsing."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pathfm import ranks


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


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """The teacher's probabilities (..., K) such that every prototype is used equally over the batch, in float32.

    Sinkhorn-Knopp: prototypes are scaled to weigh alike, then samples, over and over; samples last, so that each sums
    to 1. Of all ranks' `logits` (..., K) together, in logarithms, so that nothing overflows. Caron et al. 2020 (SwAV),
    section 3.1 and appendix; DINOv2 (Oquab et al. 2023, section 4) takes three iterations in place of the centre.
    """
    q = full(logits).flatten(0, -2) / temperature
    for _ in range(iterations):  # in place: at many prototypes this is the largest tensor of a step
        q -= _log_sum(q)
        q -= q.logsumexp(1, keepdim=True)
    return q.exp_().view(logits.shape)


def _log_sum(x: Tensor) -> Tensor:
    """Logarithm of the sum of exp(x) over the rows (B, K) of all ranks: (K,)."""
    own = x.logsumexp(0)
    top = ranks.largest(own)
    return top + ranks.summed((own - top).exp()).log()


def ibot_loss(student: Tensor, teacher: Tensor, masks: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy at hidden patches against what the teacher sees there: mean over an image's, then over images.

    student  (M, K) logits of the M hidden patches of all images, in the order of `masks`
    teacher  (M, K) probabilities at the same places
    masks    (I, N) True where a patch of an image was hidden, best on the CPU, where counting them keeps no GPU
             waiting; an image without any counts as 0

    Zhou et al. 2022 (iBOT), eq. 2; the means as in DINOv2's code.
    """
    log_p = F.log_softmax(full(student) / temperature, dim=-1)
    share = (1 / masks.sum(1, keepdim=True).clamp(min=1)).expand(masks.shape)[masks]
    return -(share.to(log_p) * torch.einsum("mk,mk->m", teacher, log_p)).sum() / len(masks)


def koleo(features: Tensor) -> Tensor:
    """How crowded `features` (B, D) are: minus the mean log distance to the nearest other one, all at length 1.

    The nearest of all ranks' features, where DINOv2's code takes each GPU's own. Sablayrolles et al. 2019, eq. 2;
    DINOv2 (Oquab et al. 2023, section 4) adds it by view, for the global views' CLS.
    """
    x = F.normalize(full(features), dim=-1)
    everyone = ranks.gathered(x)
    with torch.no_grad():
        nearest = (x @ everyone.mT).scatter_(1, ranks.own_rows(x)[:, None], -2).argmax(1)
    return -torch.log(F.pairwise_distance(x, everyone[nearest], eps=1e-8) + 1e-8).mean()


def kde(features: Tensor, kappa: float = 5.0) -> Tensor:
    """How dense `features` (B, D) are: mean log of a von Mises-Fisher kernel density at each, of all other ones.

    log of the mean over j != i of exp(kappa x_i . x_j), all at length 1: kappa where all are alike, near 0 where they
    are spread. Of all ranks' features. Unlike `koleo` it stays smooth where two are the same. Virchow2 (Zimmermann et
    al. 2024, section 5.2) has kappa 5; Wang & Isola 2020.
    """
    x = F.normalize(full(features), dim=-1)
    everyone = ranks.gathered(x)
    likeness = (kappa * x @ everyone.mT).scatter(1, ranks.own_rows(x)[:, None], -torch.inf)
    return (likeness.logsumexp(1) - math.log(len(everyone) - 1)).mean()


class Heard(NamedTuple):
    """What the teacher said, as far as it moves a centre."""

    total: Tensor  # (K,) the sum of its logits
    rows: int  # over how many

    @classmethod
    def of(cls, logits: Tensor) -> Heard:
        """Of logits (..., K)."""
        rows = full(logits).flatten(0, -2)
        return cls(rows.sum(0), len(rows))


def moved_centre(centre: Tensor, heard: list[Heard], momentum: float) -> Tensor:
    """The centre (K,) after a batch, in one or several parts: a moving average of all ranks' mean. Eq. 4."""
    rows = ranks.summed(centre.new_tensor(sum(part.rows for part in heard), dtype=torch.float32))
    mean = ranks.summed(sum(part.total for part in heard)) / rows.to(centre.dtype)
    return torch.where(rows > 0, torch.lerp(mean, centre, momentum), centre)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of probabilities (..., K), over the last axis; log K where they are uniform."""
    return -torch.xlogy(p, p).sum(-1)


def full(x: Tensor) -> Tensor:
    """`x` in float32 at least: half precisions cannot hold a softmax over many prototypes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
