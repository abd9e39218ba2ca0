import math

import pytest
import torch

from pathfm.losses import Heard, dino_loss, entropy, koleo, moved_centre, sharpened


def logits(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_probabilities(x, temperature):
    e = [math.exp(v / temperature) for v in x]
    return [v / sum(e) for v in e]


def slow_dino_loss(student, teacher, centre, tau_s, tau_t):
    """Algorithm 1 of Caron et al. 2021, view by view, tile by tile, prototype by prototype."""
    terms = []
    for g in range(len(teacher)):
        for v in range(len(student)):
            if v == g:
                continue
            total = 0.0
            for b in range(student.shape[1]):
                p_t = slow_probabilities((teacher[g, b] - centre).tolist(), tau_t)
                p_s = slow_probabilities(student[v, b].tolist(), tau_s)
                total -= sum(t * math.log(s) for t, s in zip(p_t, p_s, strict=True))
            terms.append(total / student.shape[1])
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views,batch,prototypes", [(2, 1, 3), (4, 3, 7), (10, 2, 5)])
def test_dino_loss_equals_the_paper_written_out(views, batch, prototypes):
    student, teacher = logits(views, batch, prototypes, seed=1), logits(2, batch, prototypes, seed=2)
    centre = logits(prototypes, seed=3)
    p = torch.softmax((teacher - centre) / 0.07, -1)
    assert torch.allclose(sharpened(teacher, centre, 0.07), p, rtol=1e-12)
    got = dino_loss(student, sharpened(teacher, centre, 0.07), 0.1)
    assert float(got) == pytest.approx(slow_dino_loss(student, teacher, centre, 0.1, 0.07), rel=1e-9)


def test_dino_loss_gradient_is_that_of_the_paper_written_out():
    student = logits(3, 2, 4, seed=1).requires_grad_()
    p = torch.softmax(logits(2, 2, 4, seed=2), -1)
    dino_loss(student, p, 0.1).backward()
    want = torch.zeros_like(student)
    for g in range(2):
        for v in range(3):
            if v != g:
                want[v] += (torch.softmax(student[v] / 0.1, -1) - p[g]) / 0.1 / 2 / 4
    assert torch.allclose(student.grad, want.detach(), rtol=1e-9)


def test_uniform_teacher_and_student_lose_log_k():
    uniform = torch.full((2, 5, 64), 1 / 64)
    assert float(dino_loss(torch.zeros(6, 5, 64), uniform)) == pytest.approx(math.log(64), rel=1e-6)
    assert torch.allclose(entropy(uniform), torch.full((2, 5), math.log(64)))


def test_entropy_of_a_certain_teacher_is_zero():
    assert torch.equal(entropy(torch.eye(4)), torch.zeros(4))


def test_centre_is_a_moving_average_of_the_batch_mean():
    centre, batches = torch.zeros(6, dtype=torch.float64), logits(5, 2, 3, 6)
    want = [0.0] * 6
    for batch in batches:
        centre = moved_centre(centre, [Heard.of(batch)], 0.9)
        for k in range(6):
            mean = sum(float(batch[g, b, k]) for g in range(2) for b in range(3)) / 6
            want[k] = 0.9 * want[k] + 0.1 * mean
    assert centre.tolist() == pytest.approx(want, rel=1e-9)


def test_a_batch_in_parts_moves_the_centre_as_one():
    batch = logits(7, 6)
    parts = [Heard.of(batch[:2]), Heard.of(batch[:0]), Heard.of(batch[2:])]
    whole = moved_centre(torch.ones(6).double(), [Heard.of(batch)], 0.9)
    assert torch.allclose(moved_centre(torch.ones(6).double(), parts, 0.9), whole, rtol=1e-12)


def test_centring_and_sharpening_pull_apart_two_collapses():
    """Section 5.3: the centre takes away what all tiles share, a low temperature what is flat."""
    shared = logits(2, 8, 16, scale=0.01) + 5 * torch.eye(16)[3]
    assert entropy(sharpened(shared, torch.zeros(16), 0.04)).max() < 0.1
    centred = sharpened(shared, moved_centre(torch.zeros(16).double(), [Heard.of(shared)], 0.0), 0.04)
    assert entropy(centred).min() > 2
    assert entropy(sharpened(shared, shared.mean((0, 1)), 0.001)).mean() < entropy(centred).mean()


def test_losses_are_float32_under_autocast_inputs():
    student, teacher = logits(3, 2, 8).bfloat16(), torch.softmax(logits(2, 2, 8), -1).float()
    assert dino_loss(student, teacher).dtype == torch.float32
    assert sharpened(student, torch.zeros(8), 0.04).dtype == torch.float32


def test_koleo_equals_its_definition_written_out():
    x = logits(7, 5, seed=4)
    unit = [[v / math.hypot(*row) for v in row] for row in x.tolist()]
    nearest = [min(math.dist(a, b) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    assert float(koleo(x)) == pytest.approx(-sum(map(math.log, nearest)) / 7, rel=1e-6)


def slow_koleo(x):
    """Eq. 2 of Sablayrolles et al. 2019, feature by feature, by scalars that autograd can follow."""
    unit = [row / sum(v * v for v in row).sqrt() for row in x]
    logs = []
    for i, a in enumerate(unit):
        apart = [sum((u - v) ** 2 for u, v in zip(a, b, strict=True)).sqrt() for j, b in enumerate(unit) if j != i]
        logs.append(min(apart, key=lambda d: float(d.detach())).log())
    return -sum(logs) / len(logs)


def test_koleo_has_the_gradient_of_its_definition_written_out():
    x = logits(7, 5, seed=5).requires_grad_()
    got, want = (torch.autograd.grad(loss(x), x)[0] for loss in (koleo, slow_koleo))
    assert (got - want).norm() <= 1e-6 * want.norm() and want.norm() > 0.1
    assert float(koleo(x).detach()) == pytest.approx(float(slow_koleo(x).detach()), rel=1e-6)


def test_koleo_pushes_the_nearest_two_apart_and_survives_two_alike():
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.1]], dtype=torch.float64).requires_grad_()
    koleo(x).backward()
    moved = x.detach() - 0.1 * x.grad
    assert torch.cosine_similarity(moved[:1], moved[1:2]) < torch.cosine_similarity(x[:1], x[1:2])
    alike = torch.ones(4, 3).requires_grad_()
    koleo(alike).backward()
    assert torch.isfinite(alike.grad).all()
