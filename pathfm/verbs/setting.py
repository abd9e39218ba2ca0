"""One field of a verb: an option on its command line, with its help."""

from __future__ import annotations

import typing
from dataclasses import field

from pathfm.errors import InputError


def setting(default: object, help: str, positional: bool = False) -> typing.Any:
    """A dataclass field with its one line of help; an option, or an argument that may be left out."""
    return field(default=default, metadata={"help": help, "positional": positional})


def of_input(verb: typing.Any) -> dict[str, typing.Any]:
    """mean, std and input_px of a verb as `backbones.load` takes them: what is said in place of the backbone's own."""
    said = {name: getattr(verb, name) for name in ("mean", "std")}
    return {name: None if value < 0 else value for name, value in said.items()} | {"input_px": verb.input_px}


def numbers(name: str, said: str) -> tuple[float, ...]:
    """ "1e-4,3e-4" as numbers above 0; "" as none. Raises InputError, naming the option, for anything else."""
    try:
        found = tuple(float(part) for part in said.split(",") if said)
    except ValueError:
        found = (0.0,)
    if any(not 0 < value < float("inf") for value in found):
        raise InputError(f"{name} are numbers above 0 with commas between them, such as 1e-4,3e-4, not '{said}'")
    return found
