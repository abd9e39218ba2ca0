"""Verbs for slides: get or draw them, index them, look at them, cut tiles."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field

from pathfm.errors import InputError
from pathfm.options import DRAWS, Sampling
from pathfm.verbs.setting import setting


@dataclass(frozen=True)
class MakeCohort:
    """draw a synthetic cohort (embedded, study, development, bags), or finish it; prints the path of its cohort.csv"""

    name: str
    folder: str = setting("", "where; the cache when empty")
    seed: int = setting(0, "same seed, same bytes")
    workers: int = setting(0, "processes; the number of cores when 0")

    def __call__(self) -> None:
        from pathlib import Path

        from pathfm.synthetic import make_cohort

        cohort = make_cohort(self.name, self.folder or None, seed=self.seed, workers=self.workers or None)
        print(Path(cohort.table.path.iloc[0]).parent / "cohort.csv")


@dataclass(frozen=True)
class Fetch:
    """download public slides: resumed, checked, whole or not at all; a GDC manifest also becomes <folder>/cohort.csv"""

    what: list[str] = field(
        metadata={
            "nargs": "+",
            "help": "a GDC manifest, a URL (with #md5= or #sha256= after it if known), "
            "or a name of OpenSlide's test data, such as CMU-1-Small-Region.svs",
        }
    )
    folder: str = setting("slides", "where the files go")
    parallel: int = setting(4, "files at a time")
    tries: int = setting(5, "in a row without a byte before a file is given up; waits double from 1 s")
    token_file: str = setting("", "a file with GDC's token, for controlled access only")
    sites: str = setting(
        "", "your own table of source-site codes, which name the centres in cohort.csv; GDC's if empty"
    )
    gdc_url: str = setting("https://api.gdc.cancer.gov", "GDC's API, or a mirror of it")
    testdata_url: str = setting("https://openslide.cs.cmu.edu/download/openslide-testdata", "or a mirror of it")

    def __call__(self) -> None:
        from pathlib import Path

        from pathfm import Cohort, gdc
        from pathfm.fetch import fetch, read_token

        alone = len(self.what) == 1 and Path(self.what[0]).is_file()
        if self.sites and not alone:
            raise InputError("sites are of the slides of a GDC manifest; give it alone, or leave sites out")
        if self.sites:
            gdc.source_sites(self.sites)  # what is wrong with it is said before hours of fetching
        token = read_token(self.token_file) if self.token_file else None
        for path in fetch(self.what, self.folder, self.parallel, self.tries, token, self.gdc_url, self.testdata_url):
            print(path)
        if alone:
            cohort = Cohort.from_gdc(self.what[0], self.folder, self.sites or None)
            print(cohort.write(Path(self.folder) / "cohort.csv"))


@dataclass(frozen=True)
class Index:
    """index a cohort of slides: geometry, tissue masks, what cannot be read and why"""

    cohort: str
    folder: str = setting("", "where the index is kept; the cache when empty")
    workers: int = setting(0, "processes; the number of cores when 0")
    scheduler: str = setting("", "a Dask scheduler, tcp://host:8786, whose workers do it; this machine when empty")
    checksums: bool | None = setting(
        None, "true: keep a CRC-32 of every compressed tile, so that any changed byte is named; None: as it was indexed"
    )

    def __call__(self) -> None:
        from pathfm import Cohort, SlideIndex

        cohort, folder = Cohort.read(self.cohort), self.folder or None
        index = SlideIndex.build(cohort, folder, self.workers or None, self.scheduler or None, self.checksums)
        shown = ["slide_id", "status", "reason", "width_px", "height_px", "mpp", "tissue_mm2"]
        print(index.slides[shown].round(2).to_string(index=False))
        print(index.folder)


@dataclass(frozen=True)
class Montage:
    """every slide of a cohort with its mask and artefacts, on pages <out>/montage-001.png ..., listed in index.csv"""

    cohort: str
    out: str
    sort: str = setting("suspicious", "suspicious (what stands out first) or slide_id")
    page: str = setting("a4", "a4, letter or screen")

    def __call__(self) -> None:
        from pathfm import Cohort, SlideIndex, montage

        montage.check(self.sort, self.page)
        index = SlideIndex.build(Cohort.read(self.cohort))
        print(montage.write(index, self.out, self.sort, self.page))


@dataclass(frozen=True, kw_only=True)
class Tiles(Sampling):
    """write the first tiles of a cohort's stream, or a fixed grid, as a folder of images or WebDataset shards"""

    cohort: str
    out: str
    n: int = setting(100, "tiles of a stream; a grid is written whole")
    stride_px: int = setting(0, "0: tiles of the stream; else a grid, this far apart in pixels of the tile")
    role: str = setting("", "only slides of this role, such as pretrain; all when empty")
    form: str = setting("folder", "folder of images, or shards of WebDataset")
    by: str = setting("slide_id", "column that names the folders and the tiles' labels")
    image: str = setting("png", "png (the very pixels) or jpg")
    quality: int = setting(95, "of jpg")
    per_shard: int = setting(1000, "tiles")

    def __call__(self) -> None:
        from pathfm import Cohort, SlideIndex, offline

        index = SlideIndex.build(Cohort.read(self.cohort))
        if self.role:
            index = index.subset("status == 'ok' and role == @role".replace("@role", repr(self.role)))
        source = self._grid(index) if self.stride_px else self.stream(index)
        n = None if self.stride_px else self.n
        print(offline.write(source, self.out, n, self.form, self.by, self.image, self.quality, self.per_shard))

    def _grid(self, index: typing.Any) -> typing.Any:
        from pathfm.grids import Grid

        self.refuse(DRAWS, "draws tiles and a grid has them all; leave {name} out, or stride_px")
        return Grid(index, self.tile_px, self.mpp, self.stride_px, self.min_tissue, resample=self.resample)
