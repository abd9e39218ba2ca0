"""Tiles cut to disk: a fixed grid or the first tiles of a stream, written whole, read back as the stream was."""

from __future__ import annotations

import copy
import json
import tarfile

import numpy as np
import pandas as pd
import pytest
import webdataset
from PIL import Image
from test_pretrain import TINY, numbers, tiny
from test_stream import MaskIndex, digest, irregular

from pathfm import InputError, TileStream, offline, storage
from pathfm.__main__ import main
from pathfm.benchmarks import TileSet
from pathfm.filters import HsvFilter
from pathfm.grids import Grid
from pathfm.offline import OfflineTiles
from pathfm.pretrain import Run, pretrain

N = 70  # more than a chunk


@pytest.fixture(scope="module")
def stream(index) -> TileStream:
    return TileStream(index, tile_px=36, mpp=(1.0, 2.0), seed=2)


@pytest.fixture(scope="module", params=["folder", "shards"])
def written(request, stream, tmp_path_factory):
    """A folder of tiles, either form."""
    out = tmp_path_factory.mktemp("tiles") / request.param
    offline.write(stream, out, N, request.param, per_shard=32)
    return out


def test_a_stream_read_back_is_the_stream(stream, written):
    source = OfflineTiles(written)
    assert len(source) == N and source.order == "written"
    assert digest(source.__getitems__(range(N))) == digest(stream.__getitems__(range(N)))
    assert all(source.name(i) == stream.name(i) for i in range(N))
    assert source.weights == stream.weights and source.min_tissue == stream.min_tissue
    manifest = pd.read_csv(written / "manifest.csv")
    assert {"slide_id", "x", "y", "mpp", "tissue", "i", "file", "label", "patient_id", "slide_mpp"} <= set(manifest)
    assert manifest["label"].tolist() == manifest["slide_id"].tolist()
    with pytest.raises(IndexError):
        source[N]


def test_pretraining_on_written_tiles_gives_the_numbers_of_the_stream(stream, written, tmp_path):
    config = tiny(watch_every=0, workers=0)
    online = pretrain(config, stream, folder=tmp_path / "online")
    run = pretrain(config, OfflineTiles(written), folder=tmp_path / "offline")
    logs = [numbers_of(one.folder) for one in (online, run)]
    assert logs[0] == logs[1]
    assert run.params["stream"]["options"]["form"] == written.name
    assert run.params["stream"]["first_tiles"] == online.params["stream"]["first_tiles"]
    assert online.params["stream"]["options"]["seed"] == 2
    shuffled = OfflineTiles(written, "shuffled", seed=1)
    with pytest.raises(InputError, match="another tile stream"):
        pretrain(config.replace(workers=2), shuffled, folder=tmp_path / "offline")
    again = pretrain(config.replace(workers=2), shuffled, folder=tmp_path / "shuffled")
    assert numbers_of(again.folder) != logs[0]
    with pytest.raises(InputError, match="70 tiles, fewer than 30 steps"):
        pretrain(tiny(steps=30), OfflineTiles(written), folder=tmp_path / "long")


def numbers_of(folder) -> tuple:
    """`numbers` of a run that was not watched."""
    (folder / "watches.csv").touch()
    return numbers(folder)


def test_the_same_stream_but_for_one_setting_does_not_go_on(stream, tmp_path):
    config = tiny(watch_every=0)
    pretrain(config, stream, folder=tmp_path)
    other = TileStream(stream.index, 36, (1.0, 2.0), seed=2, slide_weights=[1, 1, 1, 1.0001])
    with pytest.raises(InputError, match="slide_weights was None"):
        pretrain(config, other, folder=tmp_path)


def test_an_epoch_shows_every_tile_once_each_time_in_another_order(written):
    source = OfflineTiles(written, "shuffled", seed=4)
    epochs = [[source.name(i)[:4] for i in range(turn * N, (turn + 1) * N)] for turn in range(3)]
    assert all(len(set(one)) == len(set(epochs[0])) for one in epochs) and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(source) > 10**12 and source[3 * N + 5].i == 3 * N + 5
    assert OfflineTiles(written, "shuffled", seed=5).name(0) != source.name(0)


def test_shards_are_webdatasets(stream, tmp_path):
    offline.write(stream, tmp_path, 10, "shards", per_shard=4)
    names = sorted(path.name for path in tmp_path.glob("*.tar"))
    assert names == ["tiles-000000.tar", "tiles-000001.tar", "tiles-000002.tar"]
    shards = [str(tmp_path / name) for name in names]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("png", "json", "__key__"))
    for i, (image, told, key) in enumerate(samples):
        tile = stream[i]
        assert np.array_equal(image, tile.image) and key.endswith(f"{i:09d}")
        assert (told["slide_id"], told["x"], told["y"], told["mpp"], told["i"]) == (*tile[1:5], i)
    assert len(samples) == 10
    with tarfile.open(shards[0]) as tar:
        assert tar.getnames() == [f"{i:09d}.{kind}" for i in range(4) for kind in ("png", "json")]


def test_a_folder_a_class_is_a_tile_set(stream, cohort, tmp_path):
    offline.write(stream, tmp_path, 12, by="patient_id")
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == sorted(cohort.table["patient_id"].unique())
    tiles = TileSet.from_folder(tmp_path)
    assert len(tiles) == 12 and tiles.classes == folders
    row = tiles.table.set_index("i").loc[7]
    assert np.array_equal(np.asarray(Image.open(row["path"])), stream[7].image)
    assert tiles.xy_um is not None and (tiles.table["mpp"] > 0).all()


def test_jpeg_loses_and_says_so(stream, tmp_path):
    offline.write(stream, tmp_path, 4, image="jpg", quality=80)
    source = OfflineTiles(tmp_path)
    assert (source.settings["image"], source.settings["quality"]) == ("jpg", 80)
    for i in range(4):
        off = np.abs(source[i].image.astype(int) - stream[i].image)
        assert 0 < off.mean() < 6 and source.name(i) == stream.name(i)


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_a_killed_writing_goes_on_and_rewrites_nothing_whole(form, stream, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    offline.write(stream, whole, 40, form, per_shard=16)
    out, encode, calls = tmp_path / "killed", offline._encoded, []

    def breaks(image, about):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return encode(image, about)

    monkeypatch.setattr(offline, "_encoded", breaks)
    with pytest.raises(KeyboardInterrupt):
        offline.write(stream, out, 40, form, per_shard=16)
    assert not (out / "manifest.csv").exists() and not list(out.rglob("*.partial*"))
    with pytest.raises(InputError, match="were not finished"):
        OfflineTiles(out)
    there = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".png", ".tar")}
    assert len(there) == 1 if form == "shards" else 16 <= len(there) < 40
    offline.write(stream, out, 40, form, per_shard=16)
    assert all(path.stat().st_mtime_ns == at for path, at in there.items())
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert all((whole / file).read_bytes() == (out / file).read_bytes() for file in files)
    offline.write(stream, out, 50, form, per_shard=16)  # more of the same
    assert len(OfflineTiles(out)) == 50
    assert digest([OfflineTiles(out)[49]]) == digest([stream[49]])


def test_a_filtered_stream_is_written_as_it_is_read(index, tmp_path):
    stream = TileStream(index, 36, 1.0, tile_filter=HsvFilter((0, 180), (0, 255), (0, 225), 0.85, 3), context_px=44)
    offline.write(stream, tmp_path, 6)
    source = OfflineTiles(tmp_path)
    assert source.tile_px == 44 and digest(source.__getitems__(range(6))) == digest(stream.__getitems__(range(6)))
    before = (tmp_path / "manifest.csv").read_bytes()
    offline.write(stream, tmp_path, 6)
    assert (tmp_path / "manifest.csv").read_bytes() == before


# The grid


@pytest.mark.parametrize(("mpp", "stride", "least"), [(1.0, None, 0.4), (2.0, 20, 0.9), (1.6, 10, 0.0)])
def test_a_grid_has_every_corner_with_enough_tissue(mpp, stride, least):
    masks = {"lakes": irregular(0), "isles": irregular(1, 52)}
    grid = Grid(MaskIndex(masks), tile_px=40, mpp=mpp, stride_px=stride, min_tissue=least)
    side, step = int(40 * mpp), int((stride or 40) * mpp)
    wanted = []
    for name, mask in masks.items():
        fine = np.kron(mask, np.ones((8, 8)))
        for y in range(0, len(fine) - side + 1, step):
            for x in range(0, len(fine) - side + 1, step):
                tissue = fine[y : y + side, x : x + side].mean()
                wanted += [(name, x, y, mpp, tissue)] if tissue >= least else []
    found = grid.names(range(len(grid)))
    assert found["i"].tolist() == list(range(len(wanted)))
    assert found[["slide_id", "x", "y"]].to_numpy().tolist() == [list(row[:3]) for row in wanted]
    assert found["tissue"].to_numpy() == pytest.approx([row[4] for row in wanted])
    assert (found["mpp"] == mpp).all() and grid.name(3).i == 3


def test_a_grid_of_two_mpp_is_read_and_written(index, tmp_path):
    grid = Grid(index, tile_px=64, mpp=(1.0, 2.0))
    offline.write(grid, tmp_path)
    source = OfflineTiles(tmp_path)
    assert source.order == "shuffled" and len(source.table) == len(grid)
    assert set(source.table["mpp"].round(1)) == {1.0, 2.0}
    assert digest(OfflineTiles(tmp_path, "written").__getitems__(range(9))) == digest(grid.__getitems__(range(9)))
    with pytest.raises(InputError, match="was begun with"):
        offline.write(Grid(index, tile_px=64, mpp=(1.0, 2.0), stride_px=32), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mpp": "uniform(0.5, 1)"}, "a grid has one mpp or several"),
        ({"stride_px": -3}, "stride_px=-3"),
        ({"mpp": 0.01}, "no slide serves"),
        ({"tile_px": 200, "stride_px": 5000, "min_tissue": 0.5}, "no tile of the grid has 50 % tissue"),
    ],
)
def test_grids_that_cannot_be(settings, message):
    index = MaskIndex({"a": np.pad(np.ones((20, 20), bool), 10)})
    with pytest.raises(InputError, match=message.replace("50 %", "50%")):
        Grid(index, **{"tile_px": 40, "mpp": 1.0, **settings})


# What goes wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "shard"}, "Did you mean 'shards'"),
        ({"image": "jpeg"}, "image='jpeg' is unknown"),
        ({"n": None}, "give n"),
        ({"n": 0}, "n=0"),
        ({"quality": 100, "image": "jpg"}, "quality=100"),
        ({"by": "centres"}, "no column of the cohort"),
        ({"by": "nobody"}, "has no 'nobody'"),
        ({"by": "alike"}, "two of its values give one folder name"),
    ],
)
def test_what_cannot_be_written(settings, message, stream, tmp_path):
    other = copy.copy(stream)
    other.slides = stream.slides.assign(nobody=None, alike=["a/b", "a_b", "c", "d"])
    with pytest.raises(InputError, match=message):
        offline.write(other, tmp_path / "new", **{"n": 3, **settings})
    assert not (tmp_path / "new" / "manifest.csv").exists()


def test_folders_of_other_things_and_other_settings_are_refused(stream, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        offline.write(stream, tmp_path, 3)
    offline.write(stream, tmp_path / "tiles", 3)
    with pytest.raises(InputError, match="begun with settings="):
        offline.write(TileStream(stream.index, 36, (1.0, 2.0), seed=3), tmp_path / "tiles", 3)
    with pytest.raises(InputError, match="begun with image='png'"):
        offline.write(stream, tmp_path / "tiles", 3, image="jpg")


def test_a_full_disk_is_named_and_leaves_nothing_half(stream, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(InputError, match="no space left"):
        offline.write(stream, tmp_path / "tiles", 3)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_cannot_be_read(written, stream, tmp_path):
    with pytest.raises(InputError, match="has no manifest.csv"):
        OfflineTiles(tmp_path)
    with pytest.raises(InputError, match="Did you mean 'shuffled'"):
        OfflineTiles(written, "shuffle")
    offline.write(stream, tmp_path / "old", 2)
    about = json.loads((tmp_path / "old" / "about.json").read_text())
    (tmp_path / "old" / "about.json").write_text(json.dumps({**about, "version": 0}))
    with pytest.raises(InputError, match="version 0"):
        OfflineTiles(tmp_path / "old")
    offline.write(stream, tmp_path / "cut", 2)
    file = tmp_path / "cut" / pd.read_csv(tmp_path / "cut" / "manifest.csv")["file"][1]
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(InputError, match=rf"{file.name} \(tile in row 2\) cannot be read"):
        OfflineTiles(tmp_path / "cut")[1]
    file.unlink()
    with pytest.raises(InputError, match="write the tiles again"):
        OfflineTiles(tmp_path / "cut")[1]


def test_any_images_with_a_manifest_are_a_source(tmp_path):
    for k in range(3):
        Image.fromarray(np.full((36, 36, 3), 40 * k, np.uint8)).save(tmp_path / f"{k}.png")
    table = pd.DataFrame({"file": [f"{k}.png" for k in range(3)], "mpp": [0.5, 0.5, 1.0]})
    table.to_csv(tmp_path / "manifest.csv", index=False)
    source = OfflineTiles(tmp_path)
    assert source.order == "shuffled" and set(source.weights) == {0.5, 1.0} and source.min_tissue is None
    assert {source[i].image[0, 0, 0] for i in range(3)} == {0, 40, 80}
    for wrong, message in (
        (table.drop(columns="mpp"), "no column 'mpp'"),
        (table.assign(mpp=[1, None, 1]), "positive mpp"),
        (table.iloc[:0], "lists no tiles"),
    ):
        wrong.to_csv(tmp_path / "manifest.csv", index=False)
        with pytest.raises(InputError, match=message):
            OfflineTiles(tmp_path)


def test_the_command_line_writes_a_stream_and_a_grid(cohort, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    table = str(cohort.write(tmp_path / "cohort.csv"))
    settings = ["--tile-px=36", "--mpp=loguniform(1,2)", "--balance=patient", "--slide-weights=tissue_mm2"]
    assert main(["tiles", table, str(tmp_path / "a"), "--n=5", *settings, "--form=shards"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "manifest.csv")
    source = OfflineTiles(tmp_path / "a")
    assert len(source) == 5 and source.settings["balance"] == ["patient"] and str(source.law) == "loguniform(1, 2)"
    role = cohort.table["role"].iloc[0]
    grid = ["--stride-px=64", "--tile-px=64", "--mpp=2", f"--role={role}", "--by=patient_id"]
    assert main(["tiles", table, str(tmp_path / "b"), *grid]) == 0
    wanted = cohort.table.loc[cohort.table["role"] == role, "slide_id"]
    assert set(OfflineTiles(tmp_path / "b").table["slide_id"]) <= set(wanted)
    config = {**TINY, "watch_every": 0, "steps": 2, "batch_size": 2}
    config = [f"--{name.replace('_', '-')}={value}" for name, value in config.items() if name != "mpp"]
    given = ["pretrain", table, str(tmp_path / "run"), *config, "--mpp=1,2"]
    assert main([*given, "--tiles", str(tmp_path / "a")]) == 0
    assert Run(tmp_path / "run").params["stream"]["stream"] == "OfflineTiles"
    assert main(given) == 2  # the run was begun on tiles from disk, and does not go on with others
    assert "another tile stream" in capsys.readouterr().err
    assert main([*given[:2], str(tmp_path / "on a grid"), *given[3:], "--tiles", str(tmp_path / "d")]) == 2
    assert "d has no manifest.csv" in capsys.readouterr().err
    assert main(["tiles", table, str(tmp_path / "d"), "--stride-px=36", "--tile-px=36", "--mpp=2"]) == 0
    assert main([*given[:2], str(tmp_path / "on a grid"), *given[3:], "--tiles", str(tmp_path / "d")]) == 0
    told = Run(tmp_path / "on a grid").params["stream"]["options"]
    assert (told["order"], told["stride_px"], told["mpp"]) == ("shuffled", 36, "2")
    assert main(["tiles", table, str(tmp_path / "c"), "--stride-px=64", "--tile-filter=midnight"]) == 2
    assert "tile_filter draws tiles and a grid has them all" in capsys.readouterr().err
