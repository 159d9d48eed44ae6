"""The errors that a user can mend, and how every command ends."""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

_SHORT_LIVED: set[str] = set()  # files that should not outlive this process


class UserError(Exception):
    """Bad usage, configuration or data: one line that says which key, file, row or field, and what to do."""


class RunError(Exception):
    """A run that had to stop: why, in one line, and what to do. What it had saved is there."""


class WorkerError(Exception):
    """A process or thread that loads data has died or hangs: which, and what it was doing. Nothing is lost."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s: one line, like every other error of a command."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; {self.prog} --help lists the flags")


def ending(error: BaseException) -> tuple[int, str]:
    """The exit status of a command that an error has ended, and what is to be said: one line, or a traceback."""
    if isinstance(error, UserError | WorkerError | RunError):
        return (2 if isinstance(error, UserError) else 1), f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's `main` and ends the process with the exit status that DESIGN fixes.

    0 done; 2 a `UserError`, printed as one line; 1 a `WorkerError` or `RunError`, printed as one line; 128 + signal
    after a stop that was saved (`main` returns it); anything else is a traceback and 1.
    """
    try:
        status = main()
    except (UserError, WorkerError, RunError, KeyboardInterrupt) as error:
        status, message = ending(error)
        print(message, file=sys.stderr)
    except BrokenPipeError:
        # The reader of our output went away (`… | head`): point stdout elsewhere so that the exit is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception:
        if not multiprocessing.active_children() and not _threads():
            raise
        traceback.print_exc()
        status = 1
    # What had to be saved is saved. Waiting helps nobody: for workers to finish batches that nobody reads, or, after
    # an error, for threads that compile what will not run, or that hang.
    if multiprocessing.active_children() or (status and _threads()):
        leave_at_once(status or 0)
    sys.exit(status)


def _threads() -> list[threading.Thread]:
    """Those that Python would wait for at its end."""
    own = threading.current_thread()
    return [thread for thread in threading.enumerate() if thread is not own and not thread.daemon]


def ends_with(owner: object, path: str) -> None:
    """The file is deleted when `owner` is collected, or when this process ends by way of `exit_with`."""
    _SHORT_LIVED.add(path)
    weakref.finalize(owner, forget, path)


def forget(path: str) -> None:
    """Deletes a file of `ends_with`, if it is still there."""
    _SHORT_LIVED.discard(path)
    with suppress(OSError):
        os.unlink(path)


def leave_at_once(status: int) -> NoReturn:
    """Ends this process and its children now, from any thread; no file of `ends_with` is left behind."""
    for child in multiprocessing.active_children():
        child.kill()
    for path in list(_SHORT_LIVED):
        forget(path)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
