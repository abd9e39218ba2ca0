"""What an embedding holds: who is near whom, a map of it, and what single patches of a tile say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from pathfm.benchmarks import TileSet
from pathfm.errors import InputError
from pathfm.features import Features, extract
from pathfm.neighbours import nearest

UNLABELLED = "unlabelled"
MAP_NEIGHBOURS = 15  # of UMAP, its authors' default
MAP_MIN_DIST = 0.1  # of UMAP, its authors' default


@dataclass(frozen=True)
class StreamTiles(TileSet):
    """Tiles of a stream, without labels, as a TileSet; the table's column `row` points into `pixels`."""

    pixels: np.ndarray | None = None

    def image(self, row: int) -> np.ndarray:
        return self.pixels[self.table["row"].iloc[row]]


def tiles_of(stream, n: int) -> StreamTiles:
    """Tiles 0 to n - 1 of a TileStream with what the cohort knows of their slides; every label is "unlabelled"."""
    tiles = [stream[i] for i in range(n)]
    names = pd.DataFrame([tile._asdict() for tile in tiles]).drop(columns="image")
    slides = stream.slides.rename(columns={"mpp": "slide_mpp"})
    known = [c for c in ("slide_id", "slide_mpp", "patient_id", "centre", "scanner", "role") if c in slides]
    table = names.merge(slides[known], on="slide_id", how="left", validate="many_to_one")
    table = table.assign(
        row=range(n),
        file=[f"{t.slide_id}-{t.x}-{t.y}-{t.mpp:g}" for t in tiles],
        label=UNLABELLED,
        digest=[hashlib.blake2b(t.image.tobytes(), digest_size=12).hexdigest() for t in tiles],
        width_px=stream.tile_px,
        height_px=stream.tile_px,
    )
    return StreamTiles("tiles of the stream", table, pixels=np.stack([t.image for t in tiles]))


def groups(tiles: TileSet) -> dict[str, np.ndarray]:
    """class, slide and centre of every tile, those of them that take at least two values; the slide where none does."""
    columns = {"class": "label", "slide": "slide_id", "centre": "centre"}
    found = {name: tiles.table[column].to_numpy(str) for name, column in columns.items() if column in tiles.table}
    varying = {name: values for name, values in found.items() if len(np.unique(values)) > 1}
    return varying or {"slide": found.get("slide", found["class"])}


def thin(tiles: TileSet, n: int, seed: int = 0) -> TileSet:
    """At most n tiles, drawn at random by `seed` and kept in their order."""
    return tiles if len(tiles) <= n else tiles.subset(sample(len(tiles), n, seed))


def sample(total: int, n: int, seed: int = 0) -> np.ndarray:
    """n of the rows 0 to total - 1, drawn without replacement by `seed`, in their order."""
    return np.sort(np.random.default_rng(seed).choice(total, n, replace=False))


def embed(tiles: TileSet, networks: Mapping[str, tuple[nn.Module, Callable]]) -> dict[str, Features]:
    """Features of tiles by "colour + LBP", then by every network (its preprocessing beside it) by name.

    Of a network the CLS token, or the mean of the patch tokens where it has none.
    """
    found = {"colour + LBP": extract("colour+lbp", tiles)}
    for name, (network, preprocess) in networks.items():
        pool = "cls" if getattr(network, "num_prefix_tokens", 0) else "mean"
        found[name] = extract(network, tiles, preprocess, pool)
    return found


def neighbour_share(x: np.ndarray, same: dict[str, np.ndarray], k: int = 10, apart: np.ndarray | None = None):
    """One row a group: the share of each tile's k nearest (by cosine) that are of its own group, and chance.

    x       (N, D) features
    same    name -> (N,) groups, such as class, slide and centre
    apart   (N,) such as patients: neighbours of the same one do not count, neither found nor by chance

    chance is the share among all tiles that may be neighbours. A tile without any of its group among those
    is left out of both; n counts the rest.
    """
    ids, _ = nearest(x, k=k, bank_group=None if apart is None else np.unique(apart, return_inverse=True)[1])
    allowed = ~np.eye(len(x), dtype=bool) if apart is None else apart[:, None] != apart[None, :]
    rows = []
    for name, group in same.items():
        possible = (allowed & (group[:, None] == group[None, :])).sum(axis=1) / np.maximum(allowed.sum(axis=1), 1)
        hit = ((group[ids] == group[:, None]) & (ids >= 0)).sum(axis=1) / np.maximum((ids >= 0).sum(axis=1), 1)
        use = possible > 0
        share, chance = (float(v[use].mean()) if use.any() else np.nan for v in (hit, possible))
        rows.append({"same": name, "share": share, "chance": chance, "n": int(use.sum())})
    return pd.DataFrame(rows)


def retrieve(x: np.ndarray, rows, k: int = 5, patient: np.ndarray | None = None) -> np.ndarray:
    """(len(rows), k) the tiles nearest by cosine to each of `rows`, of other patients where those are known.

    -1 where fewer than k are left.
    """
    rows = np.asarray(rows)
    if patient is None:
        return nearest(x, k=k)[0][rows]
    code = np.unique(patient, return_inverse=True)[1]
    return nearest(x, x[rows], k, bank_group=code, query_group=code[rows])[0]


def examples(tiles: TileSet, n: int, seed: int = 0) -> np.ndarray:
    """Rows of n tiles to look at, of as many classes as can be; of as many slides where there are no classes."""
    table = tiles.table.reset_index(drop=True)
    column = "label" if table["label"].nunique() > 1 else "slide_id"
    shuffled = table.sample(frac=1, random_state=np.random.default_rng(seed))
    return shuffled.index[shuffled.groupby(column).cumcount().argsort(kind="stable")].to_numpy()[:n]


def umap_map(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N, 2) map of features (N, D) by UMAP on cosine distance; one thread, seeded, started from principal components.

    A picture, not a measurement: sizes of clusters and gaps between them mean little (McInnes et al. 2018).
    Raises InputError for fewer than ten tiles.
    """
    if len(x) < 10:
        raise InputError(f"a map of {len(x)} tiles shows nothing; give at least 10")
    from umap import UMAP

    neighbours = min(MAP_NEIGHBOURS, len(x) - 1)
    fitted = UMAP(
        n_neighbors=neighbours, min_dist=MAP_MIN_DIST, metric="cosine", init="pca", random_state=seed, n_jobs=1
    )
    return fitted.fit_transform(np.asarray(x, np.float32))


def token_colours(tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Red, green, blue = the first three principal components of patch tokens (B, h, w, D), 0 to 1, and their share.

    One basis for all B images, so that one colour means one thing in all of them; each component is
    scaled from its 2nd to its 98th percentile. The share is of the variance, 0 to 1.
    """
    flat = np.asarray(tokens, np.float64).reshape(-1, tokens.shape[-1])
    flat = flat - flat.mean(axis=0)
    _, sigma, axes = np.linalg.svd(flat, full_matrices=False)
    axes = axes[:3] * np.sign(axes[np.arange(3), np.abs(axes[:3]).argmax(axis=1)])[:, None]
    found = flat @ axes.T
    low, high = np.percentile(found, [2, 98], axis=0)
    colours = ((found - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colours.reshape(*tokens.shape[:3], 3), float((sigma[:3] ** 2).sum() / (sigma**2).sum())
