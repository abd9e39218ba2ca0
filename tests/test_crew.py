"""Work that threads share: done once each, in order of the numbers, by whoever is free, the caller among them."""

import threading
import time

import pytest

from pathfm.crew import Crew


@pytest.fixture
def held():
    """A crew of two whose own thread is busy until `go` is set."""
    crew, go, busy = Crew(2), threading.Event(), threading.Event()
    own = crew.begin(lambda _: busy.set() or go.wait(60), range(1))
    assert busy.wait(60)
    yield crew, go, own
    go.set()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 7, 64])
def test_each_number_is_done_once_and_results_keep_their_order(threads, n):
    crew, done = Crew(threads), []
    shares = crew.begin(lambda some: done.extend(some) or list(some), range(n))
    assert len(shares) <= threads
    assert [k for some in crew.finish(shares) for k in some] == list(range(n))
    assert sorted(done) == list(range(n))


def test_the_caller_does_what_nobody_has_begun(held):
    crew, _, _ = held
    shares = crew.begin(lambda some: threading.current_thread(), range(2))
    assert crew.finish(shares) == [threading.main_thread()] * 2


def test_a_share_does_one_that_it_waits_for_and_nobody_has_begun(held):
    crew, _, _ = held
    first = crew.begin(lambda some: [k + 1 for k in some], range(4))
    second = crew.begin(lambda some: sum(sum(share.result()) for share in first), range(1))
    assert second[0].result() == 10


def test_while_others_are_at_its_shares_the_caller_goes_on_with_what_is_wanted_next(held):
    crew, go, own = held
    following = crew.begin(lambda some: go.set() or "next", range(1))
    assert crew.finish(own) == [True]  # its thread was let go by the share after it, which the caller did
    assert following[0].done() and following[0].result() == "next"


def test_no_more_threads_than_it_has_are_at_work():
    crew, lock, working, most = Crew(3), threading.Lock(), set(), []

    def work(some):
        with lock:
            working.add(threading.get_ident())
            most.append(len(working))
        time.sleep(0.002)
        with lock:
            working.remove(threading.get_ident())

    for shares in [crew.begin(work, range(3)) for _ in range(20)]:
        crew.finish(shares)
    assert max(most) <= 3 and len(most) == 60


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_share_raises_is_for_all_who_ask(threads):
    crew = Crew(threads)
    shares = crew.begin(lambda some: 1 // some.start, range(2))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            crew.finish(shares)
