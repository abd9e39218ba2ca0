"""Slide labels in eva itself: its ABMIL on bags of embeddings, given ones or those of an exported backbone.

As eva 73b61a7 has it in configs/vision/pathology/offline/classification/{camelyon16_small,panda_small}.yaml.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pathfm import eva, tasks
from pathfm.bags import Bags
from pathfm.errors import InputError, nearest
from pathfm.evaluation import SLIDE_TILES
from pathfm.export import load
from pathfm.slide_probe import SlideProtocol
from pathfm.storage import atomic

DATASETS = {"camelyon16_small": "Camelyon16", "panda_small": "PANDASmall"}  # our task -> eva's reader of the same files
ROLES = {"probe-train": "train", "validate": "val", "test": "test"}
TILE_PX = 224  # that eva cuts slides into
LR = 1e-3  # of AdamW
PROJECTED = 128  # features that ABMIL reduces embeddings to


def write_bags(folder: str | Path, bags: Bags, label: str = "label") -> Path:
    """Bags as eva's writer leaves them: a file a slide with all of its tiles, and manifest.csv. Returns the folder.

    label   a column of `bags.slides`, beside role; classes are numbered in sorted order
    """
    folder, lines = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    target = np.unique(bags.slides[label].to_numpy(str), return_inverse=True)[1]
    for row, slide in enumerate(bags.slides.itertuples()):
        torch.save(torch.tensor(np.asarray(bags[row], np.float32)), folder / f"{row}.pt")
        lines.append((slide.slide_id, f"{row}.pt", int(target[row]), ROLES[slide.role], slide.slide_id))
    with atomic(folder / "manifest.csv", "w") as file:
        columns = ["origin", "embeddings", "target", "split", "wsi_id"]
        pd.DataFrame(lines, columns=columns).to_csv(file, index=False)
    return folder


def configuration(
    chosen: SlideProtocol, embeddings: str | Path, out: str | Path, d: int, classes: int, tiles: int, workers: int = 0
) -> dict:
    """What `eva fit` is to do: ABMIL on the bags in a folder, stopped on val; logs and results.json below `out`.

    d, classes   features of a tile, and how many classes there are
    tiles        to which every bag is padded; a larger one is an error of eva's
    """
    binary = classes == 2
    module = {
        "head": {
            "class_path": "eva.vision.models.networks.ABMIL",
            "init_args": {
                "input_size": d,
                "output_size": 1 if binary else classes,
                "projected_input_size": PROJECTED,
            },
        },
        "criterion": "torch.nn.BCEWithLogitsLoss" if binary else "torch.nn.CrossEntropyLoss",
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": LR, "betas": [0.9, 0.999]}},
        "metrics": {"common": [{"class_path": "eva.metrics.AverageLoss"}, eva.scoring(classes)]},
    }
    splits = ROLES.values()
    data = {
        "datasets": {split: _bags(embeddings, split, tiles, binary) for split in splits},
        "dataloaders": {
            split: eva.loading(chosen.batch_size, workers, True if split == "train" else None) for split in splits
        },
    }
    return {
        "trainer": eva.training(
            out, chosen.runs, eva.watching(_monitor(binary), chosen.patience), max_epochs=chosen.epochs
        ),
        "model": {"class_path": "eva.HeadModule", "init_args": module},
        "data": {"class_path": "eva.DataModule", "init_args": data},
    }


def backbone_configuration(
    export: str | Path, task: str, data: str | Path, out: str | Path, epochs: int = 0, workers: int = 4
) -> dict:
    """What `eva predict_fit` is to do: cut a task's slides, embed the tiles with an exported backbone, `configuration`.

    task     one of DATASETS; `data` is the folder that eva calls its root
    epochs   at most; the protocol's own where 0

    PANDA's labels are looked for in `data`; where they are not there, eva fetches them into it.
    Raises InputError for an unknown task.
    """
    if task not in DATASETS:
        raise InputError(f"eva reads no slides of '{task}' by this name.{nearest(task, DATASETS)}")
    known, most = tasks.about(task), SLIDE_TILES[task]
    chosen = SlideProtocol(epochs=epochs or SlideProtocol().epochs)
    model, preprocess = load(export)
    embeddings = Path(out) / "embeddings"
    config = configuration(chosen, embeddings, out, model.num_features, len(known.classes), most, workers)
    sampler = {"class_path": "eva.vision.data.wsi.patching.samplers.ForegroundGridSampler"}
    cut = {
        "root": str(data),
        "sampler": sampler | {"init_args": {"max_samples": most}},
        "width": TILE_PX,
        "height": TILE_PX,
        "target_mpp": known.mpp,
        "image_transforms": eva.resizing(preprocess),
    } | ({"download_dir": str(data)} if task == "panda_small" else {})
    splits = list(ROLES.values())
    inside = config["data"]["init_args"]
    inside["datasets"]["predict"] = [
        {
            "class_path": f"eva.vision.datasets.{DATASETS[task]}",
            "init_args": {**cut, "split": split, "coords_path": str(embeddings / f"coords_{split}.csv")},
        }
        for split in splits
    ]
    inside["dataloaders"]["predict"] = eva.loading(64, workers)
    more = {"metadata_keys": ["wsi_id"]} | ({"save_every_n": 10_000} if task == "camelyon16_small" else {})
    writer = eva.writing("Classification", embeddings, splits, eva.network(export), **more)
    config["trainer"]["init_args"]["callbacks"].append(writer)
    return config


def results(out: str | Path, classes: int) -> pd.DataFrame:
    """A row a run: balanced accuracy on `validate` and `test`, 0 to 1. Raises InputError where eva has not run."""
    _, found = eva.last(out)
    score = "BinaryBalancedAccuracy" if classes == 2 else "MulticlassAccuracy"
    roles = {"validate": "val", "test": "test"}
    return pd.DataFrame({role: found[split][0][f"{split}/{score}"]["values"] for role, split in roles.items()})


def _monitor(binary: bool) -> str:
    return "val/BinaryBalancedAccuracy" if binary else "val/MulticlassAccuracy"


def _bags(embeddings: str | Path, split: str, tiles: int, binary: bool) -> dict:
    pad = {"class_path": "eva.core.data.transforms.Pad2DTensor", "init_args": {"pad_size": tiles}}
    said = {"root": str(embeddings), "manifest_file": "manifest.csv", "split": split, "embeddings_transforms": pad}
    if binary:
        said["target_transforms"] = {"class_path": "eva.core.data.transforms.dtype.ArrayToFloatTensor"}
    return {"class_path": "eva.datasets.MultiEmbeddingsClassificationDataset", "init_args": said}
