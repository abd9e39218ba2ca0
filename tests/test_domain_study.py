"""RankMe and ODCorr in the domain and outside it: which slides are which, one N for all, and what is recorded."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
from PIL import Image

from pathfm import (
    InputError,
    TileSet,
    checkpoint,
    domain_study,
    export,
    method_study,
    metrics,
    runs,
    study,
    unsupervised,
)
from pathfm.domain_study import ORAL, RANDOM, TEXTURE
from pathfm.features import extract
from pathfm.representation import thin


@pytest.fixture(scope="module")
def parts():
    """Of the embedded cohort at the scale of pretraining, whose test slides are moved so that every part has some."""
    patch = pytest.MonkeyPatch()
    slides = study.cohort("")
    table = slides.table.copy()
    seen = table.index[table["role"] == "pretrain"]
    table.loc[seen[0], "role"] = "test"
    index = study.index(slides)
    index.slides["role"] = index.slides["slide_id"].map(table.set_index("slide_id")["role"])
    moved = table.loc[seen[0], "slide_id"]
    patch.setattr(study, "index", lambda given: index)
    patch.setattr(domain_study, "COHORT", "")
    yield domain_study.sets(n=24), index.slides.set_index("slide_id"), moved
    patch.undo()


def test_parts_are_told_apart_by_role_and_centre(parts):
    found, slides, moved = parts
    assert list(found) == list(domain_study.PARTS)
    new = set(study.new_centres(study.cohort("")))
    owners = {where: set(tiles.table["slide_id"]) for where, tiles in found.items()}
    assert owners["new patients, centres of pretraining"] == {moved}
    assert set(slides.loc[list(owners["validation centre"]), "role"]) == {"validate"}
    test = slides.loc[list(owners["test centres"])]
    assert set(test["role"]) == {"test"} and set(test["centre"]) <= new and len(test)
    every = [slide for owned in owners.values() for slide in owned]
    assert len(every) == len(set(every))
    for tiles in found.values():
        assert len(tiles) == 24 and set(tiles.table["mpp"]) == {1.0} and tiles.image(0).shape == (128, 128, 3)


@pytest.fixture
def real(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(16):
        path = tmp_path / "real" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8)).save(path)
    return TileSet.from_folder(tmp_path / "real")


@pytest.fixture
def model():
    how = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **how)


def test_a_network_is_measured_at_all_tiles_and_at_as_many_as_are_real(parts, real, model, monkeypatch, tmp_path):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    table = domain_study.measured(model, None, parts[0], real)
    assert table.groupby("n").size().to_dict() == {24: 3, 16: 4} and set(table["d"]) == {16}
    x = extract(model, parts[0]["test centres"]).x
    row = table[(table["where"] == "test centres") & (table["n"] == 24)].iloc[0]
    assert row["rankme"] == metrics.rankme(x).value and row["mean_r2"] == metrics.odcorr(x).mean_r2
    assert row["rankme_share"] == row["rankme"] / 16
    assert row["tile_corr"] == metrics.odcorr(x).tiles and row["constants"] == 0 and not row["enough"]
    few = extract(model, thin(parts[0]["test centres"], 16)).x
    row = table[(table["where"] == "test centres") & (table["n"] == 16)].iloc[0]
    assert row["rankme"] == pytest.approx(metrics.rankme(few).value, rel=1e-4)
    floor = domain_study.measured("colour+lbp", None, parts[0], real)
    assert "rankme" not in floor and floor["odcorr"].between(0, 1).all() and (floor["where"] == ORAL).sum() == 1


@pytest.fixture
def small(parts, real, model, monkeypatch, tmp_path):
    """A study of two networks at two scales that writes below tmp_path; the calls that made a network."""
    made, slides = [], study.cohort("")
    labelled = study.tiles(slides)
    monkeypatch.setattr(study, "cohort", lambda name: slides)  # as drawn, though the cache is now an empty one
    monkeypatch.setattr(study, "tiles", lambda given: labelled)
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATHFM_TEST_DATA", str(tmp_path))
    (tmp_path / "real").rename(tmp_path / "oral")
    monkeypatch.setattr(domain_study, "REAL", "oral")
    monkeypatch.setattr(runs, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(method_study, "MPPS", (0.5, 1.0))
    monkeypatch.setattr(domain_study, "sets", lambda mpp: parts[0])

    def networks(seeds, arms):
        for network in (RANDOM, TEXTURE):
            make = (model, export.Preprocess(32)) if network == RANDOM else ("colour+lbp", None)
            yield (
                {"network": network, "seed": seeds[0], "steps": 0},
                lambda make=make, network=network: made.append(network) or make,
            )

    monkeypatch.setattr(domain_study, "networks", networks)
    return made


def test_a_recording_does_what_is_missing(small, tmp_path):
    whole = domain_study.record([3])
    assert small == [RANDOM, TEXTURE, RANDOM]  # the floor without a network stands at one scale
    sizes = whole[whole["network"] == RANDOM].groupby(["mpp", "n"]).size()
    assert sizes.to_dict() == {(0.5, 16): 3, (0.5, 24): 3, (1.0, 16): 3, (1.0, 24): 3}
    assert whole.loc[whole["mpp"].isna(), ["network", "where"]].values.tolist() == [[RANDOM, ORAL], [TEXTURE, ORAL]]
    assert whole["score"].between(0, 1).all() and whole.groupby("network")["score"].nunique().eq(1).all()
    small.clear()
    again = domain_study.record([3])
    assert small == [] and len(again) == len(whole)
    again[~((again["network"] == RANDOM) & (again["mpp"] == 0.5))].to_csv(tmp_path / "domains.csv", index=False)
    third = domain_study.record([3])
    assert small == [RANDOM] and sorted(third["rankme"].dropna()) == pytest.approx(
        sorted(whole["rankme"].dropna()), abs=1e-3
    )


def made() -> pd.DataFrame:
    """Two arms of one method and one of another: two checkpoints a run, at two scales, and the real tiles."""
    rows = []
    networks = ((RANDOM, 2, [0]), ("DINO", 2, [5, 9]), ("DINOv2", 2, [5, 9]), ("DINOv2, equal FLOPs", 2, [5, 7]))
    for network, seeds, steps in (*networks, (TEXTURE, 1, [0])):
        for seed, step in itertools.product(range(seeds), steps):
            one = {"network": network, "seed": seed, "steps": step, "d": 4, "score": 0.3 + step / 100 + seed / 10}
            one |= {"method": np.nan if network in (RANDOM, TEXTURE) else network.split(",")[0].lower()}
            for where, n, mpp in (("test centres", 50, 1), ("test centres", 16, 1), ("test centres", 50, 0.5)):
                rank = np.nan if network == TEXTURE else 10 * seed + n + step
                rows.append(one | {"where": where, "n": n, "mpp": mpp, "rankme": rank, "odcorr": 0.1 * seed})
            rank = np.nan if network == TEXTURE else 10 * seed + step
            rows.append({**rows[-1], "where": ORAL, "n": 16, "mpp": np.nan, "rankme": rank})
    table = pd.DataFrame(rows).assign(mean_r2=0.02, odcorr_floor=0.2)
    return table.assign(rankme_share=table["rankme"] / 4)


def test_the_summary_is_of_last_checkpoints_at_one_n_and_says_of_how_many_seeds():
    table = made()
    few, many = domain_study.summary(table.iloc[::-1]), domain_study.summary(table, 50)
    assert list(few.index) == [RANDOM, "DINO", "DINOv2", "DINOv2, equal FLOPs", TEXTURE] == list(many.index)
    assert few.loc["DINO", ("RankMe", ORAL)] == 5 + 9 and many.loc["DINO", ("RankMe", "test centres")] == 55 + 9
    assert many.loc["DINO", ("RankMe / D", "test centres")] == (55 + 9) / 4 and few.loc["DINO", "D"].item() == 4
    assert (
        ("RankMe", ORAL) not in many and few.loc[TEXTURE, "seeds"].item() == 1 and few.loc["DINO", "seeds"].item() == 2
    )
    fine = domain_study.summary(table, 50, 0.5)
    assert fine.loc["DINO", ("RankMe", "test centres")] == 55 + 9 and ("RankMe", ORAL) not in fine
    assert np.isnan(few.loc[TEXTURE, ("RankMe", ORAL)]) and few.loc[TEXTURE, ("mean r²", ORAL)] == 0.02


def test_checkpoints_are_points_of_their_run_and_arms_of_one_method_stand_together():
    points = domain_study.points(made())
    trained = points[~points["random"]]
    assert set(points["where"]) == {"test centres, 1 µm/px", "test centres, 0.5 µm/px", ORAL}
    assert trained.groupby("method")["run"].nunique().to_dict() == {"dino": 2, "dinov2": 4}
    assert trained.groupby(["run", "where", "n"]).size().eq(2).all()
    assert points.groupby(["run", "where", "n"])["random"].sum().eq(1).all()
    assert set(points.loc[points["random"], "score"]) == {0.3, 0.4} and set(points.loc[points["random"], "step"]) == {0}
    found = unsupervised.correlations(points)
    one = found[(found["method"] == "dinov2") & (found["where"] == ORAL) & (found["metric"] == "rankme")].iloc[0]
    assert (one["points"], one["runs"]) == (8, 4) and one["rho"] == pytest.approx(1) and "4 runs" in one["note"]


def test_the_figure_shows_every_network_on_every_part(style):
    fig = domain_study.figure(made())
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["test centres", ORAL]
    assert fig.axes[0].get_xlabel() == "RankMe (N 16)" and len(fig.legends[0].get_texts()) == 5
    assert sum(len(line.get_xdata()) for line in fig.axes[1].lines if line.get_marker() == "o") == 9 * 2


def test_networks_are_the_checkpoints_of_every_run(monkeypatch, tmp_path):
    for arm, seed in itertools.product(("DINO", "DINOv2"), (0, 1)):
        for step in (8, 12):
            (tmp_path / f"{arm}-{seed}").mkdir(exist_ok=True)
            (tmp_path / f"{arm}-{seed}" / checkpoint.NAME.format(step)).touch()

    def trained(arm, seed):
        config = SimpleNamespace(method=arm.lower())
        return SimpleNamespace(folder=tmp_path / f"{arm}-{seed}", teacher=tmp_path, config=config)

    monkeypatch.setattr(method_study, "trained", trained)

    def found(*arms):
        return [tuple(told[name] for name in domain_study.NETWORK) for told, _ in domain_study.networks([0, 1], arms)]

    both = found("DINO", "DINOv2")
    assert both[:3] == [(RANDOM, 0, 0), ("DINO", 0, 8), ("DINO", 0, 12)]
    assert both[3:8] == [(RANDOM, 1, 0), ("DINO", 1, 8), ("DINO", 1, 12), ("DINOv2", 0, 8), ("DINOv2", 0, 12)]
    assert len(both) == 2 * 5 + 2 and both[-2:] == [(domain_study.LEAVES, 0, 400), (TEXTURE, 0, 0)]
    assert found("DINOv2")[:2] == both[6:8]
    with pytest.raises(InputError, match="no arm is called 'DINOv3'"):
        found("DINOv3")


def test_no_real_tiles_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATHFM_TEST_DATA", str(tmp_path))
    with pytest.raises(InputError, match="no real tiles: set PATHFM_TEST_DATA"):
        domain_study.record()
