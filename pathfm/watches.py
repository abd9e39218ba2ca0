"""Looks at validation tiles while a run goes on: is the teacher collapsing, does it come to know tissue?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pathfm.config import PretrainConfig
from pathfm.dino import Dino
from pathfm.errors import InputError
from pathfm.export import Preprocess
from pathfm.losses import entropy

NEIGHBOURS = 20


@dataclass(frozen=True)
class Watch:
    """The tiles that are looked at: (N, H, W, 3) uint8 in `images`, and labelled ones to compare them with."""

    images: Tensor
    labels: np.ndarray | None = None
    bank: Tensor | None = None
    bank_labels: np.ndarray | None = None

    @classmethod
    def of(cls, validation: Any, n: int) -> Watch | None:
        """The first `n` tiles of a TileStream, or `n` of a TileSet: of role "validate", against "probe-train".

        A TileSet's tiles are taken evenly from its table, so that every class and patient is in. Raises
        InputError where it has no tiles of these roles: a watch selects, so it never sees test tiles.
        """
        if validation is None or isinstance(validation, Watch):
            return validation
        if not hasattr(validation, "table"):
            return cls(torch.stack([torch.as_tensor(validation[i].image) for i in range(min(n, len(validation)))]))
        table = validation.table
        watched, bank = (
            table[table["role"] == role] if "role" in table else table.iloc[:0] for role in ("validate", "probe-train")
        )
        for role, rows in (("validate", watched), ("probe-train", bank)):
            if not len(rows):
                raise InputError(f"the validation tiles have none of role '{role}'; split them first")
        watched, bank = _evenly(watched, n), _evenly(bank, n)
        return cls(_read(watched["path"]), watched["label"].to_numpy(), _read(bank["path"]), bank["label"].to_numpy())

    @torch.inference_mode()
    def look(self, model: Dino, config: PretrainConfig) -> dict[str, float]:
        """Of the teacher: mean entropy (nats), RankMe, ODCorr with N, D and floor, and kNN accuracy with labels."""
        from pathfm.metrics import odcorr, rankme

        training = model.training
        model.eval()
        x = self._features(self.images, model, config)
        logits = model.teacher.head(torch.as_tensor(x, device=model.centre.device))
        p = model.answers(logits, config.teacher_temperature)
        correlation, rank = odcorr(x), rankme(x)
        seen = {
            "teacher_entropy": float(entropy(p).mean()),
            "rankme": float(rank),
            "n": len(x),
            "d": x.shape[1],
            "odcorr": correlation.value,
            "odcorr_floor": correlation.floor,
            "constants": correlation.constants,
        }
        if self.bank is not None:
            from pathfm.probe import knn_accuracy

            known = self._features(self.bank, model, config)
            seen["knn"] = knn_accuracy(known, self.bank_labels, x, self.labels, k=NEIGHBOURS)
        model.train(training)
        return seen

    def _features(self, images: Tensor, model: Dino, config: PretrainConfig) -> np.ndarray:
        prepare, device = Preprocess(config.global_px), model.centre.device
        batches = [model.teacher.backbone(prepare(batch.to(device))) for batch in images.split(64)]
        return torch.cat(batches).float().cpu().numpy()


def _evenly(table, n: int):
    return table.iloc[np.unique(np.linspace(0, len(table) - 1, min(n, len(table))).round().astype(int))]


def _read(paths) -> Tensor:
    tiles = []
    for path in paths:
        with Image.open(path) as image:
            tiles.append(torch.from_numpy(np.array(image.convert("RGB"))))
    if len({tile.shape for tile in tiles}) > 1:
        raise InputError(f"validation tiles differ in size, e.g. beside {paths.iloc[0]}; watch tiles of one size")
    return torch.stack(tiles)
