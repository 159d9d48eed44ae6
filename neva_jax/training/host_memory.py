"""How much of the host's memory a save may take, and taking it before the first save.

A save copies the state from the GPU into memory of the host that is pinned: only that is copied to at full speed. XLA
lets a process pin 64 GiB, but the state of a fully finetuned 7B is 76 GiB: no save of it would succeed. Its pool grows
with what is copied, to at most twice that; the limit is read once, when JAX first looks for devices.

Pinning takes more than half a second for each GB of the pool, and what is pinned stays in it. So it is pinned while
weights are read, and training does not wait for it at its first save, which may be the one that a scheduler's signal
asks for. It ends before the step is compiled: while the driver pins no kernel starts, and XLA picks kernels by timing
them.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from neva_jax.files import readable

LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
PART = 0.8  # of the memory that may be pinned; the rest is left to rows, workers and the page cache
DEFAULT_GIB = 64  # XLA's own limit
WORTH_SAYING = 1.0  # seconds
CGROUPS = Path("/sys/fs/cgroup")


def allow_large_saves(environment: MutableMapping[str, str] = os.environ, cgroups: Path = CGROUPS) -> None:
    """Raises XLA's limit to `PART` of this machine's (or container's) memory; call it before JAX touches a device.

    A limit that `environment` names already stands, and XLA's own is never lowered. It is a bound of each process: each
    pins what its own part of the state needs.

    Args:
      cgroups: where the kernel shows the limits of groups of processes (a container, a batch system's job).
    """
    allowed = int(PART * min(_physical(), *map(_limit, _files(cgroups))) / 2**30)
    if allowed > DEFAULT_GIB:
        environment.setdefault(LIMIT, str(allowed))


class Reservation:
    """Pinned memory for saves of a state, taken in the background; nothing is taken where no GPU is.

    A context manager: on the way out no more is taken, but the block under way, up to half of the pool, is waited for.
    """

    def __init__(self, state: Any):
        """`state`: the arrays that will be saved, or `jax.ShapeDtypeStruct` with their shardings."""
        self.said = ""  # what people should know of it, once it has ended
        blocks = copied_blocks(state) if jax.default_backend() == "gpu" else []
        self._unwanted = threading.Event()
        self._thread = threading.Thread(target=self._pin, args=(blocks,), name="pinned memory", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._unwanted.set()
        self._thread.join()

    def _pin(self, blocks: list[tuple[jax.Device, int]]) -> None:
        begun = time.monotonic()
        wanted = readable(sum(size for _, size in blocks))
        held = []  # all together: what is given back would be taken again
        for device, size in blocks:
            if self._unwanted.is_set():
                return
            pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
            try:
                held.append(jax.block_until_ready(jax.device_put(np.empty(size, np.uint8), pinned)))
            except (MemoryError, jax.errors.JaxRuntimeError) as problem:
                taken = readable(sum(block.nbytes for block in held))
                self.said = (
                    f"only {taken} of the {wanted} of host memory that a save copies to could be pinned ({problem})"
                )
                return
        if (seconds := time.monotonic() - begun) > WORTH_SAYING:
            self.said = f"pinned {wanted} of host memory for saves in {seconds:.0f} s"

    def wait(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Returns when all is taken, or could not be; or once `unless` holds, which is asked ten times a second."""
        while self._thread.is_alive() and not unless():
            self._thread.join(0.1)


def copied_blocks(state: Any) -> list[tuple[jax.Device, int]]:
    """What a save copies off the devices of this process: (device, bytes) for each array on each, the largest first.

    Of a part that several devices hold, each copies its share, as Orbax does where the part can be divided so.
    """
    blocks = []
    for leaf in jax.tree.leaves(state):
        part = int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64))
        holders = max(1, len(leaf.sharding.device_set) * part // max(1, leaf.size))
        size = -(-part // holders) * leaf.dtype.itemsize
        blocks += [(device, size) for device in leaf.sharding.addressable_devices]
    return sorted(blocks, key=lambda block: block[1], reverse=True)


def _physical() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _files(cgroups: Path, own: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """The limits of this process' group and of all groups above it, by version 2 and 1 of Linux' cgroups."""
    yield cgroups / "memory.max"
    yield cgroups / "memory" / "memory.limit_in_bytes"
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        top, name = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
        if controllers in ("", "memory"):
            parts = Path(group.lstrip("/")).parts
            yield from (top.joinpath(*parts[:depth], name) for depth in range(1, len(parts) + 1))


def _limit(file: Path) -> float:
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # no such file, or "max": there is no limit
        return float("inf")
