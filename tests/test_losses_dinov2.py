"""What DINOv2 and Virchow2 add to DINO's loss, against the papers written out, in float64."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from pathfm.losses import Heard, dino_loss, ibot_loss, kde, koleo, moved_centre, sinkhorn


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_sinkhorn(logits, temperature, iterations):
    """SwAV's algorithm, entry by entry: rows (prototypes) to 1 / K, columns (samples) to 1 / B."""
    q = [[math.exp(v / temperature) for v in row] for row in logits.tolist()]
    samples, prototypes = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[v / total for v in row] for row in q]
    for _ in range(iterations):
        used = [sum(row[k] for row in q) for k in range(prototypes)]
        q = [[v / used[k] / prototypes for k, v in enumerate(row)] for row in q]
        q = [[v / sum(row) / samples for v in row] for row in q]
    return [[v * samples for v in row] for row in q]


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_equals_the_algorithm_written_out(iterations):
    logits = drawn(6, 4, seed=1)
    got = sinkhorn(logits, 0.07, iterations)
    want = torch.tensor(slow_sinkhorn(logits, 0.07, iterations), dtype=torch.float64)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-12)
    assert torch.allclose(sinkhorn(logits.view(2, 3, 4), 0.07, iterations), want.view(2, 3, 4), rtol=1e-6, atol=1e-12)


def test_sinkhorn_gives_every_prototype_its_share_and_every_sample_its_whole():
    q = sinkhorn(drawn(40, 8, seed=2), 0.5, 50)
    assert torch.allclose(q.sum(1), torch.ones(40).double(), atol=1e-9)
    assert torch.allclose(q.sum(0), torch.full((8,), 5.0).double(), atol=1e-6)


def test_sinkhorn_takes_away_what_all_samples_share_and_survives_large_logits():
    logits = drawn(12, 5, seed=3, scale=0.1)
    shared = logits + 3 * torch.eye(5)[2]
    assert torch.allclose(sinkhorn(shared, 0.1), sinkhorn(logits, 0.1), atol=1e-3)
    large = sinkhorn((1000 * logits).float(), 0.04)
    assert torch.isfinite(large).all() and torch.allclose(large.sum(1), torch.ones(12), atol=1e-5)
    assert sinkhorn(logits[:0], 0.1).shape == (0, 5)
    assert sinkhorn(logits.bfloat16(), 0.1).dtype == torch.float32


def slow_ibot(student, teacher, masks, temperature):
    """Eq. 2 of iBOT with DINOv2's means, image by image and patch by patch."""
    total, row = 0.0, 0
    for mask in masks.tolist():
        terms = []
        for hidden in mask:
            if hidden:
                e = [math.exp(v / temperature) for v in student[row].tolist()]
                terms.append(-sum(t * math.log(v / sum(e)) for t, v in zip(teacher[row].tolist(), e, strict=True)))
                row += 1
        total += sum(terms) / len(terms) if terms else 0.0
    return total / len(masks)


MASKS = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)


def test_ibot_equals_the_paper_written_out_with_its_gradient():
    student, teacher = drawn(4, 6, seed=4).requires_grad_(), torch.softmax(drawn(4, 6, seed=5), -1)
    loss = ibot_loss(student, teacher, MASKS, 0.1)
    assert float(loss.detach()) == pytest.approx(slow_ibot(student.detach(), teacher, MASKS, 0.1), rel=1e-6)
    assert gradcheck(lambda x: ibot_loss(x, teacher, MASKS, 0.1), student)
    (gradient,) = torch.autograd.grad(loss, student)
    share = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0], dtype=torch.float64)[:, None] / 3
    assert torch.allclose(gradient, share * (torch.softmax(student / 0.1, -1) - teacher) / 0.1, rtol=1e-6)


def test_ibot_without_a_hidden_patch_is_nothing_and_can_be_stepped_from():
    student = drawn(0, 6).requires_grad_()
    loss = ibot_loss(student, drawn(0, 6), torch.zeros(2, 4, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0 and student.grad.shape == (0, 6)


def slow_kde(features, kappa):
    unit = [[v / math.hypot(*row) for v in row] for row in features.tolist()]
    logs = []
    for i, a in enumerate(unit):
        others = [math.exp(kappa * sum(x * y for x, y in zip(a, b, strict=True))) for j, b in enumerate(unit) if j != i]
        logs.append(math.log(sum(others) / len(others)))
    return sum(logs) / len(logs)


@pytest.mark.parametrize("kappa", [5.0, 1.0])
def test_kde_equals_the_paper_written_out_with_its_gradient(kappa):
    x = drawn(7, 5, seed=6).requires_grad_()
    assert float(kde(x, kappa).detach()) == pytest.approx(slow_kde(x.detach(), kappa), rel=1e-6)
    assert gradcheck(lambda x: kde(x, kappa), x)


@pytest.mark.parametrize("kappa", [5.0, 1.0])
def test_kde_has_the_gradient_of_the_paper_written_out(kappa):
    """Feature by feature, by scalars that autograd can follow."""

    def slow(x):
        unit, logs = [row / sum(v * v for v in row).sqrt() for row in x], []
        for i, a in enumerate(unit):
            others = [(kappa * sum(a * b)).exp() for j, b in enumerate(unit) if j != i]
            logs.append((sum(others) / len(others)).log())
        return sum(logs) / len(logs)

    x = drawn(7, 5, seed=11).requires_grad_()
    got, want = (torch.autograd.grad(loss, x)[0] for loss in (kde(x, kappa), slow(x)))
    assert (got - want).norm() <= 1e-6 * want.norm() and want.norm() > 0.01


def test_kde_is_kappa_where_all_are_alike_and_less_where_they_are_spread():
    alike = torch.ones(6, 4, dtype=torch.float64)
    assert float(kde(alike)) == pytest.approx(5.0)
    assert float(kde(torch.eye(6))) == pytest.approx(0.0, abs=1e-6)
    half = torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert kde(half).dtype == torch.float32
    kde(half).backward()
    assert torch.isfinite(half.grad).all()


def test_kde_spreads_collapsed_features_and_its_opposite_does_not():
    """Steps down the loss take features that nearly agree apart; a sign error would take them together."""
    start = torch.ones(16, 8, dtype=torch.float64) + drawn(16, 8, seed=7, scale=0.01)

    def likeness(sign):
        x = start.clone().requires_grad_()
        optimiser = torch.optim.SGD([x], lr=1.0)
        for _ in range(300):
            optimiser.zero_grad()
            (sign * kde(x)).backward()
            optimiser.step()
        unit = torch.nn.functional.normalize(x.detach(), dim=-1)
        return float((unit @ unit.mT).fill_diagonal_(0).sum() / 16 / 15)

    assert likeness(1) < 0.1 and likeness(-1) > 0.999


def test_koleo_and_dino_have_the_gradients_of_their_values():
    x = drawn(6, 4, seed=8).requires_grad_()
    assert gradcheck(koleo, x)
    student, p = drawn(4, 2, 5, seed=9).requires_grad_(), torch.softmax(drawn(2, 2, 5, seed=10), -1)
    assert gradcheck(lambda s: dino_loss(s, p), student)


def test_a_centre_stays_where_no_patch_was_hidden():
    centre = drawn(6)
    assert torch.equal(moved_centre(centre, [Heard.of(drawn(0, 6))], 0.9), centre)
