"""Backbones through torch.hub: torch.hub.load("<this repository>", "load", "<folder or address>", source="local").

The folder is one that `pathfm pretrain` or `pathfm export` wrote, or any of timm's format; an address (http://...) is
that of such a folder, of which config.json and model.safetensors are fetched once.
"""

dependencies = ["torch", "timm", "safetensors", "numpy", "pandas", "requests"]

from pathfm.export import load as _load  # noqa: E402 (torch.hub reads `dependencies` first)


def load(where):
    """The backbone, in eval mode, and its preprocessing: model(preprocess(tiles)) of uint8 tiles (B, H, W, 3)."""
    return _load(where)


def backbone(where):
    """The backbone alone: normalised images (B, 3, H, W) to CLS features (B, D)."""
    return _load(where)[0]
