"""What the viewer answers to its page, without a browser: squares, settings, a tile close up, and errors in a line."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest

from pathfm import Cohort, Slide, SlideIndex, TileStream, closeup, explore
from pathfm.augment import MultiCrop
from pathfm.explore import Explorer, Settings
from pathfm.viewer import SIDE_PX, Pyramid, Viewer


@pytest.fixture(scope="module")
def mixed(cohort, tmp_path_factory):
    """The index of the tiny cohort and of a file that is no slide."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "torn.svs").write_text("no slide")
    torn = pd.DataFrame({"slide_id": ["torn"], "path": [str(folder / "torn.svs")]})
    table = pd.concat([cohort.table[["slide_id", "path"]], torn], ignore_index=True)
    return SlideIndex.build(Cohort(table, "mixed"), folder / "index", workers=0)


@pytest.fixture
def viewer(mixed):
    """On a slide of 0.5 mpp, which serves three of the four magnifications."""
    coarse = mixed.usable.query("mpp > 0.4")["slide_id"].iloc[0]
    return Explorer(mixed, tile_px=128).viewer(slide_id=coarse, mpp=(0.5, 1.0), tiles=12)


def asked(viewer, monkeypatch, **content) -> list[tuple[dict, list]]:
    """What the viewer sends back for a message."""
    replies = []
    monkeypatch.setattr(viewer, "send", lambda content, buffers=None: replies.append((content, buffers)))
    viewer._asked(viewer, {"page": "p", **content}, [])
    return replies


def picture(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]


# ---------------------------------------------------------------- squares


def test_squares_put_together_are_the_slide_at_every_step(index):
    slide = index.slide(index.usable.query("mpp < 0.3")["slide_id"].iloc[0])
    pyramid = Pyramid(slide)
    for step in range(pyramid.steps + 1):
        width, height = (-(-side // 2**step) for side in (slide.width_px, slide.height_px))
        rows = [
            np.concatenate([pyramid.square(step, column, row) for column in range(-(-width // SIDE_PX))], axis=1)
            for row in range(-(-height // SIDE_PX))
        ]
        whole = slide.region(0, 0, width, height, slide.mpp * 2**step)
        assert np.abs(np.concatenate(rows).astype(int) - whole).max() <= 1  # where it is resampled, a rounding
    assert max(width, height) <= SIDE_PX  # the last step is one square


@pytest.mark.parametrize("which", [(-1, 0, 0), (9, 0, 0), (0, 99, 0), (0, 0, -1)])
def test_a_square_outside_the_slide_is_refused(index, which):
    with pytest.raises(ValueError, match="has no square"):
        Pyramid(index.slide(index.usable["slide_id"].iloc[0])).square(*which)


def test_a_batch_is_answered_square_by_square(viewer, monkeypatch):
    squares = [[4, 0, 0, 0], [5, 0, 1, 0], [6, 1, 0, 0]]
    replies = asked(viewer, monkeypatch, kind="squares", slide_id=viewer.slide_id, squares=squares)
    assert [(reply["page"], reply["number"]) for reply, _ in replies] == [("p", 4), ("p", 5), ("p", 6)]
    slide = viewer._explorer.index.slide(viewer.slide_id)
    for (_, buffers), (_, *which) in zip(replies, squares, strict=True):
        exact = Pyramid(slide).square(*which)
        sent = cv2.imdecode(np.frombuffer(buffers[0], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert sent.shape == exact.shape and np.abs(sent.astype(int) - exact).mean() < 4
    json.dumps([reply for reply, _ in replies])


def test_a_square_that_was_sent_is_not_read_again(viewer, monkeypatch):
    message = {"kind": "squares", "slide_id": viewer.slide_id, "squares": [[1, 0, 0, 0]]}
    first = asked(viewer, monkeypatch, **message)
    monkeypatch.setattr(Slide, "region", lambda *_: pytest.fail("read again"))
    assert asked(viewer, monkeypatch, **message) == first


def test_a_square_that_cannot_be_read_says_why_and_the_next_one_comes(viewer, monkeypatch):
    squares = [[1, 0, 99, 0], [2, 0, 0, 0]]
    bad, good = asked(viewer, monkeypatch, kind="squares", slide_id=viewer.slide_id, squares=squares)
    assert "has no square 99, 0" in bad[0]["error"] and bad[1] is None
    assert "error" not in good[0] and good[1]


# ---------------------------------------------------------------- settings


def test_what_is_drawn_are_the_tiles_of_the_stream(viewer, mixed):
    names = TileStream(mixed.subset([viewer.slide_id]), 128, (0.5, 1.0), 0.4, 0).names(range(12))
    mpp = mixed.slide(viewer.slide_id).mpp
    assert [row[:3] for row in viewer.scene["tiles"]] == names[["i", "x", "y"]].to_numpy().tolist()
    assert [row[3] for row in viewer.scene["tiles"]] == pytest.approx((128 * names["mpp"] / mpp).tolist())
    assert [viewer.mpps[row[4]] for row in viewer.scene["tiles"]] == pytest.approx(names["mpp"].tolist())
    json.dumps(viewer.scene)


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 5), ("tiles", 30), ("min_tissue", 0.9), ("weights", [0, 0, 1, 0])]
)
def test_each_setting_changes_what_is_drawn(viewer, name, value):
    before = viewer.scene["tiles"]
    setattr(viewer, name, value)
    assert viewer.scene["tiles"] != before
    truth = viewer._explorer.look(viewer.settings)
    assert viewer.scene["tiles"] and [row[1] for row in viewer.scene["tiles"]] == truth.names["x"].tolist()
    assert viewer.message == ""


def test_weights_are_shares_of_the_mixture(viewer):
    viewer.weights, viewer.tiles = [0, 3, 1, 0], 200
    at = [viewer.mpps[row[4]] for row in viewer.scene["tiles"]]
    assert 120 < at.count(0.5) < 180 and at.count(0.5) + at.count(1.0) == 200


def test_the_veils_are_clear_where_the_masks_are_true(viewer):
    for kind, mask in (("tissue", viewer.look.mask), ("centres", viewer.look.centres)):
        veil = cv2.imdecode(np.frombuffer(viewer.veils[kind], np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(veil[..., 3] == 0, mask)
        assert set(np.unique(veil[..., 3])) <= {0, 255}


def test_names_are_offered_as_they_are_typed(viewer, monkeypatch):
    [(reply, _)] = asked(viewer, monkeypatch, kind="names", text="TINY-00")
    assert [name for name, _ in reply["names"]] == [f"tiny-00{k}" for k in range(4)]
    [(reply, _)] = asked(viewer, monkeypatch, kind="names", text="o")
    assert ["torn", "quarantined"] in reply["names"]


def test_steps_go_round_the_usable_slides(viewer, monkeypatch, mixed):
    known = list(mixed.usable["slide_id"])
    seen = []
    for _ in known:
        asked(viewer, monkeypatch, kind="step", by=1)
        seen.append(viewer.slide_id)
    assert sorted(seen) == known and viewer.message == ""
    viewer.slide_id = "torn"
    asked(viewer, monkeypatch, kind="step", by=-1)
    assert viewer.slide_id == known[0] and viewer.message == ""


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"slide_id": "tiny-0002"}, "no slide 'tiny-0002' in the index. Did you mean 'tiny-002'?"),
        ({"slide_id": "torn"}, "slide 'torn' is quarantined: torn.svs is no slide format"),
        ({"slide_id": ""}, "no slide is chosen; type a name, such as tiny-000"),
        ({"weights": [0, 0, 0, 0]}, "no magnification has a weight; raise one of the sliders"),
        ({"weights": [1, 0, 0, 0]}, "This slide was scanned at 0.5 µm/px and serves no finer scale."),
        ({"weights": [1, 1]}, "give 4 weights"),
        ({"seed": -1}, "24 tiles of seed -1: give at least one"),
        ({"min_tissue": 1.5}, "No position has 150% foreground at 0.5 + 1 µm/px. Lower the threshold"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_a_line_and_the_viewer_goes_on(viewer, changes, line):
    viewer.tiles = 24
    good = {name: getattr(viewer, name) for name in changes}
    before = viewer.scene
    for name, value in changes.items():
        setattr(viewer, name, value)
    assert line in viewer.message and "\n" not in viewer.message and "Known:" not in viewer.message
    assert not viewer.scene.get("tiles") and viewer.chosen == -1
    for name, value in good.items():
        setattr(viewer, name, value)
    assert viewer.message == "" and viewer.scene == before


def test_whatever_else_goes_wrong_is_a_line_too(viewer, monkeypatch):
    def broken(*_, **__):
        raise OSError("disk on fire")

    monkeypatch.setattr(Explorer, "look", broken)
    viewer.seed += 1
    assert viewer.message == "OSError: disk on fire" and viewer.scene["tiles"] == []
    monkeypatch.undo()
    viewer.seed += 1
    assert viewer.message == "" and viewer.scene["tiles"]


def test_an_index_without_a_usable_slide_is_a_line(mixed):
    viewer = Viewer(Explorer(mixed.subset(["torn"])), Settings("torn"))
    assert viewer.message == "the index has no usable slide to explore; see index.slides for the reasons"
    assert viewer.scene == {} and viewer.look is None


def test_a_recipe_or_tile_that_is_not_there_is_a_line(viewer):
    viewer.chosen = 99
    assert viewer.message == "no tile 99; 12 are drawn" and viewer.detail == {}
    viewer.chosen = 2
    viewer.recipe = "smoky"
    assert viewer.message == "no recipe 'smoky'. Did you mean 'smoke'?"
    viewer.recipe = "smoke"
    assert viewer.message == "" and viewer.detail


# ---------------------------------------------------------------- close up


def test_the_tile_close_up_is_the_stream_s_own(viewer, mixed):
    viewer.chosen = 5
    tile = viewer.look.stream[5]
    own = next(one for one in viewer.detail["around"] if one["kind"] == "tile")
    assert np.array_equal(picture(own["png"]), tile.image)
    shown = viewer.detail["name"]
    assert (shown["slide_id"], shown["i"], shown["x"], shown["y"]) == (tile.slide_id, 5, tile.x, tile.y)
    again = eval(viewer.detail["call"], {"TileStream": TileStream, "index": mixed})
    assert np.array_equal(again.image, tile.image) and again[1:] == tile[1:]


def test_its_views_are_those_of_the_recipe_and_draw(viewer):
    import torch

    viewer.recipe, viewer.draw, viewer.chosen = "demo", 3, 1
    tile = viewer.tile()
    config = closeup.recipe("demo")
    generator = torch.Generator().manual_seed(3)
    truth = MultiCrop(config)(torch.from_numpy(tile.image)[None], torch.tensor([tile.mpp]), generator)
    assert [view["mpp"] for view in viewer.detail["views"]] == pytest.approx(truth.effective_mpp[:, 0].tolist())
    assert [view["px"] for view in viewer.detail["views"]] == [112, 112, 48, 48, 48, 48]
    first = viewer.detail["views"][0]["png"]
    viewer.draw = 4
    assert viewer.detail["views"][0]["png"] != first


def test_the_chosen_tile_stays_while_it_is_drawn_and_goes_with_it(viewer):
    viewer.chosen = 5
    detail = viewer.detail
    viewer.tiles = 40  # the first twelve stay
    assert viewer.chosen == 5 and viewer.detail == detail
    viewer.seed = 9
    assert viewer.chosen == -1 and viewer.detail == {}


# ---------------------------------------------------------------- in a notebook


def test_its_text_is_always_the_same_and_a_picture_stands_in(viewer):
    data, _ = viewer._repr_mimebundle_()
    assert data["text/plain"] == f"Viewer: {viewer.look}" and "0x" not in data["text/plain"]
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"]


def test_before_a_person_the_explorer_shows_the_viewer(mixed, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda what, **_: shown.append(what))
    monkeypatch.setenv(explore.LIVE[0], "a notebook")
    Explorer(mixed, tile_px=128).show(mpp=(1.0,), seed=3)
    assert isinstance(shown[0], Viewer)
    assert shown[0].settings == Settings(mixed.usable["slide_id"].iloc[0], {1.0: 1.0}, seed=3)


def test_a_magnification_that_was_not_offered_gets_a_slider(mixed):
    viewer = Explorer(mixed, tile_px=64).viewer(mpp={0.7: 2.0, 1.0: 1.0})
    assert viewer.mpps == [0.25, 0.5, 0.7, 1.0, 2.0] and viewer.weights == [0, 0, 2, 1, 0]
    assert viewer.settings.mpp == {0.7: 2.0, 1.0: 1.0}
