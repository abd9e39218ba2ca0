"""Slide tasks: roles of the published slides, folds that keep a hospital on one side, floors without pixels."""

import miniatures
import numpy as np
import pandas as pd
import pytest

from pathfm import InputError, tasks
from pathfm.tasks import sites
from pathfm.tasks.slides import CAMELYON_VAL, of_tiles, stratified


def test_camelyon16_holds_out_the_slides_of_pcam(tmp_path):
    task = miniatures.camelyon16(tmp_path)
    slides = tasks.read(task, tmp_path)
    table = slides.table.set_index("slide_id")
    assert slides.summary()["test"].tolist() == [3, 3]
    assert table.loc["normal_010", "role"] == table.loc["tumor_001", "role"] == "validate"
    assert table.loc["normal_002", "role"] == "probe-train"
    assert table.loc["test_001", ["label", "role", "site"]].tolist() == ["tumor", "test", ""]
    assert table.loc[["normal_110", "tumor_110", "normal_004"], "site"].tolist() == ["UMCU", "UMCU", "RUMC"]
    assert sum(map(len, CAMELYON_VAL.values())) == tasks.about("camelyon16_small").count("val") == 54
    assert len(slides.cohort()) == len(slides)


def test_camelyon16_that_is_partial_or_not_labelled(tmp_path):
    task = miniatures.camelyon16(tmp_path)
    (tmp_path / "testing/images/test_006.tif").unlink()
    with pytest.raises(InputError, match="1 of .* are missing. test: 5 of 6"):
        tasks.read(task, tmp_path)
    assert "partial" in tasks.read(task, tmp_path, allow_partial=True).name
    (tmp_path / "testing/reference.csv").write_text("test_001,Tumor\n")
    with pytest.raises(InputError, match="reference.csv has no label of test_002; is it another set's"):
        tasks.read(task, tmp_path, allow_partial=True)
    miniatures.touch(tmp_path / "training/normal/tumor_999.tif")
    with pytest.raises(InputError, match="training/normal/tumor_999.tif .* has no name of this data set"):
        tasks.read(task, tmp_path, allow_partial=True)


def test_panda_small_is_a_tenth_and_two_twentieths_of_every_grade(tmp_path):
    slides = tasks.read(miniatures.panda(tmp_path), tmp_path)
    given = pd.read_csv(tmp_path / "train_with_noisy_labels.csv", dtype=str).set_index("image_id")
    assert (given.loc[slides.table["slide_id"], "noise_ratio_10"].astype(float) != 0).all()
    quiet = given[given["noise_ratio_10"].astype(float) != 0]["isup_grade"].value_counts()
    table = pd.crosstab(slides.table["label"], slides.table["role"])
    for grade, n in quiet.items():
        assert table.loc[grade].to_dict() == {"probe-train": n // 10, "validate": n // 20, "test": n // 20}
    again = tasks.read(miniatures.panda(tmp_path), tmp_path)
    assert again.table["slide_id"].tolist() == slides.table["slide_id"].tolist()
    next((tmp_path / "train_images").iterdir()).unlink()
    with pytest.raises(InputError, match=r"1 of \d+ slides are missing, first .*; the draw is over all"):
        tasks.read("panda_small", tmp_path)


def test_the_stratified_draw_by_hand():
    label = np.array(list("bbabaab" * 6))
    rng = np.random.default_rng(42)
    expected = np.full(len(label), "", object)
    for one in "ab":
        rows = np.flatnonzero(label == one)
        rng.shuffle(rows)
        first, second = int(len(rows) * 0.1), int(len(rows) * 0.5)
        expected[rows[:first]], expected[rows[first : first + second]] = "train", "val"
    assert stratified(label, {"train": 0.1, "val": 0.5}, 42).tolist() == expected.tolist()


def test_tp53_is_split_by_patient_and_site_within_cancer_types(tmp_path):
    table = miniatures.tcga_labels(tmp_path / "labels.csv")
    slides = tasks.read("tp53", tmp_path)
    assert len(slides) == len(table) and slides.classes == ("mutated", "wild")
    one = slides.table.iloc[0]
    assert (one["patient_id"], one["site"]) == (one["slide_id"][:12], one["slide_id"][5:7])
    assert (slides.table.groupby("site")["role"].nunique() == 1).all()
    assert (slides.table.groupby(["cancer_type", "role"]).size().unstack() > 0).all(axis=None)


@pytest.mark.parametrize("by", ["site", "patient"])
def test_folds_test_every_slide_once_and_cross_nothing(tmp_path, by):
    table = miniatures.tcga_labels(tmp_path / "labels.csv")
    slides = tasks.read("tp53", tmp_path / "labels.csv")
    tested = []
    for _, fold in slides.folds(5, by):
        unit = {"site": "site", "patient": "patient_id"}[by]
        assert (fold.table.groupby(unit)["role"].nunique() == 1).all()
        test = fold.table[fold.table["role"] == "test"]
        tested += test["slide_id"].tolist()
        assert len(test) == pytest.approx(len(table) / 5, rel=0.4)
        assert set(test["cancer_type"]) == {"BRCA", "LUAD", "COAD"} and test["label"].nunique() == 2
    assert sorted(tested) == sorted(table["slide_id"])


def test_floors_see_the_site_by_patient_and_not_by_site(tmp_path):
    """Where the site decides the label, folds by patient give it away and folds by site do not."""
    miniatures.tcga_labels(tmp_path / "labels.csv", site_effect=0.9)
    auc = tasks.read("tp53", tmp_path).floors().set_index(["floor", "folds"])["auc"]
    assert auc["site", "by patient"] > 0.9
    assert auc["cancer type and site", "by patient"] > 0.9
    assert auc["site", "by site"] == pytest.approx(0.5)  # never seen: no information at all
    assert abs(auc["cancer type", "by site"] - 0.5) < 0.15


def test_floors_see_the_cancer_type_and_nothing_in_a_coin(tmp_path):
    table = miniatures.tcga_labels(tmp_path / "coin.csv")
    coin = tasks.read("tp53", tmp_path / "coin.csv").floors()
    assert (coin["auc"] - 0.5).abs().max() < 0.15 and (coin["n_test"] == len(table)).all()
    table["label"] = np.where(table["cancer_type"] == "BRCA", "mutated", table["label"])
    table.to_csv(tmp_path / "labels.csv", index=False)
    found = tasks.read("tp53", tmp_path).floors().set_index(["floor", "folds"])["auc"]
    assert found["cancer type", "by site"] > 0.62
    few = tasks.read("tp53", tmp_path / "coin.csv")
    few = few.table.groupby(["cancer_type", "site"]).head(1)
    few["label"] = ["mutated"] * 6 + ["wild"] * (len(few) - 6)
    assert sites.floors(few, n=3)["auc"].isna().all()  # six patients of a class are too few for an AUC


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="cancer_type"), "no column 'cancer_type'; TP53 is split and floored within"),
        (lambda t: t.drop(columns="label"), "no column 'label'"),
        (
            lambda t: t.assign(slide_id=[f"slide {i}" for i in range(len(t))]),
            "no column patient_id, and 'slide 0' is no TCGA",
        ),
        (lambda t: t.assign(patient_id="one", site=t["slide_id"].str[5:7]), "patient one has two sites"),
        (lambda t: pd.concat([t, t.head(1)]), "lists TCGA-B0-0000-01Z-00-DX1 twice"),
        (lambda t: t.assign(label=["mutated"] * (len(t) - 1) + ["odd"]), "class odd"),
        (lambda t: t.assign(role="testing"), "role 'testing' is none of"),
        (lambda t: t.assign(role=["test", "validate"] * (len(t) // 2), patient_id="P"), "patient 'P' is on two sides"),
        (lambda t: t[t["slide_id"].str.contains("-B0-|-L0-")], "sites do not fill 5 folds"),
    ],
)
def test_label_tables_that_cannot_be_used(tmp_path, change, message):
    change(miniatures.tcga_labels(tmp_path / "labels.csv")).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(InputError, match=message):
        tasks.read("tp53", tmp_path)


def test_slides_of_a_label_table_are_found_by_their_names(tmp_path):
    table = miniatures.tcga_labels(tmp_path / "labels.csv")
    with pytest.raises(InputError, match="give the folder of its slides"):
        tasks.read("exaone_brca_tp53", tmp_path).cohort()
    for name in table["slide_id"]:
        miniatures.touch(tmp_path / "slides" / f"{name}.0a1b.svs")
    slides = tasks.read("exaone_brca_tp53", tmp_path, slides=tmp_path / "slides")
    assert slides.cohort().table["path"].str.endswith(".0a1b.svs").all()
    assert {"centre", "label", "role"} <= set(slides.cohort().table)
    (tmp_path / "slides" / f"{table['slide_id'][0]}.0a1b.svs").unlink()
    with pytest.raises(InputError, match="1 of the slides are not in"):
        tasks.read("exaone_brca_tp53", tmp_path, slides=tmp_path / "slides")


def test_msi_tiles_make_a_table_of_slides(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    task = miniatures.msi(tmp_path / "data")
    tiles = tasks.read(task, tmp_path / "data", split="clean")
    slides = of_tiles(tiles, task)
    assert len(slides) == 40 and slides.table.columns[:6].tolist() == [
        "slide_id", "patient_id", "label", "site", "cancer_type", "role",
    ]  # fmt: skip
    assert slides.table["cancer_type"].unique().tolist() == ["CRC"]
    tiles.table.loc[0, "label"] = "MSS"
    with pytest.raises(InputError, match="has tiles of two classes or roles"):
        of_tiles(tiles, task)


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name.startswith("exaone_")])
def test_each_of_the_ten_biomarkers_reads_a_label_table(tmp_path, name):
    miniatures.tcga_labels(tmp_path / "labels.csv").drop(columns="cancer_type").to_csv(
        tmp_path / "labels.csv", index=False
    )
    slides = tasks.read(name, tmp_path)
    assert slides.table["cancer_type"].unique().tolist() == [tasks.about(name).title.split(":")[0]]
    assert set(slides.table["role"]) == {"probe-train", "validate", "test"}
    assert (slides.table.groupby("patient_id")["role"].nunique() == 1).all()
