"""DINO: a student learns to predict, from any view of a tile, what its own moving average says of another view."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathfm import ranks
from pathfm.augment import Views
from pathfm.config import PretrainConfig
from pathfm.depth import by_tile
from pathfm.losses import Heard, dino_loss, entropy, koleo, moved_centre, sharpened
from pathfm.schedules import Schedule
from pathfm.vit import DinoHead, check_size, make_backbone


class Encoder(nn.Module):
    """A backbone and the head on it; views of one size go through together."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """CLS features (V, B, D) and logits (V, B, K) of groups of views (V_i, B, 3, h_i, w_i), in their order."""
        groups = [group for group in views if len(group)]
        if len({group.shape[1:] for group in groups}) == 1:
            groups = [torch.cat(groups)]
        features = torch.cat([self.backbone(group.flatten(0, 1)) for group in groups])
        shape = (-1, views[0].shape[1])
        return features.unflatten(0, shape), self.head(features).unflatten(0, shape)


class Outcome(NamedTuple):
    """What one step's forward pass gives."""

    loss: Tensor  # scalar, nats: the sum of the parts, each by its weight
    heard: dict[str, Heard]  # the teacher's logits by the name of the centre that they move
    log: dict[str, Tensor]  # scalars: the parts before their weights, 0 where they have none; entropies in nats


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
            registers=config.registers,
            layer_scale=config.layer_scale,
        )
        check_size(backbone, config.global_px, "global_px")
        if config.local_views:
            check_size(backbone, config.local_px, "local_px")
        self.patch_px = backbone.patch_embed.patch_size[0]
        self.student = self.encoder(backbone)
        self.drops = by_tile(backbone)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for module in self.teacher.modules():  # the teacher has no stochastic depth
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        self.register_buffer("centre", torch.zeros(config.prototypes))

    def encoder(self, backbone: nn.Module) -> Encoder:
        """The student, new heads on a backbone."""
        c = self.config
        return Encoder(
            backbone,
            DinoHead(
                backbone.num_features,
                c.prototypes,
                c.head_hidden,
                c.head_bottleneck,
                c.head_norm,
                c.norm_last_layer,
            ),
        )

    def forward(self, views: Views, now: Schedule) -> Outcome:
        """The loss of a batch of views, and what the teacher said."""
        with torch.no_grad():
            _, logits = self.teacher(views.global_)
            with torch.autocast(logits.device.type, enabled=False):
                p = self.answers(logits, now.teacher_temperature)
        features, student = self.student(views.global_, views.local)
        with torch.autocast(logits.device.type, enabled=False):
            loss, spread = dino_loss(student, p, self.config.student_temperature), logits.new_zeros(())
            if self.config.koleo:
                spread = sum(koleo(view) for view in features[: len(logits)])
                loss = loss + self.config.koleo * spread
        return Outcome(loss, {"centre": Heard.of(logits)}, {"koleo": spread.detach(), **entropies(p)})

    def answers(self, logits: Tensor, temperature: float) -> Tensor:
        """The teacher's probabilities (..., K) of its logits on CLS."""
        return sharpened(logits, self.centre, temperature)

    @torch.no_grad()
    def follow(self, outcomes: list[Outcome], momentum: float) -> None:
        """After the student's step on a batch in one or more parts: the teacher moves towards it, the centres towards
        the teacher's mean."""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        for name in outcomes[0].heard:
            centre, heard = getattr(self, name), [outcome.heard[name] for outcome in outcomes]
            centre.copy_(moved_centre(centre, heard, self.config.centre_momentum))

    def groups(self) -> list[dict]:
        """The student's parameters for AdamW: with weight decay, and (biases, norms) without, as DINO's code."""
        named = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in named if not is_bare(name, p)], "decay": 1.0},
            {"params": [p for name, p in named if is_bare(name, p)], "decay": 0.0, "weight_decay": 0.0},
        ]

    def hold_prototypes(self, now: Schedule) -> None:
        """Drops the gradients of the prototypes while they are held still."""
        if now.freeze_last_layer:
            for p in self.student.head.last_layer.parameters():
                p.grad = None

    def clip(self) -> Tensor:
        """Bounds the student's gradients, parameter by parameter, and returns the norm of all before."""
        return ranks.whole(clip_gradients([p for p in self.student.parameters() if p.requires_grad], self.config.clip))


def is_bare(name: str, p: Tensor) -> bool:
    """Whether a parameter has no weight decay: biases, norms and LayerScale."""
    return name.endswith(".bias") or p.ndim == 1


def entropies(p: Tensor) -> dict[str, Tensor]:
    """Of probabilities (G, B, K), for the log: a tile's own (log K: no opinion), and that of the batch's mean.

    The second is near 0 where one prototype serves all.
    """
    return {"teacher_entropy": entropy(p).mean(), "prototype_entropy": entropy(ranks.mean(p.mean((0, 1))))}


def clip_gradients(parameters: list[Tensor], limit: float) -> Tensor:
    """Scales each parameter's gradient to a norm of at most `limit` (0: leaves it); returns the norm of all before.

    By parameter, not over all of them: so does DINO's code.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if limit:
        torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1)))
    return norms.norm()
