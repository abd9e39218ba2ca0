"""Segmentation tasks: masks against squares drawn by hand, splits by patient, pairs that do not belong together."""

from pathlib import Path

import miniatures
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.io import savemat

from pathfm import InputError, tasks


def test_consep_merges_seven_types_to_four(tmp_path):
    task = miniatures.consep(tmp_path)
    images = tasks.read(task, tmp_path)
    assert (len(images), images.name, images.classes) == (14, "consep", task.classes)
    instances, types = images.masks(3)
    assert instances.dtype == np.int32 and types.dtype == np.uint8 and types.shape == images.image(3).shape[:2]
    drawn = {int(i): int(types[instances == i][0]) for i in range(1, 8)}
    assert drawn == {1: 1, 2: 2, 3: 3, 4: 3, 5: 4, 6: 4, 7: 4}
    assert ((instances > 0) == (types > 0)).all()
    assert images.table["mpp"].unique().tolist() == [0.25]
    counted = images.subset(np.arange(2)).summary()
    assert counted["nuclei"].tolist() == [0, 2, 2, 4, 6]
    assert counted["pixels"].sum() == pytest.approx(1)


def test_consep_splits(tmp_path):
    task = miniatures.consep(tmp_path)
    official, clean = (tasks.read(task, tmp_path, split=split).table for split in tasks.SPLITS)
    assert official["role"].value_counts().to_dict() == {"probe-train": 10, "validate": 4}
    assert clean["role"].value_counts().to_dict() == {"probe-train": 8, "validate": 2, "test": 4}
    assert set(clean.loc[clean["role"] == "test", "file"]) == set(official.loc[official["role"] == "validate", "file"])


def test_monusac_fills_its_polygons(tmp_path):
    """A square with corners at x, y and x + s, y + s covers s x s pixels, columns by x and rows by y."""
    task = miniatures.monusac(tmp_path)
    images = tasks.read(task, tmp_path)
    assert (len(images), images.ignored) == (28, "Ambiguous")
    instances, types = images.masks(0)
    expected = np.zeros((24, 24), int)
    for x, y, side, kind in ((2, 5, 6, 1), (12, 3, 4, 2), (12, 10, 4, 2), (2, 16, 5, 5)):
        expected[y : y + side, x : x + side] = kind
    inside = np.zeros((24, 24), bool)  # a pixel on the border may go either way
    for x, y, side, _ in ((2, 5, 6, 1), (12, 3, 4, 2), (12, 10, 4, 2), (2, 16, 5, 5)):
        inside[y + 1 : y + side, x + 1 : x + side] = True
    assert (types[inside] == expected[inside]).all()
    assert types.sum() == pytest.approx(expected.sum(), rel=0.5)
    assert sorted(np.unique(instances)) == [0, 1, 2, 3, 4]
    assert {int(types[instances == i].max()) for i in (2, 3)} == {2}


def test_monusac_keeps_patients_on_one_side(tmp_path):
    task = miniatures.monusac(tmp_path)
    clean = tasks.read(task, tmp_path, split="clean").table
    assert (clean.groupby("patient_id")["role"].nunique() == 1).all()
    assert set(clean["role"]) == {"probe-train", "validate", "test"}
    assert clean["patient_id"].str.fullmatch(r"TCGA-\w\w-\d{4}").all()


@pytest.mark.parametrize("make", [miniatures.consep, miniatures.monusac])
def test_partial_and_wrong_downloads(tmp_path, make):
    task = make(tmp_path / "data")
    file = tasks.read(task, tmp_path / "data").table["file"].iloc[0]
    (tmp_path / "data" / file).unlink()
    with pytest.raises(InputError, match=r"partial download. 1 of \d+ are missing. train: \d+ of \d+"):
        tasks.read(task, tmp_path / "data")
    assert "partial: " in tasks.read(task, tmp_path / "data", allow_partial=True).name
    with pytest.raises(InputError, match=r"expected .* in .*; it is in .*/data: give that folder"):
        tasks.read(task, tmp_path)
    odd = miniatures.picture(tmp_path / "data" / Path(file).parent / f"odd{Path(file).suffix}")
    with pytest.raises(InputError, match="odd.* has no name of this data set"):
        tasks.read(task, tmp_path / "data", allow_partial=True)
    odd.unlink()


def test_pairs_that_cannot_be_used_are_quarantined_with_the_reason(tmp_path):
    task = miniatures.consep(tmp_path)
    labels, images = tmp_path / "Train" / "Labels", tmp_path / "Train" / "Images"
    savemat(labels / "train_1.mat", {"inst_map": np.zeros((9, 8)), "type_map": np.zeros((9, 8))})  # another image's
    savemat(labels / "train_2.mat", {"inst_map": np.zeros((20, 20))})
    (labels / "train_3.mat").write_text("no matrix")
    (labels / "train_4.mat").unlink()
    savemat(labels / "train_5.mat", {"inst_map": np.ones((20, 20)), "type_map": np.full((20, 20), 9)})
    (images / "train_6.png").write_bytes((images / "train_6.png").read_bytes()[:70])
    found = tasks.read(task, tmp_path)
    reason = found.quarantined.set_index("file")["reason"]
    assert len(found) == 8 and len(reason) == 6
    for number, part in enumerate(
        (
            "mask is 8 x 9 px, it 20 x 20",
            "type_map",
            "mask does not decode",
            "mask is missing",
            "none of CoNSeP",
            "decode",
        ),
        start=1,
    ):
        assert part in reason[f"Train/Images/train_{number}.png"]


def test_a_class_that_a_role_lacks_is_an_error(tmp_path):
    task = miniatures.monusac(tmp_path)
    for path in (tmp_path / "MoNuSAC Testing Data and Annotations").rglob("*.xml"):
        path.write_text(path.read_text().replace("Macrophage", "Epithelial").replace("Ambiguous", "Epithelial"))
    with pytest.raises(InputError, match="role validate has no Macrophage in any of its 8 images"):
        tasks.read(task, tmp_path)


def test_a_mask_that_breaks_after_the_check_is_an_error(tmp_path):
    found = tasks.read(miniatures.consep(tmp_path), tmp_path)
    Path(found.table["mask"].iloc[0]).write_text("gone")
    with pytest.raises(InputError, match="could be read before and now cannot"):
        found.masks(0)


@pytest.fixture
def masks(tmp_path):
    for i in range(6):
        miniatures.picture(tmp_path / "images" / f"{i}.png")
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.fromarray(np.kron([[0, 1], [i + 2, 0]], np.ones((4, 4))).astype(np.uint16)).save(
            tmp_path / "labels" / f"{i}.png"
        )
    return tmp_path


def test_any_folder_of_images_and_masks(masks):
    found = tasks.read("masks", masks, mpp=0.4)
    instances, types = found.masks(3)
    assert np.unique(instances).tolist() == [0, 1, 5] and np.unique(types).tolist() == [0, 1]
    assert found.classes == ("background", "nucleus") and found.table["mpp"].unique().tolist() == [0.4]
    split = found.split("tile", fractions={"probe-train": 0.5, "test": 0.5})
    assert split.table["role"].value_counts().to_dict() == {"probe-train": 3, "test": 3}
    people = pd.DataFrame({"file": [f"{i}.png" for i in range(6)], "patient_id": list("aabbcc")})
    people.to_csv(masks / "manifest.csv", index=False)
    split = tasks.read("masks", masks).split(fractions={"probe-train": 0.5, "test": 0.5})
    assert (split.table.groupby("patient_id")["role"].nunique() == 1).all()
    people.assign(role=["test", "validate"] * 3).to_csv(masks / "manifest.csv", index=False)
    with pytest.raises(InputError, match="patient 'a' is on two sides"):
        tasks.read("masks", masks)


def test_a_folder_without_masks(masks):
    (masks / "labels").rename(masks / "masks")
    with pytest.raises(InputError, match="expected labels/ in"):
        tasks.read("masks", masks)
    (masks / "labels").mkdir()
    with pytest.raises(InputError, match="no image in .* can be read with its mask .*its mask is missing"):
        tasks.read("masks", masks)


@pytest.mark.real
def test_real_nuclei(real_data):
    found = tasks.read("masks", real_data / "nuclei" / "dsb2018_he")
    assert (len(found), len(found.quarantined)) == (64, 0)
    instances, types = found.masks(0)
    assert len(np.unique(instances)) - 1 == found.table["nuclei"].astype(int)[0]
    assert (types > 0).mean() == pytest.approx(float(found.table["foreground"][0]), abs=1e-3)
