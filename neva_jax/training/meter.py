"""How fast a run is."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from neva_jax.data.pipeline import Batch


def seconds_since_start() -> float:
    """Seconds since this process began, Python's own start and imports included (Linux)."""
    with open("/proc/self/stat", encoding="utf-8") as file:
        ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Meter:
    """Throughput since it was made."""

    samples: int = 0
    tokens: int = 0
    data_wait: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def next(self, stream: Iterator[Batch]) -> Batch:
        """The next batch; the time spent waiting for it is counted."""
        before = time.monotonic()
        batch = next(stream)
        self.data_wait += time.monotonic() - before
        return batch

    def count(self, batch: Batch) -> None:
        """Counts the samples of a batch, and its tokens without padding."""
        self.samples += batch.samples
        self.tokens += batch.tokens

    @contextmanager
    def paused(self, state: Any) -> Iterator[None]:
        """A context whose time does not count (validation, saving); what was started before it does."""
        jax.block_until_ready(state)
        before = time.monotonic()
        yield
        self.started += time.monotonic() - before

    def row(self) -> dict[str, float]:
        """Samples and tokens per second, and seconds spent waiting for data."""
        seconds = time.monotonic() - self.started
        return {
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "data_wait_s": self.data_wait,
        }
