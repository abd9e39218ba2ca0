"""Floors of masks: what one class, or the colour of a pixel, is worth, by hand."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_features import tiny_vit
from test_segment import checker, squares  # noqa: F401

from pathfm import InputError, mask_floors, segment
from pathfm.segment import SegmentationProtocol
from pathfm.segmentation import dice
from pathfm.tasks.nuclei import from_folder

PROTOCOL = SegmentationProtocol(input_px=64, steps=2, batch_size=3, patience=2, runs=1)


def test_one_class_everywhere_scores_its_share_of_the_pixels(squares):  # noqa: F811
    constant, colour = mask_floors.floors(squares, PROTOCOL)
    share = (constant.reported.masks == 1).mean(axis=(1, 2))
    assert constant.name == "one class everywhere" and constant.each.shape == (1, 3, 2)
    assert np.allclose(constant.each[0, :, 1], 2 * share / (1 + share))
    assert (constant.role, colour.role, len(colour.reported.row)) == ("test", "test", 3)


def test_colour_is_right_where_it_decides_and_worthless_where_it_does_not(squares, tmp_path):  # noqa: F811
    """Dark squares are found without a fault; squares of the background's colour only as well as by one class."""
    constant, colour = mask_floors.floors(squares, PROTOCOL)
    assert np.allclose(colour.each[0], 1) and colour.validate[0] == 1
    assert colour.gain(constant).value == pytest.approx(1 - constant.interval().value)
    for i in range(9):
        Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    constant, colour = mask_floors.floors(from_folder(tmp_path, mpp=0.5), PROTOCOL)
    assert np.allclose(colour.each[0, :, 1], constant.each[0, :, 1])


def test_a_colour_of_two_classes_is_called_by_the_commoner_and_ignored_pixels_teach_nothing():
    masks = np.array([[[1, 1, 2, 0], [3, 3, 3, 0]]])
    images = np.where(masks[..., None] == 0, 250, 10).astype(np.uint8).repeat(3, axis=-1)
    shares = mask_floors._shares(segment.Pieces(images, masks, np.zeros(1)), 4, [1, 2])
    dark, light = mask_floors._codes(np.array([[[10] * 3], [[250] * 3]], np.uint8))[:, 0]
    assert np.allclose(shares[dark], [0, 2 / 3, 1 / 3, 0]) and np.allclose(shares[light], [1, 0, 0, 0])
    said = mask_floors._coloured(shares, [1, 2], 0.5)(images)
    assert said.tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0]]]
    assert dice(said[0], masks[0], 4, ignored=3)[2] == 0


def test_floors_stand_on_the_pieces_of_the_decoders(squares):  # noqa: F811
    protocol = SegmentationProtocol(input_px=32, steps=2, batch_size=3, patience=2, runs=1)
    own = segment.fit(tiny_vit(), squares, protocol, name="network")
    for floor in mask_floors.floors(squares, protocol):
        assert own.gain(floor).value == pytest.approx(own.interval().value - floor.interval().value)
    table = pd.concat([own.summary(), floor.summary()])
    assert table["features"].tolist() == ["network", "colour of a pixel"]
    with pytest.raises(InputError, match="has the role validate; draw roles"):
        mask_floors.floors(squares.subset(squares.table["role"] != "validate"), protocol)
