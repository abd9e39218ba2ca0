"""Damaged slides: whatever is done to the bytes of a file, it is read, or an InputError names it.

`python tests/damage.py 2000 9` tries so many, other ones for another second number; the tests try 2000. They are tried
in processes of their own, so that a crash or a hang, in whichever library, ends one of these and is named, and the file
that did it is kept.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from compressed_files import jpeg2000, texture, tiles_of, write_jpeg, write_jpeg2000
from slide_files import write_ome, write_philips, write_slide

from pathfm import InputError, Slide

LONGEST_S = 20  # a read that takes longer hangs
PART = 500  # files a process


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
        write_ome(folder / "f.ome.tif", pixels),
        write_philips(folder / "g.tiff", pixels),
    ]
    return slides


def spoil(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut short, or with some bits and bytes changed, half of them near the file's beginning or end, where directories
    lie.
    """
    spoilt = bytearray(data)
    if rng.random() < 0.3:
        return bytes(spoilt[: rng.integers(0, len(data))])
    for _ in range(rng.integers(1, 9)):
        reach = len(data) if rng.random() < 0.5 else min(900, len(data))
        at = int(rng.integers(0, reach))
        change = 1 << int(rng.integers(0, 8)) if rng.random() < 0.5 else int(rng.integers(1, 256))
        spoilt[at if rng.random() < 0.5 else len(data) - 1 - at] ^= change
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


def try_out(number: int, seed: int, folder: Path) -> Counter:
    """How `number` damaged files came out. Raises at the first that neither reads nor is named; a hang ends all.

    The last file tried stays in `folder`.
    """
    rng, outcomes = np.random.default_rng(seed), Counter()
    paths = sound(folder)
    assert {outcome(path) for path in paths} == {"read"}
    originals = [(path.suffix, path.read_bytes()) for path in paths]
    for k in range(number):
        suffix, data = originals[k % len(originals)]
        path = folder / f"spoilt{suffix}"
        for other in folder.glob("spoilt*"):
            other.unlink()
        path.write_bytes(spoil(data, rng))
        signal.alarm(LONGEST_S)
        outcomes[outcome(path)] += 1
    signal.alarm(0)
    return outcomes


def try_apart(number: int, seed: int) -> Counter:
    """`try_out` in a process of its own. Raises AssertionError that names the file, wherever that process ended."""
    folder = Path(tempfile.mkdtemp(prefix="damage-"))
    command = [sys.executable, __file__, "part", str(number), str(seed), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        last, how = next(folder.glob("spoilt*"), folder), ended.returncode
        reason = "hangs" if how == -signal.SIGALRM else f"ends the process with {how}: {ended.stderr[-2000:]}"
        raise AssertionError(f"{last} (seed {seed}) {reason}")
    shutil.rmtree(folder)
    return Counter(json.loads(ended.stdout))


def main(number: int = 2000, series: int = 0) -> Counter:
    """How so many damaged files came out, PART in a process."""
    outcomes = Counter()
    for first in range(0, number, PART):
        outcomes += try_apart(min(PART, number - first), 10**6 * series + first)
    return outcomes


if __name__ == "__main__":
    if sys.argv[1:2] == ["part"]:
        print(json.dumps(try_out(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
    else:
        print(dict(main(*map(int, sys.argv[1:]))))
