"""Synthetic H&E-like slides with ground truth: an instrument whose every effect is known. Called synthetic wherever
its results appear.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from pathfm.synthetic.appearance import Knobs
from pathfm.synthetic.cohorts import embedded, make_cohort, tiny_cohort
from pathfm.synthetic.morphometry import contact_sheet, morphometry
from pathfm.synthetic.oracles import slide_oracle, tile_oracle
from pathfm.synthetic.painters import CLASSES
from pathfm.synthetic.slides import render
from pathfm.synthetic.tiles import labelled_tiles
from pathfm.synthetic.truth import Truth

GENERATOR_VERSION = "2"

__all__ = [
    "CLASSES",
    "GENERATOR_VERSION",
    "Knobs",
    "Truth",
    "contact_sheet",
    "embedded",
    "generator_hash",
    "labelled_tiles",
    "make_cohort",
    "morphometry",
    "render",
    "slide_oracle",
    "tile_oracle",
    "tiny_cohort",
]


@functools.cache
def generator_hash() -> str:
    """Ten hex digits of the generator's version and sources: slides of different generators are never mixed.

    What only measures slides decides no pixel and stays out.
    """
    digest = hashlib.sha256(GENERATOR_VERSION.encode())
    root = Path(__file__).parent
    for source in sorted(root.rglob("*.py")):
        if source.name in ("morphometry.py", "oracles.py"):
            continue
        digest.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:10]
