"""Signals to real processes that train."""

import pytest

from tests.faults.conftest import said

# The n-th step sends signals to its own process before it is computed; `send` also to the process group.
AT_STEP = """
import os, signal, time
real, calls = train.Meter.next, []
def next_batch(self, stream):
    batch = real(self, stream)
    calls.append(None)
    if len(calls) == 3:
        damage()
    return batch
train.Meter.next = next_batch
"""


def at_step_3(damage: str) -> str:
    return f"{AT_STEP}\ndef damage():\n    {damage}\n"


@pytest.mark.parametrize(("name", "number", "status"), [("SIGTERM", 15, 143), ("SIGUSR1", 10, 143), ("SIGINT", 2, 130)])
def test_the_first_signal_ends_the_step_and_saves(run, name, number, status):
    stopped = run("checkpoint.every=100", before=at_step_3(f"os.kill(os.getpid(), signal.{name})"))
    assert stopped.status == status, stopped.stderr
    assert stopped.steps == [3]
    assert "stopping: this step ends" in stopped.stderr
    assert said(stopped.dir)[-1] == f"stopped by signal {number} after step 3, saved; the same command continues"
    assert not (stopped.dir / "run.lock").exists()


def test_two_of_a_kind_at_once_are_one_request(run):
    """Schedulers send a signal to the batch script, which passes it on, and to the process itself."""
    twice = "[os.kill(os.getpid(), signal.SIGTERM) or time.sleep(0.1) for _ in range(3)]"
    stopped = run("checkpoint.every=100", before=at_step_3(twice))
    assert stopped.status == 143, stopped.stderr
    assert stopped.steps == [3]


@pytest.mark.parametrize(("first", "second", "wait", "status"), [("TERM", "TERM", 1.2, 143), ("INT", "INT", 0.2, 130)])
def test_a_second_signal_ends_at_once_even_where_the_main_thread_hangs(run, tmp_path, first, second, wait, status):
    """It waits in C for a lock that it holds itself: Python's own handlers can never run."""
    hang = f"""
    import ctypes, threading
    while not os.path.isdir("{tmp_path}/run/checkpoints/2"):  # which is still being written
        time.sleep(0.01)
    def kill():
        os.kill(os.getpid(), signal.SIG{first})
        time.sleep({wait})
        os.kill(os.getpid(), signal.SIG{second})
    threading.Thread(target=kill).start()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
    stopped = run(before=at_step_3(hang))
    assert stopped.status == status, stopped.stderr
    assert "stopped at once by a second signal" in stopped.stderr
    assert stopped.steps == [2]
    if first == "TERM":
        finished = run()
        assert finished.status == 0, finished.stderr
        assert "resumed from step 2" in finished.stderr
        assert "that process is gone, the lock is taken over" in finished.stderr


WHILE_IT_IS_COMPILED = """
import os, signal, time
from neva_jax.training.ahead import CompiledAhead
def run(self):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1000)
CompiledAhead.run = run
"""


def test_a_signal_does_not_wait_for_the_compiler(run):
    stopped = run(before=WHILE_IT_IS_COMPILED)
    assert stopped.status == 143, stopped.stderr
    assert said(stopped.dir)[-1] == "stopped by signal 15 before step 1; the same command continues"


def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_run(run):
    stopped = run("data.workers=1", before=at_step_3("os.killpg(0, signal.SIGUSR1)"))
    assert stopped.status == 143, stopped.stderr
    assert stopped.steps[-1] == 3
    assert "data worker" not in stopped.stderr
