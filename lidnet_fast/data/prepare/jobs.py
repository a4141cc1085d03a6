"""Independent jobs on all cores of this machine, or on a cluster through Dask."""

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from lidnet_fast.errors import InputError
from lidnet_fast.progress import progress

J = TypeVar("J")
R = TypeVar("R")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def executor(workers: int | None = None, dask: str | None = None) -> Iterator[Executor | None]:
    """Make what `run` runs jobs on.

    Args:
        workers: number of processes on this machine, by default one per core; 1 is this process itself.
        dask: address of a Dask scheduler to use instead; its workers must see the same files under the same paths.

    Raises:
        InputError: Dask isn't installed or the scheduler can't be reached.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    if dask is not None:
        with _dask_client(dask) as client, client.get_executor(pure=False) as pool:
            yield pool
    elif (workers or cores()) == 1:
        yield None
    else:
        # Forks of a process that has imported everything and runs no thread yet; where there are none, new processes.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if hasattr(context, "set_forkserver_preload"):
            context.set_forkserver_preload(["lidnet_fast.data.prepare.plan"])
        pool = ProcessPoolExecutor(workers or cores(), mp_context=context, initializer=_end_with_parent)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this worker end when its parent is killed, where a pool's own would wait for ever for more work."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _dask_client(address: str):  # type: ignore[no-untyped-def]
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError("dask: Dask is not installed: pip install 'dask[distributed]'") from error
    try:
        return Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise InputError(f"dask ({address}): {' '.join(str(error).split())}") from error


def run(pool: Executor | None, function: Callable[[J], R], jobs: Sequence[J], what: str) -> Generator[R]:
    """Yield the results of some jobs in the jobs' order, under a progress bar.

    Closed, or left by an exception, it ends when no job runs any more.

    Args:
        pool: where they run; None is this process, one after the other.
        function: of a module, so that it pickles.
        jobs: its arguments.
        what: what the progress bar says.

    Raises:
        InputError: a worker was killed.
    """
    if pool is None or len(jobs) == 1:
        yield from progress(map(function, jobs), what, total=len(jobs))
        return
    waiting = deque(pool.submit(function, job) for job in jobs)
    try:
        yield from progress(_in_order(waiting), what, total=len(jobs))
    except BrokenProcessPool as error:
        raise InputError(f"workers: a process ended while {what} (out of memory?); try fewer workers") from error
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


def _in_order(waiting: deque[Future[R]]) -> Iterator[R]:
    """Results of futures, each forgotten once its result has been used."""
    while waiting:
        yield waiting[0].result()
        waiting.popleft()
