"""Memory that runs out, and memory that must not grow."""

import json

import pytest

from tests.faults.test_signals import at_step_3

# As the allocator of a GPU says it, at the n-th call of the step.
EXHAUSTED = """
import jax
make = train.configured_step
def configured_step(*arguments):
    real, calls = make(*arguments), []
    def train_step(*given):
        calls.append(None)
        if len(calls) == {call}:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\\nmore\\nlines")
        return real(*given)
    return train_step
train.configured_step = configured_step
"""


@pytest.mark.parametrize("call", [1, 5], ids=["first", "later"])
def test_a_device_without_memory_is_shown_the_plan_and_its_knobs(call, run):
    ended = run(before=EXHAUSTED.format(call=call))
    assert ended.status == 1, ended.stderr
    (first,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert first == (
        "error: out of memory on the device (JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.);"
        " what the run needs, and what would need less:"
    )
    plan = ended.stderr.partition(first)[2]
    assert "no plan" not in plan
    for word in ("parameters", "activations", "train.micro_batch"):
        assert word in plan, plan
    assert "Traceback" not in ended.stderr
    assert ended.steps == ([] if call == 1 else [2, 4])


def test_a_host_without_memory(run):
    ended = run(before=at_step_3("raise MemoryError('no 5 GiB')"))
    assert ended.status == 1, ended.stderr
    expected = "error: out of memory on the host (MemoryError: no 5 GiB); fewer data.workers need less; what the run"
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr


def test_another_error_of_the_device_is_no_lack_of_memory(run):
    ended = run(before=EXHAUSTED.format(call=3).replace("RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: defect in"))
    assert ended.status not in (0, 2), ended.stderr
    assert "out of memory" not in ended.stderr
    assert "INTERNAL: defect in" in ended.stderr


# What the process holds, at some steps, without files' pages, and without what malloc has kept for later.
MEASURED = """
import ctypes, gc, json, os
real, calls = train.Meter.next, []
def next_batch(self, stream):
    calls.append(None)
    if len(calls) in (1000, 1500, 2000):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        resident, of_files = map(int, open("/proc/self/statm").read().split()[1:3])
        held = dict(rss=(resident - of_files) * os.sysconf("SC_PAGE_SIZE"), files=len(os.listdir("/proc/self/fd")),
                    threads=len(os.listdir("/proc/self/task")))
        with open({log!r}, "a") as file:
            file.write(json.dumps(held) + "\\n")
    return real(self, stream)
train.Meter.next = next_batch
"""


def test_two_thousand_steps_hold_no_more_than_a_thousand(run, tmp_path):
    """Rows of the log, and checkpoints that come and go; pools of threads have grown by step 1000."""
    log = tmp_path / "held"
    options = ["train.steps=2000", "log.every=10", "checkpoint.every=100", "log.tensorboard=true"]
    short = ["data.template=plain", "data.max_length=48"]
    outcome = run(*options, *short, before=MEASURED.format(log=str(log)))
    assert outcome.status == 0, outcome.stderr
    held = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(held) == 3
    for name, more in (("rss", 20e6), ("files", 2), ("threads", 4)):
        assert held[-1][name] - held[0][name] <= more, held
