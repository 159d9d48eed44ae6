"""StopRequest with real signals to this process."""

import os
import signal

import pytest

from neva_jax.training.guard import StopRequest


@pytest.fixture(autouse=True)
def known_handlers():
    """Handlers of our own, so that a signal which StopRequest lets through fails the test and not the test run."""

    def unexpected(number, frame):
        raise AssertionError(f"signal {number} passed")

    before = {number: signal.signal(number, unexpected) for number in (signal.SIGTERM, signal.SIGINT)}
    yield unexpected
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def test_nothing_is_asked_at_first():
    with StopRequest() as stop:
        assert stop.signal is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered(number):
    with StopRequest() as stop:
        send(number)
        assert stop.signal == number
    assert stop.signal == number


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_after_another_signal_interrupts(first):
    with StopRequest() as stop:
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.signal == first


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_later_sigterm_interrupts_nothing(first):
    """A batch system may send it more than once while the state is saved."""
    with StopRequest() as stop:
        send(first)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.signal is not None


def test_handlers_are_restored(known_handlers):
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) is not known_handlers
    for number in (signal.SIGTERM, signal.SIGINT):
        assert signal.getsignal(number) is known_handlers
        with pytest.raises(AssertionError, match="passed"):
            send(number)


def test_handlers_are_restored_after_an_error(known_handlers):
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is known_handlers
    assert signal.getsignal(signal.SIGINT) is known_handlers
