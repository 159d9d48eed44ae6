"""When checkpoints are made, which of them stay, and how the others go.

A folder of checkpoints holds, besides `STEP/`:

    STEP.writing…      being written: has no manifest yet, or is not whole (Orbax appends a name of its own)
    STEP.deleting      being deleted
    STEP.damaged…      put aside by --allow-fallback; nobody deletes these but people
"""

import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from neva_jax.training.manifest import sync_folder, write_manifest

WRITING, DELETING, DAMAGED = ".writing", ".deleting", ".damaged"
_COMMITTED = "_CHECKPOINT_METADATA"


class SaveTimes:
    """When to save: at multiples of `every` steps, and `minutes` after the last time.

    The clocks of several processes differ, and asking process 0 costs a collective: then minutes are looked at every
    `ask_every` steps only.
    """

    def __init__(self, every: int, minutes: float | None, ask_every: int):
        self.every, self.ask_every = every, ask_every
        self.seconds = math.inf if minutes is None else 60 * minutes
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after `step`; every process gets the same answer."""
        if step % self.every == 0:
            return True
        late = time.monotonic() - self._last >= self.seconds
        if math.isinf(self.seconds) or jax.process_count() == 1:
            return late
        return step % self.ask_every == 0 and bool(multihost_utils.broadcast_one_to_all(np.bool_(late)))

    def saved(self) -> None:
        """A save begins now."""
        self._last = time.monotonic()


@dataclass(frozen=True)
class Retention:
    """The rules of `checkpoint.keep`, `keep_every` and `keep_best`; what one of them keeps, stays."""

    keep: int | None
    keep_every: int | None = None
    keep_best: int = 0

    def kept(self, steps: Iterable[int], val_losses: Mapping[int, float]) -> set[int]:
        """The steps that stay; the newest always does.

        Args:
          val_losses: of validated steps. A step without one, or with one that is no finite number, is never among the
            best; of two with the same the older stays, as it would if the other had never come.
        """
        steps = sorted(set(steps))
        if self.keep is None:
            return set(steps)
        stay = set(steps[-max(self.keep, 1) :])
        if self.keep_every is not None:
            stay |= {step for step in steps if step % self.keep_every == 0}
        rated = [step for step in steps if math.isfinite(val_losses.get(step, math.nan))]
        stay |= set(sorted(rated, key=lambda step: (val_losses[step], step))[: self.keep_best])
        return stay


def steps_in(folder: Path) -> list[int]:
    """The steps whose checkpoints are complete, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.name.isascii())


def remove(step_dir: Path) -> None:
    """Deletes a checkpoint: it loses its name first, so that nobody ever finds a half of it.

    Raises:
      OSError: it cannot be renamed; what cannot be deleted after that goes with the next start.
    """
    doomed = step_dir.with_name(step_dir.name + DELETING)
    shutil.rmtree(doomed, ignore_errors=True)
    step_dir.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def seal(written: Path, step_dir: Path) -> int:
    """Gives a checkpoint that is whole its manifest and then its name; returns its bytes.

    Raises:
      OSError: the file system refuses.
    """
    size = write_manifest(written)
    written.rename(step_dir)
    sync_folder(step_dir.parent)
    return size


def set_aside(step_dir: Path) -> Path:
    """Renames a damaged checkpoint so that the run can write that step again; returns its new path."""
    for count in range(1, 1000):
        aside = step_dir.with_name(f"{step_dir.name}{DAMAGED}{'' if count == 1 else f'-{count}'}")
        if not aside.exists():
            break
    step_dir.rename(aside)
    return aside


def tidy(folder: Path) -> list[str]:
    """Ends what a killed run had begun: deletes the rest of saving and deleting, seals what only lacked its manifest.

    Only the one process that owns the run may do this. Returns a line for each thing that was done.
    """
    done = []
    for path in sorted(folder.glob("*")):
        step, _, rest = path.name.partition(".")
        if not step.isdecimal() or not path.is_dir():
            continue
        if f".{rest}" == WRITING and (path / _COMMITTED).is_file() and not (folder / step).exists():
            seal(path, folder / step)
            done.append(f"checkpoint {step} was whole, but its manifest was not written yet: sealed now")
        elif f".{rest}".startswith((WRITING, DELETING)) or rest.startswith("orbax-checkpoint-tmp"):
            shutil.rmtree(path, ignore_errors=True)
            what = "the rest of a deleted checkpoint" if f".{rest}" == DELETING else "an unfinished checkpoint"
            done.append(f"removed {what}, of step {step}")
    return done
