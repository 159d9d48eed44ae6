"""Checkpoints: written in the background, complete or absent, and self-describing.

    RUN/checkpoints/STEP/
      state/         params (by component), optimizer, step, and ema where it is on: arrays, each process writes its
                     shards
      data/          JSON: samples consumed, plan of the rows, val_losses (step -> val_loss, of the run so far)
      meta/          what the checkpoint says of itself, and the tokenizer (training/checkpoint_meta.py)
      manifest.json  size and digest of every other file

`params` holds the trained components, and the frozen ones too unless they can be read from `base`, the checkpoint
that the run started from. Reading parameters follows that chain.

A save has three parts: the arrays are copied from the device (training waits); Orbax writes them to `STEP.writing`; the
manifest is made from what lies there, and `STEP.writing` becomes `STEP`. Only then are older checkpoints deleted.
"""

import logging
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from neva_jax.config import Config
from neva_jax.errors import RunError
from neva_jax.files import readable
from neva_jax.training.checkpoint_meta import Meta
from neva_jax.training.disk import free_there, reason
from neva_jax.training.manifest import DamagedCheckpoint, check_manifest
from neva_jax.training.retention import WRITING, Retention, remove, seal, steps_in

CHUNK_BYTES = 64 * 2**20
READ_AT_ONCE = 16  # GB
MOST_FAILURES = 2  # saves in a row that may fail before the run stops


class FilesHandler(ocp.CheckpointHandler):
    """Small files as one item of a checkpoint, committed together with its arrays."""

    def save(self, directory: epath.Path, args: "SaveFiles") -> None:
        """Writes the files into the item's directory: one process does, the files are the same for all."""
        if jax.process_index() == 0:
            for name, content in args.files.items():
                (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: "RestoreFiles | None" = None) -> dict[str, bytes]:
        """Reads all files of the item's directory."""
        return {path.name: path.read_bytes() for path in directory.iterdir()}


@ocp.args.register_with_handler(FilesHandler, for_save=True)
@dataclass
class SaveFiles(ocp.args.CheckpointArgs):
    """Arguments of `FilesHandler.save`: file name -> content."""

    files: dict[str, bytes]


@ocp.args.register_with_handler(FilesHandler, for_restore=True)
@dataclass
class RestoreFiles(ocp.args.CheckpointArgs):
    """Arguments of `FilesHandler.restore`."""


def _chunks(path: tuple, array: jax.Array) -> ocp.SaveArgs:
    """A large parameter is stored in pieces of a layer or less: what reads it piece by piece never holds it whole."""
    stacked = any(part.key == "layers" for part in path)
    if array.nbytes <= CHUNK_BYTES:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save when it is left.

    A save that fails is told by `news` and tried again by the next one; `MOST_FAILURES` in a row raise RunError, as
    does the last one of all. All methods are called by every process alike; process 0 does what is done once.
    """

    def __init__(self, run_dir: str | Path, keep: int | None, keep_every: int | None = None, keep_best: int = 0):
        self.directory = Path(run_dir).resolve() / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.retention = Retention(keep, keep_every, keep_best)
        self.blocked = 0.0  # seconds for which training waited for the last `save`
        # When one array cannot be written Orbax raises that, and asyncio prints all the others.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        # Folders are made at once: where they cannot be, the background would wait for them for minutes.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._step = -1
        self._failures, self._failure = 0, ""
        self._news: list[str] = []

    @classmethod
    def of(cls, config: Config) -> "Checkpoints":
        """Those of a run, kept as its configuration says."""
        kept = config.checkpoint
        return cls(config.run.dir, kept.keep, kept.keep_every, kept.keep_best)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # the error that is under way matters more than one of saving
        self._checkpointer.close()

    def save(
        self,
        step: int,
        params: dict,
        optimizer: Any,
        data: dict,
        meta: Meta,
        ema: dict | None = None,
        fp8: dict | None = None,
    ) -> None:
        """Starts to save; returns once the arrays are copied, and they are written while training goes on.

        Args:
          data: `val_losses` in it (step -> loss; JSON makes text of the steps) decides which checkpoints are the best.
          ema, fp8: the averaged weights and the FP8 state; None or empty: there are none.

        Raises:
          RunError: the saves before this one failed, and so did this one.
        """
        begun = time.monotonic()
        self._join()
        if (there := steps_in(self.directory)) and there[-1] >= step:
            raise RuntimeError(f"{self.directory}: step {step} cannot be saved; step {there[-1]} is there")
        self._step = step
        state = {"params": params, "optimizer": optimizer, "step": step} | ({"ema": ema} if ema else {})
        state |= {"fp8": fp8} if fp8 else {}
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(), state)
        for name in ("params", "ema"):
            if name in state:
                chunks[name] = jax.tree_util.tree_map_with_path(_chunks, state[name])
        writing = self.directory / f"{step}{WRITING}"
        try:
            if not self.directory.is_dir():  # Orbax would make it again, perhaps below a mount that is gone
                raise FileNotFoundError("the directory is gone")
            if jax.process_index() == 0:
                shutil.rmtree(writing, ignore_errors=True)
            self._checkpointer.save(
                writing,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state, save_args=chunks),
                    data=ocp.args.JsonSave(data),
                    meta=SaveFiles(meta.files()),
                ),
            )
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)
            return
        self.blocked = time.monotonic() - begun
        losses = {int(step): loss for step, loss in data.get("val_losses", {}).items()}
        self._thread = threading.Thread(target=self._complete, args=(step, begun, losses), name="checkpoint")
        self._thread.start()

    def _complete(self, step: int, begun: float, val_losses: dict[int, float]) -> None:
        """What is left of a save, in a thread of its own: until Orbax has written, then manifest, name, and pruning."""
        try:
            self._checkpointer.wait_until_finished()  # of all processes
            if jax.process_index() != 0:
                return
            step_dir = self.directory / str(step)
            size = seal(self.directory / f"{step}{WRITING}", step_dir)
            check_manifest(step_dir, "size")  # as it can be read from now on
            seconds, waited = time.monotonic() - begun, self.blocked * 1000
            self._news.append(
                f"checkpoint {step}: {readable(size)} in {seconds:.2f} s; training waited {waited:.0f} ms"
            )
        except Exception as error:
            self._error = error
            return
        for old in set(steps := steps_in(self.directory)) - self.retention.kept(steps, val_losses):
            try:
                remove(self.directory / str(old))
            except OSError as error:
                self._news.append(f"checkpoint {old} should go, but cannot be deleted ({reason(error)})")

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            self._failed(error)
        elif self._step >= 0:
            self._failures = 0

    def _failed(self, error: Exception) -> None:
        """Counts and tells a save that failed; raises RunError where there were too many."""
        self._failures += 1
        if jax.process_index() == 0:
            for path in self.directory.glob(f"{self._step}{WRITING}*"):  # what lies there takes up space
                shutil.rmtree(path, ignore_errors=True)
        steps = steps_in(self.directory)
        good = f"step {steps[-1]} is the newest good one" if steps else "there is none yet"
        self._failure = (
            f"{self.directory}: checkpoint {self._step} could not be written "
            f"({reason(error)}; {free_there(self.directory)}); {good}"
        )
        self._step = -1
        if self._failures >= MOST_FAILURES:
            raise RunError(f"{self._failure}; {self._failures} saves in a row failed") from error
        self._news.append(f"{self._failure}; training goes on, the next save tries again")

    def news(self) -> list[str]:
        """Lines for people, about saves that ended since the last call."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        lines, self._news = self._news, []
        return lines

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises RunError where it failed."""
        self._join()
        if self._failures:
            raise RunError(self._failure)

    def restore_fp8(self, step: int, fp8: dict) -> dict:
        """The FP8 state of a step onto the shardings of `fp8`, a tree of `jax.ShapeDtypeStruct`."""
        return read_state(self.directory / str(step), {"fp8": fp8})["fp8"]

    def restore(self, step: int, params: dict, optimizer: Any) -> tuple[dict, Any]:
        """The checkpoint of a step: (params, optimizer state), straight onto the shardings of the arguments.

        Args:
          params, optimizer: trees of `jax.ShapeDtypeStruct` with shardings; parts of the saved params may be left out.

        Raises:
          DamagedCheckpoint: it cannot be read.
        """
        step_dir = self.directory / str(step)
        try:
            state = read_state(step_dir, {"params": params, "optimizer": optimizer})
        except Exception as error:  # TensorStore raises a bare one
            raise DamagedCheckpoint(f"{step_dir}: cannot be restored ({reason(error)})") from error
        return state["params"], state["optimizer"]


def read_state(step_dir: Path, abstract: Any) -> Any:
    """The leaves of `abstract` (`jax.ShapeDtypeStruct`), and no others, of a saved state, onto their shardings."""
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_most_at_once(abstract))
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(
            (step_dir / "state").resolve(),
            args=ocp.args.PyTreeRestore(item=abstract, restore_args=arguments, partial_restore=True),
        )


def _most_at_once(abstract: Any) -> int:
    """GB that may be on the host at once while a state is read: Orbax would hold all of it there, 81 GB of a whole 7B.

    It refuses an array that is not smaller than this.
    """
    largest = max((leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)), default=0)
    return max(READ_AT_ONCE, largest // 10**9 + 1)
