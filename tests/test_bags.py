"""Features of whole slides: those of the grid's tiles, once a slide, here or in other processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from slide_files import cohort_of, tissue_pixels, write_slide
from test_features import PX, Counted, tiny_vit

from pathfm import InputError, SlideIndex, bags, descriptors, export, extractors
from pathfm.__main__ import main
from pathfm.bags import Cut
from pathfm.features import random_twin
from pathfm.grids import Grid

CUT = Cut(tile_px=48, mpp=1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bags"


@pytest.fixture
def model_folder(tmp_path):
    return export.export(tiny_vit(), tmp_path / "model")


def test_a_bag_is_the_features_of_the_grids_tiles(index):
    found = bags.extract("colour", index, CUT)
    grid = Grid(index, 48, 1.0)
    wanted = np.stack([descriptors.colour(grid[i].image) for i in range(len(grid))])
    assert np.allclose(np.concatenate(list(found)), wanted, atol=1e-6)
    assert found.slides["n_tiles"].sum() == len(grid) and len(found.quarantined) == 0
    together = pd.concat(found.names, ignore_index=True)
    assert together.equals(grid.table[list(together)])
    assert {"role", "patient_id", "centre"} <= set(found.slides)
    first = found.row("tiny-002")
    assert np.allclose(found.means()[first], found[first].mean(axis=0))
    assert [len(bag) for bag in found.subset(found.slides["role"] == "pretrain")] == found.slides["n_tiles"][
        :2
    ].tolist()


def test_a_network_sees_every_tile_as_it_is(index):
    model, one = tiny_vit(), index.subset(["tiny-001"])
    found = bags.extract(model, one, CUT, pool="both")
    grid = Grid(one, 48, 1.0)
    with torch.no_grad():
        tokens = model.forward_features(export.Preprocess(PX)(np.stack([grid[i].image for i in range(len(grid))])))
    wanted = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).numpy()
    assert np.allclose(found[0], wanted, atol=1e-4)
    assert isinstance(found[0], np.memmap)


def test_slides_are_embedded_once_and_a_killed_run_goes_on(index, monkeypatch, cache):
    model = tiny_vit()
    monkeypatch.setattr(bags, "_keep", _dies_at_the_third(bags._keep))
    with pytest.raises(KeyboardInterrupt):
        bags.extract(model, index, CUT)
    monkeypatch.undo()
    assert len(list(cache.glob("*.npy"))) == 2
    monkeypatch.setenv("PATHFM_CACHE", str(cache.parent))
    counted = Counted(monkeypatch, model)
    whole = bags.extract(model, index, CUT)
    left = sum(-(-n // bags.BATCH) for n in whole.slides["n_tiles"][2:])  # batches of the two slides that were left
    assert counted.batches == left
    again = bags.extract(model, index, CUT)
    assert counted.batches == left and all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    whole.files[0].write_bytes(b"cut off")
    kept = np.array(again[1])
    mended = bags.extract(model, index, CUT)
    assert len(mended[0]) == whole.slides["n_tiles"][0] and np.array_equal(mended[1], kept)
    assert counted.batches == left + -(-len(mended[0]) // bags.BATCH)


def _dies_at_the_third(keep):
    kept = []

    def keeping(*result):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(keep(*result))

    return keeping


@pytest.mark.parametrize("change", [{"mpp": 0.5}, {"tile_px": 64}, {"stride_px": 24}, {"most": 3}, {"min_tissue": 0.9}])
def test_another_cut_is_another_bag(index, change):
    one = index.subset(["tiny-000"])
    before, after = bags.extract("colour", one, CUT), bags.extract("colour", one, CUT._replace(**change))
    assert before.files != after.files and before[0].shape != after[0].shape


def test_the_most_tiles_are_drawn_by_the_slides_name(index):
    cut = CUT._replace(most=5)
    found = bags.extract("colour", index, cut)
    assert (found.slides["n_tiles"] == 5).all()
    alone = bags.extract("colour", index.subset(["tiny-003"]), cut)
    assert alone.names[0].equals(found.names[3])  # whatever slides are beside it
    other = bags.extract("colour", index, cut._replace(seed=1))
    assert not other.names[0].equals(found.names[0])


def test_worker_processes_give_the_same_bags(index, model_folder, tmp_path):
    """Two Dask workers, processes of their own, that open index and model themselves."""
    alone = bags.extract(model_folder, index, CUT)
    together = bags.extract(model_folder, index, CUT, folder=tmp_path / "together", workers=2)
    assert len(list((tmp_path / "together").glob("*.npy"))) == 4
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(alone, together, strict=True))
    with pytest.raises(InputError, match="does not go to other processes; write it with pathfm.export"):
        bags.extract(tiny_vit(), index, CUT, workers=2)


def test_a_twin_travels_by_the_name_of_its_model(index, model_folder, tmp_path, monkeypatch):
    """Its weights are drawn where it is used: here, in memory, and by workers whose working folder is another."""
    wanted = bags.extract(random_twin(tiny_vit()), index, CUT)
    monkeypatch.chdir(tmp_path)
    alone = bags.extract("twin:model", index, CUT, folder=tmp_path / "alone")
    together = bags.extract("twin:model", index, CUT, folder=tmp_path / "together", workers=2)
    for other in (alone, together):
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(wanted, other, strict=True))
    assert not np.allclose(bags.extract(model_folder, index, CUT)[0], alone[0], atol=1e-2)


def test_precisions_are_compared_on_tiles_of_the_slides(index, tmp_path, monkeypatch):
    model, folder = tiny_vit(), tmp_path / "auto"
    few = bags.extract(model, index, CUT, precision="auto", folder=folder)  # not worth a comparison
    assert few.provenance["precision"] == "float32" and "bfloat16" not in few.provenance
    monkeypatch.setattr(extractors, "WORTH_A_SAMPLE", 20)
    monkeypatch.setattr(extractors, "SAMPLE", 24)
    grid = Grid(index, 48, 1.0)
    places = [np.flatnonzero(grid.table["slide_id"] == name) for name in grid.table["slide_id"].unique()]
    some = np.concatenate([one[np.unique(np.linspace(0, len(one) - 1, 6).astype(int))] for one in places])
    images = [grid[i].image for i in some]
    pair = [extractors.backbone(model, precision=one).features(images, None) for one in ("float32", "bfloat16")]
    measured = extractors.agreement(*pair)
    for least, precision in ((0.0, "bfloat16"), (1.01, "float32")):
        monkeypatch.setattr(extractors, "SAME_NEIGHBOURS", least)
        found = bags.extract(model, index, CUT, precision="auto", folder=tmp_path / precision)
        assert found.provenance["precision"] == precision
        told = found.provenance["bfloat16"]
        assert (told["neighbours"], told["n"]) == (pytest.approx(measured.neighbours, abs=0.01), len(some))
        assert "no probe was asked" in extractors.compared(found.provenance)
        same = bags.extract(model, index, CUT, precision=precision, folder=tmp_path / "plain")
        assert all(np.array_equal(a, b) for a, b in zip(found, same, strict=True))
    monkeypatch.setattr(extractors, "agreement", None)  # what was measured is kept, for the same slides and model
    again = bags.extract(model, index, CUT, precision="auto", folder=tmp_path / "float32")
    assert again.provenance["precision"] == "float32"
    assert again.provenance["bfloat16"] == pytest.approx(told, nan_ok=True)


def test_bfloat16_of_slides_that_is_not_as_good_is_warned_of(index, monkeypatch):
    monkeypatch.setattr(extractors, "SAME_NEIGHBOURS", 1.01)
    with pytest.warns(UserWarning, match="bfloat16 leaves .*no probe was asked, for want of labels, where 101%"):
        found = bags.extract(tiny_vit(), index, CUT, precision="bfloat16")
    assert found.provenance["precision"] == "bfloat16"


def test_a_worker_with_other_weights_is_refused(index, model_folder):
    source = bags.Source(str(model_folder), "other", None, "cls", 1, "float32", None)
    with pytest.raises(InputError, match="holds other weights on a worker than here"):
        bags.embed_slide(source, index.subset(["tiny-000"]), CUT)


@pytest.fixture
def spoilt(tmp_path):
    """Three slides: one good, one that breaks after it was indexed, one that is none."""
    paths = {f"s{k}": write_slide(tmp_path / f"s{k}.tiff", tissue_pixels(seed=k), 0.5, (1,)) for k in range(2)}
    (tmp_path / "none.svs").write_text("no slide")
    index = SlideIndex.build(cohort_of(paths | {"none": tmp_path / "none.svs"}), tmp_path / "index", workers=0)
    content = paths["s1"].read_bytes()
    paths["s1"].write_bytes(content[: len(content) // 2])
    return index


def test_slides_that_cannot_be_read_are_quarantined_and_counted(spoilt):
    found = bags.extract("colour", spoilt, CUT)
    assert found.slides["slide_id"].tolist() == ["s0"]
    reasons = found.quarantined.set_index("slide_id")["reason"]
    assert set(reasons.index) == {"s1", "none"} and "2 slides quarantined" in repr(found)
    assert "s1.tiff" in reasons["s1"]
    with pytest.raises(InputError, match="no features of slide 's1': .*s1.tiff"):
        found.row("s1")
    with pytest.raises(InputError, match="no slide of .* has features. The first"):
        bags.extract("colour", spoilt.subset(["none"]), CUT)


def test_a_slide_without_a_tile_is_quarantined(index):
    """Two of the four are scanned at 0.25 um/px; the others do not serve that."""
    found = bags.extract("colour", index, Cut(tile_px=192, mpp=0.25))
    assert found.slides["slide_id"].tolist() == ["tiny-001", "tiny-003"]
    assert found.quarantined["slide_id"].tolist() == ["tiny-000", "tiny-002"]
    with pytest.raises(InputError, match="has features. The first: .*"):
        bags.extract("colour", index, CUT._replace(tile_px=5000))
    with pytest.raises(InputError, match="has features. The first: .*"):
        bags.extract(tiny_vit(), index, CUT._replace(tile_px=5000), precision="bfloat16")


def test_wrong_calls_say_what_would_be_right(index):
    with pytest.raises(InputError, match="'metadata' is of labelled tiles; slides take colour"):
        bags.extract("metadata", index, CUT)
    broken = tiny_vit()
    with torch.no_grad():
        broken.cls_token[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="hold NaN or infinity in tiny-000"):
        bags.extract(broken, index, CUT)


def test_the_command_line_writes_what_others_read(cohort, model_folder, tmp_path, capsys):
    csv, out = cohort.write(tmp_path / "cohort.csv"), tmp_path / "out"
    told = ["embed", str(model_folder), str(csv), str(out), "--slides", "true", "--mpp", "1", "--tile-px", "48"]
    assert main(told) == 0
    assert f"{out}: Bags(model: 4 slides" in capsys.readouterr().out
    with h5py.File(out / "tiny-000.h5") as file:
        n = len(file["coords"])
        assert file["features"].shape == (n, 24) and file["coords"].shape == (n, 2)
        assert file["coords"].attrs["mpp"] == 1.0
    assert main([*told[:-1], "5000"]) == 2
    assert "has features. The first" in capsys.readouterr().err


def test_a_job_needs_nothing_but_what_it_is_given(index, model_folder, tmp_path):
    """As on another machine: a fresh process, another working folder, arguments that came as bytes."""
    import cloudpickle

    made = bags.extractors.backbone(model_folder).provenance["weights"]
    source = bags.Source(str(model_folder), made, None, "cls", 1, "float32", None)
    job = tmp_path / "job"
    job.write_bytes(cloudpickle.dumps((source, index.subset(["tiny-000"]), CUT)))
    script = (
        "import pickle, sys, numpy as np; from pathfm.bags import embed_slide; "
        "np.save(sys.argv[2], embed_slide(*pickle.loads(open(sys.argv[1], 'rb').read())))"
    )
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", script, str(job), str(tmp_path / "x.npy")]
    subprocess.run(command, check=True, cwd="/", env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1"})
    assert np.allclose(np.load(tmp_path / "x.npy"), bags.extract(model_folder, index, CUT)[0], atol=1e-5)
