"""Output folders that are whole or absent."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from neva_jax.errors import UserError
from neva_jax.files import readable


def check_folder(path: Path, force: bool, sources: tuple[Path, ...], size: int | None = None) -> None:
    """Before the work is done: whether a folder can be made at `path`, and whether `size` bytes have room.

    Raises:
      UserError: something is there (and no --force), it is one of the sources, or cannot be written, or has no room.
    """
    if any(path.resolve() == source.resolve() for source in sources):
        raise UserError(f"--out {path}: is the folder that is read; name another")
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path}: is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UserError(f"--out {path}: exists; name another folder, or add --force")
    if any(source.resolve().is_relative_to(path.resolve()) for source in sources):
        raise UserError(f"--out {path}: contains what is read; name another")
    for parent in path.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"--out {path}: {parent} is no directory")
            if not os.access(parent, os.W_OK):
                raise UserError(f"--out {path}: {parent} cannot be written to")
            free = shutil.disk_usage(parent).free
            if size is not None and free < size:
                raise UserError(f"--out {path}: needs up to {readable(size)}, but only {readable(free)} are free there")
            return


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that takes its place when the block ends without error.

    What was at `path` is deleted only after that. Directories above `path` are made.

    Raises:
      UserError: the disk is full, or another error of the file system.
    """
    path = path.absolute()
    fresh, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        yield fresh
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror or error})") from error
    finally:
        for _ in range(100):
            if not fresh.exists():
                break
            shutil.rmtree(fresh, ignore_errors=True)
            time.sleep(0.02)  # a write that is still under way in a thread of Orbax's makes the folder anew
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
