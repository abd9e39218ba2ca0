"""Cohorts from GDC's tables: what a barcode says, whose code it is, and splits within a cancer type."""

from __future__ import annotations

import uuid

import numpy as np
import pandas as pd
import pytest

from pathfm import Cohort, InputError, gdc

# As GDC's page has it: columns, spelling and all.
CODES = """TSS Code\tSource Site\tStudy Name\tBCR
A7\tChristiana Healthcare\tBreast invasive carcinoma\tNCH
44\tChristiana  healthcare\tLung adenocarcinoma\tIGC
50\tUniversity of Pittsburgh\tLung adenocarcinoma\tIGC
NA\tDuke University\tUterine Carcinosarcoma\tNCH
AV\tNCH\tCell Line Control\tNCH
"""

SLIDES = (  # name, and what it is: project, centre, section, sample
    ("TCGA-A7-A0CE-01Z-00-DX1.{}.svs", "TCGA-BRCA", "Christiana Healthcare", "FFPE", "tumour"),
    ("TCGA-A7-A0CE-01A-01-TS1.{}.svs", "TCGA-BRCA", "Christiana Healthcare", "frozen", "tumour"),
    ("TCGA-44-2657-11A-01-BS1.{}.svs", "TCGA-LUAD", "Christiana Healthcare", "frozen", "normal"),
    ("TCGA-50-5931-01Z-00-DX2.{}.svs", "TCGA-LUAD", "University of Pittsburgh", "FFPE", "tumour"),
    ("TCGA-NA-A4R0-01A-02-MSB.{}.svs", "TCGA-UCS", "Duke University", "frozen", "tumour"),
    ("TCGA-AV-A03D-20A-01-TS1.{}.svs", "Cell Line Control", "NCH", "frozen", "control"),
)


@pytest.fixture
def codes(tmp_path):
    """GDC's table of codes, a few rows of it."""
    (tmp_path / "codes.txt").write_text(CODES)
    return tmp_path / "codes.txt"


def manifest(path, names=None, **columns):
    """A GDC manifest of slides, each with its uuid."""
    names = [name for name, *_ in SLIDES] if names is None else names
    ids = [str(uuid.UUID(int=k + 1)) for k in range(len(names))]
    table = pd.DataFrame(
        {
            "id": ids,
            "filename": [name.format(str(uuid.UUID(int=k + 99)).upper()) for k, name in enumerate(names)],
            "md5": ["0" * 32] * len(names),
            "size": [5] * len(names),
            "state": ["released"] * len(names),
        }
    ).assign(**columns)
    table.to_csv(path, sep="\t", index=False)
    return table


def download(table, folder, skip=0):
    """Lay the files down as GDC's client does: <folder>/<uuid>/<file>."""
    for row in table.iloc[skip:].itertuples():
        (folder / row.id).mkdir(parents=True, exist_ok=True)
        (folder / row.id / row.filename).write_text("slide")


def test_a_manifest_becomes_a_cohort(tmp_path, codes):
    listed = manifest(tmp_path / "m.txt")
    download(listed, tmp_path / "slides")
    cohort = Cohort.from_gdc(tmp_path / "m.txt", tmp_path / "slides", codes)
    found = cohort.table
    assert list(found["slide_id"]) == [name[: name.index(".")] for name, *_ in SLIDES]
    for at, (name, *facts) in enumerate(SLIDES):
        assert list(found.loc[at, ["project", "centre", "section", "sample"]]) == facts, name
    assert list(found["patient_id"][:3]) == ["TCGA-A7-A0CE", "TCGA-A7-A0CE", "TCGA-44-2657"]
    assert list(found["source_site"]) == ["A7", "A7", "44", "50", "NA", "AV"]
    assert found["path"][0] == str(tmp_path / "slides" / listed["id"][0] / listed["filename"][0])
    again = Cohort.read(cohort.write(tmp_path / "cohort.csv"))
    assert list(again.table["source_site"][:4]) == ["A7", "A7", "44", "50"]  # codes stay text


def test_without_a_table_of_ones_own_codes_are_those_of_gdc(tmp_path):
    download(manifest(tmp_path / "m.txt"), tmp_path)
    found = Cohort.from_gdc(tmp_path / "m.txt").table
    assert list(found["source_site"]) == ["A7", "A7", "44", "50", "NA", "AV"]
    for at, (name, *facts) in enumerate(SLIDES):
        assert list(found.loc[at, ["project", "centre", "section", "sample"]]) == facts, name


def test_the_table_that_comes_along_is_whole_and_makes_one_of_an_institution_spelt_twice():
    sites = gdc.source_sites()
    assert len(sites) == 830 and sites.index.str.fullmatch("[A-Z0-9]{2}").all() and sites["centre"].str.len().min() > 2
    assert set(sites["project"]) >= {f"TCGA-{study}" for study in gdc.STUDIES.values()}
    assert sites.loc["38", "centre"] == sites.loc["DE", "centre"] == "University of North Carolina"  # UNC in the first
    table = pd.read_csv(gdc.SITES, dtype=str, keep_default_na=False)
    merged = table.groupby("centre")["gdc_name"].agg(set)
    assert merged["University of North Carolina"] == {"UNC", "University of North Carolina"}
    assert len(merged) == 168 and table["gdc_name"].nunique() == 215


def test_a_sample_sheet_says_the_same(tmp_path, codes):
    listed = manifest(tmp_path / "m.txt")
    download(listed, tmp_path)
    sheet = pd.DataFrame({"File ID": listed["id"], "File Name": listed["filename"], "Data Type": "Slide Image"})
    sheet["Project ID"] = [project for _, project, *_ in SLIDES]
    sheet.to_csv(tmp_path / "sheet.tsv", sep="\t", index=False)
    pd.testing.assert_frame_equal(
        Cohort.from_gdc(tmp_path / "sheet.tsv", sites=codes).table,
        Cohort.from_gdc(tmp_path / "m.txt", sites=codes).table,
    )
    sheet["Project ID"] = "TCGA-OV"
    sheet.to_csv(tmp_path / "sheet.tsv", sep="\t", index=False)
    with pytest.raises(InputError, match=r"TCGA-A7-A0CE-01Z-00-DX1 is of TCGA-OV.* A7 is of TCGA-BRCA"):
        Cohort.from_gdc(tmp_path / "sheet.tsv", sites=codes)


def test_a_table_of_codes_as_gdc_spells_it(codes):
    sites = gdc.source_sites(codes)
    assert list(sites.index) == ["A7", "44", "50", "NA", "AV"]  # NA is no missing value
    assert sites.loc["44", "centre"] == sites.loc["A7", "centre"] == "Christiana Healthcare"  # one, however spelt
    assert sites.loc["50", "project"] == "TCGA-LUAD" and sites.loc["AV", "project"] == "Cell Line Control"
    assert len(set(gdc.STUDIES.values())) == 33


@pytest.mark.parametrize(
    ("kind", "sample"),
    [("01", "tumour"), ("09", "tumour"), ("40", "tumour"), ("10", "normal"), ("19", "normal"), ("20", "control")]
    + [("29", "control"), ("50", "other"), ("61", "other")],
)
def test_sample_types(kind, sample):
    assert gdc.barcode(f"TCGA-A7-A0CE-{kind}A-01-TS1.svs").sample == sample


@pytest.mark.parametrize(
    "name",
    ["slide.svs", "TCGA-A7-A0CE.svs", "TCGA-A7-A0CE-01Z-00-XX1.svs", "tcga-a7-a0ce-01z-00-dx1.svs", "C3L-00001-21.svs"]
    + ["TCGA-A7-A0CE-01A-01R-A00Z-07.svs", "xTCGA-A7-A0CE-01Z-00-DX1.svs"],
)
def test_names_without_a_barcode(name, tmp_path):
    manifest(tmp_path / "m.txt", ["TCGA-A7-A0CE-01Z-00-DX1.svs", name])
    with pytest.raises(InputError, match=f"m.txt: '{name}' begins with no barcode of a TCGA slide, such as TCGA-A7"):
        Cohort.from_gdc(tmp_path / "m.txt")


def test_slides_that_are_not_there_yet_are_counted_and_named(tmp_path):
    listed = manifest(tmp_path / "m.txt")
    with pytest.raises(InputError, match=r"6 of the 6 files are not in .*pathfm fetch .*m\.txt --folder"):
        Cohort.from_gdc(tmp_path / "m.txt", tmp_path / "slides")
    download(listed, tmp_path / "slides", skip=2)
    with pytest.warns(UserWarning, match="2 of the 6 files are not in .*TCGA-A7-A0CE-01Z-00-DX1.*quarantine them"):
        cohort = Cohort.from_gdc(tmp_path / "m.txt", tmp_path / "slides")
    assert len(cohort) == 6


def test_one_glass_scanned_twice_keeps_two_names(tmp_path):
    listed = manifest(tmp_path / "m.txt", [SLIDES[0][0], SLIDES[0][0], SLIDES[1][0]])
    download(listed, tmp_path)
    names = list(Cohort.from_gdc(tmp_path / "m.txt").table["slide_id"])
    assert names == [*(file.removesuffix(".svs") for file in listed["filename"][:2]), "TCGA-A7-A0CE-01A-01-TS1"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "m.txt is empty; it needs the columns id, filename, md5, size"),
        ("id\tfilename\tmd5\tsize\tstate\n", "lists no files"),
        ("id\tname\tmd5\n1\ta.svs\tx\n", "no GDC manifest: it lacks filename, size"),
        ("File ID\tCase ID\n1\tTCGA\n", "no GDC sample sheet: it lacks File Name, Project ID"),
        ("id,filename,md5,size\n1,a,b,2\n", "it lacks id, filename, md5, size"),
        ("id\tfilename\tmd5\tsize\n../../x\ta.svs\tx\t1\n", "row 1 has id '../../x'"),
        (f"id\tfilename\tmd5\tsize\n{uuid.UUID(int=1)}\t../a.svs\tx\t1\n", "and file '../a.svs'"),
        (f"id\tfilename\tmd5\tsize\n{uuid.UUID(int=1)}\ta.svs\tx\tbig\n", "row 1 has size 'big'"),
        (f"id\tfilename\tmd5\tsize\n{uuid.UUID(int=1)}\ta.maf.gz\tx\t1\n", "1 files that are no slides .a.maf.gz."),
        (
            f"id\tfilename\tmd5\tsize\n{uuid.UUID(int=1)}\tTCGA-0Z-A0CE-01Z-00-DX1.svs\tx\t1\n",
            "source site '0Z'.*sites=",
        ),
    ],
)
def test_tables_that_cannot_be_used(text, complaint, tmp_path, codes):
    (tmp_path / "m.txt").write_text(text)
    with pytest.raises(InputError, match=complaint):
        Cohort.from_gdc(tmp_path / "m.txt", sites=codes)


def test_files_listed_twice_and_tables_that_are_none(tmp_path):
    listed = manifest(tmp_path / "m.txt")
    for column in ("id", "filename"):
        twice = listed.copy()
        twice.loc[3, column] = twice.loc[1, column]
        twice.to_csv(tmp_path / "m.txt", sep="\t", index=False)
        with pytest.raises(InputError, match=f"lists {twice.loc[1, column]} 2 times; keep one"):
            Cohort.from_gdc(tmp_path / "m.txt")
    with pytest.raises(InputError, match="none.txt does not exist"):
        Cohort.from_gdc(tmp_path / "none.txt")
    (tmp_path / "m.txt").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(InputError, match="no tab-separated table"):
        Cohort.from_gdc(tmp_path / "m.txt")


def test_a_table_of_codes_of_ones_own(tmp_path):
    download(manifest(tmp_path / "m.txt", ["TCGA-0Z-A0CE-01Z-00-DX1.svs"]), tmp_path)
    (tmp_path / "sites.tsv").write_text("code\tproject\tcentre\n0Z\tTCGA-OV\tOurs\n")
    cohort = Cohort.from_gdc(tmp_path / "m.txt", sites=tmp_path / "sites.tsv")
    assert list(cohort.table.loc[0, ["project", "centre"]]) == ["TCGA-OV", "Ours"]
    (tmp_path / "sites.tsv").write_text("code\tcentre\n0Z\tOurs\n")
    with pytest.raises(InputError, match=r"sites.tsv has no column project. Found: code, centre"):
        Cohort.from_gdc(tmp_path / "m.txt", sites=tmp_path / "sites.tsv")
    (tmp_path / "sites.tsv").write_text("code\tproject\tcentre\n0Z\tTCGA-OV\tA\n0Z\tTCGA-OV\tB\n")
    with pytest.raises(InputError, match="code '0Z' more than once"):
        Cohort.from_gdc(tmp_path / "m.txt", sites=tmp_path / "sites.tsv")


@pytest.fixture
def everyone() -> pd.DataFrame:
    """Two slides a patient, five patients a code; thirty institutions, each with codes in some of five studies."""
    rng = np.random.default_rng(0)
    rows = [
        (f"{study}{site}-{p}-{s}", f"{study}{site}-{p}", f"{study}{site}", f"TCGA-{study}", f"institution {site}")
        for study in ("BRCA", "LUAD", "LUSC", "COAD", "KIRC")
        for site in sorted(rng.choice(30, 18, replace=False))
        for p in range(5)
        for s in range(2)
    ]
    return pd.DataFrame(rows, columns=["slide_id", "patient_id", "source_site", "project", "centre"]).assign(
        path="x.svs"
    )


def test_a_centre_split_is_made_within_each_cancer_type(everyone):
    fractions = {"pretrain": 0.6, "validate": 0.2, "test": 0.2}
    for seed in range(5):
        table = Cohort(everyone).split("centre", fractions, seed).table
        assert (table.groupby("centre")["role"].nunique() == 1).all()  # an institution has one role everywhere
        shares = pd.crosstab(table["project"], table["role"], normalize="index")
        for role, share in fractions.items():
            assert shares[role].between(share - 0.15, share + 0.15).all(), (seed, shares)
    shuffled = Cohort(everyone.sample(frac=1, random_state=0)).split("centre", fractions, seed).table
    assert shuffled.set_index("slide_id")["role"].reindex(table["slide_id"]).tolist() == table["role"].tolist()


def test_centre_splits_that_cannot_be(everyone):
    two = everyone.loc[everyone["project"] == "TCGA-COAD", "centre"].unique()[:2]
    few = everyone[(everyone["project"] != "TCGA-COAD") | everyone["centre"].isin(two)]
    with pytest.raises(InputError, match=r"project 'TCGA-COAD' has 2 centre.s. for 4 roles.*leave the project out"):
        Cohort(few).split("centre")
    with pytest.raises(InputError, match="a slide has no project"):
        Cohort(everyone.assign(project=[None, *everyone["project"][1:]])).split("centre")
    pairs = [("a", "x"), ("a", "y"), ("b", "y"), ("b", "z"), ("c", "z"), ("c", "x")]  # no two-colouring of a triangle
    triangle = pd.DataFrame(pairs, columns=["project", "centre"]).assign(slide_id=list("123456"), path="x.svs")
    with pytest.raises(InputError, match="no draw of whole centres gives every project every role: . stays without"):
        Cohort(triangle).split("centre", {"pretrain": 0.5, "test": 0.5})
