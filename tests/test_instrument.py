"""What is measured of the synthetic cohort is measured right, and the recorded numbers hold their limits."""

import numpy as np
import pandas as pd
import pytest

from pathfm import instrument
from pathfm.benchmarks import TileSet
from pathfm.runs import read_results
from pathfm.synthetic import appearance, cohorts, slides


def tiles(n: int = 96) -> TileSet:
    rng = np.random.default_rng(0)
    centres, labels = np.arange(n) % 4, np.arange(n) // 4 % 2
    rows = [
        {"file": str(i), "path": str(i), "label": "ab"[label], "centre": f"c{c}", "patient_id": f"P{c}{i % 3}"}
        for i, (c, label) in enumerate(zip(centres, labels, strict=True))
    ]
    table = pd.DataFrame(rows).assign(digest="", width_px=32, height_px=32, mpp=0.5, noise=rng.standard_normal(n))
    return TileSet("toy", table)


def test_a_centre_left_out_is_not_fitted_on():
    given = tiles()
    rows = np.arange(len(given))

    def fit(x, y, unknown):
        centres = given.table["centre"].to_numpy()
        assert set(centres[x]).isdisjoint(centres[unknown]) and len(x) + len(unknown) == len(given)
        assert (y == given.y[x]).all()
        return given.y[unknown] * (centres[unknown] != "c2")  # all answers in c2 are the first class

    table = instrument.by_centre("toy", instrument.left_out("toy", given, rows, fit)).set_index("centre")
    assert table.loc["c2", "balanced_accuracy"] == 0.5 and table.loc["c1", "balanced_accuracy"] == 1
    assert table.loc["all", "balanced_accuracy"] == pytest.approx(3.5 / 4)
    assert table.loc["all", "tiles"] == 96 and table.loc["all", "patients"] == 12


def test_the_cnn_reads_texture_and_is_the_same_every_time(monkeypatch):
    """Stripes against squares of the same grey levels."""
    given, rng = tiles(96), np.random.default_rng(0)
    stripes = np.repeat(np.arange(48)[:, None] // 4 % 2, 48, axis=1)
    squares = (np.add.outer(np.arange(48) // 4, np.arange(48) // 4) % 2).astype(float)
    grey = [120 + 60 * np.roll((stripes, squares)[y], rng.integers(8, size=2), (0, 1)) for y in given.y]
    images = [
        np.repeat(g[..., None] + rng.normal(0, 5, (48, 48, 3)), 1, -1).clip(0, 255).astype(np.uint8) for g in grey
    ]
    monkeypatch.setattr(TileSet, "images", lambda self, batch_size=64: iter([images]))
    assert instrument.labelled_cnn(given, epochs=14).balanced_accuracy > 0.9
    first, second = (instrument.labelled_cnn(given, epochs=1).table for _ in range(2))
    assert first.equals(second)


def test_forests_read_what_is_there_and_chance_where_nothing_is(monkeypatch):
    monkeypatch.setattr(instrument, "TREES", 40)
    given = tiles()
    assert instrument.left_out("truth", given, given.y[:, None], instrument.forest).balanced_accuracy == 1
    nothing = given.table[["noise"]].to_numpy()
    assert instrument.left_out("noise", given, nothing, instrument.forest).balanced_accuracy == pytest.approx(
        0.5, abs=0.2
    )


def test_the_facts_of_a_file_are_read_from_the_slide(tmp_path):
    cohort = cohorts.tiny_cohort(tmp_path, n=4, side_um=200)
    table = pd.DataFrame({"slide_id": cohort.table["slide_id"].repeat(2)}).reset_index(drop=True)
    facts = instrument.file_facts(cohort, TileSet("toy", table))
    assert facts[:, 0].tolist() == [0.5, 0.5, 0.25, 0.25] * 2
    specs = [slides.read_spec(path) for path in cohort.table["path"]]
    assert facts[::2, 1].tolist() == [len(spec.pyramid.split("-")) for spec in specs]
    assert facts[::2, 2].tolist() == [round(appearance.scanner(spec.origin, spec.knobs)["quality"]) for spec in specs]


def measured(seed: int, generator: str = "1-new", **changes) -> pd.DataFrame:
    values = {"colour": 0.6, "oracle": 0.95, "CNN": 0.9, "file": 0.13, "lbp": 0.99, **changes}
    rows = [{"seed": seed, "what": what, "centre": "all", "balanced_accuracy": v} for what, v in values.items()]
    return pd.DataFrame([*rows, {**rows[0], "centre": "c0", "balanced_accuracy": 1.0}]).assign(generator=generator)


def test_numbers_outside_their_limits_are_named():
    assert instrument.outside(measured(1)).empty
    found = instrument.outside(measured(1, colour=0.66, oracle=0.91, CNN=0.84, file=0.2))
    assert found["what"].tolist() == ["colour", "oracle", "CNN", "file"]


def test_records_of_other_seeds_stay_and_those_of_another_generator_go(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr("pathfm.runs.results_dir", lambda: tmp_path / "results")
    monkeypatch.setattr("pathfm.synthetic.GENERATOR_VERSION", 1)
    for name in ("old", "new"):
        monkeypatch.setattr("pathfm.synthetic.generator_hash", lambda name=name: name)
        monkeypatch.setattr(instrument, "measure", lambda seed, workers, g=name: measured(seed, f"1-{g}"))
        table = instrument.record([12, 11] if name == "old" else [12])
    assert set(table["seed"]) == {12} and set(table["generator"]) == {"1-new"}
    assert set(instrument.record([11])["seed"]) == {11, 12}
    assert len(instrument.record([11])) == 2 * len(measured(11))


def test_the_recorded_instrument_holds_its_limits():
    table, refused = read_results("instrument")
    if table.empty:
        pytest.skip("results/instrument.csv does not exist; make it with python -m pathfm instrument 11")
    assert set(instrument.LIMITS) <= set(table["what"])
    assert instrument.outside(table).empty, instrument.outside(table).to_string()
    assert not refused, "the generator has changed since: python -m pathfm instrument 11"
