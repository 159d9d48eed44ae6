"""The folder of `data.cache`: what is made once from a file and read again, named by what the file holds.

A name is a key of the file's content, so a changed file has another one and nothing stale is ever read. Entries appear
whole or not at all, so several processes may make the same one at once. Deleting the folder costs time, never data.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from neva_jax.errors import UserError
from neva_jax.files import replacing

_SAMPLE = 64 * 2**10


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
            raise OSError("no regular file")
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
    if not path.is_file():
        try:
            with replacing(path) as fresh:
                make(fresh)
        except OSError as error:
            raise UserError(
                f"data.cache={folder}: {name} cannot be written ({error.strerror or error}); name another folder"
            ) from None
    return path


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
