"""The study's shared products, each made once and cached, so that every notebook runs alone and in any order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock

from pathfm import answers, ranks, scales, scores
from pathfm.benchmarks import TileSet
from pathfm.cohort import Cohort
from pathfm.config import PretrainConfig
from pathfm.config import recipe as of_recipe
from pathfm.errors import InputError, nearest
from pathfm.index import SlideIndex
from pathfm.offline import OfflineTiles
from pathfm.options import DRAWS, Sampling
from pathfm.places import Places
from pathfm.pretrain import Run, pretrain
from pathfm.procedural import DeadLeaves
from pathfm.runs import code_hash, read_results, results_dir
from pathfm.scores import Prediction
from pathfm.storage import cache_dir
from pathfm.stream import TileStream
from pathfm.synthetic import cohorts, embedded, labelled_tiles, make_cohort
from pathfm.synthetic.cohorts import DESIGNS
from pathfm.synthetic.slides import sidecar

NON_HISTOLOGY = "non-histology"


def cohort(name: str = "") -> Cohort:
    """The slides of a cohort.csv, or of a synthetic cohort, drawn where it is missing; the embedded one where empty.

    A synthetic cohort is named as in DESIGNS, with a seed where it is not 0: "study", "development:11".
    """
    if not name:
        return embedded()
    design, _, seed = name.partition(":")
    if design in DESIGNS and (seed.isdigit() or name == design):
        return make_cohort(design, seed=int(seed or 0))
    if Path(name).suffix != ".csv":
        raise InputError(f"cohort='{name}' is neither a .csv nor a synthetic cohort.{nearest(design, DESIGNS)}")
    return Cohort.read(name)


def index(slides: Cohort) -> SlideIndex:
    """The index of a cohort, built where it is missing."""
    return SlideIndex.build(slides)


def is_synthetic(slides: Cohort) -> bool:
    """Whether the slides were drawn here, with ground truth beside them."""
    return all(sidecar(path, ".truth.npz").is_file() for path in slides.table["path"])


def of_role(slides: SlideIndex, role: str) -> SlideIndex | None:
    """The usable slides of one role. Without a column `role` all of them pretrain and none has another role."""
    if "role" not in slides.slides:
        return slides if role == "pretrain" else None
    chosen = slides.usable.query("role == @role")["slide_id"]
    return slides.subset(list(chosen)) if len(chosen) else None


def stream(
    slides: SlideIndex, config: PretrainConfig, common: str = "", sampling: Sampling | None = None
) -> TileStream | Places:
    """The tiles of a pretraining run: from slides whose role is pretrain, at every mpp of `config` that one can serve.

    common    keeps only slides that serve each of these mpp, such as "0.5,1,2", whether this run draws them or not:
              the arms of an ablation on magnification then see the same slides
    sampling  how they are drawn, where more is said of it than `config` does (`Sampling.fields` are the config's)

    Says which mpp no slide serves, and that a cohort without roles pretrains on all of its slides.
    """
    chosen, sampling = of_role(slides, "pretrain"), sampling or Sampling.of(config)
    if chosen is None:
        raise InputError("the cohort has no usable slide of role 'pretrain'; give some that role, or no column role")
    if "role" not in slides.slides:
        print("The cohort has no column 'role': all of its slides pretrain, none validates or tests.")
    law = _served(chosen, sampling)
    if common:
        serving = TileStream(chosen, sampling.tile_px, mpp_list(common), sampling.min_tissue, common_mpp=True)
        chosen = chosen.subset(list(serving.slides["slide_id"]))
    return sampling.stream(chosen, law)


def _served(slides: SlideIndex, sampling: Sampling) -> scales.Values | scales.Continuous:
    """The law of mpp, without the values that no slide serves, which are said; with common_mpp or
    same_place all are asked for."""
    law = sampling.law
    if isinstance(law, scales.Continuous) or sampling.common_mpp or sampling.same_place:
        return law
    left = servable(slides, sampling)
    for missing in sorted(set(law.mpp) - set(left)):
        print(f"No slide serves {missing:g} mpp; it is left out.")
    if not left:
        raise InputError(
            f"no slide serves any of {', '.join(f'{m:g}' for m in law.mpp)} mpp with {sampling.tile_px} px tiles "
            f"of {sampling.min_tissue:.0%} tissue; ask for an mpp between the slides' own and their size"
        )
    weights = dict(zip(law.mpp, law.share, strict=True))
    return law if len(left) == len(weights) else scales.of({mpp: weights[mpp] for mpp in left})


def servable(slides: SlideIndex, config: PretrainConfig | Sampling) -> tuple[float, ...]:
    """Those mpp of `config`, or of how tiles are drawn, at which at least one slide has an admissible tile."""
    try:
        mixture = TileStream(slides, config.tile_px, config.mpp, config.min_tissue).mixture
    except InputError:
        return ()
    return tuple(mixture.loc[mixture["slides"] > 0, "mpp"])


def tiles(slides: Cohort, dataset: str = "") -> TileSet:
    """Labelled tiles to probe with: a folder per class, or those cut from the cohort's own ground truth.

    A cohort without ground truth borrows the embedded cohort's tiles, and that is said.
    """
    if dataset:
        return TileSet.from_folder(dataset)
    if not is_synthetic(slides) or "role" not in slides.table:
        print("The cohort has no labelled tiles; the embedded synthetic cohort's are used. Give yours as `dataset`.")
        slides = embedded()
    per_class = 6 if len(slides.table) <= 60 else 3  # of a slide: some thousand tiles in all
    return _read(labelled_tiles(slides, per_class=per_class), f"{slides.name} tiles (synthetic)")


def new_centres(slides: Cohort) -> list[str]:
    """The centres of which no slide pretrains; none where the cohort has no roles or no centres."""
    if not {"role", "centre"} <= set(slides.table):
        return []
    seen = slides.table.loc[slides.table["role"] == "pretrain", "centre"]
    return sorted(set(slides.table["centre"].astype(str)) - set(seen.astype(str)))


@functools.cache
def _read(folder, name: str) -> TileSet:
    # Every image is decoded to check it: once a process is enough for tiles that we cut ourselves.
    return TileSet.from_folder(folder, name=name)


def config(
    recipe: str = "smoke", settings: str = "", mpp: str | tuple = "", steps: int = 0, **fields
) -> PretrainConfig:
    """A recipe of `config.RECIPES` with `fields` replaced.

    settings    fields as text, such as "koleo=0 local_views=2 global_scale=0.3,1"
    mpp, steps  the recipe's own where empty or 0; mpp may be text such as "0.5,1"
    """
    if mpp:
        fields["mpp"] = mpp_list(mpp) if isinstance(mpp, str) else mpp
    if steps:
        fields["steps"] = steps
    return of_recipe(recipe, **{**fields, **parsed(settings)})


def parsed(text: str) -> dict:
    """ "koleo=0 mpp=0.5,1" -> {"koleo": 0, "mpp": [0.5, 1]}. Raises InputError for a part that is no name=value."""
    found = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"settings='{text}': '{part}' is no name=value; write them like 'koleo=0.1 steps=20'")
        values = [_value(one) for one in value.split(",")]
        found[name] = values if len(values) > 1 else values[0]
    return found


def _value(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False}.get(text, text)


def mpp_list(text: str) -> tuple[float, ...]:
    """ "0.5,1" -> (0.5, 1.0). Raises InputError for anything but positive numbers."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) <= 0:
        raise InputError(f"mpp='{text}' is no list of microns per pixel; write it like '0.25,0.5,1,2'")
    return values


def pretrained(
    slides: Cohort,
    settings: PretrainConfig | None = None,
    common: str = "",
    folder: str = "",
    offline: str | Path = "",
    sampling: Sampling | None = None,
    **fields,
) -> Run:
    """The run of a configuration on a cohort, trained where the cache does not hold it, with watches where it can.

    settings    the smoke configuration where None, with `fields` replaced
    common, sampling  as in `stream`
    folder      of the run; the cache, by configuration and tiles, where empty
    offline     tiles that `pathfm tiles` wrote, in place of the cohort's stream; the cohort is still what is watched
    """
    settings = settings or config(**fields)
    if settings.init == NON_HISTOLOGY:
        settings = settings.replace(init=str(non_histology(settings).teacher))
    if offline and sampling:
        sampling.refuse((*DRAWS, "resample"), "draws tiles, and those in tiles are there; leave {name} out, or tiles")
    source = OfflineTiles(offline, seed=settings.seed) if offline else stream(index(slides), settings, common, sampling)
    return _once(settings, source, watched(slides, settings) if settings.watch_every else None, folder)


def finished(folder: str | Path) -> Run:
    """The run in a folder. Raises InputError where none was finished there."""
    if not (Path(folder) / "teacher" / "config.json").is_file():
        raise InputError(f"{folder} holds no finished run; give the folder that `pathfm pretrain` wrote to")
    return Run(Path(folder))


def _once(settings: PretrainConfig, source, watch=None, folder: str | Path = "") -> Run:
    """`pretrain`; of two notebooks that want the same cached run, one trains and the other waits for it."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache_dir() / "pretrain.lock")
    shared = not folder or Path(folder).parent == cache_dir()
    with lock if shared and not ranks.rank() else contextlib.nullcontext():  # rank 0 waits for all of a run's ranks
        return pretrain(settings, source, watch, folder or None)


def watched(slides: Cohort, settings: PretrainConfig):
    """What a run may look at while it trains: labelled tiles, else tiles of role validate, else nothing (and says so).

    Never test tiles, nor tiles of a centre that tests what it is to be new: a watch selects. Of a stream there are
    watch_tiles at the finest and as many at the coarsest mpp; of labelled tiles as many as there are.
    """
    if is_synthetic(slides) and {"validate", "probe-train"} <= set(slides.table.get("role", ())):
        return tiles(slides)
    chosen = of_role(index(slides), "validate")
    fresh = new_centres(slides)
    if chosen is not None and fresh:
        held = set(slides.table.loc[slides.table["role"] == "test", "centre"].dropna().astype(str)) & set(fresh)
        left = chosen.slides.loc[~chosen.slides["centre"].astype(str).isin(held), "slide_id"]
        if len(left) < len(chosen.slides):
            print(f"{len(chosen.slides) - len(left)} slides validate in centres that only test; they are not watched.")
        chosen = chosen.subset(list(left)) if len(left) else None
    if chosen is None or not servable(chosen, settings):
        print("No labelled tiles and no slides of role 'validate': the run is not watched on validation tiles.")
        return None
    return TileStream(chosen, settings.tile_px, servable(chosen, settings), settings.min_tissue, settings.seed + 1)


def non_histology(settings: PretrainConfig, folder: str | Path = "") -> Run:
    """The same network trained by the same method on procedural images that are no tissue: never called ImageNet.

    folder   of the run; one of the cache, by configuration and code, where empty
    """
    settings = settings.replace(init="random", watch_every=0)
    mark = hashlib.sha256(json.dumps([dataclasses.asdict(settings), code_hash()]).encode()).hexdigest()[:12]
    # The folder's name is what the record of a run that starts here will say.
    folder = folder or cache_dir() / f"non-histology-{mark}"
    return _once(settings, DeadLeaves(settings.tile_px, settings.seed), folder=folder)


def curve(run: Run) -> pd.DataFrame:
    """The log of a run as a notebook shows it: five rows from first to last step, rounded."""
    log = run.log
    rows = np.unique(np.linspace(0, len(log) - 1, 5).round().astype(int))
    shown = log.iloc[rows].set_index("step")
    decimals = {"loss": 2, "teacher_entropy": 2, "prototype_entropy": 2, "lr": 5, "momentum": 3}
    return shown[list(decimals)].round(decimals)


def servable_grid(slides: Cohort, spec: dict) -> dict[str, list]:
    """The grid of a sweep without the mpp that the cohort cannot serve; says what is left out."""
    grid = dict(spec["grid"])
    pretraining = of_role(index(slides), "pretrain")
    asked = sorted({mpp for mixture in grid["mpp"] for mpp in mpp_list(mixture)})
    there = servable(pretraining, config(mpp=tuple(asked)))
    for missing in sorted(set(asked) - set(there)):
        print(f"No slide serves {missing:g} mpp; it is left out.")
    kept = [",".join(f"{m:g}" for m in mpp_list(mixture) if m in there) for mixture in grid["mpp"]]
    return {**grid, "mpp": [mixture for mixture in dict.fromkeys(kept) if mixture]}


def recorded_answers(name: str, which: str = "answers") -> dict[str, list[Prediction]]:
    """What the probes of a recorded sweep answered, by features, a seed each; empty where results are not current.

    which  of `pathfm.sweeps.ANSWERS`, or "arms" or "real" of `pathfm.method_study`
    """
    path = results_dir() / f"{name}_{which}.csv"
    if not path.is_file() or not len(recorded(name)):
        return {}
    return answers.read(pd.read_csv(path, dtype=str))


def on_centres(said: dict[str, list[Prediction]], new: bool = True, name: str = "study") -> dict[str, list[Prediction]]:
    """The answers of `recorded_answers` on the test tiles of centres without any pretraining slide, or of the others.

    name  of the synthetic cohort that they were recorded on; no slide of it needs to be drawn
    """
    design = Cohort(cohorts.table(cohorts.specs(name)), name)
    fresh = new_centres(design)
    wanted = fresh if new else sorted(set(design.table["centre"].astype(str)) - set(fresh))
    return {features: scores.of_centres(several, wanted) for features, several in said.items()}


def recorded(name: str) -> pd.DataFrame:
    """results/<name>.csv without the rows of another generator, whose slides were others; says what it refuses."""
    table, refused = read_results(name)
    again = f"`make sweep NAME={name}` runs and records it"
    if refused:
        total = refused + len(table)
        print(f"{refused} of {total} rows were recorded on another generator and are refused; {again}.")
    elif table.empty:
        print(f"Nothing is recorded yet: {again}.")
    return table
