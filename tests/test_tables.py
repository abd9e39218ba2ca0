"""LaTeX tables, and the stamp that says where a figure or table comes from."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from pathfm import figures, tables
from pathfm.errors import InputError

TABLE = pd.DataFrame({"Features": ["colour & LBP", "a_b"], "Score": [0.514, -0.1], "n": [216, 216]})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFM_FIGURES", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "printed"),
    [("95 %", r"95 \%"), ("a_b & c#1", r"a\_b \& c\#1"), ("{x}", r"\{x\}"), ("a\\b", r"a\textbackslash{}b")],
)
def test_special_characters_are_printed_as_they_are(text, printed):
    assert tables.escape(text) == printed


def test_a_table_has_a_line_a_row_and_a_cell_a_column():
    lines = tables.latex(TABLE, "Scores in %", "tab:x").splitlines()
    assert r"\caption{Scores in \%}" in lines and r"\label{tab:x}" in lines
    assert r"\begin{tabular}{lrr}" in lines
    assert r"colour \& LBP & 0.51 & 216 \\" in lines
    assert r"a\_b & $-$0.10 & 216 \\" in lines
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 3 and all(line.count(" & ") == 2 for line in rows)


def test_what_is_missing_is_a_dash():
    table = pd.DataFrame({"x": [np.nan, 1.0], "n": pd.array([pd.NA, 3], "Int64")})
    lines = tables.latex(table, "", "").splitlines()
    assert r"-- & -- \\" in lines and r"1.00 & 3 \\" in lines


def test_a_written_table_says_where_it_comes_from(folder):
    path = tables.write(TABLE, "07_scores", "Scores", "tab:x", {"steps": 40})
    facts = json.loads((folder / "07_scores.json").read_text())
    head = path.read_text().splitlines()
    assert facts["made_by"] == "notebooks/07_paper_figures.ipynb" and facts["inputs"] == {"steps": 40}
    for key in ("commit", "date", "device", "generator"):
        assert f"% {key}: {facts[key]}" in head
    assert path.read_text().endswith(tables.latex(TABLE, "Scores", "tab:x"))


def make_figure(height: float):
    figures.use_style()  # with its salt the same figure has the same bytes
    fig, ax = plt.subplots()
    ax.plot([0, 1], [0, height])
    figures.save(fig, "07_line")
    plt.close(fig)


def test_an_unchanged_figure_keeps_its_stamp_and_a_changed_one_gets_a_new_one(folder):
    make_figure(1)
    tables.stamp("07_line")
    path = folder / "07_line.json"
    facts = json.loads(path.read_text()) | {"date": "2020-01-01 00:00"}
    path.write_text(json.dumps(facts))
    make_figure(1)
    assert tables.stamp("07_line")["date"] == "2020-01-01 00:00"
    make_figure(2)
    assert tables.stamp("07_line")["date"] != "2020-01-01 00:00"


def test_other_inputs_are_another_product():
    make_figure(1)
    first = tables.stamp("07_line", inputs={"seed": 0})
    assert tables.stamp("07_line", inputs={"seed": 1})["inputs"] != first["inputs"]


def test_a_figure_that_was_not_shown_cannot_be_stamped():
    with pytest.raises(InputError, match="no figure 07_none.svg"):
        tables.stamp("07_none")
