"""The slide labels B0 to B3 of the synthetic cohort `bags`, from frozen features: what results/bags.csv holds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from filelock import FileLock
from torch import nn

from pathfm import bags, confounding, export, roc, slide_floors, slide_probe, synthetic, vit
from pathfm.bags import Bags, Cut
from pathfm.cohort import Cohort
from pathfm.devices import kept_memory
from pathfm.errors import InputError, nearest
from pathfm.features import random_twin
from pathfm.index import SlideIndex
from pathfm.runs import read_results, stamp, write_results
from pathfm.slide_probe import Fitted, SlideProtocol
from pathfm.storage import cache_dir

LABELS = ("B0", "B1", "B2", "B3")  # a coin; common; subtle and rare; spatial
# Standardised, unlike eva's: colour and texture lie between 0 and 1, and would hardly be trained as they are.
PROTOCOL = SlideProtocol(standardise=True)
HEADS = {"abmil": 20, "mean": 20, "max": 20, "transmil": 3}  # runs; one of TransMIL takes a minute and more of a core
CUT = Cut(tile_px=224, mpp=1.0)  # some 45 tiles a slide, a few minutes of one core
FEATURES = (
    "oracle",
    "chance",
    slide_floors.BY_SIZE,
    "colour histogram",
    "colour + LBP",
    "random weights",
    "pretrained",
)
PLACE = {  # of a row in the tables
    "label": list(LABELS).index,
    "features": FEATURES.index,
    "head": [*HEADS, "alone", "latent"].index,
    "a": FEATURES.index,
    "b": FEATURES.index,
}


def sources(index: SlideIndex, model: str | Path | None = None, cut: Cut = CUT, **where) -> Iterator[Bags]:
    """Bags of colour, of colour and texture, of a ViT with random weights, and of a pretrained one where it is given.

    model  the folder of the pretrained one

    where  folder and device of `bags.extract`

    Networks are asked in bfloat16 where the neighbours of a sample of tiles stay as in float32, else in float32; what
    was found stands in the provenance. What bfloat16 does to a probe is not asked: the labels are of slides.
    """
    yield bags.extract("histogram", index, cut, name="colour histogram", **where)
    yield bags.extract("colour+lbp", index, cut, name="colour + LBP", **where)
    how = {"pool": "both", "precision": "auto", **where}
    if model is None:
        yield bags.extract(_random_vit(), index, cut, name="random weights", **how)
        return
    network, preprocess = export.load(model)
    yield bags.extract(random_twin(network), index, cut, preprocess, name="random weights", **how)
    yield bags.extract(network, index, cut, preprocess, name="pretrained", **how)


def _random_vit() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return vit.make_backbone("vit_tiny_patch16_224", "random")[0].eval()


class Measured(NamedTuple):
    """Of one label and head, or of what needs none."""

    rows: pd.DataFrame  # of results/bags.csv
    pairs: pd.DataFrame  # of results/bags_pairs.csv: every two features, `roc.pairwise`


def oracle(cohort: Cohort, label: str) -> dict[str, pd.Series]:
    """The latent that the label was drawn from, by slide_id with role test: the ceiling. The coin B0 has none."""
    if label == "B0":
        return {}
    latents = synthetic.slide_oracle(cohort, "labels")[label].to_numpy(float)
    test = (cohort.table["role"] == "test").to_numpy()
    return {"oracle": pd.Series(latents[test], cohort.table.loc[test, "slide_id"])}


def alone(slides: pd.DataFrame, label: str, said: dict[str, pd.Series]) -> pd.DataFrame:
    """A row for each of what was `said` of the test slides without a look at their tiles, and so without a head."""
    test, rows = slides[slides["role"] == "test"].set_index("slide_id"), []
    for name, score in said.items():
        told = test.loc[score.index]
        found = roc.auc(told[label].to_numpy(int) == 1, score.to_numpy(), told["patient_id"].to_numpy(str))._asdict()
        sizes = {"n_patients": told["patient_id"].nunique(), "n_slides": len(told), "n_quarantined": 0, "runs": 1}
        head = "latent" if name == "oracle" else "alone"
        row = {"label": label, "features": name, "head": head, "floor": name != "oracle", "auc": found.pop("value")}
        rows.append({**row, **found, **sizes})
    return pd.DataFrame(rows)


def measure(
    cohort: Cohort,
    found: list[Bags],
    heads: dict[str, int] = HEADS,
    labels: Sequence[str] = LABELS,
    protocol: SlideProtocol = PROTOCOL,
    device: str = "cpu",
) -> Iterator[Measured]:
    """Of each label, `alone`; then for each head a row each features, with the contrasts between them.

    heads   name -> runs
    device  of the heads

    A row has its AUC on test with the interval by patient, what the mean of a bag knows of the centre, and where it is
    no floor the gain over the floor of highest AUC. Random weights are pooled as they validate best (CLS, mean, both);
    the pretrained keep both, so that no choice favours them.
    """
    slides = found[0].slides
    for label in labels:
        floors = slide_floors.chance(slides) | slide_floors.size_alone(slides, label)
        yield Measured(alone(slides, label, oracle(cohort, label) | floors), pd.DataFrame())
        for head, runs in heads.items():
            fits, seconds = {}, []
            for one in found:
                start = time.process_time()
                choices = one.pools() if one.name == "random weights" else [one]
                fits[one.name] = slide_probe.pooled(choices, label, head, replace(protocol, runs=runs), device)
                seconds.append(round(time.process_time() - start, 1))
            measured = contrasted(fits, floors)
            yield measured._replace(rows=measured.rows.assign(seconds=seconds))


def contrasted(fits: dict[str, Fitted], floors: dict[str, pd.Series]) -> Measured:
    """The rows and pairs of one head on one label, by name of the features.

    floors  log-odds by slide_id of what needs no head
    """
    table = slide_probe.table(fits.values()).assign(features=list(fits))
    table["pool"] = [fit.bags.provenance.get("pool", "") for fit in fits.values()]
    table["floor"] = table["features"] != "pretrained"
    told = [confounding.of_slides(fit.bags, fit.label) for fit in fits.values()]
    table[list(confounding.COLUMNS)] = [[one[name] for name in confounding.COLUMNS] for one in told]
    first = next(iter(fits.values()))
    truth, _, who = slide_probe.asked([first])
    scores = {name: slide_probe.asked([fit])[1] for name, fit in fits.items()}
    if "pretrained" in scores:
        names = first.bags.slides.loc[first.bags.slides["role"] == "test", "slide_id"]
        every = {name: said.loc[names].to_numpy() for name, said in floors.items()} | scores
        areas = {name: roc.auc(truth, score, who).value for name, score in every.items() if name != "pretrained"}
        best = max(areas, key=areas.get)
        gain = roc.paired(truth, every["pretrained"], every[best], who)
        row = table["features"] == "pretrained"
        given = ["best_floor", "gain", "gain_low", "gain_high", "verdict"]
        table.loc[row, given] = [best, gain.value, gain.low, gain.high, gain.verdict]
    pairs = roc.pairwise(truth, scores, who).assign(label=first.label, head=first.head) if len(fits) > 1 else None
    return Measured(table, pd.DataFrame() if pairs is None else pairs)


def record(
    model: str = "",
    workers: int = 0,
    heads: Sequence[str] = (),
    labels: Sequence[str] = (),
    runs: int = 0,
    device: str = "cpu",
) -> pd.DataFrame:
    """Draws the cohort where it is not there, embeds it, trains heads of HEADS, and writes results/bags.csv.

    heads, labels  of HEADS and LABELS; all where empty
    runs           of each head; those of HEADS where 0

    Each row replaces its forerunner as soon as it is known; what is not asked for stays as it was recorded.
    """
    for names, known in ((heads, HEADS), (labels, LABELS)):
        if strange := [name for name in names if name not in known]:
            raise InputError(f"no head or label '{strange[0]}'.{nearest(strange[0], known)}")
    torch.set_num_threads(1)
    cohort = synthetic.make_cohort("bags", workers=workers or None)
    index = SlideIndex.build(cohort)
    found = list(sources(index, model or None, device=device))
    asked = {head: runs or HEADS[head] for head in heads or HEADS}
    with kept_memory(torch.device(device)):
        for rows, pairs in measure(cohort, found, asked, labels or LABELS, device=device):
            table = keep("bags", rows.assign(**stamp()), ["label", "features", "head"])
            if len(pairs):
                keep("bags_pairs", pairs.assign(**stamp()), ["label", "head", "a", "b"])
    return table


def keep(name: str, rows: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """results/<name>.csv with these rows, also where others are writing to it; rows of another generator go.

    key  columns that name a row: the last of one name stays
    """
    with FileLock(cache_dir() / "bags.lock"):
        table = pd.concat([read_results(name)[0], rows], ignore_index=True).drop_duplicates(key, keep="last")
        table = table[[*key, *table.columns.drop(key)]]
        table = table.sort_values(list(key), key=lambda column: column.map(PLACE[column.name]), ignore_index=True)
        write_results(name, table)
    return table


def by_head(table: pd.DataFrame) -> pd.DataFrame:
    """AUC with its interval as text: a row a label and features, a column a head and its runs, oracle last."""
    shown = [f"{row.auc:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in table.itertuples()]
    runs = [f"{row.runs} run{'s' * (row.runs > 1)}" for row in table.itertuples()]
    heads = [f"{head}, {n}" if head in HEADS else head for head, n in zip(table["head"], runs, strict=True)]
    wide = table.assign(shown=shown, trained=heads).pivot(
        index=["label", "features"], columns="trained", values="shown"
    )
    return wide[sorted(dict.fromkeys(heads), key=lambda name: PLACE["head"](name.split(",")[0]))].fillna("")


def beside(table: pd.DataFrame) -> pd.DataFrame:
    """Of the rows whose centres were asked, what stands beside the AUC: scale, centre, the gain over the best floor."""
    shown = ["features", "pool", "auc", "mpp", "robustness_index", "centre_identity", "best_floor"]
    known = table.dropna(subset="centre_identity").set_index(["label", "head"])
    return known[[*shown, "gain", "gain_low", "gain_high", "verdict"]].round(2).astype(object).fillna("")


def pairs(label: str) -> pd.DataFrame:
    """The recorded contrasts of one label, every two features of a head, from results/bags_pairs.csv."""
    shown = ["label", "head", "a", "b", "difference", "low", "high", "p", "p_holm", "verdict"]
    table, _ = read_results("bags_pairs")
    return table.loc[table["label"] == label, shown].round(2) if len(table) else table
