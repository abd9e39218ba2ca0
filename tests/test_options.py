"""How tiles are drawn, said on a command line: heeded, recorded, and refused where it is unknown or contradictory."""

import json

import pytest
from test_pretrain import TINY

from pathfm.__main__ import main
from pathfm.cohort import Cohort
from pathfm.offline import OfflineTiles
from pathfm.pretrain import Run

FIELDS = {**TINY, "watch_every": 0, "steps": 2, "batch_size": 2, "checkpoint_every": 1}
GIVEN = [f"--{name.replace('_', '-')}={value}" for name, value in FIELDS.items() if name not in ("mpp", "tile_px")]
DRAWN = ["--tile-px=36", "--mpp=loguniform(1,2)", "--balance=patient", "--slide-weights=tissue_mm2",
         "--tiles-per-slide=7", "--resample=always", "--context-px=40", "--seed=3"]  # fmt: skip


@pytest.fixture(scope="module")
def table(cohort, tmp_path_factory) -> str:
    return str(Cohort(cohort.table.drop(columns="role"), "all").write(tmp_path_factory.mktemp("cohort") / "cohort.csv"))


@pytest.fixture(scope="module")
def run(table, tmp_path_factory) -> Run:
    """A run whose tiles are drawn in every way at once that has no files of its own."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["pretrain", table, str(folder), *GIVEN, *DRAWN]) == 0
    return Run(folder)


def test_a_run_draws_the_tiles_that_the_same_options_write(run, table, tmp_path):
    assert main(["tiles", table, str(tmp_path / "tiles"), "--n=8", *DRAWN]) == 0
    written = OfflineTiles(tmp_path / "tiles")
    first = [[tile.slide_id, tile.x, tile.y, f"{tile.mpp:.6g}"] for tile in map(written.name, range(8))]
    assert run.params["stream"]["first_tiles"] == first
    assert written[0].image.shape[0] == run.config.tile_px == 40 and run.config.mpp == (1.0, 2.0)


def test_how_tiles_were_drawn_is_in_the_record_and_on_the_card(run):
    told = run.params["stream"]["options"]
    assert (told["mpp"], told["balance"], told["tiles_per_slide"]) == ("loguniform(1, 2)", ["patient"], 7)
    assert (told["tile_px"], told["context_px"], told["resample"]) == (36, 40, "always")
    assert told["slide_weights"] == "tissue_mm2" and told["seed"] == 3
    about = json.loads((run.teacher / "config.json").read_text())["pathfm"]
    assert "Microns per pixel: loguniform(1, 2); tiles of 36 px with at least 40% tissue." in about["Data"]
    assert "Drawn with tiles_per_slide=7; balance=patient; slide_weights=tissue_mm2" in about["Data"]
    assert "context_px=40; resample=always." in about["Data"] and "tile_filter" not in about["Data"]


@pytest.mark.parametrize(
    "option, message",
    [
        ("--balance=patient,slide_id", "its balance was ['patient'], now it is ['patient', 'slide_id']"),
        ("--slide-weights=", "its slide_weights was 'tissue_mm2', now it is None"),
        ("--mpp=uniform(1,2)", "its mpp was 'loguniform(1, 2)', now it is 'uniform(1, 2)'"),
        ("--tiles-per-slide=8", "its tiles_per_slide was 7, now it is 8"),
        ("--resample=auto", "its resample was 'always', now it is 'auto'"),
        ("--tile-filter=midnight", "its tile_filter was None, now it is 'HsvFilter("),
        ("--common-mpp=true", "its common_mpp was False, now it is True"),
        ("--context-px=36", "made with tile_px=40, not 36"),
    ],
)
def test_a_run_does_not_go_on_with_tiles_drawn_in_another_way(option, message, run, table, capsys):
    assert main(["pretrain", table, str(run.folder), *GIVEN, *DRAWN, option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tile-filtr=midnight"], "pretrain has no '--tile-filtr=midnight'. Did you mean '--tile-filter'?"),
        (["--tile-filter=midnite"], "tile_filter='midnite' is unknown. Did you mean 'midnight'?"),
        (["--balance=centr"], "cannot balance by 'centr': no such column. Did you mean 'centre'?"),
        (["--slide-weights=tissue"], "slide_weights='tissue' is no column."),
        (["--resample=alway"], "resample='alway'"),
        (["--mpp=lguniform(1,2)"], "no law 'lguniform'. Did you mean 'loguniform'?"),
        (["--context-px=30"], "context_px=30 must be tile_px=36 plus an even number"),
        (["--position-weights=nowhere"], "nowhere"),
        (["--mpp=1,400", "--common-mpp=true"], "no slide serves a tile of 36 px"),
        (["--same-place=true"], "same_place has each place at every mpp; mpp=1 is no list"),
        (["--tiles=here", "--balance=patient"], "balance draws tiles, and those in tiles are there; leave balance out"),
        (["--tiles=here", "--resample=always"], "resample draws tiles, and those in tiles are there"),
    ],
)
def test_options_that_are_unknown_or_contradictory_are_named(options, message, table, tmp_path, capsys):
    assert main(["pretrain", table, str(tmp_path / "run"), *GIVEN, "--tile-px=36", "--mpp=1", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.csv").exists()


def test_a_mixture_has_its_weights_but_for_what_no_slide_serves(table, tmp_path, capsys):
    assert main(["pretrain", table, str(tmp_path), *GIVEN, "--tile-px=36", "--mpp=1:1,2:3,400:4"]) == 0
    assert "No slide serves 400 mpp" in capsys.readouterr().out
    run = Run(tmp_path)
    assert run.params["stream"]["options"]["mpp"] == "1:0.25, 2:0.75" and run.config.mpp == (1.0, 2.0, 400.0)


def test_a_run_on_places_at_several_mpp_and_their_offline_twin(table, tmp_path, capsys):
    same = ["--tile-px=36", "--mpp=1,2", "--same-place=true", "--balance=patient"]
    given = ["pretrain", table, str(tmp_path / "run"), *GIVEN]
    assert main([*given, *same]) == 0
    run = Run(tmp_path / "run")
    assert run.params["stream"]["stream"] == "Places" and run.params["stream"]["options"]["same_place"] is True
    scales = [float(mpp) for *_, mpp in run.params["stream"]["first_tiles"]]
    assert scales == pytest.approx([1, 2] * 4, rel=0.01)
    assert "same_place=True" in (run.teacher / "README.md").read_text()
    capsys.readouterr()
    assert main([*given, "--tile-px=36", "--mpp=1,2", "--balance=patient", "--common-mpp=true"]) == 2
    assert "its same_place was True, now it is False" in capsys.readouterr().err
    assert main(["tiles", table, str(tmp_path / "tiles"), "--n=8", *same]) == 0
    written = OfflineTiles(tmp_path / "tiles")
    first = [[tile.slide_id, tile.x, tile.y, f"{tile.mpp:.6g}"] for tile in map(written.name, range(8))]
    assert written.order == "written" and run.params["stream"]["first_tiles"] == first


def test_a_grid_has_all_tiles_and_draws_none(table, tmp_path, capsys):
    given = ["tiles", table, str(tmp_path / "grid"), "--stride-px=64", "--mpp=2", "--common-mpp=true"]
    assert main(given) == 2
    assert "common_mpp draws tiles and a grid has them all; leave common_mpp out" in capsys.readouterr().err
