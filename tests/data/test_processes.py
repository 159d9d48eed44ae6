"""Results in the order of the jobs, and errors of processes."""

import multiprocessing
import time

import pytest

from neva_jax.data.processes import in_order
from neva_jax.errors import WorkerError
from tests.data.work import die_at, divide, power


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_results_come_in_the_order_of_the_jobs(processes):
    jobs = [(n,) for n in range(40)]
    assert list(in_order(power, 2, iter(jobs), processes, "computed")) == [2**n for n in range(40)]
    assert list(in_order(power, 2, [], processes, "computed")) == []


def test_a_dead_process_is_an_error_that_says_what_it_did():
    with pytest.raises(WorkerError, match="a process that computed has died"):
        list(in_order(die_at, 7, [(n,) for n in range(40)], 2, "computed"))


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_the_work_comes_through_and_no_process_stays(processes):
    with pytest.raises(ZeroDivisionError):
        list(in_order(divide, 1, [(1,), (0,)], processes, "computed"))
    # Not joined: the pool's own thread does that, and of two that join one may see nothing.
    limit = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < limit:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def test_jobs_are_drawn_as_results_are_taken():
    drawn = []

    def jobs():
        for n in range(1000):
            drawn.append(n)
            yield (n,)

    results = in_order(power, 2, jobs(), 2, "computed")
    assert [next(results) for _ in range(3)] == [1, 2, 4]
    assert len(drawn) < 20
    results.close()
