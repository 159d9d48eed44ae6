"""Stopping in good order: a signal is remembered, the step under way ends, the state is saved."""

import os
import signal
from types import FrameType, TracebackType


class StopRequest:
    """A context in which the first SIGTERM or SIGINT sets `signal`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            os.write(2, b"\nstopping: this step ends, then the state is saved\n")  # print is not safe in a handler
        self.signal = number
