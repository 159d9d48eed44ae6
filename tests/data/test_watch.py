"""Workers that die, stop or wait for ever: an error that says so, and never a hang.

The workers are real processes."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from neva_jax.data import samples
from neva_jax.data.pipeline import batches
from neva_jax.data.watch import Board, Watched
from neva_jax.errors import WorkerError
from tests.data.rows import SIZE, conversation, write_rows

ROOT = Path(__file__).parents[2]


# Not in this process: it could not end, because Grain waits for ever for the rest of what a killed worker was sending.
SIGNAL_A_WORKER = """
    import multiprocessing, os, signal, sys, time
    from pathlib import Path
    from neva_jax.configfile import load_config
    from neva_jax.data.pipeline import batches
    from neva_jax.data.sources import Sources
    from neva_jax.data.tokenizer import Tokenizer
    from neva_jax.errors import WorkerError

    if __name__ == "__main__":
        name, number, timeout, *overrides = sys.argv[1:]
        config = load_config(None, overrides)
        sources = Sources(config.data, "train", 0, shuffle=True)
        stream = batches(sources, config, Tokenizer.from_file(config.model.tokenizer), 0, 800)
        board = Path(stream.board.path)
        for _ in range(4):
            next(stream)
        numbers = {stream.board.number(child.pid): child.pid for child in multiprocessing.active_children()}
        os.kill(numbers[int(number)], getattr(signal, name))
        stream.timeout, started = float(timeout), time.monotonic()
        try:
            while True:
                next(stream)
        except WorkerError as error:
            print(numbers[int(number)], board.exists(), time.monotonic() - started, error, sep="\\t", flush=True)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(0)
"""


def run_script(tmp_path, script, *arguments):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )


@pytest.mark.parametrize("number", [0, 1])
def test_a_worker_that_was_killed_is_named_at_once(small_overrides, tmp_path, number):
    overrides = [*small_overrides, "data.workers=2"]
    done = run_script(tmp_path, SIGNAL_A_WORKER, "SIGKILL", str(number), "60", *overrides)
    pid, board_exists, seconds, message = done.stdout.strip().split("\t")
    assert message.startswith(
        f"data worker {number} of 2 (process {pid}) was killed by SIGKILL, as the kernel does when memory runs out"
    )
    assert float(seconds) < 5  # half a second where the machine is idle
    assert board_exists == "False"


def test_a_worker_that_was_stopped_is_named_when_its_time_is_over(small_overrides, tmp_path):
    overrides = [*small_overrides, "data.workers=2"]
    done = run_script(tmp_path, SIGNAL_A_WORKER, "SIGSTOP", "1", "2", *overrides)
    pid, _, seconds, message = done.stdout.strip().split("\t")
    assert message.startswith("no batch for data.worker_timeout=2 seconds: ")
    assert f"data worker 1 of 2 (process {pid}), stopped, " in message
    assert "data worker 0" not in message
    assert 2 <= float(seconds) < 20


COUNT_WHAT_IS_READY = """
    import multiprocessing, os, signal, sys, time
    from neva_jax.configfile import load_config
    from neva_jax.data.pipeline import batches, batches_ahead
    from neva_jax.data.sources import Sources
    from neva_jax.data.tokenizer import Tokenizer
    from neva_jax.errors import WorkerError

    if __name__ == "__main__":
        config = load_config(None, sys.argv[1:])
        sources = Sources(config.data, "train", 0, shuffle=True)
        stream = batches(sources, config, Tokenizer.from_file(config.model.tokenizer), 0, 800)
        next(stream)
        time.sleep(3)
        children = multiprocessing.active_children()
        for child in children:
            os.kill(child.pid, signal.SIGSTOP)
        ready, stream.timeout = 0, 1
        try:
            while True:
                next(stream)
                ready += 1
        except WorkerError:
            print(ready, len(children), batches_ahead(len(children)), flush=True)
        for child in children:
            child.kill()
        os._exit(0)
"""


def test_no_more_batches_are_ready_than_there_is_room_for(small_overrides, tmp_path):
    """Of two workers that had time to make all 100, without those that a stopped worker's threads hold."""
    done = run_script(tmp_path, COUNT_WHAT_IS_READY, *small_overrides, "data.workers=2")
    ready, workers, room = map(int, done.stdout.split())
    assert workers == 2 and 2 * workers < ready <= room, done.stderr


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
    with pytest.raises(WorkerError) as error:
        list(batches(sources, settings, tokenizer, 0, 100 * SIZE))
    over.set()
    message = str(error.value)
    assert message.startswith("no batch for data.worker_timeout=1 seconds; ")
    assert f"{path}: row 7 (id 'row-7') has been read for 1 s" in message


# Workers import this file too, so their reads hang: in the system, as those from a network disk that is gone.
HANGING_READ = """
    import multiprocessing, os, sys, time
    from neva_jax.configfile import load_config
    from neva_jax.data import samples
    from neva_jax.data.pipeline import batches
    from neva_jax.data.sources import Sources
    from neva_jax.data.tokenizer import Tokenizer
    from neva_jax.errors import WorkerError

    samples.Samples._picture = lambda self, ref, name: os.read(os.pipe()[0], 1)

    if __name__ == "__main__":
        config = load_config(None, sys.argv[1:])
        sources = Sources(config.data, "train", 0, shuffle=False)
        stream = batches(sources, config, Tokenizer.from_file(config.model.tokenizer), 0, 20)
        stream.timeout = 60  # while the workers start
        next(stream)
        stream.timeout, started = config.data.worker_timeout, time.monotonic()
        try:
            while True:
                next(stream)
        except WorkerError as error:
            workers = {stream.board.number(child.pid): child.pid for child in multiprocessing.active_children()}
            print(workers[1], time.monotonic() - started, error, sep="\\t", flush=True)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(0)
"""


def test_a_read_that_never_ends_in_a_worker_is_named_with_its_row(small_overrides, tmp_path, pipe_row):
    override, path = pipe_row
    overrides = [*small_overrides, override, "data.workers=2", "train.global_batch=4", "data.worker_timeout=3"]
    done = run_script(tmp_path, HANGING_READ, *overrides)
    assert done.stdout, done.stderr
    pid, seconds, message = done.stdout.strip().split("\t")
    assert message.startswith("no batch for data.worker_timeout=3 seconds: ")
    assert f"data worker 1 of 2 (process {pid}) has been at {path}: row 7 (id 'row-7') for " in message
    assert "data worker 0" not in message
    assert 3 <= float(seconds) < 15


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


def test_the_first_batch_is_made_before_it_is_asked_for():
    """Reading 7B weights takes seconds, in which the workers start."""
    asked = threading.Event()

    def stream():
        asked.set()
        yield 1

    watched = Watched(stream(), 5, Board(0), str)
    assert asked.wait(5)
    assert next(watched) == 1


KILL_BEFORE_IT_IS_ASKED = """
    import multiprocessing, os, signal, sys, time
    from neva_jax.configfile import load_config
    from neva_jax.data.pipeline import batches
    from neva_jax.data.sources import Sources
    from neva_jax.data.tokenizer import Tokenizer
    from neva_jax.errors import WorkerError

    if __name__ == "__main__":
        config = load_config(None, sys.argv[1:])
        sources = Sources(config.data, "train", 0, shuffle=True)
        stream = batches(sources, config, Tokenizer.from_file(config.model.tokenizer), 0, 800)
        while not stream._ready.full():
            time.sleep(0.1)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        while multiprocessing.active_children():
            time.sleep(0.1)
        try:
            while True:
                next(stream)
        except WorkerError as error:
            print(error, flush=True)
        os._exit(0)
"""


def test_a_worker_that_died_before_a_batch_was_asked_for_is_named(small_overrides, tmp_path):
    done = run_script(tmp_path, KILL_BEFORE_IT_IS_ASKED, *small_overrides, "data.workers=1")
    assert done.stdout.startswith("data worker 0 of 1 (process "), done.stderr
    assert "was killed by SIGKILL" in done.stdout


LATE = """
    import sys, time
    from neva_jax.data.pipeline import _become_worker
    from neva_jax.data.transport import Transport
    from neva_jax.data.watch import Board

    board, transport = Board(1), Transport(1, 64)
    print(board.path, transport.path, flush=True)
    _become_worker(board, transport, int(sys.argv[1]), 0, 1)
    time.sleep(1000)
"""


def test_a_worker_whose_parent_ended_before_it_had_begun_ends_too(tmp_path):
    done = run_script(tmp_path, LATE, str(2**22 + 1))  # nobody's
    assert done.returncode == 1
    assert [path for path in done.stdout.split() if Path(path).exists()] == []


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
        pytest.param(
            "SIGKILL",
            "was killed by SIGKILL",
            marks=pytest.mark.thorough,  # above, without the run around it
        ),
        pytest.param(
            "SIGSTOP",
            "no batch for data.worker_timeout=2 seconds: data worker 0 of 1",
            marks=pytest.mark.thorough,  # tests/faults/test_watchdog.py has it too
        ),
    ],
)
def test_training_ends_with_status_1_and_one_line(small_overrides, tmp_path, name, message):
    overrides = [*small_overrides, "data.workers=1", "train.steps=40", "data.val=[]", "data.worker_timeout=60"]
    done = run_script(tmp_path, SIGNAL_AFTER_STEP_1.replace("NAME", name), *overrides, "checkpoint.every=100")
    assert done.returncode == 1, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
