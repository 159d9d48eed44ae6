"""One run per directory: `RUN/run.lock` says who trains there, and keeps everybody else out.

Two things hold a lock, because neither is enough on every file system:

    flock       ends with its process, however that ends; but some network file systems know it on one host only, or not
    heartbeat   the holder touches the file every `BEAT` seconds; one that is older than `STALE` was left by a process
                that is gone. An age is the difference of two times that the file server wrote: hosts' clocks may differ

On the holder's own host the process decides: it is there (with the same start time, because process ids come again) or
it is not. A lock that is stale is taken over, with a message. A holder whose lock was taken over, or whose directory is
gone, finds out within `BEAT` seconds: `lost` says so, and the run stops before it writes into another's files.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from neva_jax.errors import UserError

NAME = "run.lock"
BEAT = 10.0  # seconds
STALE = 60.0  # seconds without a heartbeat, on another host
SETTLE = 0.2  # seconds after which, without flock, a lock that was written is read again: the last writer has it


class RunLock:
    """A context in which this process alone trains in a directory, which is made."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / NAME
        self.lost: str | None = None  # why the run must stop
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "begun": _begun(os.getpid()),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self._left = threading.Event()

    def __enter__(self) -> "RunLock":
        """Takes the lock.

        Raises:
          UserError: another process has it (host, process id, since when), or the directory cannot be written to.
        """
        self._missing = [folder for folder in (self.run_dir, *self.run_dir.parents) if not folder.exists()]
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise UserError(f"run.dir={self.run_dir}: cannot be written to ({error.strerror})") from None
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join(BEAT)
        if self.lost is None:
            with suppress(OSError):
                self.path.unlink()
            for folder in self._missing:  # nothing was written: nothing stays
                with suppress(OSError):
                    folder.rmdir()
        os.close(self._file)

    def _take(self) -> None:
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locks = self._flock()
                held = _read(self._file)
                if not locks:
                    raise self._refusal(held)
                # Whoever had it may have taken the file away since it was opened.
                if not self._is_there():
                    os.close(self._file)
                    continue
                if held is not None:
                    self._judge(held)
                self._write()
                if self._flocked or self._confirmed():
                    return
                raise self._refusal(_read(self._file))
            except BaseException:
                with suppress(OSError):
                    os.close(self._file)
                raise

    def _flock(self) -> bool:
        """False where another process holds it; whether the file system has such locks is in `_flocked`."""
        self._flocked = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            self._flocked = False
        return True

    def _judge(self, held: dict[str, Any]) -> None:
        """Raises UserError if the holder that the file names is alive; else says that the lock is taken over."""
        who = _name(held)
        # The id of the boot stands in `begun`: hosts may share a name.
        if held.get("host") == self._me["host"] and _boot(held.get("begun")) == _boot(self._me["begun"]):
            # With flock in our hands the process can only be one that has ended, or this one, which was killed before
            # its number came again.
            if not self._flocked and _begun(held.get("pid", -1)) == held.get("begun") is not None:
                raise self._refusal(held)
            why = "that process is gone"
        else:
            age = self._age()
            if age < STALE:
                raise self._refusal(held, f"; its last sign of life is {age:.0f} s old, and counts for {STALE:.0f} s")
            why = f"its last sign of life is {age:.0f} s old"
        print(f"{self.path}: left by {who}; {why}, the lock is taken over", file=sys.stderr)

    def _age(self) -> float:
        """Seconds since the holder touched the file, by the file server's clock."""
        mine = self.path.with_name(f".{NAME}.{self._me['host']}.{os.getpid()}")
        mine.touch()
        try:
            return mine.stat().st_mtime - os.fstat(self._file).st_mtime
        finally:
            mine.unlink(missing_ok=True)

    def _refusal(self, held: dict[str, Any] | None, more: str = "") -> UserError:
        who = "another process" if held is None else _name(held)
        return UserError(f"run.dir={self.run_dir}: {who} trains there{more}; stop it, or name another run.dir")

    def _write(self) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(self._me).encode(), 0)
        os.fsync(self._file)

    def _confirmed(self) -> bool:
        time.sleep(SETTLE)
        return _read(self._file) == self._me and self._is_there()

    def _is_there(self) -> bool:
        """Whether the path still is the file that is open; raises OSError where nobody can tell."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._left.wait(BEAT):
            self.look()

    def look(self) -> None:
        """Touches the file, and sees whether it still is this process's."""
        try:
            there, now = self._is_there(), _read(self._file)
            if there and now == self._me:
                os.utime(self._file)
                return
        except OSError:  # a file system that does not answer now may do so later
            return
        if not self.run_dir.is_dir():
            self.lost = f"run.dir={self.run_dir}: is gone (deleted, or no longer mounted)"
        elif there and now is not None:
            self.lost = f"run.dir={self.run_dir}: was taken over by {_name(now)}"
        else:
            self.lost = f"{self.path}: was taken away"


def _name(held: dict[str, Any]) -> str:
    return f"process {held.get('pid')} on {held.get('host')}, since {held.get('since')},"


def _read(file: int) -> dict[str, Any] | None:
    """What the lock says; None where it says nothing (yet)."""
    try:
        held = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return None
    return held if isinstance(held, dict) else None


def _boot(begun: Any) -> str:
    return str(begun).rpartition("-")[0]


def _begun(pid: int) -> str | None:
    """When a process began, in ticks since the host did, with the id of that boot; None if there is no such process."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}-{ticks}"
    except (OSError, IndexError):
        return None
