"""How much of the host's memory a save may take.

A save copies the state from the GPU into memory of the host that is pinned: only that is copied to at full speed. XLA
lets a process pin 64 GiB, but the state of a fully finetuned 7B is 76 GiB: no save of it would succeed. Its pool grows
with what is copied, to at most twice that; the limit is read once, when JAX first looks for devices.
"""

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
PART = 0.8  # of the memory that may be pinned; the rest is left to rows, workers and the page cache
DEFAULT_GIB = 64  # XLA's own limit
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
