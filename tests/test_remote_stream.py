"""A cohort on a web server gives the tiles that the same files give from a disk, and names what is wrong with one."""

import os
import shutil

import numpy as np
import pytest
from servers import nginx
from slide_files import cohort_of

from pathfm import InputError, SlideIndex, TileStream
from pathfm.source import traffic


@pytest.fixture(scope="module")
def served(cohort, tmp_path_factory):
    """(folder, address): the tiny cohort's files on a server."""
    folder = tmp_path_factory.mktemp("served")
    for row in cohort:
        shutil.copy(row.path, folder / f"{row.slide_id}.svs")
    with nginx(folder, tmp_path_factory.mktemp("nginx")) as address:
        yield folder, address


def far(served, names, **more):
    paths = {name: f"{served[1]}/{name}.svs" for name in names}
    return cohort_of({**paths, **more})


def test_tiles_from_a_server_are_those_from_a_disk(served, cohort, tmp_path):
    names = cohort.table["slide_id"].tolist()
    local = cohort_of({name: served[0] / f"{name}.svs" for name in names})
    streams = [
        TileStream(SlideIndex.build(one, tmp_path / folder, workers=0), 64, (0.5, 0.7, 1.0, 2.0))
        for one, folder in ((local, "disk"), (far(served, names), "server"))
    ]
    before = traffic()
    near, distant = (stream.__getitems__(range(48)) for stream in streams)
    for one, other in zip(near, distant, strict=True):
        assert one[1:] == other[1:] and np.array_equal(one.image, other.image)
    read = traffic().since(before)
    assert read.fetched <= 1.3 * read.needed


def test_what_is_missing_is_quarantined_and_what_changes_is_named(served, cohort, tmp_path):
    name = cohort.table["slide_id"][0]
    index = SlideIndex.build(far(served, [name], gone=f"{served[1]}/none.svs"), tmp_path / "index", workers=0)
    assert index.usable["slide_id"].tolist() == [name]
    assert index.quarantined["reason"].tolist() == [f"{served[1]}/none.svs does not exist; correct its path"]
    path = served[0] / f"{name}.svs"
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**10))  # nginx makes its ETag of time and size
    with pytest.raises(InputError, match=f"{name}.svs has changed since it was opened or indexed; index it again"):
        TileStream(index, 64)[0]
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert TileStream(SlideIndex.open(tmp_path / "index"), 64)[0].image.shape == (64, 64, 3)
