"""Floors of masks: what one class, or the colour of a pixel, is worth, by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_features import tiny_vit
from test_segment import checker, squares  # noqa: F401

from pathfm import InputError, mask_floors, segment
from pathfm.segment import SegmentationProtocol
from pathfm.segmentation import dice
from pathfm.tasks.nuclei import NucleiSet, from_folder

PROTOCOL = SegmentationProtocol(input_px=64, steps=2, batch_size=3, patience=2, runs=1)


def test_one_class_everywhere_scores_its_share_of_the_pixels(squares):  # noqa: F811
    constant, colour, *_ = mask_floors.floors(squares, PROTOCOL)
    share = (constant.reported.masks == 1).mean(axis=(1, 2))
    assert constant.name == "one class everywhere" and constant.each.shape == (1, 3, 2)
    assert np.allclose(constant.each[0, :, 1], 2 * share / (1 + share))
    assert (constant.role, colour.role, len(colour.reported.row)) == ("test", "test", 3)


def test_colour_is_right_where_it_decides_and_worthless_where_it_does_not(squares, tmp_path):  # noqa: F811
    """Dark squares are found without a fault; squares of the background's colour only as well as by one class."""
    constant, colour, *_ = mask_floors.floors(squares, PROTOCOL)
    assert np.allclose(colour.each[0], 1) and colour.validate[0] == 1
    assert colour.gain(constant).value == pytest.approx(1 - constant.interval().value)
    for i in range(9):
        Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    constant, colour, *_ = mask_floors.floors(from_folder(tmp_path, mpp=0.5), PROTOCOL)
    assert np.allclose(colour.each[0, :, 1], constant.each[0, :, 1])


def test_a_colour_of_two_classes_is_called_by_the_commoner_and_ignored_pixels_teach_nothing():
    masks = np.array([[[1, 1, 2, 0], [3, 3, 3, 0]]])
    images = np.where(masks[..., None] == 0, 250, 10).astype(np.uint8).repeat(3, axis=-1)
    shares = mask_floors._of_colour(segment.Pieces(images, masks, np.zeros(1)), 4, [1, 2])
    dark, light = shares(np.array([[[10] * 3], [[250] * 3]], np.uint8))[:, 0]
    assert np.allclose(dark, [0, 2 / 3, 1 / 3, 0]) and np.allclose(light, [1, 0, 0, 0])
    likeliest, there = mask_floors._called(shares, images, [1, 2])
    said = np.where(there > 0.5, likeliest, 0)
    assert said.tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0]]]
    assert dice(said[0], masks[0], 4, ignored=3)[2] == 0


def test_texture_is_right_where_colour_is_not(tmp_path):
    """Nuclei of stripes on stripes that run the other way, of the same two greys: only what is around tells."""
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    lines, (y, x) = ["file,patient_id,role"], np.indices((96, 96))
    for i in range(6):
        mask = np.kron(np.random.default_rng(i).integers(0, 2, (2, 2)), np.ones((48, 48), int))
        mask[:48, :48], mask[48:, 48:] = 0, 1
        grey = np.where(mask, (x // 3 + y // 3) % 2, y // 8 % 2) * 120 + 60
        Image.fromarray(np.stack([grey] * 3, axis=2).astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "labels" / f"{i}.png")
        lines.append(f"{i}.png,p{i},{('probe-train', 'validate', 'test')[i % 3]}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    protocol = SegmentationProtocol(input_px=96, steps=2, batch_size=3, patience=2, runs=1)
    found = {one.name: one for one in mask_floors.floors(from_folder(tmp_path, mpp=0.5), protocol)}
    dice_of = {name: one.interval().value for name, one in found.items()}
    assert dice_of["texture around a pixel"] > 0.85 and dice_of["colour + LBP around a pixel"] > 0.85
    assert dice_of["colour of a pixel"] == pytest.approx(dice_of["one class everywhere"], abs=0.05)
    again = found["texture around a pixel"]
    assert np.array_equal(segment.by_class(again.predict(again.reported.images)[None], again.reported.masks,
                                           again.images), again.each, equal_nan=True)  # fmt: skip


def test_size_alone_chooses_the_class_where_size_says_it():
    """Small images hold the first class and large ones the second; the class for all is right about half of them."""
    n = 24
    large = np.arange(n) % 2
    masks = np.where(large[:, None, None], 2, 1) * np.ones((n, 4, 4), int)
    table = pd.DataFrame({"width_px": 100 + 300 * large, "height_px": 100, "mpp": 0.5, "patient_id": np.arange(n)})
    images = NucleiSet(
        "made", table.assign(role=np.repeat(["probe-train", "validate", "test"], 8)), ("-", "a", "b"), None
    )
    parts = {
        role: segment.Pieces(None, masks[rows], rows)
        for role, rows in zip(("probe-train", "validate", "test"), np.arange(n).reshape(3, 8), strict=True)
    }
    data = mask_floors._Set(images, parts, "test", [1, 2], PROTOCOL)
    constant, size = mask_floors._constant(data)
    assert (constant.name, size.name) == ("one class everywhere", "size and mpp alone")
    assert constant.interval().value == pytest.approx(0.5) and size.interval().value == 1
    one = data._replace(images=replace(images, table=images.table.assign(width_px=100)))
    assert [found.name for found in mask_floors._constant(one)] == ["one class everywhere"]


def test_floors_stand_on_the_pieces_of_the_decoders(squares):  # noqa: F811
    protocol = SegmentationProtocol(input_px=32, steps=2, batch_size=3, patience=2, runs=1)
    own = segment.fit(tiny_vit(), squares, protocol, name="network")
    for floor in mask_floors.floors(squares, protocol):
        assert own.gain(floor).value == pytest.approx(own.interval().value - floor.interval().value)
    table = pd.concat([own.summary(), floor.summary()])
    assert table["features"].tolist() == ["network", "colour + LBP around a pixel"]
    with pytest.raises(InputError, match="has the role validate; draw roles"):
        mask_floors.floors(squares.subset(squares.table["role"] != "validate"), protocol)
