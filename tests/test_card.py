"""The model card: data, overlap with public test sets, metrics, licence."""

import json

import pandas as pd
import pytest
from structured_tiles import StructuredTiles
from test_pretrain import tiny

from pathfm import card
from pathfm.pretrain import pretrain


def slides(*names: str) -> pd.DataFrame:
    return pd.DataFrame({"slide_id": names, "path": [f"/nowhere/{name}.svs" for name in names]})


def test_tissue_is_told_by_the_names_of_slides(tmp_path):
    mixed = slides(
        "TCGA-A1-A0SB-01Z-00-DX1", "tcga-a2-0001", "GTEX-1117F-0126", "tumor_001", "patient_017_node_2", "mine"
    )
    assert card.tissue_of(mixed) == {"TCGA": 2, "GTEx": 1, "CAMELYON": 2, "unknown": 1}
    assert card.tissue_of(slides("test_12", "normality_001", "TCGAlike")) == {"unknown": 3}
    (tmp_path / "s1.truth.npz").touch()
    drawn = pd.DataFrame({"slide_id": ["s1", "s2"], "path": [tmp_path / "s1.tiff", tmp_path / "s2.tiff"]})
    assert card.tissue_of(drawn) == {"synthetic": 1, "unknown": 1}
    assert card.tissue_of(drawn[["slide_id"]]) == {"unknown": 2}


def test_overlap_names_the_tasks_of_the_same_tissue():
    said = card.overlap({"CAMELYON": 270}, "random weights")
    assert said == "pcam, pcam_10shot, camelyon16_small, pathorob_camelyon: overlap the training data (CAMELYON)."
    said = card.overlap({"TCGA": 3, "unknown": 1}, "weights of a/b")
    certain, possible, rest = said.split(": ")[0], said.split(": ")[1], said
    assert {"til", "monusac", "tp53", "pathorob_tcga"} <= set(certain.split(", ")) and "pcam" not in said
    assert "crc" in possible and "may overlap" in rest and "tell no source" in rest and "weights of a/b" in rest
    assert card.overlap({"synthetic": 9}, "random weights") == (
        "None overlaps the training data: all of its slides are synthetic."
    )


class Stream(StructuredTiles):
    """Tiles that say they are of two synthetic slides."""

    mixture = pd.DataFrame({"mpp": [1.0, 2.0], "share": [0.5, 0.5]})

    def __init__(self, folder):
        super().__init__()
        (folder / "a.truth.npz").touch()
        (folder / "b.truth.npz").touch()
        self.slides = pd.DataFrame(
            {"slide_id": ["a", "b"], "path": [folder / "a.tiff", folder / "b.tiff"], "centre": ["north", "south"]}
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    stream = Stream(tmp_path_factory.mktemp("slides"))
    return pretrain(tiny(steps=2, watch_every=1), stream, StructuredTiles(seed=1), tmp_path_factory.mktemp("run"))


def test_a_run_on_slides_has_a_whole_card(run):
    about = json.loads((run.teacher / "config.json").read_text())["pathfm"]
    assert about["Data"].startswith("2 slides of 2 patients; tissue: 2 synthetic. Training centres: north, south. ")
    assert "Microns per pixel: 1, 2; tiles of 36 px with at least 40% tissue" in about["Data"]
    assert about["Licence"].startswith("Apache-2.0") and about["Start"] == "random weights"
    assert about["Metrics"]["rankme"]["last"] == pytest.approx(run.watches["rankme"].iloc[-1], rel=1e-3)
    assert about["Metrics"]["step"] == {"first": 0, "last": 2}
    assert about["Robustness index"].startswith("Not measured")
    assert about["Recipe"]["prototypes"] == 32 and about["Provenance"][0]["from_step"] == 0
    readme = (run.teacher / "README.md").read_text()
    headings = [line[3:] for line in readme.splitlines() if line.startswith("## ")]
    assert headings == list(about) and "less mean 0.5, over std 0.5" in readme


def test_what_is_not_known_is_said(run):
    params = {**run.params, "init": "weights of x/y"}
    params["stream"] = {"stream": "DeadLeaves"}
    about = card.of_run(params, pd.DataFrame(), "student")
    assert about["Data"] == "Tiles of DeadLeaves, without slides; mpp 1, 2."
    assert "not watched" in about["Metrics"] and about["Licence"].startswith("not stated")
    assert "tell no source" in about["Public test sets"] and "x/y" in about["Public test sets"]
    looks = pd.DataFrame({"step": [0, 1], "robustness_index": [0.5, 0.8125], "knn": [float("nan"), 1 / 3]})
    assert card.of_run(params, looks)["Robustness index"].startswith("0.81 on")
    assert card.metrics(looks)["knn"] == {"first": None, "last": 0.3333}
