"""RankMe and ODCorr in the domain and outside it: which slides are which, one N for all, and what is recorded."""

import numpy as np
import pandas as pd
import pytest
import timm
from PIL import Image

from pathfm import InputError, TileSet, domain_study, metrics, study, unsupervised
from pathfm.domain_study import ORAL, RANDOM, TEXTURE
from pathfm.features import extract


@pytest.fixture(scope="module")
def parts():
    """Of the embedded cohort, whose test slides are moved so that every part has some."""
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
    yield domain_study.sets(24), index.slides.set_index("slide_id"), moved
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


def test_a_network_is_measured_at_all_tiles_and_at_as_many_as_are_real(parts, real, monkeypatch, tmp_path):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    how = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **how)
    table = domain_study.measured({"network": "mine", "seed": 3, "steps": 7}, model, None, parts[0], real)
    assert table.groupby("n").size().to_dict() == {24: 3, 16: 4} and set(table["d"]) == {16}
    x = extract(model, parts[0]["test centres"]).x
    row = table[(table["where"] == "test centres") & (table["n"] == 24)].iloc[0]
    assert row["rankme"] == metrics.rankme(x).value and row["mean_r2"] == metrics.odcorr(x).mean_r2
    assert row["tile_corr"] == metrics.odcorr(x).tiles and row["constants"] == 0 and not row["enough"]
    floor = domain_study.measured({"network": TEXTURE}, "colour+lbp", None, parts[0], real)
    assert "rankme" not in floor and floor["odcorr"].between(0, 1).all() and (floor["where"] == ORAL).sum() == 1


def made() -> tuple[pd.DataFrame, pd.DataFrame]:
    rows, scored = [], []
    for network, seeds in ((RANDOM, 2), ("DINO", 2), ("DINOv2", 2), (TEXTURE, 1)):
        for seed in range(seeds):
            for where, n in (("test centres", 50), ("test centres", 16), (ORAL, 16)):
                one = {"network": network, "seed": seed, "steps": 9, "where": where, "n": n, "d": 4}
                rank = np.nan if network == TEXTURE else 10 * seed + n
                rows.append(one | {"rankme": rank, "odcorr": 0.1 * seed, "mean_r2": 0.02, "odcorr_floor": 0.2})
            for when, score in (("start", 0.3), ("end", 0.6 + seed / 10)):
                scored.append({"arm": network, "seed": seed, "when": when, "mpp": 0.5, "new_centres": score})
    scored = pd.DataFrame(scored)
    return pd.DataFrame(rows), pd.concat([scored, scored.assign(mpp=1.0, new_centres=0.0)])


def test_the_summary_is_of_one_n_and_says_of_how_many_seeds():
    table, _ = made()
    few, many = domain_study.summary(table), domain_study.summary(table, 50)
    assert few.loc["DINO", ("RankMe", ORAL)] == 21 and many.loc["DINO", ("RankMe", "test centres")] == 55
    assert (
        ("RankMe", ORAL) not in many and few.loc[TEXTURE, "seeds"].item() == 1 and few.loc["DINO", "seeds"].item() == 2
    )
    assert np.isnan(few.loc[TEXTURE, ("RankMe", ORAL)]) and few.loc[TEXTURE, ("mean r²", ORAL)] == 0.02


def test_runs_are_points_with_their_score_and_random_weights_are_not_counted():
    points = domain_study.points(*made())
    assert points["random"].sum() == 2 * 6 and set(points.loc[points["random"], "score"]) == {0.3}
    trained = points[~points["random"]]
    assert set(trained["score"]) == {0.6, 0.7} and set(trained["method"]) == {"DINO", "DINOv2"}
    found = unsupervised.correlations(points)
    one = found[(found["method"] == "DINOv2") & (found["where"] == ORAL) & (found["metric"] == "rankme")].iloc[0]
    assert (one["points"], one["runs"]) == (2, 2) and np.isnan(one["rho"])


def test_the_figure_shows_every_network_on_every_part(style):
    fig = domain_study.figure(made()[0])
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["test centres", ORAL]
    assert fig.axes[0].get_xlabel() == "RankMe (N 16)" and len(fig.legends[0].get_texts()) == 4
    assert sum(len(line.get_xdata()) for line in fig.axes[1].lines if line.get_marker() == "o") == 7 * 2


def test_no_real_tiles_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATHFM_TEST_DATA", str(tmp_path))
    with pytest.raises(InputError, match="no real tiles: set PATHFM_TEST_DATA"):
        domain_study.record()
