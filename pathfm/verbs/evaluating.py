"""Verbs for rows of tables: the score of any backbone, and the leaderboard."""

from __future__ import annotations

from dataclasses import dataclass

from pathfm.errors import InputError
from pathfm.verbs.setting import setting


@dataclass(frozen=True)
class Evaluate:
    """give any backbone its row: a public task, a folder a class or a CSV; floors beside it; --record keeps the row"""

    backbone: str
    data: str
    task: str = setting("folder", "one of `pathfm tasks`, as it unpacks in data; folder is any set of labelled tiles")
    protocol: str = setting(
        "",
        "linear (when empty), kNN, logistic (UNI's), SimpleShot, eva-2024 or eva-2026; masks and slides know eva-2026 "
        "alone, PathoROB's sets have their own",
    )
    split: str = setting("clean", "clean, or official: many official ones stop and report on the same images")
    pool: str = setting("cls", "cls, mean (of the patch tokens) or both")
    patient: str = setting("", "column of a manifest.csv that plays the patient, such as block")
    decoder: str = setting("image", "of masks: image (tokens and pixels) or tokens")
    head: str = setting("abmil", "of slides: abmil, transmil, mean or max")
    slides: str = setting("", "folder of the slides, where data is a CSV of their labels")
    images: str = setting("", "folder of PathoROB's images, where data has its metadata")
    name: str = setting("", "of the backbone on the leaderboard; its own when empty")
    pretrained_on: str = setting("not stated", "such as TCGA or TCGA+GTEx: who has seen which patients")
    mean: float = setting(-1.0, "of the input's normalisation; the backbone's own when below 0")
    std: float = setting(-1.0, "likewise")
    input_px: int = setting(0, "side of the input in pixels; the backbone's own when 0")
    allow_partial: bool = setting(False, "score a partial download, and call it partial")
    record: bool = setting(False, "write the row to results/probes.csv, for `pathfm leaderboard`")

    def __call__(self) -> None:
        from pathfm import evaluation, leaderboard

        own = {"pool": self.pool, "pretrained_on": self.pretrained_on, "name": self.name, "input_px": self.input_px}
        own |= {key: None if value < 0 else value for key, value in (("mean", self.mean), ("std", self.std))}
        if self.images:
            row = evaluation.robustness(self.backbone, self.task, self.data, self.images, **own)
            print(f"{row['model']}: robustness index {row['score']:.3f} on {row['task']} ({row['note']})")
        else:
            row, table = self._scored(own)
            print(table.dropna(axis=1, how="all").round(3).to_string(index=False))
        if self.record:
            print(leaderboard.record([row]))

    def _scored(self, own: dict):
        from dataclasses import replace

        from pathfm import evaluation, segment, tasks

        kind, how = tasks.about(self.task).kind, {"allow_partial": self.allow_partial}
        if kind == "tiles":
            how |= {"patient": self.patient} if self.patient else {}
            tiles = evaluation.labelled(self.data, self.task, self.split, **how)
            return evaluation.evaluate(self.backbone, tiles, protocol=self.protocol or "linear", **own)
        if self.protocol not in ("", evaluation.EVA):
            raise InputError(f"{self.task} is scored by {evaluation.EVA} and not by '{self.protocol}'")
        how |= {"slides": self.slides} if self.slides else {}
        data = tasks.read(self.task, self.data, "official", **how)
        if kind == "slides":
            return evaluation.slide_labels(self.backbone, data, self.task, self.head, **own)
        own.pop("pool")
        protocol = replace(segment.EVA.get(self.task, segment.SegmentationProtocol()), decoder=self.decoder)
        return evaluation.masks(self.backbone, data, self.task, protocol, **own)


@dataclass(frozen=True)
class Leaderboard:
    """print recorded scores beside published ones, a table a protocol; with --out also as CSV, LaTeX and figures"""

    protocol: str = setting("", "such as eva-2026 or linear; every one, each in its own table, when empty")
    out: str = setting("", "folder for rows.csv and <protocol>.csv, .tex, .svg, .png; nothing is written when empty")

    def __call__(self) -> None:
        from pathfm import figures, leaderboard

        for name, scored in leaderboard.rows(self.protocol or None).groupby("protocol", sort=False):
            board = leaderboard.wide(scored)
            print(f"protocol {name}\n{board.round(3).to_string(index=False, na_rep='-')}\n")
        if self.out:
            figures.use_style()
            for path in leaderboard.write(self.out, self.protocol or None):
                print(path)
