"""The one exception for bad input: a message that names the thing and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A file, parameter or table from outside cannot be used. The message is all a user needs to mend it."""


class Stopped(Exception):
    """A run was told to stop by a signal; it is saved, and the same call goes on from there."""

    STATUS = 75  # of a process that leaves so: EX_TEMPFAIL, "try again later"


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint to append to an InputError about an unknown `name`: the closest choice, and all of them."""
    known = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(known)}."
