"""One field of a verb: an option on its command line, with its help."""

from __future__ import annotations

import typing
from dataclasses import field


def setting(default: object, help: str, positional: bool = False) -> typing.Any:
    """A dataclass field with its one line of help; an option, or an argument that may be left out."""
    return field(default=default, metadata={"help": help, "positional": positional})
