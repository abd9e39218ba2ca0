"""Foreground against the truth of synthetic slides whose seeds were not used to tune it, and artefacts apart."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pytest

from pathfm import SlideIndex, TileStream, tissue
from pathfm.synthetic import Truth, render, tiny_cohort
from pathfm.synthetic.appearance import Origin
from pathfm.synthetic.cohorts import _SPOILT

# Seed, artefact, slides. Tuning used 101, 200 to 203 and 9100 to 9106; the embedded cohort is 0.
PLAN = [(9200, "", 2), (9201, "pen", 2), (9202, "bubble", 2), (9204, "blur", 2)]
PLAN += [(seed, "fold", 1) for seed in (9203, 9205, 9206, 9207)]
SIDE_UM, TILE_PX, MPP = 1100, 256, 0.5


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """For each slide: its artefacts, index, mask and truth."""
    rows = []
    for seed, kind, n in PLAN:
        kinds = (kind,) if kind else ()
        folder = tmp_path_factory.mktemp("tissue")
        cohort = tiny_cohort(folder / "slides", n, side_um=SIDE_UM, mpp=MPP, seed=seed, artefacts=kinds)
        index = SlideIndex.build(cohort, folder / "index", workers=0)
        assert len(index.usable) == n
        for row in index.usable.itertuples():
            truth, (mask, um_per_px) = Truth.open(row.path), index.mask(row.slide_id)
            rows.append(
                {
                    "kinds": kinds,
                    "index": index.subset([row.slide_id]),
                    "slide_id": row.slide_id,
                    "mask": mask,
                    "um_per_px": um_per_px,
                    "truth": truth,
                    "tissue": truth.tissue_mask(um_per_px),
                }
            )
    return rows


def test_foreground_agrees_with_the_truth(found):
    ious = [tissue.iou(one["mask"], one["tissue"], one["um_per_px"]) for one in found]
    assert np.median(ious) > 0.97
    assert min(ious) > 0.9


@pytest.mark.parametrize(("kind", "least"), [("pen", 0.95), ("bubble", 0.6), ("fold", 0.5), ("blur", 0.9)])
def test_artefacts_are_kept_out_of_the_mask(found, kind, least):
    kept = there = 0
    for one in (one for one in found if kind in one["kinds"]):
        spoilt = one["truth"].artefact_mask(kind, one["um_per_px"])
        spoilt &= one["truth"].tissue_mask(one["um_per_px"], without=())
        kept, there = kept + (one["mask"] & spoilt).sum(), there + spoilt.sum()
    assert 1 - kept / there > least


@pytest.mark.parametrize("tile_um", [64.0, 128.0, 256.0, 512.0])
def test_tiles_hold_tissue_and_tissue_is_reached(found, tile_um):
    """At most 1 % of the tiles hold less true tissue than asked for, at most 1 % of it is never sampled.

    On the cohorts' mix of slides, 7 of 11 without an artefact; from 128 um on also on this one, where 10 of 12 have
    one. Of its tiles of 64 um 1.3 % are poor, over half of them where there is a fold.
    """
    masks = [(one["mask"], one["tissue"], one["um_per_px"], tile_um) for one in found]
    consequences = np.array([tissue.consequence(*each) for each in masks])
    drawn, here = Counter(_SPOILT["default"]), Counter(one["kinds"] for one in found)
    share = np.array([drawn[one["kinds"]] / here[one["kinds"]] for one in found]) / drawn.total()
    assert share.sum() == pytest.approx(1)
    assert (share @ consequences <= 0.01).all()
    assert (consequences.mean(axis=0) <= 0.01).all() or tile_um < 128


def rendered_mask(path: str, side_um: float, **how) -> np.ndarray:
    """The mask of a slide as another laboratory would stain and scan it, as a scan makes it."""
    fine = render(path, width_um=side_um, height_um=side_um, mpp=8.0 / tissue.DETAIL, **how)
    rgb = cv2.resize(fine, None, fx=1 / tissue.DETAIL, fy=1 / tissue.DETAIL, interpolation=cv2.INTER_AREA)
    return tissue.segment(rgb, 8.0, lambda mask, glass: tissue.detail(fine, glass))[0]


def test_the_mask_is_that_of_the_tissue_whoever_stains_and_scans_it(tmp_path):
    """The same slide under each of eight centres, and in DAB, brown in place of eosin."""
    origin = Origin(9210, 0, 8, 0, 0)
    path = tiny_cohort(tmp_path, 1, side_um=1088, mpp=2.0, origin=origin).table["path"][0]
    truth, ways = Truth.open(path).tissue_mask(8.0), [{"centre": k} for k in range(origin.centres)]
    ious = [tissue.iou(rendered_mask(path, 1088, **how), truth, 8.0) for how in [*ways, {"stain": "DAB"}]]
    assert min(ious) > 0.9, ious


def test_the_consequence_is_what_the_stream_draws(found):
    """Against the truth's own 2 um map under tiles at whole level-0 positions, on a mask made wrong on purpose."""
    one = found[0]
    stream = TileStream(one["index"], TILE_PX, MPP, min_tissue=0.4, seed=3)
    names = stream.names(range(4000))
    half = one["tissue"] & (np.arange(one["tissue"].shape[1]) < one["tissue"].shape[1] // 2)
    fine = one["truth"].tissue_mask(2.0)
    fine &= np.arange(fine.shape[1]) * 2.0 < one["um_per_px"] * (one["tissue"].shape[1] // 2)
    sums = np.pad(fine.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    x, y = (np.round(names[axis].to_numpy() * MPP / 2).astype(int) for axis in "xy")
    side = round(TILE_PX * MPP / 2)
    held = sums[y + side, x + side] - sums[y, x + side] - sums[y + side, x] + sums[y, x]
    drawn = (held < 0.4 * side**2).mean()
    assert 0.1 < drawn < 0.9
    assert tissue.consequence(one["mask"], half, one["um_per_px"])[0] == pytest.approx(drawn, abs=0.04)


def test_the_truth_as_its_own_mask_has_no_consequence():
    truth = np.zeros((80, 80), bool)
    truth[20:60, 20:60] = True
    assert tissue.consequence(truth, truth, 8.0) == (0.0, 0.0)
    nothing = tissue.consequence(np.zeros_like(truth), truth, 8.0)
    assert np.isnan(nothing[0]) and nothing[1] == 1.0
    half = truth & (np.arange(80) < 40)
    assert tissue.consequence(half, truth, 8.0)[1] == pytest.approx(10 / 40, abs=0.03)  # 10 px beyond reach


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


def slab(height=220, width=260, glass=240) -> np.ndarray:
    """Pink tissue with darker grain on glass, (height, width, 3) uint8 at 8 um/px."""
    rng = np.random.default_rng(1)
    rgb = np.full((height, width, 3), glass, np.float32)
    grain = rng.normal(0, 8, (120, 140, 1))
    rgb[50:170, 60:200] = np.float32([205, 145, 190]) * glass / 240 + grain
    return rgb.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("tilt", [0, 6, -9])
def test_a_rim_of_glass_is_no_tissue(tilt):
    """A dark band along the border, and the cover slip's grey line, upright or lying, a little tilted."""
    rgb = slab()
    plain = tissue.foreground(rgb)
    rgb[:12] = (30, 28, 33)
    cv2.line(rgb, (232, 0), (232 + tilt, 219), (150, 150, 156), 3, cv2.LINE_AA)
    cv2.line(rgb, (0, 196), (259, 196 + tilt), (165, 165, 170), 2, cv2.LINE_AA)
    mask, found = tissue.segment(cv2.GaussianBlur(rgb, (0, 0), 0.8))
    assert found["edge"][:12].mean() > 0.99
    assert found["edge"][20:180, 232].mean() > 0.9 or tilt
    assert not mask[:20].any() and not mask[:, 215:].any() and not mask[185:].any()
    assert tissue.iou(mask, plain, 8.0) > 0.98


def test_clean_slides_have_no_rim():
    assert not tissue.artefacts(slab())["edge"].any()


def test_white_padding_is_not_taken_for_the_glass():
    rgb = slab(glass=215)
    padded = np.pad(rgb, ((0, 200), (0, 300), (0, 0)), constant_values=255)
    assert tissue.glass_level(padded) == pytest.approx([215, 215, 215], abs=2)
    mask = tissue.foreground(padded)
    assert tissue.iou(mask[:220, :260], tissue.foreground(rgb), 8.0) == 1.0
    assert not mask[222:].any() and not mask[:, 262:].any()


def test_a_fold_is_double_in_eosin_and_a_dark_epithelium_is_not():
    """The same strip of the same darkness in green: once all stain doubled, once haematoxylin alone."""
    stains = {"H": np.array([0.65, 0.70, 0.29]), "E": np.array([0.07, 0.99, 0.11])}
    usual = 0.12 * stains["H"] + 0.14 * stains["E"]
    strip = 2.4 * usual, usual + (1.4 * usual[1] / stains["H"][1]) * stains["H"]
    for density, folded in zip(strip, (True, False), strict=True):
        rgb = np.full((150, 150, 3), 240.0)
        rgb[20:130, 20:130] = 240 * 10**-usual
        rgb[40:110, 70:78] = 240 * 10**-density
        fold = tissue.artefacts(rgb.round().astype(np.uint8))["fold"]
        assert fold[45:105, 71:77].mean() > 0.95 if folded else not fold.any()
