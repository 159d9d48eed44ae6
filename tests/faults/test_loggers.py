"""Places that a run writes to, which fail or hang: training goes on, and one line says so."""

import pytest

from tests.faults.conftest import rows

SHORT = "from neva_jax.training import metrics\nmetrics.CLOSE_SECONDS = 0.5\nimport time\n"
STUB = """
import sys
class Run:
    def log(self, numbers, step):
        with open({calls!r}, "a") as file:
            file.write(f"{{step}}\\n")
        {fault}
    def finish(self, exit_code):
        pass
class Package:
    def init(**settings):
        return Run()
sys.modules["wandb"] = Package
Package.__spec__ = type(sys)("spec")
"""
BREAKS = "raise ConnectionError('no route')"
HANGS = "time.sleep(1000)"


def complete(outcome, steps=8):
    assert outcome.status == 0, outcome.stderr
    assert [row["step"] for row in rows(outcome.dir)] == list(range(1, steps + 1))
    assert outcome.steps[-1] == steps


def once(outcome, *lines):
    for line in lines:
        assert outcome.stderr.count(line) == 1, outcome.stderr


@pytest.mark.parametrize("fault", [BREAKS, HANGS], ids=["fails", "hangs"])
def test_wandb(fault, run, tmp_path):
    calls = tmp_path / "calls"
    outcome = run("log.wandb=online", before=SHORT + STUB.format(calls=str(calls), fault=fault))
    complete(outcome)
    tried = calls.read_text().split()
    if fault == HANGS:
        assert tried == ["1"]
    else:
        assert tried == ["1", "2", "3"]
        why = "W&B: fails (ConnectionError: no route)"
        once(outcome, f"{why}; training goes on", f"{why}; switched off after 3 failures, training goes on")


def test_wandb_that_is_dropped_for_one_row_goes_on(run, tmp_path):
    calls = tmp_path / "calls"
    fault = f"if step == 3: {BREAKS}"
    outcome = run("log.wandb=online", before=SHORT + STUB.format(calls=str(calls), fault=fault))
    complete(outcome)
    assert calls.read_text().split() == [str(step) for step in range(1, 9)]
    once(outcome, "W&B: fails (ConnectionError: no route); training goes on", "W&B: works again")


def test_tensorboard(run):
    damage = f"""
import tensorboardX
def add_scalar(*arguments):
    {BREAKS}
tensorboardX.SummaryWriter.add_scalar = add_scalar
"""
    outcome = run("log.tensorboard=true", before=SHORT + damage)
    complete(outcome)
    once(outcome, "TensorBoard: fails (ConnectionError: no route); switched off after 3 failures")


def test_tensorboard_that_cannot_begin(run):
    damage = """
import tensorboardX
def writer(*_, **named):
    raise PermissionError(13, "Permission denied")
tensorboardX.SummaryWriter = writer
"""
    outcome = run("log.tensorboard=true", before=damage)
    complete(outcome)
    once(outcome, "TensorBoard: cannot be written (Permission denied); training goes on without it")


@pytest.mark.parametrize("fault", [BREAKS, HANGS], ids=["fails", "hangs"])
def test_plot(fault, run):
    damage = f"""
from neva_jax.training import plot
def plot_losses(*arguments):
    {fault}
plot.plot_losses = plot_losses
metrics.PLOT_SECONDS = 0.0
"""
    outcome = run(before=SHORT + damage)
    complete(outcome)
    if fault == BREAKS:
        once(outcome, "loss.png: fails (ConnectionError: no route); switched off after 3 failures")


# Lines are written to a disk that is full from step 3 on, of which half still fits, until step `{until}`.
FULL = """
import errno, os
from types import SimpleNamespace
from neva_jax.training import sinks
full, calls = [], []
def write(file, data):
    if full:
        os.write(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return os.write(file, data)
sinks.os = SimpleNamespace(**{{name: getattr(os, name) for name in dir(os)}} | {{"write": write}})
real = train.Meter.next
def next_batch(self, stream):
    calls.append(None)
    full[:] = [True] if 3 <= len(calls) < {until} else []
    return real(self, stream)
train.Meter.next = next_batch
"""


def test_a_disk_that_is_full_for_a_while_loses_no_line_and_leaves_no_half(run):
    outcome = run(before=SHORT + FULL.format(until=6))
    complete(outcome)
    why = "cannot be written (No space left on device); training goes on, what could not be written is tried again"
    once(outcome, f"metrics.jsonl: {why}", "metrics.jsonl: works again", f"log.txt: {why}")
    written = (outcome.dir / "log.txt").read_text()
    assert [f"step {step}/8 " in written for step in range(1, 9)] == [True] * 8


def test_a_disk_that_stays_full_keeps_what_is_there(run):
    outcome = run(before=SHORT + FULL.format(until=100))
    assert outcome.status == 0, outcome.stderr
    assert outcome.steps[-1] == 8
    assert [row["step"] for row in rows(outcome.dir)] == [1, 2]
    assert "step 8/8 " in outcome.stderr
    once(outcome, "metrics.jsonl: cannot be written")


def test_files_at_their_size_limit(run, tmp_path):
    """As a quota: the system itself refuses the bytes."""
    damage = """
import os, resource
real, calls = train.Meter.next, []
def next_batch(self, stream):
    calls.append(None)
    if len(calls) == 5:
        os.ftruncate(2, 0)  # the limit is one for all files, and what is told must still fit
        size = os.path.getsize("{run}/metrics.jsonl") + 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    if len(calls) == 7:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return real(self, stream)
train.Meter.next = next_batch
"""
    outcome = run("checkpoint.every=100", before=SHORT + damage.replace("{run}", str(tmp_path / "run")))
    complete(outcome)
    once(outcome, "metrics.jsonl: cannot be written (File too large)", "metrics.jsonl: works again")


def test_a_metrics_file_that_somebody_deletes(run, tmp_path):
    damage = """
import os
real, calls = train.Meter.next, []
def next_batch(self, stream):
    calls.append(None)
    if len(calls) == 4:
        os.unlink("{run}/metrics.jsonl")
    return real(self, stream)
train.Meter.next = next_batch
"""
    outcome = run(before=SHORT + damage.replace("{run}", str(tmp_path / "run")))
    assert outcome.status == 0, outcome.stderr
    assert outcome.steps[-1] == 8
    once(outcome, "metrics.jsonl: cannot be written (is gone); training goes on")
