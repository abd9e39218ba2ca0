"""Stochastic depth (Huang et al. 2016) whose draws do not depend on how a batch is shared out."""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn


class TileDrop(DropPath):
    """timm's DropPath, drawn for the views of all tiles of a batch, of which this pass takes those of its own tiles.

    The module's rows are views by tiles (V * B), view by view; `own` says where those B stand among `tiles` ones.
    """

    tiles: int = 0  # of the whole batch; 0: the rows are all there are
    own: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.tiles or not self.training or not self.drop_prob:
            return super().forward(x)
        kept = x.new_empty(len(x) // len(self.own), self.tiles).bernoulli_(1 - self.drop_prob)
        kept = kept[:, self.own].flatten() / (1 - self.drop_prob)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def by_tile(model: nn.Module) -> list[TileDrop]:
    """Puts a TileDrop in the place of every DropPath of a backbone's blocks, and returns them."""
    drops = []
    for block in model.blocks:
        for name in ("drop_path1", "drop_path2"):
            if isinstance(getattr(block, name), DropPath):
                drops.append(TileDrop(getattr(block, name).drop_prob))
                setattr(block, name, drops[-1])
    return drops
