"""Looks at validation tiles while a run goes on: is the teacher collapsing, does it come to know tissue?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from pathfm.benchmarks import patients
from pathfm.cohort import patient_of
from pathfm.config import PretrainConfig
from pathfm.dino import Dino
from pathfm.errors import InputError
from pathfm.export import Preprocess
from pathfm.losses import entropy

NEIGHBOURS = 20
ROBUST_NEIGHBOURS = 10  # of the robustness index
ENOUGH = 10  # tiles a feature, for RankMe and ODCorr
BATCH = 64  # tiles that go through the teacher at a time
MOST_SCALES = 8  # a stream with more mpp than this is looked at as a whole
# Collapse is judged against the same teacher at step 0. Shares of ours that part tiny runs made to collapse (they tell
# at most 0.011, spread 0.46 of step 0 and less) from those that learn (0.03 and 0.55, and more); tests/test_watches.py
# trains both.
ALIKE = 0.1  # of the spread of features at step 0: collapsed whatever the answers are
FALLEN = 0.5  # of it: collapsed where the answers say so too,
TOLD = 0.015  # of ln K, as the information of an answer about its tile: entropy of the mean less that of one


@dataclass(frozen=True)
class Watch:
    """The tiles that are looked at: (N, H, W, 3) uint8 in `images`, and labelled ones, `bank`, to compare them with.

    centres, patients  of the images, then of the bank; None where they are not known
    mpp                of the tiles; nan where there are several
    coarse             the same at the coarsest magnification, where the tiles have several
    """

    images: Tensor
    labels: np.ndarray | None = None
    bank: Tensor | None = None
    bank_labels: np.ndarray | None = None
    centres: np.ndarray | None = None
    patients: np.ndarray | None = None
    mpp: float = float("nan")
    coarse: Watch | None = None

    @classmethod
    def of(cls, validation: Any, n: int) -> Watch | None:
        """`n` tiles at the finest and n at the coarsest mpp of a TileStream (its first), or of a TileSet.

        A TileSet's tiles of role "validate" are compared with those of "probe-train", both taken evenly from its
        table, so that every class and patient is in. Raises InputError where it has no tiles of these roles: a watch
        selects, so it never sees test tiles.
        """
        if validation is None or isinstance(validation, Watch):
            return validation
        if not hasattr(validation, "table"):
            return _two([_of_stream(validation, rows, mpp) for mpp, rows in _stream_scales(validation, n).items()])
        table = validation.table
        parts = [
            table[table["role"] == role] if "role" in table else table.iloc[:0] for role in ("validate", "probe-train")
        ]
        for role, rows in zip(("validate", "probe-train"), parts, strict=True):
            if not len(rows):
                raise InputError(f"the validation tiles have none of role '{role}'; split them first")
        scales = [float("nan")]
        if "mpp" in table and all(rows["mpp"].notna().all() for rows in parts):
            scales = sorted(set(parts[0]["mpp"]) & set(parts[1]["mpp"])) or scales
        return _two([_of_tiles(*parts, mpp, n, alone=len(scales) == 1) for mpp in _ends(scales)])

    def record(self, features: int, asked: int) -> list[dict[str, Any]]:
        """A row a magnification: mpp (None where there are several), tiles, features, and `few`, what to know of it.

        features  of the model, D
        asked     tiles that the config asks for (watch_tiles)
        """
        rows = []
        for watch in (self, self.coarse) if self.coarse else (self,):
            n, mpp = len(watch.images), None if np.isnan(watch.mpp) else float(watch.mpp)
            row = {"mpp": mpp, "tiles": n, "features": features, "few": _few(n, mpp, features, asked)}
            rows.append(row)
        return rows

    @torch.inference_mode()
    def look(self, model: Dino, config: PretrainConfig) -> dict[str, float]:
        """What the teacher makes of the tiles, at the finest mpp and, names ending in "_coarse", at the coarsest.

        Of its answers to CLS: entropy of one tile's and of their mean (nats). Of its features: RankMe, ODCorr with N,
        D and floor, spread. With labels kNN accuracy; with centres their identity; with both the robustness index.
        """
        training = model.training
        model.eval()
        seen = self._look(model, config)
        if self.coarse is not None:
            seen |= {f"{name}_coarse": value for name, value in self.coarse._look(model, config).items()}
        model.train(training)
        return seen

    def _look(self, model: Dino, config: PretrainConfig) -> dict[str, float]:
        from pathfm.metrics import odcorr, rankme

        x = self._features(self.images, model, config)
        p = model.answers(
            model.teacher.head(torch.as_tensor(x, device=model.centre.device)), config.teacher_temperature
        )
        correlation = odcorr(x)
        seen = {
            "mpp": self.mpp,
            "teacher_entropy": float(entropy(p).mean()),
            "prototype_entropy": float(entropy(p.mean(0))),
            "rankme": float(rankme(x)),
            "n": len(x),
            "d": x.shape[1],
            "odcorr": correlation.value,
            "odcorr_floor": correlation.floor,
            "constants": correlation.constants,
            "spread": spread(x),
        }
        known = None if self.bank is None else self._features(self.bank, model, config)
        return seen | self._neighbours(x, known)

    def _neighbours(self, x: np.ndarray, known: np.ndarray | None) -> dict[str, float]:
        """What the nearest tiles share: the class (knn), and the centre, among all tiles watched."""
        from pathfm.metrics import centre_identity, robustness_index
        from pathfm.probe import knn_accuracy

        seen = {} if known is None else {"knn": knn_accuracy(known, self.bank_labels, x, self.labels, k=NEIGHBOURS)}
        if self.centres is None or len(np.unique(self.centres)) < 2:
            return seen
        everyone = x if known is None else np.concatenate([x, known])
        centre = centre_identity(everyone, self.centres, self.patients, NEIGHBOURS)
        seen |= {"centre_identity": centre.value, "centre_chance": centre.chance}
        if known is not None:
            labels = np.concatenate([self.labels, self.bank_labels])
            index = robustness_index(everyone, labels, self.centres, self.patients, k=(ROBUST_NEIGHBOURS,))
            seen["robustness_index"] = float(index["robustness_index"].iloc[0])
        return seen

    def _features(self, images: Tensor, model: Dino, config: PretrainConfig) -> np.ndarray:
        prepare, device = Preprocess(config.global_px), model.centre.device
        batches = [model.teacher.backbone(prepare(batch.to(device))) for batch in images.split(BATCH)]
        return torch.cat(batches).float().cpu().numpy()


def _few(n: int, mpp: float | None, features: int, asked: int) -> str:
    """What a reader of RankMe and ODCorr should know of `n` tiles; "" where they are enough."""
    at = "" if mpp is None else f" at {mpp:g} um/px"
    said = [f"the cohort has {n} validation tiles{at}, not watch_tiles={asked}"] if n < asked else []
    if n < ENOUGH * features:
        floor = np.sqrt(2 / (np.pi * n))
        said.append(
            f"{n} watched tiles{at} are fewer than {ENOUGH} for each of {features} features: RankMe and ODCorr (its "
            f"floor is {floor:.2g}) compare within this run alone"
        )
    return "; ".join(said)


def spread(x: np.ndarray) -> float:
    """One less the mean cosine of two different rows of features (N, D): 0 where all are alike, 1 where unrelated."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    n = len(x)
    return float((1 - np.square(unit.mean(0, dtype=np.float64)).sum()) * n / max(1, n - 1))


def collapsed(first: Mapping[str, float], now: Mapping[str, float], config: PretrainConfig) -> str:
    """What is wrong with the teacher at a look, against the look at step 0, and what helps; "" where nothing is.

    RankMe is no part of it: it falls in runs that learn, too, to a fifth of that of random weights.
    """
    most, left = np.log(config.prototypes), now["spread"] / max(first["spread"], 1e-12)
    told = now["prototype_entropy"] - now["teacher_entropy"]
    if left < FALLEN and told < TOLD * most:
        if now["teacher_entropy"] < most / 2:
            wrong, remedy = "it gives every tile the same answer", "centre_momentum=0.9, or koleo=0.1"
        else:
            wrong, remedy = "it has no opinion of any tile", "teacher_temperature=0.04, koleo=0.1, or milder colours"
    elif left < ALIKE:
        wrong, remedy = "its features of all tiles are alike", "koleo=0.1, head_norm=True (DINO), or a lower base_lr"
    else:
        return ""
    return (
        f"the teacher is collapsing: {wrong} (spread of features {now['spread']:.2g}, {first['spread']:.2g} at step 0; "
        f"entropy of an answer {now['teacher_entropy']:.2f}, of their mean {now['prototype_entropy']:.2f}, of none "
        f"{most:.2f} nats). Take {remedy}, in a new folder"
    )


def _two(watches: list[Watch]) -> Watch:
    fine, *coarse = watches
    return Watch(**{**vars(fine), "coarse": coarse[0] if coarse else None})


def _ends(scales: list[float]) -> list[float]:
    return [scales[0], scales[-1]] if len(scales) > 1 else scales


def _of_tiles(watched: pd.DataFrame, bank: pd.DataFrame, mpp: float, n: int, alone: bool) -> Watch:
    """`n` tiles of each table at one mpp; at any where it stands `alone`."""
    watched, bank = (_evenly(rows if alone else rows[rows["mpp"] == mpp], n) for rows in (watched, bank))
    both = pd.concat([watched, bank])
    who = patients(both)
    known = "centre" in both and who is not None
    return Watch(
        _read(watched["path"]),
        watched["label"].to_numpy(),
        _read(bank["path"]),
        bank["label"].to_numpy(),
        both["centre"].to_numpy(str) if known else None,
        who if known else None,
        mpp,
    )


def _stream_scales(stream: Any, n: int) -> dict[float, list[int]]:
    """Numbers of the first n tiles at the finest and at the coarsest mpp of a stream; of any where its mpp are many."""
    named = stream.name if hasattr(stream, "name") else stream.__getitem__
    scales = sorted(getattr(stream, "weights", ())) or sorted({named(i).mpp for i in range(min(n, len(stream)))})
    if not 1 < len(scales) <= MOST_SCALES:
        return {scales[0] if len(scales) == 1 else float("nan"): list(range(min(n, len(stream))))}
    found: dict[float, list[int]] = {mpp: [] for mpp in _ends(scales)}
    for i in range(min(len(stream), 64 * n)):  # weights may be very uneven
        nearest = min(scales, key=lambda mpp: abs(np.log(mpp / named(i).mpp)))
        if len(found.get(nearest, range(n))) < n:
            found[nearest].append(i)
        elif all(len(rows) == n for rows in found.values()):
            break
    return {mpp: rows for mpp, rows in found.items() if rows}


def _of_stream(stream: Any, rows: list[int], mpp: float) -> Watch:
    tiles = [stream[i] for i in rows]
    images = torch.stack([torch.as_tensor(tile.image) for tile in tiles])
    slides = getattr(stream, "slides", None)
    if slides is None or "centre" not in slides:
        return Watch(images, mpp=mpp)
    own = slides.assign(patient=patient_of(slides)).set_index("slide_id").loc[[tile.slide_id for tile in tiles]]
    return Watch(images, centres=own["centre"].to_numpy(str), patients=own["patient"].to_numpy(str), mpp=mpp)


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
