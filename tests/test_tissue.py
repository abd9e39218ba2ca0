"""Foreground against the truth of synthetic slides whose seeds were not used to tune it, and artefacts apart."""

from __future__ import annotations

import numpy as np
import pytest

from pathfm import SlideIndex, tissue
from pathfm.synthetic import Truth, tiny_cohort

SEED = 9_000  # tuning used 101 and 200 to 203; the embedded cohort is 0
PLAN = {(): 4, ("pen",): 4, ("bubble",): 2, ("fold",): 1, ("blur",): 2}  # artefacts -> slides


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[tuple[str, float, dict]]:
    """For each slide: its artefacts, its IoU, and the recall of each artefact it has."""
    rows = []
    for k, (kinds, n) in enumerate(PLAN.items()):
        folder = tmp_path_factory.mktemp("tissue")
        cohort = tiny_cohort(folder / "slides", n, side_um=900, mpp=0.5, seed=SEED + k, artefacts=kinds)
        index = SlideIndex.build(cohort, folder / "index", workers=0)
        for row in index.usable.itertuples():
            truth, (mask, um_per_px) = Truth.open(row.path), index.mask(row.slide_id)
            iou = tissue.iou(mask, truth.tissue_mask(um_per_px), um_per_px)
            spoilt = {kind: truth.artefact_mask(kind, um_per_px) for kind in kinds}
            missed = {kind: (mask & there).sum() / there.sum() for kind, there in spoilt.items() if there.any()}
            rows.append((" ".join(kinds), iou, {kind: 1 - share for kind, share in missed.items()}))
        assert len(index.usable) == n
    return rows


def test_foreground_agrees_with_the_truth(found):
    ious = [iou for _, iou, _ in found]
    assert np.median(ious) > 0.90
    assert min(ious) > 0.80


@pytest.mark.parametrize(("kind", "least"), [("pen", 0.9), ("bubble", 0.6), ("blur", 0.6)])
def test_artefacts_are_kept_out_of_the_mask(found, kind, least):
    recalls = [recall[kind] for _, _, recall in found if kind in recall]
    assert np.mean(recalls) > least


def test_iou_leaves_the_boundary_out():
    truth = np.zeros((60, 60), bool)
    truth[20:40, 20:40] = True
    grown = np.zeros_like(truth)
    grown[19:41, 19:41] = True
    assert tissue.iou(grown, truth, um_per_px=8) == 1.0
    assert tissue.iou(~truth, truth, um_per_px=8) == 0.0
    half = truth & (np.arange(60) < 30)
    assert tissue.iou(half, truth, um_per_px=8) == pytest.approx(0.5, abs=0.05)


def test_areas_are_physical():
    assert tissue.area_mm2(np.ones((125, 125), bool), um_per_px=8) == pytest.approx(1.0)


@pytest.mark.parametrize("um_per_px", [4.0, 8.0, 16.0])
def test_parameters_are_in_um_not_in_pixels(um_per_px):
    """The same square of tissue with a hole is found alike at any scale."""
    x = (np.arange(int(2000 / um_per_px)) + 0.5) * um_per_px
    inside = (np.abs(x - 1000) < 600)[:, None] & (np.abs(x - 1000) < 600)
    hole = (np.abs(x - 1000) < 100)[:, None] & (np.abs(x - 1000) < 100)
    rgb = np.full((*inside.shape, 3), 243, np.uint8)
    rgb[inside & ~hole] = (200, 140, 190)
    area = tissue.area_mm2(tissue.foreground(rgb, um_per_px), um_per_px)
    assert area == pytest.approx(1.44, rel=0.06)


def test_lamp_and_exposure_drop_out():
    rgb = np.full((120, 120, 3), 245, np.uint8)
    rgb[30:90, 30:90] = (205, 150, 190)
    dim = np.round(rgb * np.array([0.80, 0.85, 0.82])).astype(np.uint8)
    assert np.array_equal(tissue.foreground(rgb), tissue.foreground(dim))


@pytest.mark.parametrize("grey", [255, 240, 200])
def test_glass_alone_is_no_tissue(grey):
    rgb = np.random.default_rng(0).normal(grey, 1.5, (200, 200, 3)).clip(0, 255).astype(np.uint8)
    assert not tissue.foreground(rgb).any()
    assert not any(mask.any() for mask in tissue.artefacts(rgb).values())
