"""Pages of a cohort hold every slide, what stands out first, and say what is wrong with the rest."""

import cv2
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection

from pathfm import Cohort, SlideIndex, montage, tissue
from pathfm.__main__ import main
from pathfm.errors import InputError
from pathfm.montage import Page
from pathfm.synthetic import tiny_cohort


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> SlideIndex:
    """Four clean slides, one with much blur, one that is no slide."""
    folder = tmp_path_factory.mktemp("mixed")
    clean = tiny_cohort(folder / "clean", 4, side_um=500, mpp=0.5, seed=1).table
    spoilt = tiny_cohort(folder / "spoilt", 1, side_um=700, mpp=0.5, seed=2, artefacts=("blur",)).table
    (folder / "broken.svs").write_bytes(b"no slide")
    broken = pd.DataFrame({"slide_id": ["broken"], "path": [str(folder / "broken.svs")]})
    table = pd.concat([clean, spoilt.assign(slide_id="spoilt"), broken], ignore_index=True)
    return SlideIndex.build(Cohort(table, "mixed"), folder / "index", workers=0)


def texts(fig) -> list[str]:
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def test_the_scan_keeps_a_picture_and_the_artefacts(mixed):
    mask, um_per_px = mixed.mask("spoilt")
    found = mixed.artefacts("spoilt")
    assert tuple(found) == tissue.KINDS
    assert not any((where & mask).any() for where in found.values())
    areas = mixed.slides.set_index("slide_id").loc["spoilt"]
    for kind, where in found.items():
        assert tissue.area_mm2(where, um_per_px) == pytest.approx(areas[f"{kind}_mm2"], abs=1e-4)
    thumbnail = mixed.slide("spoilt").thumbnail(um_per_px)
    assert mixed.picture("spoilt").shape == thumbnail.shape
    assert np.abs(mixed.picture("spoilt").astype(float) - thumbnail).mean() < 4


def test_pictures_of_large_slides_are_kept_small():
    from pathfm.scan import PICTURE_PX, picture

    pixels = cv2.imdecode(picture(np.full((900, 2000, 3), 200, np.uint8)), cv2.IMREAD_COLOR)
    assert pixels.shape == (round(900 * PICTURE_PX / 2000), PICTURE_PX, 3)


def test_what_stands_out_comes_first(mixed):
    table = montage.listing(mixed)
    assert list(table["slide_id"][:2]) == ["broken", "spoilt"]
    assert "no slide format" in table["why"][0] and table["why"][1] == "much rejected"
    assert (table["why"][2:] == "").all()
    assert table["rejected"][1] == pytest.approx(
        table["blur_mm2"][1] / (table["blur_mm2"][1] + table["tissue_mm2"][1]), rel=0.05
    )
    assert list(montage.listing(mixed, "slide_id")["slide_id"]) == sorted(mixed.slides["slide_id"])


def test_pages_hold_every_slide_once_where_the_list_says(mixed, tmp_path, monkeypatch):
    monkeypatch.setitem(montage.PAGES, "a4", Page(2, 2, 3.0))
    (tmp_path / "montage-007.png").write_bytes(b"of an earlier, longer run")
    drawn, figure = [], montage.figure
    monkeypatch.setattr(montage, "figure", lambda *args, **kw: drawn.append(args[1]) or figure(*args, **kw))
    table = pd.read_csv(montage.write(mixed, tmp_path, "slide_id"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.csv", "montage-001.png", "montage-002.png"]
    assert [len(page) for page in drawn] == [4, 2]
    for row in table.itertuples():
        assert drawn[row.page - 1][2 * (row.row - 1) + row.column - 1] == row.slide_id


def test_pages_need_no_slide_files(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(SlideIndex, "slide", lambda *_: pytest.fail("a slide was opened"))
    assert montage.write(mixed, tmp_path).is_file()


def test_a_slide_shows_its_name_area_outline_and_reason(mixed):
    fig = montage.figure(mixed, ["tiny-000", "spoilt", "broken"])
    said = texts(fig)
    area = mixed.slides.set_index("slide_id")["tissue_mm2"]["tiny-000"]
    assert {"tiny-000", f"{area:.3g} mm²", "broken", "quarantined"} <= set(said)
    assert any("% rejected" in text for text in said)
    lines = [len([one for one in ax.collections if isinstance(one, LineCollection)]) for ax in fig.axes]
    assert lines == [1, 1, 0]
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels == ["tissue", "taken for blur", "stands out, or cannot be read"]
    plain = montage.figure(mixed, ["tiny-000", "spoilt"], masks=False)
    assert not any(ax.collections for ax in plain.axes) and not plain.legends


def test_alike_slides_share_a_scale(mixed):
    fig = montage.figure(mixed, ["tiny-000", "tiny-001", "spoilt"])
    assert len({round(abs(np.diff(ax.get_xlim())[0])) for ax in fig.axes}) == 1
    assert sum("µm" in text for text in texts(fig)) == 1


def test_artefacts_are_tinted():
    where = np.zeros((20, 20), bool)
    where[5:10] = True
    tinted = montage._filled(np.full((20, 20, 3), 200, np.uint8), {"pen": where})
    assert (tinted[~where] == 200).all()
    assert (tinted[where][:, 1] > tinted[where][:, 0] + 50).all()  # pen is green


def test_outlines_are_few_points_within_half_a_pixel():
    y, x = np.mgrid[:300, :300]
    mask = (x - 150) ** 2 + (y - 150) ** 2 < 110**2
    (line,) = montage._outlines(mask, (300, 300), 8.0)
    away = np.hypot(*(line / 8 - 0.5 - 150).T)
    assert len(line) < 150  # of about 620
    assert np.abs(away - 109.5).max() < 1
    drawn = cv2.fillPoly(np.zeros((300, 300), np.uint8), [np.round(line / 8 - 0.5).astype(np.int32)], 1) > 0
    assert tissue.iou(drawn, mask, 1.0, ignore_um=1.0) > 0.999


def test_bad_settings_are_named(mixed, tmp_path):
    with pytest.raises(InputError, match="'suspicius'. Did you mean 'suspicious'"):
        montage.write(mixed, tmp_path, "suspicius")
    with pytest.raises(InputError, match="'lettre'. Did you mean 'letter'"):
        montage.write(mixed, tmp_path, page="lettre")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder .*file.*choose another"):
        montage.write(mixed, tmp_path / "file" / "out")


def test_the_verb_checks_its_settings_before_it_reads_slides(tmp_path, capsys):
    given = ["montage", str(tmp_path / "cohort.csv"), str(tmp_path / "out"), "--sort", "slideid"]
    assert main(given) == 2
    assert "'slideid'. Did you mean 'slide_id'" in capsys.readouterr().err


def test_a_cohort_without_a_usable_slide_is_refused(mixed, tmp_path):
    with pytest.raises(InputError, match="none of the 1 slides can be shown.*no slide format"):
        montage.write(mixed.subset(["broken"]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_index_that_lost_its_scans_says_so(mixed, tmp_path):
    moved = SlideIndex(tmp_path, mixed.slides)
    with pytest.raises(InputError, match="scan of 'spoilt', is gone; build the index again"):
        moved.picture("spoilt")
