"""What the painters draw: the same tissue in any window, process and resolution, at the sizes of real cells."""

import hashlib
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from pathfm.synthetic.painters import CLASSES, TissueParams, plan, raster

SIDE = 300  # squares of 2 um: each class has a field of 600 x 600 um
DEFAULT = TissueParams()
TUMOUR, NORMAL, STROMA, MUSCLE, LYMPHOCYTES, ADIPOSE, MUCUS, NECROSIS = range(1, 9)


def field_of(cls: int, params=DEFAULT, seed: int = 3, side: int = SIDE):
    return plan(np.full((side, side), cls, np.uint8), 2.0, params, seed)


@pytest.fixture(scope="module")
def quilt():
    """All eight classes and glass in squares of 150 um."""
    row, column = np.mgrid[:225, :225] // 75
    return plan(((3 * row + column + 1) % 9).astype(np.uint8), 2.0, DEFAULT, 5)


@pytest.fixture(scope="module")
def pure():
    """One field of each class."""
    return {cls: field_of(cls) for cls in range(1, 9)}


def diameter(nuclei):
    """Of the circle of the same area, um."""
    return np.sqrt(nuclei["major_um"] * nuclei["minor_um"])


def per_mm2(scene, *kinds):
    area = (scene.class_map > 0).sum() * scene.map_um**2 / 1e6
    return np.isin(scene.nuclei["kind"], kinds).sum() / area


@pytest.mark.parametrize("mpp", [0.25, 0.5, 2.0])
def test_windows_fit_together(quilt, mpp):
    px = 96
    whole = raster(quilt, 60, 90, 2 * px, 2 * px, mpp)
    for i in (0, 1):
        for j in (0, 1):
            part = raster(quilt, 60 + j * px * mpp, 90 + i * px * mpp, px, px, mpp)
            for big, small in zip(whole, part, strict=True):
                np.testing.assert_allclose(big[i * px : (i + 1) * px, j * px : (j + 1) * px], small, atol=1e-5)


def test_concentrations_are_float32_finite_and_never_negative(quilt):
    for stain in raster(quilt, -20, -20, 500, 500, 1.0):
        assert stain.dtype == np.float32
        assert np.isfinite(stain).all()
        assert stain.min() >= 0
        assert stain.max() < 5


def test_glass_is_empty(quilt):
    h, e = raster(quilt, 340, 340, 60, 60, 1.0)  # the middle of the square of glass
    assert quilt.class_map[185, 185] == 0
    assert h.max() == e.max() == 0
    assert not raster(quilt, -300, 0, 50, 50, 0.5)[0].any()


def digest(scene) -> str:
    drawn = np.stack(raster(scene, 100, 100, 200, 200, 0.5))
    return hashlib.sha256(drawn.tobytes() + scene.nuclei["x_um"].tobytes()).hexdigest()


def test_another_process_draws_the_same():
    code = "import test_synthetic_drawing as t; print(t.digest(t.field_of(1)))"
    here = Path(__file__).parent
    other = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(field_of(TUMOUR))


def test_another_seed_draws_another_tissue():
    assert digest(field_of(STROMA, seed=1)) != digest(field_of(STROMA, seed=2))


@pytest.mark.parametrize("cls", [TUMOUR, NORMAL, MUSCLE, ADIPOSE])
def test_the_same_tissue_at_any_resolution(pure, cls):
    fine = raster(pure[cls], 100, 100, 400, 400, 0.25)
    half = raster(pure[cls], 100, 100, 200, 200, 0.5)
    for a, b in zip(fine, half, strict=True):
        shrunk = a.reshape(200, 2, 200, 2).mean((1, 3))
        assert abs(shrunk.mean() - b.mean()) < 0.01
        assert np.abs(shrunk - b).mean() < 0.05
        assert np.corrcoef(shrunk.ravel(), b.ravel())[0, 1] > 0.93


def test_every_nucleus_lies_in_its_own_class(quilt):
    n = quilt.nuclei
    row, column = (n["y_um"] / quilt.map_um).astype(int), (n["x_um"] / quilt.map_um).astype(int)
    assert (quilt.class_map[row, column] == n["cls"]).all()
    assert set(n["cls"]) == set(range(1, 9))


def test_nuclei_are_where_the_haematoxylin_is(pure):
    scene = pure[TUMOUR]
    h, _ = raster(scene, 0, 0, 600, 600, 1.0)
    n = scene.nuclei[scene.nuclei["kind"] == "epithelial"]
    at_nuclei = h[n["y_um"].astype(int).clip(0, 599), n["x_um"].astype(int).clip(0, 599)]
    assert at_nuclei.mean() > 1.5 * h.mean()


# Nuclei per mm2 in sections of 3 to 5 um: orders of magnitude from textbooks of histology and counts on H&E.
DENSITY = {
    TUMOUR: (4000, 11000),
    NORMAL: (3500, 9000),
    STROMA: (800, 3500),
    MUSCLE: (800, 2500),
    LYMPHOCYTES: (9000, 20000),
    ADIPOSE: (60, 450),
    MUCUS: (30, 1200),
}


@pytest.mark.parametrize("cls", DENSITY)
def test_cell_density_is_that_of_the_tissue(pure, cls):
    low, high = DENSITY[cls]
    assert low < len(pure[cls].nuclei) / 0.36 < high


@pytest.mark.parametrize(
    ("cls", "kind", "major", "minor"),
    [
        (TUMOUR, "epithelial", (8, 15), (5, 11)),
        (NORMAL, "epithelial", (6, 10), (4, 7)),
        (STROMA, "fibroblast", (10, 25), (2, 4)),
        (MUSCLE, "myocyte", (10, 25), (1.5, 4)),
        (LYMPHOCYTES, "lymphocyte", (6, 8), (5, 8)),
        (LYMPHOCYTES, "centroblast", (8, 13), (6, 11)),
        (NECROSIS, "pyknotic", (2, 6), (2, 6)),
    ],
)
def test_nuclei_have_the_size_of_their_kind(pure, cls, kind, major, minor):
    n = pure[cls].nuclei[pure[cls].nuclei["kind"] == kind]
    assert major[0] < np.median(n["major_um"]) < major[1]
    assert minor[0] < np.median(n["minor_um"]) < minor[1]


def test_a_tumour_is_mostly_epithelium(pure):
    depth = pure[TUMOUR].maps[..., 2]
    assert (depth > 0).mean() > 0.65
    assert per_mm2(pure[TUMOUR], "epithelial") > 10 * per_mm2(pure[TUMOUR], "lymphocyte")


def test_fibroblasts_follow_the_fibres(pure):
    """Along a fibroblast the drawn collagen changes less than across it."""
    scene = pure[STROMA]
    _, e = raster(scene, 0, 0, 1200, 1200, 0.5)
    n = scene.nuclei[scene.nuclei["kind"] == "fibroblast"]
    n = n[(n["x_um"] > 30) & (n["x_um"] < 570) & (n["y_um"] > 30) & (n["y_um"] < 570)]

    def change(turn):
        away = 6.0 + np.arange(12)[:, None]
        x = n["x_um"] + away * np.cos(n["angle"] + turn)
        y = n["y_um"] + away * np.sin(n["angle"] + turn)
        return np.abs(np.diff(e[(2 * y).astype(int), (2 * x).astype(int)], axis=0)).mean()

    assert change(0) < 0.75 * change(np.pi / 2)


def test_palisades_point_at_the_lumen(pure):
    """Columnar tumour nuclei stand on the basement membrane."""
    scene = field_of(TUMOUR, replace(DEFAULT, gland_form=1.0, cribriform=0.0))
    depth = scene.maps[..., 2]
    gy, gx = np.gradient(depth)
    n = scene.nuclei[(scene.nuclei["kind"] == "epithelial")]
    row, column = (n["y_um"] / 2).astype(int), (n["x_um"] / 2).astype(int)
    low = (depth[row, column] > 3) & (depth[row, column] < 15)
    n, row, column = n[low], row[low], column[low]
    lean = n["angle"] - np.arctan2(gy[row, column], gx[row, column])
    assert np.median(np.abs(np.cos(lean))) > 0.9


def test_nuclear_size_enlarges_every_nucleus():
    small, large = (field_of(TUMOUR, replace(DEFAULT, nuclear_size=s), side=200) for s in (0.9, 1.2))
    assert np.median(diameter(large.nuclei)) / np.median(diameter(small.nuclei)) == pytest.approx(4 / 3, rel=0.08)


@pytest.mark.parametrize(
    ("name", "cls", "kinds"),
    [
        ("inflammation", STROMA, ("lymphocyte", "plasma cell")),
        ("mitoses", TUMOUR, ("mitosis",)),
        ("dust", NECROSIS, ("pyknotic", "dust")),
        ("ghosts", NECROSIS, ("ghost",)),
        ("follicles", LYMPHOCYTES, ("centroblast",)),
    ],
)
def test_a_parameter_adds_its_cells(name, cls, kinds):
    typical = getattr(DEFAULT, name)
    few, many = (field_of(cls, replace(DEFAULT, **{name: f * typical})) for f in (0.4, 1.6))
    assert per_mm2(many, *kinds) > 1.3 * per_mm2(few, *kinds)


FINE = [f.name for f in fields(TissueParams) if f.metadata["scale"] == "fine"]


@pytest.mark.parametrize(("name", "cls"), [(name, ADIPOSE if "fat" in name else TUMOUR) for name in FINE])
def test_fine_cues_vanish_in_a_4_um_average(name, cls):
    """They change pixels of 0.5 um and leave a map of 4 um almost as it was."""

    def drawn(factor):
        params = replace(DEFAULT, **{name: factor * getattr(DEFAULT, name)})
        return np.stack(raster(field_of(cls, params, side=150), 20, 20, 400, 400, 0.5))

    weak, strong = drawn(0.5), drawn(1.5)
    coarse = np.abs((strong - weak).reshape(2, 50, 8, 50, 8).mean((2, 4)))
    assert np.abs(strong - weak).max() > 0.1
    assert coarse.mean() < 0.03


@pytest.mark.parametrize("name", ["gland_um", "gland_form", "septa_um"])
def test_coarse_cues_leave_the_cells_as_they_are(name):
    """Architecture changes; the size of the nuclei does not."""
    spec = TissueParams.__dataclass_fields__[name].metadata
    changed = {name: 0.0 if name == "gland_form" else 1.5 * getattr(DEFAULT, name)}
    here, there = field_of(TUMOUR), field_of(TUMOUR, replace(DEFAULT, **changed))
    assert spec["scale"] == "coarse"
    assert np.median(diameter(there.nuclei)) == pytest.approx(np.median(diameter(here.nuclei)), rel=0.12)
    assert not np.array_equal(here.maps[..., 2:4], there.maps[..., 2:4])


def test_parameters_may_differ_by_class():
    row, column = np.mgrid[:200, :400]
    halves = np.where(column < 200, STROMA, MUSCLE).astype(np.uint8)
    scene = plan(halves, 2.0, {"stroma": replace(DEFAULT, nuclear_size=1.5), "muscle": DEFAULT}, 1)
    alike = plan(halves, 2.0, DEFAULT, 1)
    size = [np.median(s.nuclei["minor_um"][s.nuclei["kind"] == "fibroblast"]) for s in (scene, alike)]
    assert size[0] > 1.3 * size[1]
    assert len(CLASSES) == 8


def test_regions_depart_from_their_patient():
    row, column = np.mgrid[:100, :300]
    islands = np.where(column // 100 == 1, STROMA, TUMOUR).astype(np.uint8)
    apart, alike = (plan(islands, 2.0, DEFAULT, 1, departure=d) for d in (1.0, 0.0))
    assert len(np.unique(apart.table[1:, 1])) == 3  # looseness of two tumours and the stroma between
    assert len(np.unique(alike.table[1:, 1])) == 1


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (40, 40)])
def test_small_and_empty_slides_are_drawn_too(shape):
    for value in (0, 1, 6):
        scene = plan(np.full(shape, value, np.uint8), 2.0, DEFAULT, 0)
        h, e = raster(scene, 0, 0, 8, 8, 0.5)
        assert np.isfinite(h + e).all()


def test_a_nucleus_centred_on_a_pixel_is_drawn(pure):
    scene = pure[TUMOUR]
    for nucleus in scene.nuclei[:20]:
        h, _ = raster(scene, nucleus["x_um"] - 20.5 * 0.25, nucleus["y_um"] - 20.5 * 0.25, 41, 41, 0.25)
        assert np.isfinite(h).all()
        assert h[20, 20] > 0.2
