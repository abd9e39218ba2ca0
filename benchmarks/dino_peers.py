"""DINO steps of others, to time ours beside: lightly's modules, and a plain loop after the description of the authors'.

Each takes the same views, does a whole optimiser step and returns its loss: networks, loss, backward pass, clipping,
AdamW, moving average, centre. Backbones are timm's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathfm.augment import Views
from pathfm.config import PretrainConfig
from pathfm.dino import Dino
from pathfm.schedules import Schedule, schedule, set_rates
from pathfm.vit import set_attention

Step = Callable[[Views], Tensor]


def now(config: PretrainConfig) -> Schedule:
    """Settings in the middle of a run, when nothing stands still."""
    return schedule(config, config.steps // 2)


def ours(config: PretrainConfig, model: Dino, precision: str) -> Step:
    """What a step of `pathfm.pretrain` does after the views are made."""
    optimiser, at = torch.optim.AdamW(model.groups(), lr=config.lr), now(config)

    def step(views: Views) -> Tensor:
        set_rates(optimiser.param_groups, at)
        with half(views, precision):
            outcome = model(views, at)
        optimiser.zero_grad(set_to_none=True)
        outcome.loss.backward()
        model.hold_prototypes(at)
        model.clip()
        optimiser.step()
        model.follow([outcome], at.momentum)
        return outcome.loss.detach()

    return step


def half(views: Views, precision: str):
    return torch.autocast(views.global_.device.type, torch.bfloat16, enabled=precision == "bfloat16")


def backbone(config: PretrainConfig, fused: bool) -> nn.Module:
    own = {"depth": config.depth, "embed_dim": config.width, "num_heads": config.heads}
    own = {name: value for name, value in own.items() if value}
    sizes = {"img_size": config.global_px, "dynamic_img_size": True, "drop_path_rate": config.drop_path}
    model = timm.create_model(config.model, num_classes=0, **sizes, **own)
    set_attention(model, fused)
    return model


def copied(like: Dino, body: nn.Module, layers: nn.Module, prototypes: Tensor) -> None:
    """Gives a peer's backbone, the layers of its head and its prototypes the weights of ours."""
    body.load_state_dict(like.student.backbone.state_dict())
    for ours_, theirs in zip(like.student.head.mlp.parameters(), layers.parameters(), strict=True):
        theirs.data.copy_(ours_)
    prototypes.data.copy_(like.student.head.last_layer.direction)


def lightly(config: PretrainConfig, fused: bool, precision: str, device: str = "cpu", like: Dino | None = None) -> Step:
    """As lightly's example of DINO: each view through student or teacher alone. It starts `like` a model."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum

    student = backbone(config, fused).to(device)
    sizes = student.num_features, config.head_hidden, config.head_bottleneck, config.prototypes
    student_head, teacher_head = (
        DINOProjectionHead(*sizes, norm_last_layer=config.norm_last_layer).to(device) for _ in range(2)
    )
    if like is not None:
        copied(like, student, student_head.layers, student_head.last_layer.weight_v)
    teacher_head.load_state_dict(student_head.state_dict())  # its weight norm cannot be copied
    teacher_head.requires_grad_(False)
    teacher = copy.deepcopy(student).requires_grad_(False)
    loss_of, at = DINOLoss(config.prototypes).to(device), now(config)
    parameters = [*student.parameters(), *student_head.parameters()]
    optimiser = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=config.lr)

    def step(views: Views) -> Tensor:
        update_momentum(student, teacher, at.momentum)
        update_momentum(student_head, teacher_head, at.momentum)
        with half(views, precision):
            with torch.no_grad():
                taught = [teacher_head(teacher(view)) for view in views.global_]
            said = [student_head(student(view)) for group in views[:2] for view in group]
        loss = loss_of([one.float() for one in taught], [one.float() for one in said], config.teacher_temperature)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for part in (student, student_head):
            torch.nn.utils.clip_grad_norm_(part.parameters(), config.clip)
        optimiser.step()
        return loss.detach()

    return step


class PlainHead(nn.Module):
    """Three layers, length 1, weight-normalised prototypes, by PyTorch's own weight norm."""

    def __init__(self, features: int, config: PretrainConfig):
        super().__init__()
        hidden, bottleneck = config.head_hidden, config.head_bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        last = nn.Linear(bottleneck, config.prototypes, bias=False)
        self.last = torch.nn.utils.parametrizations.weight_norm(last)
        self.last.parametrizations.weight.original0.data.fill_(1)
        self.last.parametrizations.weight.original0.requires_grad = not config.norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


def plain(config: PretrainConfig, fused: bool, precision: str, device: str = "cpu", like: Dino | None = None) -> Step:
    """A loop as the paper's algorithm 1 and its code are described: views of one size in one batch, then loops over
    pairs of views, over parameters to clip them, and over parameters to move the teacher. It starts `like` a model."""
    body = backbone(config, fused).to(device)
    head = PlainHead(body.num_features, config).to(device)
    if like is not None:
        copied(like, body, head.mlp, head.last.parametrizations.weight.original1)
    teacher, teacher_head = (copy.deepcopy(part).requires_grad_(False) for part in (body, head))
    centre, at = torch.zeros(1, config.prototypes, device=device), now(config)
    trained = [p for part in (body, head) for p in part.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.lr, foreach=False)

    def step(views: Views) -> Tensor:
        nonlocal centre
        with half(views, precision):
            with torch.no_grad():
                taught = teacher_head(teacher(views.global_.flatten(0, 1)))
            features = torch.cat([body(group.flatten(0, 1)) for group in views[:2] if len(group)])
            said = head(features)
        taught, said = taught.float(), said.float() / config.student_temperature
        answers = F.softmax((taught - centre) / at.teacher_temperature, dim=-1).chunk(len(views.global_))
        loss, terms = 0.0, 0
        for i, answer in enumerate(answers):
            for j, one in enumerate(said.chunk(len(said) // len(answer))):
                if i != j:
                    loss = loss - (answer * F.log_softmax(one, dim=-1)).sum(-1).mean()
                    terms += 1
        loss = loss / terms
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for p in trained:
            p.grad.mul_(min(1.0, config.clip / (float(p.grad.norm()) + 1e-6)))
        optimiser.step()
        with torch.no_grad():
            centre = centre * config.centre_momentum + taught.mean(0, keepdim=True) * (1 - config.centre_momentum)
            for part, moving in ((body, teacher), (head, teacher_head)):
                for p, q in zip(part.parameters(), moving.parameters(), strict=True):
                    q.mul_(at.momentum).add_(p, alpha=1 - at.momentum)
        return loss.detach()

    return step
