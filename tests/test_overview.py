"""Pictures of a cohort hold what they say, on tiny slides."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from pathfm import TileStream, overview, sampling
from pathfm.synthetic import Truth

pytestmark = pytest.mark.usefixtures("style")


@pytest.fixture(scope="module")
def truths(cohort):
    return {row.slide_id: Truth.open(row.path) for row in cohort}


def test_truth_shows_a_slide_its_classes_and_nuclei(cohort, truths):
    slide, classes, nuclei = overview.truth_figure(cohort, truths, side_um=120).axes
    assert set(np.unique(classes.images[0].get_array())) <= set(range(9))
    assert len(nuclei.collections[0].get_offsets()) > 5


def test_the_densest_square_lies_within_and_holds_the_mark():
    mask = np.zeros((50, 80), bool)
    mask[:12, 60:78] = True
    x, y = overview._densest(mask, 20)
    assert 0 <= x <= 60 and y == 0
    assert mask[int(y) : int(y) + 20, int(x) : int(x) + 20].sum() >= 0.95 * mask.sum()


def test_the_same_place_is_read_at_every_scale(index):
    name = index.usable.query("mpp < 0.3")["slide_id"].iloc[0]
    slide, mpps = index.slide(name), (0.25, 0.5, 1.0)
    middle = overview.detailed_place(index, name, mpps, tile_px=128)
    table = overview.agreement(slide, middle, mpps, tile_px=128)
    assert (table["mean difference"] < table["one pixel to the side"]).all()
    shapes = [ax.images[0].get_array().shape[0] for ax in overview.scales_figure(slide, middle, mpps, 128).axes]
    assert shapes == [128, 128, 128, 128, 64, 32]


def test_the_audit_is_drawn_with_and_without_truth(index):

    audit = sampling.audit(TileStream(index, 128, 0.5), range(64))
    for tables in (audit, {name: table for name, table in audit.items() if name != "class"}):
        fig, axes = plt.subplots(1, 3)
        overview.draw_audit(axes, tables)
        assert sum(patch.get_height() for patch in axes[1].patches) == 64
        plt.close(fig)


def test_pages_that_are_not_shown_are_written_and_it_is_said_where(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overview, "PAGE", 2)
    monkeypatch.setattr(overview, "checkout", lambda: tmp_path)
    names = index.usable["slide_id"].tolist()
    assert overview.pages(index, names, 2, tmp_path / "all") == [names[:2], names[2:]]
    assert overview.pages(index, names, 3, tmp_path / "all") == [names[:2], names[2:]]
    assert capsys.readouterr().out == "" and not (tmp_path / "all").exists()
    assert overview.pages(index, names, 1, tmp_path / "runs" / "all") == [names[:2]]
    said = "Here page 1 of 2; every slide, the suspicious first, is in runs/all/montage-001.png and so on.\n"
    assert capsys.readouterr().out == said
    listed = pd.read_csv(tmp_path / "runs" / "all" / "index.csv")
    assert sorted(listed["slide_id"]) == sorted(names) and (tmp_path / "runs" / "all" / "montage-001.png").is_file()
