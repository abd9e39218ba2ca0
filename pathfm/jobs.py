"""Independent jobs, each worth a process: run here, in worker processes of this machine, or on a Dask cluster.

    for key, found in jobs.run(scan, {"a.svs": ("a.svs", 0.5), ...}, crashed, workers=4): ...

A job is a call of one function: anything that takes arguments and gives a result that can be pickled, such as the scan
of a slide or the features of a few thousand tiles. It should last seconds at least, for its way to a worker and back
costs some milliseconds.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import pickle
import queue
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import cv2

from pathfm.errors import InputError

PATIENCE_S = 600  # that jobs wait for a scheduler without workers: batch systems start them late
CONNECT_S = 20  # to reach the scheduler
POLL_S = 5  # between looks at whether there are workers
START = "dask", "worker", "--nthreads", "1", "--no-dashboard", "--death-timeout", "300"


def run(
    function: Callable[..., Any],
    jobs: Mapping[str, tuple],
    crashed: Callable[..., Any],
    workers: int = 0,
    scheduler: str | None = None,
    in_order: bool = False,
) -> Iterator[tuple[str, Any]]:
    """(key, function(*arguments)) of each job, key -> arguments, as they finish, or in the order of `jobs`.

    function   of a module that the workers can import; it raises only what should end everything
    crashed    called with the arguments of a job whose process dies; what it returns is that job's result
    workers    processes on this machine, each with one thread; 0 or 1: this process, without protection from a crash
    scheduler  address of a Dask scheduler, "tcp://host:8786": its workers do it instead
    in_order   keep what is early until all before it is out; a job whose workers die holds the later ones back

    Arguments and results travel through Dask, so nothing needs to be shared but what `function` itself opens. A
    worker that dies loses nothing: its jobs run again elsewhere. One that Dask gives up on, for its workers died
    time and again, runs once more with nothing beside it, and counts as crashed only if it dies there too.

    Raises InputError where the scheduler cannot be reached, is lost, or has no worker for PATIENCE_S. A generator that
    is closed, as by Ctrl-C, ends the jobs that are left.
    """
    with contextlib.closing(_as_they_finish(function, jobs, crashed, workers, scheduler)) as results:
        yield from _in_order(results, jobs) if in_order else results


def _in_order(results: Iterator[tuple[str, Any]], keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    early: dict[str, Any] = {}
    for key in keys:
        while key not in early:
            done, result = next(results)
            early[done] = result
        yield key, early.pop(key)


def _as_they_finish(function, jobs, crashed, workers: int, scheduler: str | None) -> Iterator[tuple[str, Any]]:
    if not scheduler and workers <= 1:
        yield from ((key, function(*arguments)) for key, arguments in jobs.items())
        return
    with _client(min(workers, len(jobs)), scheduler) as client:
        suspects = []
        for key, result in _finished(client, function, jobs):
            if isinstance(result, _Died):
                suspects.append(key)
            else:
                yield key, result
        for suspect in suspects:
            for key, result in _finished(client, function, {suspect: jobs[suspect]}):
                yield key, crashed(*jobs[key]) if isinstance(result, _Died) else result


class _Died:
    """What stands for the result of a job whose workers died."""


class _Call:
    """Unpickled, it is the result of function(*arguments).

    A Dask worker that cannot import what it is sent ends itself. Sent as bytes, a job is opened inside its task,
    where the missing module is an error that comes back and harms no cluster.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return _on_one_thread, (self.function, self.arguments)


def _on_one_thread(function: Callable[..., Any], arguments: tuple) -> Any:
    cv2.setNumThreads(1)  # workers already fill the cores
    return function(*arguments)


def _finished(client, function: Callable[..., Any], jobs: Mapping[str, tuple]) -> Iterator[tuple[str, Any]]:
    """(key, result or _Died) as jobs finish; nothing of a result stays on the cluster."""
    from distributed import CancelledError
    from distributed.comm import CommClosedError
    from distributed.scheduler import KilledWorker

    done: queue.SimpleQueue = queue.SimpleQueue()
    calls = [cloudpickle.dumps(_Call(function, arguments)) for arguments in jobs.values()]
    futures = client.map(pickle.loads, calls, pure=False)
    left = dict(zip((future.key for future in futures), jobs, strict=True))
    for future in futures:
        future.add_done_callback(done.put)
    del futures, future
    while left:
        future = _next(client, done)
        try:
            result = future.result()
        except KilledWorker:
            result = _Died()
        except (CancelledError, CommClosedError):
            raise _lost(client) from None
        except ModuleNotFoundError as error:
            raise InputError(
                f"a worker of {_address(client)} cannot import {error.name}; install pathfm there as it is here"
            ) from None
        key = left.pop(future.key)
        future.release()
        yield key, result


def _next(client, done: queue.SimpleQueue):
    """The next future that is done. Raises InputError where the scheduler or, for long, every worker is gone."""
    idle = 0  # looks in a row that found no worker
    while True:
        with contextlib.suppress(queue.Empty):
            return done.get(timeout=POLL_S)
        try:
            idle = 0 if client.nthreads() else idle + 1
        except OSError:
            raise _lost(client) from None
        if idle == 4:
            print(f"pathfm: {_address(client)} has no worker now; waiting for one", file=sys.stderr)
        if idle * POLL_S >= PATIENCE_S:
            raise InputError(
                f"{_address(client)} had no worker for {PATIENCE_S:g} s; start some with "
                f"'dask worker {_address(client)}' and run again: what is finished is kept"
            )


def _lost(client) -> InputError:
    return InputError(f"the scheduler {_address(client)} is gone; start it and run again: what is finished is kept")


def _address(client) -> str:
    return client.scheduler.address


@contextlib.contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Any]:
    """A client of the scheduler given, or of one in this process with its workers beside it."""
    import dask
    from distributed import Client

    quiet = {"distributed.admin.log-length": 0, "distributed.comm.timeouts.connect": f"{CONNECT_S}s"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(quiet))
        address = scheduler or stack.enter_context(_local(workers))
        stack.enter_context(_silent())
        reason = None
        try:
            client = stack.enter_context(Client(address, timeout=CONNECT_S, set_as_default=False))
        except (OSError, ValueError, TypeError) as error:
            reason = str(error)
        if reason is not None:
            gc.collect()  # a client that failed hangs where a later one, being made, happens to collect it
            raise InputError(
                f"no Dask scheduler answers at {address} ({reason}); start one with 'dask scheduler' "
                "and give its address, such as tcp://host:8786"
            )
        yield client


@contextlib.contextmanager
def _local(workers: int) -> Iterator[str]:
    """The address of a scheduler in this process, with worker processes of their own.

    They are started as a cluster's are, by command: Dask's own local processes run the caller's script again, which
    may lack a main guard. In a session of their own, Ctrl-C reaches this process alone, which then ends them.
    """
    import dask
    from distributed import LocalCluster

    with contextlib.ExitStack() as stack:
        # A job whose worker dies is at once a suspect: here no machine is taken away from below a worker.
        stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": 0}))
        # At a port of its own choice: a usual one that is taken already would be warned of.
        quiet = {"dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}
        cluster = stack.enter_context(LocalCluster(n_workers=0, host="127.0.0.1", **quiet))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pathfm-workers-", ignore_cleanup_errors=True))
        command = [sys.executable, "-m", *START, "--local-directory", folder, cluster.scheduler_address]
        with open(Path(folder) / "log", "w") as log:
            started = [
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
                for _ in range(workers)
            ]
        stack.callback(_end, started)
        yield cluster.scheduler_address


def _end(started: Iterable[subprocess.Popen]) -> None:
    """Ask the nannies to take their workers with them; insist after a while."""
    for process in started:
        process.terminate()
    for process in started:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without Dask's log: what matters of it is raised."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("distributed")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
