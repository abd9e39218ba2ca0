"""python -m pathfm <verb>: one dataclass is one command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import types
import typing
from dataclasses import dataclass, field

from pathfm.errors import InputError, Stopped


def setting(default: object, help: str, positional: bool = False) -> typing.Any:
    """A dataclass field with its one line of help; an option, or an argument that may be left out."""
    return field(default=default, metadata={"help": help, "positional": positional})


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
class MakeCohort:
    """draw a synthetic cohort (embedded, study, development, bags), or finish it; prints the path of its cohort.csv"""

    name: str
    folder: str = setting("", "where; the cache when empty")
    seed: int = setting(0, "same seed, same bytes")
    workers: int = setting(0, "processes; the number of cores when 0")

    def __call__(self) -> None:
        from pathlib import Path

        from pathfm.synthetic import make_cohort

        cohort = make_cohort(self.name, self.folder or None, seed=self.seed, workers=self.workers or None)
        print(Path(cohort.table.path.iloc[0]).parent / "cohort.csv")


@dataclass(frozen=True)
class Fetch:
    """download public slides: resumed, checked, whole or not at all; a GDC manifest also becomes <folder>/cohort.csv"""

    what: list[str] = field(
        metadata={
            "nargs": "+",
            "help": "a GDC manifest, a URL (with #md5= or #sha256= after it if known), "
            "or a name of OpenSlide's test data, such as CMU-1-Small-Region.svs",
        }
    )
    folder: str = setting("slides", "where the files go")
    parallel: int = setting(4, "files at a time")
    tries: int = setting(5, "in a row without a byte before a file is given up; waits double from 1 s")
    token_file: str = setting("", "a file with GDC's token, for controlled access only")
    gdc_url: str = setting("https://api.gdc.cancer.gov", "GDC's API, or a mirror of it")
    testdata_url: str = setting("https://openslide.cs.cmu.edu/download/openslide-testdata", "or a mirror of it")

    def __call__(self) -> None:
        from pathlib import Path

        from pathfm import Cohort
        from pathfm.fetch import fetch, read_token

        token = read_token(self.token_file) if self.token_file else None
        for path in fetch(self.what, self.folder, self.parallel, self.tries, token, self.gdc_url, self.testdata_url):
            print(path)
        if len(self.what) == 1 and Path(self.what[0]).is_file():
            print(Cohort.from_gdc(self.what[0], self.folder).write(Path(self.folder) / "cohort.csv"))


@dataclass(frozen=True)
class Index:
    """index a cohort of slides: geometry, tissue masks, what cannot be read and why"""

    cohort: str
    folder: str = setting("", "where the index is kept; the cache when empty")
    workers: int = setting(0, "processes; the number of cores when 0")
    scheduler: str = setting("", "a Dask scheduler, tcp://host:8786, whose workers do it; this machine when empty")

    def __call__(self) -> None:
        from pathfm import Cohort, SlideIndex

        cohort, folder = Cohort.read(self.cohort), self.folder or None
        index = SlideIndex.build(cohort, folder, self.workers or None, self.scheduler or None)
        shown = ["slide_id", "status", "reason", "width_px", "height_px", "mpp", "tissue_mm2"]
        print(index.slides[shown].round(2).to_string(index=False))
        print(index.folder)


@dataclass(frozen=True)
class Montage:
    """every slide of a cohort with its mask and artefacts, on pages <out>/montage-001.png ..., listed in index.csv"""

    cohort: str
    out: str
    sort: str = setting("suspicious", "suspicious (what stands out first) or slide_id")
    page: str = setting("a4", "a4, letter or screen")

    def __call__(self) -> None:
        from pathfm import Cohort, SlideIndex, montage

        montage.check(self.sort, self.page)
        index = SlideIndex.build(Cohort.read(self.cohort))
        print(montage.write(index, self.out, self.sort, self.page))


@dataclass(frozen=True)
class Tiles:
    """write the first tiles of a cohort's stream, or a fixed grid, as a folder of images or WebDataset shards"""

    cohort: str
    out: str
    n: int = setting(100, "tiles of a stream; a grid is written whole")
    stride_px: int = setting(0, "0: tiles of the stream; else a grid, this far apart in pixels of the tile")
    mpp: str = setting("0.5", "microns per pixel, such as 0.25,0.5 or 0.5:1,1:3 (weights) or loguniform(0.25,2)")
    tile_px: int = setting(256, "tile side in pixels")
    min_tissue: float = setting(0.4, "least share of foreground in a tile")
    seed: int = setting(0, "another seed, other tiles")
    role: str = setting("", "only slides of this role, such as pretrain; all when empty")
    common_mpp: bool = setting(False, "only slides that serve every mpp")
    tiles_per_slide: int = setting(0, "draw among so many fixed tiles per slide; 0: no limit")
    resample: str = setting("auto", "auto, or always to filter every tile alike")
    balance: str = setting("", "columns whose classes share the tiles alike, such as label,patient")
    slide_weights: str = setting("", "column that weighs slides, such as tissue_mm2")
    position_weights: str = setting("", "folder of weight maps that WeightMaps.save wrote")
    tile_filter: str = setting("", "midnight: by colour")
    context_px: int = setting(0, "side of the image, the tile in its middle; 0: the tile alone")
    form: str = setting("folder", "folder of images, or shards of WebDataset")
    by: str = setting("slide_id", "column that names the folders and the tiles' labels")
    image: str = setting("png", "png (the very pixels) or jpg")
    quality: int = setting(95, "of jpg")
    per_shard: int = setting(1000, "tiles")

    def __call__(self) -> None:
        from pathfm import Cohort, SlideIndex, offline

        index = SlideIndex.build(Cohort.read(self.cohort))
        if self.role:
            index = index.subset("status == 'ok' and role == @role".replace("@role", repr(self.role)))
        source = self._grid(index) if self.stride_px else self._stream(index)
        n = None if self.stride_px else self.n
        print(offline.write(source, self.out, n, self.form, self.by, self.image, self.quality, self.per_shard))

    def _stream(self, index: typing.Any) -> typing.Any:
        from pathfm import TileStream

        return TileStream(
            index, self.tile_px, self.mpp, self.min_tissue, self.seed, self.common_mpp,
            tiles_per_slide=self.tiles_per_slide or None, resample=self.resample, balance=self.balance,
            slide_weights=self.slide_weights or None, position_weights=self.position_weights or None,
            tile_filter=self.tile_filter or None, context_px=self.context_px or None,
        )  # fmt: skip

    def _grid(self, index: typing.Any) -> typing.Any:
        from pathfm.grids import Grid

        for name in ("balance", "slide_weights", "position_weights", "tile_filter", "tiles_per_slide", "context_px"):
            if getattr(self, name):
                raise InputError(f"{name} draws tiles and a grid has them all; leave {name} out, or stride_px")
        return Grid(index, self.tile_px, self.mpp, self.stride_px, self.min_tissue, resample=self.resample)


@dataclass(frozen=True)
class Embed:
    """write the frozen features of labelled tiles as <out>: x (N, D) float32, label and path of each"""

    model: str
    dataset: str
    out: str
    pool: str = setting("cls", "cls, mean (of the patch tokens) or both")

    def __call__(self) -> None:
        import numpy as np

        from pathfm.benchmarks import TileSet
        from pathfm.features import extract
        from pathfm.storage import atomic

        features = extract(self.model, TileSet.from_folder(self.dataset), pool=self.pool)
        table = features.table
        with atomic(self.out) as file:
            np.savez_compressed(file, x=features.x, label=table["label"].astype(str), path=table["file"].astype(str))
        print(f"{self.out}: {features.x.shape[0]} tiles, {features.x.shape[1]} features")


@dataclass(frozen=True)
class Probe:
    """score a backbone on labelled tiles beside the floors: balanced accuracy with its interval, and a verdict"""

    model: str
    dataset: str
    pool: str = setting("cls", "cls, mean (of the patch tokens) or both")
    split: str = setting("patient", "patient, tile or centre; only where the data set has no roles of its own")
    seed: int = setting(0, "of the split")

    def __call__(self) -> None:
        from pathfm import probe
        from pathfm.benchmarks import TileSet
        from pathfm.export import load
        from pathfm.features import extract

        tiles = TileSet.from_folder(self.dataset)
        if "role" not in tiles.table:
            tiles = tiles.split(self.split, seed=self.seed)
        features = extract(self.model, tiles, pool=self.pool)
        floors = probe.floor_predictions(tiles, *load(self.model))
        table = probe.scores([probe.linear(features), probe.knn(features), *floors])
        shown = ["features", "probe", "balanced_accuracy", "low", "high", "n_tiles", "n_patients", "gain", "verdict"]
        print(table[shown].round(3).to_string(index=False))


@dataclass(frozen=True)
class Tasks:
    """print the table of public tasks, or all that is known of one: files, splits, licence, overlaps, unknowns"""

    name: str = setting("", "such as bach; all of them when left out", positional=True)
    kind: str = setting("", "tiles, segmentation, slides or robustness; all when empty")

    def __call__(self) -> None:
        from pathfm import tasks

        print(tasks.about(self.name) if self.name else tasks.table(self.kind or None).to_string(index=False))


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


def pretrain(config: typing.Any, cohort: str, folder: str, tiles: str = "") -> None:
    """pretrain a backbone with DINO or DINOv2 from the slides of a cohort; continues a run that was interrupted"""
    from pathfm import Cohort, ranks, study

    run = study.pretrained(Cohort.read(cohort), config, folder=folder, offline=tiles)
    if not ranks.rank():
        print(run.teacher)


VERBS = {
    "run": Run,
    "notebook": Notebook,
    "store": Store,
    "sweep": Sweep,
    "cohort": MakeCohort,
    "fetch": Fetch,
    "index": Index,
    "montage": Montage,
    "tiles": Tiles,
    "embed": Embed,
    "probe": Probe,
    "tasks": Tasks,
    "instrument": Instrument,
}


def add_fields(parser: argparse.ArgumentParser, settings: type) -> None:
    """A field without default is an argument, one with a default an option of its own type."""
    hints = typing.get_type_hints(settings)
    for item in dataclasses.fields(settings):
        if item.default is dataclasses.MISSING:
            parser.add_argument(item.name, **item.metadata)
            continue
        if item.metadata.get("positional"):
            parser.add_argument(item.name, nargs="?", default=item.default, help=item.metadata["help"])
            continue
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            dest=item.name,
            type=_reader(hints[item.name], item.default),
            default=item.default,
            help=f"{item.metadata.get('help', '')} ({item.default!r})".replace("%", "%%").strip(),
        )


def _reader(hint: typing.Any, default: object) -> typing.Callable[[str], object]:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if bool in kinds:
        return _truth
    if tuple in kinds or any(typing.get_origin(kind) is tuple for kind in kinds):
        return lambda text: tuple(_number(part) for part in text.split(",")) if "," in text else _number(text)
    return type(default) if default is not None else str


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def command_line() -> argparse.ArgumentParser:
    """The parser of every verb. `pretrain` and the probe import torch only when they are asked for."""
    parser = argparse.ArgumentParser("pathfm", description="Pathology foundation models, and which choices matter.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for name, settings in VERBS.items():
        add_fields(verbs.add_parser(name, help=settings.__doc__, description=settings.__doc__), settings)
    verbs.add_parser("pretrain", help=pretrain.__doc__, add_help=False)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb. Bad input ends with one line on stderr and exit code 2, a signal to a run with Stopped.STATUS."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["pretrain"]:
            _pretrain(arguments[1:])
        else:
            given = vars(command_line().parse_args(arguments))
            VERBS[given.pop("verb")](**given)()
    except InputError as error:
        rank = os.environ.get("RANK", "0")  # of many processes, the others say who they are
        print(f"pathfm: {error}" if rank == "0" else f"pathfm, rank {rank}: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"pathfm: {stop}", file=sys.stderr)
        return Stopped.STATUS
    except KeyboardInterrupt:
        print("pathfm: interrupted; what is finished is kept, the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _pretrain(arguments: list[str]) -> None:
    """One command line a method: `--recipe` or `--method` first says which, and what its defaults are."""
    from pathfm.config import RECIPES, make_config, recipe

    first = argparse.ArgumentParser("pathfm pretrain", description=pretrain.__doc__)
    first.add_argument("cohort", help="a cohort.csv; slides whose role is not 'pretrain' are left out")
    first.add_argument("folder", help="the run folder, new or interrupted")
    first.add_argument("--recipe", default="", help=f"whose values are the defaults: {', '.join(RECIPES)}")
    first.add_argument("--tiles", default="", help="tiles that `pathfm tiles` wrote, in place of the slides' stream")
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--recipe", default="")
    early.add_argument("--method", default="dino")
    chosen, _ = early.parse_known_args(arguments)
    base = recipe(chosen.recipe) if chosen.recipe else make_config(method=chosen.method)
    add_fields(first, type(base))
    first.set_defaults(**dataclasses.asdict(base))
    given = vars(first.parse_args(arguments))
    cohort, folder, tiles, _ = (given.pop(name) for name in ("cohort", "folder", "tiles", "recipe"))
    pretrain(make_config(**given), cohort, folder, tiles)


if __name__ == "__main__":
    sys.exit(main())
