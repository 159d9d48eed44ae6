"""What a run says: `metrics.jsonl`, `bad_rows.jsonl`, `skipped_steps.jsonl`, `log.txt`, a loss plot, TensorBoard, W&B,
and a progress line.

None of them can stop a run, or hold it up for more than a moment (sinks.py).
"""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from tqdm import tqdm

from neva_jax.config import LogConfig
from neva_jax.configfile import to_dict
from neva_jax.data.bad_rows import BadRowCount
from neva_jax.data.pipeline import Batch
from neva_jax.errors import UserError
from neva_jax.files import replacing
from neva_jax.training.sinks import LineFile, Sink, describe

PLOT_SECONDS = 10.0  # between plots
CLOSE_SECONDS = 60.0  # that the end of a run waits for what is not written yet


def check_loggers(config: LogConfig) -> None:
    """Raises UserError where a logger is asked for whose package is not installed."""
    if config.wandb != "off" and find_spec("wandb") is None:
        raise UserError(f"log.wandb={config.wandb}: the package wandb is not installed; pip install wandb")
    if config.tensorboard and find_spec("tensorboardX") is None:
        raise UserError(
            "log.tensorboard=True: the package tensorboardX is not installed; pip install tensorboardX, or set "
            "log.tensorboard=false"
        )


class Lines:
    """A file of lines of a run, and the sink that writes it."""

    def __init__(self, path: Path, tell: Callable[[str], None]):
        """Raises OSError: the file cannot be opened."""
        self.file = LineFile(path)
        self._sink = Sink(path.name, tell, keeps=True)

    def add(self, line: str) -> None:
        """Appends."""
        self._sink.do(partial(self.file.append, line))

    def rewind(self, step: int) -> None:
        """Drops the rows after a step."""
        self._sink.do(partial(self.file.replace, partial(_rewind, self.file.path, step)))

    def close(self) -> None:
        """Writes what is left; a disk that hangs is left behind."""
        if self._sink.close(CLOSE_SECONDS):
            self.file.close()


class RunLog:
    """The logs of one run.

    Floats in `metrics.jsonl` are printed with all the digits that they need: what is read back is bit-equal.
    """

    def __init__(self, config: LogConfig, run_dir: Path, resumed_step: int, total_steps: int, run_config: Any):
        """`resumed_step`: rows after it were written by a run that was cut off; they are dropped.

        Raises:
          UserError: the files cannot be written.
        """
        self.run_dir, self.total_steps = run_dir, total_steps
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=resumed_step, unit="step", disable=not self._interactive, dynamic_ncols=True
        )
        try:
            self._rows = _rewind(run_dir / "metrics.jsonl", resumed_step)
            self.bad_rows = _rewind(run_dir / "bad_rows.jsonl", resumed_step)
            _rewind(run_dir / "skipped_steps.jsonl", resumed_step)
            self._text = Lines(run_dir / "log.txt", self._print)
            self._file = Lines(run_dir / "metrics.jsonl", self.say)
            self._bad = Lines(run_dir / "bad_rows.jsonl", self.say)
        except OSError as error:
            raise UserError(f"run.dir={run_dir}: {error.filename} cannot be written ({error.strerror})") from None
        self._skipped: Lines | None = None
        self._plot_sink = Sink("plots/loss.png", self.say)
        # What may fail for reasons of its own: named, made now, written in a thread.
        events = partial(_tensorboard, run_dir, resumed_step)
        self._tensorboard = self._optional("TensorBoard", config.tensorboard, events)
        self._wandb = self._optional("W&B", config.wandb != "off", partial(_wandb, config, run_dir, run_config))
        self._plotted = 0.0
        self._started, self._resumed_step = time.monotonic(), resumed_step

    def _optional(self, name: str, wanted: bool, make: Callable[[], Any]) -> tuple[Any, Sink] | None:
        if not wanted:
            return None
        try:
            return make(), Sink(name, self.say)
        except Exception as error:
            self.say(f"{name}: {describe(error)}; training goes on without it")
            return None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):
            self._bar.close()
        if self._rows:
            self._plot(last=True)
        self._plot_sink.close(CLOSE_SECONDS)
        if self._tensorboard is not None:
            writer, sink = self._tensorboard
            sink.do(writer.close, wait=False)
            sink.close(CLOSE_SECONDS)
        if self._wandb is not None:
            run, sink = self._wandb
            sink.do(partial(run.finish, exit_code=0 if kind is None else 1), wait=False)
            sink.close(CLOSE_SECONDS)
        for lines in (self._file, self._bad, self._skipped, self._text):
            if lines is not None:
                lines.close()

    def say(self, message: str) -> None:
        """A line for people: on stderr and, with the time, in `log.txt`."""
        self._print(message)
        self._text.add(f"{datetime.now().isoformat(timespec='seconds')} {message}")

    def _print(self, message: str) -> None:
        with suppress(OSError, ValueError):  # whoever read it may be gone
            self._bar.clear()
            print(message, file=sys.stderr, flush=True)

    def values(self, name: str) -> dict[int, float]:
        """Step -> the value `name`, of every step for which it is logged."""
        return {row["step"]: row[name] for row in self._rows if name in row}

    def bad_row(self, record: dict[str, Any]) -> None:
        """One line of `bad_rows.jsonl`: `step` and what is known of a row that could not be used."""
        self._bad.add(json.dumps(record))

    def skipped_step(self, record: dict[str, Any]) -> None:
        """One line of `skipped_steps.jsonl`, a file that is there once a step was skipped."""
        if self._skipped is None:
            try:
                self._skipped = Lines(self.run_dir / "skipped_steps.jsonl", self.say)
            except OSError as error:
                self.say(f"skipped_steps.jsonl: {describe(error)}; step {record['step']} is missing in it")
                return
        self._skipped.add(json.dumps(record))

    def rewind(self, step: int) -> None:
        """Drops what was logged of the steps after this one: the run goes back to it."""
        self._rows = [row for row in self._rows if row["step"] <= step]
        self._file.rewind(step)
        with suppress(OSError):
            self._bar.update(step - self._bar.n)

    def advance(self, steps: int = 1) -> None:
        """Moves the progress bar."""
        with suppress(OSError):
            self._bar.update(steps)

    def metrics(self, row: dict[str, float | int]) -> None:
        """One row: `step` and numbers. Those that are not finite are left out."""
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        self._rows.append(row)
        self._file.add(json.dumps(row))
        numbers = {name: value for name, value in row.items() if name != "step"}
        if self._tensorboard is not None:
            writer, sink = self._tensorboard
            sink.do(partial(_add_scalars, writer, numbers, row["step"]))
        if self._wandb is not None:
            run, sink = self._wandb
            sink.do(partial(run.log, numbers, step=row["step"]))
        self._show(row)
        if time.monotonic() - self._plotted > PLOT_SECONDS:
            self._plot()

    def _show(self, row: dict[str, float | int]) -> None:
        if "val_loss" in row:
            self.say(f"step {row['step']}: val_loss {row['val_loss']:.4f}")
            return
        text = {
            "loss": f"{row['loss']:.4f}" if "loss" in row else "-",
            "lr": f"{row['lr']:.2e}",
            "samples/s": f"{row['samples_per_s']:.1f}",
            "tokens/s": f"{row['tokens_per_s']:.0f}",
            "data wait": f"{row['data_wait_s']:.2f}s",
        }
        if self._interactive:
            with suppress(OSError):
                self._bar.set_postfix(text)
            return
        done = row["step"] - self._resumed_step
        left = (time.monotonic() - self._started) / done * (self.total_steps - row["step"]) if done > 0 else math.nan
        self.say(
            f"step {row['step']}/{self.total_steps} "
            + " ".join(f"{name} {value}" for name, value in text.items())
            + f" ETA {left:.0f}s"
        )

    def _plot(self, last: bool = False) -> None:
        """In its thread; what comes while one is drawn is left out, but for the last."""
        from neva_jax.training.plot import plot_losses

        if last or self._plot_sink.idle:
            self._plot_sink.do(partial(plot_losses, list(self._rows), self.run_dir / "plots" / "loss.png"), wait=False)
        self._plotted = time.monotonic()


def _add_scalars(writer: Any, numbers: dict[str, float], step: int) -> None:
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)


def count_bad_rows(batch: Batch, count: BadRowCount, log: "RunLog | SilentLog", step: int) -> None:
    """Records and tells the rows that were met for the first time; raises UserError where the run may not go on."""
    for report in count.add(batch.bad_rows):
        log.bad_row(count.record(report, step))
        if report.kind == "bad":
            log.say(f"{'validation ' if count.split == 'val' else ''}skipped {report.message}")
        elif count.counts["dropped"] == 1:
            log.say(f"dropped {report.message}; bad_rows.jsonl lists this one and all that follow")
    count.check(batch.bad_rows, complete=batch.complete)


class SilentLog:
    """The log of a process that writes nothing: another one does. The same methods as `RunLog`, as far as runs call
    them."""

    bad_rows: tuple = ()

    def __enter__(self) -> "SilentLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def values(self, name: str) -> dict[int, float]:
        """Nobody asks this one alone."""
        return {}

    def say(self, message: str) -> None:
        """Nothing."""

    def bad_row(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def skipped_step(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def advance(self, steps: int = 1) -> None:
        """Nothing."""

    def metrics(self, row: dict[str, float | int]) -> None:
        """Nothing."""


def _rewind(path: Path, step: int) -> list[dict]:
    """Reads the rows up to `step` and drops the later ones (and a last line that was cut) from the file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= step:
                rows.append(row)
        except (json.JSONDecodeError, TypeError, KeyError):
            break
    with replacing(path) as fresh:
        fresh.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def _tensorboard(run_dir: Path, resumed_step: int) -> Any:
    from tensorboardX import SummaryWriter

    # purge_step hides what a run that was cut off wrote after its last checkpoint.
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)


def _wandb(config: LogConfig, run_dir: Path, run_config: Any) -> Any:
    import wandb

    # Kept in the run's directory, so that a resumed run goes on in the same W&B run, and no other run does.
    identity = run_dir / "wandb_id.txt"
    if not identity.exists():
        identity.write_text(uuid4().hex[:12])
    return wandb.init(
        project=config.wandb_project,
        name=config.wandb_name or run_dir.name,
        id=identity.read_text(),
        resume="allow",
        dir=str(run_dir),
        mode=config.wandb,
        config=to_dict(run_config),
    )
