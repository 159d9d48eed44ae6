"""Runs that hang, each for another reason, and runs whose loader gives up."""

import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from neva_jax.configfile import load_config
from neva_jax.data.sources import Sources
from neva_jax.training.watchdog import Watchdog
from tests.faults.conftest import said

ROOT = Path(__file__).parent.parent.parent

# Compiling and the first step have all the time that they need.
SHORT = """
from neva_jax.training.watchdog import Watchdog
alive = Watchdog.alive
def shorter(self, doing):
    if "step 2 " in doing:
        self.timeout = 3.0
    alive(self, doing)
Watchdog.alive = shorter
"""

HUNG_READ = """
import time
from neva_jax.data import samples
real = samples.Samples._picture
def picture(self, ref, name):
    if ref.row == ROW:
        time.sleep(1000)
    return real(self, ref, name)
samples.Samples._picture = picture
"""


def test_a_read_that_hangs_is_shown_with_its_row_and_what_is_done_is_saved(run, tiny):
    order = Sources(load_config(None, tiny).data, "train", 1234, shuffle=True).order
    row = next(order(sample).row for sample in (10, 11) if order(sample).row != 24)  # the one without an image
    damage = SHORT + HUNG_READ.replace("ROW", str(row))
    hung = run("train.steps=20", "checkpoint.every=100", before=damage)
    assert hung.status == 1, hung.stderr
    (step,) = hung.steps
    written = (hung.dir / "log.txt").read_text()
    for text in (hung.stderr, written):
        assert f"no step has been completed for guard.step_timeout=3 s: step {step + 1} waits for its batch" in text
        assert "the loader: 0 of 1 batches ready; the reading threads: at " in text
        assert re.search(rf"at \S+rows\.json: row {row} \(id 'shape-{row}'\) for \d+ s", text)
        assert re.search(r"the last batch: \S+rows\.json: row \d+ \(id '\S+'\), \S+rows", text)
        assert "Thread 0x" in text and ", line" in text and "in next_batch" not in text
        assert "in picture" in text  # the stack that hangs
        assert f"saving: all is saved up to step {step}" in text
    assert hung.stderr.splitlines()[-1].startswith("error: no step has been completed for guard.step_timeout=3 s: ")
    finished = run("train.steps=20", "checkpoint.every=100")
    assert finished.status == 0, finished.stderr
    assert f"resumed from step {step}" in finished.stderr


STOP_WORKERS = """
import multiprocessing, os, signal
real, calls = train.Meter.next, []
def next_batch(self, stream):
    batch = real(self, stream)
    calls.append(None)
    if len(calls) == 2:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGSTOP)
    return batch
train.Meter.next = next_batch
"""


def test_a_stopped_worker_is_named_by_the_watchdog_if_its_time_is_the_shorter(run):
    damage = SHORT + STOP_WORKERS
    hung = run("data.workers=1", "train.steps=60", "checkpoint.every=100", before=damage)
    assert hung.status == 1, hung.stderr
    assert re.search(r"the loader: 0 of 1 batches ready; data worker 0 of 1 \(process \d+\), stopped: ", hung.stderr)
    assert len(hung.steps) == 1
    assert "data.worker_timeout" not in hung.stderr


def test_a_stopped_worker_is_named_by_the_loader_else_and_what_is_done_is_saved(run):
    hung = run("data.worker_timeout=6", "data.workers=1", "train.steps=60", "checkpoint.every=100", before=STOP_WORKERS)
    assert hung.status == 1, hung.stderr
    assert hung.stderr.splitlines()[-1].startswith("error: no batch for data.worker_timeout=6 seconds: data worker 0")
    assert "guard.step_timeout" not in hung.stderr
    (step,) = hung.steps
    assert f"all is saved up to step {step}" in said(hung.dir)


HUNG_COMPILER = """
import time
from neva_jax.training.ahead import CompiledAhead
CompiledAhead.run = lambda self: time.sleep(1000)
"""


def test_a_compilation_that_never_ends_does(run):
    hung = run("guard.step_timeout=3", before=HUNG_COMPILER)
    assert hung.status == 1, hung.stderr
    assert "no step has been completed for guard.step_timeout=3 s: the step is compiled" in hung.stderr


HUNG_DEVICE = """
import time
import jax, numpy as np
make = train.configured_step
def hang(step):
    if step == 5:
        time.sleep(1000)
    return step
def configured_step(*arguments):
    real = make(*arguments)
    @jax.jit
    def slow(step):
        return jax.pure_callback(hang, jax.ShapeDtypeStruct((), np.int32), step)
    def train_step(*given):
        state, metrics = real(*given)
        return state._replace(step=slow(state.step)), metrics | {"loss": metrics["loss"] + 0 * slow(state.step)}
    return train_step
train.configured_step = configured_step
"""


def test_a_device_that_never_answers_ends_the_run_with_its_checkpoint_as_it_was(run):
    hung = run(before=SHORT + HUNG_DEVICE)
    assert hung.status == 1, hung.stderr
    assert "no step has been completed for guard.step_timeout=3 s: step 5 is computed" in hung.stderr
    assert "saving: no answer for 10 s" in hung.stderr or "saving: failed" in hung.stderr
    assert hung.steps == [2, 4]
    finished = run()
    assert finished.status == 0, finished.stderr
    assert "resumed from step 4" in finished.stderr


COLLECTIVE = """
    import sys, time
    from pathlib import Path
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from neva_jax.training.watchdog import Watchdog

    index, address, log = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, index)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    ones = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), np.ones(1, np.float32))
    add = jax.jit(jax.numpy.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    with Watchdog(3.0, log, lambda: "none", lambda: "not tried") as watchdog:
        for step in range(1, 100):
            watchdog.alive(f"step {step} is computed")
            if index == 1 and step == 3:
                print("asleep", flush=True)
                watchdog.timeout = 1000.0
                time.sleep(1000)
            assert float(add(ones)) == 2
"""


def test_a_process_that_waits_for_another_in_a_collective_ends(tmp_path):
    """Two real processes of jax.distributed over gloo; one of them sleeps."""
    (tmp_path / "script.py").write_text(textwrap.dedent(COLLECTIVE))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, str(tmp_path / "script.py")]
    processes = []
    for index in range(2):
        with (tmp_path / f"stderr-{index}").open("w") as stderr:
            arguments = [*command, str(index), address, str(tmp_path / f"log-{index}")]
            started = subprocess.Popen(arguments, env=environment, stderr=stderr, stdout=subprocess.PIPE, text=True)
            processes.append(started)
    try:
        assert any(line == "asleep\n" for line in processes[1].stdout)
        assert processes[0].wait(60) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    said = (tmp_path / "stderr-0").read_text()
    assert "no step has been completed for guard.step_timeout=3 s: step 3 is computed" in said
    assert "script.py" in said
    assert "saving: not tried" in said
    assert (tmp_path / "log-0").read_text().count("guard.step_timeout=3 s") == 2


# --- the thread itself -----------------------------------------------------------------------------------------------


def test_signs_of_life_keep_it_quiet(tmp_path):
    left = []
    with Watchdog(0.5, tmp_path / "log.txt", str, str, left.append) as watchdog:
        for step in range(8):
            watchdog.alive(f"step {step}")
            time.sleep(0.1)
    assert (left, (tmp_path / "log.txt").exists()) == ([], False)


def test_without_a_timeout_nothing_is_watched(tmp_path):
    before = threading.active_count()
    with Watchdog(None, tmp_path / "log.txt", str, str) as watchdog:
        watchdog.alive("step 1")
        assert threading.active_count() == before


@pytest.mark.parametrize("broken", ["loader", "save"])
def test_what_fails_or_hangs_while_it_ends_does_not_keep_it(broken, tmp_path, monkeypatch, capfd):
    def fail() -> str:
        if broken == "save":
            time.sleep(30)
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr("neva_jax.training.watchdog.SAVE_SECONDS", (0.3, 0.3))
    over = threading.Event()
    works = {"loader": lambda: "well", "save": lambda: "saved"} | {broken: fail}
    dog = Watchdog(0.2, tmp_path / "gone" / "log.txt", works["loader"], works["save"], lambda status: over.set())
    dog.__enter__()
    assert over.wait(10)
    said = capfd.readouterr().err
    expected = "saving: no answer for 0.3 s" if broken == "save" else "the loader: failed (ZeroDivisionError: no such"
    assert expected in said
