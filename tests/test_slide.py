"""Reading: exact scale, exact position, the same tissue at any mpp; and files that are no slides."""

from __future__ import annotations

import pickle

import numpy as np
import openslide
import pytest
from PIL import Image
from slide_files import shrink, tissue_pixels, write_slide

from pathfm import InputError, Slide, fallback
from pathfm import slide as slide_module

WAVE_UM = 24.0  # period of the pattern
SIDE_PX = 768  # at 0.5 um/px


def wave(x_um: np.ndarray, y_um: np.ndarray, blur_um: float = 0.0) -> np.ndarray:
    """A plaid that is known everywhere; averaging over pixels of blur_um lowers its contrast."""
    fade = np.sinc(blur_um / WAVE_UM)
    both = np.cos(2 * np.pi * x_um / WAVE_UM)[None] + np.cos(2 * np.pi * y_um / WAVE_UM)[:, None]
    return 128 + 55 * fade * both


def centres_um(x: float, side_px: int, slide_mpp: float, mpp: float) -> np.ndarray:
    """Middles of side_px pixels of `mpp` that begin at level-0 position x."""
    return x * slide_mpp + (np.arange(side_px) + 0.5) * mpp


@pytest.fixture(scope="module")
def plaid(tmp_path_factory) -> Slide:
    at = centres_um(0, SIDE_PX, 0.5, 0.5)
    pixels = np.repeat(np.round(wave(at, at))[..., None], 3, axis=2).astype(np.uint8)
    return Slide.open(write_slide(tmp_path_factory.mktemp("plaid") / "plaid.tiff", pixels, 0.5, (1, 4)))


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Slide:
    pixels = np.random.default_rng(0).integers(0, 256, (512, 640, 3), np.uint8)
    return Slide.open(write_slide(tmp_path_factory.mktemp("noise") / "noise.tiff", pixels, 0.5, (1, 2, 8)))


@pytest.fixture
def slide(cohort) -> Slide:
    return Slide.open(cohort.table["path"][0])


def shift(image: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """(dy, dx) by which `image` lies off `expected`, in pixels, by least squares on the gradient."""
    gradients = np.stack([g[4:-4, 4:-4].ravel() for g in np.gradient(expected)])
    rest = (expected - image)[4:-4, 4:-4].ravel()
    return np.linalg.lstsq(gradients.T, rest, rcond=None)[0]


def test_same_tissue_at_any_mpp(slide):
    fine = slide.read(x=200, y=160, side_px=256, mpp=0.5)  # 128 um
    for factor in (2, 4, 8):
        coarse = slide.read(x=200, y=160, side_px=256 // factor, mpp=0.5 * factor)
        same = shrink(fine, 16) - shrink(coarse, 16 // factor)  # over 8 um: every level is a JPEG of its own
        assert np.abs(same).mean() < 2.5  # of 255


@pytest.mark.parametrize("mpp", [0.46, 0.5, 0.55, 0.7, 0.9, 1.0, 1.3, 2.0, 2.6, 3.1])
@pytest.mark.parametrize(("x", "y"), [(64, 64), (101, 67)])
def test_position_within_a_tenth_of_a_pixel(plaid, x, y, mpp):
    side = int(240 / mpp)
    image = plaid.read(x, y, side, mpp)[..., 0].astype(float)
    true = plaid.plan(mpp).mpp
    expected = wave(centres_um(x, side, 0.5, true), centres_um(y, side, 0.5, true), true)
    assert np.abs(shift(image, expected)).max() < 0.1
    assert np.abs(image - expected).max() < 12


def test_scale_is_exact(plaid):
    """A scale wrong by 1 % would move the far end of a 200 um tile by 2 um."""
    for mpp in (0.6, 0.7, 1.7):
        side = int(330 / mpp)
        image = plaid.read(10, 10, side, mpp)[..., 0].astype(float)
        at = centres_um(10, side, 0.5, mpp)
        assert np.abs(image - wave(at, at, mpp)).max() < 12


@pytest.mark.parametrize(("level", "down"), [(0, 1), (1, 2), (2, 8)])
def test_aligned_reads_are_the_levels_own_pixels(noise, level, down):
    x, y, side = 3 * down, 5 * down, 40
    with openslide.OpenSlide(noise.path) as peer:
        theirs = np.asarray(peer.read_region((x, y), level, (side, side)))[..., :3]
    assert np.array_equal(noise.read(x, y, side, 0.5 * down), theirs)
    assert noise.plan(0.5 * down).resampled is False


def cubic(pixels: np.ndarray, start: float, step: float, number: int) -> np.ndarray:
    """Rows of `pixels` resampled with Keys' kernel (a = -0.5) stretched by `step`, in float64."""
    centres = start + (np.arange(number) + 0.5) * step
    stretch = max(step, 1.0)
    t = np.abs((np.arange(len(pixels))[None] + 0.5 - centres[:, None]) / stretch)
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.tensordot(weights, pixels.astype(np.float64), axes=1)


@pytest.mark.parametrize("mpp", [0.46, 0.6, 0.7, 1.5, 1.9, 3.0])
def test_resampling_agrees_with_a_float64_reference(noise, mpp):
    level = {0.46: 1, 0.6: 1, 0.7: 1}.get(mpp, 2)
    pixels = np.random.default_rng(0).integers(0, 256, (512, 640, 3), np.uint8)
    if level > 1:
        pixels = np.round(shrink(pixels, level)).astype(np.uint8)
    x, y, side = 61, 83, 60
    step = mpp / 0.5 / level
    rows = cubic(pixels, y / level, step, side)
    expected = cubic(rows.transpose(1, 0, 2), x / level, step, side).transpose(1, 0, 2)
    error = noise.read(x, y, side, mpp) - np.clip(expected, 0, 255)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 45  # dB; rounding twice to 8 bits is all there is


def test_white_noise_does_not_alias(noise):
    """Averaging n pixels divides the spread of white noise by about sqrt(n); picking them would keep it."""
    spread = noise.read(0, 0, 80, 3.0).astype(float).std()
    assert spread < noise.read(0, 0, 480, 0.5).astype(float).std() / 3


def test_outside_the_slide_is_white(noise):
    corner = noise.read(-32, -32, 64, 0.5)
    assert (corner[:32] == 255).all()
    assert (corner[:, :32] == 255).all()
    assert np.array_equal(corner[32:, 32:], noise.read(0, 0, 32, 0.5))
    assert (noise.read(10_000, 0, 16, 0.7) == 255).all()


def test_alpha_is_composited_on_white():
    image = Image.new("RGBA", (4, 4), (100, 0, 200, 128))
    image.putpixel((0, 0), (9, 9, 9, 0))
    image = fallback.on_white(image)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.subtract(image.getpixel((1, 1)), (177, 127, 227))).max() <= 1


def test_within_one_percent_passes_through(noise):
    slide = Slide.open(noise.path, mpp=0.2525)
    plan = slide.plan(0.25)
    assert (plan.resampled, plan.mpp, plan.grid) == (False, 0.2525, 1)
    assert np.array_equal(slide.read(7, 9, 50, 0.25), noise.read(7, 9, 50, 0.5))
    assert slide.plan(1.0).grid == 4  # whole positions, though no level has them
    assert slide.plan(1.0).resampled is True
    assert slide.plan(1.0).mpp == 1.0
    always = slide.plan(0.25, resample="always")
    assert (always.resampled, always.mpp) == (True, 0.25)


def test_upsampling_is_bounded_and_recorded(noise):
    slide = Slide.open(noise.path, mpp=0.27)
    assert slide.plan(0.25) == (0, 1.0, 0.25, 1, True, 1)
    with pytest.raises(InputError, match=r"cannot serve 0\.2.*max_upsample=1\.1.*at least 0\.2455"):
        slide.read(0, 0, 16, 0.2)
    assert slide.read(0, 0, 16, 0.2, max_upsample=1.4).shape == (16, 16, 3)


def test_the_coarsest_level_that_is_fine_enough_is_read(noise):
    levels = {mpp: noise.plan(mpp).downsample for mpp in (0.5, 0.9, 1.0, 1.5, 3.9, 4.0, 9.0)}
    assert levels == {0.5: 1, 0.9: 1, 1.0: 2, 1.5: 2, 3.9: 2, 4.0: 8, 9.0: 8}


def test_a_ratio_that_edge_truncation_explains_is_whole(tmp_path):
    pixels = tissue_pixels(1003, 803)
    slide = Slide.open(write_slide(tmp_path / "cut.tiff", pixels, 0.5, (1, 4, 16)))
    with openslide.OpenSlide(slide.path) as peer:
        assert peer.level_downsamples[1] > 4.005
    assert slide.level_downsamples == (1, 4, 16)
    far = slide.read(800, 600, 40, 2.0).astype(float)
    assert np.abs(far - shrink(pixels, 4)[150:190, 200:240]).mean() < 6


def test_a_level_at_no_whole_multiple_of_level_0_is_resampled_even_at_its_own_mpp():
    """Whole level-0 pixels, where tiles lie, are no whole pixels of it."""
    plan = slide_module.plan_read(0.25, (1, 3.7), 0.25 * 3.7)
    assert (plan.level, plan.mpp, plan.grid, plan.resampled) == (1, 0.25 * 3.7, 1, True)
    plan = slide_module.plan_read(0.25, (1, 4.0), 0.25 * 4.03)
    assert (plan.level, plan.mpp, plan.grid, plan.resampled) == (1, 1.0, 4, False)


def test_large_regions_are_read_in_parts_that_agree(noise, monkeypatch):
    whole = noise.read(3, 5, 300, 0.7).astype(int)
    monkeypatch.setattr(slide_module, "BLOCK_PX", 5_000)
    parts = noise.read(3, 5, 300, 0.7)
    assert np.abs(whole - parts).max() <= 1


def test_thumbnail_has_exactly_the_scale_asked_for(plaid):
    assert plaid.thumbnail(8.0).shape == (48, 48, 3)
    assert plaid.thumbnail(5.0).shape == (77, 77, 3)  # 384 um: the last pixel is partly beyond the edge


def test_a_slide_travels_to_another_process_without_its_handle(noise, tmp_path):
    alpha = np.dstack([tissue_pixels(), np.full((512, 512), 255, np.uint8)])
    alpha = Slide.open(write_slide(tmp_path / "alpha.tiff", alpha, 0.5, extrasamples=["unassalpha"]))
    assert alpha.reader == "openslide"
    for slide in (noise, alpha):
        again = pickle.loads(pickle.dumps(slide))
        assert again._source is None and (again.peer is None or again.peer._handle is None)
        assert np.array_equal(again.read(5, 5, 20, 0.7), slide.read(5, 5, 20, 0.7))
        again.close()
        assert np.array_equal(again.read(5, 5, 20, 0.7), slide.read(5, 5, 20, 0.7))


def test_mpp_comes_from_the_file_or_from_the_caller(tmp_path):
    path = write_slide(tmp_path / "a.tiff", tissue_pixels(), 0.37)
    assert Slide.open(path).mpp == pytest.approx(0.37, rel=1e-3)
    assert Slide.open(path, mpp=0.5).mpp == 0.5


@pytest.mark.parametrize(
    ("mpp", "complaint"),
    [
        (None, r"no mpp.*'mpp' in the cohort, Slide\.open\(path, mpp=\.\.\.\), or mend the file"),
        (25_400 / 72, "no mpp"),  # 72 dpi is for printers
        ((0.5, 0.52), r"not square: 0\.5 x 0\.52 um"),
    ],
)
def test_a_scale_is_never_assumed(tmp_path, mpp, complaint):
    path = write_slide(tmp_path / "a.tiff", tissue_pixels(), mpp)
    with pytest.raises(InputError, match=complaint):
        Slide.open(path)
    assert Slide.open(path, mpp=0.5).mpp == 0.5


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), "fine"])
def test_an_impossible_mpp_is_refused(tmp_path, mpp):
    with pytest.raises(InputError, match=r"a\.tiff has mpp"):
        Slide.open(write_slide(tmp_path / "a.tiff", tissue_pixels()), mpp=mpp)


def test_what_is_no_slide_is_named(tmp_path):
    good = write_slide(tmp_path / "good.tiff", tissue_pixels()).read_bytes()
    files = {
        "empty.svs": (b"", "empty"),
        "text.svs": (b"slide_id,path\n", "no slide format"),
        "cut.tiff": (good[: len(good) // 3], "is cut short: 43 of 64 compressed tiles of level 0"),
        "photo.ome.tif": (b"II*\0" + b"\0" * 60, "cannot be read here .its directory.*OpenSlide refuses.*convert"),
    }
    for name, (content, complaint) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.*({complaint})"):
            slide = Slide.open(tmp_path / name)
            slide.read(slide.width_px - 64, slide.height_px - 64, 64, slide.mpp)
    with pytest.raises(InputError, match=r"gone\.svs does not exist"):
        Slide.open(tmp_path / "gone.svs")
    (tmp_path / "folder.svs").mkdir()
    with pytest.raises(InputError, match=r"folder\.svs is an empty folder"):
        Slide.open(tmp_path / "folder.svs")
    with pytest.raises(InputError, match="is a folder; give the slide file"):
        Slide.open(tmp_path)
    with pytest.raises(InputError, match="unknown scheme"):
        Slide.open("sftp://host/a.svs")
