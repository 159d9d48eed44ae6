"""Stopping in good order: a signal is remembered, the step under way ends, the state is saved.

    SIGTERM, SIGUSR1 (Slurm's --signal=USR1@120)    exit status 143
    SIGINT (Ctrl-C)                                 exit status 130
    a second one                                    ends the process at once, with the same status

Python runs its handlers between two of its own instructions, so not while the main thread waits for a device or for a
file system that hangs. The second signal must work there too: a thread reads every signal from a socket that the
interpreter's C handler writes to, and ends the process by itself.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from neva_jax.errors import leave_at_once
from neva_jax.parallel.peers import Peers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME = 1.0  # seconds within which another SIGTERM or SIGUSR1 is the same request: schedulers send several


class StopRequest:
    """A context in which the first signal of `SIGNALS` sets `signal`, and a second one ends the process.

    `leave` is called with the exit status by the second.
    """

    def __init__(self, leave: Callable[[int], None] = leave_at_once) -> None:
        self.signal: int | None = None
        self._leave, self._first = leave, 0.0
        self._previous: dict[int, object] = {}

    @property
    def status(self) -> int:
        """The exit status of a run that was stopped: 130 after SIGINT, else 143."""
        return 128 + (signal.SIGINT if self.signal == signal.SIGINT else signal.SIGTERM)

    @property
    def name(self) -> str:
        """What stopped the run, for people."""
        return "a notice of preemption" if self.signal is None else f"signal {self.signal:d}"

    def agreed(self, peers: Peers) -> bool:
        """Whether any process of the run was asked to stop: the answer is the same for all of them."""
        self.signal = peers.any(self.signal)
        return self.signal is not None

    def reached(self, step: int, peers: Peers) -> bool:
        """Whether the run stops after `step`, which has just been completed; to be asked once after each step.

        Where several processes train together, JAX's preemption service may have had a notice, too; that is a look at
        a local variable, and gives all of them the same step.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return True
        return self.agreed(peers)

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._reader.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number

    def _watch(self) -> None:
        """Reads one byte for each signal, of any kind: the number of the signal."""
        first: int | None = None
        while received := self._reader.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if first is None:
                first, self._first = number, time.monotonic()
                os.write(2, b"\nstopping: this step ends, then the state is saved; a second signal stops at once\n")
            elif number == signal.SIGINT or time.monotonic() - self._first > SAME:
                os.write(2, b"\nstopped at once by a second signal; the last checkpoint is as it was\n")
                self._leave(128 + (signal.SIGINT if first == signal.SIGINT else signal.SIGTERM))
                return
