"""The gallery shows what it says: one tissue under every centre, twins without an effect, pairs that one cue parts."""

from dataclasses import replace

import numpy as np
import pytest

from pathfm import gallery
from pathfm.synthetic import CLASSES, render
from pathfm.synthetic.appearance import MIMICS, Knobs, Origin
from pathfm.synthetic.slides import SlideSpec, tissue

pytestmark = pytest.mark.usefixtures("style")
ORIGINS = [Origin(0, centre, 4, patient, patient) for patient, centre in enumerate((0, 1, 2, 3, 0, 0))]
SPECS = [SlideSpec(f"s{origin.patient}", origin, 0.5, 1200, 1200) for origin in ORIGINS]
BORDER = gallery.piece(ORIGINS[0], gallery.BORDER)


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """Half the area to plan: fields then reach the edge of the tissue, which nothing here minds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "PIECE_UM", 560.0)
        yield


@pytest.fixture(scope="module")
def twins():
    return {made.twin.knobs[0]: made for made in gallery.twin_fields(SPECS)}


def test_centres_change_the_colour_and_no_nucleus():
    table = gallery.centres_table(BORDER)
    assert len(table) == 4 and table["nuclei drawn"].nunique() == 1 and table["nuclei drawn"].iloc[0] > 50
    assert (table["nuclei found"] > 0.95 * table["nuclei drawn"]).all()
    assert table[["red", "green", "blue"]].std().max() > 3


def test_nuclei_are_not_found_in_other_tissue(monkeypatch):
    elsewhere = gallery.under_every_centre(gallery.piece(ORIGINS[1], gallery.BORDER))
    monkeypatch.setattr(gallery, "under_every_centre", lambda *_, **__: elsewhere)
    table = gallery.centres_table(BORDER)
    assert (table["nuclei found"] < 0.8 * table["nuclei drawn"]).all()


def test_the_figure_of_centres_has_every_centre_in_both_stains():
    axes = gallery.centres_figure(BORDER).axes
    fields = [ax.images[0].get_array() for ax in axes]
    assert len(fields) == 8 and len({field.tobytes() for field in fields}) == 8
    # Eosin lets red through and little blue is lost; DAB takes blue away.
    assert all(brown[..., 2].mean() < pink[..., 2].mean() for pink, brown in zip(fields[:4], fields[4:], strict=True))
    assert [ax.get_title(loc="left") for ax in axes[:2]] == ["centre 0, its own", "centre 1"]


def test_one_tissue_without_centres_is_the_same_to_the_pixel():
    off = replace(BORDER, knobs=Knobs.of(centre="off"))
    first, *others = gallery.under_every_centre(off)
    assert all(np.array_equal(first, other) for other in others)


def test_the_place_holds_both_classes_and_no_glass():
    x, y = gallery.place(BORDER, gallery.BORDER, 250)
    scene = tissue(BORDER).scene
    cells = [slice(int(at / scene.map_um), int((at + 250) / scene.map_um)) for at in (y, x)]
    share = np.bincount(scene.class_map[tuple(cells)].ravel(), minlength=9) / scene.class_map[tuple(cells)].size
    assert min(share[1 + CLASSES.index(name)] for name in gallery.BORDER) > 0.3 and share[0] < 0.05


def test_twins_lack_what_their_knob_governs(twins):
    table = gallery.twins_table(list(twins.values()), SPECS[0]).set_index("fields")
    # Fields of different patients differ by their tissue too: with four of each their colours prove nothing.
    sure = table.loc[["one tissue under every centre", "inside nuclei", "glands"]]
    assert (sure["off"] < 0.85 * sure["default"]).all()
    assert sure["off"].iloc[0] == 0 and sure["default"].iloc[0] > 5
    assert all(len(made.labels) == len(made.default) == len(made.off) == 4 for made in twins.values())


def test_a_twin_keeps_what_its_knob_does_not_govern(twins):
    """Nuclei lie where they lay: with fine cues off the smoothed fields stay nearly the same, with patients off not."""

    def alike(knob):
        pairs = zip(twins[knob].default, twins[knob].off, strict=True)
        return min(np.corrcoef(a[::8, ::8, 0].ravel(), b[::8, ::8, 0].ravel())[0, 1] for a, b in pairs)

    assert alike("fine_cues") > 0.8 and alike("centre") > 0.9 and alike("patient") < 0.3


def test_twins_are_labelled_by_centre_patient_or_class(twins):
    fig = gallery.twins_figure(list(twins.values()))
    labels = [ax.get_title(loc="left") for ax in fig.axes if ax.images]
    assert labels[:4] == labels[4:8] == [f"centre {k}" for k in range(4)]
    assert labels[8] == "patient 0" and labels[16:20] == ["tumour", "normal", "lymphocytes", "stroma"]


def test_every_pair_is_named_and_parted_by_its_own_cue_only():
    table = gallery.mimics_table(ORIGINS[0], side_um=200, mpp=4.0)
    assert list(table.index) == [f"{mimic.name} as {mimic.painted_as}" for mimic in MIMICS]
    for differ, mimic in zip(table["differ"], MIMICS, strict=True):
        assert {part.split()[0] for part in differ.split(", ")} == set(mimic.own)
    assert (table["differ, off"] == 0).all()


def test_a_mimic_loses_its_cue_and_keeps_its_place():
    mimic = next(one for one in MIMICS if one.family == "fine_cues")
    fields = gallery.mimic_fields(mimic, ORIGINS[0], 64, 0.25)
    assert list(fields) == [mimic.painted_as, *(f"{mimic.name}: cue {to}" for to in ("default", "off", "strong"))]
    _, default, off, _ = fields.values()
    assert gallery.fine_detail(off, 0.25) < gallery.fine_detail(default, 0.25)
    assert np.corrcoef(default[::8, ::8, 0].ravel(), off[::8, ::8, 0].ravel())[0, 1] > 0.8


def test_colour_distance_of_known_greys():
    assert gallery.colour_distance([np.full((4, 4, 3), grey) for grey in (10, 10, 13)]) == pytest.approx(
        2 * 27**0.5 / 3
    )


def test_fine_detail_sees_grain_and_not_shade():
    field = render(BORDER, None, 200, 200, 64, 64, 0.25).astype(float)
    grain = np.random.default_rng(0).normal(0, 12, field.shape)
    assert gallery.fine_detail(field + grain, 0.25) > gallery.fine_detail(field, 0.25) + 2
    assert gallery.fine_detail(field + 20, 0.25) == pytest.approx(gallery.fine_detail(field, 0.25), rel=1e-3)
