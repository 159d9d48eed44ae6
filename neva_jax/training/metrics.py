"""What a run says: `metrics.jsonl`, `bad_rows.jsonl`, `log.txt`, a loss plot, TensorBoard, W&B, and a progress line."""

import json
import math
import sys
import time
from datetime import datetime
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

PLOT_SECONDS = 10.0


def check_loggers(config: LogConfig) -> None:
    """Raises UserError where a logger is asked for whose package is not installed."""
    if config.wandb != "off" and find_spec("wandb") is None:
        raise UserError(f"log.wandb={config.wandb}: the package wandb is not installed; pip install wandb")
    if config.tensorboard and find_spec("tensorboardX") is None:
        raise UserError(
            "log.tensorboard=True: the package tensorboardX is not installed; pip install tensorboardX, or set "
            "log.tensorboard=false"
        )


class RunLog:
    """The logs of one run.

    Floats in `metrics.jsonl` are printed with all the digits that they need: what is read back is bit-equal.
    """

    def __init__(self, config: LogConfig, run_dir: Path, resumed_step: int, total_steps: int, run_config: Any):
        """`resumed_step`: rows after it were written by a run that was cut off; they are dropped."""
        self.run_dir, self.total_steps = run_dir, total_steps
        self._rows = _rewind(run_dir / "metrics.jsonl", resumed_step)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.bad_rows = _rewind(run_dir / "bad_rows.jsonl", resumed_step)
        self._bad = (run_dir / "bad_rows.jsonl").open("a", encoding="utf-8")
        self._text = (run_dir / "log.txt").open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(run_dir, resumed_step) if config.tensorboard else None
        self._wandb = _wandb(config, run_dir, run_config) if config.wandb != "off" else None
        self._plotted = 0.0
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=resumed_step, unit="step", disable=not self._interactive, dynamic_ncols=True
        )
        self._started, self._resumed_step = time.monotonic(), resumed_step

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._rows:
            self._plot()
        self._file.close()
        self._bad.close()
        self._text.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def say(self, message: str) -> None:
        """A line for people: on stderr and, with the time, in `log.txt`."""
        self._bar.clear()
        print(message, file=sys.stderr, flush=True)
        self._text.write(f"{datetime.now().isoformat(timespec='seconds')} {message}\n")
        self._text.flush()

    def values(self, name: str) -> dict[int, float]:
        """Step -> the value `name`, of every step for which it is logged."""
        return {row["step"]: row[name] for row in self._rows if name in row}

    def bad_row(self, record: dict[str, Any]) -> None:
        """One line of `bad_rows.jsonl`: `step` and what is known of a row that could not be used."""
        self._bad.write(json.dumps(record) + "\n")
        self._bad.flush()

    def advance(self, steps: int = 1) -> None:
        """Moves the progress bar."""
        self._bar.update(steps)

    def metrics(self, row: dict[str, float | int]) -> None:
        """One row: `step` and numbers."""
        self._rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in row.items() if name != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])
        self._show(row)
        if time.monotonic() - self._plotted > PLOT_SECONDS:
            self._plot()

    def _show(self, row: dict[str, float | int]) -> None:
        if "loss" not in row:
            self.say(f"step {row['step']}: val_loss {row['val_loss']:.4f}")
            return
        text = {
            "loss": f"{row['loss']:.4f}",
            "lr": f"{row['lr']:.2e}",
            "samples/s": f"{row['samples_per_s']:.1f}",
            "tokens/s": f"{row['tokens_per_s']:.0f}",
            "data wait": f"{row['data_wait_s']:.2f}s",
        }
        if self._interactive:
            self._bar.set_postfix(text)
            return
        done = row["step"] - self._resumed_step
        left = (time.monotonic() - self._started) / done * (self.total_steps - row["step"]) if done > 0 else math.nan
        self.say(
            f"step {row['step']}/{self.total_steps} "
            + " ".join(f"{name} {value}" for name, value in text.items())
            + f" ETA {left:.0f}s"
        )

    def _plot(self) -> None:
        from neva_jax.training.plot import plot_losses

        plot_losses(self._rows, self.run_dir / "plots" / "loss.png")
        self._plotted = time.monotonic()


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
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            rows.append(row)
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
