"""A trace of some steps by jax.profiler."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from neva_jax.config import ProfileConfig
from neva_jax.training.sinks import describe


class Trace:
    """Traces the steps `start_step` … `start_step + steps - 1` of a run, or what a stopped run does of them.

    A trace that fails is told by `say`, and the run goes on.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, say: Callable[[str], None]):
        first = config.start_step
        self._steps = range(0) if first is None else range(first, first + config.steps)
        self._directory, self._running, self._say = run_dir / "profile", False, say

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._running:
            self._toggle()

    def before(self, step: int, state: Any) -> None:
        """Starts or stops the trace where this step is the first of it, or the first after it."""
        if (step in self._steps) == self._running:
            return
        jax.block_until_ready(state)
        self._toggle()

    def _toggle(self) -> None:
        start, self._running = not self._running, not self._running
        try:
            if start:
                jax.profiler.start_trace(str(self._directory))
            else:
                jax.profiler.stop_trace()
        except Exception as error:
            self._say(f"the trace {describe(error)}; training goes on without it")
            self._steps, self._running = range(0), False
