"""The leaderboard: published rows are the printed ones, protocols never meet, and who has seen what is told."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from pathfm import InputError, board, leaderboard, panels, runs, tasks
from pathfm.__main__ import main
from pathfm.scores import Prediction, interval, paired


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results."""
    monkeypatch.setattr(runs, "results_dir", lambda: tmp_path / "results")
    return tmp_path / "results"


def answered(accuracy, draw=0, name="a", probe="linear", seed=0, floor=False) -> Prediction:
    rng, n = np.random.default_rng(draw), 400
    truth = np.where(np.arange(n) % 2, "x", "y")
    table = pd.DataFrame({"file": np.arange(n).astype(str), "patient_id": [f"p{i // 10}" for i in range(n)]})
    wrong = np.where(truth == "x", "y", "x")
    predicted = np.where(rng.random(n) < accuracy, truth, wrong)
    return Prediction(name, probe, table.assign(truth=truth, predicted=predicted), seed, floor=floor)


def test_published_scores_are_the_printed_ones_with_their_source():
    table = leaderboard.published().set_index(["model", "task", "part", "protocol"])
    one = table.loc[("kaiko B/8", "pcam", "test", "eva-2024")]
    assert (one["score"], one["spread"], one["runs"]) == (0.921, 0.002, 5)
    assert table.loc[("kaiko B/8", "pcam", "test", "eva-2026"), "score"] == 0.915
    assert table.loc[("kaiko L/14 (DINOv2)", "tp53", "not stated", "model-cards"), "score"] == 0.656
    assert table.loc[("Midnight-12k", "bracs", "not stated", "midnight-2025"), "score"] == 0.639
    assert table.loc[("EXAONE Path 2.0", "exaone_luad_egfr", "test", "exaone-2.0"), "metric"] == "AUROC"
    assert table.index.is_unique and table["published"].all() and (table["source"] != "").all()
    assert table["score"].between(0, 1).all()
    assert (table["metric"] != "").all() and table["pretrained_on"].notna().all()


def test_every_published_task_is_known_but_two():
    named = set(leaderboard.published()["task"]) - set(tasks.TASKS)
    assert named == {"hest", "pathorob"}  # no reader; the mean over PathoROB's three sets


def test_the_papers_table_is_whole():
    shown = board.wide(leaderboard.published().query("protocol == 'eva-2024'"))
    assert shown.shape == (12, 4 + 5) and shown.notna().all(axis=None)
    assert (shown["published"] == "published").all()
    assert shown["model"].iloc[-1] == "ViT-S/16 random"


def test_protocols_of_other_dates_are_never_mixed(results):
    table = leaderboard.rows()
    with pytest.raises(InputError, match="scores by 9 protocols do not compare: eva-2024, eva-2024-10, eva-2026"):
        board.wide(table)
    with pytest.raises(InputError, match="by 2 protocols"):
        board.wide(table[table["protocol"].isin(["eva-2024", "eva-2026"])])
    with pytest.raises(InputError, match="do not compare"):
        board.figure(table)
    with pytest.raises(InputError, match="no score is by the protocol 'eva-2025'. Did you mean 'eva-202"):
        leaderboard.rows("eva-2025")
    for name, scored in table.groupby("protocol"):
        shown = board.wide(scored)
        shown = shown.drop(columns=list(board.ABOUT)).notna().sum().sum()
        assert shown == len(scored) == (leaderboard.published()["protocol"] == name).sum()


def test_two_metrics_of_one_task_are_refused():
    table = leaderboard.published().query("protocol == 'eva-2024' and task == 'crc'")
    table.loc[table.index[0], "metric"] = "accuracy"
    with pytest.raises(InputError, match="crc val is scored by two metrics"):
        board.wide(table)


@pytest.mark.parametrize(
    ("pretrained_on", "task", "told"),
    [
        ("TCGA", "monusac", "TCGA"),
        ("TCGA+GTEx", "til", "TCGA"),
        ("TCGA", "pcam", "no"),
        ("TCGA+CAMELYON", "pcam", "CAMELYON"),
        ("TCGA", "crc", "unknown"),
        ("GTEx", "crc", "no"),
        ("Mass-100k", "pcam", "unknown"),
        ("not stated", "bach", "no"),
        ("ImageNet", "crc", "no"),
        ("synthetic", "monusac", "no"),
        ("none", "monusac", "no"),
        ("TCGA", "a data set of mine", "unknown"),
    ],
)
def test_who_may_have_seen_what(pretrained_on, task, told):
    assert leaderboard.seen(pretrained_on, task) == told


def test_the_board_says_which_tasks_a_model_may_have_seen():
    shown = board.wide(leaderboard.published().query("protocol == 'exaone-1.0'")).set_index("model")
    assert shown.loc["EXAONE Path 1.0", "seen"] == "crc (?), til (TCGA), msi_crc (TCGA), msi_stad (TCGA)"


def test_a_recorded_row_stands_beside_the_published_ones(results):
    seeds, floor = [answered(0.9, i, seed=i) for i in range(2)], answered(0.6, 9, "colour", floor=True)
    row = leaderboard.row_of(seeds, "mine", "TCGA", "mhist", [floor])
    score, gain = interval(seeds), paired(seeds, floor)
    assert (row["score"], row["low"], row["high"]) == pytest.approx(score)
    assert (row["gain"], row["gain_low"], row["gain_high"]) == pytest.approx(gain[:3])
    assert row["best_floor"] == "colour" and row["protocol"] == "linear" and row["runs"] == 2
    assert row["spread"] == pytest.approx(np.std([one.balanced_accuracy for one in seeds], ddof=1))
    assert row["part"] == "test"
    leaderboard.record([row | {"protocol": "eva-2024", "part": "val"}])
    shown = board.wide(leaderboard.rows("eva-2024")).set_index("model")
    assert len(shown) == 13 and (shown["published"] == "").sum() == 1
    assert shown.loc["mine", "mhist val"] == pytest.approx(score.value, abs=1e-4)
    assert np.isnan(shown.loc["mine", "pcam test"])


def test_repeated_fits_are_the_runs_of_one_prediction():
    settings = {"reported on": "validate", "scores": [0.8, 0.9, 0.85]}
    row = leaderboard.row_of([replace(answered(0.9, probe="eva-2026"), settings=settings)], "mine", "TCGA", "mhist")
    assert (row["part"], row["protocol"], row["runs"]) == ("val", "eva-2026", 3)
    assert row["spread"] == pytest.approx(0.05)


def test_a_row_is_recorded_once_and_replaced(results):
    row = leaderboard.row_of([answered(0.9)], "mine", "TCGA", "mhist")
    for score in (0.7, 0.8):
        path = leaderboard.record([row | {"score": score}, row | {"task": "crc"}])
    table = pd.read_csv(path)
    assert len(table) == 2 and table.set_index("task").loc["mhist", "score"] == 0.8
    assert {"commit", "date", "device", "generator"} <= set(table)
    assert leaderboard.recorded()["published"].eq(False).all()


def test_synthetic_rows_of_another_generator_are_left_out(results):
    rows = [
        leaderboard.row_of([answered(0.9)], model, told, task)
        for model, told, task in (("a", "TCGA", "crc"), ("b", "synthetic", "crc"), ("c", "none", "tiles (synthetic)"))
    ]
    path = leaderboard.record(rows)
    assert set(leaderboard.recorded()["model"]) == {"a", "b", "c"}
    table = pd.read_csv(path, keep_default_na=False).assign(generator="1-another")
    table.to_csv(path, index=False)
    assert set(leaderboard.recorded()["model"]) == {"a"}
    table.drop(columns="part").to_csv(path, index=False)
    with pytest.raises(InputError, match="has no column 'part'"):
        leaderboard.recorded()


def test_the_sweeps_answers_are_rows_with_their_floors():
    """What is recorded in results/ today; a renewed sweep keeps these names."""
    table = leaderboard.recorded()
    if not len(table):
        pytest.skip("nothing is recorded for this generator")
    teacher = table.query("model == 'pretraining teacher' and task == 'pretraining tiles (synthetic)'").iloc[0]
    assert teacher["best_floor"] in ("colour + LBP", "random weights") and teacher["n_patients"] > 20
    assert teacher["seen"] == "no" and not teacher["floor"] and teacher["low"] < teacher["score"] < teacher["high"]
    assert "oracle" not in set(table["model"]) and not table["model"].str.contains("within").any()
    real = table[table["task"].str.endswith("real tiles")].groupby("task")["model"].agg(set)
    assert {"pretraining teacher", "random weights"} < real["pretraining real tiles"]
    assert {"methods DINO, longest", "methods DINOv2, longest", "random weights"} < real["methods real tiles"]
    assert "effective mpp, centre and slide are not known" in teacher["note"] and np.isnan(teacher["mpp"])


def test_the_command_line_and_what_it_writes(results, tmp_path, capsys):
    leaderboard.record(
        [leaderboard.row_of([answered(0.9)], "mine", "TCGA", "crc") | {"protocol": "eva-2024", "part": "val"}]
    )
    assert main(["leaderboard", "--protocol", "eva-2024", "--out", str(tmp_path / "board")]) == 0
    printed = capsys.readouterr().out
    assert "protocol eva-2024" in printed and "kaiko B/8 published" in printed and "eva-2026" not in printed
    written = {path.name for path in (tmp_path / "board").iterdir()}
    kinds = {f"eva-2024{part}.{kind}" for part in ("", "-ranks") for kind in ("csv", "tex", "svg", "png")}
    assert written == {"rows.csv", *kinds}
    tex = (tmp_path / "board" / "eva-2024.tex").read_text()
    assert r"kaiko B/8 & published & TCGA" in tex and r"mine &  & TCGA" in tex and r"0.921 $\pm$ 0.002" in tex
    own = leaderboard.recorded().iloc[0]
    assert f"{own['score']:.3f} [{own['low']:.3f}, {own['high']:.3f}]" in tex
    assert "crc: a colour histogram alone scores over 0.82" in tex.splitlines()[2] and leaderboard.CRC in printed
    numbers = pd.read_csv(tmp_path / "board" / "eva-2024.csv").set_index("model")
    assert numbers.loc["mine", ["crc val low", "crc val high"]].tolist() == [own["low"], own["high"]]
    assert numbers.loc["kaiko B/8", "pcam test spread"] == 0.002 and "pcam test low" not in numbers
    ranks = pd.read_csv(tmp_path / "board" / "eva-2024-ranks.csv")
    assert ranks["model"][0] == "UNI L/16" and {"mean_rank", "low", "high"} <= set(ranks)
    assert "critical difference" in (tmp_path / "board" / "eva-2024-ranks.tex").read_text()
    rows = pd.read_csv(tmp_path / "board" / "rows.csv")
    assert set(rows["protocol"]) == {"eva-2024"} and rows.loc[rows["published"], "source"].notna().all()
    assert main(["leaderboard", "--protocol", "eva"]) == 2
    assert main(["leaderboard"]) == 0
    assert capsys.readouterr().out.count("protocol ") == 9


def test_figures_show_every_score_once(style, results):
    leaderboard.record(
        [leaderboard.row_of([answered(0.9)], "mine", "TCGA", "crc") | {"protocol": "eva-2024", "part": "val"}]
    )
    table = leaderboard.rows("eva-2024")
    fig = board.figure(table)
    dots = [line for ax in fig.axes for line in ax.lines if line.get_marker() == "o"]
    assert len(dots) == len(table) == 61
    filled = [line for line in dots if line.get_markerfacecolor() != "white"]
    assert len(filled) == 1 and filled[0].get_xdata()[0] == pytest.approx(table.iloc[-1]["score"], abs=1e-4)
    with pytest.raises(InputError, match="no scores of 'crc tset'. Did you mean 'pcam test'|'crc val'"):
        board.figure(table, ["crc tset"])
    assert "mine (ours)" not in board.ranked(table).table.index


def test_one_task_has_no_ranks(results, tmp_path):
    rows = [leaderboard.row_of([answered(0.9, name=name)], name, "none", "mine") for name in "ab"]
    leaderboard.record(rows)
    written = {path.name for path in board.write(tmp_path / "board", "linear")}
    assert written == {"rows.csv", "linear.csv", "linear.tex", "linear.png"}


def test_a_row_has_its_scale_and_its_caveat(results):
    seen = [replace(answered(0.9), mpp=0.75)]
    leaderboard.record(
        [leaderboard.row_of(seen, "mine", "none", task) for task in ("crc", "crc (clean split)", "mhist")]
    )
    kept = leaderboard.recorded()
    assert kept["mpp"].tolist() == [0.75] * 3 and board.ours(kept)["mpp"].tolist() == [0.75] * 3
    assert kept["note"].tolist() == [f"by patient; {leaderboard.CRC}"] * 2 + ["by patient"]
    told = (
        leaderboard.published().groupby("task")["note"].agg(lambda notes: notes.str.count("colour histogram").tolist())
    )
    assert set(told["crc"]) == {1} and set(told["mhist"]) == {0}


def test_ranks_of_the_papers_table(style):
    ranks = board.ranked(leaderboard.published().query("protocol == 'eva-2024'"))
    assert ranks.table.index[0] == "UNI L/16" and ranks.table["mean_rank"].iloc[-1] == 12
    ax = panels.mean_ranks(plt.figure().subplots(), ranks)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(ranks.table.index)
