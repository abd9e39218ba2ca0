"""What a run shows of itself: events, views, curves, progress in a terminal, a notebook and a log file."""

import contextlib
import io
import re
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from structured_tiles import StructuredTiles
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_dinov2 import tiny as tiny_dinov2
from test_pretrain import tiny
from test_runs import write_notebook

from pathfm import logbook, runs, storage, story, training
from pathfm.augment import MultiCrop
from pathfm.errors import InputError, Stopped
from pathfm.pretrain import pretrain
from pathfm.story import Progress, curves_figure, hidden, memory_gb, views_picture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny_dinov2()
    stream, watched = (StructuredTiles(config.tile_px, seed=seed) for seed in (0, 1))
    return pretrain(config, stream, watched, tmp_path_factory.mktemp("run"))


def events(folder) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder / "events"))
    read.Reload()
    return {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_shows_the_numbers_of_the_tables(run):
    seen = events(run.folder)
    for group, table in (("train", run.log[["step", "loss", "grad_norm", "ibot"]]), ("watch", run.watches)):
        for name in table.columns.drop("step"):
            want = table[["step", name]].dropna().to_numpy()
            assert np.allclose(seen[f"{group}/{name}"], want, rtol=1e-5), name
    assert len(seen["speed/tiles_per_s"]) == len(seen["speed/memory_gb"]) == 8
    assert (run.log["memory_gb"] > 0.05).all() and run.log["data_wait"].between(0, 1).all()


def test_a_resumed_run_voids_the_events_that_a_killed_one_wrote_after_its_checkpoint(tmp_path):
    config = tiny(watch_every=0)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, StructuredTiles(breaks_at=21), folder=tmp_path)  # at step 6, the checkpoint is of step 3
    run = pretrain(config, StructuredTiles(), folder=tmp_path)
    steps, values = zip(*events(tmp_path)["train/loss"], strict=True)
    assert steps == tuple(range(1, 9)) and np.allclose(values, run.log["loss"], rtol=1e-5)


class Calling(StructuredTiles):
    """Tiles that call `what` before they give the first tile of step 5."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def __getitem__(self, i):
        if i == 4 * 5:
            self.what()
        return super().__getitem__(i)


def interrupted():
    raise KeyboardInterrupt


ENDS = {
    "signal": (Stopped, "SIGTERM came", lambda: signal.raise_signal(signal.SIGTERM), {}, 6),
    "interrupt": (KeyboardInterrupt, None, interrupted, {}, 5),
    "no number": (InputError, "not both numbers", int, {"base_lr": 1e30, "warmup": 0.0}, None),
    "collapse": (InputError, "pretended", int, {"watch_every": 4, "on_collapse": "stop"}, 4),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_run_that_ends_early_has_drawn_its_curves_and_written_its_events(how, tmp_path, monkeypatch):
    kind, said, what, fields, steps = ENDS[how]
    answers = iter(("", "pretended collapse"))  # at step 0, and at step 4
    monkeypatch.setattr(training, "collapsed", lambda *_: next(answers))
    with pytest.raises(kind, match=said):
        pretrain(tiny(**{"watch_every": 0, **fields}), Calling(what), StructuredTiles(seed=1), tmp_path)
    logged = logbook.read(tmp_path / "log.csv")["step"].tolist()
    assert len(logged) == (steps or len(logged)) and 0 < len(logged) < 8
    assert [step for step, _ in events(tmp_path)["train/loss"]] == logged
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 400


def test_what_ended_a_run_is_told_and_not_that_its_curves_could_not_be_drawn(tmp_path, monkeypatch):
    def full(folder):
        raise InputError("no space left")

    monkeypatch.setattr(story, "curves_figure", full)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(watch_every=0), StructuredTiles(breaks_at=21), folder=tmp_path)
    with pytest.raises(InputError, match="no space left"):
        pretrain(tiny(watch_every=0), StructuredTiles(), folder=tmp_path)


@pytest.mark.parametrize("every", [0.0, 3600.0])
def test_a_checkpoint_writes_the_events_and_draws_the_curves_where_they_are_old(every, tmp_path, monkeypatch):
    """So a run that dies without a word shows them until there."""
    monkeypatch.setattr(story, "DRAW_EVERY_S", every)
    seen = []
    look = lambda: seen.append((events(tmp_path), (tmp_path / "curves.png").exists()))  # noqa: E731
    pretrain(tiny(watch_every=0), Calling(look), folder=tmp_path)
    written, drawn = seen[0]
    assert {1, 2, 3} <= {step for step, _ in written["train/loss"]} and drawn == (every == 0)


def test_the_picture_of_views_holds_what_the_student_got(run):
    config = tiny_dinov2()
    images = torch.stack([torch.as_tensor(StructuredTiles(48)[i].image) for i in range(3)])
    views = MultiCrop(config, 14)(images, torch.ones(3), torch.Generator().manual_seed(0))
    sheet = views_picture(views, tiles=2)
    side = 42 + story.GAP
    assert sheet.shape == (2 * side, 6 * side, 3) and sheet.dtype == np.uint8  # 2 global, 2 masked, 2 local views
    whole = ((views.global_[1, 1].permute(1, 2, 0).numpy() * 0.5 + 0.5) * 255).clip(0, 255)
    assert np.abs(sheet[side : side + 42, side : side + 42] - whole).max() <= 1
    local = ((views.local[1, 1].permute(1, 2, 0).numpy() * 0.5 + 0.5) * 255).clip(0, 255)
    assert np.abs(sheet[side : side + 28, 5 * side : 5 * side + 28] - local).max() <= 1
    with Image.open(run.folder / "views.png") as picture:
        assert picture.size == (6 * side, 4 * side)
    plain = views_picture(views._replace(masks=views.masks[..., :0]))
    assert plain.shape == (3 * side, 4 * side, 3)


def test_hidden_patches_are_grey_and_the_others_as_they_were():
    view, mask = np.random.default_rng(0).random((6, 6, 3)), np.zeros(9, bool)
    mask[[1, 8]] = True
    seen = hidden(view, mask)
    assert (seen[:2, 2:4] == 0.5).all() and (seen[4:, 4:] == 0.5).all()
    kept = np.ones((6, 6), bool)
    kept[:2, 2:4] = kept[4:, 4:] = False
    assert np.array_equal(seen[kept], view[kept])


def test_curves_are_drawn_under_the_notebooks_style_without_a_warning(run, style):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert curves_figure(run.folder).axes


def test_curves_have_a_panel_for_all_that_was_written_and_none_for_the_rest(run, tmp_path):
    place = plt.rcParams["axes.titlelocation"]  # another test may have set a style
    drawn = {ax.get_title(place): ax for ax in curves_figure(run.folder).axes if ax.lines}
    assert set(drawn) == {title for title, *_ in story.PANELS} - {"validation: kNN, centre"}
    x, y = drawn["loss, nats"].lines[0].get_data()
    assert list(x) == list(range(1, 9)) and np.allclose(y, run.log["loss"])
    assert [line.get_label() for line in drawn["validation: RankMe"].lines] == ["rankme", "rankme coarse"]
    assert (run.folder / "curves.png").stat().st_size > 10_000
    assert not curves_figure(tmp_path).axes


def test_memory_is_what_the_system_counts_at_most():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells a process's greatest memory in /proc")
    kilobytes = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    assert memory_gb(torch.device("cpu")) == pytest.approx(kilobytes * 1024 / 1e9, rel=0.05)


# Progress


def walk(monkeypatch, n: int = 5, every: float = 0.0, terminal: bool = False) -> str:
    """What stderr holds after `n` steps of a run that goes on at step 10."""
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(story, "LINE_EVERY_S", every)
    bar = Progress(range(10, 10 + n), "run, step 10 to 15")
    assert [step for step in bar if bar.tell(f"loss {step}") is None] == list(range(10, 10 + n))
    return out.getvalue()


def test_a_log_file_gets_whole_lines_at_first_last_and_now_and_then(monkeypatch):
    monkeypatch.delenv("PATHFM_PROGRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    lines = walk(monkeypatch).splitlines()
    assert [line.split(", ")[1:3] for line in lines] == [
        [f"step 10 to 15: step {step} of 15", f"loss {step - 1}"] for step in range(11, 16)
    ]
    assert all("\r" not in line and "\x1b" not in line for line in lines) and lines[-1].endswith("0:00:00 left")
    assert len(walk(monkeypatch, every=3600.0).splitlines()) == 2


def test_a_terminal_gets_a_bar_and_a_stored_notebook_nothing(monkeypatch):
    monkeypatch.delenv("PATHFM_PROGRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert "\r" in walk(monkeypatch, terminal=True)
    monkeypatch.setenv("PATHFM_PROGRESS", "0")
    assert walk(monkeypatch) == ""
    monkeypatch.delenv("PATHFM_PROGRESS")
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert walk(monkeypatch) == ""
    monkeypatch.setenv("PATHFM_PROGRESS", "1")  # a notebook that asks for one: a bar, and no lines beside it
    assert "step 11 of" not in walk(monkeypatch)


def test_a_notebooks_bar_stands_below_its_cell_and_leaves_it_when_it_ends(monkeypatch):
    shown = {}

    def display(data, raw, display_id):
        bar = shown.setdefault(len(shown), [data])
        return SimpleNamespace(update=lambda data, raw: bar.append(data))

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(storage, "_in_notebook", lambda: True)
    monkeypatch.setenv("PATHFM_PROGRESS", "1")
    assert walk(monkeypatch) == ""
    with contextlib.suppress(KeyboardInterrupt):
        for _ in storage.progress([1, 2], "outer"):
            for step in storage.progress([1, 2], "inner"):
                if step == 2:
                    raise KeyboardInterrupt
    assert len(shown) == 3
    for told, name in zip(shown.values(), ("run, step 10 to 15:   0%", "outer:   0%", "inner:   0%"), strict=True):
        assert told[0] == told[-1] == {} and any(data.get("text/plain", "").startswith(name) for data in told)
        assert all("\r" not in line and "\x1b" not in line for data in told for line in data.values())


def test_a_notebook_that_was_run_with_bars_stores_what_one_without_does(tmp_path):
    """So what is saved in JupyterLab, by `make lab`, still is what nbval compares."""
    code = "from pathfm.storage import progress\nfor i in progress(range(3)): pass\ni"
    book = write_notebook(tmp_path / "bar.ipynb", code)
    done = runs.execute(book, tmp_path / "done.ipynb", env={"PATHFM_PROGRESS": "1"})
    outputs = nbformat.read(done, as_version=4).cells[-1].outputs
    assert [one.data for one in outputs if one.get("data")] == [{"text/plain": "2"}]
    assert len(outputs) == 2 and not any(one.output_type == "stream" for one in outputs)
