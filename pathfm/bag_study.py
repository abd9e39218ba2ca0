"""The slide labels B0 to B3 of the synthetic cohort `bags`, from frozen features: what results/bags.csv holds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from torch import nn

from pathfm import bags, export, slide_probe, synthetic, vit
from pathfm.bags import Bags, Cut
from pathfm.cohort import Cohort
from pathfm.devices import kept_memory
from pathfm.errors import InputError, nearest
from pathfm.features import random_twin
from pathfm.index import SlideIndex
from pathfm.runs import read_results, stamp, write_results
from pathfm.slide_probe import SlideProtocol
from pathfm.storage import cache_dir

LABELS = ("B0", "B1", "B2", "B3")  # a coin; common; subtle and rare; spatial
# Standardised, unlike eva's: colour and texture lie between 0 and 1, and would hardly be trained as they are.
PROTOCOL = SlideProtocol(standardise=True)
HEADS = {"abmil": 20, "mean": 20, "max": 20, "transmil": 3}  # runs; one of TransMIL takes a minute and more of a core
CUT = Cut(tile_px=224, mpp=1.0)  # some 45 tiles a slide, a few minutes of one core


def sources(index: SlideIndex, model: str | Path | None = None, cut: Cut = CUT, **where) -> Iterator[Bags]:
    """Bags of colour and texture, of a ViT with random weights, and of a pretrained one where its folder is given.

    where  folder and device of `bags.extract`

    Networks are asked in bfloat16 where the neighbours of a sample of tiles stay as in float32, else in float32; what
    was found stands in the provenance. What bfloat16 does to a probe is not asked: the labels are of slides.
    """
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


def oracle(cohort: Cohort, label: str) -> dict:
    """The AUC of the latent that the label was drawn from: the ceiling. The coin B0 has none."""
    latents = synthetic.slide_oracle(cohort, "labels")
    test = (cohort.table["role"] == "test").to_numpy()
    truth = cohort.table[label].to_numpy(int)[test] == 1
    score = latents[label].to_numpy(float)[test]
    who = cohort.table["patient_id"].to_numpy(str)[test]
    found = slide_probe.auc(truth, score, who)._asdict()
    found = {"auc": found.pop("value"), **found}
    told = {"n_patients": len(set(who)), "n_slides": len(who), "n_quarantined": 0, "runs": 1}
    return {"label": label, "features": "oracle", "head": "latent", **found, **told}


def measure(
    cohort: Cohort,
    found: list[Bags],
    heads: dict[str, int] = HEADS,
    labels: Sequence[str] = LABELS,
    protocol: SlideProtocol = PROTOCOL,
    device: str = "cpu",
) -> Iterator[pd.DataFrame]:
    """A table of one row for each label, features and head: AUC on test with its interval by patient; and the oracle's.

    heads   name -> runs
    device  of the heads
    """
    for label in labels:
        if label != "B0":
            yield pd.DataFrame([oracle(cohort, label)])
        for one, (head, runs) in itertools.product(found, heads.items()):
            start = time.process_time()
            row = slide_probe.table([slide_probe.fit(one, label, head, replace(protocol, runs=runs), device)])
            yield row.assign(seconds=round(time.process_time() - start, 1))


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
        for row in measure(cohort, found, asked, labels or LABELS, device=device):
            table = keep(row.assign(**stamp()))
    return table


def keep(row: pd.DataFrame) -> pd.DataFrame:
    """results/bags.csv with this row, also where others are writing to it; rows of another generator go."""
    with FileLock(cache_dir() / "bags.lock"):
        table = pd.concat([read_results("bags")[0], row], ignore_index=True)
        table = table.drop_duplicates(["label", "features", "head"], keep="last")
        order = {name: place for place, name in enumerate(("oracle", "colour + LBP", "random weights", "pretrained"))}
        keys = {"label": list(LABELS).index, "features": order.get, "head": ["latent", *HEADS].index}
        table = table.sort_values(list(keys), key=lambda column: column.map(keys[column.name]), ignore_index=True)
        write_results("bags", table)
    return table


def by_head(table: pd.DataFrame) -> pd.DataFrame:
    """AUC with its interval as text: a row a label and features, a column a head and its runs, oracle last."""
    shown = [f"{row.auc:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in table.itertuples()]
    heads = [f"{row.head}, {row.runs} run{'s' * (row.runs > 1)}" for row in table.itertuples()]
    wide = table.assign(shown=shown, trained=heads).pivot(
        index=["label", "features"], columns="trained", values="shown"
    )
    return wide[sorted(dict.fromkeys(heads), key=lambda name: "latent" in name)].fillna("")
