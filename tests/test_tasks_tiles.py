"""The tile tasks, read from miniature copies in their official layouts: splits, partial and wrong downloads."""

import h5py
import miniatures
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pathfm import InputError, TileSet, gdc, tasks
from pathfm.tasks.folders import BACH_STARTS, BACH_VAL, BREAKHIS_VAL
from pathfm.tasks.packed import shots

MAKE = {
    name: getattr(miniatures, name) for name in ("bach", "crc", "mhist", "breakhis", "bracs", "gleason", "til", "pcam")
} | {
    "crc_nonorm": lambda folder: miniatures.crc(folder, "crc_nonorm"),
    "msi_crc": miniatures.msi,
    "msi_stad": lambda folder: miniatures.msi(folder, "msi_stad"),
    "pcam_10shot": lambda folder: miniatures.pcam(folder, "pcam_10shot"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))


def sides(tiles: TileSet) -> dict[str, int]:
    return tiles.table["role"].value_counts().to_dict()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("split", tasks.SPLITS)
def test_every_task_reads_its_own_layout(tmp_path, name, split):
    task = MAKE[name](tmp_path / "data")
    tiles = tasks.read(task, tmp_path / "data", split=split)
    assert sorted(tiles.classes) == sorted(task.classes)
    assert len(tiles.quarantined) == 0
    assert tiles.table["file"].is_unique and (tiles.table["digest"].str.len() == 24).all()
    assert tiles.table["mpp"].iloc[0] == task.mpp or task.mpp is None and tiles.table["mpp"].isna().all()
    if tiles.patients is not None:
        assert (tiles.table.assign(p=tiles.patients).groupby("p")["role"].nunique() == 1).all()
    if split == "clean":
        assert set(tiles.table["role"]) == {"probe-train", "validate", "test"}
    assert ("clean" in tiles.name) == (split == "clean" and bool(task.clean))
    assert "partial" not in tiles.name
    shown = [image for batch in tiles.images(7) for image in batch]
    assert np.array_equal(shown[3], tiles.image(3))
    assert shown[3].dtype == np.uint8 and shown[3].shape[2] == 3


@pytest.mark.parametrize("name", [name for name in MAKE if tasks.about(name).same_split])
def test_the_clean_split_never_chooses_on_what_it_reports(tmp_path, name):
    """The official validation images are the clean test, or (Gleason) the paper's own test is."""
    task = MAKE[name](tmp_path / "data")
    official = tasks.read(task, tmp_path / "data").table.set_index("file")["role"]
    clean = tasks.read(task, tmp_path / "data", split="clean").table.set_index("file")["role"]
    assert set(official) == {"probe-train", "validate"}
    if name == "gleason":
        assert clean[official.index].equals(official)
        assert (clean.drop(official.index) == "test").all() and len(clean) > len(official)
    else:
        assert (clean[official.index[official == "validate"]] == "test").all()
        assert set(clean[official.index[official == "probe-train"]]) == {"probe-train", "validate"}


def test_bach_is_split_by_the_numbers_in_its_names(tmp_path):
    """Written anew from eva's ranges over all 400 places, and held against what the reader says."""
    ranges = [(0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400)]
    train = {place for low, high in ranges for place in range(low, high)}
    assert (len(train), 400 - len(train)) == (268, 132)
    task = MAKE["bach"](tmp_path / "data")
    tiles = tasks.read(task, tmp_path / "data").table
    place = tiles["label"].map(tiles.groupby("label").ngroup().groupby(tiles["label"]).first()) * 100
    place += tiles["file"].str[-7:-4].astype(int) - 1
    assert ((tiles["role"] == "probe-train") == place.isin(train)).all()
    clean = tasks.read(task, tmp_path / "data", split="clean").table
    assert (clean.groupby("block")["role"].nunique() == 1).all()
    assert set(BACH_VAL) < set(BACH_STARTS)


def test_breakhis_validates_on_evas_patients_and_leaves_the_rare_types_out(tmp_path):
    task = MAKE["breakhis"](tmp_path / "data")
    tiles = tasks.read(task, tmp_path / "data")
    assert sides(tiles) == {"probe-train": 48, "validate": 8}
    assert set(tiles.table.loc[tiles.table["role"] == "validate", "patient_id"]) <= set(BREAKHIS_VAL)
    assert not tiles.table["file"].str.contains("100X|SOB_B_A-").any()


def test_msi_tiles_say_patient_slide_and_site(tmp_path):
    tiles = tasks.read(MAKE["msi_crc"](tmp_path / "data"), tmp_path / "data")
    one = tiles.table.iloc[0]
    assert one["slide_id"].startswith(one["patient_id"]) and one["site"] == one["patient_id"][5:7]
    assert one["centre"] == gdc.source_sites()["centre"].get(one["site"], one["site"])
    assert sides(tiles) == {"probe-train": 40, "test": 40}


def test_an_official_split_that_crosses_patients_is_said_and_mended(tmp_path):
    task = miniatures.til(tmp_path / "data", leak=True)
    official = tasks.read(task, tmp_path / "data")
    assert official.leaky and "patients on two sides" in official.name
    clean = tasks.read(task, tmp_path / "data", split="clean")
    assert not clean.leaky and (clean.table.groupby("patient_id")["role"].nunique() == 1).all()


@pytest.mark.parametrize("name", [name for name in MAKE if "pcam" not in name])
def test_a_partial_download_is_named_with_what_is_missing(tmp_path, name):
    task, folder = MAKE[name](tmp_path / "data"), tmp_path / "data"
    whole = tasks.read(task, folder).table
    file = whole.loc[whole["role"] == "probe-train", "file"].iloc[0]
    (folder / file).unlink()
    with pytest.raises(InputError, match=r"partial download\. 1 of \d+ are missing\. .*: \d+ of \d+"):
        tasks.read(task, folder)
    tiles = tasks.read(task, folder, allow_partial=True)
    assert "partial: " in tiles.name
    assert file not in set(tiles.table["file"])


def test_the_whole_data_set_is_the_published_one(tmp_path):
    """Without other counts a miniature is what it is: a partial copy."""
    MAKE["crc"](tmp_path / "data")
    with pytest.raises(InputError, match="107,054 of 107,180 are missing. train ADI: 10 of 10,407"):
        tasks.read("crc", tmp_path / "data")
    assert tasks.read("crc", tmp_path / "data", allow_partial=True).name == "crc, partial: 126 of 107,180"


def test_more_than_the_official_set_is_refused(tmp_path):
    task = MAKE["crc"](tmp_path / "data")
    miniatures.picture(tmp_path / "data/CRC-VAL-HE-7K/TUM/TUM-TCGA-ZZZZZZZZ.tif")
    with pytest.raises(InputError, match="holds 5 of val TUM, the official set has 4; two versions may be mixed"):
        tasks.read(task, tmp_path / "data")


def test_a_wrong_layout_says_what_was_expected_where(tmp_path):
    task, folder = MAKE["crc"](tmp_path / "data"), tmp_path / "data"
    with pytest.raises(InputError, match=r"expected NCT-CRC-HE-100K in .*; it is in .*/data: give that folder"):
        tasks.read(task, folder / "CRC-VAL-HE-7K")
    with pytest.raises(InputError, match="it is in .*/data: give that folder"):
        tasks.read(task, tmp_path)
    (folder / "NCT-CRC-HE-100K").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="which holds CRC-VAL-HE-7K; get it from https://zenodo.org"):
        tasks.read(task, folder)
    (folder / "NCT-CRC-HE-100K.zip").touch()
    with pytest.raises(InputError, match="unpack NCT-CRC-HE-100K.zip first"):
        tasks.read(task, folder)
    with pytest.raises(InputError, match="is not a folder"):
        tasks.read(task, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("crc", "CRC-VAL-HE-7K/TUM/ADI-TCGA-AAAAAAAA.tif"),  # of another class
        ("bach", "ICIAR2018_BACH_Challenge/Photos/Normal/b001.tif"),
        ("bach", "ICIAR2018_BACH_Challenge/Photos/Benign/b101.tif"),
        ("bracs", "BRACS_RoI/latest_version/train/0_N/BRACS_1_IC_1.png"),
        ("gleason", "train_validation_patches_750/ZT76_39_A_1_1/ZT76_39_A_1_2_patch_0_class_1.jpg"),
        ("msi_crc", "CRC_DX_TRAIN_MSS/MSS/0001.png"),
        ("mhist", "images/tumour.png"),
    ],
)
def test_files_of_another_set_are_named(tmp_path, name, file):
    task = MAKE[name](tmp_path / "data")
    miniatures.picture(tmp_path / "data" / file)
    with pytest.raises(InputError, match="has no name of this data set.*expected .*images or labels of another set"):
        tasks.read(task, tmp_path / "data")


def test_labels_of_another_set(tmp_path):
    task, folder = MAKE["mhist"](tmp_path / "data"), tmp_path / "data"
    csv = pd.read_csv(folder / "annotations.csv")
    csv.assign(**{"Majority Vote Label": "TUM"}).to_csv(folder / "annotations.csv", index=False)
    with pytest.raises(InputError, match="says 'TUM', which is no label or partition of mhist"):
        tasks.read(task, folder)
    csv.rename(columns={"Partition": "fold"}).to_csv(folder / "annotations.csv", index=False)
    with pytest.raises(InputError, match="has no column 'Partition'"):
        tasks.read(task, folder)


def test_what_does_not_decode_is_quarantined_and_counted(tmp_path):
    task, folder = MAKE["bracs"](tmp_path / "data"), tmp_path / "data"
    whole = tasks.read(task, folder).table
    files = whole.loc[whole["role"] == "probe-train", "file"]
    (folder / files.iloc[0]).write_bytes((folder / files.iloc[0]).read_bytes()[:60])
    (folder / files.iloc[1]).write_text("no image")
    tiles = tasks.read(task, folder)  # whole, and not partial: the files are there
    assert tiles.quarantined["file"].tolist() == files.iloc[:2].tolist()
    assert tiles.quarantined["reason"].str.contains("not an image|decode").all()
    assert len(tiles) == len(whole) - 2
    assert tiles.summary()["quarantined"].sum() == 2


def test_a_class_that_is_lost_or_single_in_a_role_is_an_error(tmp_path):
    task, folder = MAKE["bracs"](tmp_path / "data"), tmp_path / "data"
    val = sorted((folder / "BRACS_RoI/latest_version/val/6_IC").iterdir())
    val[0].write_text("no image")
    with pytest.raises(InputError, match="role validate has a single sample of class 6_IC"):
        tasks.read(task, folder)
    val[1].write_text("no image")
    with pytest.raises(InputError, match="role validate has no sample of class 6_IC"):
        tasks.read(task, folder)
    for path in (folder / "BRACS_RoI").rglob("*_IC_*.png"):
        path.write_text("no image")
    with pytest.raises(InputError, match="no image of class 6_IC decodes"):
        tasks.read(task, folder)


def test_images_are_decoded_once_and_again_where_they_changed(tmp_path, monkeypatch):
    task, folder = MAKE["bracs"](tmp_path / "data"), tmp_path / "data"
    first = tasks.read(task, folder)
    asked = []
    monkeypatch.setattr("pathfm.benchmarks._probe", lambda path: asked.append(path) or ("", 0, 0, "asked"))
    pd.testing.assert_frame_equal(tasks.read(task, folder).table, first.table)
    assert asked == []
    miniatures.picture(folder / first.table["file"].iloc[0], seed=99, side=9)
    with pytest.raises(InputError, match="no image of class"):
        tasks.read(task, folder)
    assert len(asked) == len(first)


def test_pcam_images_are_read_inside_their_files(tmp_path):
    task, folder = miniatures.pcam(tmp_path / "data"), tmp_path / "data"
    tiles = tasks.read(task, folder)
    with h5py.File(folder / "camelyonpatch_level_2_split_valid_x.h5") as file:
        for place in (0, 7, 39):
            row = tiles.table.index[tiles.table["file"] == f"camelyonpatch_level_2_split_val_x_{place}"][0]
            assert np.array_equal(tiles.image(row), file["x"][place])
    assert sides(tiles) == {"probe-train": 40, "validate": 40, "test": 40}
    assert tiles.table["slide_id"].nunique() == 30
    scattered = tiles.subset(np.array([90, 3, 41, 3, 119]))
    images = [image for batch in scattered.images(3) for image in batch]
    for image, row in zip(images, (90, 3, 41, 3, 119), strict=True):
        assert np.array_equal(image, tiles.image(row))


def test_features_of_pcam_need_no_files(tmp_path):
    from pathfm.features import extract

    tiles = tasks.read(miniatures.pcam(tmp_path / "data"), tmp_path / "data")
    assert extract("colour", tiles, folder=tmp_path / "features").x.shape[0] == 120


def test_pcam_without_its_slides_still_reads(tmp_path):
    task = miniatures.pcam(tmp_path / "data", meta=False)
    assert tasks.read(task, tmp_path / "data").patients is None


def spoil(folder, part: str, kind: str, how):
    how(folder / f"camelyonpatch_level_2_split_{part}_{kind}.{'csv' if kind == 'meta' else 'h5'}")


def cut(path):
    path.write_bytes(path.read_bytes()[:4000])


def relabel(path):
    with h5py.File(path, "w") as file:
        file["y"] = np.full((40, 1, 1, 1), 7, np.uint8)


def shorten(path):
    with h5py.File(path, "w") as file:
        file["y"] = np.zeros((39, 1, 1, 1), np.uint8)


def rename(path):
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros(3)


@pytest.mark.parametrize(
    ("part", "kind", "how", "message"),
    [
        ("train", "x", cut, "train_x.h5 is no whole HDF5 file"),
        ("valid", "y", shorten, "has 40 images and .* 39 labels; these are not a pair"),
        ("valid", "y", relabel, r"has the labels \[7\]; PCam's are 0 and 1"),
        ("test", "x", rename, "has no dataset 'x'; is it a file of PCam"),
        ("test", "y", lambda path: path.unlink(), "test_y.h5 is missing; download it, and gunzip it"),
        ("test", "x", lambda path: path.rename(f"{path}.gz"), "unpack camelyonpatch_level_2_split_test_x.h5.gz first"),
        ("train", "meta", lambda path: path.write_text("wsi\na\n"), "has 1 rows for 40 images"),
    ],
)
def test_pcam_files_that_cannot_be_used(tmp_path, part, kind, how, message):
    task, folder = miniatures.pcam(tmp_path / "data"), tmp_path / "data"
    spoil(folder, part, kind, how)
    with pytest.raises(InputError, match=message):
        tasks.read(task, folder)


def test_pcam_images_that_do_not_decode_are_quarantined(tmp_path):
    task, folder = miniatures.pcam(tmp_path / "data"), tmp_path / "data"
    path = folder / "camelyonpatch_level_2_split_test_x.h5"
    with h5py.File(path) as file:
        chunk = file["x"].id.get_chunk_info(5)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(bytes(data))
    tiles = tasks.read(task, folder)
    assert tiles.quarantined["file"].tolist() == ["camelyonpatch_level_2_split_test_x_5"]
    assert "does not decode" in tiles.quarantined["reason"][0]
    assert len(tiles) == 119


def test_ten_images_a_class(tmp_path):
    task, folder = miniatures.pcam(tmp_path / "data", "pcam_10shot"), tmp_path / "data"
    runs = [tasks.read(task, folder, run=run) for run in (0, 1, 1)]
    assert len(list((tmp_path / "cache" / "checks").iterdir())) == 1  # all runs decode once
    for tiles in runs:
        train = tiles.table[tiles.table["role"] == "probe-train"]
        assert train["label"].value_counts().to_dict() == {"no_tumor": 10, "tumor": 10}
        assert sides(tiles)["test"] == 40
    drawn = [tuple(tiles.table.loc[tiles.table["role"] == "probe-train", "file"]) for tiles in runs]
    assert drawn[0] != drawn[1] == drawn[2]
    with pytest.raises(InputError, match="one class has 2"):
        shots(np.array(["a", "b"] * 2))


def test_ten_shots_follow_one_generator_over_the_runs():
    """By hand: classes in order of appearance, ten of each, shuffled; the second run goes on from the first."""
    label = np.array(["tumor", "no_tumor"] * 50)
    rng = np.random.default_rng(42)
    for run in (0, 1):
        expected = [*rng.choice(np.arange(0, 100, 2), 10, replace=False)]
        expected += [*rng.choice(np.arange(1, 100, 2), 10, replace=False)]
        expected = [int(place) for place in expected]
        rng.shuffle(expected)
        assert shots(label, run).tolist() == expected


def test_wrong_calls():
    for call, message in [
        (lambda: tasks.about("bahc"), "no task 'bahc'. Did you mean 'bach'"),
        (lambda: tasks.read("bach", ".", split="clear"), "no split 'clear' of bach. Did you mean 'clean'"),
        (lambda: tasks.table("tile"), "no kind of task 'tile'. Did you mean 'tiles'"),
        (lambda: tasks.read("crc", ".", runs=3), "crc takes none of runs"),
        (lambda: tasks.read("pcam", ".", run=3), "pcam has no runs; only pcam_10shot is drawn"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_any_folder_and_its_splits(tmp_path):
    folder = tmp_path / "mine"
    for label in "ab":
        for i in range(4):
            miniatures.picture(folder / label / f"{i}.png")
    assert len(tasks.read("folder", folder, mpp=0.5)) == 8
    files = [f"{label}/{i}.png" for label in "ab" for i in range(4)]
    roles = ["probe-train", "probe-train", "test", "test", "probe-train", "probe-train", "probe-train", "test"]
    table = pd.DataFrame({"file": files, "label": [f[0] for f in files], "role": roles})
    table.to_csv(folder / "manifest.csv", index=False)
    with pytest.raises(InputError, match="role test has a single sample of class b"):
        tasks.read("folder", folder)


@pytest.mark.real
def test_real_tiles_through_the_generic_reader(real_data):
    crc = tasks.read("folder", real_data / "tiles" / "crc_val_he_7k_native224", mpp=0.5)
    assert len(crc) == 70 and set(crc.classes) < set(tasks.about("crc").classes)
    oral = tasks.read("folder", real_data / "tiles" / "oral_oscc", patient="block")
    assert oral.summary()["tiles"].to_dict() == {"Normal": 164, "OSCC": 548}
    assert Image.fromarray(oral.image(0)).size == (224, 224)
