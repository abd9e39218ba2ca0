"""The same sites at every scale: centres stay, labels stay, what a slide cannot serve is left out everywhere."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm

from pathfm import InputError, TileSet, magnification, probe
from pathfm.export import Preprocess
from pathfm.features import extract
from pathfm.slide import Slide
from pathfm.synthetic import labelled_tiles


@pytest.fixture(scope="module")
def tiles(cohort, tmp_path_factory):
    """64 px tiles at 1 mpp of two classes, with roles by slide: four slides of 0.5 and 0.25 mpp."""
    made = TileSet.from_folder(
        labelled_tiles(cohort, tmp_path_factory.mktemp("tiles"), tile_px=64, mpp=1.0, per_class=8)
    )
    common = made.table.groupby("label")["slide_id"].nunique().sort_values().index[-2:]
    made = made.subset(made.table["label"].isin(common).to_numpy())
    roles = dict(zip(sorted(made.table["slide_id"].unique()), ("probe-train", "validate", "test", "test"), strict=True))
    return replace(made, table=made.table.assign(role=made.table["slide_id"].map(roles)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))


def test_the_same_centres_at_every_scale(tiles, cohort):
    sets = magnification.recut(tiles, cohort, (0.5, 1.0, 2.0))
    ids = [made.table["file"].tolist() for made in sets.values()]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) + len(sets[0.5].quarantined) == len(tiles)
    for mpp, made in sets.items():
        table = made.table
        side_um = table["width_px"] * mpp
        centre = (table[["x", "y"]].to_numpy() * table[["slide_mpp"]].to_numpy()) + side_um.to_numpy()[:, None] / 2
        own = tiles.table.set_index("file").loc[table["file"]]
        theirs = own[["x", "y"]].to_numpy() * own[["slide_mpp"]].to_numpy() + 32
        assert np.abs(centre - theirs).max() <= 0.5 * table["slide_mpp"].max()
        assert (table["mpp"] == mpp).all() and table["label"].tolist() == own["label"].tolist()
    assert sets[1.0].table["digest"].is_unique and set(sets[1.0].table["digest"]).isdisjoint(sets[2.0].table["digest"])


def test_pixels_are_those_of_the_slide_through_one_filter(tiles, cohort):
    made = magnification.recut(tiles, cohort, (0.5, 1.0))[0.5]
    batches = [image for batch in made.images(7) for image in batch]
    assert len(batches) == len(made)
    for row in (0, len(made) - 1):
        one = made.table.iloc[row]
        with Slide.open(one["path"]) as slide:
            own = slide.read(one["x"], one["y"], 64, 0.5, resample="always")
        assert np.array_equal(made.image(row), own) and np.array_equal(batches[row], own)


def test_the_middle_of_a_coarse_tile_is_the_fine_one(tiles, cohort):
    sets = magnification.recut(tiles, cohort, (0.5, 1.0))
    coarse, fine = sets[1.0].image(0)[16:48, 16:48].astype(float), sets[0.5].image(0).astype(float)
    shrunk = fine.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - coarse).mean() < 6
    assert np.abs(shrunk - coarse[::-1]).mean() > 6


def test_what_a_slide_cannot_serve_is_left_out_at_every_scale(tiles, cohort):
    sets = magnification.recut(tiles, cohort, (0.25, 1.0))
    fine = set(
        cohort.table.loc[cohort.table["slide_id"].isin(tiles.table.query("slide_mpp < 0.3")["slide_id"]), "slide_id"]
    )
    for made in sets.values():
        assert set(made.table["slide_id"]) == fine
        assert len(made) + len(made.quarantined) == len(tiles)
    assert "its slide does not serve 0.25 mpp" in set(sets[1.0].quarantined["reason"])
    wide = magnification.recut(tiles, cohort, (1.0, 3.0))[1.0]
    assert set(wide.quarantined["reason"]) == {"its square at 3 mpp leaves the slide"}
    with pytest.raises(InputError, match=r"no site of class \w+ serves 1 to 30 mpp \(its square at 30 mpp leaves"):
        magnification.recut(tiles, cohort, (1.0, 30.0))


def test_the_curve_is_a_probe_a_scale(tiles, cohort):
    sets = magnification.recut(tiles, cohort, (0.5, 1.0))
    table = magnification.curve("colour", sets, name="colour mean and spread")
    assert table["tile_mpp"].tolist() == table["trained_at"].tolist() == [0.5, 1.0]
    for mpp, score in zip(table["tile_mpp"], table["balanced_accuracy"], strict=True):
        assert score == probe.linear(extract("colour", sets[mpp])).balanced_accuracy


def test_a_probe_of_one_scale_is_tested_at_the_others(tiles, cohort):
    sets = magnification.recut(tiles, cohort, (0.5, 1.0))
    anew = magnification.curve("colour", sets)
    table = magnification.curve("colour", sets, trained_at=1.0)
    assert table["trained_at"].tolist() == [1.0, 1.0]
    assert table["balanced_accuracy"][1] == anew["balanced_accuracy"][1]
    at = {mpp: extract("colour", made) for mpp, made in sets.items()}
    train, test = ((sets[1.0].table["role"] == role).to_numpy() for role in ("probe-train", "test"))
    mixed = replace(at[0.5], x=np.where(test[:, None], at[0.5].x, at[1.0].x))
    assert np.array_equal(mixed.x[train], at[1.0].x[train])
    assert table["balanced_accuracy"][0] == probe.linear(mixed).balanced_accuracy
    with pytest.raises(InputError, match="no tiles of 2 mpp to train on; there are 0.5, 1"):
        magnification.curve("colour", sets, trained_at=2.0)


@pytest.mark.parametrize("trained_at", [None, 1.0])
def test_the_gain_is_over_the_better_floor_of_each_scale(tiles, cohort, trained_at):
    sets = magnification.recut(tiles, cohort, (0.5, 1.0))
    how = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    twin = timm.create_model("vit_tiny_patch16_224", **how)
    floors = {"random weights": twin, "texture": "lbp"}
    table = magnification.curve(
        "colour", sets, preprocess=Preprocess(32), trained_at=trained_at, name="mine", floors=floors
    )
    assert table["features"].tolist() == 2 * ["mine", *floors] and table["tile_mpp"].tolist() == 3 * [0.5] + 3 * [1.0]
    assert table["floor"].tolist() == 2 * [False, True, True]
    alone = magnification.curve("colour", sets, trained_at=trained_at, name="mine")
    score = table[~table["floor"]]["balanced_accuracy"].tolist()
    assert score == alone["balanced_accuracy"].tolist() and alone["gain"].isna().all()
    for _, rows in table.groupby("tile_mpp"):
        best = rows.loc[rows["floor"], "balanced_accuracy"].max()
        mine = rows[~rows["floor"]].iloc[0]
        assert mine["gain"] == pytest.approx(mine["balanced_accuracy"] - best)
        assert mine["gain_low"] <= mine["gain"] <= mine["gain_high"] and mine["verdict"] == "not informative"
    at = table[(table["tile_mpp"] == 1.0) & (table["features"] == "random weights")].iloc[0]
    fitted = probe.linear(probe.pooled(twin, sets[1.0], Preprocess(32)))
    assert at["balanced_accuracy"] == pytest.approx(fitted.balanced_accuracy)


def test_the_panel_states_the_effective_mpp(style):
    told = {"balanced_accuracy": [0.5, 0.6], "low": [0.4, 0.5], "high": [0.6, 0.7], "tile_mpp": [0.5, 1.0]}
    table = pd.concat(
        [
            pd.DataFrame(told | {"features": "pretrained", "mpp": [1.0, 2.0], "trained_at": 0.5}),
            pd.DataFrame(told | {"features": "colour histogram", "mpp": [None, None], "trained_at": [0.5, 1.0]}),
        ]
    )
    ax = magnification.panel(plt.figure().subplots(), table, chance=0.125)
    lines = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    assert lines["pretrained"] == lines["colour histogram"] == [0.5, 1]
    assert [line.get_linestyle() for line in ax.lines[:2]] == ["--", "-"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.5\n(1)", "1\n(2)"]


def test_tiles_without_a_place_are_refused(tiles, cohort):
    for column, message in (("x", "has no column x"), ("slide_mpp", "has no column slide_mpp")):
        with pytest.raises(InputError, match=message):
            magnification.recut(replace(tiles, table=tiles.table.drop(columns=column)), cohort)
    with pytest.raises(InputError, match="not square"):
        magnification.recut(replace(tiles, table=tiles.table.assign(height_px=32)), cohort)
    with pytest.raises(InputError, match="slide other of .* is not in the cohort"):
        magnification.recut(replace(tiles, table=tiles.table.assign(slide_id="other")), cohort)
