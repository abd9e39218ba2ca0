"""Verbs that run notebooks and sweeps, and record what they measure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from pathfm.errors import InputError
from pathfm.verbs.setting import setting


@dataclass(frozen=True)
class Run:
    """run every notebook in order, headless: executed notebooks under runs/, figures under figures/"""

    profile: str = setting("smoke", "parameter set in notebooks/profiles.yaml: smoke or demo")
    cohort: str = setting("", "a cohort.csv of your slides; the embedded synthetic cohort when empty")
    out: str = setting("", "folder of the executed notebooks; runs/<date>-<profile> when empty")

    def __call__(self) -> None:
        from pathfm.runs import run_study

        run_study(self.profile, self.cohort, self.out or None)


@dataclass(frozen=True)
class Notebook:
    """run one notebook with parameters given as JSON, refusing any that it does not declare"""

    notebook: str
    output: str
    parameters: str = setting("{}", 'as JSON, such as {"steps": 50}', positional=True)

    def __call__(self) -> None:
        from pathfm.runs import execute

        try:
            parameters = json.loads(self.parameters)
        except json.JSONDecodeError as error:
            raise InputError(f"parameters are not JSON ({error}); write them like '{{\"steps\": 50}}'") from None
        execute(self.notebook, self.output, parameters)


@dataclass(frozen=True)
class Store:
    """run notebooks at their defaults and store the outputs in place, for nbval to compare with"""

    notebook: str = setting("", "such as 03_pretraining; every notebook when left out", positional=True)

    def __call__(self) -> None:
        from pathfm.runs import notebooks_dir, store

        for name in [self.notebook] if self.notebook else sorted(notebooks_dir().glob("[0-9][0-9]_*.ipynb")):
            print(store(name))


@dataclass(frozen=True)
class Sweep:
    """run the missing points of sweeps/<name>.yaml and write results/<name>.csv, and its answers where it has some"""

    name: str
    base: str = setting("", "parameters to replace in every point, such as 'steps=10 real=tiles/oral'")
    workers: int = setting(0, "points at a time; the number of cores when 0")

    def __call__(self) -> None:
        from pathfm import answers
        from pathfm.runs import write_results
        from pathfm.study import parsed
        from pathfm.sweeps import sweep

        table = sweep(self.name, workers=self.workers or None, **parsed(self.base))
        path = write_results(self.name, table)
        print(path)
        for name, wide in table.attrs.get("answers", {}).items():
            print(answers.write_table(path.with_name(f"{self.name}_{name}.csv"), wide))


@dataclass(frozen=True)
class Instrument:
    """draw the development cohort with each seed, measure what it can show, write results/instrument.csv"""

    seeds: list[int] = field(metadata={"nargs": "+", "type": int, "help": "none that a study uses"})
    workers: int = setting(0, "processes that draw slides; the number of cores when 0")

    def __call__(self) -> None:
        from pathfm import instrument

        table = instrument.record(self.seeds, self.workers or None)
        means = table[table["centre"] == "all"].pivot(index="what", columns="seed", values="balanced_accuracy")
        print(means.round(3).to_string())
        for row in instrument.outside(table).itertuples():
            print(f"seed {row.seed}: {row.what} is {row.balanced_accuracy:.3f}, not {row.low:g} to {row.high:g}")


@dataclass(frozen=True)
class Methods:
    """DINO against DINOv2 on the cohort study: trains every arm, goes on where stopped; writes results/methods.csv"""

    seeds: list[int] = field(metadata={"nargs": "+", "type": int, "help": "of pretraining"})
    workers: int = setting(1, "runs at a time, one thread each")
    arms: str = setting("", "some, such as 'DINO; DINO, longest'; all when empty. Other rows stay as they are")
    real: str = setting("", "a folder of labelled real tiles: what probes answer there, to results/methods_real.csv")

    def __call__(self) -> None:
        from pathfm import method_study

        shown = ["arm", "seed", "when", "mpp", "new_centres", "centre_identity", "slide_dependence"]
        arms = _arms(self.arms)
        if self.real:
            print(method_study.record_real(self.real, self.seeds, arms))
        print(method_study.record(self.seeds, self.workers, arms)[shown].round(3).to_string(index=False))


def _arms(said: str) -> list[str]:
    return [arm.strip() for arm in said.split(";") if arm.strip()]


@dataclass(frozen=True)
class Domains:
    """RankMe and ODCorr of every checkpoint of `methods`, in the domain and outside; writes results/domains.csv"""

    seeds: list[int] = field(metadata={"nargs": "+", "type": int, "help": "of pretraining"})
    arms: str = setting("", "some, as in `methods`; all when empty. Other rows stay as they are")

    def __call__(self) -> None:
        from pathfm import domain_study

        shown = ["network", "seed", "steps", "mpp", "where", "n", "d", "rankme", "rankme_share", "odcorr", "score"]
        print(domain_study.record(self.seeds, _arms(self.arms))[shown].round(3).to_string(index=False))


@dataclass(frozen=True)
class Export:
    """write the teacher or student of a finished run as a folder that timm loads, with its model card"""

    run: str
    out: str
    which: str = setting("teacher", "teacher, or student from the last checkpoint")
    licence: str = setting("", "of the weights, for the card")

    def __call__(self) -> None:
        from pathfm.export import export_run

        print(export_run(self.run, self.out, self.which, self.licence))


@dataclass(frozen=True)
class SlideLabels:
    """score the synthetic slide labels B0 to B3 (coin, common, subtle, spatial); write results/bags.csv, _pairs.csv"""

    model: str = setting("", "a backbone's folder, beside colour and random weights", positional=True)
    workers: int = setting(0, "processes that draw slides; the number of cores when 0")
    heads: str = setting("", "some of abmil, mean, max and transmil; all when empty. Other rows stay as they are")
    labels: str = setting("", "some of B0 to B3, such as B1,B3; all when empty")
    runs: int = setting(0, "of each head; 20, of transmil 3, when 0")
    device: str = setting("cpu", "of networks and heads, such as cuda")

    def __call__(self) -> None:
        from pathfm import bag_study

        shown = ["label", "features", "head", "auc", "low", "high", "n_patients", "reason"]
        heads, labels = (tuple(filter(None, text.split(","))) for text in (self.heads, self.labels))
        found = bag_study.record(self.model, self.workers, heads, labels, self.runs, self.device)
        print(found[shown].round(3).to_string(index=False))
