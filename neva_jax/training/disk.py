"""Whether a run's directory can hold what the run will write, and what the disk says when it cannot."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax

from neva_jax.errors import UserError
from neva_jax.files import readable
from neva_jax.training.retention import steps_in


def reason(error: BaseException) -> str:
    """Why something could not be read or written, in one line: the file system's own words where they are in it."""
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    for known in ("No space left on device", "Read-only file system", "File too large", "Disk quota exceeded"):
        if known in text:
            return known
    return text[:300]


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def free_there(path: Path) -> str:
    """How much room the file system of `path` has, in words."""
    try:
        return f"{readable(shutil.disk_usage(_existing(path)).free)} are free there"
    except OSError as error:
        return f"its free space cannot be told: {reason(error)}"


def probe(run_dir: Path, stored: Any) -> None:
    """Before the first step: whether `run_dir` can be written to, and has room for two checkpoints (process 0 asks).

    A new checkpoint is whole before an older one is deleted, so two must fit; one that is there has its room already.

    Args:
      stored: the arrays of a checkpoint, or their shapes.

    Raises:
      UserError: it cannot be, or has not.
    """
    if jax.process_index() != 0:
        return
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
    folder = run_dir / "checkpoints"
    trial = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"probe")
        trial.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"run.dir={run_dir}: cannot be written to ({reason(error)})") from None
    needed = size * (1 if steps_in(folder) else 2)
    if free < needed:
        raise UserError(
            f"run.dir={run_dir}: a checkpoint takes {readable(size)}, and two must fit, but only {readable(free)} are "
            "free there; free some, or name another run.dir"
        )
