"""Real processes that train, for a fraction of what a start costs: one process imports everything and forks the rest.

`Forks` runs this file as a script (the parent of all runs). It has no JAX backend and no threads, so a fork of it is
as good as a new process (jemalloc's own thread, which pyarrow brings, knows of forks). Each line on its stdin is a run:
`{"arguments": […], "log": FILE, "kill": […] or null}`; its answer is `{"pid": N}` at once, and `{"status": N}` when the
run has ended (negative: the signal).

`kill` says where a run kills itself with SIGKILL: `["POINT", n]`, at the n-th time that it comes to a point of
`_points`, or `["time", seconds]` after its first step.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent.parent
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Forks:
    """The parent of runs; a context manager that ends it."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(30)

    def start(self, arguments: list[str], log: Path, kill: list | None = None) -> int:
        """Begins a run; returns its process id. Its stdout and stderr are added to the file `log`."""
        self._process.stdin.write(json.dumps({"arguments": arguments, "log": str(log), "kill": kill}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())["pid"]

    def wait(self) -> int:
        """The exit status of the run that was begun last; negative: the signal that ended it."""
        return json.loads(self._process.stdout.readline())["status"]

    def run(self, arguments: list[str], log: Path, kill: list | None = None) -> int:
        """`start` and `wait`."""
        self.start(arguments, log, kill)
        return self.wait()


# --- the parent ------------------------------------------------------------------------------------------------------


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


def _arm(kill: list) -> None:
    from neva_jax.training import meter

    point, when = kill
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


def _child(run: dict) -> None:
    descriptor = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from neva_jax import train
    from neva_jax.errors import exit_with

    if run["kill"] is not None:
        _arm(run["kill"])
    exit_with(lambda: train.main(run["arguments"]))


def _serve() -> None:
    import numba  # noqa: F401 (and all that a run imports late)
    import orbax.checkpoint  # noqa: F401

    from neva_jax import train  # noqa: F401
    from neva_jax.data import images, resize  # noqa: F401
    from neva_jax.training import plot  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
            os._exit(99)
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    _serve()
