"""DINO: a student learns to predict, from any view of a tile, what its own moving average says of another view."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathfm.augment import Views
from pathfm.config import PretrainConfig
from pathfm.losses import dino_loss, entropy, koleo, moved_centre, sharpened
from pathfm.schedules import Schedule
from pathfm.vit import DinoHead, check_size, make_backbone


class Encoder(nn.Module):
    """A backbone and the head on it; views of one size go through together."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """CLS features (V, B, D) and logits (V, B, K) of groups of views (V_i, B, 3, h_i, w_i), in their order."""
        features = torch.cat([self.backbone(group.flatten(0, 1)) for group in views if len(group)])
        shape = (-1, views[0].shape[1])
        return features.unflatten(0, shape), self.head(features).unflatten(0, shape)


class Outcome(NamedTuple):
    """What one step's forward pass gives; the last four are for the log."""

    loss: Tensor  # scalar, nats: DINO's, and KoLeo's where it has a weight
    teacher_logits: Tensor  # (G, B, K), to move the centre by
    koleo: Tensor  # before its weight, 0 where it has none
    teacher_entropy: Tensor  # mean over tiles, nats: log K is a teacher without opinion
    prototype_entropy: Tensor  # of the batch's mean probabilities, nats: 0 is one prototype for all


class Dino(nn.Module):
    """Student, teacher and centre. Caron et al. 2021, algorithm 1."""

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.config = config
        backbone, self.provenance = make_backbone(
            config.model,
            config.init,
            config.global_px,
            drop_path=config.drop_path,
            depth=config.depth,
            width=config.width,
            heads=config.heads,
        )
        check_size(backbone, config.global_px, "global_px")
        if config.local_views:
            check_size(backbone, config.local_px, "local_px")
        head = DinoHead(
            backbone.num_features,
            config.prototypes,
            config.head_hidden,
            config.head_bottleneck,
            config.head_norm,
            config.norm_last_layer,
        )
        self.student = Encoder(backbone, head)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for module in self.teacher.modules():  # the teacher has no stochastic depth
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        self.register_buffer("centre", torch.zeros(config.prototypes))

    def forward(self, views: Views, now: Schedule) -> Outcome:
        """The loss of a batch of views, and what the teacher said."""
        with torch.no_grad():
            _, logits = self.teacher(views.global_)
            with torch.autocast(logits.device.type, enabled=False):
                p = sharpened(logits, self.centre, now.teacher_temperature)
        features, student = self.student(views.global_, views.local)
        with torch.autocast(logits.device.type, enabled=False):
            loss, spread = dino_loss(student, p, self.config.student_temperature), logits.new_zeros(())
            if self.config.koleo:
                spread = sum(koleo(view) for view in features[: len(logits)])
                loss = loss + self.config.koleo * spread
        return Outcome(loss, logits, spread.detach(), entropy(p).mean(), entropy(p.mean((0, 1))))

    @torch.no_grad()
    def follow(self, outcome: Outcome, momentum: float) -> None:
        """After the student's step: the teacher moves towards it, the centre towards the teacher's mean."""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        self.centre.copy_(moved_centre(self.centre, outcome.teacher_logits, self.config.centre_momentum))

    def groups(self) -> list[dict]:
        """The student's parameters for AdamW: with weight decay, and (biases, norms) without, as DINO's code."""
        named = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        bare = [p for name, p in named if name.endswith(".bias") or p.ndim == 1]
        return [
            {"params": [p for name, p in named if not (name.endswith(".bias") or p.ndim == 1)]},
            {"params": bare, "weight_decay": 0.0},
        ]

    def hold_prototypes(self, now: Schedule) -> None:
        """Drops the gradients of the prototypes while they are held still."""
        if now.freeze_last_layer:
            for p in self.student.head.last_layer.parameters():
                p.grad = None


def clip_gradients(parameters: list[Tensor], limit: float) -> Tensor:
    """Scales each parameter's gradient to a norm of at most `limit` (0: leaves it); returns the norm of all before.

    By parameter, not over all of them: so does DINO's code.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if limit:
        torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1)))
    return norms.norm()
