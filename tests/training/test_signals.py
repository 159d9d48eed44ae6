"""StopRequest with real signals to this process."""

import os
import signal
import time

import pytest

from neva_jax.parallel.peers import ALONE, Peers
from neva_jax.training.signals import SAME, SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def known_handlers():
    """Handlers of our own, so that a signal which StopRequest lets through fails the test and not the test run."""

    def unexpected(number, frame):
        raise AssertionError(f"signal {number} passed")

    before = {number: signal.signal(number, unexpected) for number in SIGNALS}
    yield unexpected
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def test_nothing_is_asked_at_first():
    with StopRequest() as stop:
        assert stop.signal is None


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered(number):
    with StopRequest() as stop:
        send(number)
        assert stop.signal == number
    assert stop.signal == number


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("first", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_an_interrupt_after_another_signal_ends_the_process(first, status):
    ended = []
    with StopRequest(leave=ended.append) as stop:
        send(first)
        wait_for(lambda: stop._first > 0)
        assert not ended
        send(signal.SIGINT)
        wait_for(lambda: ended)
        assert (stop.signal, stop.status) == (first, status)
    assert ended == [status]


def test_a_repeated_sigterm_is_the_same_request_at_first_and_a_second_one_later():
    """A batch system may send it more than once while the state is saved."""
    ended = []
    with StopRequest(leave=ended.append) as stop:
        send(signal.SIGTERM)
        wait_for(lambda: stop._first > 0)
        send(signal.SIGTERM)
        time.sleep(0.1)
        assert not ended
        stop._first -= SAME
        send(signal.SIGTERM)
        wait_for(lambda: ended)
    assert ended == [143]


def test_processes_agree_on_the_signal_of_any():
    class Others(Peers):
        def exchange(self, value):
            return [value, int(signal.SIGTERM)]

    with StopRequest() as stop:
        assert not stop.reached(1, ALONE)
        assert stop.reached(2, Others())
        assert (stop.signal, stop.status) == (signal.SIGTERM, 143)


def test_handlers_are_restored(known_handlers):
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) is not known_handlers
    for number in SIGNALS:
        assert signal.getsignal(number) is known_handlers
        with pytest.raises(AssertionError, match="passed"):
            send(number)


def test_handlers_are_restored_after_an_error(known_handlers):
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is known_handlers
    assert signal.getsignal(signal.SIGINT) is known_handlers
