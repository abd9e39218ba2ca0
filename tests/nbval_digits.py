"""A pytest plugin: nbval, for which two numbers are alike when they are one unit apart in the last digit shown.

Kinds of processors add in different orders, so that a score of 0.435 is printed as 0.44 on one machine and as 0.43 on
the next.
"""

from __future__ import annotations

import copy
import re

from nbval.plugin import IPyNbCell

NUMBER = re.compile(r"-?\d+\.\d+(?!\.?\d)")
SHOWN = "text/plain", "text/html"


def alike(one: str, other: str) -> bool:
    """Whether two outputs agree in words and whole numbers, and in decimals up to one unit of the last digit."""
    skeletons = [" ".join(NUMBER.sub("#", text).split()) for text in (one, other)]
    if skeletons[0] != skeletons[1]:
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return all(_apart(a, b) <= 1 for a, b in pairs)


def _apart(a: str, b: str) -> float:
    """In units of the last digit; infinite where they do not show as many."""
    digits = len(a.split(".")[1])
    if digits != len(b.split(".")[1]):
        return float("inf")
    return abs(round((float(a) - float(b)) * 10**digits))


def _as_stored(test: list, ref: list) -> list:
    """The new outputs, with the stored text in place of what is like it."""
    test = copy.deepcopy(test)
    for new, old in zip(test, ref, strict=False):
        pairs = [(new, old, "text")] if "text" in new and "text" in old else []
        if "data" in new and "data" in old:
            pairs = [(new["data"], old["data"], kind) for kind in SHOWN if kind in new["data"] and kind in old["data"]]
        for now, before, key in pairs:
            if isinstance(now[key], str) and isinstance(before[key], str) and alike(now[key], before[key]):
                now[key] = before[key]
    return test


_exactly = IPyNbCell.compare_outputs


def _compare(self, test, ref, skip_compare=None):
    return _exactly(self, _as_stored(test, ref), ref, skip_compare)


IPyNbCell.compare_outputs = _compare
