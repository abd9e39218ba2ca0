"""Decoders on frozen patch tokens, as eva's, their loss and score."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMOOTH = 1e-5  # MONAI's, in numerator and denominator


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution 3 x 3, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class WithImage(nn.Module):
    """Patch tokens and the image itself to logits: eva's ConvDecoderWithImage, of its online configurations.

    Tokens are doubled in size and reduced to 64 channels, brought to the image's size, joined with its three
    channels and passed through two blocks of 32. With the image, a backbone of small patches does not win by its
    finer grid alone. eva 73b61a7, decoders/segmentation/semantic/with_image.py.
    """

    with_image = True

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.tokens = nn.Sequential(nn.Upsample(scale_factor=2), block(width, 64))
        self.joined = nn.Sequential(block(64 + 3, 32), block(32, 32))
        self.classifier = nn.Conv2d(32, classes, 1)

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        """tokens (B, D, h, w), images (B, 3, H, W) normalised as the backbone saw them: logits (B, C, H, W)."""
        x = F.interpolate(self.tokens(tokens), images.shape[-2:], mode="bilinear")
        return self.classifier(self.joined(torch.cat([x, images], dim=1)))


class TokensOnly(nn.Module):
    """Patch tokens alone: eva's ConvDecoderMS, of its offline configurations; of the image only the size is used.

    Doubled, 3 x 3 to 64, doubled, 3 x 3 to the classes, brought to the image's size; nothing between is non-linear.
    eva 73b61a7, decoders/segmentation/semantic/common.py, after the +ms decoder of DINOv2.
    """

    with_image = False

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, 64, 3, padding=1),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(64, classes, 3, padding=1),
        )

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        return F.interpolate(self.layers(tokens), images.shape[-2:], mode="bilinear")


DECODERS = {"image": WithImage, "tokens": TokensOnly}


def dice_loss(logits: Tensor, target: Tensor, ignored: int | None = None) -> Tensor:
    """1 minus the Dice of softmax and truth, summed over the batch, mean over the classes with background.

    logits (B, C, H, W); target (B, H, W) int64

    As eva has it, pixels of the class `ignored` count as background with equal probabilities: they move no weight,
    and yet stand in the sums. MONAI's DiceLoss(softmax=True, batch=True), eva's losses/dice.py.
    """
    if ignored is not None:
        there = target != ignored
        target, logits = target * there, logits * there[:, None]
    said = logits.softmax(dim=1)
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(said.dtype)
    both, each = ((truth * said).sum(dim=(0, 2, 3)), (truth + said).sum(dim=(0, 2, 3)))
    return (1 - (2 * both + SMOOTH) / (each + SMOOTH)).mean()


def dice(predicted: np.ndarray, truth: np.ndarray, classes: int, ignored: int | None = None, clean: bool = False):
    """(C,) Dice of one image by class, 0 to 1; nan for a class that is not in its truth, and for `ignored`.

    predicted, truth  (H, W) integers
    clean             leave out the pixels whose truth is `ignored`. eva keeps them, as pixels of none of the classes:
                      what is predicted there counts as wrong (its metrics/segmentation/_utils.py)
    """
    if clean and ignored is not None:
        predicted, truth = predicted[truth != ignored], truth[truth != ignored]
    found = np.full(classes, np.nan)
    for kind in range(classes):
        a, b = predicted == kind, truth == kind
        if kind != ignored and b.any():
            found[kind] = 2 * (a & b).sum() / (a.sum() + b.sum())
    return found


def of_images(each: np.ndarray) -> np.ndarray:
    """(N,) score of every image: the mean Dice of the classes in it (N, C), background left out; nan without any.

    Their mean over the images is MONAI's DiceMetric(include_background=False, reduction="mean"), which eva monitors.
    """
    there = ~np.isnan(each[:, 1:])
    with np.errstate(invalid="ignore"):
        return np.nansum(each[:, 1:], axis=1) / there.sum(axis=1)
