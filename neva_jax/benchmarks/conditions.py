"""What a measurement must say about where it was made."""

import datetime
import os
import platform
from importlib import metadata


def conditions(*packages: str) -> dict:
    """Machine, date, and versions of `packages`; part of each row of a benchmark.

    load: the machine's load average when the row was made: others at work make a timing worthless.
    """
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
