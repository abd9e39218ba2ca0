"""Segmentation in eva itself: its configurations for CoNSeP and MoNuSAC with an exported backbone, and what it wrote.

As eva 73b61a7 has them below configs/vision/pathology: online/segmentation (the decoder sees tokens and pixels) and
offline/segmentation (tokens alone, written to files first).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from pathfm import eva, tasks
from pathfm.errors import InputError, nearest
from pathfm.export import load
from pathfm.segment import EVA, SegmentationProtocol

# Our task -> the class of eva that reads the same files, and the split that it stops on and reports.
DATASETS = {"consep": ("CoNSeP", "val"), "monusac": ("MoNuSAC", "test")}
DECODERS = {"image": "ConvDecoderWithImage", "tokens": "ConvDecoderMS"}
VERBS = {"image": "fit", "tokens": "predict_fit"}  # what `eva` is to do with a configuration
IGNORED = {"monusac": 5}  # class in the masks that no score counts; the decoder has no output for it
SCORE = "MonaiDiceScore"


def configuration(
    export: str | Path, task: str, data: str | Path, out: str | Path, decoder: str = "image", steps: int = 0,
    workers: int = 4,
) -> dict:  # fmt: skip
    """What `eva` is to do (VERBS) with a task's masks and an exported backbone; logs and results.json below `out`.

    export   the folder of the backbone
    task     one of DATASETS; `data` is the folder that eva calls its root
    decoder  "image": tokens and pixels; "tokens": tokens alone
    steps    at most; the protocol's own where 0

    Of MoNuSAC the masks that eva draws go below `out`; its own configuration has them in a folder of the user's.
    Raises InputError for an unknown task or decoder.
    """
    for given, known in ((task, DATASETS), (decoder, DECODERS)):
        if given not in known:
            raise InputError(f"eva's segmentation has no '{given}'.{nearest(given, known)}")
    chosen = replace(EVA[task], steps=steps or EVA[task].steps)
    model, preprocess = load(export)
    encoder = eva.network(export, features_only=True, out_indices=1)
    named, ignored = list(tasks.about(task).classes), IGNORED.get(task)
    head = _decoder(decoder, model.num_features, len(named) - (ignored is not None))
    splits = {"train": "train", "val": DATASETS[task][1]}
    callbacks = eva.watching(f"val/{SCORE}", chosen.patience)
    module = {"decoder": head, **_trained(chosen, named, ignored)}
    loaders = {role: eva.loading(chosen.batch_size, workers, role == "train" or None) for role in splits}
    sets: dict[str, Any] = {
        role: _images(task, data, out, split, preprocess, decoder == "image" and chosen.crops and role == "train")
        for role, split in splits.items()
    }
    if decoder == "image":
        module["encoder"] = encoder
    else:
        embeddings = Path(out) / "embeddings"
        more = {"metadata_keys": ["coords"]} if chosen.window_px else {}
        callbacks.append(eva.writing("Segmentation", embeddings, list(splits.values()), encoder, **more))
        sets = {role: _embedded(embeddings, split) for role, split in splits.items()} | {"predict": list(sets.values())}
        loaders["predict"] = eva.loading(64, workers)
    return {
        "trainer": eva.training(out, chosen.runs, callbacks, max_steps=chosen.steps, log_every_n_steps=6),
        "model": {"class_path": "eva.vision.models.modules.SemanticSegmentationModule", "init_args": module},
        "data": {"class_path": "eva.DataModule", "init_args": {"datasets": sets, "dataloaders": loaders}},
    }


def results(out: str | Path) -> pd.DataFrame:
    """A row a run: the Dice that eva stopped on and reports (0 to 1). Raises InputError where eva has not run."""
    _, found = eva.last(out)
    return pd.DataFrame({"validate": found["val"][0][f"val/{SCORE}"]["values"]})


def _decoder(name: str, d: int, classes: int) -> dict:
    place = f"eva.vision.models.networks.decoders.segmentation.{DECODERS[name]}"
    return {"class_path": place, "init_args": {"in_features": d, "num_classes": classes}}


def _trained(chosen: SegmentationProtocol, classes: list[str], ignored: int | None) -> dict:
    """Loss, optimiser and scores of eva's module; a class that is ignored is one of the scores', never of the loss'."""
    skip = {} if ignored is None else {"ignore_index": ignored}
    each = {"include_background": True, "num_classes": len(classes), "reduction": "none", **skip}
    return {
        "criterion": {
            "class_path": "eva.vision.losses.DiceLoss",
            "init_args": {"softmax": True, "batch": True, **skip},
        },
        "lr_multiplier_encoder": 0.0,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": chosen.lr}},
        "postprocess": {
            "predictions_transforms": [
                {"class_path": "eva.core.models.transforms.AsDiscrete", "init_args": {"argmax": True, "keepdim": False}}
            ]
        },
        "metrics": {
            "common": [{"class_path": "eva.metrics.AverageLoss"}],
            "evaluation": [
                {
                    "class_path": "eva.vision.metrics.defaults.MulticlassSegmentationMetrics",
                    "init_args": {"num_classes": len(classes), **skip},
                },
                {
                    "class_path": "torchmetrics.ClasswiseWrapper",
                    "init_args": {
                        "metric": {"class_path": f"eva.vision.metrics.{SCORE}", "init_args": each},
                        "labels": [name.lower() for name in classes],
                    },
                },
            ],
        },
    }


def _images(task: str, data: str | Path, out: str | Path, split: str, preprocess, crops: bool) -> dict:
    """eva's reader of one split; with `crops` it trains on random crops of the images."""
    resize = eva.resizing(preprocess)
    said = {"root": str(data), "split": split, "transforms": _crops(resize["init_args"]) if crops else resize}
    if EVA[task].window_px:
        said["sampler"] = "eva.vision.data.wsi.patching.samplers.GridSampler"
    else:
        said["processed_dir"] = str(Path(out) / "masks")
    return {"class_path": f"eva.vision.datasets.{DATASETS[task][0]}", "init_args": said}


def _crops(resize: dict) -> dict:
    normal = {"mean": resize["mean"], "std": resize["std"]}
    steps = {
        "RandomResizedCrop": {"size": resize["size"]},
        "ToDtype": {"dtype": "torch.float32", "scale": True},
        "Normalize": normal,
    }
    named = [{"class_path": f"torchvision.transforms.v2.{name}", "init_args": how} for name, how in steps.items()]
    return {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": named}}


def _embedded(embeddings: str | Path, split: str) -> dict:
    said = {"root": str(embeddings), "manifest_file": "manifest.csv", "split": split}
    return {"class_path": "eva.vision.datasets.EmbeddingsSegmentationDataset", "init_args": said}
