"""What the processes of a run say to each other on the host, and how all of them end when one does.

A star: process 0 listens at the coordinator's address, and every process, itself included, keeps one connection to it.
A connection ends with its process, however that ends, so the others know of it at once; a machine that has vanished is
silent, and silence is told by the beats that both sides send. XLA's own collectives would wait for ever (NCCL) or end
in an error that names nobody (gloo), and JAX's coordination service aborts the process a hundred seconds later.

    process → 0    hello | exchange (value) | failed (status, message) | bye | beat
    0 → process    welcome (who is there) | exchanged (values) | ended (status, message) | beat

Messages are lines of JSON. Nothing here touches JAX.
"""

import json
import os
import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from neva_jax.errors import UserError, WorkerError, leave_at_once

T = TypeVar("T")
POLL = 0.25  # seconds between looks at the clock
BEAT = 1.0  # seconds between beats; a quarter of the time after which a silent process counts as dead, if that is less
GRACE = 3.0  # seconds in which the cause of an error may still become known
LINGER = 0.5  # seconds that process 0 outlives what it has told the others
LOCAL = ("localhost", "127.0.0.1", "::1")


class Peers:
    """The processes of a run; this one is alone. `Star` is the same for several."""

    index, count, timeout = 0, 1, 0.0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes, in their order: what JSON can hold. All of them make the same calls."""
        return [value]

    def any(self, value: T | None) -> T | None:
        """The first value of any process that is not None."""
        return next((one for one in self.exchange(value) if one is not None), None)

    def after_first(self, work: Callable[[], T]) -> T:
        """`work()`; process 0 ends it before the others begin, so that they find what it leaves on a shared disk."""
        if not self.first:
            self.exchange(None)
        result = work()
        if self.first:
            self.exchange(None)
        return result

    def agree(self, value: Any, what: str) -> None:
        """Raises UserError unless all processes have the same value: `what` it is, for the message."""
        values = self.exchange(value)
        for index, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"{what}: {other} in process {index}, {values[0]} in process 0")


ALONE = Peers()


def leave(index: int, status: int, message: str) -> NoReturn:
    """Says why, and ends this process at once: threads that hang in a collective could not be waited for."""
    prefix = f"process {index}: " if index else ""
    text = "".join(f"{prefix}{line}\n" for line in message.splitlines())
    sys.stdout.flush()
    # One write: lines of processes that end together do not mix.
    os.write(2, text.encode())
    leave_at_once(status)


class Star(Peers):
    """This process's connection to process 0, which also holds the other ends (`Hub`).

    timeout: seconds of silence after which a process counts as dead; may be changed.
    """

    def __init__(
        self,
        address: str,
        index: int,
        count: int,
        start_timeout: float,
        timeout: float = 60.0,
        end: Callable[[int, int, str], None] = leave,
    ):
        """Returns when all processes are there.

        Args:
          address: host:port of process 0.
          start_timeout: seconds until a process that has not come is given up.
          end: what is done with (index, status, message) when this process must end with the others.

        Raises:
          UserError: process 0 cannot listen there.
          WorkerError: process 0 cannot be reached. (Where others are missing, `end` is called.)
        """
        self.index, self.count, self.timeout, self._end = index, count, timeout, end
        self._results: queue.Queue = queue.Queue()
        self._ended, self._closed = threading.Event(), False
        self._start_timeout, self._welcome, self._names = start_timeout, False, [address]
        self._sending = threading.Lock()
        self.hub = Hub(address, count, start_timeout, lambda: self.timeout) if index == 0 else None
        self._socket = _connect(address, index, count, start_timeout)
        self._send({"hello": index, "of": count, "name": f"{socket.gethostname()}, process id {os.getpid()}"})
        threading.Thread(target=self._listen, daemon=True, name="peers").start()
        threading.Thread(target=self._beat, daemon=True, name="peers-beat").start()
        self._wait("welcome")

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; waits for the last of them."""
        self._send({"exchange": value})
        return self._wait("exchanged")

    def fail(self, status: int, message: str) -> None:
        """Tells the others to end with this exit status; returns when process 0 has heard it."""
        self._send({"failed": status, "message": message})
        self._ended.wait(GRACE)
        if self.hub is not None:
            time.sleep(LINGER)

    def cause(self) -> None:
        """Waits a little whether another process has caused an error in this one; if so, it is this one's end."""
        if self._ended.wait(GRACE):
            threading.Event().wait()  # the listening thread ends this process

    def close(self) -> None:
        """The good end: all processes call it, and none is missed afterwards."""
        self._closed = True
        self._send({"bye": self.index})
        self._ended.wait(GRACE)
        if self.hub is not None:
            self.hub.wait()
        self._socket.close()

    def _wait(self, kind: str) -> Any:
        name, content = self._results.get()
        if name != kind:
            raise RuntimeError(f"process {self.index} has waited for {kind!r} and got {name!r}")
        return content

    def _send(self, message: dict[str, Any]) -> None:
        data = _line(message)
        # The listening thread sees the same error, and knows what it means.
        with suppress(OSError), self._sending:
            self._socket.sendall(data)

    def _beat(self) -> None:
        while not self._closed and not self._ended.wait(min(BEAT, self.timeout / 4)):
            self._send({"beat": self.index})

    def _patience(self) -> float:
        return (
            self.timeout if self._welcome else 2 * self._start_timeout
        )  # until all are there, process 0 sends no beats

    def _listen(self) -> None:
        why = "its connection is gone"
        try:
            for message in _messages(self._socket, self._patience):
                if "welcome" in message:
                    self._welcome, self._names = True, message["welcome"]
                    self._results.put(("welcome", None))
                elif "exchanged" in message:
                    self._results.put(("exchanged", message["exchanged"]))
                elif "ended" in message:
                    self._finish(message["ended"], message["message"])
                    return
                elif "heard" in message:
                    self._ended.set()
                    return
        except TimeoutError as silence:
            why = str(silence)
        except OSError:
            pass
        if not self._closed:
            self._finish(1, f"error: {_death(0, self.count, self._names[0], why)}")

    def _finish(self, status: int, message: str) -> None:
        self._ended.set()
        if self.hub is not None:
            time.sleep(LINGER)
        self._end(self.index, status, message)


class Hub:
    """The middle of the star, in threads of process 0."""

    def __init__(self, address: str, count: int, start_timeout: float, timeout: Callable[[], float]):
        """Listens; raises UserError where that is not possible."""
        self.address, self.count, self.timeout = address, count, timeout
        host, port = split_address(address)
        try:
            if host in LOCAL:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                self._server = socket.create_server((host, port), family=family)
            elif socket.has_dualstack_ipv6():
                self._server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            else:
                self._server = socket.create_server(("", port))
        except OSError as error:
            raise UserError(
                f"the coordinator's address {address}: process 0 cannot listen there ({error.strerror}); name a host "
                "of its own and a free port"
            ) from None
        self._lock = threading.RLock()
        self._connections: dict[int, socket.socket] = {}
        self._names: dict[int, str] = {}
        self._left: set[int] = set()
        self._values: dict[int, Any] = {}
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True, name="hub").start()
        threading.Thread(target=self._beat, args=(start_timeout,), daemon=True, name="hub-beat").start()

    def wait(self) -> None:
        """Until all have said goodbye."""
        self._over.wait(self.timeout())
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="hub-serve").start()

    def _beat(self, start_timeout: float) -> None:
        limit = time.monotonic() + start_timeout
        while not self._over.wait(POLL):
            with self._lock:
                missing = [index for index in range(self.count) if index not in self._names]
                if missing and time.monotonic() > limit:
                    self._missing(missing, start_timeout)
                    return
                if not missing:
                    break
        while not self._over.wait(min(BEAT, self.timeout() / 4)):
            self._tell({"beat": 0})

    def _missing(self, missing: list[int], seconds: float) -> None:
        text = f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        there = "; ".join(f"{index} ({self._names[index]})" for index in sorted(self._names))
        self._end(
            1,
            f"error: {text} of {self.count} did not come within {seconds:g} seconds (--start-timeout) to "
            f"{self.address}; there are {there}",
        )

    def _serve(self, connection: socket.socket) -> None:
        index, why = None, "its connection is gone"
        try:
            for message in _messages(connection, self.timeout):
                if "hello" in message:
                    index = self._greet(connection, message)
                    if index is None:
                        return
                elif index is None:
                    return  # somebody who is no process of ours
                elif "exchange" in message:
                    self._collect(index, message["exchange"])
                elif "failed" in message:
                    with self._lock:
                        self._send(connection, {"heard": True})
                        self._left.add(index)
                        self._end(message["failed"], self._told(index, message["failed"], message["message"]), index)
                    return
                elif "bye" in message:
                    with self._lock:
                        self._send(connection, {"heard": True})
                        self._left.add(index)
                        if len(self._left) == self.count:
                            self._over.set()
        except TimeoutError as silence:
            why = str(silence)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # also somebody who talks otherwise
        with self._lock:
            if index is not None and index not in self._left:
                self._left.add(index)
                self._end(1, f"error: {_death(index, self.count, self._names[index], why)}", index)

    def _told(self, index: int, status: int, message: str) -> str:
        """What the others say of an error: all of one that the user can mend, else only what it was."""
        if status == 2:
            return message
        last = message.splitlines()[-1].removeprefix("error: ")
        return f"error: process {index} of {self.count} ({self._names[index]}) has ended: {last}"

    def _greet(self, connection: socket.socket, hello: dict[str, Any]) -> int | None:
        index, name = hello["hello"], hello["name"]
        with self._lock:
            problem = None
            if hello["of"] != self.count:
                problem = f"error: {hello['of']} processes are said to make the run, but process 0 says {self.count}"
            elif index in self._names:
                problem = f"error: process {index} is there twice: {self._names[index]}; {name}"
            if problem is not None:
                self._send(connection, {"ended": 2, "message": problem})
                self._end(2, problem)
                return None
            self._connections[index], self._names[index] = connection, name
            if len(self._names) == self.count:
                self._tell({"welcome": [self._names[index] for index in range(self.count)]})
        return index

    def _collect(self, index: int, value: Any) -> None:
        with self._lock:
            self._values[index] = value
            if len(self._values) == self.count:
                self._tell({"exchanged": [self._values[index] for index in range(self.count)]})
                self._values = {}

    def _end(self, status: int, message: str, but: int | None = None) -> None:
        """Ends all processes (but one). Process 0 hears it last: with it ends all speech."""
        self._tell({"ended": status, "message": message}, but)
        self._left.update(range(self.count))
        self._over.set()

    def _tell(self, message: dict[str, Any], but: int | None = None) -> None:
        data = _line(message)
        with self._lock:
            for index in sorted(self._connections, reverse=True):
                if index != but and index not in self._left:
                    self._send(self._connections[index], data)

    def _send(self, connection: socket.socket, message: dict[str, Any] | bytes) -> None:
        with suppress(OSError):  # its own thread learns that it is gone
            connection.sendall(message if isinstance(message, bytes) else _line(message))


def split_address(address: str) -> tuple[str, int]:
    """`host:port` -> host, port; an IPv6 host may stand in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not 0 < int(port) < 65536:
        raise ValueError(address)
    return host.removeprefix("[").removesuffix("]"), int(port)


def _connect(address: str, index: int, count: int, seconds: float) -> socket.socket:
    limit, reason = time.monotonic() + seconds, None
    while True:
        try:
            connection = socket.create_connection(split_address(address), timeout=max(POLL, seconds / 4))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(None)
            return connection
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > limit:
            raise WorkerError(
                f"process {index} of {count} did not reach process 0 at {address} within {seconds:g} seconds "
                f"(--start-timeout): {reason}"
            )
        time.sleep(POLL)


def _death(index: int, count: int, name: str, why: str) -> str:
    return f"process {index} of {count} ({name}) has died ({why}); the same command continues from the last checkpoint"


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _messages(connection: socket.socket, timeout: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """What comes, until the other side is gone.

    Raises:
      TimeoutError: nothing has come for `timeout()` seconds.
      OSError: the connection broke.
    """
    rest, heard = b"", time.monotonic()
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    while True:
        if not poll.poll(POLL * 1000):
            if time.monotonic() - heard > (limit := timeout()):
                raise TimeoutError(f"not heard of for {limit:g} seconds") from None
            continue
        data = connection.recv(1 << 16)
        if not data:
            return
        heard = time.monotonic()
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)
