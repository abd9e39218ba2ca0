"""pathfm: pathology foundation models from whole-slide images, and which choices matter.

Names are imported when first used, so that `import pathfm` stays instant.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOME = {
    "Cohort": "cohort",
    "Slide": "slide",
    "SlideIndex": "index",
    "TileStream": "stream",
    "PretrainConfig": "pretrain",
    "TileSet": "benchmarks",
    "load": "export",
    "InputError": "errors",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'pathfm' has no attribute '{name}'")
    return getattr(importlib.import_module(f"pathfm.{_HOME[name]}"), name)
