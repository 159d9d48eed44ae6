"""What a run says when memory runs out: which, what the plan says that it needs, and which settings need less."""

import jax

from neva_jax.config import Config
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.derived import parse_mesh_shape
from neva_jax.errors import RunError
from neva_jax.planning.knobs import knobs
from neva_jax.planning.memory import GIB, estimate
from neva_jax.planning.report import RESERVED_GIB, heading, knob_table, memory_table, verdict
from neva_jax.planning.speed import Machine, default_rate
from neva_jax.training.host_memory import LIMIT
from neva_jax.training.setup import with_vocabulary

MARKS = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "OUT_OF_MEMORY")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return any(mark in str(error) for mark in MARKS)
    return isinstance(error, MemoryError)


def out_of_memory(config: Config, error: BaseException) -> RunError:
    """The error of a run with `config` for which there was not enough memory: one line, then the plan and its knobs.

    `config`: as it was given; the vocabulary is the tokenizer's.
    """
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"
    if isinstance(error, MemoryError):
        first = f"out of memory on the host ({reason}); fewer data.workers need less"
    elif "host memory" in reason:
        first = f"out of pinned memory on the host ({reason}); {LIMIT} is its limit in GiB"
    else:
        first = f"out of memory on the device ({reason})"
    return RunError("\n".join([f"{first}; what the run needs, and what would need less:", *_plan(config)]))


def _plan(config: Config) -> list[str]:
    """The lines of `python -m neva_jax.plan` that are about memory."""
    try:
        config = with_vocabulary(config, Tokenizer.from_file(config.model.tokenizer))
        plan = estimate(config, parse_mesh_shape(config.mesh.shape, jax.device_count()))
        helps = knobs(plan, Machine(flops=default_rate(config) * 1e12, nvlink=450e9, network=50e9, per_node=8))
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        fits = [] if limit is None else ["", *verdict(plan, limit / GIB + RESERVED_GIB, helps)]
        return [*heading(plan), "", *memory_table(plan.memory, None, None), *fits, "", *knob_table(helps)]
    except Exception as error:  # no memory left even for that
        return [f"(no plan: {type(error).__name__}: {error}; python -m neva_jax.plan makes one)"]
