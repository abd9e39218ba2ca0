"""Reading labelled tiles, and splits that keep a patient on one side."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pathfm import metrics, probe
from pathfm.benchmarks import TileSet, draw_roles
from pathfm.errors import InputError
from pathfm.features import extract
from pathfm.scores import interval
from pathfm.synthetic import CLASSES, labelled_tiles


def write_image(path: Path, seed: int = 0, side: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Classes b and a with five images each."""
    for number, label in enumerate("ba"):
        for i in range(5):
            write_image(tmp_path / "set" / label / f"{i}.png", 10 * number + i)
    return tmp_path / "set"


def write_manifest(folder: Path, **columns) -> Path:
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    table = pd.DataFrame({"file": files, "label": [Path(f).parent.name for f in files], **columns})
    table.to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


def test_a_folder_per_class(folder):
    (folder / ".ipynb_checkpoints").mkdir()
    tiles = TileSet.from_folder(folder, mpp=0.5)
    assert (tiles.name, tiles.classes, len(tiles)) == ("set", ["a", "b"], 10)
    assert tiles.y.tolist() == [0] * 5 + [1] * 5
    assert tiles.table["mpp"].unique().tolist() == [0.5]
    assert tiles.table["width_px"].unique().tolist() == [16]
    assert tiles.patients is None


def test_images_come_in_the_tables_order(folder):
    tiles = TileSet.from_folder(folder)
    images = [image for batch in tiles.images(batch_size=3) for image in batch]
    for image, path in zip(images, tiles.table["path"], strict=True):
        assert np.array_equal(image, np.array(Image.open(path)))


def test_a_manifest_gives_patients_roles_and_mpp(folder, monkeypatch):
    roles = ["probe-train", "validate", "test", "test", "probe-train"] * 2
    csv = write_manifest(folder, patient_id=[1, 2, 3, 3, 1] * 2, role=roles, mpp=[0.25, None] * 5)
    monkeypatch.chdir("/")
    for source in (folder, csv):
        tiles = TileSet.from_folder(source, mpp=0.5)
        assert tiles.patients.tolist() == list("12331" * 2)
        assert tiles.table["mpp"].tolist() == [0.25, 0.5] * 5
        assert tiles.table["role"].tolist() == roles
    assert tiles.summary().loc["a"].to_dict() == {
        "tiles": 5, "patients": 3, "probe-train": 2, "test": 2, "validate": 1, "quarantined": 0
    }  # fmt: skip


def test_a_class_may_be_called_none(folder):
    (folder / "b").rename(folder / "None")
    write_manifest(folder)
    assert TileSet.from_folder(folder).classes == ["None", "a"]


def test_any_column_can_play_the_patient(folder):
    write_manifest(folder, block=list("xyzzy") * 2)
    assert TileSet.from_folder(folder, patient="block").patients.tolist() == list("xyzzy") * 2
    with pytest.raises(InputError, match="no column 'blok'.*Did you mean 'block'"):
        TileSet.from_folder(folder, patient="blok")


def test_what_does_not_decode_is_quarantined_and_counted(folder):
    (folder / "a" / "text.png").write_text("not an image")
    (folder / "a" / "empty.jpg").touch()
    whole = write_image(folder / "b" / "cut.jpg", side=200).read_bytes()
    (folder / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    tiles = TileSet.from_folder(folder)
    reasons = tiles.quarantined.set_index("file")["reason"]
    assert len(tiles) == 10
    assert reasons["a/text.png"] == "not an image"
    assert reasons["a/empty.jpg"] == "empty file"
    assert "truncated" in reasons["b/cut.jpg"]
    assert tiles.summary()["quarantined"].to_dict() == {"a": 2, "b": 1}


def test_a_listed_file_that_is_missing_is_quarantined(folder):
    write_manifest(folder)
    (folder / "a" / "0.png").unlink()
    tiles = TileSet.from_folder(folder)
    assert len(tiles) == 9
    assert tiles.quarantined[["file", "reason"]].to_numpy().tolist() == [["a/0.png", "missing"]]


def empty_class(folder):
    (folder / "c").mkdir()


def single_class(folder):
    for path in (folder / "a").iterdir():
        path.unlink()
    (folder / "a").rmdir()


def lost_class(folder):
    for path in (folder / "a").iterdir():
        path.write_text("no image")


def no_folders(folder):
    for path in folder.rglob("*.png"):
        path.unlink()
    for path in folder.iterdir():
        path.rmdir()


def split_folders(folder):
    (folder / "a").rename(folder / "train")
    (folder / "b").rename(folder / "test")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty_class, "class folder .*/c has no image; fill it or remove it"),
        (single_class, "the single class b"),
        (lost_class, "no image of class a can be read .*not an image"),
        (no_folders, "no class folders and no manifest.csv"),
        (split_folders, "which are splits and not classes"),
        (lambda f: write_manifest(f, mpp=-1), "mpp must be above 0"),
        (lambda f: write_manifest(f, mpp="fine"), "mpp 'fine' is not a number"),
        (lambda f: write_manifest(f, role="training"), "unknown role 'training'"),
        (lambda f: write_manifest(f, patient_id=[None, *"123456789"]), "line 2 has no patient_id"),
        (lambda f: (f / "manifest.csv").write_text("path,label\n"), "no column 'file'"),
        (lambda f: (f / "manifest.csv").write_text("file,label\n"), "lists no images"),
        (lambda f: (f / "manifest.csv").write_text(""), "not a CSV table"),
        (lambda f: (f / "manifest.csv").write_bytes(b"\xff\xfe\x00,\n\x80"), "not a CSV table"),
        (lambda f: (f / "manifest.csv").write_text("file,label\na/0.png,a\na/0.png,b\n"), "a/0.png twice"),
        (
            lambda f: write_manifest(f, patient_id=list("abcde") * 2, role=["test"] * 5 + ["validate"] * 5),
            "patient 'a' is on two sides",
        ),
    ],
)
def test_a_set_that_cannot_be_used_says_why(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        TileSet.from_folder(folder)


def test_a_missing_folder_and_a_file_that_is_no_table(folder, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        TileSet.from_folder(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="not a CSV table"):
        TileSet.from_folder(folder / "a" / "0.png")


def test_a_file_that_breaks_after_the_check_is_an_error(folder):
    tiles = TileSet.from_folder(folder)
    (folder / "a" / "3.png").write_text("gone")
    with pytest.raises(InputError, match="3.png could be read before and now cannot"):
        list(tiles.images())


def made(patients=40, tiles=12, classes=4, centres=4, seed=0) -> TileSet:
    """A table without files: every patient has one to three of the classes."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), tiles)
    label = (patient + rng.integers(0, 3, len(patient))) % classes
    table = pd.DataFrame({"file": np.arange(len(label)).astype(str), "label": label.astype(str)})
    table["patient_id"], table["centre"] = patient.astype(str), (patient // 4 % centres).astype(str)
    return TileSet("made", table)


@pytest.mark.parametrize(("by", "column"), [("patient", "patient_id"), ("centre", "centre")])
@pytest.mark.parametrize("seed", range(5))
def test_a_split_keeps_units_whole_and_classes_everywhere(by, column, seed):
    table = made().split(by, seed=seed).table
    assert (table.groupby(column)["role"].nunique() == 1).all()
    share = pd.crosstab(table["label"], table["role"], normalize="index")
    assert (share > 0).all(axis=None)
    if by == "patient":
        assert np.abs(share - [0.6, 0.2, 0.2]).max(axis=None) < 0.12


def test_a_split_is_its_seed():
    roles = [made().split(seed=seed).table["role"].tolist() for seed in (3, 3, 4)]
    assert roles[0] == roles[1] != roles[2]


def test_fractions_are_met_by_tile():
    table = made().table
    role = draw_roles(table, "tile", fractions={"probe-train": 0.5, "test": 0.5})
    assert np.abs(pd.crosstab(table["label"], role, normalize="index") - 0.5).max(axis=None) < 0.02


def test_a_patient_on_two_sides_is_refused():
    with pytest.raises(InputError, match="patient .* is on two sides"):
        made().split("tile")
    assert made().split("tile", allow_leak=True).leaky
    assert not TileSet("x", made().table.drop(columns="patient_id")).split("tile").leaky
    table = made().table
    table.loc[0, "centre"] = "1"  # patient 0 was treated in centres 0 and 1
    with pytest.raises(InputError, match="patient '0' is on two sides"):
        for _, _tiles in TileSet("x", table).folds("centre"):
            pass


def test_slides_stand_in_for_patients():
    tiles = TileSet("x", made().table.rename(columns={"patient_id": "slide_id"})).split("patient")
    assert (tiles.table.groupby("slide_id")["role"].nunique() == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "slides"}, "cannot split by 'slides'"),
        ({"fractions": {"test": 0.5}}, "sum to 1"),
        ({"fractions": {"test": 1.5, "validate": -0.5}}, "positive"),
    ],
)
def test_impossible_splits(settings, message):
    with pytest.raises(InputError, match=message):
        made().split(**settings)


def test_splits_that_the_tiles_do_not_allow():
    with pytest.raises(InputError, match="needs a column centre"):
        TileSet("x", made().table.drop(columns="centre")).split("centre")
    with pytest.raises(InputError, match=r"gets no tile of class \d: \d patient\(s\) hold that class"):
        made(patients=2).split()


def test_a_class_of_three_patients_reaches_every_role():
    table = made(patients=30).table
    table.loc[table["patient_id"].isin(["4", "5", "6"]), "label"] = "rare"
    for seed in range(10):
        split = TileSet("x", table).split(seed=seed).table
        assert split.loc[split["label"] == "rare", "role"].nunique() == 3


def test_folds_test_every_centre_once():
    tiles = made()
    seen = []
    for name, fold in tiles.folds("centre"):
        assert set(fold.table.loc[fold.table["role"] == "test", "centre"]) == {name}
        assert set(fold.table["role"]) == {"probe-train", "validate", "test"}
        seen.append(name)
    assert seen == ["0", "1", "2", "3"]
    assert len(list(tiles.folds("patient", n=5))) == 5
    nobody = TileSet("x", tiles.table.drop(columns=["patient_id", "centre"]))
    assert len(list(nobody.folds("tile", n=3))) == 3
    for settings in ({"by": "patient", "n": 41}, {"by": "centre", "n": 1}):
        with pytest.raises(InputError, match="folds by .* cannot be made"):
            list(tiles.folds(**settings))


def test_synthetic_tiles_go_all_the_way_to_a_table(cohort, tmp_path):
    made = labelled_tiles(cohort, tmp_path / "tiles", tile_px=64, mpp=1.0, per_class=4)
    tiles = TileSet.from_folder(made, name="synthetic", patient="slide_id")  # too few patients for three roles
    everywhere = tiles.table.groupby("label")["slide_id"].transform("nunique") == cohort.table["slide_id"].nunique()
    tiles = tiles.subset(everywhere.to_numpy()).split("patient")
    assert set(tiles.classes) <= set(CLASSES)
    assert tiles.table["mpp"].unique().tolist() == [1.0]
    table = probe.floors(tiles, folder=tmp_path / "features").set_index("features")
    assert table.loc["colour mean and spread", "balanced_accuracy"] > 1.5 / len(tiles.classes)
    assert table.loc["colour mean and spread", "verdict"] == "not informative"
    x = extract("colour", tiles, folder=tmp_path / "features").x
    found = metrics.slide_dependence(x, tiles.table["label"], tiles.table["slide_id"], tiles.xy_um, apart_um=100)
    assert 0 <= found.identity <= 1
    assert 0 < found.n <= len(tiles)


@pytest.mark.real
def test_real_colorectal_tiles(real_data):
    tiles = TileSet.from_folder(real_data / "tiles" / "crc_val_he_7k_native224", mpp=0.5)
    assert tiles.classes == ["ADI", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]
    assert tiles.summary()["tiles"].tolist() == [10] * 7
    assert len(tiles.quarantined) == 0


@pytest.mark.real
def test_real_oral_tiles_have_the_floors_that_are_known(real_data, tmp_path):
    """Colour scores 0.75 when blocks of neighbouring images are held out."""
    tiles = TileSet.from_folder(real_data / "tiles" / "oral_oscc", patient="block")
    assert tiles.summary()["tiles"].to_dict() == {"Normal": 164, "OSCC": 548}
    floor = {}
    for name in ("chance", "colour", "colour+lbp"):
        found = probe.cross_validate(extract(name, tiles, folder=tmp_path), by="patient", n=5)
        floor[name] = interval(found).value
    assert floor["chance"] == 0.5
    assert floor["colour"] == pytest.approx(0.75, abs=0.03)
    assert floor["colour+lbp"] == pytest.approx(0.74, abs=0.06)
