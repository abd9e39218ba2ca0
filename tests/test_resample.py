"""The resampler by itself, at sizes where its fast ways begin and end."""

import numpy as np
import pytest
from test_slide import cubic

from pathfm.resample import STRIP, TAPS, resample


@pytest.mark.parametrize("step", [1.0, 0.4, 0.83, 1.2, 1.5, 2.7, 5.3])
def test_every_size_agrees_with_a_float64_reference(step):
    """Sources smaller than the filter, single pixels, whole strips and a row more; one rounding is all there is."""
    rng = np.random.default_rng(0)
    sides = [1, 2, TAPS - 1, TAPS, TAPS + 1, 9, STRIP, STRIP + 1]
    for height, width in rng.choice(sides, (40, 2)):
        source = rng.integers(0, 256, (height, width, 3), np.uint8)
        left, top = rng.uniform(-0.5, 0.5, 2)
        rows, columns = (max(int((side + 1) / step), 1) for side in (height, width))
        down = cubic(source, top, step, rows)
        expected = cubic(down.swapaxes(0, 1), left, step, columns).swapaxes(0, 1)
        found = resample(source, left, top, step, np.empty((rows, columns, 3), np.uint8))
        np.testing.assert_allclose(found, np.clip(expected, 0, 255), atol=0.51)
