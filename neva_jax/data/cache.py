"""The folder of `data.cache`: what is made once from a file and read again, named by what the file holds.

A name is a key of the file's content, so a changed file has another one and nothing stale is ever read. Entries appear
whole or not at all, so several processes may make the same one at once. Deleting the folder costs time, never data.

Using an entry changes its time, and holds a shared lock on it until the process ends. So `prune` can tell which entries
nobody has used for long, and takes none away that another process still has in use.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from neva_jax.errors import UserError
from neva_jax.files import replacing

UNUSED_DAYS = 30  # after so many days `prune` takes an entry away
_ENTRY = re.compile(r"(lengths|plan|ids|rows|tar|parquet|unpacked)-[0-9a-f-]+(-table|-names)?(\.npy)?")
_SAMPLE = 64 * 2**10
_MOST_HELD = 64
_held: dict[Path, int] = {}  # descriptors of the entries that this process uses
NOT_REGULAR = "no regular file"


def cache_folder(configured: str | None) -> Path:
    """`data.cache`, or neva_jax in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    if configured is not None:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neva_jax"


def file_key(*paths: str | Path) -> str:
    """32 hexadecimal digits for what files hold, wherever they lie.

    Each file counts with its size, its time of change and its first and last 64 KiB: reading a terabyte only to see
    whether it has changed would take longer than what the cache saves.

    Raises:
      UserError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            with open_regular(path) as file:
                status = os.fstat(file.fileno())
                digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
                digest.update(file.read(_SAMPLE))
                file.seek(max(status.st_size - _SAMPLE, 0))
                digest.update(file.read(_SAMPLE))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def open_regular(path: str | Path):
    """Opens a regular file to read bytes; a pipe, socket, device or directory is an OSError, and never waited for."""

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK)
        if not os.path.stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(NOT_REGULAR)
        return descriptor

    return open(path, "rb", opener=opener)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A block that one process of the machine at a time enters.

    Raises:
      UserError: no file can be written at `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"data.cache={path.parent}: cannot be written to ({error.strerror}); name another") from None
    with file:
        # A network file system without locks: two processes may then do the same work, but files appear whole.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The file `name` in the cache; where it is missing, `make` writes it to the path that it is given.

    Raises:
      UserError: the folder cannot be written to.
    """
    path = folder / name
    while not _hold(path):
        try:
            with replacing(path) as fresh:
                make(fresh)
        except OSError as error:
            raise UserError(
                f"data.cache={folder}: {name} cannot be written ({error.strerror or error}); name another folder"
            ) from None
    return path


def _hold(path: Path) -> bool:
    """Marks an entry as used, now and until this process ends; False: there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    with suppress(OSError):  # a folder that may only be read, or a file system without locks
        os.utime(path)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if (old := _held.pop(path, None)) is not None:
        os.close(old)
    _held[path] = descriptor
    while len(_held) > _MOST_HELD:  # of many plans, the last ones
        os.close(_held.pop(next(iter(_held))))
    return path.exists()  # `prune` may have taken it away before it was locked


def prune(folder: Path, say: Callable[[str], None]) -> None:
    """Takes away what nobody has used for UNUSED_DAYS days and no process of this machine holds, and says so in a line.

    Only files that are called as entries are: a folder that holds others keeps them.
    """
    count = size = 0
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        with suppress(OSError):
            status = path.lstat()
            if not _ENTRY.fullmatch(path.name) or time.time() - status.st_mtime < UNUSED_DAYS * 86400:
                continue
            with open_regular(path) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            count, size = count + 1, size + status.st_size
    if count:
        say(f"data.cache={folder}: deleted {count} entries ({size:,} bytes) that were not used for {UNUSED_DAYS} days")


def cached_array(folder: Path, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array `name`.npy in the cache, mapped into memory: all processes of a machine share its pages.

    A file that is no array (a disk was full) is made again.

    Raises:
      UserError: the folder cannot be written to.
    """

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, make())

    path = cached(folder, f"{name}.npy", write)
    try:
        return _mapped(path)
    except (ValueError, EOFError, OSError):
        path.unlink(missing_ok=True)
        return _mapped(cached(folder, f"{name}.npy", write))


def _mapped(path: Path) -> np.ndarray:
    # An empty file cannot be mapped, and indexing the plain view is several times faster than indexing a np.memmap.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.view(np.ndarray)
