"""What the synthetic cohort can show: how well its classes are told apart by colour, texture, truth and a labelled CNN.

Every answer is about a centre that was left out, and none chooses anything by it. Measured on development seeds only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn

from pathfm import probe
from pathfm.benchmarks import TileSet
from pathfm.cohort import Cohort
from pathfm.features import Features, extract
from pathfm.metrics import balanced_accuracy
from pathfm.runs import read_results, stamp, write_results
from pathfm.scores import Prediction, n_patients
from pathfm.slide import Slide
from pathfm.storage import progress
from pathfm.synthetic import CLASSES, labelled_tiles, make_cohort, slide_oracle, tile_oracle

TILE_PX, MPP = 224, 0.5
# Lowest and highest balanced accuracy, mean over centres, that the cohort may have.
LIMITS = {
    "colour": (0.0, 0.65),  # else classes are colours, as in NCT-CRC-HE, where colour alone gives over 0.82
    "oracle": (0.92, 1.0),  # else labels are not in the tissue, and no encoder could earn more
    "CNN": (0.85, 1.0),  # else they are in the tissue but not in the pixels
    "file": (0.0, 0.16),  # chance is 0.125; resolution, pyramid and JPEG quality must say nothing
}
TEXTURE = ("colour", "lbp", "colour+lbp")  # the texture floor is the best of these; reported without a bound
TREES = 300
EPOCHS = 16
CROP_PX = 160  # of a tile, while training; answers are given on whole tiles
BATCH = 32
LR = 3e-3
WEIGHT_DECAY = 0.05
STAIN_JITTER = 0.25  # of the logarithm of each channel's optical density, uniform
LIGHT_JITTER = 0.04  # of the logarithm of each channel's brightness

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # known x, their classes, unknown x: answers


def ceilings(cohort: Cohort, folder: str | Path | None = None) -> pd.DataFrame:
    """Everything that is measured: what, centre, balanced_accuracy, tiles, patients.

    A row a centre that was left out, and one, "all", with the mean over centres. what is
    colour             mean and spread of the channels
    lbp, colour+lbp    local binary patterns at 1.2 um/px, alone and with colour
    texture            whichever of these three is best
    oracle             a forest on the truth of each tile; the number that LIMITS holds
    oracle, logistic   the same by the project's own probe, which is linear, as depth and lumina are not
    CNN                a small network with labels
    file               mpp, pyramid levels and JPEG quality

    folder  of the labelled tiles; the cache where None
    """
    tiles = TileSet.from_folder(labelled_tiles(cohort, folder, TILE_PX, MPP))
    truth = tile_features(cohort, tiles)
    answers = {name: floor(tiles, name) for name in TEXTURE}
    answers["texture"] = max(answers.values(), key=_mean_over_centres)
    answers["oracle"] = left_out("oracle", tiles, truth.x, forest)
    answers["oracle, logistic"] = probe.cross_validate(truth)
    answers["CNN"] = labelled_cnn(tiles)
    answers["file"] = left_out("file", tiles, file_facts(cohort, tiles), forest)
    return pd.concat([by_centre(name, answer) for name, answer in answers.items()], ignore_index=True)


def floor(tiles: TileSet, name: str) -> Prediction:
    """The project's linear probe on one of its descriptors, C chosen on other centres than the one left out."""
    return probe.cross_validate(extract(name, tiles))


def tile_features(cohort: Cohort, tiles: TileSet) -> Features:
    """The truth under every tile, as features."""
    table = tile_oracle(cohort, tiles.table, TILE_PX)
    return Features("oracle", table.to_numpy(np.float32), tiles)


def oracle(cohort: Cohort, tiles: TileSet) -> Prediction:
    """What a forest on the truth of each tile answers on test, fitted on probe-train: as much as can be known."""
    x, role = tile_features(cohort, tiles).x, tiles.table["role"].to_numpy(str)
    known, test = role == "probe-train", role == "test"
    predicted = np.array(tiles.classes)[forest(x[known], tiles.y[known], x[test])]
    there = tiles.table[test]
    return Prediction("oracle", "forest", there.assign(truth=there["label"], predicted=predicted))


def file_facts(cohort: Cohort, tiles: TileSet) -> np.ndarray:
    """What the file of every tile's slide says without its pixels, (N, 3): mpp, number of levels, JPEG quality."""
    facts = []
    for row, quality in zip(cohort, slide_oracle(cohort, "scanner")["quality"], strict=True):
        with Slide.open(row.path) as slide:
            facts.append((slide.mpp, len(slide.level_downsamples), round(quality)))
    of_slide = dict(zip(cohort.table["slide_id"], facts, strict=True))
    return np.array([of_slide[name] for name in tiles.table["slide_id"]])


def forest(x: np.ndarray, y: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Classes of the rows of `unknown` by a random forest on x (N, D) and y (N,), its settings fixed beforehand."""
    model = RandomForestClassifier(TREES, class_weight="balanced", random_state=0)
    return model.fit(x, y).predict(unknown)


def left_out(name: str, tiles: TileSet, x: np.ndarray, fit: Fit) -> Prediction:
    """Every tile answered once, by `fit` on the tiles of the other centres; the column `fold` is the centre.

    x  (N, ...) what `fit` is given of each tile: features or images
    """
    y, centre = tiles.y, tiles.table["centre"].to_numpy(str)
    answers = np.empty_like(y)
    for one in progress(np.unique(centre), f"{name}, one centre left out", unit="centre"):
        test = centre == one
        answers[test] = fit(x[~test], y[~test], x[test])
    truth, predicted = tiles.table["label"], np.array(tiles.classes)[answers]
    return Prediction(name, "left out", tiles.table.assign(truth=truth, predicted=predicted, fold=centre))


def labelled_cnn(tiles: TileSet, epochs: int = EPOCHS, seed: int = 0) -> Prediction:
    """Every tile answered once by a `small_cnn` trained, from nothing, on the tiles of the other centres."""
    images = np.stack([image for batch in tiles.images() for image in batch])
    return left_out("CNN", tiles, images, lambda x, y, unknown: answered(trained(x, y, epochs, seed), unknown))


def small_cnn(classes: int = len(CLASSES)) -> nn.Module:
    """Seven convolutions, four of them with stride 2, and the mean over places: 0.3 M weights."""

    def layer(inputs: int, outputs: int, stride: int, side: int = 3) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *layer(3, 16, 2, side=5),
        *layer(16, 32, 2),
        *layer(32, 48, 1),
        *layer(48, 64, 2),
        *layer(64, 64, 1),
        *layer(64, 128, 2),
        *layer(128, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(128, classes),
    )


def trained(images: np.ndarray, y: np.ndarray, epochs: int = EPOCHS, seed: int = 0) -> nn.Module:
    """A `small_cnn` after `epochs` over images (N, side, side, 3) uint8 of classes y (N,); all equally weighted.

    AdamW and one cycle of the learning rate; cut, turned, mirrored and stained anew each time.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_cnn(int(y.max()) + 1).to(memory_format=torch.channels_last).train()
        count = np.bincount(y)
        weight = torch.tensor(len(y) / np.maximum(count, 1) / len(count), dtype=torch.float32)
        optimiser = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
        batch = min(BATCH, len(y))
        steps = epochs * (len(y) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, steps, pct_start=0.15)
        for _ in range(epochs):
            order = torch.randperm(len(y), generator=rng)[: len(y) // batch * batch].numpy()
            for rows in order.reshape(-1, batch):
                logits = _logits(model, jittered(_light(_cut(images[rows], rng)), rng))
                loss = F.cross_entropy(logits, torch.from_numpy(y[rows]), weight, label_smoothing=0.05)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def answered(model: nn.Module, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """Classes (N,) that a trained network gives to images (N, side, side, 3) uint8."""
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    return np.concatenate([_logits(model, _light(part)).argmax(1).numpy() for part in parts])


def jittered(light: Tensor, rng: torch.Generator) -> Tensor:
    """Tiles (B, 3, side, side) of 0 to 1, turned and mirrored together, each with other stain and light."""
    light = torch.rot90(light, int(torch.randint(4, (1,), generator=rng)), (2, 3))
    if torch.rand(1, generator=rng) < 0.5:
        light = light.flip(3)
    stain, lamp = torch.rand((2, len(light), 3, 1, 1), generator=rng) * 2 - 1
    density = -torch.log(light.clamp(min=1 / 255)) * torch.exp(STAIN_JITTER * stain)
    return torch.exp(LIGHT_JITTER * lamp - density)


def _cut(images: np.ndarray, rng: torch.Generator) -> np.ndarray:
    """The same random square of CROP_PX of every image, or whole images no larger than that."""
    side = min(CROP_PX, images.shape[1])
    top, left = torch.randint(images.shape[1] - side + 1, (2,), generator=rng).tolist()
    return images[:, top : top + side, left : left + side]


def _light(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def _logits(model: nn.Module, light: Tensor) -> Tensor:
    light = ((light - 0.7) / 0.25).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):  # twice as fast on processors that know it
        return model(light).float()


def by_centre(what: str, answer: Prediction) -> pd.DataFrame:
    """Rows of `ceilings`: balanced accuracy on each centre left out, and their mean."""
    rows = []
    for centre, there in answer.table.groupby("fold"):
        score = balanced_accuracy(there["truth"], there["predicted"])
        rows.append(
            {
                "what": what,
                "centre": centre,
                "balanced_accuracy": score,
                "tiles": len(there),
                "patients": n_patients(there),
            }
        )
    mean = {
        "what": what,
        "centre": "all",
        "balanced_accuracy": float(np.mean([row["balanced_accuracy"] for row in rows])),
        "tiles": len(answer.table),
        "patients": n_patients(answer.table),
    }
    return pd.DataFrame([mean, *rows])


def outside(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `ceilings`, means over centres, that do not hold LIMITS, with columns low and high."""
    means = table[(table["centre"] == "all") & table["what"].isin(LIMITS)].copy()
    means["low"], means["high"] = zip(*(LIMITS[what] for what in means["what"]), strict=True)
    return means[~means["balanced_accuracy"].between(means["low"], means["high"])]


def measure(seed: int, workers: int | None = None) -> pd.DataFrame:
    """`ceilings` of the cohort "development" drawn with `seed`, each row with where it comes from."""
    start = time.monotonic()
    table = ceilings(make_cohort("development", seed=seed, workers=workers))
    table.insert(0, "seed", seed)
    return table.assign(seconds=round(time.monotonic() - start, 1), **stamp())


def record(seeds: list[int], workers: int | None = None) -> pd.DataFrame:
    """Measures every seed and writes results/instrument.csv after each, whole; returns that table.

    workers  processes that draw slides; all else has one thread, since two on busy cores are many times slower
    Rows of other seeds are kept where the generator is the same. A changed generator voids them.
    """
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)
    for seed in seeds:
        found = measure(seed, workers)
        kept = read_results("instrument")[0]
        kept = kept[kept["seed"] != seed] if len(kept) else kept
        table = pd.concat([kept, found] if len(kept) else [found]).sort_values("seed", kind="stable")
        write_results("instrument", table)
    return read_results("instrument")[0]


def _mean_over_centres(answer: Prediction) -> float:
    return float(by_centre("", answer)["balanced_accuracy"].iloc[0])
