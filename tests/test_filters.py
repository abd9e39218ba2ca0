"""The tile filter: positions drawn anew until their pixels pass, and what is kept when they never do."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import chi2
from test_stream import LEVEL, MaskIndex, digest, exact_per_cell, irregular, uniformity

from pathfm import InputError, TileStream
from pathfm.filters import HsvFilter
from pathfm.sampling import audit

WHERE = ["slide_id", "mpp", "x", "y"]


class Painted(TileStream):
    """A stream whose pixels are told by the position: stained in every other column of 32 px, else grey."""

    def _read(self, numbers, named, foresee=True) -> list[tuple]:
        colours = {True: (200, 120, 190), False: (200, 200, 200)}
        shape = (self.context_px,) * 2 + (3,)
        return [(name, np.full(shape, colours[name.x // 32 % 2 == 1], np.uint8)) for name in named(numbers)]


def test_filtered_positions_are_uniform_over_those_that_pass():
    mask = irregular(0)
    stream = Painted(MaskIndex({"lakes": mask}), tile_px=40, mpp=1.0, tile_filter=HsvFilter(redraws=30), seed=7)
    n = 20_000
    tiles = stream.names(range(n))
    assert tiles["passes"].all() and (tiles["x"] // 32 % 2 == 1).all()
    exact = exact_per_cell(mask, 8, 40, 0.4) * (np.arange(40) // 4 % 2)
    assert uniformity(tiles["x"], tiles["y"], exact, 8) > LEVEL
    first = exact.sum() / exact_per_cell(mask, 8, 40, 0.4).sum()  # share that passes
    wanted = n * first * (1 - first) ** np.arange(6)
    seen = np.bincount(tiles["redraws"])[:6]
    assert chi2.sf(((seen - wanted) ** 2 / wanted).sum(), 5) > LEVEL
    plain = TileStream(MaskIndex({"lakes": mask}), tile_px=40, mpp=1.0, seed=7).names(range(n))
    kept = tiles["redraws"] == 0
    assert (tiles.loc[kept, WHERE] == plain.loc[kept, WHERE]).all(axis=None)  # what passes at once is not drawn anew


def test_when_redraws_run_out_the_last_tile_stays_and_is_counted():
    mask = irregular(0)
    stream = Painted(MaskIndex({"a": mask, "b": mask}), 40, (1.0, 2.0), tile_filter=HsvFilter(redraws=1), seed=7)
    tiles = stream.names(range(4_000))
    plain = TileStream(stream.index, 40, (1.0, 2.0), seed=7).names(range(4_000))
    assert (tiles[["slide_id", "mpp"]] == plain[["slide_id", "mpp"]]).all(axis=None)  # rounds and mixture stay
    failed = tiles[~tiles["passes"]]
    grey = [1 - (passing(mask, 40 * mpp, mpp)) for mpp in (1, 2)]
    wanted = np.mean(np.square(grey))  # of either mpp the share that is grey twice
    assert (failed["redraws"] == 1).all()
    assert abs(len(failed) / 4_000 - wanted) < 5 * np.sqrt(wanted / 4_000)
    report = audit(stream, range(4_000))["filter"].iloc[0]
    assert report["passed_at_once"] == pytest.approx((tiles["redraws"] == 0).mean())
    assert report["kept_though_rejected"] == len(failed)
    assert audit(TileStream(stream.index, 40, 1.0), range(10)).keys() == report_keys(audit(stream, range(10)))


def passing(mask: np.ndarray, side: int, grid: int) -> float:
    """The share of admissible positions that Painted paints as stained."""
    exact = exact_per_cell(mask, 8, side, 0.4, grid)
    return (exact * (np.arange(40) // 4 % 2)).sum() / exact.sum()


def report_keys(report: dict) -> set:
    return set(report) - {"filter"}


def test_the_filter_is_midnights():
    """At least 60 % of pixels with hue 90..180, saturation 8..255, value 103..255 in OpenCV's units."""
    tile = np.full((10, 10, 3), 200, np.uint8)
    passes = HsvFilter.of("midnight")
    assert not passes(tile)
    tile[:6] = (200, 120, 190)  # hue 154
    assert passes(tile)
    tile[5, :1] = (120, 200, 130)  # green
    assert not passes(tile)
    tile[5, :1] = (102, 60, 100)  # too dark
    assert not passes(tile)
    tile[5, :1] = (104, 60, 100)
    assert passes(tile)


def test_a_filtered_stream_is_pure_and_reads_what_it_names(index, tmp_path):
    filter = HsvFilter(hue=(0, 180), saturation=(0, 255), value=(0, 225), share=0.85, redraws=3)
    settings = {"tile_px": 64, "mpp": "loguniform(0.5, 1.5)", "seed": 6, "balance": "patient", "context_px": 80}
    stream = TileStream(index, tile_filter=filter, slide_weights="tissue_mm2", **settings)
    tiles = stream.__getitems__(range(12))
    names = stream.names(range(12))
    assert names["redraws"].max() > 0 and names["passes"].any()
    assert [tile[1:] for tile in tiles[:4]] == [stream.name(i) for i in range(4)]
    here = digest([tiles[4], tiles[11], tiles[9]])
    assert digest([stream[4], stream[11], stream[9]]) == here
    (tmp_path / "stream").write_bytes(pickle.dumps(stream))
    assert len(pickle.dumps(stream)) < 30_000
    script = (
        f"import sys, pickle; sys.path[:0] = {[p for p in sys.path if p]!r}; from test_stream import digest\n"
        f"stream = pickle.load(open({str(tmp_path / 'stream')!r}, 'rb'))\n"
        "tiles = stream.__getitems__([11, 9, 4]); print(digest([tiles[2], tiles[0], tiles[1]]))"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (HsvFilter(value=(254, 255), share=1.0, redraws=1), "rejects all of 16 positions"),
        ("midnigth", "Did you mean 'midnight'"),
        ({"hue": (100, 90)}, "hue=.* rising"),
        ({"share": 60}, "share=60"),
        ({"redraws": -1}, "redraws=-1"),
    ],
)
def test_filters_that_cannot_be(index, given, message):
    with pytest.raises(InputError, match=message):
        TileStream(index, tile_px=64, tile_filter=HsvFilter(**given) if isinstance(given, dict) else given)
