"""Ranges of slides' bytes: merged within bounds, many slides at once, never wrong, whatever the server does."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import tifffile
from servers import Faulty
from slide_files import tissue_pixels, write_slide

from pathfm import InputError, source
from pathfm.source import GAP, LONGEST, WASTE, open_all, open_source, plan, read_all, traffic
from pathfm.storage import BLOCK, BLOCKS, BlockFile
from pathfm.stores import Patience

pytestmark = pytest.mark.usefixtures("quiet")
SIZE = 3_000_000
HASTY = Patience(tries=8, first_s=0.001)
SLOW = ("stall", "halt")  # faults that are noticed by waiting
PASSING = (
    "503",
    "429",
    "500",
    "stall",
    "halt",
    "reset",
    "cut",
    "short",
    "etag",
    "etag-ignored",
    "size",
    "range",
    "bare",
)


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def path(data, tmp_path):
    (tmp_path / "slide.svs").write_bytes(data)
    return tmp_path / "slide.svs"


@pytest.fixture
def server(data):
    with Faulty({"/a slide.svs": data, "/empty.svs": b""}) as running:
        yield running


@pytest.fixture
def remote(server):
    return open_source(f"{server.address}/a%20slide.svs", patience=HASTY)


def impatient(opened, fault: str):
    """The same source, waiting only for a moment where the fault is that nothing comes."""
    return open_source(opened.path, opened.size, opened.tag, HASTY._replace(timeout_s=0.3 if fault in SLOW else 30.0))


def ranges(seed: int, n: int, longest: int = 30_000, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Scattered and neighbouring ranges, some touching, overlapping, repeated or empty, in no order."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, size - longest, n)
    starts[n // 2 :] = starts[: n - n // 2] + rng.integers(-longest, 2 * longest, n - n // 2)
    starts = np.clip(starts, 0, size - longest)
    lengths = rng.integers(0, longest, n)
    order = rng.permutation(np.r_[:n, : n // 10])
    return starts[order], lengths[order]


def cut(data: bytes, starts, lengths) -> list[bytes]:
    return [data[start : start + length] for start, length in zip(starts, lengths, strict=True)]


# --- which bytes are fetched


@pytest.mark.parametrize("longest", [100, 30_000, 400_000])
@pytest.mark.parametrize("seed", range(5))
def test_every_range_comes_back_and_at_most_1_3_times_its_bytes_are_fetched(path, data, seed, longest):
    starts, lengths = ranges(seed, 200, longest)
    wanted = np.zeros(SIZE, bool)
    for start, length in zip(starts, lengths, strict=True):
        wanted[start : start + length] = True
    before = traffic()
    assert open_source(path).read(starts, lengths) == cut(data, starts, lengths)
    read = traffic().since(before)
    assert read.needed == wanted.sum()
    assert read.needed <= read.fetched <= WASTE * read.needed
    assert read.windows < 0.9 * len(starts)


@pytest.mark.parametrize(
    ("wanted", "windows"),
    [
        ([(0, 100), (100, 200)], [(0, 200)]),  # touching
        ([(100, 200), (0, 100)], [(0, 200)]),  # in any order
        ([(0, 100), (50, 70), (0, 100)], [(0, 100)]),  # within, and again
        ([(0, 1000), (1200, 2200)], [(0, 2200)]),  # 10 % between them
        ([(0, 100), (200, 300)], [(0, 100), (200, 300)]),  # 50 % between them
        ([(0, 400_000), (400_000 + GAP, 500_000 + GAP)], [(0, 500_000 + GAP)]),  # the widest gap
        ([(0, 400_000), (400_001 + GAP, 500_000 + GAP)], [(0, 400_000), (400_001 + GAP, 500_000 + GAP)]),
        ([(0, LONGEST), (LONGEST, LONGEST + 1)], [(0, LONGEST), (LONGEST, LONGEST + 1)]),  # as long as may be
        ([(0, 2 * LONGEST)], [(0, 2 * LONGEST)]),  # one range is never split
        ([(5, 5)], []),
    ],
)
def test_the_rule_that_merges(path, wanted, windows):
    opened = open_source(path)
    starts = [start for start, _ in wanted]
    lengths = [stop - start for start, stop in wanted]
    assert [(w.start, w.stop) for w in plan([(opened, starts, lengths)])] == windows


def test_requests_of_one_slide_share_windows_and_those_of_others_do_not(path, data, tmp_path):
    (tmp_path / "other.svs").write_bytes(data[::-1])
    one, other = open_source(path), open_source(tmp_path / "other.svs")
    requests = [(one, [0, 100], [100, 50]), (other, [0], [100]), (one, [150], [10]), (one, [], [])]
    assert [(w.source, w.stop) for w in plan(requests)] == [(one, 160), (other, 100)]
    assert read_all(requests) == [[data[:100], data[100:150]], [data[::-1][:100]], [data[150:160]], []]


@pytest.mark.parametrize(("start", "length"), [(SIZE, 1), (SIZE - 5, 6), (-1, 2), (10, -1), (2**63, 1)])
def test_a_range_outside_the_file_is_named(path, remote, server, start, length):
    asked = len(server.log)
    for opened in (open_source(path), remote):
        with pytest.raises(InputError, match=rf"slide.svs has {SIZE} bytes, and bytes {start} to .* again"):
            opened.read([0, start], [4, length])
    assert len(server.log) == asked


def test_unequal_numbers_of_starts_and_lengths_are_refused(path):
    with pytest.raises(ValueError, match="shorter"):
        open_source(path).read([0, 1], [1])


# --- on disk


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "empty.svs").touch()
    for name, complaint in (
        ("none.svs", "does not exist"),
        ("empty.svs", r"is empty \(0 bytes\)"),
        ("", "is a folder"),
    ):
        with pytest.raises(InputError, match=complaint):
            open_source(tmp_path / name)


@pytest.mark.parametrize("change", ["rewritten", "shortened", "replaced", "gone"])
def test_a_file_that_changes_is_named_and_nothing_of_it_returned(path, data, change):
    opened = open_source(path)
    known = opened.size, opened.tag
    assert opened.read([7], [9]) == [data[7:16]]
    if change == "replaced":
        (path.parent / "new").write_bytes(data[::-1])
        os.replace(path.parent / "new", path)
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(data[::-1] if change == "rewritten" else data[:100])
    os.utime(path, ns=(1, 1)) if path.exists() else None
    indexed = open_source(path, *known)
    indexed.close()  # not from the handle that is still open
    with pytest.raises(InputError, match=r"slide.svs (has changed .*index it again|does not exist)"):
        indexed.read([7], [9])
    if path.exists():
        assert open_source(path).read([7], [9]) == [path.read_bytes()[7:16]]


def test_handles_are_bounded_whatever_the_number_of_slides(tmp_path):
    paths = [tmp_path / f"{k}.svs" for k in range(3 * source.OPEN_FILES)]
    for k, path in enumerate(paths):
        path.write_bytes(b"%05d" % k)
    before = len(os.listdir("/proc/self/fd"))
    opened = [open_source(path) for path in paths]
    assert read_all([(each, [0], [5]) for each in opened]) == [[b"%05d" % k] for k in range(len(paths))]
    assert len(os.listdir("/proc/self/fd")) <= before + source.OPEN_FILES
    for each in opened:
        each.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_threads_share_a_source(path, remote, data):
    for opened in (open_source(path), remote):
        found = {}

        def work(seed, opened=opened, found=found):
            found[seed] = opened.read(*ranges(seed, 30)) == cut(data, *ranges(seed, 30))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == dict.fromkeys(range(8), True)


# --- over a network


def test_opening_asks_once_and_not_at_all_where_size_and_tag_are_known(server, remote, data):
    assert (remote.size, remote.tag) == (SIZE, f'"{SIZE}"')
    assert server.log == [("/a%20slide.svs", "bytes=0-0", None)]
    known = open_source(remote.path, remote.size, remote.tag)
    assert len(server.log) == 1
    assert known.read([3], [4]) == [data[3:7]]
    assert server.log[1:] == [("/a%20slide.svs", "bytes=3-6", f'"{SIZE}"')]


def test_reading_in_another_process(path, remote, data):
    """A pickled source asks for nothing when it is opened there, and holds nothing open here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        for opened in (open_source(path), remote):
            again = pickle.loads(pickle.dumps(opened))
            assert (again.path, again.size, again.tag, again.identity) == (
                opened.path,
                opened.size,
                opened.tag,
                opened.identity,
            )
            assert pool.submit(opened.read, [1, 2], [3, 4]).result() == [data[1:4], data[2:6]]


def test_a_forked_process_says_what_to_do_instead_of_waiting_for_ever(path, remote, data):
    def child(answers):
        for ask in (
            lambda: remote.read([0], [4]),
            lambda: open_source(remote.path),
            lambda: open_all([remote.path] * 2),
        ):
            try:
                answers.put(str(ask()))
            except InputError as error:
                answers.put(str(error))
        answers.put(open_source(path).read([0], [4]))

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=child, args=(answers,), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    for _ in range(3):
        assert "multiprocessing_context='forkserver'" in answers.get()
    assert answers.get() == [data[:4]]


def test_192_windows_are_in_flight_by_default_and_as_many_as_are_asked_for(server, remote, data, monkeypatch):
    source._threads.cache_clear()  # what other tests fetch ahead may still be on its way in the shared ones
    starts = np.arange(384) * 7_000  # 10 bytes each: none is near enough to another
    server.gate = threading.Barrier(192)  # no request is answered before 192 are there
    assert remote.read(starts, [10] * 384) == cut(data, starts, [10] * 384)
    assert server.most == 192
    server.gate, server.most = threading.Barrier(4), 0
    assert read_all([(remote, starts, [10] * 384)], in_flight=4) == [cut(data, starts, [10] * 384)]
    assert server.most == 4
    server.gate = threading.Barrier(200)
    monkeypatch.setenv("PATHFM_IN_FLIGHT", "200")
    assert remote.read(starts[:200], [10] * 200) == cut(data, starts[:200], [10] * 200)
    for odd in ("0", "many"):
        monkeypatch.setenv("PATHFM_IN_FLIGHT", odd)
        with pytest.raises(InputError, match=f"PATHFM_IN_FLIGHT.* is '{odd}'"):
            remote.read([0], [1])


def test_a_request_is_there_as_soon_as_its_own_windows_are(server, remote, path, data):
    """The first request waits for a broken server; the others arrive, disk first."""
    server.faults.extend(["503"] * 3)
    patient = open_source(remote.path, remote.size, remote.tag, Patience(tries=8, first_s=0.3))
    requests = [(patient, [0], [9]), (open_source(path), [5], [6]), (remote, [500_000, 1], [4, 5]), (remote, [], [])]
    asked = source.arriving(requests[:1])
    while len(server.log) < 2:  # it has started without waiting for us to listen
        threading.Event().wait(0.01)
    server.faults.clear()
    server.faults.append("503")
    arrived = dict(itertools.chain(source.arriving(requests[1:]), ((-1, parts) for _, parts in asked)))
    assert list(arrived) == [2, 0, 1, -1]
    assert arrived == {-1: [data[:9]], 0: [data[5:11]], 1: [data[500_000:500_004], data[1:6]], 2: []}


# --- faults


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_asked_for_again(server, remote, data, fault):
    before, remote = traffic(), impatient(remote, fault)
    server.faults.extend([fault] * 2)
    assert remote.read([100], [1000]) == [data[100:1100]]
    assert not server.faults
    assert traffic().since(before).retries >= 2
    server.faults.extend([fault])
    opened = open_source(remote.path, patience=remote.patience)  # an ETag or size unknown before cannot look wrong,
    if fault in ("etag", "etag-ignored", "size"):
        with pytest.raises(InputError, match="has changed"):  # until something is read
            opened.read([100], [1000])
    else:
        assert opened.read([100], [1000]) == [data[100:1100]]


@pytest.mark.parametrize(
    ("fault", "complaint", "asked"),
    [
        ("503", "503 Service Unavailable: out of order, 8 times in a row; try again later", 8),
        ("429", "429 Too Many Requests", 8),
        ("stall", "no answer within 0.3 s, 8 times in a row", 8),
        ("halt", "no answer within 0.3 s", 8),
        ("reset", "the connection broke", 8),
        ("cut", "the connection broke before the end", 8),
        ("short", "999 bytes came instead of 1000, 8 times in a row", 8),
        ("range", "Requested 100..1100, got 101..1101", 8),
        ("bare", "Content-Range header not present", 8),
        ("etag", "has changed since it was opened or indexed; index it again", 3),
        ("etag-ignored", "has changed since it was opened or indexed; index it again", 3),
        ("size", "has changed since it was opened or indexed; index it again", 3),
        ("whole", "a server that does not serve byte ranges; put it in an object store", 1),
        ("404", "does not exist; correct its path", 1),
        ("403", "is forbidden .403 Forbidden: out of order.; the server wants a login", 1),
        ("401", "is forbidden .401", 1),
        ("400", "cannot be read .400 Bad Request: out of order", 1),
        ("301", "lies in another region; set AWS_REGION", 1),
    ],
)
def test_what_does_not_pass_is_named(server, remote, fault, complaint, asked):
    server.stall_s, remote = 0.5, impatient(remote, fault)
    server.faults.extend([fault] * 20)
    before = len(server.log)
    with pytest.raises(InputError, match=rf"a%20slide.svs .*{complaint}"):
        remote.read([100], [1000])
    assert len(server.log) - before == asked


def test_nothing_wrong_is_returned_among_random_faults(server, remote, data):
    rng = np.random.default_rng(1)
    faults = [name for name in PASSING if name not in ("stall", "halt", "etag", "etag-ignored", "size")]
    server.faults.extend(rng.choice(faults) if rng.random() < 0.3 else None for _ in range(400))
    starts, lengths = ranges(3, 300, 2_000)
    before = traffic()
    patient = open_source(remote.path, remote.size, remote.tag, HASTY._replace(tries=30))
    assert patient.read(starts, lengths) == cut(data, starts, lengths)
    assert traffic().since(before).retries > 50


def test_the_waits_double_up_to_the_longest(server, monkeypatch):
    waits, wait_s = [], Patience.wait_s
    monkeypatch.setattr(Patience, "wait_s", lambda *which: waits.append(wait_s(*which)) or 0)
    opened = open_source(f"{server.address}/a%20slide.svs", patience=Patience(tries=9, first_s=0.1, longest_s=5.0))
    server.faults.extend(["503"] * 9)
    with pytest.raises(InputError, match="9 times in a row"):
        opened.read([0], [1])
    whole = np.minimum(0.1 * 2.0 ** np.arange(8), 5.0)
    assert len(waits) == 8
    assert (waits >= whole / 2).all() and (waits <= whole).all()
    assert len({round(wait / most, 6) for wait, most in zip(waits, whole, strict=True)}) > 1  # not all at once


def test_one_bad_range_fails_the_read_and_the_rest_is_called_off(server, remote):
    server.faults.extend(["404"] * 1000)
    starts = np.arange(250) * 11_000
    with pytest.raises(InputError, match="does not exist"):
        read_all([(remote, starts, [10] * 250)], in_flight=2)
    assert len(server.log) < 100


def test_what_is_let_go_is_not_asked_for_again_and_frees_its_threads(server, remote):
    starts = np.arange(8) * 7_000
    server.faults.extend(["404"] + ["503"] * 500)
    patient = open_source(remote.path, remote.size, remote.tag, Patience(tries=100, first_s=30.0))
    with pytest.raises(InputError, match="does not exist"):
        read_all([(patient, starts, [10] * 8)], in_flight=8)
    together = threading.Barrier(8)  # of all threads; seven would wait for 15 s and more to ask again
    list(source._pool(8).map(lambda _: together.wait(10), range(8)))
    assert len(server.log) <= 9


# --- as a file


def test_a_block_file_is_a_file(path, data):
    opened = open_source(path)
    mine, theirs, rng = BlockFile(opened), io.BytesIO(data), np.random.default_rng(0)
    for _ in range(400):
        whence = int(rng.integers(3))
        offset = int(rng.integers(0, SIZE)) - (0, theirs.tell(), SIZE)[whence]
        assert mine.seek(offset, whence) == theirs.seek(offset, whence)
        n = int(rng.choice([0, 1, 100, BLOCK, 5 * BLOCK]))
        assert mine.read(n) == theirs.read(n)
        assert mine.tell() == theirs.tell()
    mine.seek(0)
    assert mine.read() == data
    assert mine.read(5) == b""
    with pytest.raises(ValueError, match="cannot seek to -1"):
        mine.seek(-1)
    for file in (opened.file(), io.BufferedReader(BlockFile(opened))):
        with file:
            file.seek(10)
            assert file.read(20) == data[10:30]


def test_a_block_file_keeps_what_it_has_read_within_bounds(server, remote, data):
    file = remote.file()
    file.seek(BLOCK + 5)
    assert [file.read(7) for _ in range(50)] == [data[BLOCK + k : BLOCK + k + 7] for k in range(5, 355, 7)]
    assert len(server.log) == 2
    file.seek(0)
    assert len(file.read(SIZE)) == SIZE
    assert len(server.log) <= 3 + -(-SIZE // LONGEST)
    assert len(file._blocks) <= BLOCKS


def test_tifffile_reads_a_slide_over_the_network_by_its_headers(tmp_path, server):
    written = write_slide(tmp_path / "pyramid.tif", tissue_pixels(2048, 2048), levels=(1, 4))
    server.objects["/pyramid.tif"] = written.read_bytes()
    opened = open_source(f"{server.address}/pyramid.tif")
    before = traffic()
    with tifffile.TiffFile(opened.file()) as near, tifffile.TiffFile(written) as far:
        assert [page.dataoffsets for page in near.pages] == [page.dataoffsets for page in far.pages]
        assert traffic().since(before).fetched < 0.2 * opened.size
        assert np.array_equal(near.pages[1].asarray(), far.pages[1].asarray())
