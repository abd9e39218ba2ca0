"""Verbs for backbones: their features, their scores, and the public tasks to score them on."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field

from pathfm.errors import InputError
from pathfm.verbs.setting import of_input, setting

MODEL = "a folder of an export, timm:<model>, hub:<owner/repo or folder>:<entry>, random:<timm model>, or twin: and one"


@dataclass(frozen=True)
class Embed:
    """write frozen features: of labelled tiles one .npz (x, label, path), of slides one .h5 each in the folder out"""

    model: str = field(metadata={"help": MODEL})
    dataset: str
    out: str
    pool: str = setting("cls", "cls, mean (of the patch tokens) or both")
    layers: int = setting(1, "the last so many blocks side by side")
    precision: str = setting("float32", "float32, bfloat16, or auto: bfloat16 where a sample shows no harm")
    device: str = setting("", "such as cuda; the CPU when empty")
    mean: float = setting(-1.0, "of the input's normalisation; the backbone's own when below 0")
    std: float = setting(-1.0, "likewise")
    input_px: int = setting(0, "side of the input in pixels; the backbone's own when 0")
    slides: bool = setting(False, "the data set is a cohort.csv: every tile of a grid over every slide")
    mpp: float = setting(0.5, "um/px of the tiles of slides")
    tile_px: int = setting(224, "side of the tiles of slides")
    min_tissue: float = setting(0.4, "least share of tissue in a tile of a slide")
    most: int = setting(0, "tiles of a slide, drawn at random where it has more; all when 0")
    workers: int = setting(0, "processes, each with slides of its own; this one alone when 0")
    scheduler: str = setting("", "address of a Dask scheduler whose workers embed the slides")

    def __call__(self) -> None:
        (self._slides if self.slides else self._tiles)()

    def _how(self) -> dict[str, typing.Any]:
        from pathlib import Path

        from pathfm import backbones
        from pathfm.features import FLOORS

        how = {name: getattr(self, name) for name in ("pool", "layers", "precision")} | {"device": self.device or None}
        if self.model in FLOORS or not (":" in self.model or Path(self.model).exists()):  # whose error offers a floor
            return {"model": self.model, **how}
        model, preprocess = backbones.load(self.model, **of_input(self))
        if self.slides:
            model = self.model  # a network does not travel to workers, its name does
        return {"model": model, "preprocess": preprocess, "name": Path(self.model).name, **how}

    def _tiles(self) -> None:
        import numpy as np

        from pathfm.benchmarks import TileSet
        from pathfm.features import extract
        from pathfm.storage import atomic

        features = extract(tiles=TileSet.from_folder(self.dataset), **self._how())
        table, bad = features.table, features.tiles.quarantined
        with atomic(self.out) as file:
            np.savez_compressed(file, x=features.x, label=table["label"].astype(str), path=table["file"].astype(str))
        print(f"{self.out}: {features.x.shape[0]} tiles, {features.x.shape[1]} features")
        self._compared(features.provenance)
        for row in bad.itertuples():
            print(f"quarantined: {row.file}: {row.reason}")

    def _slides(self) -> None:
        from pathfm import Cohort, SlideIndex, bags

        index = SlideIndex.build(Cohort.read(self.dataset), scheduler=self.scheduler or None)
        cut = bags.Cut(self.tile_px, self.mpp, min_tissue=self.min_tissue, most=self.most)
        where = {"workers": self.workers, "scheduler": self.scheduler or None}
        found = bags.extract(index=index, cut=cut, **self._how(), **where)
        print(f"{found.write(self.out)}: {found}")
        self._compared(found.provenance)
        for row in found.quarantined.itertuples():
            print(f"quarantined: {row.slide_id}: {row.reason}")

    def _compared(self, provenance: dict) -> None:
        from pathfm.extractors import compared

        if told := compared(provenance):
            print(told)


@dataclass(frozen=True)
class Probe:
    """score a backbone on labelled tiles beside the floors: balanced accuracy with its interval, and a verdict"""

    model: str = field(metadata={"help": MODEL})
    dataset: str
    pool: str = setting("cls", "cls, mean (of the patch tokens) or both")
    split: str = setting("patient", "patient, tile or centre; only where the data set has no roles of its own")
    seed: int = setting(0, "of the split")
    protocol: str = setting("", "a head by eva's protocol too, as eva-2026 or eva-2024")
    mean: float = setting(-1.0, "of the input's normalisation; the backbone's own when below 0")
    std: float = setting(-1.0, "likewise")
    input_px: int = setting(0, "side of the input in pixels; the backbone's own when 0")

    def __call__(self) -> None:
        from pathlib import Path

        from pathfm import backbones, probe
        from pathfm.benchmarks import TileSet
        from pathfm.features import extract

        tiles = TileSet.from_folder(self.dataset)
        if "role" not in tiles.table:
            tiles = tiles.split(self.split, seed=self.seed)
        model, preprocess = backbones.load(self.model, **of_input(self))
        features = extract(model, tiles, preprocess, self.pool, Path(self.model).name)
        # A vector an image has no pools among which random weights could choose.
        floors = probe.floor_predictions(tiles, None if backbones.only_cls(model) else model, preprocess)
        answers = [probe.linear(features), probe.knn(features)]
        if self.protocol:
            answers.append(probe.eva(features, self.protocol, self.seed))
        table = probe.scores([*answers, *floors])
        shown = ["features", "probe", "balanced_accuracy", "low", "high", "n_tiles", "n_patients", "gain", "verdict"]
        print(table[shown].round(3).to_string(index=False))


@dataclass(frozen=True)
class EvaConfig:
    """write what `eva --config` needs to score an exported backbone on one of eva's tasks: tiles, masks or slides"""

    model: str
    task: str
    data: str
    out: str
    protocol: str = setting("", "of tiles: eva-2024, eva-2026 or eva-2026-10shot; today's for the task when empty")
    decoder: str = setting("image", "of masks: image (tokens and pixels) or tokens")

    def __call__(self) -> None:
        from pathlib import Path

        from pathfm import eva, eva_masks, eva_slides

        given, verb = (self.model, self.task, self.data, self.out), "predict_fit"
        if self.task in eva_masks.DATASETS:
            config, verb = eva_masks.configuration(*given, self.decoder), eva_masks.VERBS.get(self.decoder)
        elif self.task in eva_slides.DATASETS:
            config = eva_slides.backbone_configuration(*given)
        else:
            config = eva.backbone_configuration(*given, self.protocol)
        if self.protocol and self.task not in eva.DATASETS:
            raise InputError(f"{self.task} has one protocol in eva; leave '{self.protocol}' out")
        print(f"eva {verb} --config {eva.write(config, Path(self.out) / 'eva.yaml')}")


@dataclass(frozen=True)
class Tasks:
    """print the table of public tasks, or all that is known of one: files, splits, licence, overlaps, unknowns"""

    name: str = setting("", "such as bach; all of them when left out", positional=True)
    kind: str = setting("", "tiles, segmentation, slides or robustness; all when empty")

    def __call__(self) -> None:
        from pathfm import tasks

        print(tasks.about(self.name) if self.name else tasks.table(self.kind or None).to_string(index=False))
