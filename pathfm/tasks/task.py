"""What is known of one public task: a row of the table, with its sources and what is unknown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("tiles", "segmentation", "slides", "robustness")
SPLITS = ("official", "clean")
ROLE = {"train": "probe-train", "val": "validate", "test": "test"}  # of an official split
SOURCES_OF_TISSUE = ("TCGA", "GTEx", "CAMELYON")  # what foundation models are pretrained on


@dataclass(frozen=True, repr=False)
class Task:
    """One public task.

    classes   in the official order; (): whatever the labels say. Of a segmentation the first is the background
    mpp       microns per pixel; None: unknown or varying, and `unknown` says why
    tile_px   width, height of an image; None: varies
    counts    (split, class) -> how many the whole data set has; None for split or class is the sum over it. What
              is not in it is not known, and not checked
    files     where the files lie below the folder, as they unpack
    splits    the official split, in words, and what eva does with it
    same_split  the official protocol stops and reports on one split: its score is selected on what it reports
    clean     what split="clean" does where that is not the official split; else ""
    left_out  official splits that the official protocol does not use
    overlap   TCGA, GTEx and CAMELYON -> "yes", "no" or "unknown": whether patients or slides are in it
    unknown   fact -> why it is not known or doubtful
    sources   where each fact was read
    reader    the module of this package that reads it
    """

    name: str
    title: str
    kind: str
    reader: str
    classes: tuple[str, ...] = ()
    mpp: float | None = None
    tile_px: tuple[int, int] | None = None
    counts: Mapping[tuple[str | None, str | None], int] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    splits: str = ""
    same_split: bool = False
    clean: str = ""
    left_out: tuple[str, ...] = ()
    licence: str = ""
    url: str = ""
    citation: str = ""
    overlap: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def count(self, split: str | None, label: str | None = None) -> int | None:
        """Images or slides of a split, a class or both; None where that is not known."""
        known = self.counts.get((split, label))
        if known is not None or label is not None:
            return known
        if split is None:
            splits = [n for (_, one), n in self.counts.items() if one is None]
            if splits:
                return sum(splits)
        each = [self.counts.get((split, name)) for name in self.classes]
        if each and None not in each:
            return sum(each)
        named = {one for one, _ in self.counts if one} if split is None else ()
        parts = [self.count(one) for one in named]
        return sum(parts) if parts and None not in parts else None

    def row(self) -> dict:
        """The task as a row of the table; unknown facts are "?"."""
        shown = {
            "task": self.name,
            "kind": self.kind,
            "classes": len(self.classes) or "?",
            "mpp": "?" if self.mpp is None else f"{self.mpp:g}",
            "px": self.size,
        }
        shown |= {split: _number(self.count(split), self.has(split)) for split in ROLE}
        shown["all"] = _number(self.count(None), True)
        shown["stops on report"] = "yes" if self.same_split else "no"
        shown["clean split"] = "yes" if self.clean else "-"
        shown |= {source: self.overlap.get(source, "unknown") for source in SOURCES_OF_TISSUE}
        return shown | {"licence": self.licence or "?", "from": self.url or "-"}

    @property
    def size(self) -> str:
        """Width x height of an image in pixels, "varies", or "slide"."""
        if self.kind == "slides":
            return "slide"
        return "varies" if self.tile_px is None else "x".join(map(str, self.tile_px))

    def has(self, split: str) -> bool:
        """Whether the official data name such a split, or nothing is known of its splits."""
        named = {one for one, _ in self.counts if one is not None}
        return split in named or not named

    def __repr__(self) -> str:
        lines = [f"{self.name}: {self.title} ({self.kind})", ""]
        lines.append(f"classes       {', '.join(self.classes) or 'as the labels say'}")
        scale = "unknown" if self.mpp is None else f"{self.mpp:g} um/px"
        lines.append(f"scale         {scale}; pixels: {self.size}")
        lines += _counts(self)
        facts = {
            "splits": self.splits,
            "clean split": self.clean,
            "licence": self.licence or "unknown",
            "from": self.url,
        }
        facts["overlap"] = ", ".join(f"{s} {self.overlap.get(s, 'unknown')}" for s in SOURCES_OF_TISSUE)
        facts["cite"] = self.citation
        lines += [f"{name:<13} {text}" for name, text in facts.items() if text]
        lines += ["files"] + [f"    {line}" for line in self.files] if self.files else []
        lines += ["unknown"] + [f"    {fact}: {why}" for fact, why in self.unknown.items()] if self.unknown else []
        lines += ["sources"] + [f"    {source}" for source in self.sources] if self.sources else []
        return "\n".join(lines)


def _number(n: int | None, there: bool) -> str:
    return "-" if not there else "?" if n is None else f"{n:,}"


def _counts(task: Task) -> list[str]:
    """Lines with the counts of each split, and of its classes where they are known; that none is, where none is."""
    if not task.counts and task.url:
        return ["counts        none is published, as far as could be found: a part is not told from the whole"]
    lines, named = [], {split for split, _ in task.counts}
    for split in (*ROLE, None):
        each = {name: task.counts.get((split, name)) for name in task.classes}
        total = task.count(split)
        if split not in named or total is None and split is None:
            continue
        known = ", ".join(f"{name} {'?' if n is None else f'{n:,}'}" for name, n in each.items())
        known = f" ({known})" if any(n is not None for n in each.values()) else ""
        lines.append(f"{split or 'all':<13} {'?' if total is None else f'{total:,}'}{known}")
    return lines
