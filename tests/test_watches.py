"""What the watches see of validation tiles: closed forms, two magnifications, centres; collapse and learning."""

import math
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from structured_tiles import LabelledTiles, StructuredTiles
from test_dinov2 import tiny as tiny_dinov2
from test_pretrain import tiny

from pathfm.dino import Dino
from pathfm.errors import InputError
from pathfm.metrics import centre_identity, robustness_index
from pathfm.pretrain import Run, pretrain
from pathfm.story import curves_figure
from pathfm.watches import Watch, collapsed, spread


def test_spread_of_features_in_closed_form():
    assert spread(np.eye(5)) == pytest.approx(1)  # at right angles
    assert spread(np.ones((7, 3)) * np.arange(1, 8)[:, None]) == pytest.approx(0, abs=1e-12)  # lengths do not count
    assert spread(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(2)
    x = np.random.default_rng(0).normal(size=(20, 6))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(20) for j in range(20) if i != j]
    assert spread(x) == pytest.approx(1 - np.mean(pairs))


def test_a_stream_is_watched_at_its_finest_and_coarsest_magnification():
    class Four(StructuredTiles):
        """Tiles of four mpp, in turn, each a little beside what was asked for."""

        weights = dict.fromkeys((0.25, 0.5, 1.0, 2.0), 0.25)

        def name(self, i):
            return super().__getitem__(i)._replace(mpp=(0.2525, 0.5, 1.0, 1.99)[i % 4])

        __getitem__ = name

    watch = Watch.of(Four(), 5)
    assert (watch.mpp, watch.coarse.mpp, watch.coarse.coarse) == (0.25, 2.0, None)
    for part, first in ((watch, 0), (watch.coarse, 3)):
        want = [torch.from_numpy(Four()[i].image) for i in range(first, 20, 4)]
        assert torch.equal(part.images, torch.stack(want))
    few = Watch.of(Four(length=6), 5)
    assert (len(few.images), len(few.coarse.images)) == (2, 1)


def test_a_stream_of_one_or_of_any_magnification_is_watched_as_a_whole():
    class Any(StructuredTiles):
        def __getitem__(self, i):
            return super().__getitem__(i)._replace(mpp=self.mpp(i))

    for mpp, said in ((lambda i: 0.5, 0.5), (lambda i: 0.25 + 0.01 * i, math.nan)):
        stream = Any()
        stream.mpp = mpp
        watch = Watch.of(stream, 12)
        assert len(watch.images) == 12 and watch.coarse is None and watch.mpp == pytest.approx(said, nan_ok=True)


def test_too_few_tiles_are_said_in_the_log_in_the_record_and_beside_the_curves(tmp_path, capsys, monkeypatch):
    """Of a stream that ends before there are as many as asked for; fewer than ten a feature, of which there are 32."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    run = pretrain(tiny(watch_tiles=330), StructuredTiles(), StructuredTiles(length=300, seed=1), tmp_path / "few")
    fine, coarse = run.params["watched"]
    assert fine["mpp"] == 1 and fine["tiles"] + coarse["tiles"] == 300 and coarse["features"] == 32
    assert f"the cohort has {fine['tiles']} validation tiles at 1 um/px, not watch_tiles=330; " in fine["few"]
    assert f"{fine['tiles']} watched tiles at 1 um/px are fewer than 10 for each of 32 features" in fine["few"]
    said = capsys.readouterr().err.splitlines()
    assert {f"pathfm: {fine['few']}", f"pathfm: {coarse['few']}"} <= set(said)
    assert run.watches["n"].tolist() == [fine["tiles"]] * 3
    noted = [text.get_text() for ax in curves_figure(run.folder).axes for text in ax.texts]
    assert noted == [f"N = {fine['tiles']}, less than 10 D"] * 2
    enough = pretrain(tiny(watch_tiles=320), StructuredTiles(), StructuredTiles(seed=1), tmp_path / "enough")
    assert [(row["tiles"], row["few"]) for row in enough.params["watched"]] == [(320, "")] * 2
    assert not any(ax.texts for ax in curves_figure(enough.folder).axes)


def test_labelled_tiles_are_watched_at_both_magnifications_of_validate_only(tmp_path):
    tiles = LabelledTiles(tmp_path)
    table = tiles.table
    watch = Watch.of(tiles, 100)
    for part, mpp in ((watch, 1.0), (watch.coarse, 2.0)):
        rows = table[(table["role"] == "validate") & (table["mpp"] == mpp)]
        assert part.mpp == mpp and part.labels.tolist() == rows["label"].tolist() and len(rows) > 3
        assert len(part.centres) == len(part.images) + len(part.bank)
    tiles.table = table.drop(columns=["mpp", "centre"])
    whole = Watch.of(tiles, 100)
    assert (
        whole.coarse is None
        and whole.centres is None
        and len(whole.images) == len(watch.images) + len(watch.coarse.images)
    )


def test_centres_are_named_among_all_tiles_watched_as_the_metrics_say(tmp_path):
    config, tiles = tiny(), LabelledTiles(tmp_path)
    tiles.table = tiles.table.assign(mpp=1.0)
    torch.manual_seed(0)
    model, watch = Dino(config), Watch.of(tiles, 100)
    seen = watch.look(model, config)
    with torch.inference_mode():
        x = np.concatenate([watch._features(images, model, config) for images in (watch.images, watch.bank)])
    rows = pd.concat([tiles.table.query("role == 'validate'"), tiles.table.query("role == 'probe-train'")])
    want = centre_identity(x, rows["centre"], rows["patient_id"])
    assert (seen["centre_identity"], seen["centre_chance"]) == (want.value, 0.5)
    index = robustness_index(x, rows["label"], rows["centre"], rows["patient_id"], k=(10,))
    assert seen["robustness_index"] == pytest.approx(index["robustness_index"].iloc[0], nan_ok=True)
    assert 0 <= seen["robustness_index"] <= 1
    assert seen["prototype_entropy"] >= seen["teacher_entropy"] - 1e-6  # entropy is concave


# Collapse: a few dozen steps on stripes, without centring, without sharpening, and as they should be

QUICK = {
    "steps": 60, "batch_size": 16, "base_lr": 0.016, "momentum": 0.95, "drop_path": 0.0, "watch_every": 20,
    "watch_tiles": 60, "global_scale": (0.5, 1.0), "local_scale": (0.2, 0.5), "jitter": 0.0,
}  # fmt: skip
DINO = {**QUICK, "head_norm": False, "koleo": 0.1}
DINOV2 = {**QUICK, "layer_scale": 1.0, "layer_decay": 1.0, "patch_embed_lr": 1.0}
NO_CENTRE = {"centre_momentum": 1.0, "koleo": 0.0}
NOT_SHARP = {"teacher_temperature": 1.0, "teacher_temperature_start": 1.0, "koleo": 0.0}


def trained(config, folder) -> Run:
    return pretrain(config, StructuredTiles(config.tile_px), StructuredTiles(config.tile_px, seed=1), folder)


@pytest.mark.parametrize("make, fields", [(tiny, DINO), (tiny_dinov2, DINOV2)])
def test_runs_that_learn_are_left_in_peace(make, fields, tmp_path):
    config = make(**fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        looks = trained(config, tmp_path).watches
    assert [collapsed(looks.iloc[0], looks.iloc[i], config) for i in range(4)] == [""] * 4
    assert looks["spread"].iloc[-1] > looks["spread"].iloc[0]


@pytest.mark.parametrize(
    "make, fields, what, remedy",
    [
        (tiny, {**DINO, **NO_CENTRE}, "every tile the same answer", "centre_momentum=0.9"),
        (tiny, {**DINO, **NOT_SHARP}, "no opinion", "teacher_temperature=0.04"),
        (tiny, {**DINO, "koleo": 0.0}, "no opinion", "koleo=0.1"),  # published DINO, so small a batch
        (tiny_dinov2, {**DINOV2, **NO_CENTRE, "centring": "centre"}, "every tile the same answer", "centre_momentum"),
        (tiny_dinov2, {**DINOV2, **NOT_SHARP}, "no opinion", "teacher_temperature=0.04"),
    ],
)
def test_collapse_on_purpose_is_seen_named_and_answered(make, fields, what, remedy, tmp_path):
    config = make(**fields)
    with pytest.warns(UserWarning, match=r"step \d+: the teacher is collapsing"):
        looks = trained(config, tmp_path).watches
    assert collapsed(looks.iloc[0], looks.iloc[0], config) == ""
    said = collapsed(looks.iloc[0], looks.iloc[-1], config)
    assert what in said and remedy in said and "at step 0" in said
    assert looks["rankme"].iloc[-1] < 2 < looks["rankme"].iloc[0]


def test_features_that_are_alike_are_named_whatever_the_answers_say():
    config = tiny(**DINO)
    first = {"spread": 0.5, "teacher_entropy": 1.0, "prototype_entropy": 2.0}
    assert collapsed(first, {**first, "spread": 0.06}, config) == ""
    assert "of all tiles are alike" in collapsed(first, {**first, "spread": 0.04}, config)


def test_a_run_asked_to_stop_at_collapse_stops_and_keeps_its_checkpoint(tmp_path):
    config = tiny(**{**DINO, **NO_CENTRE, "on_collapse": "stop", "checkpoint_every": 10})
    with pytest.raises(InputError, match=r"step \d+: the teacher is collapsing: .*on_collapse='warn' would go on"):
        trained(config, tmp_path)
    assert list(tmp_path.glob("checkpoint*.safetensors")) and not (tmp_path / "teacher").exists()
