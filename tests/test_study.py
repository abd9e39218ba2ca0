"""The study's shared products: roles are kept, what a cohort lacks is said, real slides go the whole way."""

import numpy as np
import pandas as pd
import pytest
import torch

from pathfm import Cohort, InputError, SlideIndex, TileSet, runs, study
from pathfm.__main__ import main
from pathfm.config import RECIPES, SMOKE
from pathfm.export import load
from pathfm.features import extract
from pathfm.scores import Prediction
from pathfm.synthetic import labelled_tiles
from pathfm.watches import Watch

TINY = {"depth": 1, "width": 32, "heads": 2, "prototypes": 32, "head_hidden": 32, "head_bottleneck": 16}
TWO_STEPS = {**TINY, "steps": 2, "batch_size": 4, "watch_every": 0, "seed": 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PATHFM_CACHE", str(tmp_path_factory.mktemp("cache")))


def with_roles(index, **roles):
    changed = SlideIndex(index.folder, index.slides.drop(columns="role", errors="ignore"))
    if roles:
        changed.slides["role"] = changed.slides["slide_id"].map(roles)
    return changed


def test_pretraining_sees_only_slides_of_its_role(index):
    ids = list(index.slides["slide_id"])
    split = with_roles(index, **{name: "pretrain" if i < 2 else "test" for i, name in enumerate(ids)})
    stream = study.stream(split, study.config(mpp="1"))
    assert set(stream.names(range(50))["slide_id"]) == set(ids[:2])


def test_a_cohort_without_roles_pretrains_on_everything_and_says_so(index, capsys):
    stream = study.stream(with_roles(index), study.config(mpp="1"))
    assert len(stream.slides) == len(index.usable)
    assert "no column 'role'" in capsys.readouterr().out


def test_a_cohort_without_pretraining_slides_is_refused(index):
    with pytest.raises(InputError, match="no usable slide of role 'pretrain'"):
        study.stream(with_roles(index, **dict.fromkeys(index.slides["slide_id"], "test")), study.config())


def test_an_mpp_that_no_slide_serves_is_said_and_left_out(index, capsys):
    stream = study.stream(with_roles(index), study.config(mpp="1,400"))
    assert list(stream.mixture["mpp"]) == [1.0]
    assert "No slide serves 400 mpp" in capsys.readouterr().out


def test_arms_of_an_ablation_see_the_same_slides(index):
    free = study.stream(with_roles(index), study.config(mpp="1"))
    shared = study.stream(with_roles(index), study.config(mpp="1"), common="0.25,1")
    fine = set(index.slides.query("mpp < 0.3")["slide_id"])
    assert fine < set(free.slides["slide_id"])
    assert set(shared.slides["slide_id"]) == fine


def test_no_mpp_at_all_is_an_error_that_says_what_to_ask_for(index):
    with pytest.raises(InputError, match="no slide serves any of 400 mpp"):
        study.stream(with_roles(index), study.config(mpp="400"))


@pytest.mark.parametrize("text", ["", "fine", "0.5;1", "-1", "0"])
def test_an_mpp_list_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="is no list of microns per pixel"):
        study.mpp_list(text)


def test_a_sweep_leaves_out_what_the_cohort_cannot_serve(cohort, capsys):
    slides = Cohort(cohort.table.drop(columns="role"), "no-roles")
    spec = {"grid": {"mpp": ["1", "1,400", "400"], "seed": [0]}}
    assert study.servable_grid(slides, spec) == {"mpp": ["1"], "seed": [0]}
    assert "No slide serves 400 mpp" in capsys.readouterr().out


def test_non_histology_start_is_trained_without_slides_and_named_as_what_it_is(cohort):
    slides = Cohort(cohort.table.drop(columns="role"), "no-roles")
    run = study.pretrained(slides, mpp="1", init=study.NON_HISTOLOGY, **TWO_STEPS)
    start = study.non_histology(study.config(mpp="1", init=study.NON_HISTOLOGY, **TWO_STEPS))
    assert "non-histology" in start.folder.name
    assert start.folder.name in run.params["init"]
    assert str(start.folder) not in (run.teacher / "README.md").read_text(), "no path of this machine leaves"
    assert {tile[0] for tile in start.params["stream"]["first_tiles"]} == {"dead-leaves"}


def test_a_finished_run_is_read_back_and_an_unfinished_one_refused(cohort, tmp_path):
    run = study.pretrained(Cohort(cohort.table.drop(columns="role"), "no-roles"), mpp="1", **TWO_STEPS)
    assert study.finished(run.folder).config == run.config
    with pytest.raises(InputError, match="holds no finished run"):
        study.finished(tmp_path)


def test_recorded_rows_of_another_generator_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("pathfm.runs.results_dir", lambda: tmp_path / "results")
    assert study.recorded("toy").empty
    assert "Nothing is recorded yet: `make sweep NAME=toy`" in capsys.readouterr().out
    (tmp_path / "results").mkdir()
    table = pd.DataFrame({"score": [0.5, 0.6], "generator": [runs.provenance()["generator"], "0-stale"]})
    table.to_csv(tmp_path / "results" / "toy.csv", index=False)
    assert list(study.recorded("toy")["score"]) == [0.5]
    assert "1 of 2 rows were recorded on another generator" in capsys.readouterr().out


@pytest.mark.real
def test_real_slides_go_from_file_to_features(real_data, tmp_path, capsys):
    names = ["cmu-1-small-region.svs", "derived_cmu1_region_pyramid.tiff", "gcp_camelyon_jpeg.dcm"]
    table = pd.DataFrame({"slide_id": ["svs", "tiff", "dicom"], "path": [real_data / "slides" / n for n in names]})
    slides = Cohort(table.astype(str), "real")
    run = study.pretrained(slides, mpp="0.25,0.5,1,2,29", **{**TWO_STEPS, "watch_every": 1})
    said = capsys.readouterr().out
    assert "No slide serves 0.25 mpp" in said
    assert "the run is not watched" in said
    assert len(run.log) == 2
    assert np.isfinite(run.log["loss"]).all()
    assert set(study.stream(study.index(slides), study.config(mpp="0.5,1,2")).slides["slide_id"]) == {"svs", "tiff"}
    tiles = TileSet.from_folder(real_data / "tiles" / "crc_val_he_7k_native224")
    features = extract(run.teacher, tiles)
    assert features.x.shape == (70, 32)
    model, preprocess = load(run.teacher)
    assert np.allclose(features.x[0], model(preprocess(tiles.image(0)[None])).detach()[0], atol=1e-5)


def test_the_command_line_pretrains_embeds_and_probes(cohort, tmp_path, capsys):
    table = cohort.table.drop(columns="role")
    Cohort(table, "tiny").write(tmp_path / "tiny.csv")
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMOKE, **TWO_STEPS}.items()]
    settings = [text.replace("(1.0, 2.0)", "1,2") for text in settings]
    assert main(["pretrain", str(tmp_path / "tiny.csv"), str(tmp_path / "run"), *settings]) == 0
    teacher = capsys.readouterr().out.splitlines()[-1]
    tiles = labelled_tiles(cohort, tmp_path / "tiles", tile_px=64, mpp=1.0, per_class=8)
    assert main(["embed", teacher, str(tiles), str(tmp_path / "features.npz")]) == 0
    assert np.load(tmp_path / "features.npz")["x"].shape[1] == TINY["width"]
    assert main(["tiles", str(tmp_path / "tiny.csv"), str(tmp_path / "png"), "--n=3", "--mpp=1", "--tile-px=64"]) == 0
    assert len(pd.read_csv(tmp_path / "png" / "manifest.csv")) == len(list((tmp_path / "png").glob("*/*.png"))) == 3
    assert main(["embed", teacher, str(tiles), str(tmp_path / "features.npz"), "--pool", "max"]) == 2
    assert "max" in capsys.readouterr().err


def test_a_recipe_is_changed_by_text_and_refuses_what_it_does_not_know():
    plain = study.config("demo")
    assert study.config("demo", mpp="", steps=0) == plain
    changed = study.config(
        "demo", "koleo=0 global_scale=0.5,1 head_norm=True model=vit_tiny_patch16_224", steps=7, seed=3
    )
    assert (changed.koleo, changed.global_scale, changed.head_norm, changed.steps, changed.seed) == (
        0,
        (0.5, 1),
        True,
        7,
        3,
    )
    assert changed.model == "vit_tiny_patch16_224"
    with pytest.raises(InputError, match="recipe='dmeo' is unknown.*demo"):
        study.config("dmeo")
    with pytest.raises(InputError, match="no field 'kolio'.*koleo"):
        study.config("demo", "kolio=1")
    with pytest.raises(InputError, match="'koleo' is no name=value"):
        study.config("demo", "koleo")


def test_a_synthetic_cohort_is_asked_for_by_name_and_seed(monkeypatch):
    monkeypatch.setattr(study, "make_cohort", lambda name, seed: (name, seed))
    assert study.cohort("study") == ("study", 0)
    assert study.cohort("development:11") == ("development", 11)
    with pytest.raises(InputError, match="'developmnt:11' is neither.*development"):
        study.cohort("developmnt:11")
    with pytest.raises(InputError, match="neither"):
        study.cohort("study:x")


@pytest.mark.parametrize("held", [False, True])
def test_a_run_watches_as_many_validation_tiles_as_are_asked_for_at_two_mpp_and_none_of_test_centres(
    held, cohort, capsys
):
    table = cohort.table.head(4).assign(role=["pretrain", "validate", "validate", "test"])
    table["patient_id"], table["centre"] = list("pqrs"), ["a", "b", "c", "c" if held else "d"]
    settings = study.config(mpp="1,2", watch_tiles=20, **{**TINY, "tile_px": 36, "global_px": 32, "local_px": 16})
    stream = study.watched(Cohort(table, "watched"), settings)
    validating = list(table["slide_id"].iloc[1:3])
    assert set(stream.slides["slide_id"]) == set(validating[:1] if held else validating)
    assert ("1 slides validate in centres that only test" in capsys.readouterr().out) == held
    watch = Watch.of(stream, settings.watch_tiles)
    assert (watch.mpp, watch.coarse.mpp) == (1, 2) and len(watch.images) == len(watch.coarse.images) == 20
    again = Watch.of(study.watched(Cohort(table, "watched"), settings), settings.watch_tiles)
    assert torch.equal(watch.images, again.images), "they are fixed"


def test_a_real_runs_recipe_watches_4096_tiles():
    large = [name for name in RECIPES if name.startswith(("dino-vit", "dinov2-vit", "midnight"))]
    assert len(large) == 7 and {study.config(name).watch_tiles for name in large} == {4096}
    assert all(study.config(name).watch_every for name in large)


def test_new_centres_are_those_that_no_pretraining_slide_comes_from():
    table = pd.DataFrame(
        {"slide_id": list("abc"), "path": list("abc"), "centre": [1, 1, 2], "role": ["pretrain", "test", "test"]}
    )
    assert study.new_centres(Cohort(table)) == ["2"]
    assert study.new_centres(Cohort(table.drop(columns="role"))) == []


def test_answers_are_read_where_their_sweep_is_current(monkeypatch, tmp_path, capsys):
    for module in ("runs", "study"):
        monkeypatch.setattr(f"pathfm.{module}.results_dir", lambda: tmp_path)
    assert study.recorded_answers("toy") == {}
    tiles = {"file": ["a", "b"], "patient_id": ["p", "q"], "truth": ["x", "y"], "teacher|linear|0": ["x", "x"]}
    pd.DataFrame(tiles).to_csv(tmp_path / "toy_answers.csv", index=False)
    assert study.recorded_answers("toy") == {}  # of which generator, nobody knows
    table = pd.DataFrame({"score": [0.5], "generator": ["0-stale"]})
    table.to_csv(tmp_path / "toy.csv", index=False)
    assert study.recorded_answers("toy") == {}
    table.assign(generator=runs.provenance()["generator"]).to_csv(tmp_path / "toy.csv", index=False)
    assert study.recorded_answers("toy")["teacher"][0].balanced_accuracy == 0.5


def test_recorded_answers_are_told_apart_by_who_pretrained():
    """Of the embedded cohort's centres two pretrain, one validates and one tests: nobody has seen the last two."""
    table = pd.DataFrame({"file": list("abcd"), "centre": [f"centre-{k}" for k in range(4)], "truth": "x"})
    said = {"teacher": [Prediction("teacher", "linear", table.assign(predicted="x"), seed) for seed in (0, 1)]}
    new, old = (study.on_centres(said, new, "embedded")["teacher"] for new in (True, False))
    assert [one.table["file"].tolist() for one in new] == 2 * [["c", "d"]] and [one.seed for one in new] == [0, 1]
    assert old[0].table["file"].tolist() == ["a", "b"]
