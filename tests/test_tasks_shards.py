"""PathoROB's images are read in the Parquet shards that Hugging Face gives out, and faults are named."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from miniatures import pathorob as miniature
from miniatures import pathorob_shards

from pathfm import evaluation, tasks
from pathfm.errors import InputError
from pathfm.export import export
from pathfm.tasks import pathorob, shards
from pathfm.vit import make_backbone


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))


def made(tmp_path, name="pathorob_camelyon", **how):
    """A miniature task, its table, and the pixels that its shards hold."""
    task = miniature(tmp_path, name, slides=4, tiles=4)
    return task, tasks.read(task, tmp_path), pathorob_shards(tmp_path, tmp_path / pathorob.FILES[name], **how)


def rewrite(path, change):
    change(pl.read_parquet(path)).write_parquet(path)


@pytest.mark.parametrize("name", list(pathorob.FILES))
def test_every_tile_of_the_table_is_read_out_of_its_shard(tmp_path, name):
    task, table, pixels = made(tmp_path, name, shards=3)
    for folder in (tmp_path, tmp_path / "data"):
        tiles = pathorob.tiles(task, table, folder)
        assert sorted(tiles.table["file"]) == sorted(table["file"].unique()) and tiles.quarantined.empty
        seen = [image for batch in tiles.images(5) for image in batch]
        for image, file in zip(seen, tiles.table["file"], strict=True):
            assert np.array_equal(image, pixels[file])
    assert np.array_equal(tiles.image(9), seen[9])
    few = tiles.subset([40, 3, 21])
    assert all(np.array_equal(a, seen[i]) for a, i in zip(next(few.images()), (40, 3, 21), strict=True))
    x, kept = pathorob.align(np.arange(len(tiles), dtype=float)[:, None], tiles, table)
    assert kept["file"].tolist() == tiles.table["file"].iloc[x[:, 0].astype(int)].tolist() == table["file"].tolist()


def test_the_index_of_a_backbone_is_the_same_from_shards_and_from_pictures(tmp_path):
    torch.manual_seed(0)
    model = make_backbone("vit_small_patch16_224", "random", img_size=64, depth=1, width=48, heads=3)[0]
    folder = export(model.eval(), tmp_path / "teacher")
    task, table, _ = made(tmp_path)
    tiles = pathorob.tiles(task, table, tmp_path)
    (tmp_path / "pictures").mkdir()
    for row in tiles.table.itertuples():
        found = shards.encoded(tiles.table.loc[[row.Index]])[0]
        (tmp_path / "pictures" / f"{row.file}.png").write_bytes(found)
    one, other = (evaluation.robustness(folder, task, tmp_path, tmp_path / images) for images in ("data", "pictures"))
    assert one.row == other.row and 0 <= one.row["score"] <= 1 and one.row["n_tiles"] == len(table) == 64
    pd.testing.assert_frame_equal(one.table, other.table)


def test_a_tile_that_does_not_decode_is_quarantined(tmp_path):
    task, table, _ = made(tmp_path, shards=1)
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    spoilt = {0: b"no image", 1: None, 2: b""}

    def spoil(frame):
        images = [one | {"bytes": spoilt.get(i, one["bytes"])} for i, one in enumerate(frame["image"].to_list())]
        return frame.with_columns(pl.Series("image", images, dtype=frame.schema["image"]))

    rewrite(path, spoil)
    names = shards.table([path], ["slide_id", "patch_id"]).head(3)
    spoilt = set(names["slide_id"] + "-" + names["patch_id"]) & set(table["file"])
    tiles = pathorob.tiles(task, table, tmp_path)
    assert set(tiles.quarantined["file"]) == spoilt and len(tiles) == 64 - len(spoilt) and len(spoilt) >= 1
    assert set(tiles.quarantined["reason"]) <= {"not an image", "empty file"}
    x, kept = pathorob.align(np.zeros((len(tiles), 2)), tiles, table)
    assert len(x) == len(kept) == len(tiles) and not spoilt & set(kept["file"])


def test_partial_and_wrong_shards_are_named(tmp_path):
    task, table, _ = made(tmp_path, shards=3)
    data = tmp_path / "data"
    last, first = data / "train-00002-of-00003.parquet", data / "train-00000-of-00003.parquet"
    whole = {path: path.read_bytes() for path in (first, last)}

    def fails(message):
        with pytest.raises(InputError, match=message):
            pathorob.tiles(task, table, tmp_path)
        for path, content in whole.items():
            path.write_bytes(content)

    last.unlink()
    fails(r"data is a partial download: 1 of 3 shards are missing, first train-00002-of-00003.parquet")
    last.write_bytes(whole[last][:-20])
    fails("train-00002-of-00003.parquet is no whole Parquet file")
    last.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 466600116\n")
    fails("no whole Parquet file .*; download it again, by git with git-lfs")
    rewrite(first, lambda frame: frame.drop("medical_center"))
    fails("train-00000-of-00003.parquet has no column 'medical_center'; found: image, slide_id, patch_id, biological")
    rewrite(first, lambda frame: frame.with_columns(image=pl.col("image").struct.field("path")))
    fails("column image is String, not images as the hub stores them")
    rewrite(first, lambda frame: frame.with_columns(medical_center=pl.lit("LPON")))
    fails("says centre LPON of tile .*, the metadata (RUMC|UMCU), and so of [0-9]+ others")
    rewrite(first, lambda frame: frame.with_columns(biological_class=pl.lit("fat")))
    fails("says label fat of tile")
    rewrite(first, lambda frame: pl.concat([frame, frame.head(1)]))
    fails("has the tile TCGA-.* twice")
    rewrite(first, lambda frame: frame.clear())
    fails(r"pathorob_camelyon: [0-9]+ of 64 images are not in ")
    for path in data.iterdir():
        path.unlink()
    with pytest.raises(
        InputError, match="64 of 64 images .*expected data/train-00000-of-0000N.parquet from https://hugg"
    ):
        pathorob.tiles(task, table, tmp_path)


def test_a_shard_that_changes_while_it_is_read_is_an_error(tmp_path):
    task, table, _ = made(tmp_path, shards=1)
    tiles = pathorob.tiles(task, table, tmp_path)
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(InputError, match="no whole Parquet file"):
        tiles.image(0)
    path.write_bytes(content)
    rewrite(path, lambda frame: frame.clear())
    with pytest.raises(InputError, match="could be read before and now cannot"):
        next(tiles.images())


def test_places_in_a_shard_are_numbered_across_its_row_groups(tmp_path):
    _, _, pixels = made(tmp_path, shards=1)
    listed = shards.table(shards.find(tmp_path), ["slide_id", "patch_id"])
    assert listed["row"].tolist() == list(range(len(pixels))) and isinstance(listed["slide_id"].iloc[0], str)
    good, bad = shards.check(listed.assign(file=listed["slide_id"] + "-" + listed["patch_id"], label="any"))
    assert bad.empty and (good[["width_px", "height_px"]] == 16).all(axis=None)
    assert good["digest"].nunique() == len(pixels)
    assert pd.Series(list(pixels)).tolist() == good["file"].tolist()
