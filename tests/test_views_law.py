"""The law of the views: that of DINO's transforms, put together from torchvision and Pillow, tile by tile."""

import functools
import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
from torchvision import transforms as T

from pathfm import augment
from pathfm.augment import MultiCrop
from pathfm.config import PretrainConfig

TILES, SIDE, GLOBAL, LOCAL = 300, 72, 64, 32
CONFIG = PretrainConfig(init="random", tile_px=SIDE, global_px=GLOBAL, local_px=LOCAL, local_views=1)
LEAST_P = 1e-3  # of Kolmogorov and Smirnov's test; seeds are fixed


@functools.cache
def tiles(n: int = TILES) -> torch.Tensor:
    """Clouds and grain in pink and violet, all of one law, so that what differs in views is what was done to them."""
    generator = np.random.default_rng(0)
    drawn, grain = generator.normal(size=(n, 2, SIDE, SIDE)), 0.04 * generator.normal(size=(n, SIDE, SIDE, 1))
    wave = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)) + 1 / SIDE
    clouds = np.fft.ifft2(np.fft.fft2(drawn) / wave).real
    clouds /= clouds.std((2, 3), keepdims=True)
    light = np.einsum("nkyx,kc->nyxc", clouds, [[0.06, 0.11, 0.07], [0.04, 0.0, -0.04]])
    return torch.from_numpy(((light + grain + [0.75, 0.5, 0.68]).clip(0, 1) * 255).round().astype(np.uint8))


# The reference: main_dino.py's transforms

CHANCE = random.Random(0)


def blurred(image: Image.Image, probability: float) -> Image.Image:
    if CHANCE.random() >= probability:
        return image
    return image.filter(ImageFilter.GaussianBlur(CHANCE.uniform(0.1, 2.0)))


def solarised(image: Image.Image, probability: float) -> Image.Image:
    return ImageOps.solarize(image) if CHANCE.random() < probability else image


def pipeline(px: int, scale: tuple[float, float], blur: float, solarise: float) -> T.Compose:
    return T.Compose(
        [
            T.RandomResizedCrop(px, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(0.5),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.Lambda(lambda image: blurred(image, blur)),
            T.Lambda(lambda image: solarised(image, solarise)),
            T.ToTensor(),
            T.Normalize(0.5, 0.5),
        ]
    )


REFERENCE = {
    "first global": pipeline(GLOBAL, (0.4, 1.0), 1.0, 0.0),
    "second global": pipeline(GLOBAL, (0.4, 1.0), 0.1, 0.2),
    "local": pipeline(LOCAL, (0.05, 0.4), 0.5, 0.0),
}


def looks(views: torch.Tensor) -> dict[str, np.ndarray]:
    """What a view (n, 3, h, w) looks like, a number each: means and spreads by channel, colour, detail, side."""
    grey, half = views.mean(1), views.shape[-1] // 2
    found = {f"mean of {c}": views[:, k].mean((1, 2)) for k, c in enumerate("RGB")}
    found |= {f"spread of {c}": views[:, k].std((1, 2)) for k, c in enumerate("RGB")}
    found["colour"] = (views.amax(1) - views.amin(1)).mean((1, 2))
    found["gradient energy"] = (grey.diff(dim=1).square().mean((1, 2)) + grey.diff(dim=2).square().mean((1, 2))).log()
    found["left less right"] = (grey[..., :half] - grey[..., half:]).mean((1, 2))
    return {name: value.numpy() for name, value in found.items()}


def ours(config: PretrainConfig, images: torch.Tensor) -> dict[str, dict[str, np.ndarray]]:
    views = MultiCrop(config)(images, torch.ones(len(images)), torch.Generator().manual_seed(1))
    return dict(zip(REFERENCE, map(looks, (*views.global_, views.local[0])), strict=True))


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    CHANCE.seed(0)
    images = [Image.fromarray(image.numpy()) for image in tiles()]
    return {kind: looks(torch.stack([change(image) for image in images])) for kind, change in REFERENCE.items()}


def p_values(found: dict, wanted: dict) -> dict[tuple[str, str], float]:
    return {
        (kind, name): stats.ks_2samp(found[kind][name], values).pvalue
        for kind, by_name in wanted.items()
        for name, values in by_name.items()
    }


def test_views_look_as_those_of_torchvisions_pipeline(reference):
    p = p_values(ours(CONFIG, tiles()), reference)
    assert len(p) == 27 and min(p.values()) > LEAST_P, sorted(p.items(), key=lambda one: one[1])[:3]


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({"jitter": 0.5}, "second global"),
        ({"brightness": 0.2}, "second global"),
        ({"grayscale": 0.0}, "local"),
        ({"blur": (0.7, 0.1, 0.5)}, "first global"),
        ({"blur": (1.0, 0.1, 0.2)}, "local"),
        ({"blur_sigma_px": (0.1, 1.5)}, "first global"),
        ({"solarise": 0.05}, "second global"),
    ],
    ids=lambda given: "".join(given) if isinstance(given, dict) else "",
)
def test_other_settings_are_noticed(fields, kind, reference):
    """Or the test above could not fail. What hardly shows in these looks is tested apart: scales of crops, hue."""
    p = p_values(ours(CONFIG.replace(**fields), tiles()), reference)
    assert min(value for (of, _), value in p.items() if of == kind) < LEAST_P


# What the means of whole views can hardly tell: which change came when, and how strong it was


def test_jitter_falls_on_as_many_views_in_every_order_alike(monkeypatch):
    """Each of the four changes appends its number to what stands in a black tile: their order is read from a view."""
    for digit, name in enumerate(("brightness", "contrast", "saturation", "hue"), 1):
        monkeypatch.setattr(augment, name, lambda x, amount, digit=digit: 5 * x + digit)
    plain = CONFIG.replace(tile_px=18, global_px=16, local_px=16, local_views=8, grayscale=0.0, solarise=0.0)
    black = torch.zeros(300, 18, 18, 3, dtype=torch.uint8)
    views = MultiCrop(plain.replace(blur=(0.0, 0.0, 0.0)))(black, torch.ones(300), torch.Generator().manual_seed(0))
    read = (torch.cat([views.global_, views.local])[..., 0, 8, 8] * 0.5 + 0.5).round().int().flatten().numpy()
    orders = {sum(d * 5 ** (3 - k) for k, d in enumerate(order)): 0 for order in itertools.permutations((1, 2, 3, 4))}
    assert set(read) <= {0, *orders}
    assert stats.binomtest(int((read > 0).sum()), len(read), CONFIG.jitter).pvalue > LEAST_P
    counts = [int((read == order).sum()) for order in orders]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > LEAST_P


def test_amounts_of_jitter_and_blur_have_torchvisions_laws(monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}

    def noting(name):
        return lambda x, amount: seen.setdefault(name, []).append(amount.flatten()) or x

    names = ("brightness", "contrast", "saturation", "hue", "gaussian_blur")
    for name in names:
        monkeypatch.setattr(augment, name, noting(name))
    black = torch.zeros(600, SIDE, SIDE, 3, dtype=torch.uint8)
    config = CONFIG.replace(grayscale=0.0, global_px=16, local_px=16)
    MultiCrop(config)(black, torch.ones(600), torch.Generator().manual_seed(0))
    amounts = {name: torch.cat(parts).numpy() for name, parts in seen.items()}
    torch.manual_seed(0)
    jitter = T.ColorJitter(0.4, 0.4, 0.2, 0.1)
    drawn = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(1500)]
    wanted = dict(zip(names, np.array([one[1:] for one in drawn]).T, strict=False))
    wanted["gaussian_blur"] = np.array([T.GaussianBlur.get_params(0.1, 2.0) for _ in range(1500)])
    for name, values in wanted.items():
        assert stats.ks_2samp(amounts[name], values).pvalue > LEAST_P, name
    blurs = [len(part) for part in seen["gaussian_blur"]]
    for n, share in ((blurs[0] - 600, 0.1), (blurs[1], 0.5)):  # of second global and of local views; all first ones
        assert stats.binomtest(n, 600, share).pvalue > LEAST_P
