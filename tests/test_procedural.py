"""The non-histology stand-in is deterministic, varied, and has the spectrum it claims."""

import numpy as np

from pathfm.procedural import DeadLeaves, pink_noise


def test_an_image_is_a_pure_function_of_seed_and_index():
    first, again, other = DeadLeaves(64, seed=1), DeadLeaves(64, seed=1), DeadLeaves(64, seed=2)
    assert np.array_equal(first[5].image, again[5].image)
    assert np.array_equal(first.__getitems__([3, 5])[1].image, first[5].image)
    assert not np.array_equal(first[5].image, first[6].image)
    assert not np.array_equal(first[5].image, other[5].image)
    assert first[5].image.shape == (64, 64, 3)
    assert first[5].image.dtype == np.uint8


def test_pink_noise_falls_off_as_one_over_f():
    power = np.mean([np.abs(np.fft.rfft2(pink_noise(np.random.default_rng(i), 64))) ** 2 for i in range(50)], axis=0)
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None])
    inside = (frequency > 0.03) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[inside]), np.log(power[inside]), 1)[0]
    assert abs(slope + 2) < 0.1, "amplitude 1/f is power 1/f^2"


def test_images_differ_in_colour_as_tissue_does_not():
    hues = np.array([DeadLeaves(48, seed=0)[i].image.mean((0, 1)) for i in range(40)])
    assert np.all(hues.std(0) > 15)
    share_greenest = (hues.argmax(1) == 1).mean()
    assert share_greenest > 0.1, "stained tissue is never greenest"
