"""Verbs for rows of tables: the score of any backbone, and the leaderboard."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from pathfm.errors import InputError
from pathfm.verbs.setting import numbers, of_input, setting


@dataclass(frozen=True)
class Evaluate:
    """give any backbone its row: a public task, a folder a class or a CSV; floors beside it; --record keeps the row"""

    backbone: str
    data: str
    task: str = setting("folder", "one of `pathfm tasks`, as it unpacks in data; folder is any set of labelled tiles")
    protocol: str = setting(
        "",
        "linear (when empty), kNN, 'kNN (centred)', eva-2024 or eva-2026; UNI's: logistic, SimpleShot, few-shot-N (N "
        "images a class, a power of two), retrieval-K (1, 3 or 5); masks and slides know eva-2026 alone, PathoROB's "
        "sets have their own",
    )
    split: str = setting(
        "clean",
        "clean, or official: many official ones stop and report on the same images. Slides know one split, and folders "
        "have their own roles: the row's note says which",
    )
    pool: str = setting("cls", "cls, mean (of the patch tokens) or both")
    patient: str = setting("", "column of a manifest.csv that plays the patient, such as block")
    decoder: str = setting("image", "of masks: image (tokens and pixels; eva's) or tokens")
    head: str = setting("abmil", "of slides: abmil (eva's), transmil, mean or max")
    folds: int = setting(0, "of slides without roles: so many by site, each tests once, one row of all; 5 for tp53")
    slides: str = setting("", "folder of the slides, where data is a CSV of their labels")
    images: str = setting("", "folder of PathoROB's images (Parquet shards, or pictures), where data has its metadata")
    embeddings: str = setting("", "of PathoROB in place of images: <centre>.npz of features that are made already")
    layers: int = setting(1, "the last so many blocks side by side; of tiles and slides")
    learning_rates: str = setting("", "of eva's heads on tiles, such as 1e-4,3e-4,1e-3: the best on validate is taken")
    precision: str = setting("float32", "float32, bfloat16, or auto: bfloat16 where a sample shows no harm")
    workers: int = setting(0, "of slides: processes, each with slides of its own; this one alone when 0")
    scheduler: str = setting("", "of slides: address of a Dask scheduler whose workers index and embed them")
    device: str = setting("", "such as cuda; the CPU when empty")
    name: str = setting("", "of the backbone on the leaderboard; its own when empty")
    pretrained_on: str = setting("not stated", "such as TCGA or TCGA+GTEx: who has seen which patients")
    mean: float = setting(-1.0, "of the input's normalisation; the backbone's own when below 0")
    std: float = setting(-1.0, "likewise")
    input_px: int = setting(0, "side of the input in pixels; the backbone's own when 0")
    allow_partial: bool = setting(False, "score a partial download, and call it partial")
    record: bool = setting(False, "write the row to results/probes.csv, for `pathfm leaderboard`")

    def __call__(self) -> None:
        from pathfm import leaderboard, tasks

        kind = tasks.about(self.task).kind
        self._refuse(kind)
        scored = {"tiles": self._tiles, "segmentation": self._masks, "slides": self._slides}
        row, table = scored.get(kind, self._robustness)()
        print(table.dropna(axis=1, how="all").round(3).to_string(index=False))
        print(f"{row['model']} on {row['task']}, {row['part']}: {row['metric']} {row['score']:.3f} ({row['note']})")
        if self.record:
            print(leaderboard.record([row]))

    def _refuse(self, kind: str) -> None:
        """Raises InputError for an option that this kind of task would not heed."""
        if kind != "slides" and (self.workers or self.scheduler):
            raise InputError(f"workers and scheduler are of slides; {self.task} is embedded in this process")
        if kind != "slides" and self.folds:
            raise InputError(f"folds are of slides; {self.task} has none")
        if kind != "robustness" and (self.images or self.embeddings):
            raise InputError(f"images and embeddings are of PathoROB's sets; {self.task} has its images in data")
        if kind != "tiles" and self.learning_rates:
            raise InputError(f"learning_rates are of eva's heads on tiles; {self.task} is of {kind}")

    def _own(self) -> dict[str, typing.Any]:
        """Of the backbone, whatever it is scored on."""
        return of_input(self) | {"pretrained_on": self.pretrained_on, "name": self.name, "device": self.device or None}

    def _features(self) -> dict[str, typing.Any]:
        return {name: getattr(self, name) for name in ("pool", "layers", "precision")}

    def _only(self, protocol: str) -> None:
        if self.protocol not in ("", protocol):
            raise InputError(f"{self.task} is scored by {protocol} and not by '{self.protocol}'")

    def _robustness(self) -> tuple:
        from pathfm import evaluation

        self._only(evaluation.ROBUSTNESS)
        where = {"images": self.images, "embeddings": self.embeddings, "allow_partial": self.allow_partial}
        return evaluation.robustness(self.backbone, self.task, self.data, **where, **self._own(), **self._features())

    def _tiles(self) -> tuple:
        from pathfm import evaluation

        protocol, how = self.protocol or "linear", {"patient": self.patient} if self.patient else {}
        how |= {"protocol": protocol, "allow_partial": self.allow_partial}
        tiles = evaluation.labelled(self.data, self.task, self.split, **how)
        told = {"protocol": protocol, "learning_rates": numbers("learning_rates", self.learning_rates)}
        return evaluation.evaluate(self.backbone, tiles, self.task, **told, **self._own(), **self._features())

    def _masks(self) -> tuple:
        from dataclasses import replace

        from pathfm import evaluation, segment

        if (self.layers, self.precision) != (1, "float32"):
            raise InputError(f"{self.task} is scored on the last block in float32; leave layers and precision out")
        protocol = replace(segment.EVA.get(self.task, segment.SegmentationProtocol()), decoder=self.decoder)
        return evaluation.masks(self.backbone, self._read(), self.task, protocol, **self._own())

    def _slides(self) -> tuple:
        from pathfm import evaluation

        data = self._read({"slides": self.slides} if self.slides else {})
        where = {"workers": self.workers, "scheduler": self.scheduler or None}
        how = {"folds": self.folds, **self._own(), **self._features(), **where}
        return evaluation.slide_labels(self.backbone, data, self.task, self.head, **how)

    def _read(self, how: dict[str, typing.Any] | None = None) -> typing.Any:
        """Masks or slides, which are scored by eva's protocol alone."""
        from pathfm import evaluation, tasks

        self._only(evaluation.EVA)
        return tasks.read(self.task, self.data, self.split, allow_partial=self.allow_partial, **(how or {}))


@dataclass(frozen=True)
class Leaderboard:
    """print recorded scores beside published ones, a table a protocol; with --out also as CSV, LaTeX and figures"""

    protocol: str = setting("", "such as eva-2026 or linear; every one, each in its own table, when empty")
    out: str = setting(
        "", "folder for rows.csv and <protocol>.csv, .tex, .svg, .png, of mean ranks too; none when empty"
    )

    def __call__(self) -> None:
        from pathfm import board, figures, leaderboard

        for name, scored in leaderboard.rows(self.protocol or None).groupby("protocol", sort=False):
            print(f"protocol {name}\n{board.wide(scored).round(3).to_string(index=False, na_rep='-')}\n")
            mine = board.ours(scored)
            if len(mine):
                print(f"recorded here, with intervals\n{mine.round(3).to_string(index=False, na_rep='-')}\n")
            for caveat in board.caveats(scored):
                print(f"{caveat}\n")
        if self.out:
            figures.use_style()
            for path in board.write(self.out, self.protocol or None):
                print(path)
