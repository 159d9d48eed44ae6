"""Steps timed as they follow one another in a run."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def run_steps(
    start: Callable[[int], Any], wait: Callable[[Any], float], steps: int, warmup: int
) -> tuple[list[float], list[float]]:
    """Runs `warmup` + `steps` steps and times the latter.

    Each step is started before the one before it has been waited for, as training does; so a step's time is that
    between two results, in which the device never waits for Python.

    Args:
      start: number of the step -> something to wait for.
      wait: waits for it; the loss of the step.

    Returns:
      (milliseconds of each timed step, losses of all steps)

    Raises:
      FloatingPointError: a loss is not finite: such a step may be fast, and is worth nothing.
    """
    times, losses = [], []
    pending = start(0)
    last = None
    for step in range(1, warmup + steps + 1):
        following = start(step) if step < warmup + steps else None
        losses.append(wait(pending))
        now = time.perf_counter()
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {step} is {losses[-1]}")
        if step > warmup:
            times.append(1e3 * (now - last))
        last, pending = now, following
    return times, losses


def spread(times: list[float]) -> dict[str, float]:
    """`step_ms` (median), `step_ms_p10`, `step_ms_p90` and `steps` of the milliseconds of steps."""
    low, middle, high = np.percentile(times, [10, 50, 90])
    return {
        "step_ms": round(float(middle), 3),
        "step_ms_p10": round(float(low), 3),
        "step_ms_p90": round(float(high), 3),
        "steps": len(times),
    }
