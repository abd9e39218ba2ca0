"""What a run takes from a stream of tiles: a rank's share of each batch, and what is known of the stream beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from pathfm import card, ranks, stores
from pathfm.cohort import patient_of
from pathfm.config import PretrainConfig
from pathfm.errors import InputError
from pathfm.signals import deaf


def batches(stream: Any, config: PretrainConfig, step: int, pin: bool = False) -> DataLoader:
    """This rank's batches of the steps from `step` on, in order, whatever the number of workers.

    Step s has the tiles s B to (s + 1) B - 1; rank r of R has the r-th B / R of them.
    """
    size = config.batch_size // ranks.size()
    starts = [s * config.batch_size + ranks.rank() * size for s in range(step, config.steps)]
    return DataLoader(
        stream,
        batch_sampler=[range(start, start + size) for start in starts],
        num_workers=config.workers,
        multiprocessing_context="forkserver" if config.workers and _far(stream) else None,
        worker_init_fn=deaf,
        pin_memory=pin,
    )


@contextlib.contextmanager
def feeding(loader: DataLoader) -> Iterator[Iterator]:
    """The batches of `loader`, whose workers have left at the end of the block, however it ends.

    Python would end them by SIGTERM, to which they are deaf, and wait for them for ever.
    """
    feed = iter(loader)
    try:
        yield feed
    finally:
        if loader.num_workers:
            feed._shutdown_workers()


def first_tiles(stream: Any, n: int = 8) -> list[list]:
    """Names of the first tiles, by which a stream is known again: slide_id, x, y, mpp."""
    tiles = [stream.name(i) if hasattr(stream, "name") else stream[i] for i in range(min(n, len(stream)))]
    return [[str(tile.slide_id), int(tile.x), int(tile.y), f"{tile.mpp:.6g}"] for tile in tiles]


def check_stream(config: PretrainConfig, stream: Any) -> None:
    """Raises InputError where the stream is too short or its tiles are not those that the config speaks of."""
    if len(stream) < config.steps * config.batch_size:
        least = "a batch" if len(stream) < config.batch_size else f"{config.steps} steps"
        raise InputError(
            f"the stream has {len(stream)} tiles, fewer than {least} of batch_size={config.batch_size} "
            "needs; add slides, or take a smaller batch or fewer steps"
        )
    side = np.shape(stream[0].image)[0]
    if side != config.tile_px:
        raise InputError(f"the stream's tiles are {side} px, but tile_px={config.tile_px}; make them agree")
    foreign = sorted(set(getattr(stream, "weights", ())) - set(config.mpp))
    if foreign:
        raise InputError(f"the stream has tiles at {foreign[0]:g} mpp, but mpp={config.mpp}; make them agree")
    law = getattr(stream, "law", None)
    if hasattr(law, "cdf") and not (min(config.mpp) <= law.low and law.high <= max(config.mpp)):
        raise InputError(f"the stream's mpp is {law}, beyond mpp={config.mpp}; give both ends of it in mpp")
    least = getattr(stream, "min_tissue", None)
    if least is not None and least != config.min_tissue:
        raise InputError(f"the stream's min_tissue is {least}, but min_tissue={config.min_tissue}; make them agree")


def check_sides(stream: Any, validation: Any) -> None:
    """Raises InputError that names a patient whose slides train the model and whose tiles are to watch it."""
    watched = validation.table if hasattr(validation, "table") else getattr(validation, "slides", None)
    if watched is None or not hasattr(stream, "slides") or not {"slide_id", "patient_id"} & set(watched):
        return
    if hasattr(validation, "table") and "role" in watched:
        watched = watched[watched["role"] == "validate"]
    names = patient_of(watched) if "slide_id" in watched else watched["patient_id"].astype(str)
    both = sorted(set(patient_of(stream.slides)) & set(names))
    if both:
        raise InputError(f"patient '{both[0]}' is both in the pretraining stream and watched; split by patient first")


def told_of(stream: Any) -> dict[str, Any]:
    """What a record says of a stream."""
    told = {"stream": type(stream).__name__}
    if hasattr(stream, "slides"):
        slides = stream.slides
        told |= {"settings": repr(stream), "slides": len(slides), "patients": patient_of(slides).nunique()}
        told |= {"centres": sorted(map(str, slides["centre"].unique()))} if "centre" in slides else {}
        told |= {"tissue": card.tissue_of(slides)}
    if hasattr(stream, "mixture"):
        told |= {"mixture": stream.mixture.round(4).to_dict("records")}
    if hasattr(stream, "settings"):
        told |= {"options": stream.settings}
    return told


def _far(stream: Any) -> bool:
    """Whether a stream's slides lie in a store: then a forked worker could not read them (`stores.same_process`)."""
    slides = getattr(stream, "slides", None)
    return slides is not None and any(stores.is_address(path) for path in slides.get("path", ()))
