"""Workers that die, stop or wait for ever: an error that says so, and never a hang.

The workers are real processes. What a worker does to itself is asked for by the name of an image.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from neva_jax.data import samples
from neva_jax.data.pipeline import batches
from neva_jax.data.watch import PROCESS_NAME, Board, Watched
from neva_jax.errors import WorkerError
from tests.data.rows import SIZE, conversation, write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stream(config, tokenizer):
    """Makes a stream and takes its first batches; its workers are gone after the test."""
    before = {process.pid for process in multiprocessing.active_children()}

    def make(*overrides, taken=2):
        settings, sources = config("data.workers=2", *overrides)
        made = batches(sources, settings, tokenizer, 0, 100 * SIZE)
        for _ in range(taken):
            next(made)
        return made

    yield make
    for process in multiprocessing.active_children():
        if process.pid not in before:
            process.kill()


def workers(stream):
    """Process ids by worker number."""
    found = {}
    while len(found) < stream.board.workers:
        for process in multiprocessing.active_children():
            if process.name.startswith(PROCESS_NAME) and (number := stream.board.number(process.pid)) is not None:
                found[number] = process.pid
    return found


def failure(stream, timeout=None):
    """The message of the error that the stream ends with, and the seconds until it came."""
    if timeout is not None:
        stream.timeout = timeout
    started = time.monotonic()
    with pytest.raises(WorkerError) as error:
        for _ in range(50):
            next(stream)
    return str(error.value), time.monotonic() - started


@pytest.mark.parametrize("number", [0, 1])
def test_a_worker_that_was_killed_is_named_at_once(stream, number):
    made = stream()
    pid = workers(made)[number]
    os.kill(pid, signal.SIGKILL)
    message, seconds = failure(made)
    assert message.startswith(
        f"data worker {number} of 2 (process {pid}) was killed by SIGKILL, as the kernel does when memory runs out"
    )
    assert seconds < 2


def test_a_worker_that_was_stopped_is_named_when_its_time_is_over(stream):
    made = stream()
    pid = workers(made)[1]
    os.kill(pid, signal.SIGSTOP)
    message, seconds = failure(made, timeout=1)
    assert message.startswith("no batch for data.worker_timeout=1 seconds: ")
    assert f"data worker 1 of 2 (process {pid}), stopped, " in message
    assert "data worker 0" not in message
    assert seconds < 10


def test_the_board_is_gone_from_the_disk_once_the_workers_have_it(stream):
    made = stream(taken=0)
    path = made.board.path
    for _ in range(4):
        next(made)
    assert not Path(path).exists()
    assert set(workers(made)) == {0, 1}


@pytest.fixture
def pipe_row(tmp_path):
    """20 rows without images, and one whose image waits for ever to be opened."""
    rows = [conversation(f"row-{i}", "Hi", f"It is {i}.") for i in range(20)]
    rows[7] = conversation("row-7", "<image>", "It is 7.", image="wait.png")
    return write_rows(tmp_path, rows)


def test_a_read_that_never_ends_is_named_with_its_row(config, tokenizer, pipe_row, monkeypatch):
    """In threads; a worker process says the same of its rows."""
    override, path = pipe_row
    settings, sources = config(override, "data.worker_timeout=1")
    over = threading.Event()
    monkeypatch.setattr(samples.Samples, "_picture", lambda self, ref, name: over.wait())
    message, seconds = failure(batches(sources, settings, tokenizer, 0, 100 * SIZE))
    over.set()
    assert message.startswith("no batch for data.worker_timeout=1 seconds; ")
    assert f"{path}: row 7 (id 'row-7') has been read for 1 s" in message
    assert seconds < 5


def test_an_error_of_the_code_comes_through(config, tokenizer, pipe_row, monkeypatch):
    settings, sources = config(pipe_row[0])

    def fail(self, ref, name):
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(samples.Samples, "_picture", fail)
    with pytest.raises(ZeroDivisionError, match="no such thing"):
        list(batches(sources, settings, tokenizer, 0, 100 * SIZE))


def test_a_stream_that_ended_stays_ended():
    watched = Watched(iter([1, 2]), 5, Board(0), str)
    assert list(watched) == [1, 2]
    assert list(watched) == []


def test_a_stream_that_is_slow_but_in_time_is_no_error():
    def slow():
        for i in range(3):
            time.sleep(0.4)
            yield i

    assert list(Watched(slow(), 1, Board(0), str)) == [0, 1, 2]


# --- whole commands --------------------------------------------------------------------------------------------------

SIGNAL_AFTER_STEP_1 = """
    import multiprocessing, os, signal, sys
    from neva_jax import train
    from neva_jax.errors import exit_with

    real = train.Meter.next

    def next_batch(self, stream):
        if stream.timeout == 60:
            batch, stream.timeout = real(self, stream), 2
            return batch
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.NAME)
        return real(self, stream)

    if __name__ == "__main__":
        train.Meter.next = next_batch
        exit_with(lambda: train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SIGKILL", "was killed by SIGKILL"),
        ("SIGSTOP", "no batch for data.worker_timeout=2 seconds: data worker 0 of 1"),
    ],
)
def test_training_ends_with_status_1_and_one_line(small_overrides, tmp_path, name, message):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SIGNAL_AFTER_STEP_1).replace("NAME", name))
    overrides = [*small_overrides, "data.workers=1", "train.steps=40", "data.val=[]", "data.worker_timeout=60"]
    done = subprocess.run(
        [sys.executable, str(script), *overrides, "checkpoint.every=1"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )
    assert done.returncode == 1, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
