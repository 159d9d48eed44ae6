"""Where a run kills itself with SIGKILL: `before=kill(POINT, when)` of `runs.Parent`.

`when` is the n-th time that the run comes to a point of `_points`, or, for "time", seconds after its first step.
"""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def kill(point: str, when: float) -> str:
    """Source that a run executes before it begins."""
    return f"from tests.faults.kills import arm\narm({point!r}, {when!r})"


def arm(point: str, when: float) -> None:
    """In the run: from now on it dies there."""
    from neva_jax.training import meter

    if point == "time":
        real_next, calls = meter.Meter.next, []

        def next_batch(self: Any, stream: Any) -> Any:
            calls.append(None)
            if len(calls) == 2:
                threading.Timer(when, _die).start()
            return real_next(self, stream)

        meter.Meter.next = next_batch
        return
    if point == "deleting":
        _die_while_deleting(when)
        return
    owner, name, side = _points()[point]
    real: Callable = getattr(owner, name)
    calls = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if side == "before" and len(calls) == when:
            _die()
        result = real(*arguments, **named)
        if side == "after" and len(calls) == when:
            _die()
        return result

    setattr(owner, name, counted)


def _points() -> dict[str, tuple[Any, str, str]]:
    """Point -> (object, name of its function, whether it is killed before or after the call)."""
    from neva_jax.training import checkpoint, manifest, meter, metrics, retention, validation

    return {
        "copied": (checkpoint.Checkpoints, "save", "after"),
        "committed": (checkpoint, "seal", "before"),
        "digesting": (manifest, "digest", "before"),
        "manifest": (retention, "write_manifest", "after"),
        "named": (checkpoint, "seal", "after"),
        "deleted": (checkpoint, "remove", "after"),
        "validating": (validation, "place_batch", "after"),
        "validated": (validation.Validation, "run", "after"),
        "logged": (metrics.RunLog, "metrics", "after"),
        "batch": (meter.Meter, "next", "after"),
    }


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _die_while_deleting(when: int) -> None:
    """With one file of the checkpoint gone, the others still there."""
    from neva_jax.training import retention

    calls = []

    def rmtree(path: Path, **named: Any) -> None:
        if path.name.endswith(retention.DELETING) and path.exists():
            calls.append(None)
            if len(calls) == when:
                next(file for file in path.rglob("*") if file.is_file()).unlink()
                _die()
        shutil.rmtree(path, **named)

    retention.shutil = SimpleNamespace(rmtree=rmtree)
