"""DINO against DINOv2: what its arms do is what they say, and a small run of them reads back."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from pathfm import answers, method_study, study
from pathfm.config import recipe
from pathfm.method_study import ARMS, START

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from pretraining import counted

EQUAL = "DINOv2, equal FLOPs"


def test_arms_see_as_many_tiles_or_do_as_many_products():
    tiles = {arm: steps * recipe(name).batch_size for arm, (name, steps) in ARMS.items()}
    assert tiles["DINO"] == tiles["DINOv2"] > tiles[EQUAL]
    done = {arm: steps * counted(recipe(name))["operations"] for arm, (name, steps) in ARMS.items()}
    assert done[EQUAL] == pytest.approx(done["DINO"], rel=0.005) and done["DINOv2"] > 1.05 * done["DINO"]


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
        config = study.config(name, "watch_every=0", steps=steps, seed=seed, model="vit_small_patch16_224")
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
    table = pd.concat([rows for rows, _ in points], ignore_index=True)
    fig = method_study.figure(table, found)
    titles = [ax.get_title() or ax.get_title("left") for ax in fig.axes[1:]]
    assert titles == ["centre\nidentity", "slide\ndependence", "robustness\nindex"]
