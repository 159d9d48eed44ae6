"""Work in parallel processes whose results come in the order of the jobs, however many processes there are."""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any

from neva_jax.errors import WorkerError

_AHEAD = 4  # jobs per process that are under way or wait to be taken: what they return is held in memory


def in_order(work: Callable[..., Any], shared: Any, jobs: Iterable[tuple], processes: int, what: str) -> Iterator[Any]:
    """`work(shared, *job)` of each job, in order; `work` is a function of a module.

    Args:
      shared: sent to each process once.
      processes: below 2, the calling process does the work.
      what: stands in the message when a process dies.

    Raises:
      WorkerError: a process has died.
    """
    if processes < 2:
        for job in jobs:
            yield work(shared, *job)
        return
    jobs = iter(jobs)
    # Not forked: the calling process may hold threads, or a device.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (work, shared))
    done = False
    try:
        waiting: deque[Future] = deque(pool.submit(_do, *job) for job in islice(jobs, _AHEAD * processes))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(_do, *job) for job in islice(jobs, 1))
            yield result
        done = True
    except BrokenProcessPool:
        raise WorkerError(
            f"a process that {what} has died, perhaps for lack of memory; fewer workers need less (data.workers)"
        ) from None
    finally:
        # After an error nobody waits for what is under way.
        pool.shutdown(wait=done, cancel_futures=True)


_work: Callable[..., Any]
_shared: Any = None  # of a process of the pool


def _start(work: Callable[..., Any], shared: Any) -> None:
    global _work, _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C ends the main process, and that ends this one
    _work, _shared = work, shared


def _do(*job: Any) -> Any:
    return _work(_shared, *job)
