"""A stream of batches that ends in an error, never in silence, when what makes them is gone or stuck.

Grain's own iterator runs in a thread at once; who asks for a batch waits for that thread and looks around meanwhile:

    a worker has died      its exit status says so, half a second later at most, whatever batch was its next
    nothing comes          after `timeout` seconds, with what the workers are doing

What they are doing stands on a board: a small file that all map, with a line for each reading thread of each worker.

    [workers, THREADS, 3] f64     process id | the row that is being made, -1 between rows | the time it was begun
"""

import functools
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from neva_jax.errors import WorkerError, ends_with, forget

THREADS = 2  # reading threads of a worker
POLL = 0.25  # seconds
PROCESS_NAME = "grain-process-prefetch"  # what Grain calls its workers, and more
STATES = {"T": "stopped", "D": "waiting for a disk or network", "Z": "dead"}  # of processes in Linux


class Board:
    """What each worker is doing; picklable."""

    def __init__(self, workers: int, path: str | None = None):
        """`workers`: processes; 0: the threads of this process, as worker 0. `path`: of a board that is there."""
        self.workers, self.path, self._own = workers, path, 0
        if path is not None:
            self._lines = np.memmap(path, np.float64, "r+", shape=(workers, THREADS, 3))
            return
        self._lines = np.zeros((1, THREADS, 3))
        if workers:
            handle, self.path = tempfile.mkstemp(prefix="neva_jax-workers-")
            os.close(handle)
            self._lines = np.memmap(self.path, np.float64, "w+", shape=(workers, THREADS, 3))
            ends_with(self, self.path)
        self._lines[:, :, 1] = -1

    def __reduce__(self) -> tuple:
        return _opened, (self.workers, self.path)

    def close(self) -> None:
        """Takes the file away as soon as all workers have it; what ends all at once cannot do so."""
        if self.path is not None and self._lines[:, 0, 0].all():
            forget(self.path)
            self.path = None

    def enter(self, worker: int) -> None:
        """The calling process is worker `worker` from now on."""
        self._own = worker
        self._lines[worker, :, 0] = os.getpid()

    def say(self, line: int, row: int) -> None:
        """The calling worker's thread `line` begins a row; -1: it has ended one."""
        self._lines[self._own, line % THREADS, 1:] = row, time.time()

    def number(self, pid: int) -> int | None:
        """Which worker a process is; None if it has not begun."""
        found = np.flatnonzero(self._lines[:, 0, 0] == pid)
        return int(found[0]) if len(found) else None

    def rows(self, worker: int) -> list[tuple[int, float]]:
        """The rows that a worker is making, each with the seconds since it was begun; the oldest first."""
        lines = [(int(row), time.time() - since) for _, row, since in self._lines[worker].tolist() if row >= 0]
        return sorted(lines, key=lambda line: -line[1])


@functools.cache
def _opened(workers: int, path: str | None) -> Board:
    """A worker's board: one, however often it is sent to it, and still there when the file is not."""
    return Board(workers, path)


class Watched(Iterator):
    """`stream` with a watch over it; `describe` names a row by its number on the board."""

    def __init__(self, stream: Iterator, timeout: float, board: Board, describe: Callable[[int], str]):
        self.timeout, self.board, self.describe = timeout, board, describe
        self._processes: dict[int, Any] = {}
        self._ready: queue.Queue = queue.Queue(maxsize=1)
        self._left = threading.Event()
        weakref.finalize(self, self._left.set)
        before = {process.pid for process in multiprocessing.active_children()}
        self._look = functools.partial(_look, before, self._processes, board)
        if board.workers:
            threading.Thread(target=_look_on, args=(self._look, self._left), daemon=True).start()
        threading.Thread(target=_pump, args=(stream, self._ready, self._left), daemon=True).start()

    def __next__(self) -> Any:
        """The next batch.

        Raises:
          WorkerError: a worker has died, or nothing has come for `timeout` seconds.
          StopIteration: the stream is at its end.
        """
        if self._left.is_set():
            raise StopIteration
        started = time.monotonic()
        while True:
            self._check_processes()
            try:
                item, error = self._ready.get(timeout=POLL)
            except queue.Empty:
                if time.monotonic() - started > self.timeout:
                    raise WorkerError(self._stuck()) from None
                continue
            if error is None:
                return item
            self._left.set()
            if not isinstance(error, StopIteration):
                self._check_processes()
            raise error

    def _check_processes(self) -> None:
        self._look()
        for pid, process in list(self._processes.items()):
            if process.exitcode:
                raise WorkerError(f"{self._name(pid)} {_death(process.exitcode)}{self._making(pid)}")

    def _name(self, pid: int) -> str:
        number = self.board.number(pid)
        place = "a data worker that had not begun yet" if number is None else f"data worker {number}"
        return f"{place} of {self.board.workers} (process {pid})"

    def _making(self, pid: int) -> str:
        number = self.board.number(pid)
        rows = [] if number is None else self.board.rows(number)
        return f"; it was making {self.describe(rows[0][0])}" if rows else ""

    def state(self) -> str:
        """How many batches are ready, and the row that each worker is making, for a message."""
        lines = [f"{self._ready.qsize()} of {self._ready.maxsize} batches ready"]
        known = {number: pid for pid in list(self._processes) if (number := self.board.number(pid)) is not None}
        names = {number: self._name(pid) for number, pid in known.items()}
        states = {number: _state(pid) for number, pid in known.items()}
        for worker in range(max(self.board.workers, 1)):
            rows = self.board.rows(worker)
            doing = f"at {self.describe(rows[0][0])} for {rows[0][1]:.0f} s" if rows else "making no row"
            name = names.get(worker, f"data worker {worker}" if self.board.workers else "the reading threads")
            lines.append(f"{name}{f', {states[worker]}' if states.get(worker) else ''}: {doing}")
        return "; ".join(lines)

    def _stuck(self) -> str:
        text = f"no batch for data.worker_timeout={self.timeout:g} seconds"
        if not self.board.workers:
            rows = self.board.rows(0)
            return text + "".join(f"; {self.describe(row)} has been read for {age:.0f} s" for row, age in rows[:1])
        doing = []
        for pid in list(self._processes):
            state, number = _state(pid), self.board.number(pid)
            rows = self.board.rows(number) if number is not None else []
            if state or (rows and rows[0][1] > self.timeout / 2):
                at = f" has been at {self.describe(rows[0][0])} for {rows[0][1]:.0f} s" if rows else " makes no row"
                doing.append(f"{self._name(pid)}{f', {state},' if state else ''}{at}")
        return f"{text}: {'; '.join(doing) or 'the workers are slow, but not stuck; set a longer one'}"


def _look(before: set[int], processes: dict[int, Any], board: Board) -> None:
    """Puts the workers that have begun since `before` into `processes`: who is dead is no child any more."""
    for process in multiprocessing.active_children():
        if process.pid not in before and process.name.startswith(PROCESS_NAME):
            processes.setdefault(process.pid, process)
    board.close()


def _look_on(look: Callable[[], None], left: threading.Event) -> None:
    """The first batch may be asked for long after the workers have begun."""
    while not left.wait(POLL):
        look()


def _pump(stream: Iterator, ready: queue.Queue, left: threading.Event) -> None:
    """Moves batches into `ready` until nobody wants them."""
    while not left.is_set():
        try:
            item, error = next(stream), None
        except BaseException as caught:
            item, error = None, caught
        while not left.is_set():
            try:
                ready.put((item, error), timeout=POLL)
                break
            except queue.Full:
                continue
        if error is not None:
            return


def _death(code: int) -> str:
    if code > 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
    memory = ", as the kernel does when memory runs out (dmesg tells; fewer data.workers need less)"
    return f"was killed by {name}{memory if -code == signal.SIGKILL else ''}"


def _state(pid: int) -> str:
    """What Linux says a process that does not run is doing; empty where it runs, or nobody knows."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return ""
    return STATES.get(fields[0], "")
