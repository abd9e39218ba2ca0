"""Figures are written twice alike, at a size a repository can hold, with a scale bar that tells the truth."""

import base64
import io
import re

import cv2
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import pytest

from pathfm import InputError, figures

pytestmark = pytest.mark.usefixtures("style")


@pytest.fixture
def noise_figure(monkeypatch):
    """A small figure that counts as large: finding 256 colours for noise takes long."""
    monkeypatch.setattr(figures, "LARGE", 40_000)

    def draw():
        fig, ax = plt.subplots(figsize=(2, 1.6))
        noise = np.random.default_rng(0).integers(0, 255, (150, 225, 3), np.uint8)
        figures.image(ax, noise, um_per_px=0.5, title="noise")
        return fig

    return draw


def test_the_same_figure_is_the_same_bytes(tmp_path, noise_figure):
    for folder in ("one", "two"):
        figures.save(noise_figure(), "noise", tmp_path / folder)
    for name in ("noise.svg", "noise.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_large_pictures_are_kept_small_and_still_look_the_same(tmp_path, noise_figure):
    fig = noise_figure()
    plain = io.BytesIO()
    fig.savefig(plain, format="png")
    path = figures.save(fig, "noise", tmp_path)
    assert len(plain.getvalue()) > figures.LARGE
    assert path.stat().st_size < 0.6 * len(plain.getvalue())
    with PIL.Image.open(path) as small, PIL.Image.open(plain) as full:
        difference = np.abs(np.asarray(small.convert("RGB"), float) - np.asarray(full.convert("RGB"), float))
    assert difference.mean() < 16  # of 255, for noise of every colour; histology has few


def embedded_in(svg):
    """The pictures of an SVG, each (format, pixels)."""
    found = re.findall(rb"data:image/(\w+);base64,([^\"]+)", svg.read_bytes())
    opened = ((kind.decode(), PIL.Image.open(io.BytesIO(base64.b64decode(data)))) for kind, data in found)
    return [(kind, np.asarray(picture.convert("RGB")).astype(int)) for kind, picture in opened]


def test_tissue_in_an_svg_is_a_small_jpeg_and_a_map_of_classes_stays_exact(tmp_path):
    rng = np.random.default_rng(0)
    tissue = cv2.GaussianBlur(rng.normal((225, 140, 190), 90, (600, 600, 3)), (0, 0), 3).clip(0, 255).astype(np.uint8)
    classes = rng.integers(0, 2, (600, 600, 1), np.uint8) * np.uint8([[[200, 90, 30]]])
    for name, pixels in (("tissue", tissue), ("classes", classes)):
        fig, ax = plt.subplots(figsize=(6, 6))
        ax.imshow(pixels, interpolation="none")
        figures.save(fig, name, tmp_path)
    [(kind, shown)] = embedded_in(tmp_path / "tissue.svg")
    assert kind == "jpeg" and np.abs(shown - tissue).mean() < 3
    [(kind, shown)] = embedded_in(tmp_path / "classes.svg")
    assert kind == "png" and np.array_equal(shown, classes)


def png_of(pixels):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_legend_keeps_its_colours_beside_tissue():
    pixels = np.random.default_rng(0).normal((225, 140, 190), 25, (300, 300, 3)).clip(0, 255).astype(np.uint8)
    legend = {"pen": (0, 158, 115), "fold": (213, 94, 0), "blur": (230, 194, 41)}
    for row, rgb in enumerate(legend.values()):
        pixels[10 * row : 10 * row + 6, :12] = rgb
    with PIL.Image.open(io.BytesIO(figures.compact(png_of(pixels)))) as small:
        kept = np.asarray(small.convert("RGB")).astype(int)
    for row, rgb in enumerate(legend.values()):
        assert np.abs(kept[10 * row + 3, 6] - rgb).max() < 20


def test_what_is_transparent_stays_so():
    pixels = np.zeros((50, 50, 4), np.uint8)
    assert figures.compact(png_of(pixels)) == png_of(pixels)


def test_figures_go_where_they_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_FIGURES", str(tmp_path / "there"))
    figures.save(plt.figure(), "empty")
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["empty.png", "empty.svg"]


@pytest.mark.parametrize(("um", "nice"), [(1, 1), (49.9, 20), (50, 50), (999, 500), (1000, 1000), (0.3, 0.2)])
def test_a_scale_bar_has_a_round_length(um, nice):
    assert figures.round_length(um) == pytest.approx(nice)


def test_a_scale_bar_is_as_long_as_it_says():
    fig, ax = plt.subplots()
    ax.imshow(np.zeros((100, 200, 3)))
    figures.scale_bar(ax, um_per_px=0.5, length_um=20)
    assert np.ptp(ax.lines[0].get_xdata()) == pytest.approx(40)
    assert ax.texts[0].get_text() == "20 µm"


def test_an_unknown_colour_offers_the_nearest():
    assert figures.colour("stroma").startswith("#")
    with pytest.raises(InputError, match="no colour is fixed for 'stromma'. Did you mean 'stroma'"):
        figures.colour("stromma")
