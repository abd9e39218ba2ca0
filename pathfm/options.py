"""How tiles are drawn, as a command line says it: `pathfm tiles` and `pathfm pretrain` have these options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pathfm.config import PretrainConfig, setting
from pathfm.errors import InputError

if TYPE_CHECKING:
    from pathfm.index import SlideIndex
    from pathfm.places import Places
    from pathfm.scales import Continuous, Values
    from pathfm.stream import TileStream

# What only a stream can do, not tiles that are there already: a grid, or tiles on the disk.
DRAWS = (
    "common_mpp", "tiles_per_slide", "balance", "slide_weights", "position_weights", "tile_filter", "context_px",
    "same_place",
)  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """What a `TileStream` is told; 0 and "" stand for its None."""

    mpp: str = setting("0.5", "microns per pixel, such as 0.25,0.5 or 0.5:1,1:3 (weights) or loguniform(0.25,2)")
    tile_px: int = setting(256, "tile side in pixels")
    min_tissue: float = setting(0.4, "least share of foreground in a tile")
    seed: int = setting(0, "another seed, other tiles; of a run also other weights and views")
    common_mpp: bool = setting(False, "only slides that serve every mpp")
    tiles_per_slide: int = setting(0, "draw among so many fixed tiles per slide; 0: no limit")
    resample: str = setting("auto", "auto, or always to filter every tile alike")
    balance: str = setting("", "columns whose classes share the tiles alike, outer to inner, such as label,patient")
    slide_weights: str = setting("", "column that weighs slides, such as tissue_mm2")
    position_weights: str = setting("", "folder of weight maps that WeightMaps.save wrote")
    tile_filter: str = setting("", "midnight: by colour")
    context_px: int = setting(0, "side of the image, the tile in its middle; 0: the tile alone")
    same_place: bool = setting(False, "each place at every mpp of the list, in as many tiles in a row")

    @classmethod
    def of(cls, config: PretrainConfig) -> Sampling:
        """As a run draws of which nothing else is said."""
        mpp = ",".join(map(repr, config.mpp))
        return cls(mpp=mpp, tile_px=config.tile_px, min_tissue=config.min_tissue, seed=config.seed)

    @property
    def law(self) -> Values | Continuous:
        """Of mpp."""
        from pathfm import scales

        return scales.of(self.mpp)

    def stream(self, index: SlideIndex, law: Values | Continuous | None = None) -> TileStream | Places:
        """The tiles of an index; `law` in place of the own one, as of what its slides serve."""
        from pathfm.places import Places
        from pathfm.stream import TileStream

        return (Places if self.same_place else TileStream)(
            index, self.tile_px, law or self.law, self.min_tissue, seed=self.seed, common_mpp=self.common_mpp,
            tiles_per_slide=self.tiles_per_slide or None, resample=self.resample, balance=self.balance,
            slide_weights=self.slide_weights or None, position_weights=self.position_weights or None,
            tile_filter=self.tile_filter or None, context_px=self.context_px or None,
        )  # fmt: skip

    def fields(self) -> dict[str, Any]:
        """What a PretrainConfig says of such tiles: every mpp or both ends of its law, the side of the whole image."""
        law = self.law
        mpp = tuple(getattr(law, "mpp", (law.low, law.high)))
        side = self.context_px or self.tile_px
        return {"mpp": mpp, "tile_px": side, "min_tissue": self.min_tissue, "seed": self.seed}

    def refuse(self, names: tuple[str, ...], why: str) -> None:
        """Raises InputError for the first of these options that is said though it cannot be heeded, with the reason."""
        for field in dataclasses.fields(Sampling):
            if field.name in names and getattr(self, field.name) != field.default:
                raise InputError(f"{field.name} {why}".replace("{name}", field.name))
