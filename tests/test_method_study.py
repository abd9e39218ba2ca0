"""DINO against DINOv2: what its arms do is what they say, and a small run of them reads back."""

import builtins
import contextlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pathfm import InputError, answers, magnification, method_study, runs, scores, study, transfer, unsupervised
from pathfm.config import recipe
from pathfm.features import extract
from pathfm.method_study import ARMS, LONGEST, START, TEXTURE
from pathfm.probe import linear
from pathfm.scores import Prediction

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from pretraining import counted

EQUAL = "DINOv2, equal FLOPs"


def test_arms_see_as_many_tiles_or_do_as_many_products():
    tiles = {arm: steps * recipe(name).batch_size for arm, (name, steps) in ARMS.items()}
    assert tiles["DINO"] == tiles["DINOv2"] > tiles[EQUAL]
    done = {arm: steps * counted(recipe(name))["operations"] for arm, (name, steps) in ARMS.items()}
    assert done[EQUAL] == pytest.approx(done["DINO"], rel=0.005) and done["DINOv2"] > 1.05 * done["DINO"]
    assert {steps for arm, (_, steps) in LONGEST.items() if EQUAL not in arm} == {recipe("demo").steps}
    for arm, (name, steps) in LONGEST.items():
        short = ARMS[arm.removesuffix(", longest")]
        assert name == short[0] and steps == 2 * short[1]


def test_the_recipes_differ_in_the_method_alone():
    one, other = (vars(recipe(name)) for name in ("demo", "dinov2-demo"))
    differ = {name for name in one if name in other and one[name] != other[name]}
    assert differ <= {"method", "model", "norm_last_layer"}, differ


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """Two arms of a few steps on the embedded cohort, at two scales."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("methods")
    small = {"DINO": ("smoke", 2), "DINOv2": ("dinov2-smoke", 2)}

    def trained(arm, seed):
        name, steps = small[arm]
        config = study.config(name, "watch_every=1", steps=steps, seed=seed, model="vit_small_patch16_224")
        if arm == "DINOv2":
            config = config.replace(tile_px=80, global_px=64, local_px=32)
        return study.pretrained(study.cohort(), config, folder=str(folder / f"{arm}-{seed}"))

    for name, value in {"COHORT": "", "ARMS": small, "MPPS": (0.5, 1.0), "trained": trained}.items():
        patch.setattr(method_study, name, value)
    yield [method_study.point(arm, 0) for arm in small]
    patch.undo()


def test_a_point_tells_start_and_end_at_every_mpp(points):
    table = pd.concat([rows for rows, _ in points], ignore_index=True)
    assert table.groupby(["arm", "when", "mpp"]).size().eq(1).all() and len(table) == 2 * 2 * 2
    assert table["new_centres"].between(0, 1).all() and (table["effective_mpp"] > table["mpp"]).all()
    assert table["tiles_seen"].eq(2 * 16).all() and table["slide_dependence"].between(-1, 1).all()


def test_answers_of_two_arms_share_their_start_and_give_paired_contrasts(points, monkeypatch):
    wide = method_study.together([said for _, said in points])
    assert sum(name.startswith(START) for name in wide) == 2 and wide["file"].is_unique
    said = answers.read(wide.astype(str))
    monkeypatch.setattr(method_study, "ARMS", {"DINO": (), "DINOv2": ()})
    monkeypatch.setattr(method_study, "MPPS", (0.5, 1.0))
    monkeypatch.setattr(method_study, "COHORT", "embedded")
    found = method_study.contrasts(said)
    assert found["contrast"].tolist() == 2 * ["DINO minus start", "DINOv2 minus start", "DINOv2 minus DINO"]
    at = found[found["mpp"] == 0.5].set_index("contrast")["value"]
    assert at["DINOv2 minus DINO"] == pytest.approx(at["DINOv2 minus start"] - at["DINO minus start"])
    assert found["verdict"].eq("not informative").all()  # four patients
    monkeypatch.setattr(method_study, "MPPS", (0.35, 0.5, 1.0))  # one of them not recorded yet
    assert method_study.contrasts(said).equals(found)
    table = pd.concat([rows for rows, _ in points], ignore_index=True)
    fig = method_study.figure(table, found)
    titles = [ax.get_title() or ax.get_title("left") for ax in fig.axes[1:]]
    assert titles == ["centre\nidentity", "slide\ndependence", "robustness\nindex"]


def test_the_floor_is_colour_and_texture_on_the_same_tiles(points):
    slides = study.cohort("")
    sets = magnification.recut(study.tiles(slides), slides, (0.5, 1.0))
    wide = method_study.texture()
    assert wide["file"].tolist() == points[0][1]["file"].tolist()
    said = answers.read(wide.astype(str))
    for mpp, tiles in sets.items():
        own = linear(extract("colour+lbp", tiles)).balanced_accuracy
        assert said[f"{TEXTURE} at {mpp:g}"][0].balanced_accuracy == pytest.approx(own)


def test_looks_of_the_arms_are_points_of_their_runs(points):
    found = method_study.looks([("DINO", 0), ("DINOv2", 0)])
    assert list(found.columns) == unsupervised.POINT and set(found["run"]) == {"DINO-0", "DINOv2-0"}
    assert found.groupby("run")["random"].sum().eq(1).all() and set(found["method"]) == {"dino", "dinov2"}


def test_the_curve_is_over_the_better_floor_of_each_scale(points, monkeypatch):
    monkeypatch.setattr(method_study, "COHORT", "embedded")
    said = answers.read(method_study.together([*(wide for _, wide in points), method_study.texture()]).astype(str))
    table = pd.concat([rows for rows, _ in points], ignore_index=True)
    curve = method_study.curve(said, table)
    assert curve.groupby("tile_mpp")["features"].apply(list).tolist() == 2 * [["DINO", "DINOv2", START, TEXTURE]]
    new = study.on_centres(said, name="embedded")
    for mpp, rows in curve.groupby("tile_mpp"):
        rows = rows.set_index("features")
        better = rows.loc[[START, TEXTURE], "balanced_accuracy"].idxmax()
        gain = scores.paired(new[f"DINO at {mpp:g}"], new[f"{better} at {mpp:g}"])
        assert rows.loc["DINO", ["gain", "gain_low", "gain_high"]].tolist() == pytest.approx(list(gain[:3]))
        assert rows.loc["DINO", "verdict"] == gain.verdict and np.isnan(rows.loc[START, "gain"])
        assert rows.loc["DINO", "effective_mpp"] > mpp and np.isnan(rows.loc[TEXTURE, "effective_mpp"])
    fig = method_study.curve_figure(curve)
    assert fig.axes[0].get_xticklabels()[0].get_text() == f"0.5\n({curve['effective_mpp'].min():g})"
    assert len(fig.legends[0].get_texts()) == 4


def test_arms_are_added_to_what_is_recorded(points, monkeypatch, tmp_path):
    """The rows, answers and looks of other arms stay, byte for byte; those of the same arm and seed are replaced."""
    monkeypatch.setattr(runs, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(method_study, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(method_study, "ProcessPoolExecutor", lambda *_: contextlib.nullcontext(builtins))
    of_arm = dict(zip(("DINO", "DINOv2"), points, strict=True))
    monkeypatch.setattr(method_study, "point", lambda arm, seed: of_arm[arm])
    first = method_study.record([0], arms=["DINO"])
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(before) == {"methods.csv", "methods_arms.csv", "methods_watches.csv"}
    both = method_study.record([0], arms=["DINOv2"])
    assert both["arm"].unique().tolist() == ["DINO", "DINOv2"] and len(both) == 2 * len(first)
    for name in ("methods.csv", "methods_watches.csv"):
        assert (tmp_path / name).read_text().startswith(before[name])
    said = answers.read(pd.read_csv(tmp_path / "methods_arms.csv", dtype=str))
    assert {"DINO at 0.5", "DINOv2 at 0.5", "start at 0.5", f"{TEXTURE} at 1"} <= set(said)
    changed = points[0][1].assign(**{name: "none" for name in points[0][1] if "|" in name})
    of_arm["DINO"] = (points[0][0].assign(loss_last=7.0), changed)
    again = method_study.record([0], arms=["DINO"])
    assert len(again) == len(both) and again[again["loss_last"] == 7]["arm"].eq("DINO").sum() == len(first)
    now = answers.read(pd.read_csv(tmp_path / "methods_arms.csv", dtype=str))
    assert now["DINO at 0.5"][0].table["predicted"].eq("none").all()
    for name in ("start at 0.5", "DINOv2 at 0.5", f"{TEXTURE} at 1"):  # as they were recorded
        assert now[name][0].table["predicted"].equals(said[name][0].table["predicted"])
    with pytest.raises(InputError, match="'DINOv3'; there are: DINO; DINOv2; DINOv2, equal FLOPs; DINO, longest; "):
        method_study.record([0], arms=["DINOv3"])
    other = pd.read_csv(tmp_path / "methods_arms.csv", dtype=str).iloc[::-1]
    other.to_csv(tmp_path / "methods_arms.csv", index=False)
    with pytest.raises(InputError, match=r"methods_arms\.csv is of other tiles than these"):
        method_study.record([0], arms=["DINO"])


def test_answers_on_real_tiles_stand_side_by_side_by_arm(points, tmp_path, monkeypatch):
    """The start of one seed is the same network for both methods, and told once."""
    rng, folder = np.random.default_rng(0), tmp_path / "real"
    folder.mkdir()
    rows = [(f"{i}.png", ("dark", "pale")[i % 2], f"p{i // 2}") for i in range(24)]
    for file, label, _ in rows:
        pixels = np.clip(rng.normal({"dark": 90, "pale": 160}[label], 20, (64, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / file)
    pd.DataFrame(rows, columns=["file", "label", "patient_id"]).to_csv(folder / "manifest.csv", index=False)
    monkeypatch.setattr(method_study, "results_dir", lambda: tmp_path)
    path = method_study.record_real(folder, [0], ["DINO"])
    assert path == tmp_path / "methods_real.csv"
    first = pd.read_csv(path, dtype=str)
    method_study.record_real(folder, [0], ["DINOv2"])  # beside what is there
    pd.testing.assert_frame_equal(pd.read_csv(path, dtype=str)[list(first)], first)
    method_study.record_real(folder, [0], ["DINO"])  # in place of its forerunner
    said = answers.read(pd.read_csv(path, dtype=str))
    assert set(said) == {"DINO", "DINOv2", "random weights", "colour", "colour + LBP"}
    assert all(len(several) == 1 for several in said.values())
    table = transfer.table(said, "DINOv2").set_index("tested on")
    assert table.loc["all tiles", "teacher"] == said["DINOv2"][0].balanced_accuracy and table["tiles"].tolist() == [24]
    with pytest.raises(InputError, match="no arm is called 'DINOv3'"):
        method_study.record_real(folder, [0], ["DINOv3"])
    with pytest.raises(InputError, match="nowhere"):
        method_study.record_real(tmp_path / "nowhere", [0], ["DINO"])


def test_longest_runs_have_the_colour_of_their_method(monkeypatch):
    monkeypatch.setattr(method_study, "ARMS", ARMS)
    found = method_study.colours([*ARMS, *LONGEST])
    assert found["DINO, longest"] == found["DINO"] != found["DINOv2"] == found["DINOv2, longest"] != found[EQUAL]
    assert found[f"{EQUAL}, longest"] == found[EQUAL]
    assert "mfc" in method_study.marks("DINO", found) and "mfc" not in method_study.marks("DINO, longest", found)
    assert "mfc" not in method_study.marks("DINO", ARMS) and method_study.marks(START, found)["ls"] == "--"


def made(arms=("DINO", "DINOv2"), seeds=3) -> pd.DataFrame:
    """A row a point with numbers drawn anew for each."""
    points = itertools.product(arms, range(seeds), (START, "end"), (0.5, 1.0))
    table = pd.DataFrame(points, columns=["arm", "seed", "when", "mpp"])
    drawn = np.random.default_rng(0).random((len(table), len(method_study.KNOWN)))
    return table.join(pd.DataFrame(drawn, columns=list(method_study.KNOWN)))


def test_start_and_end_stand_beside_each_other_at_every_mpp():
    table = made()
    known = method_study.known(table)
    assert list(known.columns) == list(itertools.product(method_study.KNOWN, (START, "end")))
    assert list(known.index) == [("DINO", 0.5), ("DINO", 1.0), ("DINOv2", 0.5), ("DINOv2", 1.0)]
    rows = table.query("arm == 'DINOv2' and mpp == 1 and when == 'end'")
    assert known.loc[("DINOv2", 1.0), ("centre_identity", "end")] == pytest.approx(rows["centre_identity"].mean())


def test_the_longest_runs_are_told_apart():
    table = made(arms=("DINO", "DINO, longest"))
    short, longest = method_study.split(table)
    assert set(short["arm"]) == {"DINO"} and set(longest["arm"]) == {"DINO, longest"}
    assert all(part.empty for part in method_study.split(pd.DataFrame()))


def test_class_and_centre_rise_together_where_both_do():
    table = made(seeds=4)
    found = method_study.rises(table)
    for (arm, mpp), row in found.iterrows():
        one = table[(table["arm"] == arm) & (table["mpp"] == mpp)]
        first, last = (one[one["when"] == when].set_index("seed") for when in (START, "end"))
        up = {name: last[name] > first[name] for name in ("new_centres", "centre_identity")}
        assert row["new_centres"] == up["new_centres"].sum() and row["centre_identity"] == up["centre_identity"].sum()
        assert row["both"] == (up["new_centres"] & up["centre_identity"]).sum() and row["runs"] == 4
    assert 0 < found["both"].sum() < found["new_centres"].sum()


def test_the_share_of_the_way_is_asked_on_the_arms_tiles(monkeypatch):
    """Of eight tiles the start knows two, the arm five and the oracle all: half of the way."""
    monkeypatch.setattr(method_study, "ARMS", {"DINO": ()})
    monkeypatch.setattr(method_study, "COHORT", "embedded")
    table = pd.DataFrame({"file": [f"{i}.png" for i in range(8)], "truth": ["a", "b"] * 4, "centre": "centre-3"})
    table["patient_id"] = [f"p{i // 4}" for i in range(8)]

    def answered(name, right):
        said = [t if i < right else "none" for i, t in enumerate(table["truth"])]
        return Prediction(name, "linear", table.assign(predicted=said))

    said = {"start at 0.5": [answered("start at 0.5", 2)], "DINO at 0.5": [answered("DINO at 0.5", 5)]}
    rest = table.assign(file="other-" + table["file"], predicted="none")
    oracle = answered("oracle", 8)
    wider = replace(oracle, table=pd.concat([rest, oracle.table.iloc[::-1]]))
    found = method_study.shares(said, wider).loc["DINO"]
    assert found["value"] == pytest.approx(0.5) and found["n_tiles"] == 8 and found["oracle"] == 1
    with pytest.raises(InputError, match=r"oracle was not asked of 8 tiles such as 0\.png"):
        method_study.shares(said, replace(oracle, table=rest))
