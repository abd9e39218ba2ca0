"""A cohort on a web server gives the tiles that the same files give from a disk, and names what is wrong with one."""

import copy
import os
import pickle
import shutil
import threading
import time

import boto3
import numpy as np
import pytest
from servers import Faulty, nginx, s3_server
from slide_files import cohort_of, tissue_pixels, write_slide
from test_stream import digest
from torch.utils.data import DataLoader

from pathfm import InputError, SlideIndex, TileStream, reading, source, stores
from pathfm.filters import HsvFilter
from pathfm.grids import Grid
from pathfm.reading import Job
from pathfm.source import IN_FLIGHT, traffic
from pathfm.storage import BLOCK
from pathfm.tilemap import tiles_of

pytestmark = pytest.mark.usefixtures("quiet")


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


def test_one_batch_reads_from_a_disk_and_a_server(served, cohort, tmp_path):
    """And from slides of two indices, each with a map of its own."""
    names = cohort.table["slide_id"].tolist()[:3]
    near = SlideIndex.build(cohort_of({name: served[0] / f"{name}.svs" for name in names}), tmp_path / "a", workers=0)
    distant = SlideIndex.build(far(served, names), tmp_path / "b", workers=0)
    slides = [index.slide(name) for name in names for index in (distant, near)]
    jobs = [Job(slide, slide.plan(1.0), 16 * k, 32, 64, 64) for k in range(5) for slide in slides]
    found = reading.read(jobs, threads=2)
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert np.array_equal(one, other)
    for job, image in zip(jobs, found, strict=True):
        assert np.array_equal(image, job.slide.read(job.x, job.y, 64, 1.0))


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


@pytest.fixture(scope="module")
def twins(served, cohort, tmp_path_factory):
    """Indexes of the same files on a disk and on a server."""
    names, folder = cohort.table["slide_id"].tolist(), tmp_path_factory.mktemp("twins")
    local = cohort_of({name: served[0] / f"{name}.svs" for name in names})
    return [
        SlideIndex.build(one, folder / where, workers=0)
        for one, where in ((local, "disk"), (far(served, names), "server"))
    ]


WALKS = {
    "even": [range(k, k + 6) for k in range(0, 48, 6)],
    "one of three workers": [range(k, k + 4) for k in range(4, 120, 12)],
    "single tiles": [[k] for k in range(24)],
    "backwards": [range(k, k + 4) for k in range(40, 0, -4)],
    "jumps": [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1], [9, 3], [8, 9], [10, 11, 12], [4, 4]],
}


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_what_is_begun_before_it_is_asked_for_changes_no_tile(walk, twins):
    settings = {"tile_px": 48, "mpp": (0.5, 0.7, 1.0), "seed": 3}
    near, distant = (TileStream(index, **settings) for index in twins)
    for stream in (near, distant, pickle.loads(pickle.dumps(distant))):
        found = [digest(stream.__getitems__(numbers)) for numbers in walk]
        assert found == [digest([near[i] for i in numbers]) for numbers in walk]


def test_a_copy_with_other_settings_reads_its_own_tiles(twins):
    near, distant = (TileStream(index, 48, 0.5) for index in twins)
    for k in range(5):
        distant[k]
    other, wanted = copy.copy(distant), copy.copy(near)
    other.context_px = wanted.context_px = 64
    assert digest([other[5]]) == digest([wanted[5]]) != digest([near[5]])


def test_filtered_tiles_and_grids_are_begun_before_and_stay_the_same(twins):
    colours = HsvFilter(hue=(0, 180), saturation=(0, 255), value=(0, 225), share=0.85, redraws=3)
    near, distant = (TileStream(index, 48, 1.0, tile_filter=colours) for index in twins)
    assert near.names(range(40))["redraws"].max() > 0
    for k in range(0, 40, 8):
        assert digest(near.__getitems__(range(k, k + 8))) == digest(distant.__getitems__(range(k, k + 8)))
    near, distant = (Grid(index, 48, 2.0) for index in twins)
    for k in range(0, len(near) - 4, 4):
        assert digest(near.__getitems__(range(k, k + 4))) == digest(distant.__getitems__(range(k, k + 4)))
    with pytest.raises(IndexError):
        distant[len(near)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_gives_the_same_batches(workers, twins):
    near, distant = (TileStream(index, 48, (0.5, 1.0), seed=3) for index in twins)
    more = {"multiprocessing_context": "forkserver", "num_workers": workers} if workers else {}
    batches = [
        [
            (batch.image.numpy().tobytes(), batch.i.tolist())
            for batch in DataLoader(stream, 7, sampler=range(5, 75), **kind)
        ]
        for stream, kind in ((near, {}), (distant, more))
    ]
    assert batches[0] == batches[1]


def test_a_forked_worker_says_what_to_do_and_waits_for_nothing_begun_elsewhere(twins):
    stream = TileStream(twins[1], 48, 0.5)
    for k in range(0, 36, 6):
        stream.__getitems__(range(k, k + 6))
    loader = DataLoader(stream, 6, sampler=range(36, 60), num_workers=1, multiprocessing_context="fork", timeout=60)
    with pytest.raises(InputError, match="multiprocessing_context='forkserver'"):
        next(iter(loader))


@pytest.fixture
def watched(served, cohort, tmp_path):
    """(server, stream): twelve slides on a server that shows what is asked of it, and does as it is told."""
    slides = {f"{name}-{k}": served[0] / f"{name}.svs" for name in cohort.table["slide_id"] for k in range(3)}
    with Faulty({f"/{name}.svs": path.read_bytes() for name, path in slides.items()}) as server:
        table = cohort_of({name: f"{server.address}/{name}.svs" for name in slides})
        yield server, TileStream(SlideIndex.build(table, tmp_path / "index", workers=0), 48, 0.5)


def test_192_windows_are_on_their_way_while_batches_of_eight_are_decoded(watched):
    """The server answers none before 192 are there; eight slides in a batch are at least eight windows."""
    source._threads.cache_clear()  # what other tests fetch ahead may still be on its way in the shared ones
    server, stream = watched
    batches = [range(k, k + 8) for k in range(0, 640, 8)]
    for batch in batches[:12]:
        stream.__getitems__(batch)
    server.most, server.gate = 0, threading.Barrier(IN_FLIGHT, action=lambda: setattr(server, "gate", None))
    walk = threading.Thread(target=lambda: [stream.__getitems__(batch) for batch in batches[12:]], daemon=True)
    walk.start()
    walk.join(60)
    assert not walk.is_alive() and server.gate is None
    assert server.most == IN_FLIGHT


def test_what_was_begun_for_a_stream_that_is_gone_is_let_go(watched, quiet, monkeypatch):
    """The server is out of order for good, and a fetching thread would wait for 20 s before it asks again."""
    server, stream = watched
    monkeypatch.setattr(stores.Patience, "wait_s", lambda *_: 20.0)
    walked = pickle.loads(pickle.dumps(stream))
    for k in range(0, 24, 8):
        walked.__getitems__(range(k, k + 8))
    server.faults.extend(["503"] * 10_000)
    walked.__getitems__(range(24, 32))  # was on its way; those after it meet the faults
    before = traffic().retries
    while traffic().retries == before:
        time.sleep(0.01)
    del walked
    quiet(5)


def test_an_error_is_of_the_batch_that_has_the_tile_and_passes_when_it_does(watched):
    server, stream = watched
    gone = stream.slides["slide_id"][0]
    whole = [tile.slide_id for tile in stream.__getitems__(range(40))]
    data = server.objects.pop(f"/{gone}.svs")
    for _ in range(2):
        for i, slide_id in enumerate(whole):
            if slide_id == gone:
                with pytest.raises(InputError, match=rf"{gone}.svs does not exist"):
                    stream[i]
            else:
                assert stream[i].slide_id == slide_id
    for i in range(20):
        if whole[i] != gone:
            stream[i]
    server.objects[f"/{gone}.svs"] = data
    assert [stream[i].slide_id for i in range(40)] == whole


def asked(server, size: int) -> np.ndarray:
    """How often each byte of the only file was asked for since the log was cleared, but for whole blocks of 64 KiB."""
    found = np.zeros(size, int)
    for _, wanted, _ in server.log:
        start, stop = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        if start % BLOCK or (stop + 1 - start) % BLOCK:
            found[start : stop + 1] += 1
    return found


def test_a_cold_start_reads_headers_directories_and_no_level_finer_than_the_mask_needs(tmp_path):
    """Masks are made at 8 um and judge focus at 2 um; of level 0 two tiles show that it can be read, and to its end."""
    path = write_slide(tmp_path / "slide.tif", tissue_pixels(2048, 2048), 0.5, (1, 4, 16))
    size = path.stat().st_size
    with Faulty({"/slide.tif": path.read_bytes()}) as server:
        index = SlideIndex.build(cohort_of({"a": f"{server.address}/slide.tif"}), tmp_path / "index", workers=0)
        levels = index.slide("a").level_downsamples
        places = [np.array(index.tiles.find(k, range(tiles_of(index.tiles.levels[k])))).T for k in range(3)]
        assert levels == (1, 4, 16) and [len(tiles) for tiles in places] == [1024, 64, 4]
        fetched = asked(server, size)
        whole = [[fetched[at : at + length].all() for at, length in tiles] for tiles in places]
        assert np.flatnonzero(whole[0]).tolist() == [0, 1023]
        assert all(whole[2]) and 32 <= sum(whole[1]) <= 64
        for tiles in places:
            for at, length in tiles:
                fetched[at : at + length] = 0
        assert fetched.sum() <= 16 * 1092  # and else the directories' arrays: at most two numbers of 8 bytes a tile
        headers = [wanted for _, wanted, _ in server.log if int(wanted[6:].split("-")[0]) % BLOCK == 0]
        assert len(headers) <= 2 + 1 + 3  # its size, twice; the header, and a directory a level
        server.log.clear()
        tile = TileStream(index, 128, 0.5)[0]
        columns, rows = (range(at // 64, (at + 127) // 64 + 1) for at in (tile.x, tile.y))
        needed = np.zeros(size, bool)
        for at, length in places[0][[32 * row + column for row in rows for column in columns]]:
            needed[at : at + length] = True
        first = asked(server, size)
        assert first[needed].all() and first.sum() <= 1.3 * needed.sum()


def test_tiles_from_a_bucket_are_those_from_a_disk(cohort, tmp_path, monkeypatch):
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    rows = list(cohort)[:2]
    with s3_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
        client.create_bucket(Bucket="slides")
        for row in rows:
            client.upload_file(row.path, "slides", f"some/{row.slide_id}.svs")
        paths = [
            {row.slide_id: row.path for row in rows},
            {r.slide_id: f"s3://slides/some/{r.slide_id}.svs" for r in rows},
        ]
        indexes = [SlideIndex.build(cohort_of(one), tmp_path / str(k), workers=0) for k, one in enumerate(paths)]
        near, distant = (TileStream(index, 48, (0.5, 0.7)) for index in indexes)
        for k in range(0, 30, 6):
            assert digest(distant.__getitems__(range(k, k + 6))) == digest(near.__getitems__(range(k, k + 6)))


def test_a_server_at_fault_a_third_of_the_time_gives_the_same_tiles(watched, monkeypatch):
    """Through the index, the prefetch and the stream; each fault is waited out."""
    server, stream = watched
    monkeypatch.setattr(stores.Patience, "wait_s", lambda *_: 0)
    wanted = [digest(stream.__getitems__(range(k, k + 8))) for k in range(0, 80, 8)]
    rng, before = np.random.default_rng(0), traffic()
    faults = ["503", "429", "500", "reset", "cut", "short", "range", "bare"]
    server.faults.extend(rng.choice(faults) if rng.random() < 1 / 3 else None for _ in range(150))
    again = pickle.loads(pickle.dumps(stream))  # which has begun nothing
    assert [digest(again.__getitems__(range(k, k + 8))) for k in range(0, 80, 8)] == wanted
    assert traffic().since(before).retries > 20 and not server.faults
