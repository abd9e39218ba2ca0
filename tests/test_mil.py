"""Heads over bags, each against a reference that is written apart: loops, one tile and one head at a time."""

import numpy as np
import pytest
import torch
from torch.func import stack_module_state

from pathfm.mil import ABMIL, HEADS, MaxPool, MeanPool, NystromAttention, TransMIL, inverse, side_by_side


def weights(module):
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def mlp(x, w):
    for layer in (0, 2):
        x = np.maximum(linear(x, w, f"classifier.{layer}"), 0)
    return linear(x, w, "classifier.4")


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def bag(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def ask(model, x):
    """The answer to one bag of its own length."""
    x = torch.tensor(x, dtype=torch.float32)[None]
    with torch.no_grad():
        return model(x, torch.ones(x.shape[:2], dtype=torch.bool))[0].numpy()


def test_abmil_is_gated_attention_as_written():
    """Ilse et al. 2018, eq. 9, tile by tile, on projected tiles, before an MLP of 128 and 64."""
    torch.manual_seed(0)
    model, x = ABMIL(7, 3), bag(5, 7)
    w = weights(model)
    h = [linear(tile, w, "project") for tile in x]
    scores = []
    for tile in h:
        gate = 1 / (1 + np.exp(-linear(tile, w, "gate")))
        scores.append((w["score.weight"][0] * np.tanh(linear(tile, w, "value")) * gate).sum() + w["score.bias"][0])
    a = softmax(np.array(scores))
    assert np.allclose(ask(model, x), mlp(sum(ai * hi for ai, hi in zip(a, h, strict=True)), w), atol=1e-5)
    seen = model.attention(torch.tensor(x[None], dtype=torch.float32), torch.ones(1, 5, dtype=torch.bool))
    assert np.allclose(seen[0].detach(), a, atol=1e-6)


def test_abmil_has_evas_sizes():
    shapes = {name: tuple(tensor.shape) for name, tensor in ABMIL(384, 1).named_parameters() if tensor.ndim == 2}
    assert shapes == {
        "project.weight": (128, 384),
        "value.weight": (128, 128),
        "gate.weight": (128, 128),
        "score.weight": (1, 128),
        "classifier.0.weight": (128, 128),
        "classifier.2.weight": (64, 128),
        "classifier.4.weight": (1, 64),
    }
    assert sum(p.numel() for p in ABMIL(384, 1).parameters()) == 49_280 + 2 * 16_512 + 129 + 16_512 + 8_256 + 65


@pytest.mark.parametrize("head, pool", [(MeanPool, np.mean), (MaxPool, np.max)])
def test_pooled_heads_pool_projected_tiles(head, pool):
    torch.manual_seed(0)
    model, x = head(7, 2), bag(5, 7)
    w = weights(model)
    assert np.allclose(ask(model, x), mlp(pool(linear(x, w, "project"), axis=0), w), atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_what_stands_behind_a_bags_end_changes_nothing(name):
    torch.manual_seed(0)
    model, short, long = HEADS[name](7, 2), bag(5, 7), bag(9, 7, seed=1)
    x = torch.full((2, 9, 7), 1e3)
    x[0, :5], x[1] = torch.tensor(short), torch.tensor(long)
    tiles = torch.arange(9) < torch.tensor([[5], [9]])
    with torch.no_grad():
        together = model(x, tiles).numpy()
    assert np.allclose(together, np.stack([ask(model, short), ask(model, long)]), atol=1e-5)


@pytest.mark.parametrize("make", [ABMIL, MaxPool, lambda d, c: TransMIL(d, c, dim=20, heads=2)])
def test_heads_side_by_side_answer_their_own_bags(make):
    """Bags of several squares, some of more tokens than TransMIL's ten landmarks, unequally many of them in a run."""
    torch.manual_seed(0)
    models = [make(7, 2) for _ in range(3)]
    n = torch.tensor([[1, 4, 12, 9], [30, 16, 5, 2], [20, 26, 36, 40]])
    x, tiles = torch.randn(3, 4, 40, 7), torch.arange(40) < n[..., None]
    with torch.no_grad():
        together = side_by_side(models[0], stack_module_state(models)[0], x, tiles).numpy()
    for run, bag in np.ndindex(3, 4):
        assert np.allclose(together[run, bag], ask(models[run], x[run, bag, : n[run, bag]].numpy()), atol=1e-5)


@pytest.mark.parametrize("name", ["abmil", "mean", "max"])
def test_the_order_of_tiles_does_not_matter(name):
    torch.manual_seed(0)
    model, x = HEADS[name](7, 2), bag(9, 7)
    assert np.allclose(ask(model, x), ask(model, x[::-1].copy()), atol=1e-5)


def test_the_iterated_inverse_is_the_inverse():
    """Of matrices as attention makes them, with rows that sum to 1."""
    a = torch.tensor(softmax(4 * bag(6, 6)))
    assert np.allclose(inverse(a[None], 25)[0], np.linalg.pinv(a.numpy()), atol=1e-8)


def nystrom(x, w, heads, landmarks, iterations, prefix=""):
    """Xiong et al. 2021, a head at a time; the tokens divide into segments of one length."""
    d = x.shape[1] // heads
    q, k, v = np.split(x @ w[f"{prefix}qkv.weight"].T, 3, axis=1)
    out = []
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        qh, kh, vh = q[:, own] / np.sqrt(d), k[:, own], v[:, own]
        if len(x) <= landmarks:
            found = softmax(qh @ kh.T) @ vh
        else:
            ql, kl = (t.reshape(landmarks, -1, d).mean(axis=1) for t in (qh, kh))
            a = softmax(ql @ kl.T)
            z = a.T / (np.abs(a).sum(axis=0).max() * np.abs(a).sum(axis=1).max())
            eye = np.eye(landmarks)
            for _ in range(iterations):
                z = 0.25 * z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z)))
            found = softmax(qh @ kl.T) @ z @ softmax(ql @ kh.T) @ vh
        kernel = w[f"{prefix}along.weight"][head, 0, :, 0]
        half, padded = len(kernel) // 2, np.pad(vh, ((len(kernel) // 2,) * 2, (0, 0)))
        along = [sum(kernel[j] * padded[i + j] for j in range(2 * half + 1)) for i in range(len(x))]
        out.append(found + np.array(along))
    return linear(np.concatenate(out, axis=1), w, f"{prefix}out")


@pytest.mark.parametrize("tokens", [12, 24, 6])
def test_nystrom_attention_is_that_of_the_paper(tokens):
    torch.manual_seed(0)
    layer, x = NystromAttention(16, heads=2, landmarks=6), bag(tokens, 16)
    with torch.no_grad():
        found = layer(torch.tensor(x[None], dtype=torch.float32))[0].numpy()
    assert np.allclose(found, nystrom(x, weights(layer), 2, 6, 6), atol=1e-5)


def test_landmarks_come_near_to_exact_attention_where_tokens_repeat():
    """Tokens in runs of four that are alike: the landmarks are the tokens, and the approximation is exact."""
    torch.manual_seed(0)
    layer = NystromAttention(16, heads=2, landmarks=8)
    layer.iterations = 30
    x = torch.tensor(3 * np.repeat(bag(8, 16), 4, axis=0)[None], dtype=torch.float32)
    with torch.no_grad():
        few = layer(x)
        layer.landmarks = 64
        assert np.allclose(few, layer(x), atol=1e-4)


def layer_norm(x, w, name):
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


@pytest.mark.parametrize("n", [1, 2, 5, 9, 45])  # 45 make 50 tokens, more than the 10 landmarks
def test_transmil_is_that_of_the_paper(n):
    """Shao et al. 2021: a square of tiles, class token, attention, position by three convolutions, attention."""
    torch.manual_seed(0)
    model = TransMIL(5, 2, dim=20, heads=2)
    x, w = bag(n, 5), weights(model)
    side = int(np.ceil(np.sqrt(n)))
    h = np.maximum(linear(x, w, "project.0"), 0)
    h = np.concatenate([w["token"][0], h, h[: side * side - n]])
    h = h + nystrom(layer_norm(h, w, "norms.0"), w, 2, 10, 6, "layers.0.")
    square = h[1:].reshape(side, side, 20)
    moved = square.copy()
    for place, k in enumerate((7, 5, 3)):
        kernel, bias = w[f"position.{place}.weight"][:, 0], w[f"position.{place}.bias"]
        padded = np.pad(square, ((k // 2,) * 2, (k // 2,) * 2, (0, 0)))
        for i in range(side):
            for j in range(side):
                moved[i, j] += np.einsum("ijc,cij->c", padded[i : i + k, j : j + k], kernel) + bias
    h = np.concatenate([h[:1], moved.reshape(-1, 20)])
    h = h + nystrom(layer_norm(h, w, "norms.1"), w, 2, 10, 6, "layers.1.")
    assert np.allclose(ask(model, x), linear(layer_norm(h, w, "norms.2"), w, "head")[0], atol=1e-5)
