"""python -m pathfm <verb>: reads the command line of one verb of `pathfm.verbs` and runs it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import types
import typing

from pathfm.errors import InputError, Stopped, nearest
from pathfm.options import Sampling
from pathfm.verbs import VERBS


def pretrain(config: typing.Any, cohort: str, folder: str, tiles: str = "", sampling: Sampling | None = None) -> None:
    """pretrain a backbone with DINO or DINOv2 from the slides of a cohort; continues a run that was interrupted"""
    from pathfm import Cohort, ranks, study

    run = study.pretrained(Cohort.read(cohort), config, folder=folder, offline=tiles, sampling=sampling)
    if not ranks.rank():
        print(run.teacher)


def add_fields(parser: argparse.ArgumentParser, settings: type, but: typing.Collection[str] = ()) -> None:
    """A field without default is an argument, one with a default an option of its own type; `but` these."""
    hints = typing.get_type_hints(settings)
    for item in dataclasses.fields(settings):
        if item.name in but:
            continue
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
    drawn = [item.name for item in dataclasses.fields(Sampling)]
    add_fields(first, type(base), but=drawn)
    add_fields(first.add_argument_group("tiles", Sampling.__doc__), Sampling)
    first.set_defaults(**{**dataclasses.asdict(base), **dataclasses.asdict(Sampling.of(base))})
    read, unknown = first.parse_known_args(arguments)
    if unknown:
        known = [option for action in first._actions for option in action.option_strings]
        raise InputError(f"pretrain has no '{unknown[0]}'.{nearest(unknown[0], known)}")
    given = vars(read)
    cohort, folder, tiles, _ = (given.pop(name) for name in ("cohort", "folder", "tiles", "recipe"))
    sampling = Sampling(**{name: given.pop(name) for name in drawn})
    pretrain(make_config(**given, **sampling.fields()), cohort, folder, tiles, sampling)


if __name__ == "__main__":
    sys.exit(main())
