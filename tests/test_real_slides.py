"""The whole reading path on real slides: SVS, TIFF pyramid, OME-TIFF and DICOM; and one that must be refused."""

from __future__ import annotations

import numpy as np
import openslide
import pytest
import tifffile
from slide_files import cohort_of

from pathfm import Slide, SlideIndex, TileStream

pytestmark = pytest.mark.real

FILES = {
    "svs": "cmu-1-small-region.svs",
    "pyramid": "derived_cmu1_region_pyramid.tiff",
    "dicom": "gcp_camelyon_jpeg.dcm",
    "tiny": "openslide_16px.svs",
    "ome": "instanseg_HE_example.ome.tif",
}


@pytest.fixture(scope="module")
def slides(real_data) -> dict:
    return {name: real_data / "slides" / file for name, file in FILES.items()}


@pytest.fixture(scope="module")
def real_index(slides, tmp_path_factory) -> SlideIndex:
    return SlideIndex.build(cohort_of(slides), tmp_path_factory.mktemp("real"), workers=0)


def test_every_slide_is_indexed_or_quarantined_with_its_reason(real_index):
    usable = real_index.usable.set_index("slide_id")
    assert list(usable.index) == ["svs", "pyramid", "dicom", "ome"]
    mpp = {"svs": 0.499, "pyramid": 0.499, "dicom": 28.97, "ome": 0.50008}
    assert usable["mpp"].to_dict() == pytest.approx(mpp, rel=1e-3)
    assert usable["levels"].to_dict() == {"svs": "1", "pyramid": "1 2 4 8", "dicom": "1", "ome": "1"}
    ranges = dict.fromkeys(("svs", "pyramid", "ome"), "ranges")
    assert usable["reader"].to_dict() == ranges | {"dicom": "openslide"}
    assert "not a TIFF file" in usable["fallback"]["dicom"]
    assert usable["codec"]["svs"] == "jpeg RGB 4:4:4"
    assert usable["codec"]["ome"] == "jpeg YCbCr 4:2:0 JFIF"
    reasons = real_index.quarantined.set_index("slide_id")["reason"]
    assert "16 x 16 px, too small" in reasons["tiny"]


def test_the_same_tissue_in_two_containers_gives_the_same_mask(real_index):
    svs, pyramid = (real_index.mask(name)[0] for name in ("svs", "pyramid"))
    assert (svs & pyramid).sum() / (svs | pyramid).sum() > 0.95
    assert 0.2 < svs.mean() < 0.7


@pytest.mark.parametrize(("names", "mpp"), [(["svs", "pyramid", "ome"], (0.5, 0.7, 1.0, 2.0)), (["dicom"], 29.0)])
def test_tiles_stream_at_an_mpp_the_slides_have(real_index, names, mpp):
    stream = TileStream(real_index.subset(names), tile_px=128, mpp=mpp, seed=1)
    for tile in stream.__getitems__(range(12)):
        assert tile.image.shape == (128, 128, 3)
        assert tile.tissue >= 0.4
        assert tile.image.std() > 5  # something is there
        assert tile.mpp == pytest.approx(min(np.atleast_1d(mpp), key=lambda m: abs(m - tile.mpp)), rel=0.01)


def test_level_0_is_openslides_own(slides):
    rng = np.random.default_rng(0)
    for name in ("svs", "pyramid", "dicom"):
        slide = Slide.open(slides[name])
        with openslide.OpenSlide(slides[name]) as peer:
            for _ in range(20):
                x, y = (int(rng.integers(0, side - 100)) for side in (slide.width_px, slide.height_px))
                theirs = np.asarray(peer.read_region((x, y), 0, (100, 100)).convert("RGB"))
                assert np.array_equal(slide.read(x, y, 100, slide.mpp), theirs)


def test_the_ome_tiff_is_what_its_compressed_tiles_hold(slides):
    slide = Slide.open(slides["ome"])
    whole = tifffile.imread(slides["ome"])  # decoded by imagecodecs
    assert np.array_equal(slide.region(0, 0, slide.width_px, slide.height_px, slide.mpp), whole)
