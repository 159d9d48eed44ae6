"""A run that hangs ends, and says where: a thread that is told of every completed step.

When none has been completed for `guard.step_timeout` seconds, whatever the reason (a device or a collective that never
answers, a file system that hangs, a deadlock), the thread writes to stderr and to `log.txt` what was under way, what
the loader was doing and the stack of every Python thread, tries to save, and ends the process with status 1. Each of
these may hang as well, so each gets a thread and a bound.

A data worker that is stuck is found earlier, by the loader itself (`data.worker_timeout`, data/watch.py), unless that
is the longer time of the two.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType

from neva_jax.errors import leave_at_once

SAVE_SECONDS = (10.0, 300.0)  # to save, at least and at most; between them, as long as a step may take
SHOWN = 8  # rows of the last batch that are named


class Watchdog:
    """A context in which `alive` must be called every `timeout` seconds (None: need not)."""

    def __init__(
        self,
        timeout: float | None,
        log: Path,
        loader: Callable[[], str],
        save: Callable[[], str],
        leave: Callable[[int], None] = leave_at_once,
    ):
        """`loader`: says what the loader is doing; `save`: saves if it can and says what it did; `leave`: ends all."""
        self.timeout, self._log, self._loader, self._save, self._leave = timeout, log, loader, save, leave
        self._doing, self._rows, self._since = "starting", tuple, time.monotonic()
        self._over, self._fired = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.timeout is not None:
            self._since = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._park()

    def alive(self, doing: str) -> None:
        """Something was completed; what comes next is `doing`."""
        self._park()
        self._doing, self._since = doing, time.monotonic()

    def goes_on(self, doing: str, rows: Callable[[], Iterable[str]]) -> None:
        """The step under way is `doing` this now, with a batch whose rows `rows` names."""
        self._park()
        self._doing, self._rows = doing, rows

    def _park(self) -> None:
        """Once the time is over the run must not go on while its state is being saved."""
        if self._fired and threading.current_thread() is not self._thread:
            threading.Event().wait()

    def _watch(self) -> None:
        while not self._over.wait(min(self.timeout / 10, 1.0)):
            if time.monotonic() - self._since > self.timeout:
                self._fired = True
                self._end()
                return

    def _end(self) -> None:
        said = f"no step has been completed for guard.step_timeout={self.timeout:g} s: {self._doing}"
        self._say(said, stacks=True)
        for what, tell in (("the loader", self._loader), ("the last batch", self._last_rows)):
            self._say(f"{what}: {_bounded(tell, SAVE_SECONDS[0])}")
        least, most = SAVE_SECONDS
        self._say(f"saving: {_bounded(self._save, min(max(self.timeout, least), most))}")
        self._say(f"error: {said}; the stacks above and in log.txt say where; the same command continues")
        self._leave(1)

    def _last_rows(self) -> str:
        rows = list(self._rows())
        return ", ".join(rows[:SHOWN]) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "") or "none yet"

    def _say(self, message: str, stacks: bool = False) -> None:
        def write(file: int, line: str) -> None:
            with suppress(OSError):
                os.write(file, f"{line}\n".encode())
                if stacks:
                    faulthandler.dump_traceback(file, all_threads=True)

        def log() -> str:
            file = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            write(file, f"{datetime.now().isoformat(timespec='seconds')} {message}")
            os.close(file)
            return ""

        write(2, message)
        _bounded(log, SAVE_SECONDS[0])


def _bounded(work: Callable[[], str], seconds: float) -> str:
    """What `work` returns, or why it returns nothing, after so many seconds at most."""
    result: list[str] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            result.append(f"failed ({type(error).__name__}: {error})")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else f"no answer for {seconds:g} s"
