"""Places that a run writes to, none of which can stop it: each has a thread, and an error in it is told, not raised.

The loop hands work over and waits until it is done, but never longer than `BRIEFLY`; once a sink is behind, it is not
waited for until it has caught up. So lines are on disk at once where the disk is well, and a disk or a network that
hangs costs the loop half a second in all.

    files    what could not be written is kept and tried again, in order, with the next line and every `RETRY` seconds
    others   (TensorBoard, W&B, the plot) what failed is lost; after `TRIES` failures in a row the sink is switched off
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

BRIEFLY = 0.5  # seconds
RETRY = 10.0  # seconds
TRIES = 3
KEPT = 10_000  # pieces of work that wait at most; the oldest are dropped


class Sink:
    """One place: does the work that it is given in order, in a thread of its own."""

    def __init__(self, name: str, tell: Callable[[str], None], keeps: bool = False):
        """`tell` is told, from that thread, what fails; `keeps`: failed work is tried again."""
        self.name, self.keeps, self._tell = name, keeps, tell
        self._work: deque[Callable[[], None]] = deque()
        self._failures, self._slow, self._closing, self._off = 0, False, False, False
        self._changed = threading.Condition()
        self._tries = 0  # pieces of work begun, and `_work` looked at again: so that a failure wakes who waits
        self._thread = threading.Thread(target=self._run, name=f"log {name}", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], None], wait: bool = True) -> None:
        """Hands over; with `wait`, returns when it is done or has failed, but soon (see above)."""
        with self._changed:
            if self._off:
                return
            self._work.append(work)
            while len(self._work) > KEPT:
                self._work.popleft()
            self._changed.notify_all()
            if wait and not self._slow:
                tries = self._tries
                self._slow = not self._changed.wait_for(
                    lambda: not self._work or (self._failures and self._tries > tries), BRIEFLY
                )

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not self._work

    def close(self, seconds: float) -> bool:
        """Does what is left, failed work once more; whether that took no longer than `seconds`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._work:
                    self._changed.wait_for(lambda: self._work or self._closing)
                if not self._work:
                    return
                work, last = self._work[0], self._closing
            try:
                work()
                error = None
            except Exception as caught:
                error = caught
            self._count(error)
            with self._changed:
                if (error is None or not self.keeps) and self._work and self._work[0] is work:
                    self._work.popleft()
                if self._off:
                    self._work.clear()
                if not self._work:
                    self._slow = False
                self._tries += 1
                self._changed.notify_all()
                if error is not None and self.keeps:
                    if last:
                        return
                    waiting = len(self._work)
                    self._changed.wait_for(lambda waiting=waiting: self._closing or len(self._work) > waiting, RETRY)

    def _count(self, error: Exception | None) -> None:
        if error is None:
            if self._failures:
                self._tell(f"{self.name}: works again")
            self._failures = 0
            return
        self._failures += 1
        what = f"{self.name}: {describe(error)}"
        if self.keeps:
            if self._failures == 1:
                self._tell(f"{what}; training goes on, what could not be written is tried again")
        elif self._failures >= TRIES:
            self._off = True
            self._tell(f"{what}; switched off after {TRIES} failures, training goes on")
        elif self._failures == 1:
            self._tell(f"{what}; training goes on, the next row is tried again")


class LineFile:
    """A file to which whole lines are appended, or nothing."""

    def __init__(self, path: Path):
        self.path = path
        self._open()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, line: str) -> None:
        """Writes `line` and a line end; raises OSError, and then the file is as it was."""
        data, status = f"{line}\n".encode(), os.fstat(self._file)
        if not status.st_nlink:
            raise FileNotFoundError(2, "is gone", str(self.path))
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, status.st_size)
            raise

    def replace(self, write: Callable[[], None]) -> None:
        """Goes on with the file that `write` has put in this one's place."""
        write()
        os.close(self._file)
        self._open()

    def close(self) -> None:
        """Closes it."""
        os.close(self._file)


def describe(error: Exception) -> str:
    """An error in one line: its first, or what the operating system says."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be written ({error.strerror})"
    lines = str(error).strip().splitlines()
    return f"fails ({type(error).__name__}{f': {lines[0]}' if lines else ''})"
