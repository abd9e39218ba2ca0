"""Tile i is a pure function; positions are uniform given slide and mpp; mixtures hold slide by slide."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import chi2
from torch.utils.data import DataLoader

from pathfm import InputError, SlideIndex, TileStream, positions, sampling
from pathfm.sampling import audit

LEVEL = 1e-6  # of every test of a distribution; seeds are fixed


class MaskIndex(SlideIndex):
    """An index of masks that belong to no file: enough to plan tiles."""

    def __init__(self, masks: dict[str, np.ndarray], cell_px: int = 8, mpp: float = 1.0, levels: str = "1 2 4"):
        rows, start = [], 0
        packed = [positions.pack(mask) for mask in masks.values()]
        for (name, mask), words in zip(masks.items(), packed, strict=True):
            size = {"width_px": mask.shape[1] * cell_px, "height_px": mask.shape[0] * cell_px}
            place = {"cell_px": cell_px, "mask_start": start, "mask_words": words.shape[1]}
            rows.append(
                {"slide_id": name, "path": f"{name}.svs", "status": "ok", "mpp": mpp, "levels": levels, **size, **place}
            )
            start += words.size
        super().__init__("nowhere", pd.DataFrame(rows).assign(tissue_mm2=1.0))
        self._words = np.concatenate([words.ravel() for words in packed])


def irregular(seed: int = 0, side: int = 40) -> np.ndarray:
    """Lakes and peninsulas."""
    return gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), 3) > 0.02


def exact_per_cell(mask: np.ndarray, cell: int, side: int, min_tissue: float, grid: int = 1) -> np.ndarray:
    """Admissible corners in each mask cell, by trying every level-0 pixel of the grid."""
    fine = np.kron(mask, np.ones((cell, cell))).astype(np.int64)
    sums = np.pad(fine.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    area = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    admissible = np.zeros(fine.shape, bool)
    admissible[: area.shape[0] : grid, : area.shape[1] : grid] = (area >= min_tissue * side**2)[::grid, ::grid]
    height, width = mask.shape
    return admissible.reshape(height, cell, width, cell).sum(axis=(1, 3))


def uniformity(x: np.ndarray, y: np.ndarray, exact: np.ndarray, cell: int) -> float:
    """p of the draws per mask cell under equal chances for every admissible position; 0 for one outside."""
    seen = np.zeros_like(exact)
    np.add.at(seen, (y // cell, x // cell), 1)
    if seen[exact == 0].any():
        return 0.0
    order = np.argsort(exact[exact > 0])
    expected = (exact[exact > 0] / exact.sum() * len(x))[order]
    pooled = (np.cumsum(expected) // 10).astype(int)  # cells that expect little are counted together
    expected = np.bincount(pooled, expected)
    observed = np.bincount(pooled, seen[exact > 0][order])
    full = expected > 0
    statistic = ((observed[full] - expected[full]) ** 2 / expected[full]).sum()
    return chi2.sf(statistic, full.sum() - 1)


@pytest.fixture(scope="module")
def lonely() -> np.ndarray:
    """Tissue that a 64 px tile covers at one position only, when it must cover it wholly."""
    mask = np.zeros((40, 40), bool)
    mask[12:20, 21:29] = True
    return mask


def test_positions_are_uniform_given_slide_and_mpp():
    masks = {"lakes": irregular(0), "isles": irregular(1, 52)}
    stream = TileStream(MaskIndex(masks), tile_px=40, mpp=(1.0, 2.0, 1.6), seed=11)
    tiles = stream.names(range(120_000))
    for name, mask in masks.items():
        for mpp, side, grid in ((1.0, 40, 1), (2.0, 80, 2), (1.6, 64, 1)):
            chosen = tiles[(tiles["slide_id"] == name) & (tiles["mpp"] == mpp)]
            exact = exact_per_cell(mask, 8, side, 0.4, grid)
            assert (chosen[["x", "y"]].to_numpy() % grid == 0).all()
            assert exact.sum() == stream.positions().loc[name, mpp]
            assert uniformity(chosen["x"], chosen["y"], exact, 8) > LEVEL


def test_the_test_of_uniformity_catches_a_biased_sampler():
    """Choosing a mask cell first and a position in it second favours cells with few positions."""
    mask, rng = irregular(0), np.random.default_rng(0)
    exact = exact_per_cell(mask, 8, 40, 0.4)
    cells = np.argwhere(exact > 0)
    chosen = cells[rng.integers(len(cells), size=30_000)]
    assert uniformity(chosen[:, 1] * 8, chosen[:, 0] * 8, exact, 8) < LEVEL
    by_area = cells[rng.choice(len(cells), 30_000, p=exact[exact > 0] / exact.sum())]
    assert uniformity(by_area[:, 1] * 8, by_area[:, 0] * 8, exact, 8) > LEVEL


def test_one_admissible_position_is_always_found_and_none_is_left_out(lonely):
    masks = {"lakes": irregular(0), "lonely": lonely, "none": irregular(3) & (np.arange(40) < 7)}
    stream = TileStream(MaskIndex(masks), tile_px=64, mpp=1.0, min_tissue=1.0, seed=2)
    assert list(stream.slides["slide_id"]) == ["lakes", "lonely"]
    assert stream.left_out.to_numpy().tolist() == [["none", "no admissible position at 1 um/px"]]
    exact = exact_per_cell(masks["lakes"], 8, 64, 1.0)
    assert stream.positions()[1.0].tolist() == [exact.sum(), 1]
    assert (exact_per_cell(lonely, 8, 64, 1.0).sum(), exact_per_cell(masks["none"], 8, 64, 1.0).sum()) == (1, 0)
    tiles = stream.names(range(4_000))
    assert (tiles["tissue"] == 1).all()
    alone, lakes = tiles[tiles["slide_id"] == "lonely"], tiles[tiles["slide_id"] == "lakes"]
    assert set(zip(alone["x"], alone["y"], strict=True)) == {(21 * 8, 12 * 8)}
    assert uniformity(lakes["x"], lakes["y"], exact, 8) > LEVEL


def test_drawing_by_rank_is_as_uniform_as_by_proposal():
    """The two ways of drawing give the same distribution, so that mixing them does too."""
    mask = irregular(0)
    stream = TileStream(MaskIndex({"lakes": mask}), tile_px=40, mpp=1.0, seed=4)
    spot = stream._sampler.scales.spots.at([0])
    keys = [(np.uint64(4), np.uint64(i)) for i in range(1_500)]
    ranked = [stream._sampler._by_rank(key, 0, spot) for key in keys]
    x, y = np.array(ranked).T
    assert uniformity(x, y, exact_per_cell(mask, 8, 40, 0.4), 8) > LEVEL


def test_every_slide_once_per_round():
    stream = TileStream(MaskIndex({f"s{k}": irregular(k) for k in range(7)}), tile_px=32, mpp=1.0)
    ids = stream.names(range(70))["slide_id"].to_numpy().reshape(10, 7)
    assert all(len(set(turn)) == 7 for turn in ids)
    assert len({tuple(turn) for turn in ids}) == 10  # each in another order


def test_orders_of_slides_are_equally_likely():
    turns = [tuple(sampling.permuted(np.uint64(9), np.uint64(t), j, 4) for j in range(4)) for t in range(24_000)]
    _, counts = np.unique(turns, axis=0, return_counts=True)
    assert len(counts) == 24
    assert chi2.sf(((counts - 1000) ** 2 / 1000).sum(), 23) > LEVEL


def test_philox_gives_the_published_answers():
    """Known answers of Random123 (kat_vectors, philox4x32 10)."""
    ones, none = np.uint64(2**64 - 1), np.uint64(0)
    assert [hex(w) for w in sampling.philox(none, none, none)] == ["0xe169c58d6627e8d5", "0x9b00dbd8bc57ac4c"]
    assert [hex(w) for w in sampling.philox(ones, ones, ones)] == ["0x41c83b0e408f276d", "0x6d5451fda20bc7c6"]


def test_mixtures_hold_on_every_slide_by_what_it_can_serve():
    """`small` is too small for 2 um/px: it serves the other two in their declared ratio."""
    masks = {"large": irregular(0, 60), "small": np.ones((10, 10), bool)}
    declared = {1.0: 0.2, 1.5: 0.3, 2.0: 0.5}
    stream = TileStream(MaskIndex(masks), tile_px=48, mpp=declared, seed=8)
    tiles = stream.names(range(40_000))
    counts = tiles.groupby(["slide_id", "mpp"]).size().unstack(fill_value=0)
    for name, shares in {"large": (0.2, 0.3, 0.5), "small": (0.4, 0.6, 0.0)}.items():
        expected, seen = 20_000 * np.array(shares), counts.loc[name].to_numpy()
        assert (seen[expected == 0] == 0).all()
        expected, seen = expected[expected > 0], seen[expected > 0]
        assert chi2.sf(((seen - expected) ** 2 / expected).sum(), len(expected) - 1) > LEVEL
    assert stream.mixture["declared"].tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert stream.mixture["achieved"].tolist() == pytest.approx([0.3, 0.45, 0.25])
    assert stream.mixture["slides"].tolist() == [2, 2, 1]
    assert stream.served.to_numpy().tolist() == [["large", 1.0, 2.0], ["small", 1.0, 1.5]]
    common = TileStream(MaskIndex(masks), tile_px=48, mpp=declared, common_mpp=True)
    assert common.slides["slide_id"].tolist() == ["large"]
    assert common.left_out["reason"][0] == "no admissible position at 2 um/px"


def test_fixed_pairs_per_slide_are_nested():
    masks = {f"s{k}": irregular(k) for k in range(3)}
    settings = {"tile_px": 32, "mpp": (1.0, 2.0), "seed": 5}
    where = ["slide_id", "mpp", "x", "y"]
    pairs = {}
    for n in (4, 16):
        tiles = TileStream(MaskIndex(masks), tiles_per_slide=n, **settings).names(range(3_000))
        pairs[n] = set(tiles[where].itertuples(index=False, name=None))
        assert tiles[where].drop_duplicates().groupby("slide_id").size().tolist() == [n] * 3
        assert tiles.groupby(where).size().min() > 0.4 * 1000 / n
    assert pairs[4] < pairs[16]
    fewer = TileStream(MaskIndex({"s1": masks["s1"]}), tiles_per_slide=4, **settings).names(range(200))
    assert set(fewer[where].itertuples(index=False, name=None)) == {p for p in pairs[4] if p[0] == "s1"}


def test_every_tile_is_admissible_and_what_its_name_says(index):
    stream = TileStream(index, tile_px=96, mpp=(0.25, 0.5, 0.7, 1.0), seed=1)
    for tile in (stream[i] for i in range(16)):
        assert tile.image.shape == (96, 96, 3)
        assert stream.name(tile.i) == tile[1:]
        slide = index.slide(tile.slide_id)
        assert np.array_equal(tile.image, slide.read(tile.x, tile.y, 96, tile.mpp))
        decoded = [slide.mpp * down * scale for down in slide.level_downsamples for scale in slide.scales]
        assert tile.resampled == (tile.mpp not in decoded)
        side = 96 * tile.mpp / slide.mpp
        assert 0 <= tile.x <= slide.width_px - side
        mask, um_per_px = index.mask(tile.slide_id)
        fine = np.kron(mask, np.ones((int(um_per_px / slide.mpp),) * 2))
        assert tile.tissue == pytest.approx(
            fine[tile.y : tile.y + int(side), tile.x : tile.x + int(side)].mean(), abs=0.02
        )
        assert tile.tissue >= 0.4


def digest(tiles) -> str:
    """One hash of the pixels and names of tiles."""
    parts = [np.ascontiguousarray(tile.image).tobytes() + repr(tuple(tile[1:])).encode() for tile in tiles]
    return hashlib.sha256(b"".join(parts)).hexdigest()


ELSEWHERE = """
import sys; sys.path[:0] = {path!r}
from test_stream import digest
from pathfm import SlideIndex, TileStream
stream = TileStream(SlideIndex.open({folder!r}), tile_px=64, mpp=(0.5, 0.8), seed=6)
print(digest(stream.__getitems__([40, 3, 17])))
"""


def test_the_same_tiles_in_any_order_and_process_and_from_a_saved_index(index):
    stream = TileStream(index, tile_px=64, mpp=(0.5, 0.8), seed=6)
    here = digest([stream[40], stream[3], stream[17]])
    assert digest(stream.__getitems__([17, 3, 40])[::-1]) == here
    assert digest(pickle.loads(pickle.dumps(stream)).__getitems__([40, 3, 17])) == here
    assert len(pickle.dumps(stream)) < 20_000  # the masks stay on disk
    script = ELSEWHERE.format(path=[p for p in sys.path if p], folder=str(index.folder))
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    assert digest(TileStream(index, tile_px=64, mpp=(0.5, 0.8), seed=7).__getitems__([40, 3, 17])) != here


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_any_number_of_workers_gives_the_same_batches(index):
    stream = TileStream(index, tile_px=64, mpp=(0.5, 0.8), seed=6)
    runs = []
    for workers in (0, 1, 3):
        loader = DataLoader(stream, batch_size=4, sampler=range(100, 112), num_workers=workers)
        runs.append([(b.image.numpy().tobytes(), b.slide_id, b.x.tolist(), b.mpp.tolist()) for b in loader])
    assert runs[0] == runs[1] == runs[2]
    batch = next(iter(DataLoader(stream, batch_size=4)))
    assert (batch.image.shape, str(batch.image.dtype)) == ((4, 64, 64, 3), "torch.uint8")
    assert batch.i.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"mpp": 0.05}, "no slide serves a tile.*no admissible position at 0.05"),
        ({"tile_px": 100_000}, "no slide serves a tile of 100000 px"),
        ({"tile_px": 0}, "tile_px=0"),
        ({"tile_px": 25.6}, "tile_px=25.6"),
        ({"min_tissue": 40}, "min_tissue=40 is no share"),
        ({"mpp": {0.5: -1}}, "positive weight"),
        ({"mpp": ()}, "positive weight|several"),
        ({"tiles_per_slide": 0}, "tiles_per_slide=0"),
        ({"resample": "never"}, "neither 'auto' nor 'always'"),
        ({"max_upsample": 0.5}, "max_upsample=0.5"),
    ],
)
def test_settings_that_cannot_be(index, settings, complaint):
    with pytest.raises(InputError, match=complaint):
        TileStream(index, **settings)
    with pytest.raises(IndexError, match="between 0 and"):
        TileStream(index, tile_px=64)[-1]


def test_the_audit_counts_what_a_run_saw(index):
    stream = TileStream(index, tile_px=64, mpp=(0.5, 1.0), seed=3)
    report = audit(stream, range(80))
    tiles = stream.names(range(80))
    assert report["centre"]["tiles"].sum() == 80
    assert report["patient"]["share"].tolist() == report["patient"]["of_slides"].tolist()  # 20 rounds of 4
    assert report["mpp"]["tiles"].tolist() == tiles["mpp"].value_counts().sort_index().tolist()
    assert report["tissue"]["tiles"].sum() == 80
    slides = report["slides"].set_index("slide_id")
    for name, group in tiles.groupby("slide_id"):
        row = stream.slides.set_index("slide_id").loc[name]
        seen = np.zeros((row.height_px, row.width_px), int)
        for tile in group.itertuples():
            side = round(64 * tile.mpp / row.mpp)
            seen[tile.y : tile.y + side, tile.x : tile.x + side] += 1
        assert slides.loc[name, "overlap"] == pytest.approx(1 - (seen > 0).sum() / seen.sum(), abs=0.03)
        tissue = np.kron(index.mask(name)[0], np.ones((row.cell_px,) * 2))[: row.height_px, : row.width_px] > 0
        assert slides.loc[name, "coverage"] == pytest.approx((seen > 0)[tissue].mean(), abs=0.03)
    assert report["class"]["seen"].sum() == pytest.approx(1)
    assert np.abs(report["class"]["seen"] - report["class"]["tissue"]).max() < 0.15
