"""Damaged slides: whatever is done to the bytes of a file, it is read, or an InputError names it.

`python tests/damage.py 2000` tries so many; the tests try fewer.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from compressed_files import jpeg2000, texture, tiles_of, write_jpeg, write_jpeg2000
from slide_files import write_slide

from pathfm import InputError, Slide

LONGEST_S = 20  # a read that takes longer hangs


def sound(folder: Path) -> list[Path]:
    """Small slides of several codecs and containers."""
    pixels = texture(200, 136)
    streams = [jpeg2000(tile, True) for tile in tiles_of(pixels, 128)]
    slides = [
        write_jpeg(folder / "a.svs", pixels, side=64, levels=(1, 2)),
        write_jpeg(folder / "b.svs", pixels, "rgb", "none", side=64, shared=True, bigtiff=True),
        write_slide(folder / "c.tiff", pixels, 0.5, (1, 2), compression="lzw"),
        write_slide(folder / "d.tiff", pixels, 0.5, compression="deflate", predictor=True),
        write_jpeg2000(folder / "e.svs", streams, (200, 136), 128, 33005),
    ]
    return slides


def spoil(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut short, or with some bits changed, half of them near the file's beginning or end, where directories lie."""
    spoilt = bytearray(data)
    if rng.random() < 0.3:
        return bytes(spoilt[: rng.integers(0, len(data))])
    for _ in range(rng.integers(1, 9)):
        reach = len(data) if rng.random() < 0.5 else min(900, len(data))
        at = int(rng.integers(0, reach))
        spoilt[at if rng.random() < 0.5 else len(data) - 1 - at] ^= 1 << int(rng.integers(0, 8))
    return bytes(spoilt)


def outcome(path: Path) -> str:
    """ "read" or "named"; anything else is raised."""
    try:
        with Slide.open(path, mpp=0.5) as slide:
            for x, y in ((0, 0), (max(slide.width_px - 60, 0), max(slide.height_px - 60, 0))):
                assert slide.read(x, y, 64, 0.5).shape == (64, 64, 3)
                assert slide.read(x, y, 40, 0.8).shape == (40, 40, 3)
                assert slide.read(x, y, 30, 1.0).shape == (30, 30, 3)
    except InputError as error:
        assert path.name in str(error), error
        return "named"
    return "read"


def late(signum, frame):
    raise TimeoutError("a damaged slide is read without end")


def try_out(number: int, seed: int, folder: Path) -> Counter:
    """How `number` damaged files came out. Raises at the first that neither reads nor is named."""
    rng, outcomes = np.random.default_rng(seed), Counter()
    originals = [(path.suffix, path.read_bytes()) for path in sound(folder)]
    before = signal.signal(signal.SIGALRM, late)
    try:
        for k in range(number):
            suffix, data = originals[k % len(originals)]
            path = folder / f"spoilt{suffix}"
            path.write_bytes(spoil(data, rng))
            signal.alarm(LONGEST_S)
            outcomes[outcome(path)] += 1
    except Exception:
        print(f"damaged file number {k} of seed {seed}: {path}", file=sys.stderr)
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(dict(try_out(int(sys.argv[1]) if len(sys.argv) > 1 else 2000, 0, Path(temporary))))
