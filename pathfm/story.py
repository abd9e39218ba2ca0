"""What a run shows of itself while it goes on: TensorBoard events, samples of views, curves, a line of progress."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pathfm import logbook
from pathfm.augment import Views
from pathfm.storage import atomic, progress

SAMPLES = 6  # tiles whose views are kept as a picture,
GAP = 4  # pixels between them
LINE_EVERY_S = 60.0  # of a log file, between lines of progress
DRAW_EVERY_S = 60.0  # of a run, between drawings of its curves, which take half a second
# Panels of the curves: title, columns, whether the axis is logarithmic.
PANELS = (
    ("loss, nats", ("loss", "dino", "ibot"), False),
    ("teacher's entropy, nats", ("teacher_entropy", "prototype_entropy", "patch_entropy"), False),
    ("gradient norm", ("grad_norm",), True),
    ("learning rate", ("lr",), False),
    ("validation: kNN, centre", ("knn", "centre_identity", "robustness_index"), False),
    ("validation: RankMe", ("rankme", "rankme_coarse"), False),
    ("validation: spread, ODCorr", ("spread", "odcorr"), False),
    ("tiles a second", ("tiles_per_s",), False),
    ("share of time waiting for data", ("data_wait",), False),
)


class Story:
    """TensorBoard events in <folder>/events, a picture of the first views in views.png, curves in curves.png."""

    def __init__(self, folder: str | Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        # Events of a killed run after `step` are marked as void.
        self._writer = SummaryWriter(str(self.folder / "events"), purge_step=step + 1 if step else None)
        self._drawn = time.monotonic()

    def add(self, group: str, step: int, row: Mapping[str, float]) -> None:
        """The finite numbers of `row` as <group>/<name> at `step`."""
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def show(self, views: Views) -> None:
        """views.png: a row a tile, its views as the student gets them, masks in grey; once a run."""
        if not (self.folder / "views.png").exists():
            with atomic(self.folder / "views.png") as file:
                Image.fromarray(views_picture(views)).save(file, "PNG")

    def settle(self) -> None:
        """The events so far are written; the curves too, where the last drawing is old."""
        self._writer.flush()
        if time.monotonic() - self._drawn >= DRAW_EVERY_S:
            self._draw()

    def close(self) -> None:
        """The last events are written, and the curves are drawn."""
        self._writer.close()
        self._draw()

    def _draw(self) -> None:
        with atomic(self.folder / "curves.png") as file:
            curves_figure(self.folder).savefig(file, format="png", dpi=100, metadata={"Software": None})
        self._drawn = time.monotonic()


class Journal:
    """What is written of a run as it goes on: log.csv, speed.csv, watches.csv, and a Story of the same numbers.

    As a block it closes itself, however the run ends: by its last step, a signal, collapse or an error.
    """

    def __init__(self, folder: str | Path, step: int):
        names = {"train": "log", "speed": "speed", "watch": "watches"}
        self.books = {group: logbook.Logbook(Path(folder) / f"{name}.csv", step) for group, name in names.items()}
        self.story = Story(folder, step)

    def add(self, group: str, step: int, row: Mapping[str, float]) -> None:
        """A row of "train", "speed" or "watch"."""
        self.books[group].add({"step": step, **row})
        self.story.add(group, step, row)

    def settle(self) -> None:
        """The rows so far are on the disk: a checkpoint may count on them."""
        for book in self.books.values():
            book.settle()

    def close(self) -> None:
        for book in (*self.books.values(), self.story):
            book.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, wrong: type | None, *_) -> None:
        # What ended the run is told, not that its curves could not be drawn, such as on a full disk.
        with contextlib.suppress(Exception) if wrong else contextlib.nullcontext():
            self.close()


def memory_gb(device: torch.device) -> float:
    """The most memory that was taken so far, in GB: of the GPU by torch, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # bytes there, kB elsewhere


def pictures(group: Tensor) -> np.ndarray:
    """Views (..., 3, h, w) in [-1, 1] as pictures (..., h, w, 3) from 0 to 1."""
    return (group.float().cpu().movedim(-3, -1).numpy() * 0.5 + 0.5).clip(0, 1)


def hidden(view: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture (h, w, 3) with the patches hidden by `mask` (N,), row by row, in grey."""
    side = math.isqrt(len(mask))
    scale = -(-len(view) // side)
    large = np.kron(mask.reshape(side, side), np.ones((scale, scale), bool))[: len(view), : view.shape[1]]
    return np.where(large[..., None], 0.5, view)


def views_picture(views: Views, tiles: int = SAMPLES) -> np.ndarray:
    """(h, w, 3) uint8: a row for each of the first tiles, its global views, what is hidden of them, its local views."""
    masks = views.masks.cpu().numpy() if views.masks.any() else None
    rows = []
    for k in range(min(tiles, views.global_.shape[1])):
        whole, parts = pictures(views.global_[:, k]), pictures(views.local[:, k])
        covered = [] if masks is None else [hidden(view, mask) for view, mask in zip(whole, masks[:, k], strict=True)]
        rows.append([*whole, *covered, *parts])
    side = views.global_.shape[-1] + GAP
    sheet = np.ones((len(rows) * side, len(rows[0]) * side, 3))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet[i * side : i * side + len(picture), j * side : j * side + len(picture)] = picture
    return (sheet * 255).round().astype(np.uint8)


def curves_figure(folder: str | Path) -> Figure:
    """The curves of a run from its log.csv, speed.csv and watches.csv: the panels of which it has a column."""
    tables = [logbook.read(Path(folder) / f"{name}.csv").set_index("step") for name in ("log", "speed", "watches")]
    has = {name: table[name].dropna() for table in reversed(tables) for name in table}
    panels = [(title, [name for name in names if name in has], log) for title, names, log in PANELS]
    panels = [panel for panel in panels if panel[1]]
    fig = Figure(figsize=(9, 2.4 * max(1, -(-len(panels) // 3))), layout="none")  # whatever a style says
    if not panels:
        return fig
    axes = fig.subplots(-(-len(panels) // 3), 3, squeeze=False).ravel()
    for ax, (title, names, log) in zip(axes, panels, strict=False):
        for name in names:
            few = len(has[name]) < 50
            ax.plot(has[name], label=name.replace("_", " "), lw=1, marker="o" if few else None, ms=3)
        if {"rankme", "odcorr"} & set(names) and {"n", "d"} <= set(has) and has["n"].iloc[-1] < 10 * has["d"].iloc[-1]:
            ax.text(0.02, 0.02, f"N = {has['n'].iloc[-1]:.0f}, less than 10 D", transform=ax.transAxes, fontsize=7)
        ax.set(title=title, xlabel="step", yscale="log" if log else "linear")
        if len(names) > 1:
            ax.legend(fontsize=7)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    fig.subplots_adjust(0.08, 0.08, 0.98, 0.95, wspace=0.28, hspace=0.55)
    return fig


class Progress:
    """Steps of a run with a bar in a terminal or in a notebook that asks for one, and lines in a log file.

    In a terminal and in a notebook as `storage.progress`; elsewhere a line on stderr at the first step, every
    LINE_EVERY_S seconds and at the last one, without control characters. PATHFM_PROGRESS=0 is silent.
    """

    def __init__(self, steps: range, said: str):
        self.steps, self.said, self._told = steps, said, ""
        self._bar: Any = progress(steps, said, unit="step")
        self._lines = getattr(self._bar, "disable", False) and _is_log()
        self._last = self._began = time.monotonic()

    def __iter__(self) -> Iterator[int]:
        for done, step in enumerate(self._bar, 1):
            yield step
            if self._lines:
                self._line(done)

    def tell(self, told: str) -> None:
        """What stands beside the steps, such as the loss; heard after the step."""
        self._told = told
        if not self._lines:
            self._bar.set_postfix_str(told, refresh=False)

    def _line(self, done: int) -> None:
        now, of = time.monotonic(), len(self.steps)
        if done not in (1, of) and now - self._last < LINE_EVERY_S:
            return
        self._last, spent = now, now - self._began
        left = datetime.timedelta(seconds=round(spent / done * (of - done)))
        step = self.steps[done - 1] + 1
        print(
            f"{self.said}: step {step} of {self.steps[-1] + 1}, {self._told}, {left} left", file=sys.stderr, flush=True
        )


def say(told: str) -> None:
    """A line on stderr, but for a notebook, whose outputs are stored, and where PATHFM_PROGRESS=0 asks for silence."""
    if os.environ.get("PATHFM_PROGRESS") != "0" and "ipykernel" not in sys.modules:
        print(f"pathfm: {told}", file=sys.stderr, flush=True)


def _is_log() -> bool:
    """Whether stderr is a file or pipe that someone reads later, and no notebook's."""
    if os.environ.get("PATHFM_PROGRESS") == "0" or sys.stderr.isatty():
        return False
    return "ipykernel" not in sys.modules
