"""Real tiles: blocks stay together, magnifications are kept apart, and the table reads what was recorded."""

import numpy as np
import pandas as pd
import pytest
import timm
from PIL import Image

from pathfm import answers, segment, transfer
from pathfm.errors import InputError
from pathfm.export import Preprocess
from pathfm.features import extract, random_twin
from pathfm.probe import cross_validate_within, linear

FLOORS = ["one class everywhere", "colour of a pixel", "texture around a pixel", "colour + LBP around a pixel"]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Two classes told apart by brightness, which means the opposite at the other magnification; blocks of four."""
    folder, rng, rows = tmp_path_factory.mktemp("real"), np.random.default_rng(0), []
    for magnification, sign in (("100x", 1), ("400x", -1)):
        for label, side in (("a", -1), ("b", 1)):
            for number in range(32):
                name = f"{label}{magnification}{number}.png"
                pixels = np.clip(rng.normal(128 + 25 * sign * side, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / name)
                rows.append((name, label, magnification, f"{label}{magnification}{number // 4}"))
    table = pd.DataFrame(rows, columns=["file", "label", "magnification", "block"])
    table.to_csv(folder / "manifest.csv", index=False)
    return transfer.read_tiles(folder / "manifest.csv")


def test_blocks_stand_for_slides_where_nothing_better_is_known(tiles):
    assert (tiles.table["slide_id"] == tiles.table["block"]).all()
    for _, fold in tiles.folds("patient", 5):
        assert (fold.table.groupby("block")["role"].nunique() == 1).all()


def test_within_a_magnification_no_tile_of_the_other_is_seen(tiles):
    colour = extract("colour", tiles)
    found = cross_validate_within(colour, "magnification", by="patient", n=5)
    assert found.table["file"].tolist() == tiles.table["file"].tolist()
    assert found.balanced_accuracy > 0.95  # each magnification has its own rule
    seen = []

    def watching(features, **settings):
        seen.append(set(features.table["magnification"]))
        return linear(features, **settings)

    cross_validate_within(colour, "magnification", watching, by="patient", n=5)
    assert all(len(values) == 1 for values in seen) and len(seen) == 10
    with pytest.raises(InputError, match="no column 'magnificaton'.*Did you mean 'magnification'"):
        cross_validate_within(colour, "magnificaton")


def test_the_table_of_two_seeds_reads_back_what_was_recorded(tiles, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=0)
    preprocess = Preprocess(32)
    for seed in (0, 1):
        found = transfer.judged(model, random_twin(model, seed), preprocess, tiles, seed)
        assert [one.floor for one in found] == [False, False] + 6 * [True]
        answers.write(tmp_path / str(seed), found, "real")
    said = answers.read(answers.merged([tmp_path / "0", tmp_path / "1"], "real"))
    table = transfer.table(said).set_index(["probe saw", "tested on"])
    assert list(table.index) == [
        (saw, place) for saw in ("one magnification", "all tiles") for place in ("100x", "400x", "all tiles")
    ]
    assert table["tiles"].tolist() == [64, 64, 128] * 2 and table["blocks"].tolist() == [16, 16, 32] * 2
    own = table.loc[("one magnification", "all tiles")]
    assert own["colour"] == pytest.approx(found[5].balanced_accuracy, abs=0.02)
    assert own["colour"] > 0.95
    assert own["gain"] == pytest.approx(own["teacher"] - own["random weights"])
    assert own["low"] <= own["gain"] <= own["high"]
    assert transfer.table({}).empty
    arm = {name.replace("teacher", "DINO"): several for name, several in said.items()}
    pd.testing.assert_frame_equal(transfer.table(arm, "DINO"), transfer.table(said))


def test_real_data_is_found_where_it_lies(monkeypatch, tmp_path):
    (tmp_path / "here" / "nuclei").mkdir(parents=True)
    monkeypatch.setenv("PATHFM_TEST_DATA", str(tmp_path / "here"))
    assert transfer.test_data("nuclei") == tmp_path / "here" / "nuclei" and transfer.test_data("slides") is None
    (tmp_path / "shared" / "data" / "tiles").mkdir(parents=True)
    monkeypatch.delenv("PATHFM_TEST_DATA")
    monkeypatch.setattr(transfer, "checkout", lambda: tmp_path / "code")
    assert transfer.test_data("tiles") == tmp_path / "shared" / "data" / "tiles"


def test_images_alike_in_stain_share_a_role(tmp_path):
    for part, pixels in (("images", np.full((16, 16, 3), 200, np.uint8)), ("labels", np.eye(16, dtype=np.uint8))):
        (tmp_path / part).mkdir()
        for number in range(20):
            Image.fromarray(pixels).save(tmp_path / part / f"{number}.png")
    groups = [number % 5 for number in range(20)]
    table = pd.DataFrame({"file": [f"{number}.png" for number in range(20)], "cluster": groups})
    table.to_csv(tmp_path / "manifest.csv", index=False)
    found = transfer.read_nuclei(tmp_path).table
    assert set(found["role"]) == {"probe-train", "validate", "test"}
    assert (found.groupby("cluster")["role"].nunique() == 1).all()
    alone = transfer.read_nuclei(tmp_path, block="none").table
    assert (alone.groupby("cluster")["role"].nunique() > 1).any() and "slide_id" not in alone


def test_both_decoders_read_nuclei_from_teacher_and_random_weights(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number in range(15):
        mask = np.zeros((32, 32), np.uint8)
        mask[4:20, number : number + 12] = 1
        pixels = np.where(mask[..., None] > 0, (90, 60, 120), (230, 210, 225)) + rng.normal(0, 4, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "images" / f"{number:02d}.png")
        Image.fromarray(mask).save(tmp_path / "labels" / f"{number:02d}.png")
    names = [f"{number:02d}.png" for number in range(15)]
    pd.DataFrame({"file": names, "cluster": [n % 5 for n in range(15)]}).to_csv(tmp_path / "manifest.csv", index=False)
    images = transfer.read_nuclei(tmp_path)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=0)
    protocol = segment.SegmentationProtocol(input_px=32, steps=12, batch_size=4, patience=20, runs=2)
    found = transfer.decoded(
        {"random weights": random_twin(model, 1), "pretrained": model}, Preprocess(32), images, protocol
    )
    table = transfer.dice_table(found).set_index(["decoder", "features"])
    assert list(table.index) == [
        *[(decoder, name) for decoder in ("image", "tokens") for name in ("random weights", "pretrained")],
        *[("none", floor) for floor in FLOORS],
    ]
    for decoder in ("image", "tokens"):
        start, own = found[decoder]
        row = table.loc[(decoder, "pretrained")]
        assert own.interval().low == pytest.approx(own.interval().high)  # one group of images is tested
        assert row["low"] < row["dice"] < row["high"] and row["dice"] == pytest.approx(own.interval().value)
        assert row["gain"] == pytest.approx(row["dice"] - start.interval().value)
        assert row["runs"] == 2 and row["n_images"] == 3 and row["role"] == "test"
    assert table.loc[("image", "pretrained"), "dice"] > table.loc[("tokens", "pretrained"), "dice"]  # edges are pixels'
    assert table.loc[("none", "colour of a pixel"), "dice"] > 0.95
    assert table["gain"].notna().tolist() == [False, True] * 2 + [False] * len(FLOORS)
