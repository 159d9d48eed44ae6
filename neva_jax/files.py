"""Output files that are whole or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neva_jax.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes its place when the block ends without error.

    Directories above `path` are made. Processes that write the same file at once do not disturb each other.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def check_output(flag: str, path: str | Path, source: str | Path | None = None) -> None:
    """Raises UserError if no file can be written at `path`, or `source` stands there: before the work is done."""
    path = Path(path)
    if source is not None and path.resolve() == Path(source).resolve():
        raise UserError(f"{flag} {path}: is the file that is read; name another")
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a directory; name a file")
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"{flag} {path}: {parent} is no directory")
            if not os.access(parent, os.W_OK):
                raise UserError(f"{flag} {path}: {parent} cannot be written to")
            return


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readable(size: int) -> str:
    """A number of bytes in GiB, or in MiB below one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
