"""The table of slides: no patient on two sides, and tables that cannot be used."""

from __future__ import annotations

import pandas as pd
import pytest

from pathfm import Cohort, InputError
from pathfm.cohort import check_roles, patient_of


@pytest.fixture
def table() -> pd.DataFrame:
    """30 slides of 15 patients in 3 centres, each patient in one."""
    return pd.DataFrame(
        {
            "slide_id": [f"s{k:02d}" for k in range(30)],
            "path": [f"slides/s{k:02d}.svs" for k in range(30)],
            "patient_id": [f"p{k // 2:02d}" for k in range(30)],
            "centre": [f"c{k // 2 % 3}" for k in range(30)],
        }
    )


@pytest.mark.parametrize("by", ["patient", "centre"])
def test_no_patient_is_on_two_sides(table, by):
    for seed in range(20):
        fractions = {"pretrain": 0.6, "validate": 0.2, "test": 0.2}
        split = Cohort(table).split(by, fractions, seed).table
        assert (split.groupby("patient_id")["role"].nunique() == 1).all()
        assert set(split["role"]) == set(fractions)


def test_shares_are_kept_as_well_as_units_allow(table):
    split = Cohort(table).split("patient", {"pretrain": 0.6, "test": 0.4}).table
    assert split.groupby("role")["patient_id"].nunique().to_dict() == {"pretrain": 9, "test": 6}


def test_a_split_is_of_patients_not_of_rows(table):
    """Neither the order of rows nor other columns change who is where; the seed does."""
    one = Cohort(table).split(seed=3).table.set_index("slide_id")["role"]
    other = Cohort(table.sample(frac=1, random_state=0)).split(seed=3).table.set_index("slide_id")["role"]
    assert one.equals(other.reindex(one.index))
    assert not one.equals(Cohort(table).split(seed=4).table.set_index("slide_id")["role"])


def test_splitting_a_patient_is_refused(table):
    with pytest.raises(InputError, match=r"patient 'p\d\d' is on two sides.*split\(by='patient'\)"):
        Cohort(table).split(by="slide")
    table["role"] = ["pretrain", "test"] * 15
    for use in (check_roles, Cohort):
        with pytest.raises(InputError, match=r"patient 'p00' is on two sides of the split \(pretrain, test\)"):
            use(table)


def test_a_slide_without_patient_is_its_own(table):
    table.loc[3, "patient_id"] = None
    assert patient_of(table)[3] == "s03"
    assert patient_of(table.drop(columns="patient_id")).nunique() == 30


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"by": "centr"}, "cannot split by 'centr'. Did you mean 'centre'"),
        ({"fractions": {"train": 1}}, "unknown role 'train'. Did you mean 'pretrain'"),
        ({"fractions": {"test": 0, "pretrain": 1}}, "give a positive share"),
        ({"by": "centre"}, "3 centres cannot fill 4 roles"),
    ],
)
def test_splits_that_cannot_be(table, arguments, complaint):
    with pytest.raises(InputError, match=complaint):
        Cohort(table).split(**arguments)


def test_written_and_read_again(table, tmp_path):
    table["path"] = [str(tmp_path / path) for path in table["path"]]
    table["patient_id"] = [f"{k:04d}" for k in range(30)]  # stays text
    table["mpp"] = 0.25
    Cohort(table).write(tmp_path / "cohort.csv")
    assert "slides/s00.svs" in (tmp_path / "cohort.csv").read_text()
    assert str(tmp_path) not in (tmp_path / "cohort.csv").read_text()
    pd.testing.assert_frame_equal(Cohort.read(tmp_path / "cohort.csv").table, table, check_dtype=False)


def test_subsets(table):
    cohort = Cohort(table)
    assert len(cohort.subset("centre == 'c1'")) == 10
    assert len(cohort.subset(table["centre"] == "c2")) == 10
    assert [row.slide_id for row in cohort.subset(["s05", "s01"])] == ["s01", "s05"]
    for which, complaint in (
        (["s99"], "no slide 's99'"),
        ("center == 'c1'", "the query .* fails.*Columns: slide_id, path"),
        ("centre == 'c9'", "no slide is left"),
    ):
        with pytest.raises(InputError, match=complaint):
            cohort.subset(which)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("slide,path\na,a.svs\n", "no column 'slide_id'; rename one or add it. Found: slide, path"),
        ("slide_id,file\na,a.svs\n", "no column 'path'; rename one or add it. Found: slide_id, file"),
        ("slide_id,path\na,a.svs\nb,b.svs\na,c.svs\n", "slide_id 'a' more than once"),
        ("slide_id,path\n", "lists no slides"),
        ("", "is empty"),
        ("slide_id,path\na,\n", "no path in row 1"),
        ("slide_id,path,role\na,a.svs,train\n", "unknown role 'train'"),
        ('slide_id,path\n"a,a.svs\n', "is no CSV"),
        ("slide_id,path\na,a.svs,3,4\nb,c\n", "is no CSV"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, complaint):
    (tmp_path / "cohort.csv").write_text(text)
    with pytest.raises(InputError, match=complaint):
        Cohort.read(tmp_path / "cohort.csv")


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "cohort.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe\x00\x81")
    with pytest.raises(InputError, match=r"cohort\.csv is no CSV that can be read"):
        Cohort.read(tmp_path / "cohort.csv")
    with pytest.raises(InputError, match=r"none\.csv does not exist"):
        Cohort.read(tmp_path / "none.csv")
    with pytest.raises(InputError, match="is no CSV that can be read"):
        Cohort.read(tmp_path)
