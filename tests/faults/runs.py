"""Real processes that train, each for a fraction of what a start costs: one process imports everything, and forks them.

`Parent` runs this file as a script, which has neither a JAX backend nor threads. Each line on its stdin is a command:

    {"start": [arguments], "log": FILE, "before": SOURCE}     forks a run, which writes to FILE; answers its pid
    {"wait": PID, "seconds": S}                               answers its exit status; negative: a signal

SOURCE is Python, executed in the run before it begins: the damage that is done to it.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 120  # until a run is given up, and killed


class Parent:
    """The process that all runs are forked from; a context manager that ends it."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Parent":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, command: dict) -> int:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, arguments: list[str], log: Path, before: str = "") -> int:
        """Begins a run, leader of a process group; returns its process id."""
        return self._ask({"start": arguments, "log": str(log), "before": before})

    def wait(self, pid: int) -> int:
        """The exit status of a run; one that does not end is killed."""
        return self._ask({"wait": pid, "seconds": SECONDS})

    def run(self, arguments: list[str], log: Path, before: str = "") -> int:
        """`start` and `wait`."""
        return self.wait(self.start(arguments, log, before))


# --- the parent ------------------------------------------------------------------------------------------------------


def _child(command: dict) -> None:
    os.setpgid(0, 0)
    descriptor = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from neva_jax import train
    from neva_jax.errors import exit_with

    exec(command["before"], {"train": train})
    try:
        exit_with(lambda: train.main(command["start"]))
    except SystemExit as ended:
        status = ended.code or 0
    except Exception:
        traceback.print_exc()
        status = 1
    # All that an interpreter does at its end but for taking itself apart, which copies every page of the parent.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(pid: int, seconds: float) -> int:
    limit = time.monotonic() + seconds
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > limit:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])


def _serve() -> None:
    import orbax.checkpoint  # noqa: F401 (and all that a run imports late)
    from PIL import Image

    from neva_jax import train  # noqa: F401
    from neva_jax.data import resize
    from neva_jax.training import plot  # noqa: F401

    resize.resize(Image.new("RGB", (32, 32)), 16, 16)  # loads what Numba has compiled
    gc.freeze()  # what is here now is no garbage, and looking at it would copy its pages
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            print(_wait(command["wait"], command["seconds"]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(command)
        print(pid, flush=True)


if __name__ == "__main__":
    _serve()
