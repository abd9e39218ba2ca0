"""Reads begun before they are asked for: which ones, how many, and that nothing else comes of it."""

from __future__ import annotations

import pickle
import threading

import pytest

from pathfm import InputError, prefetch
from pathfm.prefetch import Prefetch


class Reader:
    """Begins reads of numbers and remembers them; each asks for `size` bytes."""

    def __init__(self, size: int = 1, last: int = 10**9):
        self.size, self.last, self.begun = size, last, []

    def __call__(self, numbers) -> tuple[str, int]:
        if max(numbers, default=0) > self.last:
            raise InputError(f"nothing beyond {self.last}")
        self.begun.append(list(numbers))
        return f"read of {list(numbers)}", self.size


def walk(reader: Reader, starts, size: int = 4) -> list[int]:
    """How many batches have been begun after each, of those that start there."""
    ask, counts = Prefetch(), []
    for start in starts:
        numbers = range(start, start + size)
        assert ask(numbers, reader) == f"read of {list(numbers)}"
        counts.append(len(reader.begun))
    return counts


@pytest.mark.parametrize("apart", [4, 12, 1, -4])  # one process, one of three workers, overlapping, backwards
def test_an_even_walk_is_foreseen_after_three_batches_and_each_read_begun_once(apart):
    reader, starts = Reader(), range(400, 400 + 20 * apart, apart)
    assert walk(reader, starts)[:6] == [1, 2, 4, 6, 9, 14]  # one ahead, two, four, eight
    begun = [numbers[0] for numbers in reader.begun]
    assert begun == list(range(400, 400 + len(begun) * apart, apart))


@pytest.mark.parametrize(
    ("size", "each", "ahead"),
    [
        (4, 1, prefetch.TILES // 4),
        (prefetch.TILES // 2 + 1, 1, 2),
        (10 * prefetch.TILES, 1, 1),  # one batch, however large
        (4, prefetch.BYTES // 3 + 1, 3),
        (4, 2 * prefetch.BYTES, 1),
    ],
)
def test_what_is_on_its_way_is_bounded(size, each, ahead):
    reader = Reader(each)
    counts = walk(reader, range(0, 40 * size, size), size)
    assert max(count - k for k, count in enumerate(counts, 1)) == counts[-1] - len(counts) == ahead


def test_what_is_not_foreseen_is_begun_when_it_is_asked_for():
    reader, starts = Reader(), [0, 4, 100, 7, 7, 7, 3, 5, 6]  # no step comes twice
    assert walk(reader, starts) == list(range(1, 10))
    ask, odd = Prefetch(), Reader()
    for numbers in ([0, 1, 2], [3, 4, 5], [6, 8, 9], [8, 10], [10, 12], [1, 0], []):
        ask(numbers, odd)
    assert odd.begun == [[0, 1, 2], [3, 4, 5], [6, 8, 9], [8, 10], [10, 12], [1, 0], []]


def test_a_batch_left_out_or_cut_short_is_no_harm():
    reader = Reader()
    ask = Prefetch()
    for start in (0, 4, 8, 12, 20, 24):
        assert ask(range(start, start + 4), reader) == f"read of {list(range(start, start + 4))}"
    assert ask([28, 29], reader) == "read of [28, 29]"


def test_what_cannot_be_begun_is_an_error_only_when_it_is_asked_for():
    reader, ask = Reader(last=15), Prefetch()
    for start in (0, 4, 8, 12):
        ask(range(start, start + 4), reader)
    for _ in range(2):
        with pytest.raises(InputError, match="nothing beyond 15"):
            ask(range(16, 20), reader)
    assert ask(range(0, 4), reader) == "read of [0, 1, 2, 3]"


def test_threads_may_ask_at_once():
    reader, ask, found = Reader(), Prefetch(), {}

    def work(first: int) -> None:
        found[first] = [ask(range(k, k + 4), reader) for k in range(first, first + 400, 4)]

    threads = [threading.Thread(target=work, args=(1000 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, answers in found.items():
        assert answers == [f"read of {list(range(k, k + 4))}" for k in range(first, first + 400, 4)]


def test_a_copy_has_begun_nothing():
    ask, reader = Prefetch(), Reader()
    for start in (0, 4, 8):
        ask(range(start, start + 4), reader)
    other = Reader()
    pickle.loads(pickle.dumps(ask))(range(12, 16), other)
    assert other.begun == [[12, 13, 14, 15]]
