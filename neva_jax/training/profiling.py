"""A trace of some steps by jax.profiler."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from neva_jax.config import ProfileConfig


class Trace:
    """Traces the steps `start_step` … `start_step + steps - 1` of a run, or what a stopped run does of them."""

    def __init__(self, config: ProfileConfig, run_dir: Path):
        first = config.start_step
        self._steps = range(0) if first is None else range(first, first + config.steps)
        self._directory, self._running = run_dir / "profile", False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int, state: Any) -> None:
        """Starts or stops the trace where this step is the first of it, or the first after it."""
        if (step in self._steps) == self._running:
            return
        jax.block_until_ready(state)
        if self._running:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(str(self._directory))
        self._running = not self._running
