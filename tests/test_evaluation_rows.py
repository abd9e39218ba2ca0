"""What a row says of itself: the published name, what is missing, the split, the features, what does not decode."""

import re
from functools import partial

import miniatures
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_evaluation import apart, coloured, small  # noqa: F401

from pathfm import InputError, board, confounding, evaluation, heads, leaderboard, probe, tasks
from pathfm.__main__ import main
from pathfm.features import extract
from pathfm.tasks import pathorob

TEN_SHOT = "eva-2026-10shot"


def told(**how) -> list[str]:
    """Options of a command line."""
    return [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def pictures_of(folder, table):
    for name in table["file"].unique():
        miniatures.picture(folder / f"{name}.png")
    return folder


def test_fifty_runs_of_ten_images_are_fifty_training_sets(tmp_path, monkeypatch):
    task, pools = miniatures.pcam(tmp_path / "data", "pcam_10shot"), []
    monkeypatch.setitem(tasks.TASKS, "pcam_10shot", task)
    own = heads._pool
    monkeypatch.setattr(heads, "_pool", lambda *given: pools.append(own(*given)) or pools[-1])
    tiles = evaluation.labelled(tmp_path / "data", "pcam_10shot", protocol=TEN_SHOT)
    assert tiles.name == "pcam_10shot" and (tiles.table["role"] == "probe-train").sum() == 40
    answer = probe.eva(extract("colour", tiles), TEN_SHOT, max_steps=40)
    assert len({tuple(sorted(pool.tolist())) for pool in pools}) == 50 == len(answer.settings["scores"])
    for pool in pools:
        assert tiles.table.loc[pool.numpy(), "label"].value_counts().to_dict() == {"no_tumor": 10, "tumor": 10}
    drawn = evaluation.labelled(tmp_path / "data", "pcam_10shot", protocol="linear")
    assert drawn.name == "pcam_10shot, run 0" and (drawn.table["role"] == "probe-train").sum() == 20


def test_ten_shots_are_recorded_under_the_published_name(tmp_path, small, monkeypatch):  # noqa: F811
    task = miniatures.pcam(tmp_path / "data", "pcam_10shot")
    monkeypatch.setitem(tasks.TASKS, "pcam_10shot", task)
    quick = lambda features, **how: probe.eva(features, TEN_SHOT, max_steps=20, **how)  # noqa: E731
    monkeypatch.setitem(evaluation.PROTOCOLS, TEN_SHOT, quick)
    options = told(task="pcam_10shot", protocol=TEN_SHOT, record=True, device="cpu")
    assert main(["evaluate", small, str(tmp_path / "data"), *options]) == 0
    row = leaderboard.recorded().iloc[0]
    assert (row["task"], row["protocol"], row["runs"]) == ("pcam_10shot", TEN_SHOT, 50)
    assert "pcam_10shot" in set(leaderboard.published()["task"])


def test_partial_downloads_and_clean_splits_are_recorded_and_seen(tmp_path, small, monkeypatch):  # noqa: F811
    """Under names that say so, and yet `seen` knows whose patients they are."""
    miniatures.til(tmp_path / "til")
    miniatures.mhist(tmp_path / "mhist")
    how = told(allow_partial=True, pretrained_on="TCGA", protocol="kNN", record=True)
    assert main(["evaluate", small, str(tmp_path / "til"), "--task", "til", *how]) == 0
    assert main(["evaluate", small, str(tmp_path / "mhist"), "--task", "mhist", *how]) == 0
    kept = leaderboard.recorded()
    assert kept["task"].tolist() == [
        "til (clean split), partial: 48 of 304,097",
        "mhist (clean split), partial: 24 of 3,152",
    ]
    assert kept["seen"].tolist() == ["TCGA", leaderboard.seen("TCGA", "mhist")] == ["TCGA", "no"]
    whole = miniatures.consep(tmp_path / "consep")
    (tmp_path / "consep" / "Train" / "Images" / "train_1.png").unlink()
    monkeypatch.setitem(tasks.TASKS, "consep", whole)
    images = tasks.read("consep", tmp_path / "consep", allow_partial=True)
    quick = evaluation.SegmentationProtocol(input_px=32, steps=2, patience=2, runs=1)
    row, _ = evaluation.masks(small, images, "consep", quick, "TCGA")
    assert row["task"] == "consep, partial: 13 of 14"
    assert leaderboard.plain(row["task"]) == "consep"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("til (clean split)", "til"),
        ("pcam, partial: 1,024 of 327,680", "pcam"),
        ("pcam_10shot, run 3, partial: 120", "pcam_10shot"),
        ("til (clean split), partial: 48 of 304,097, patients on two sides", "til"),
        ("crc", "crc"),
        ("crc (mine)", "crc (mine)"),
        ("tiles, partial", "tiles, partial"),
    ],
)
def test_what_readers_add_to_a_name_is_known_and_nothing_else(name, task):
    assert leaderboard.plain(name) == task
    assert leaderboard.seen("TCGA+CAMELYON", name) == leaderboard.seen("TCGA+CAMELYON", task)
    assert evaluation._task(task, name) == evaluation._task("", name) == name  # of slides and masks as of tiles
    assert evaluation._task(name, name) == name and evaluation._task("mine", name) == "mine" + name[len(task) :]


def test_features_of_another_making_have_a_row_of_their_own(tmp_path, small, capsys):  # noqa: F811
    data = str(coloured(tmp_path / "data"))
    for how in ({}, {"pool": "mean"}, {"input_px": 16}, {"precision": "bfloat16"}):
        assert main(["evaluate", small, data, *told(protocol="kNN", record=True, **how)]) == 0
    kept = leaderboard.recorded()
    assert kept["model"].tolist() == ["small", "small (mean)", "small (16 px)", "small (bfloat16)"]
    shown = board.wide(leaderboard.rows("kNN"))
    assert shown["data test"].notna().all() and len(shown) == 4
    assert main(["evaluate", small, data, *told(layers=2)]) == 2
    assert "1 blocks, not the 2 layers asked for" in capsys.readouterr().err
    tiles = evaluation.labelled(data)
    row, _ = evaluation.evaluate(small, tiles, "data", "kNN", "both")
    assert row["model"] == "small (both)" and row["task"] == "data"


def test_heads_that_search_their_rate_have_a_protocol_of_their_own(tmp_path, small, monkeypatch, capsys):  # noqa: F811
    data = str(coloured(tmp_path / "data"))
    monkeypatch.setitem(evaluation.PROTOCOLS, "eva-2026", partial(probe.eva, name="eva-2026", runs=2, max_steps=20))
    how = {"protocol": "eva-2026", "record": True}
    for more in ({}, {"learning_rates": "1e-4,1e-2"}):
        assert main(["evaluate", small, data, *told(**how, **more)]) == 0
    assert leaderboard.recorded()["protocol"].tolist() == ["eva-2026", "eva-2026, learning rate searched"]
    for said, message in (
        (told(learning_rates="1e-3"), "learning rates are of eva's heads; linear has none"),
        (
            told(**how, learning_rates="1e-3,0"),
            "learning_rates are numbers above 0 with .* not '1e-3,0'",
        ),
        (told(**how, learning_rates="fast"), "not 'fast'"),
        (told(workers=2), "workers and scheduler are of slides; folder is embedded in this process"),
    ):
        assert main(["evaluate", small, data, *said]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_what_is_known_of_centres_is_recorded_and_printed(tmp_path, small, capsys):  # noqa: F811
    data = coloured(tmp_path / "data", patients=30)
    table = pd.read_csv(data / "manifest.csv")
    patient = table["patient_id"].str[1:].astype(int)  # centres 0 and 1 turn about, so both are in every role
    table["role"] = np.where(patient < 10, "probe-train", np.where(patient < 14, "validate", "test"))
    table.to_csv(data / "manifest.csv", index=False)
    (data / "0-0.png").write_bytes(b"no image")
    assert main(["evaluate", small, str(data), *told(protocol="kNN", record=True)]) == 0
    row = leaderboard.recorded().iloc[0]
    tiles = evaluation.labelled(data)
    found = confounding.of(extract(*evaluation.backbones.load(small)[:1], tiles))
    for name in confounding.COLUMNS:
        assert row[name] == pytest.approx(found[name], abs=1e-3)
    assert row["n_quarantined"] == 1 == len(tiles.quarantined)
    capsys.readouterr()
    assert main(["leaderboard", "--protocol", "kNN"]) == 0
    printed = capsys.readouterr().out
    assert "recorded here, with intervals" in printed and "robustness_index" in printed
    assert f"{row['score']:.3f} ({row['low']:.3f} to {row['high']:.3f})" in printed
    assert f"{row['gain']:.3f} ({row['gain_low']:.3f} to {row['gain_high']:.3f})" in printed
    assert row["best_floor"] in printed and row["verdict"] in printed


def test_published_rows_alone_have_nothing_beside_them(capsys):
    assert board.ours(leaderboard.published()).empty
    assert main(["leaderboard", "--protocol", "exaone-1.0"]) == 0
    assert "recorded here" not in capsys.readouterr().out


def test_pathorob_by_command_line(tmp_path, small, monkeypatch, capsys):  # noqa: F811
    task = miniatures.pathorob(tmp_path, "pathorob_camelyon", slides=4, tiles=4)
    monkeypatch.setitem(tasks.TASKS, task.name, task)
    table = tasks.read(task, tmp_path)
    images = pictures_of(tmp_path / "images", table)
    broken = table["file"].iloc[0]
    (images / f"{broken}.png").write_bytes(b"no image")
    start = ["evaluate", small, str(tmp_path), *told(task=task.name, record=True)]
    assert main([*start, "--images", str(images)]) == 0
    assert main([*start, "--embeddings", str(tmp_path), "--name", "given"]) == 0
    kept = leaderboard.recorded().set_index("model")
    assert kept.loc["small", ["n_quarantined", "n_tiles"]].tolist() == [1, len(table) - 1]
    given = pathorob.robustness(task, pathorob.embeddings(tmp_path, table), table)
    assert kept.loc["given", "score"] == pytest.approx(given["robustness_index"], abs=1e-4)
    assert kept.loc["given", "note"] == "k 11; given embeddings: chance is the only floor"
    assert kept.loc["given", "best_floor"] == "chance" and kept.loc["given", "n_quarantined"] == 0
    for options, message in (
        ([], "needs the folder of its images, or one of embeddings; give one of the two"),
        (["--images", "a", "--embeddings", "b"], "give one of the two"),
        (["--images", "a", "--protocol", "linear"], "scored by pathorob-2025 and not by 'linear'"),
    ):
        assert main([*start, *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["evaluate", small, str(images), "--images", str(images)]) == 2
    assert "images and embeddings are of PathoROB's sets" in capsys.readouterr().err
    (tmp_path / "camelyon.csv").write_text("\n".join((tmp_path / "camelyon.csv").read_text().splitlines()[:-4]))
    assert main([*start, "--embeddings", str(tmp_path)]) == 2
    assert "partial download" in capsys.readouterr().err
    assert main([*start, "--embeddings", str(tmp_path), "--allow-partial", "true"]) == 0
    assert leaderboard.recorded()["task"].str.contains("pathorob_camelyon, partial: ").sum() == 1


def test_images_that_do_not_decode_are_counted_in_every_row(tmp_path, small):  # noqa: F811
    folder = tmp_path / "masks"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(10):
        mask = np.kron(rng.integers(0, 2, (4, 4)), np.ones((8, 8), int)).astype(np.uint8)
        Image.fromarray(np.stack([mask * 200] * 3, axis=2)).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "labels" / f"{i}.png")
    (folder / "images" / "3.png").write_bytes(b"no image")
    quick = evaluation.SegmentationProtocol(input_px=32, steps=2, patience=2, runs=1)
    row, _ = evaluation.masks(small, tasks.read("masks", folder), "masks", quick)
    assert row["n_quarantined"] == 1 and row["task"] == "masks"  # the folder's name
    assert row["note"] == "by image (too narrow); roles drawn by image; decoder of image"
    tiles = evaluation.labelled(coloured(tmp_path / "data"))
    with pytest.raises(InputError, match="pathorob_tcga is no task of labelled tiles"):
        evaluation.labelled(tmp_path, "pathorob_tcga")
    assert evaluation.evaluate(small, tiles, protocol="SimpleShot").row["n_quarantined"] == 0
