"""The same probes in eva itself: configurations and embeddings that kaiko-eva reads, and what it wrote.

eva runs in a process and, where PATHFM_EVA_PYTHON names its interpreter, in an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from pathfm import tasks
from pathfm.errors import InputError, nearest
from pathfm.export import load
from pathfm.protocols import MAX_STEPS, Protocol, protocol
from pathfm.storage import atomic

# Our task -> the class of eva that reads the same files, and the splits that it stops on and reports.
DATASETS = {
    "bach": ("BACH", "val", None),
    "bracs": ("BRACS", "val", "test"),
    "breakhis": ("BreaKHis", "val", None),
    "crc": ("CRC", "val", None),
    "gleason": ("GleasonArvaniti", "val", None),
    "mhist": ("MHIST", "test", None),
    "pcam": ("PatchCamelyon", "val", "test"),
    "pcam_10shot": ("PatchCamelyon", "val", "test"),
}
FLOAT = {"class_path": "torchvision.transforms.v2.ToDtype", "init_args": {"dtype": "torch.float32"}}


def interpreter() -> str:
    """The Python that has kaiko-eva: PATHFM_EVA_PYTHON, else this one. Raises InputError where it has none."""
    python = os.environ.get("PATHFM_EVA_PYTHON", sys.executable)
    try:
        subprocess.run([python, "-c", "import eva"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise InputError(
            f"{python} has no kaiko-eva; install pathfm[eva], or name its interpreter in PATHFM_EVA_PYTHON"
        ) from None
    return python


def write_embeddings(folder: str | Path, x: np.ndarray, y: np.ndarray, splits: Mapping[str, np.ndarray]) -> Path:
    """Features as eva's writer leaves them: a file a row and manifest.csv. Returns the folder.

    x, y    (N, D) features and (N,) classes as integers
    splits  "train", "val" and perhaps "test" -> rows
    """
    folder, lines = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        for row in rows:
            torch.save([torch.tensor(x[row], dtype=torch.float32)], folder / f"{row}.pt")
            lines.append((f"{row}.png", f"{row}.pt", int(y[row]), split))
    with atomic(folder / "manifest.csv", "w") as file:
        pd.DataFrame(lines, columns=["origin", "embeddings", "target", "split"]).to_csv(file, index=False)
    return folder


def configuration(
    chosen: Protocol,
    embeddings: str | Path,
    out: str | Path,
    d: int,
    classes: int,
    validate: str = "val",
    test: str | None = "test",
    workers: int = 0,
) -> dict:
    """What `eva fit` is to do: that protocol on the embeddings in a folder, logs and results.json below `out`.

    d, classes      features of an image, and how many classes there are
    validate, test  splits of the manifest; without a test split None
    workers         processes that read; eva's own configurations have 4

    The runs of eva-2024 start from heads of their own here: that they shared one is not in eva any more.
    """
    length = {"max_steps": chosen.max_steps, "check_val_every_n_epoch": chosen.every}
    watched = watching(_monitor(chosen, classes), chosen.patience, chosen.min_delta)
    splits = {"train": "train", "val": validate} | ({"test": test} if test else {})
    data = {
        "datasets": {role: _dataset(embeddings, split, classes) for role, split in splits.items()},
        "dataloaders": {
            role: loading(chosen.batch_size, workers, not chosen.shots if role == "train" else None) for role in splits
        },
    }
    if chosen.shots:
        sampler = "eva.core.data.samplers.classification.BalancedSampler"
        settings = {"num_samples": chosen.shots, "reset_generator": False}
        data["samplers"] = {"train": {"class_path": sampler, "init_args": settings}}
    return {
        "trainer": training(out, chosen.runs, watched, **length),
        "model": {"class_path": "eva.HeadModule", "init_args": _head(chosen, d, classes)},
        "data": {"class_path": "eva.DataModule", "init_args": data},
    }


def backbone_configuration(
    export: str | Path,
    task: str,
    data: str | Path,
    out: str | Path,
    name: str = "",
    max_steps: int = MAX_STEPS,
    workers: int = 4,
) -> dict:
    """What `eva predict_fit` is to do: embed a task of eva's with an exported backbone, then `configuration`.

    export  the folder of the backbone
    task    one of DATASETS; `data` is the folder that eva calls its root
    name    of the protocol; "" takes today's

    The input side, mean and standard deviation are the export's. Raises InputError for an unknown task.
    """
    if task not in DATASETS:
        raise InputError(f"eva reads no tiles of '{task}' by this name.{nearest(task, DATASETS)}")
    kind, validate, test = DATASETS[task]
    known = tasks.about(task)
    name = name or ("eva-2026-10shot" if task == "pcam_10shot" else "eva-2026")
    model, preprocess = load(export)
    embeddings, classes = Path(out) / "embeddings", len(known.classes)
    chosen = protocol(name, known.count("train"), known.count("val"), classes, max_steps)
    config = configuration(chosen, embeddings, out, model.num_features, classes, validate, test, workers)
    images = {"root": str(data), "transforms": resizing(preprocess)}
    splits = ["train", validate] + ([test] if test else [])
    inside = config["data"]["init_args"]
    inside["datasets"]["predict"] = [
        {"class_path": f"eva.vision.datasets.{kind}", "init_args": images | {"split": split}} for split in splits
    ]
    inside["dataloaders"]["predict"] = loading(64, workers)
    config["trainer"]["init_args"]["callbacks"].append(writing("Classification", embeddings, splits, network(export)))
    return config


def training(out: str | Path, runs: int, callbacks: list[dict], **length) -> dict:
    """eva's trainer with logs and results.json below `out`; length: max_steps or max_epochs and the like."""
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(out), "name": ""}}
    how = {"checkpoint_type": "best", "accelerator": "cpu", "enable_progress_bar": False}
    told = {"n_runs": runs, "default_root_dir": str(out), **length, **how}
    return {"class_path": "eva.Trainer", "init_args": {**told, "callbacks": callbacks, "logger": [logger]}}


def watching(monitor: str, patience: int, min_delta: float = 0) -> list[dict]:
    """The callbacks that keep the best head and stop."""
    watched = {"monitor": monitor, "mode": "max"}
    return [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"filename": "best", "save_top_k": 1, **watched},
        },
        {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"min_delta": min_delta, "patience": patience, **watched},
        },
    ]


def writing(kind: str, embeddings: str | Path, splits: list[str], backbone: dict, **more) -> dict:
    """The callback that writes embeddings, a predict data set a split; kind is Classification or Segmentation."""
    said = {"output_dir": str(embeddings), "dataloader_idx_map": dict(enumerate(splits)), "backbone": backbone}
    return {"class_path": f"eva.callbacks.{kind}EmbeddingsWriter", "init_args": said | more}


def scoring(classes: int) -> dict:
    """eva's scores of so many classes."""
    if classes == 2:
        return {"class_path": "eva.metrics.BinaryClassificationMetrics"}
    return {"class_path": "eva.metrics.MulticlassClassificationMetrics", "init_args": {"num_classes": classes}}


def network(export: str | Path, **more) -> dict:
    """An exported backbone as eva builds it: timm.create_model of its folder, with more arguments of that."""
    arguments = {"model_name": f"local-dir:{Path(export).resolve()}", "pretrained": True, **more}
    return {
        "class_path": "eva.models.ModelFromFunction",
        "init_args": {"path": "timm.create_model", "arguments": arguments},
    }


def resizing(preprocess) -> dict:
    """The short side to the export's input side, its central square, its mean and standard deviation."""
    resize = {"size": preprocess.input_px, "mean": list(preprocess.mean), "std": list(preprocess.std)}
    return {"class_path": "eva.vision.data.transforms.common.ResizeAndCrop", "init_args": resize}


def loading(batch_size: int, workers: int, shuffle: bool | None = None) -> dict:
    """A data loader; without workers eva's defaults for them are taken back."""
    reading = {"num_workers": workers} | ({} if workers else {"persistent_workers": False, "prefetch_factor": None})
    return {"batch_size": batch_size, **({} if shuffle is None else {"shuffle": shuffle}), **reading}


def write(config: dict, path: str | Path) -> Path:
    """A configuration as the YAML file that `eva --config` reads."""
    with atomic(Path(path), "w") as file:
        yaml.safe_dump(config, file, sort_keys=False)
    return Path(path)


def run(verb: str, config: dict, python: str | None = None) -> pd.DataFrame:
    """Runs `eva fit` or `eva predict_fit` and returns `results`. Raises InputError with eva's last words."""
    return results(execute(verb, config, python), config)


def execute(verb: str, config: dict, python: str | None = None) -> Path:
    """Runs `eva fit` or `eva predict_fit`; returns the folder of its logs. Raises InputError with eva's last words."""
    out = Path(config["trainer"]["init_args"]["default_root_dir"])
    path = write(config, out / "eva.yaml")
    command = [python or interpreter(), "-m", "eva", verb, "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        raise InputError(f"eva {verb} --config {path} failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return out


def results(out: str | Path, config: dict) -> pd.DataFrame:
    """A row a run: balanced accuracy on `validate` and `test` (0 to 1), and the steps `kept` and `stopped`."""
    path, found = last(out)
    score = "BinaryBalancedAccuracy" if _binary(config) else "MulticlassAccuracy"
    table = pd.DataFrame({"validate": found["val"][0][f"val/{score}"]["values"]})
    if found["test"]:
        table["test"] = found["test"][0][f"test/{score}"]["values"]
    monitor = config["trainer"]["init_args"]["callbacks"][0]["init_args"]["monitor"]
    steps = [_steps(path.parent / f"run_{run}" / "metrics.csv", monitor) for run in range(len(table))]
    return table.assign(kept=[kept for kept, _ in steps], stopped=[stopped for _, stopped in steps])


def last(out: str | Path) -> tuple[Path, dict]:
    """results.json of the last session below `out`, and its metrics. Raises InputError where there is none."""
    sessions = sorted(Path(out).glob("*/results.json"))
    if not sessions:
        raise InputError(f"{out} holds no results of eva; run it first")
    return sessions[-1], json.loads(sessions[-1].read_text())["metrics"]


def _steps(log: Path, monitor: str) -> tuple[int, int]:
    """The steps at which the best head stood and at which the run ended."""
    seen = pd.read_csv(log).dropna(subset=[monitor])
    *during, after = seen[["step", monitor]].itertuples(index=False)  # the last look is at the head that was kept
    best = max(score for _, score in during)
    return int(next(step for step, score in during if score == best)) + 1, int(after[0])


def _binary(config: dict) -> bool:
    return config["model"]["init_args"]["head"]["init_args"]["out_features"] == 1


def _monitor(chosen: Protocol, classes: int) -> str:
    if classes > 2:
        return "val/MulticlassAccuracy"
    return "val/BinaryAccuracy" if chosen.monitor == "accuracy" else "val/BinaryBalancedAccuracy"


def _head(chosen: Protocol, d: int, classes: int) -> dict:
    binary = classes == 2
    model = {
        "head": {
            "class_path": "torch.nn.Linear",
            "init_args": {"in_features": d, "out_features": 1 if binary else classes},
        },
        "criterion": "torch.nn.BCEWithLogitsLoss" if binary else "torch.nn.CrossEntropyLoss",
        "optimizer": {"class_path": f"torch.optim.{chosen.optimiser}", "init_args": {"lr": chosen.lr}},
        "metrics": {"common": [scoring(classes)]},
    }
    if chosen.optimiser == "SGD":
        model["optimizer"]["init_args"]["momentum"] = 0.9
    if chosen.schedule == "cosine":
        schedule = {
            "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "init_args": {"T_max": chosen.max_steps},
        }
        model["lr_scheduler"] = schedule
    return model


def _dataset(embeddings: str | Path, split: str, classes: int) -> dict:
    found = {"root": str(embeddings), "manifest_file": "manifest.csv", "split": split}
    if classes == 2:
        found["target_transforms"] = FLOAT
    return {"class_path": "eva.datasets.EmbeddingsClassificationDataset", "init_args": found}
