"""A step of DINO against a plain loop, view by view and parameter by parameter, in float64."""

import math

import pytest
import torch
from test_pretrain import tiny

from pathfm.augment import MultiCrop, Views
from pathfm.dino import Dino
from pathfm.schedules import Schedule, schedule, set_rates


def made(**fields) -> tuple[Dino, Views]:
    """A model whose teacher and centre are not what its student is, and views of five tiles."""
    torch.manual_seed(0)
    model = Dino(tiny(head_norm=False, drop_path=0.0, batch_size=5, **fields)).double()
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
        model.centre.normal_(std=0.1)
    images = torch.randint(0, 256, (5, 36, 36, 3), dtype=torch.uint8)
    drawn = MultiCrop(model.config)(images, torch.ones(5), torch.Generator().manual_seed(0))
    return model, drawn._replace(global_=drawn.global_.double(), local=drawn.local.double())


def slow_logits(network, view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits of one view, the head written out: Caron et al. 2021, appendix C."""
    features = x = network.backbone(view)
    first, second, third = (part for part in network.head.mlp if isinstance(part, torch.nn.Linear))
    for layer in (first, second):
        x = x @ layer.weight.T + layer.bias
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    x = x @ third.weight.T + third.bias
    x = x / x.square().sum(1, keepdim=True).sqrt()
    last = network.head.last_layer
    directions = last.direction / last.direction.square().sum(1, keepdim=True).sqrt()
    return features, x @ (last.length * directions).T


def slow_loss(model: Dino, views: Views, now: Schedule) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Algorithm 1 with multi-crop, and KoLeo on the global views; and the teacher's logits by view."""
    config, total, terms = model.config, 0.0, 0
    with torch.no_grad():
        taught = [slow_logits(model.teacher, view)[1] for view in views.global_]
    said = [slow_logits(model.student, view) for group in (views.global_, views.local) for view in group]
    for g, logits in enumerate(taught):
        sharp = ((logits - model.centre) / now.teacher_temperature).exp()
        p = sharp / sharp.sum(1, keepdim=True)
        for v, (_, answer) in enumerate(said):
            if v != g:
                likely = (answer / config.student_temperature).exp()
                total = total - (p * (likely / likely.sum(1, keepdim=True)).log()).sum() / len(p)
                terms += 1
    loss = total / terms
    for features, _ in said[:2]:
        unit = [row / row.square().sum().sqrt() for row in features]
        for i, a in enumerate(unit):
            nearest = min(
                ((a - b).square().sum() for j, b in enumerate(unit) if j != i), key=lambda d: float(d.detach())
            )
            loss = loss - config.koleo * nearest.sqrt().log() / len(unit)
    return loss, taught


@pytest.mark.parametrize("local_px", [16, 32])
@pytest.mark.parametrize("koleo", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_the_loop(koleo, local_px):
    """Local views of their own size go through apart, those as large as global ones together with them."""
    model, views = made(koleo=koleo, norm_last_layer=False, local_px=local_px)
    now = schedule(model.config, 5)
    outcome, (want, _) = model(views, now), slow_loss(model, views, now)
    assert float(outcome.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    named = [(name, p) for name, p in model.student.named_parameters() if p.requires_grad]
    got, wanted = (torch.autograd.grad(loss, [p for _, p in named]) for loss in (outcome.loss, want))
    assert {"head.last_layer.length", "backbone.cls_token"} <= {name for name, _ in named}
    for (name, _), a, b in zip(named, got, wanted, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm() and b.norm() > 0, name


def test_a_whole_step_is_that_of_the_loop():
    """Clipped by parameter, AdamW written out at its first step, then the teacher's and the centre's averages."""
    model, views = made(clip=3.0, centre_momentum=0.8)
    config, now = model.config, schedule(model.config, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, taught = slow_loss(model, views, now)
    named = {name: p for name, p in model.student.named_parameters() if p.requires_grad}
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    optimiser = torch.optim.AdamW(model.groups(), lr=config.lr)
    set_rates(optimiser.param_groups, now)
    outcome = model(views, now)
    outcome.loss.backward()
    model.hold_prototypes(now)
    norm = model.clip()
    optimiser.step()
    model.follow([outcome], now.momentum)

    assert float(norm) == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients.values())), rel=1e-6)
    clipped = 0
    for name, g in gradients.items():
        clipped += float(g.norm()) > config.clip
        g = g * min(1.0, config.clip / (float(g.norm()) + 1e-6))
        was, decayed = before[f"student.{name}"], not (name.endswith(".bias") or g.ndim == 1)
        moments = 0.1 * g / (1 - 0.9), (0.001 * g.square() / (1 - 0.999)).sqrt()
        want = was * (1 - now.lr * now.weight_decay * decayed) - now.lr * moments[0] / (moments[1] + 1e-8)
        assert torch.allclose(named[name], want, rtol=1e-6, atol=1e-9), name
        average = now.momentum * before[f"teacher.{name}"] + (1 - now.momentum) * want
        assert torch.allclose(model.teacher.get_parameter(name), average, rtol=1e-6, atol=1e-9), name
    assert 0 < clipped < len(gradients)
    mean = torch.cat(taught).mean(0)
    assert torch.allclose(model.centre, 0.8 * before["centre"] + 0.2 * mean, rtol=1e-6, atol=1e-12)
