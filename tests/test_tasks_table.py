"""The table of tasks says what is known, adds up, and calls unknown what is; PathoROB's index against a reference."""

import miniatures
import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import NearestNeighbors

from pathfm import InputError, tasks
from pathfm.__main__ import main
from pathfm.tasks import pathorob
from pathfm.tasks.task import SOURCES_OF_TISSUE

TOLD = {
    *("bach", "crc", "crc_nonorm", "mhist", "pcam", "pcam_10shot", "breakhis", "bracs", "gleason", "til", "msi_crc"),
    *("msi_stad", "consep", "monusac", "camelyon16_small", "panda_small", "tp53", "folder", "masks", "labels"),
    *("pathorob_camelyon", "pathorob_tcga", "pathorob_tolkach"),
}
NAMED = [task for task in tasks.TASKS.values() if task.name not in ("folder", "masks", "labels")]
# Train, val and test as eva's documentation has them.
EVA = {
    "bach": (268, 132, None), "crc": (100_000, 7_180, None), "mhist": (2_175, 977, None),
    "pcam": (262_144, 32_768, 32_768), "consep": (27, 14, None), "monusac": (209, 85, None),
    "bracs": (3_657, 312, 570), "breakhis": (1_132, 339, None), "gleason": (15_303, 2_482, 4_967),
    "camelyon16_small": (216, 54, 129), "panda_small": (955, 477, 477),
}  # fmt: skip


def test_every_task_is_there():
    assert set(tasks.TASKS) > TOLD
    assert sum(name.startswith("exaone_") for name in tasks.TASKS) == 10


@pytest.mark.parametrize("task", NAMED, ids=lambda task: task.name)
def test_a_task_says_what_it_must_and_why_it_cannot(task):
    assert task.kind in tasks.KINDS and task.title and task.url and task.citation and task.sources and task.files
    assert set(task.overlap) == set(SOURCES_OF_TISSUE)
    assert set(task.overlap.values()) <= {"yes", "no", "unknown"}
    for fact, value in (("mpp", task.mpp), ("classes", task.classes), ("licence", task.licence)):
        assert value or fact in task.unknown, fact
    for source, there in task.overlap.items():
        assert there != "unknown" or {source, "slides, labels and splits"} & set(task.unknown)
    assert not task.same_split or task.clean
    assert all(fact in str(task) for fact in (task.url, *task.unknown, *task.sources))


@pytest.mark.parametrize("task", NAMED, ids=lambda task: task.name)
def test_counts_add_up(task):
    for split in ("train", "val", "test", None):
        each = [task.counts.get((split, label)) for label in task.classes]
        if each and None not in each:
            assert sum(each) == task.count(split)


@pytest.mark.parametrize("name", EVA)
def test_the_official_splits_are_evas(name):
    task = tasks.about(name)
    assert tuple(task.count(split) for split in ("train", "val", "test")) == EVA[name]
    assert task.same_split == (EVA[name][2] is None or name == "gleason")  # eva reports on test where there is one


def test_the_table_and_its_columns():
    table = tasks.table().set_index("task")
    assert table.loc["crc", ["train", "val", "test", "all"]].tolist() == ["100,000", "7,180", "-", "107,180"]
    assert table.loc["msi_stad", ["train", "test", "all"]].tolist() == ["100,570", "118,008", "218,578"]
    assert table.loc["msi_crc", ["train", "test", "all"]].tolist() == ["93,408", "?", "?"]
    assert table.loc["bach", ["stops on report", "clean split"]].tolist() == ["yes", "yes"]
    assert (table.loc[table["stops on report"] == "yes", "clean split"] == "yes").all()
    assert table.loc["bracs", ["stops on report", "clean split"]].tolist() == ["no", "-"]
    assert table.loc["mhist", "from"] == "https://bmirds.github.io/MHIST"
    assert table.loc["breakhis", "mpp"] == "?" and table.loc["pathorob_tolkach", "all"] == "9,000"
    assert set(tasks.table("robustness")["task"]) == {f"pathorob_{s}" for s in ("camelyon", "tcga", "tolkach")}
    seen = tasks.contamination().set_index("task")
    assert seen.loc["pcam"].tolist()[:3] == ["no", "no", "yes"] and seen.loc["monusac", "TCGA"] == "yes"
    assert "-TCGA-" in seen.loc["crc", "why"]


def test_what_is_not_counted_is_said():
    unchecked = {name for name, task in tasks.TASKS.items() if "\ncounts        none is published" in str(task)}
    assert unchecked == {"tp53"} | {name for name in tasks.TASKS if name.startswith("exaone_")}
    assert "\nall           112,800\n" in str(tasks.about("pathorob_tcga"))
    assert "\ntest          ? (MSIMUT ?, MSS 70,569)\n" in str(tasks.about("msi_crc"))
    assert not any(line.startswith(("counts", "train", "all")) for line in str(tasks.about("labels")).splitlines())


def test_the_command_line(capsys):
    assert main(["tasks"]) == 0 and "camelyon16_small" in capsys.readouterr().out
    assert main(["tasks", "bach"]) == 0 and "unknown\n    patients:" in capsys.readouterr().out
    assert main(["tasks", "bahc"]) == 2 and "Did you mean 'bach'" in capsys.readouterr().err


def reference(x, table, k) -> tuple[int, int]:
    """As PathoROB's code does it: neighbours of unit vectors by distance, those of the own slide filtered out."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    ids = NearestNeighbors(n_neighbors=len(x)).fit(x).kneighbors(x)[1]
    so = os = 0
    for row, found in enumerate(ids):
        found = [i for i in found if table["slide_id"].iloc[i] != table["slide_id"].iloc[row]][:k]
        same = [table["label"].iloc[i] == table["label"].iloc[row] for i in found]
        here = [table["centre"].iloc[i] == table["centre"].iloc[row] for i in found]
        so += sum(s and not h for s, h in zip(same, here, strict=True))
        os += sum(h and not s for s, h in zip(same, here, strict=True))
    return so, os


@pytest.mark.parametrize("name", ["pathorob_camelyon", "pathorob_tolkach", "pathorob_tcga"])
@pytest.mark.parametrize("k", [1, 11])
def test_the_robustness_index_is_the_published_one(tmp_path, name, k):
    task = miniatures.pathorob(tmp_path, name)
    table = tasks.read(task, tmp_path)
    assert not (table["subset"] == "OOD").any()
    x = pathorob.embeddings(tmp_path, table)
    found = pathorob.robustness(task, x, table, k)
    pairs = [rows for _, rows in table.groupby("subset")] if name == "pathorob_tcga" else [table]
    counts = np.sum([reference(x[rows.index], rows, k) for rows in pairs], axis=0)
    assert (found["so"], found["os"]) == tuple(counts)
    assert found["robustness_index"] == pytest.approx(counts[0] / counts.sum())
    assert pathorob.K == {"pathorob_camelyon": 11, "pathorob_tcga": 61, "pathorob_tolkach": 46}


def test_the_index_knows_class_from_centre(tmp_path):
    task = miniatures.pathorob(tmp_path, "pathorob_camelyon")
    table = tasks.read(task, tmp_path)
    for column, value in (("label", 1.0), ("centre", 0.0)):
        x = np.eye(2)[(table[column] == table[column].iloc[0]).astype(int)] + 0.01 * np.random.default_rng(0).normal(
            size=(len(table), 2)
        )
        assert pathorob.robustness(task, x, table)["robustness_index"] == pytest.approx(value, abs=0.05)


@pytest.mark.parametrize("name", ["pathorob_camelyon", "pathorob_tcga"])
def test_chance_is_what_features_without_meaning_have_on_average(tmp_path, name):
    task = miniatures.pathorob(tmp_path, name)
    table = tasks.read(task, tmp_path)
    rng, expected = np.random.default_rng(0), pathorob.chance(task, table, 5)
    drawn = [pathorob.counts(task, rng.normal(size=(len(table), 30)), table, 5) for _ in range(40)]
    for part in ("so", "os"):
        total = np.mean([getattr(one, part).sum() for one in drawn])
        assert total == pytest.approx(getattr(expected, part).sum(), rel=0.03)


def test_the_index_has_an_interval_and_its_gain_is_paired(tmp_path):
    task = miniatures.pathorob(tmp_path, "pathorob_camelyon")
    table, rng = tasks.read(task, tmp_path), np.random.default_rng(0)
    hint = lambda column: 2.0 * np.eye(2)[(table[column] == table[column].iloc[0]).astype(int)]  # noqa: E731
    found = {"net": hint("label") + rng.normal(size=(len(table), 2)), "floor": rng.normal(size=(len(table), 2))}
    scored = pathorob.scored(task, found, table).set_index("features")
    assert scored.index.tolist() == ["net", "floor", "chance"] and scored["floor"].tolist() == [False, True, True]
    assert ((scored["low"] <= scored["robustness_index"]) & (scored["robustness_index"] <= scored["high"])).all()
    net, best = scored.loc["net"], scored["robustness_index"][1:].max()
    assert net["gain"] == pytest.approx(net["robustness_index"] - best) and net["gain_low"] > 0
    assert scored["gain"][1:].isna().all() and net["n_patients"] == table["patient_id"].nunique()
    counts = pathorob.counts(task, found["net"], table)
    assert pathorob.paired(counts, counts, table)[:3] == (0, 0, 0)
    whole = pathorob.Counts(counts.so, 0 * counts.os)
    assert pathorob.interval(whole, table)[:3] == (1, 1, 1)


def test_images_of_pathorob_are_read_once_and_aligned(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    task = miniatures.pathorob(tmp_path, "pathorob_tcga", slides=2, tiles=2)
    table = tasks.read(task, tmp_path)
    for name in table["file"].unique():
        miniatures.picture(tmp_path / "images" / f"{name}.png")
    found = pathorob.tiles(task, table, tmp_path / "images")
    assert len(found) == 16 and len(table) == 32 and set(found.classes) == {"normal", "tumor"}
    x = np.arange(16, dtype=np.float32)[:, None]
    rows, kept = pathorob.align(x, found, table)
    assert kept["file"].tolist() == found.table["file"].iloc[rows[:, 0].astype(int)].tolist() == table["file"].tolist()
    spoilt, lost = table["file"].iloc[0], table["file"].iloc[3]
    (tmp_path / "images" / f"{spoilt}.png").write_text("no image")
    found = pathorob.tiles(task, table, tmp_path / "images")
    assert found.quarantined["file"].tolist() == [spoilt]
    rows, kept = pathorob.align(x[:15], found, table)
    assert len(kept) == 30 and spoilt not in set(kept["file"])
    (tmp_path / "images" / f"{lost}.png").unlink()
    with pytest.raises(InputError, match=f"1 of 16 images are not in .*, first {lost}.png"):
        pathorob.tiles(task, table, tmp_path / "images")


def test_pathorob_input_that_cannot_be_used(tmp_path):
    task = miniatures.pathorob(tmp_path, "pathorob_camelyon")
    table = tasks.read(task, tmp_path)
    x = pathorob.embeddings(tmp_path, table)
    for call, message in [
        (lambda: pathorob.robustness(task, x[:-1], table), "95 embeddings for 96 tiles"),
        (lambda: pathorob.robustness(task, x, table, 91), "a tile has 90 neighbours of other slides, under k 91"),
        (lambda: pathorob.robustness(task, x * np.nan, table), "hold NaN or infinity"),
        (lambda: tasks.read("pathorob_camelyon", tmp_path), "partial download. 20,304 of 20,400 are missing"),
        (lambda: tasks.read("pathorob_tcga", tmp_path), "expected tcga_2x2.csv in"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    csv = pd.read_csv(tmp_path / "camelyon.csv")
    csv.assign(patch_id="x", slide_id="S" + csv.index.astype(str)).to_csv(tmp_path / "camelyon.csv", index=False)
    with pytest.raises(InputError, match="has no embedding of 48 tiles, first S0-x"):
        pathorob.embeddings(tmp_path, tasks.read(task, tmp_path))
    (tmp_path / "UMCU.npz").unlink()
    with pytest.raises(InputError, match="expected .*UMCU.npz with the embeddings of centre UMCU"):
        pathorob.embeddings(tmp_path, table)
    csv.drop(columns="subset").to_csv(tmp_path / "camelyon.csv", index=False)
    with pytest.raises(InputError, match="has no column 'subset'"):
        tasks.read(task, tmp_path)
