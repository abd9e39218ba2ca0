"""Continuous laws of mpp, weights of positions, context and scales: each with its distribution."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from scipy.stats import chi2, chi2_contingency, kstest
from test_stream import LEVEL, MaskIndex, exact_per_cell, irregular, uniformity

from pathfm import InputError, TileStream, positions, sampling, scales
from pathfm.balance import WeightMaps
from pathfm.filters import HsvFilter
from pathfm.sampling import audit

WHERE = ["slide_id", "mpp", "x", "y"]


def plain(a: int, b: int) -> np.ndarray:
    """A mask of integer arithmetic, the same everywhere."""
    y, x = np.mgrid[:30, :40]
    return (x * a + y * b) % 11 < 6


def test_default_settings_give_the_tiles_that_they_gave_before_there_were_others():
    """Recorded before this module knew weights, laws or filters; stored notebooks depend on it."""
    index = MaskIndex({"one": plain(3, 5), "two": plain(1, 7), "three": plain(2, 3)})
    numbers = [0, 1, 2, 3, 1000, 123456789]
    found = TileStream(index, tile_px=40, mpp=(1.0, 2.0, 1.6), seed=11).names(numbers)
    assert found[WHERE].to_numpy().tolist() == [
        ["one", 2.0, 132, 140], ["three", 2.0, 56, 98], ["two", 1.6, 12, 87], ["two", 1.6, 55, 108],
        ["two", 1.0, 184, 169], ["one", 2.0, 118, 20],
    ]  # fmt: skip
    found = TileStream(index, tile_px=40, mpp={1.0: 1, 2.0: 3}, tiles_per_slide=5, seed=11).names(numbers)
    assert found[WHERE].to_numpy().tolist() == [
        ["one", 1.0, 72, 180], ["three", 2.0, 140, 24], ["two", 2.0, 6, 8], ["two", 2.0, 150, 84],
        ["two", 2.0, 30, 140], ["one", 2.0, 114, 146],
    ]  # fmt: skip


# Continuous laws


@pytest.fixture(scope="module")
def sizes() -> MaskIndex:
    """480 px and 88 px of tissue at 1 um/px: a tile of 48 px fits the second up to 88 / 48 um/px."""
    return MaskIndex({"large": irregular(0, 60), "small": np.ones((11, 11), bool)})


@pytest.mark.parametrize("law", [scales.Uniform(1.1, 2.5), scales.LogUniform(1.1, 2.5), scales.MaxAvg(1.1, 2.5, 0.2)])
def test_a_continuous_mpp_is_the_law_given_what_the_slide_serves(sizes, law):
    stream = TileStream(sizes, tile_px=48, mpp=law, resample="always", seed=2)
    tiles = stream.names(range(8_000))
    assert tiles["resampled"].all()
    most = {"large": 2.5, "small": 88 / 48}
    for name, own in tiles.groupby("slide_id"):
        up_to = law.cdf(most[name])
        assert own["mpp"].max() <= most[name]
        assert kstest(own["mpp"], lambda x, up_to=up_to: law.cdf(x) / up_to).pvalue > LEVEL
        side = 48 * own["mpp"]
        assert ((own["x"] + side).max(), (own["y"] + side).max()) <= ((480, 480) if name == "large" else (88, 88))
    clipped = np.minimum(law.quantile(np.random.default_rng(0).random(4_000)), most["small"])
    assert kstest(clipped, lambda x: law.cdf(x) / law.cdf(most["small"])).pvalue < LEVEL  # clipping is no truncation
    assert stream.served["low"].tolist() == [1.1, 1.1]
    assert stream.served["high"].tolist() == pytest.approx([2.5, 88 / 48], abs=2e-6)
    mixture = stream.mixture
    seen = np.histogram(tiles["mpp"], [*mixture["low"], mixture["high"].iloc[-1]])[0]
    wanted = 8_000 * mixture["achieved"]
    assert mixture[["declared", "achieved"]].sum().tolist() == pytest.approx([1, 1])
    assert chi2.sf(((seen - wanted) ** 2 / wanted).sum(), len(wanted) - 1) > LEVEL
    assert mixture["slides"].tolist()[:3] == [2, 2, 2] and mixture["slides"].iloc[-1] == 1
    common = TileStream(sizes, tile_px=48, mpp=law, common_mpp=True)
    assert common.slides["slide_id"].tolist() == ["large"]
    assert "1.1 to 2.5 um/px but from 1.1 to 1.83" in common.left_out["reason"][0]


def test_atoms_of_minmax_stay_and_go_with_what_a_slide_serves(sizes):
    law = scales.MinMax(1.1, 2.5)
    tiles = TileStream(sizes, tile_px=48, mpp=law, resample="always", seed=3).names(range(20_000))
    large, small = (tiles.loc[tiles["slide_id"] == name, "mpp"] for name in ("large", "small"))
    for own, up_to in ((large, 1.0), (small, law.cdf(88 / 48))):
        n, ends = len(own), [(own == 1.1).sum(), (own == 2.5).sum()]
        wanted = [n * law.atom / up_to, n * law.atom if up_to == 1 else 0]
        assert np.abs(np.subtract(ends, wanted)).max() < 5 * np.sqrt(n / 4)
        inside = own[(own > 1.1) & (own < 2.5)]
        assert (
            kstest(np.log(inside / 1.1) / np.log(min(2.5, 88 / 48 if up_to < 1 else 9) / 1.1), "uniform").pvalue > LEVEL
        )


def test_a_level_passes_through_within_one_per_cent_of_a_drawn_mpp(sizes):
    tiles = TileStream(sizes, tile_px=48, mpp="uniform(0.95, 2.2)", seed=3).names(range(20_000))
    assert set(tiles.loc[~tiles["resampled"], "mpp"]) == {1.0, 2.0}
    assert (tiles.loc[tiles["mpp"] == 2.0, ["x", "y"]] % 2 == 0).all(axis=None)
    resampled = tiles.loc[tiles["resampled"], "mpp"]
    assert not (((resampled - 1).abs() < 0.01) | ((resampled - 2).abs() < 0.02)).any()
    large = tiles[tiles["slide_id"] == "large"]
    assert abs((large["mpp"] == 2.0).mean() - 0.04 / 1.25) < 5 * np.sqrt(0.032 / 10_000)


def test_positions_are_uniform_at_a_drawn_mpp_too(sizes):
    """With a law so narrow that every tile of 40 px covers the same 52 pixels, counted exactly."""
    law = scales.Uniform(1.3, 1.3 + 2e-6)
    stream = TileStream(sizes, tile_px=40, mpp=law, seed=4)
    tiles = stream.names(range(40_000))
    own = tiles[tiles["slide_id"] == "large"]
    assert uniformity(own["x"], own["y"], exact_per_cell(irregular(0, 60), 8, 52, 0.4), 8) > LEVEL


def test_an_mpp_without_a_position_is_drawn_again():
    """Stripes of 32 px tissue and 16 px glass: sides near multiples of 48 px never hold 70 % tissue."""
    mask = np.tile(np.arange(48) % 6 < 4, (17, 1))
    law = scales.Uniform(1.02, 4.0)
    stream = TileStream(MaskIndex({"stripes": mask}), tile_px=32, mpp=law, min_tissue=0.7, resample="always", seed=1)
    mpp = stream.names(range(2_000))["mpp"].to_numpy()
    edges = np.linspace(1.02, 4.0, 150_000)
    side = 32 * edges
    whole, rest = np.divmod(side, 48)
    served = (whole * 32 + np.minimum(rest, 32)) / side >= 0.7  # most tissue that a square of this side can cover
    bins = np.linspace(1.02, 4.0, 41)
    wanted = np.histogram(edges[served], bins)[0] / served.sum() * len(mpp)
    seen = np.histogram(mpp, bins)[0]
    assert 0 < (wanted == 0).sum() < 40 and seen[wanted < 0.5].sum() <= 2
    there = wanted > 5
    assert chi2.sf(((seen - wanted)[there] ** 2 / wanted[there]).sum(), there.sum() - 1) > LEVEL


def test_fixed_pairs_of_a_continuous_law_are_nested_and_worth_what_they_cover(sizes):
    settings = {"tile_px": 32, "mpp": "loguniform(1, 2)", "seed": 5}
    pairs = {}
    for n in (4, 16):
        stream = TileStream(sizes, tiles_per_slide=n, **settings)
        tiles = stream.names(range(2_000))
        pairs[n] = set(tiles[WHERE].itertuples(index=False, name=None))
        assert tiles[WHERE].drop_duplicates().groupby("slide_id").size().tolist() == [n, n]
        disjoint = audit(stream, range(2_000))["slides"].set_index("slide_id")["disjoint_tiles"]
        for name, own in tiles.groupby("slide_id"):
            seen = np.zeros((480, 480), bool)
            for tile in own.itertuples():
                seen[tile.y : tile.y + round(32 * tile.mpp), tile.x : tile.x + round(32 * tile.mpp)] = True
            assert disjoint[name] == pytest.approx(seen.sum() / ((32 * own["mpp"]) ** 2).mean(), rel=0.08, abs=0.25)
    assert pairs[4] < pairs[16]
    one = TileStream(sizes, tile_px=32, mpp=1.0, tiles_per_slide=1, seed=6)
    assert audit(one, range(100))["slides"]["disjoint_tiles"].tolist() == pytest.approx([1, 1], abs=0.15)


def test_the_audit_counts_a_law_by_its_bins(sizes):
    stream = TileStream(sizes, tile_px=48, mpp="uniform(1.1, 2.5)", seed=1)
    table = audit(stream, range(500))["mpp"]
    assert table["tiles"].sum() == 500 and len(table) == scales.BINS
    assert (table["share"] - table["achieved"]).abs().max() < 0.1


# Independence


def test_positions_and_scales_of_a_slide_are_independent_draws():
    """From one round to the next, and of slides that lie side by side in a round: quarter of the slide and mpp."""
    masks = {f"s{k}": irregular(k) for k in range(3)}
    tiles = TileStream(MaskIndex(masks), tile_px=40, mpp=(1.0, 2.0), seed=13).names(range(60_000))
    quarter = (tiles["x"] + 20 * tiles["mpp"] > 160) * 2 + (tiles["y"] + 20 * tiles["mpp"] > 160)
    state = (2 * quarter + (tiles["mpp"] > 1.5)).to_numpy()
    of_slide = {name: state[tiles["slide_id"] == name] for name in masks}

    def p(one, other) -> float:
        counts = np.zeros((8, 8))
        np.add.at(counts, (one, other), 1)
        return chi2_contingency(counts[counts.any(axis=1)][:, counts.any(axis=0)]).pvalue

    for name, states in of_slide.items():
        assert all(p(states[:-lag], states[lag:]) > LEVEL for lag in (1, 2, 7))
        assert p(of_slide["s0"], states) > LEVEL or name == "s0"
    assert p(states, np.where(np.arange(len(states)) % 20, states[::-1], states)) < LEVEL  # 5 % repeats would be seen


# Weights of positions


def centre_cells(mask: np.ndarray, cell: int, side: int, block: int, grid: int = 1) -> np.ndarray:
    """Admissible positions whose centre lies in each block, by trying every one."""
    fine = np.kron(mask, np.ones((cell, cell))).astype(np.int64)
    sums = np.pad(fine.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    area = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    y, x = np.nonzero(area[::grid, ::grid] >= 0.4 * side**2)
    found = np.zeros([-(-n // block) for n in fine.shape], np.int64)
    np.add.at(found, tuple((at * grid + side // 2) // block for at in (y, x)), 1)
    return found


@pytest.mark.parametrize(("cells", "mpp"), [(1, 1.0), (3, 2.0)])
@pytest.mark.parametrize("tries", ["proposals", "ranks"])
def test_positions_are_drawn_in_proportion_to_the_weight_at_the_centre(cells, mpp, tries):
    mask, rng = irregular(0), np.random.default_rng(1)
    side, grid = int(40 * mpp), int(mpp)
    counts = centre_cells(mask, 8, side, 8 * cells, grid)
    weights = rng.choice([0.0, 0.2, 1.0, 5.0], counts.shape).astype(np.float32)
    stream = TileStream(MaskIndex({"lakes": mask}), 40, mpp, position_weights=WeightMaps({"lakes": weights}, cells))
    if tries == "proposals":
        n = 30_000
        x, y = stream.names(range(n))[["x", "y"]].to_numpy().T
    else:
        n, spot = 4_000, stream._sampler.scales.spots.at([0])
        x, y = np.array([stream._sampler._by_rank((np.uint64(9), np.uint64(i)), 0, spot) for i in range(n)]).T
    seen = np.zeros_like(counts)
    np.add.at(seen, tuple((at + side // 2) // (8 * cells) for at in (y, x)), 1)
    assert p_of(seen, counts * weights) > LEVEL
    assert p_of(seen, counts * (weights > 0)) < LEVEL
    at_corner = np.zeros_like(counts)
    np.add.at(at_corner, (y // (8 * cells), x // (8 * cells)), 1)
    assert p_of(at_corner, counts * weights) < LEVEL  # the weight counts at the centre, not at the corner
    hot = np.unravel_index((counts * weights).argmax(), counts.shape)
    inside = [((at + side // 2) // (8 * cells) == h).tolist() for at, h in ((y, hot[0]), (x, hot[1]))]
    own = np.logical_and(*inside)
    assert len(set(x[own])) > 3  # and every position of a cell may come


def p_of(seen: np.ndarray, expected: np.ndarray) -> float:
    """p of counts, cells that expect little being counted together; 0 where one came that cannot."""
    if seen[expected == 0].any():
        return 0.0
    order = np.argsort(expected[expected > 0])
    wanted = (expected[expected > 0] / expected.sum() * seen.sum())[order]
    groups = (np.cumsum(wanted) // 10).astype(int)
    wanted, got = np.bincount(groups, wanted), np.bincount(groups, seen[expected > 0][order])
    full = wanted > 0
    return chi2.sf(((got - wanted)[full] ** 2 / wanted[full]).sum(), full.sum() - 1)


def test_a_single_position_of_weight_is_found():
    mask = np.ones((60, 60), bool)
    heat = np.zeros((60, 60))
    heat[31, 17] = 1e-3
    heat[0, 0] = 1.0  # no tile can be centred there
    stream = TileStream(MaskIndex({"a": mask}), tile_px=40, mpp=1.0, position_weights={"a": heat}, seed=1)
    tiles = stream.names(range(300))
    assert set((tiles["x"] + 20) // 8) == {17} and set((tiles["y"] + 20) // 8) == {31}
    assert len(tiles[["x", "y"]].drop_duplicates()) > 60  # of 64 positions
    lost = {"a": np.where(heat == 1, heat, 0), "b": heat}
    stream = TileStream(MaskIndex({"a": mask, "b": mask}), tile_px=40, mpp=1.0, position_weights=lost)
    assert stream.slides["slide_id"].tolist() == ["b"]
    assert stream.left_out["reason"].tolist() == ["no admissible position at 1 um/px"]


def test_maps_of_a_folder_are_those_in_memory_and_travel_by_path(tmp_path):
    mask, rng = irregular(0), np.random.default_rng(1)
    maps = WeightMaps({name: rng.random((20, 20)) for name in ("a", "b")}, cells=2)
    index = MaskIndex({"a": mask, "b": mask})
    memory = TileStream(index, 40, 1.0, position_weights=maps)
    disk = TileStream(index, 40, 1.0, position_weights=maps.save(tmp_path / "maps"))
    assert memory.names(range(50)).equals(disk.names(range(50)))
    assert memory.settings == disk.settings and memory.settings["position_weights"]
    assert len(pickle.dumps(WeightMaps.open(tmp_path / "maps"))) < 500
    assert np.array_equal(pickle.loads(pickle.dumps(maps)).values, maps.values)


def test_a_weighted_stream_travels_to_another_process(index, tmp_path):
    rng = np.random.default_rng(0)
    shapes = {name: index.mask(name)[0].shape for name in index.slides["slide_id"]}
    maps = WeightMaps({name: rng.random(shape) for name, shape in shapes.items()})
    for given in (maps, maps.save(tmp_path / "maps")):
        stream = TileStream(index, 64, "loguniform(0.5, 1)", position_weights=given, slide_weights="tissue_mm2")
        assert pickle.loads(pickle.dumps(stream)).names(range(60)).equals(stream.names(range(60)))
        assert stream.names([40, 7]).equals(stream.names(range(60)).iloc[[40, 7]].reset_index(drop=True))
    assert len(pickle.dumps(stream)) < 30_000  # maps stay on disk


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"a": np.ones((40, 40))}, "no map for slide 'b'"),
        ({"a": np.ones((40, 40)), "b": np.ones((40, 39))}, "slide 'b' is 40 x 39, its mask .* is 40 x 40"),
        ({"a": np.full((40, 40), -1)}, "slide 'a' holds a number that is negative"),
        ({"a": np.full((40, 40), np.nan)}, "slide 'a' holds a number that is negative or none"),
        ({"a": np.zeros((40, 40))}, "slide 'a' are all 0"),
        ({"a": np.ones(40)}, r"shape \(40,\)"),
        ("nowhere", "nowhere/weights.json does not exist"),
    ],
)
def test_maps_that_cannot_be(maps, message):
    with pytest.raises(InputError, match=message):
        TileStream(MaskIndex({"a": irregular(0), "b": irregular(1)}), 40, 1.0, position_weights=maps)


# Scales and context


def test_one_place_at_several_mpp(index):
    stream = TileStream(index, tile_px=64, mpp=1.0, seed=3)
    for i in (0, 5):
        name, tiles = stream.name(i), stream.at_scales(i, (0.5, 0.7, 1.0, 2.0, 8.0))
        slide = index.slide(name.slide_id)
        assert tiles[2][1:] == name and np.array_equal(tiles[2].image, stream[i].image)
        middle = np.array([name.x, name.y]) + 32 * name.mpp / slide.mpp
        for tile, asked in zip(tiles, (0.5, 0.7, 1.0, 2.0, 8.0), strict=True):
            grid = slide.plan(asked).grid
            assert tile.mpp == pytest.approx(asked, rel=0.01) and tile.image.shape == (64, 64, 3)
            centre = np.array([tile.x, tile.y]) + 32 * tile.mpp / slide.mpp
            assert np.abs(centre - middle).max() <= grid / 2 + 1e-9
            assert tile.x % grid == 0 and np.array_equal(tile.image, slide.read(tile.x, tile.y, 64, asked))
            mask, um = index.mask(name.slide_id)
            cell, side = round(um / slide.mpp), 64 * tile.mpp / slide.mpp
            fine = np.kron(mask, np.ones((cell, cell)))[
                max(tile.y, 0) : round(tile.y + side), max(tile.x, 0) : round(tile.x + side)
            ]
            assert tile.tissue == pytest.approx(fine.sum() / side**2, abs=0.02)
        fine, coarse = tiles[2].image.astype(float), tiles[3].image.astype(float)
        shrunk = fine.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(shrunk - coarse[16:48, 16:48]).mean() < 0.5 * np.abs(shrunk - coarse[:32, :32]).mean()
    with pytest.raises(InputError, match="cannot serve 0.01"):
        stream.at_scales(0, (0.01,))


def test_context_lies_around_the_very_same_tile(index):
    settings = {"tile_px": 64, "mpp": (0.5, 0.8, 1.0), "seed": 3}
    stream, wide = TileStream(index, **settings), TileStream(index, context_px=112, **settings)
    assert (stream.margin_px, wide.margin_px) == (0, 24)
    for i in range(12):
        tile, more = stream[i], wide[i]
        assert more[1:] == tile[1:] and more.image.shape == (112, 112, 3)
        inner = more.image[24:-24, 24:-24].astype(int)
        assert np.abs(inner - tile.image).max() <= (0 if not tile.resampled else 2)
        slide = index.slide(tile.slide_id)
        step = 24 * tile.mpp / slide.mpp
        outside = slide.read(tile.x - step, tile.y - step, 112, tile.mpp)
        assert np.abs(more.image.astype(int) - outside).max() <= 2
    for context in (60, 65, 0.5):
        with pytest.raises(InputError, match="context_px"):
            TileStream(index, tile_px=64, context_px=context)


def test_settings_are_a_record_and_say_what_differs(index):
    plain = TileStream(index, tile_px=64)
    others = [
        {"mpp": "loguniform(0.5, 1)"}, {"balance": "patient"}, {"slide_weights": "tissue_mm2"},
        {"slide_weights": [1, 2, 3, 4]}, {"slide_weights": [4, 3, 2, 1]}, {"tile_filter": HsvFilter(share=0.0)},
        {"context_px": 80}, {"resample": "always"}, {"tiles_per_slide": 4}, {"seed": 1},
    ]  # fmt: skip
    told = [str(TileStream(index, tile_px=64, **other).settings) for other in others]
    assert len({*told, str(plain.settings)}) == len(others) + 1
    shown = repr(TileStream(index, tile_px=64, balance="patient", context_px=80, mpp="uniform(0.5, 1)"))
    assert shown == (
        "TileStream(4 slides, 64 px at uniform(0.5, 1) um/px, seed 0, balanced by patient, 80 px of context)"
    )
    assert repr(plain) == "TileStream(4 slides, 64 px at 0.5 um/px, seed 0)"


@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (9, 65), (30, 200)])
def test_the_box_of_a_packed_masks_tissue(shape):
    rng = np.random.default_rng(3)
    for density in (0.0, 0.002, 0.01, 0.3, 1.0):
        mask = rng.random(shape) < density
        words = np.concatenate([[np.uint64(5)], positions.pack(mask).ravel()])
        found = positions.extent(words, 1, -(-shape[1] // 64), shape[0])
        across, down = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        assert found == ((across[0], down[0], across[-1] + 1, down[-1] + 1) if mask.any() else (0, 0, 0, 0))


def test_sampling_keeps_its_names():
    assert sampling.audit is audit and callable(sampling.footprint) and callable(sampling.permuted)
