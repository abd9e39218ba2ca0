"""The viewer in JupyterLab, driven in headless Chromium: pan, zoom, sliders, a click on a tile, and bad input."""

import json
import os
import re
import shutil

import lab
import pandas as pd
import pytest

from pathfm import Cohort, SlideIndex, figures
from pathfm.explore import Explorer

SHOW = """
from pathfm import SlideIndex
from pathfm.explore import Explorer
index = SlideIndex.open({folder!r})
viewer = Explorer(index, tile_px=64).viewer(slide_id={slide!r}, mpp=(0.25, 0.5, 1.0))
viewer"""
STATE = """
import json
print("STATE" + json.dumps({name: getattr(viewer, name) for name in (
    "slide_id", "weights", "min_tissue", "tiles", "seed", "chosen", "recipe", "draw", "view", "message")}))"""
SLOW = """
import time
read = viewer._square
def slow(*which):
    time.sleep(0.2)
    return read(*which)
viewer._square = slow
print("STATE{}")"""


@pytest.fixture(scope="module")
def machine():
    """Skips where there is no Chromium; fails there under CI=true."""
    if lab.chromium() is None:
        reason = f"no Chromium: none of {', '.join(lab.BROWSERS)} is on the path; on Debian: apt install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def slides(cohort, tmp_path_factory):
    """The index of the tiny cohort, of a file that is no slide, and of one that goes missing once it is indexed."""
    folder = tmp_path_factory.mktemp("slides")
    (folder / "torn.svs").write_text("no slide")
    shutil.copy(cohort.table["path"].iloc[0], folder / "gone.svs")
    more = pd.DataFrame(
        {"slide_id": ["torn", "gone"], "path": [str(folder / f"{name}.svs") for name in ("torn", "gone")]}
    )
    table = pd.concat([cohort.table[["slide_id", "path"]], more], ignore_index=True)
    index = SlideIndex.build(Cohort(table, "lab"), folder / "index", workers=0)
    (folder / "gone.svs").unlink()
    return index


@pytest.fixture(scope="module")
def fine(slides):
    return slides.usable.query("mpp < 0.3")["slide_id"].iloc[0]


@pytest.fixture(scope="module")
def compiled(slides, fine):
    """What the kernel will do, done here before: what numba compiles is kept on the disk, and nobody waits for it."""
    viewer = Explorer(slides, tile_px=64).viewer(slide_id=fine, mpp=(0.25, 0.5, 1.0))
    viewer.chosen = 0
    assert viewer.detail["name"]


@pytest.fixture(scope="module")
def page(machine, slides, fine, compiled, tmp_path_factory):
    """JupyterLab with the viewer on a slide of 0.25 um/px, and the addresses that the page asked for."""
    cells = [SHOW.format(folder=str(slides.folder), slide=fine).strip(), STATE.strip(), SLOW.strip()]
    with lab.notebook(tmp_path_factory.mktemp("lab"), cells) as page:
        page.problems, page.addresses = [], []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.addresses.append(request.url))
        lab.run_cell(page, 0)
        yield page


@pytest.fixture(scope="module")
def viewer(page):
    viewer = lab.ViewerPage(page)
    viewer.root.wait_for()
    viewer.settled()
    return viewer


def state(page, cell: int = 1) -> dict:
    """The viewer's traits, as a cell that runs now finds them in the kernel."""
    output = page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-OutputArea-output pre")
    prompt = page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-InputPrompt")
    before = prompt.text_content()
    lab.run_cell(page, cell)
    page.wait_for_function(
        "([cell, before]) => { const text = document.querySelectorAll('.jp-Notebook .jp-Cell')[cell]"
        ".querySelector('.jp-InputPrompt').textContent; return text !== before && /\\d/.test(text); }",
        arg=[cell, before],
    )
    output.wait_for()
    return json.loads(output.text_content().strip().removeprefix("STATE"))


def state_with(page, name: str, value: float, tries: int = 20) -> dict:
    """`state` once a trait has that value: a cell may run before the page's message is heard."""
    for _ in range(tries):
        found = state(page)
        if found[name] == pytest.approx(value):
            return found
    raise AssertionError(f"{name} is {found[name]}, not {value}")


def test_the_whole_slide_is_shown_and_its_tiles_lie_inside(viewer, slides, fine):
    row = slides.usable.set_index("slide_id").loc[fine]
    view = viewer.view()
    assert (view["x"], view["y"]) == pytest.approx((row.width_px / 2, row.height_px / 2), abs=3 * view["mpp"] / row.mpp)
    box = viewer.slide.bounding_box()
    assert view["mpp"] == pytest.approx(row.height_px * row.mpp / box["height"], rel=0.05)
    tiles = viewer.tiles()
    assert len(tiles) == 24
    for tile in tiles:
        assert box["x"] <= tile["x"] and tile["x"] + tile["width"] <= box["x"] + box["width"]
        um = tile["width"] * view["mpp"]  # drawn to scale: 64 px at the mpp of its colour
        mpp = min(figures.MPP_COLOURS, key=lambda mpp: abs(64 * mpp - um))
        assert um == pytest.approx(64 * mpp, rel=0.02)
        assert tile["colour"] == figures.MPP_COLOURS[mpp]


def test_the_scale_bar_is_as_long_as_it_says(viewer):
    text = viewer.root.locator(".pathfm-scale").text_content()
    um = float(re.match(r"([\d.]+) µm", text)[1])
    width = viewer.root.locator(".pathfm-bar").bounding_box()["width"]
    assert width * viewer.view()["mpp"] == pytest.approx(um, rel=0.01)


def test_the_wheel_zooms_and_brings_finer_squares(viewer):
    before, asked = viewer.view(), viewer.counts()["asked"]
    after = viewer.moved(lambda: viewer.wheel(6))
    assert after["mpp"] < 0.75 * before["mpp"]
    counts = viewer.counts()
    assert counts["asked"] > asked and counts["answered"] == counts["asked"]


def test_a_drag_pans_by_as_much_as_the_mouse_moves(viewer, slides, fine):
    slide_mpp = slides.usable.set_index("slide_id").loc[fine, "mpp"]
    before = viewer.view()
    after = viewer.moved(lambda: viewer.drag(120, -60))
    assert after["mpp"] == pytest.approx(before["mpp"])
    pixel = before["mpp"] / slide_mpp
    moved = (before["x"] - after["x"]) / pixel, (before["y"] - after["y"]) / pixel
    assert moved[0] == pytest.approx(120, rel=0.25) and moved[1] == pytest.approx(-60, rel=0.25)


def test_outlines_stay_on_their_tissue_while_the_view_moves(viewer, page):
    """The kernel hears where the page looks, and the outlines lie where that says."""
    seen = state(page)["view"]
    assert seen == viewer.view()
    box, slide_mpp = viewer.slide.bounding_box(), 0.25
    for tile in viewer.tiles()[:5]:
        rect = viewer.root.locator(f".pathfm-overlay rect[data-i='{tile['i']}']")
        x, y = (float(rect.get_attribute(name)) for name in "xy")
        at = (x - seen["x"]) * slide_mpp / seen["mpp"], (y - seen["y"]) * slide_mpp / seen["mpp"]
        shown = tile["x"] - box["x"] - box["width"] / 2, tile["y"] - box["y"] - box["height"] / 2
        assert shown == pytest.approx(at, abs=3)


def test_the_whole_slide_comes_back(viewer, slides, fine):
    row = slides.usable.set_index("slide_id").loc[fine]
    after = viewer.moved(lambda: viewer.root.get_by_text("whole slide").click())
    assert (after["x"], after["y"]) == pytest.approx((row.width_px / 2, row.height_px / 2), abs=20)


@pytest.mark.parametrize(
    ("name", "key", "times", "value"),
    [("seed", "ArrowRight", 2, 2), ("tiles", "ArrowLeft", 4, 20), ("min_tissue", "ArrowRight", 4, 0.6)],
)
def test_a_slider_changes_the_tiles_drawn_and_the_kernel_s_setting(viewer, page, name, key, times, value):
    before = viewer.tiles()
    viewer.press(name, key, times)
    shown = {"min_tissue": "60 %"}.get(name, str(value))
    viewer.until(
        "(root, name, shown) => root.querySelector(`[data-name='${name}'] + output`).textContent === shown", name, shown
    )
    kernel = state_with(page, name, value)
    viewer.until(
        "(root, before) => JSON.stringify([...root.querySelectorAll('.pathfm-overlay rect[data-i]')]"
        ".map((rect) => +rect.dataset.i + rect.getBoundingClientRect().x)) !== before",
        json.dumps([tile["i"] + tile["x"] for tile in before]),
    )
    assert len(viewer.tiles()) == kernel["tiles"]


def test_a_weight_of_nothing_takes_its_colour_away(viewer, page):
    blue = figures.MPP_COLOURS[0.25]
    assert blue in {tile["colour"] for tile in viewer.tiles()}
    viewer.press("weight-0", "Home")
    viewer.until(f"(root) => !root.querySelector('.pathfm-overlay rect[stroke=\"{blue}\"]')")
    assert state(page)["weights"][:3] == [0, 1, 1]
    assert {tile["colour"] for tile in viewer.tiles()} == {figures.MPP_COLOURS[0.5], figures.MPP_COLOURS[1.0]}


def test_the_veil_can_be_turned_off_and_faded(viewer):
    cloth = viewer.root.locator(".pathfm-overlay image")
    assert cloth.evaluate("(image) => [image.style.display, +image.style.opacity]") == ["", 0.45]
    viewer.press("opacity", "ArrowRight")
    assert cloth.evaluate("(image) => +image.style.opacity") == 0.5
    tissue = cloth.get_attribute("href")
    viewer.control("veil-kind").select_option("centres")
    assert cloth.get_attribute("href") != tissue
    viewer.control("veil").uncheck()
    assert cloth.evaluate("(image) => image.style.display") == "none"
    viewer.control("veil").check()


def test_a_click_on_a_tile_shows_it_with_its_name_neighbours_and_views(viewer, page, slides, fine):
    from pathfm import TileStream

    viewer.click_tile(3)
    kernel = state(page)
    assert kernel["chosen"] == 3
    one = slides.subset([fine])
    name = TileStream(one, 64, {0.5: 1, 1.0: 1}, kernel["min_tissue"], kernel["seed"]).name(3)
    shown = dict(zip(*(viewer.closeup.locator(cell).all_text_contents() for cell in ("th", "td")), strict=True))
    assert (shown["slide_id"], shown["i"]) == (fine, "3")
    assert (int(shown["x"]), int(shown["y"]), float(shown["mpp"])) == (name.x, name.y, pytest.approx(name.mpp))
    captions = viewer.closeup.locator("figcaption").all_text_contents()
    around = ["0.25 µm/px · 16 µm", "0.5 µm/px · 32 µm", "1 µm/px · 64 µm", "2 µm/px · 128 µm"]
    assert captions[1:5] == around and captions[0] in around
    assert len(captions) == 5 + 2 + 8 and captions[5].startswith("global ")
    assert all(float(caption.split()[-2 if "µm" in caption else -1]) > 0 for caption in captions[5:])
    images = viewer.closeup.locator("img")
    viewer.until("(root) => [...root.querySelectorAll('.pathfm-closeup img')].every((one) => one.naturalWidth > 0)")
    assert images.evaluate_all("(all) => all.map((one) => one.naturalWidth)") == [64] * 5 + [224] * 2 + [96] * 8


def test_another_recipe_and_other_views_are_shown(viewer, page):
    viewer.control("recipe").select_option("smoke")
    viewer.until("(root) => root.querySelectorAll('.pathfm-closeup img').length === 5 + 4")
    before = viewer.closeup.locator("figcaption").all_text_contents()
    viewer.control("draw").click()
    viewer.until(
        "(root, before) => JSON.stringify([...root.querySelectorAll('figcaption')].map((one) => one.textContent))"
        " !== before",
        json.dumps(before, ensure_ascii=False, separators=(",", ":")),
    )
    kernel = state(page)
    assert (kernel["recipe"], kernel["draw"]) == ("smoke", 1)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tiny-0001", "no slide 'tiny-0001' in the index. Did you mean 'tiny-001'?"),
        ("torn", "slide 'torn' is quarantined: torn.svs is no slide format"),
        ("", "no slide is chosen"),
    ],
)
def test_a_slide_that_cannot_be_shown_is_a_line_and_the_next_one_is_shown(viewer, fine, name, line):
    viewer.choose_slide(name)
    viewer.until("(root, line) => root.querySelector('.pathfm-message').textContent.startsWith(line)", line)
    assert viewer.tiles() == []
    viewer.choose_slide(fine)
    viewer.until("(root) => root.querySelector('.pathfm-message').textContent === ''")
    viewer.until("(root) => root.querySelectorAll('.pathfm-overlay rect[data-i]').length > 0")


def test_buttons_step_to_the_next_slide_and_back(viewer, fine):
    for title, there in (("next slide", False), ("previous slide", True)):
        viewer.root.get_by_title(title).click()
        viewer.until(
            "(root, fine, there) => (JSON.parse(root.querySelector('.pathfm-slide').dataset.view).slide_id === fine)"
            " === there",
            fine,
            there,
        )


def test_settings_that_no_slide_serves_are_a_line(viewer):
    for k in (1, 2):
        viewer.press(f"weight-{k}", "Home")
    viewer.until(
        "(root) => root.querySelector('.pathfm-message').textContent.startsWith('no magnification has a weight')"
    )
    viewer.press("weight-1", "End")
    viewer.until("(root) => root.querySelector('.pathfm-message').textContent === ''")
    assert {tile["colour"] for tile in viewer.tiles()} == {figures.MPP_COLOURS[0.5]}


def test_a_slide_that_went_missing_is_a_line_and_the_next_one_is_shown(viewer, fine):
    viewer.choose_slide("gone")
    viewer.until("(root) => root.querySelector('.pathfm-failed').textContent.includes('gone.svs does not exist')")
    viewer.choose_slide(fine)
    viewer.until("(root, fine) => JSON.parse(root.querySelector('.pathfm-slide').dataset.view).slide_id === fine", fine)
    assert viewer.root.locator(".pathfm-failed").text_content() == ""
    viewer.settled()


def test_what_the_view_has_left_is_never_sent(viewer, page, slides, fine):
    """With a slow kernel and a hurried hand, squares are forgotten; those of the last view come all the same."""
    other = next(name for name in slides.usable.query("mpp < 0.3")["slide_id"] if name != fine)
    state(page, 2)
    viewer.choose_slide(other)
    viewer.until(
        "(root, name) => JSON.parse(root.querySelector('.pathfm-slide').dataset.view).slide_id === name", other
    )
    viewer.root.get_by_text("full resolution").click()
    viewer.until("(root) => JSON.parse(root.querySelector('.pathfm-slide').dataset.view).mpp < 0.3")
    for x, y in ((-300, -200), (300, 200), (300, 200)):
        viewer.drag(x, y)
    viewer.settled()
    counted = "JSON.parse(root.querySelector('.pathfm-slide').dataset.counts)"
    viewer.until(f"(root) => {counted}.answered === {counted}.asked")  # neighbours may still be on their way
    assert viewer.counts()["forgotten"] > 0


def test_the_page_had_no_error_and_asked_nobody_else(viewer, page):
    assert page.problems == []
    assert page.addresses and all(re.match(r"(http|ws)://127\.0\.0\.1:|blob:|data:", url) for url in page.addresses)
