"""One place at several mpp: tiles in a row that show the same tissue, each at a scale of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from pathfm import scales
from pathfm.errors import InputError
from pathfm.index import SlideIndex
from pathfm.stream import ENDLESS, Tile, TileName, TileStream


class Places:
    """Tiles k j to k j + k - 1 are place j at each of k mpp, the finest first; otherwise as a `TileStream`.

    index    a SlideIndex
    mpp      two values or more, as `scales.of` reads them, without weights: every place has them all
    options  of the TileStream of places

    A place is a tile of the coarsest mpp and is drawn as one: slides as said there, positions uniform over those
    admissible at that mpp. The others have its centre, to half a step of their grid, and so lie within it; no least
    share of tissue is asked of them. Slides that do not serve each mpp are left out.
    """

    def __init__(
        self,
        index: SlideIndex,
        tile_px: int = 256,
        mpp: Sequence[float] | str | scales.Values = (0.5, 1.0),
        min_tissue: float = 0.4,
        **options,
    ):
        self.law = scales.of(mpp)
        if not isinstance(self.law, scales.Values) or len(self.law.mpp) < 2 or len(set(self.law.share)) > 1:
            raise InputError(f"same_place has each place at every mpp; mpp={self.law} is no list without weights")
        self.mpp = tuple(sorted(self.law.mpp))
        whole = TileStream(
            index, tile_px, self.law, min_tissue, common_mpp=True, resample=options.get("resample", "auto")
        )
        chosen = index.subset(list(whole.slides["slide_id"]))
        options = {name: value for name, value in options.items() if name != "common_mpp"}
        self.stream = TileStream(chosen, tile_px, self.mpp[-1], min_tissue, **options)
        self.left_out = pd.concat([whole.left_out, self.stream.left_out], ignore_index=True)
        self.slides, self.tile_px, self.min_tissue = self.stream.slides, self.stream.tile_px, self.stream.min_tissue

    @property
    def weights(self) -> dict[float, float]:
        """mpp -> weight: all alike."""
        return dict.fromkeys(self.mpp, 1 / len(self.mpp))

    @property
    def mixture(self) -> pd.DataFrame:
        """mpp, declared and achieved weight, and how many slides serve it, as TileStream has it."""
        share = 1 / len(self.mpp)
        return pd.DataFrame({"mpp": self.mpp, "declared": share, "achieved": share, "slides": len(self.slides)})

    @property
    def settings(self) -> dict:
        """Those of the places, with every mpp."""
        return {**self.stream.settings, "mpp": str(self.law), "common_mpp": True, "same_place": True}

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Tile:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Tile]:
        return self.stream.tiles(self._named(numbers))

    def name(self, i: int) -> TileName:
        """What tile i is."""
        return self._named([i])[0]

    def names(self, numbers: Iterable[int]) -> pd.DataFrame:
        """One row a tile, as TileStream has them."""
        return pd.DataFrame(self._named(numbers), columns=TileName._fields)

    def _named(self, numbers: Iterable[int]) -> list[TileName]:
        numbers, k = [int(i) for i in numbers], len(self.mpp)
        if numbers and not (min(numbers) >= 0 and max(numbers) < ENDLESS):
            raise IndexError(f"tile numbers lie between 0 and {ENDLESS - 1}")
        places = {j: self.stream.placed(j, self.mpp) for j in {i // k for i in numbers}}
        return [places[i // k][i % k]._replace(i=i) for i in numbers]

    def __repr__(self) -> str:
        return f"Places({', '.join(f'{mpp:g}' for mpp in self.mpp)} um/px of {self.stream!r})"
