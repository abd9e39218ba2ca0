"""Networks that make one answer of a bag of tiles: gated attention (ABMIL), its mean and max twins, TransMIL."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathfm import ensemble

WIDTH = 128  # of the projected tiles and of the attention
MLP = (128, 64)  # hidden layers behind the pooling


def classifier(width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers with ReLU and the logits."""
    sides = (width, *MLP)
    layers = [layer for a, b in zip(sides, sides[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sides[-1], outputs))


class ABMIL(nn.Module):
    """Gated attention over projected tiles, an MLP on their weighted mean: bags (B, N, D) to logits (B, C).

    Ilse et al. 2018, eq. 7 and 9, sized as in eva 73b61a7: a linear projection to 128, tanh times sigmoid of 128
    hidden units each, with bias, an MLP of 128 and 64; no dropout.
    """

    lr = 1e-3
    held = 5 * WIDTH  # floats of a tile that wait for the gradient, about

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.project = nn.Linear(width, WIDTH)
        self.value, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.score = nn.Linear(WIDTH, 1)
        self.classifier = classifier(WIDTH, outputs)

    def attention(self, x: Tensor, tiles: Tensor) -> Tensor:
        """(B, N) weights that sum to 1 over the tiles of a bag; 0 where there is none."""
        return self._weights(self.project(x), tiles)

    def _weights(self, x: Tensor, tiles: Tensor) -> Tensor:
        score = self.score(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))[..., 0]
        return score.masked_fill(~tiles, -torch.inf).softmax(dim=1)

    def forward(self, x: Tensor, tiles: Tensor) -> Tensor:
        """x (B, N, D) with zeros behind a bag's end; tiles (B, N) bool, where there is a tile."""
        x = self.project(x)
        return self.classifier((self._weights(x, tiles)[..., None] * x).sum(dim=1))


class MeanPool(nn.Module):
    """ABMIL with equal weights: what attention adds is the difference to this."""

    lr = 1e-3
    held = 2 * WIDTH

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.project, self.classifier = nn.Linear(width, WIDTH), classifier(WIDTH, outputs)

    def forward(self, x: Tensor, tiles: Tensor) -> Tensor:
        there = tiles[..., None].to(x.dtype)
        return self.classifier((self.project(x) * there).sum(dim=1) / there.sum(dim=1))


class MaxPool(MeanPool):
    """The same with the largest value of each projected feature."""

    def forward(self, x: Tensor, tiles: Tensor) -> Tensor:
        return self.classifier(self.project(x).masked_fill(~tiles[..., None], -torch.inf).amax(dim=1))


class TransMIL(nn.Module):
    """Two layers of Nystrom attention with a class token, and between them position by convolution. Shao et al. 2021.

    Tiles stand in the order of the grid, row after row, as a square whose end is filled up with the first tiles.
    Bags of one square are answered together, so nothing pads it. Projection to 512 and ReLU, 8 heads, 256 landmarks,
    logits of the token.
    """

    lr = 2e-4  # the authors'
    held = 40 * 512

    def __init__(self, width: int, outputs: int, dim: int = 512, heads: int = 8):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(width, dim), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(3)])
        self.layers = nn.ModuleList([NystromAttention(dim, heads, dim // 2) for _ in range(2)])
        self.position = nn.ModuleList([nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in (7, 5, 3)])
        self.head = nn.Linear(dim, outputs)

    def forward(self, x: Tensor, tiles: Tensor, side: int | None = None) -> Tensor:
        """x (B, N, D) and tiles (B, N) as of ABMIL; side of the square that every bag fills, None: each its own."""
        if side is None:
            return by_side(lambda *bags, side: self(*(one[0] for one in bags), side)[None], x[None], tiles[None])[0]
        place = torch.arange(side**2, device=x.device) % tiles.sum(dim=1, keepdim=True)
        x = self.project(x)
        x = x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.layers[0](self.norms[0](x))
        square = x[:, 1:].mT.unflatten(2, (side, side))
        square = square + sum(conv(square) for conv in self.position)
        x = torch.cat([x[:, :1], square.flatten(2).mT], dim=1)
        x = x + self.layers[1](self.norms[1](x))
        return self.head(self.norms[2](x)[:, 0])


def side_by_side(model: nn.Module, state: dict[str, Tensor], x: Tensor, tiles: Tensor) -> Tensor:
    """(R, B, C) logits of R heads, each of its own bags x (R, B, N, D), tiles (R, B, N); state has all parameters."""
    if isinstance(model, TransMIL):
        return by_side(lambda *bags, side: ensemble.apply(model, state, *bags, side=side), x, tiles)
    return ensemble.apply(model, state, x, tiles)


def by_side(answers: Callable[..., Tensor], x: Tensor, tiles: Tensor) -> Tensor:
    """(R, B, C) `answers` of bags x (R, B, N, D), asked about those of one square at a time.

    Runs have unequally many of a square: one that has fewer is asked about other bags too, cut off, and not heard.
    """
    sides, found, places = tiles.sum(dim=2).sqrt().ceil().int(), [], []
    run = torch.arange(len(x), device=x.device)[:, None]
    for side in sides.unique().tolist():
        here = sides == side
        first = here.int().argsort(dim=1, descending=True, stable=True)[:, : int(here.sum(dim=1).max())]
        said = answers(x[run, first, : side**2], tiles[run, first, : side**2], side=side)
        heard = here[run, first]
        found.append(said[heard])
        places.append((run * x.shape[1] + first)[heard])
    return torch.cat(found)[torch.cat(places).argsort()].unflatten(0, x.shape[:2])


class NystromAttention(nn.Module):
    """Self-attention through m landmarks, and a convolution along the values: (B, N, D) to (B, N, D).

    softmax(q k'), N x N, is approximated by softmax(q l') pinv(softmax(m l')) softmax(m k'), where the landmarks l
    and m are means of consecutive keys and queries; the inverse is iterated. Xiong et al. 2021, sections 3.2 and 3.3.
    Where no more tokens than landmarks come in, the attention is exact.
    """

    iterations = 6
    kernel = 33  # tokens, of the convolution

    def __init__(self, dim: int, heads: int, landmarks: int):
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.along = nn.Conv2d(heads, heads, (self.kernel, 1), padding=(self.kernel // 2, 0), groups=heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        q = q * q.shape[-1] ** -0.5
        found = self._attend(q, k, v) + self.along(v)
        return self.out(found.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] <= self.landmarks:
            return (q @ k.mT).softmax(-1) @ v
        few_q, few_k = (F.adaptive_avg_pool2d(t, (self.landmarks, None)) for t in (q, k))
        left, middle, right = ((a @ b.mT).softmax(-1) for a, b in ((q, few_k), (few_q, few_k), (few_q, k)))
        return left @ (inverse(middle, self.iterations) @ (right @ v))


def inverse(a: Tensor, iterations: int) -> Tensor:
    """The pseudo-inverse of square matrices (..., m, m) by iterations of third order. Xiong et al. 2021, eq. 11."""
    columns, rows = a.abs().sum(-2).amax(-1), a.abs().sum(-1).amax(-1)
    z = a.mT / (columns * rows)[..., None, None]
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


HEADS = {"abmil": ABMIL, "mean": MeanPool, "max": MaxPool, "transmil": TransMIL}
