"""What the checkpoints of a run are, for people: `python -m neva_jax.checkpoint` prints it."""

import json
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from neva_jax.config import COMPONENTS
from neva_jax.derived import trained_components
from neva_jax.errors import UserError
from neva_jax.files import readable
from neva_jax.training.checkpoint_meta import Meta, available_components, read_data, read_meta, verify
from neva_jax.training.manifest import DamagedCheckpoint, Level, Progress, size_of
from neva_jax.training.retention import steps_in
from neva_jax.training.weights import saved_shapes


@dataclass(frozen=True)
class Finding:
    """How a checkpoint stands against its manifest: `good`, `no digests` (format 1) or `damaged`, and why."""

    state: str
    reason: str = ""


def step_dirs(path: Path) -> list[Path]:
    """The checkpoints that `path` means, oldest first: those of a run or of its `checkpoints`, or one step itself.

    Raises:
      UserError: there is none.
    """
    for folder in (path / "checkpoints", path):
        if steps := steps_in(folder):
            return [folder / str(step) for step in steps]
    if (path / "meta" / "meta.json").is_file():
        return [path]
    raise UserError(f"--run {path}: holds no checkpoint; name a run's directory, or a step in its checkpoints/")


def examine(step_dir: Path, level: Level, progress: Progress | None = None) -> Finding:
    """Holds a checkpoint against its manifest, and reads what it says of itself."""
    try:
        note = verify(step_dir, level, progress)
        read_meta(step_dir)
    except DamagedCheckpoint as error:
        return Finding("damaged", str(error))
    return Finding("good") if note is None else Finding("no digests", note)


def val_losses(dirs: list[Path]) -> dict[int, float]:
    """Step -> val_loss, as far as checkpoints or the run's metrics.jsonl know it."""
    losses: dict[int, float] = {}
    for step_dir in dirs:
        try:
            losses |= {int(step): loss for step, loss in read_data(step_dir).get("val_losses", {}).items()}
        except DamagedCheckpoint:
            continue
    log = dirs[-1].parent.parent / "metrics.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "val_loss" in row:
            losses[row["step"]] = row["val_loss"]
    return losses


def resumes(meta: Meta, step_dir: Path) -> str:
    """What the checkpoint can be gone on from: a run, or a new run's weights."""
    if not (step_dir / "data").is_dir():
        return f"weights of {', '.join(meta.components)} for model.init_from"
    try:
        lacking = [name for name in COMPONENTS if name not in available_components(step_dir)]
    except UserError as error:
        return f"nothing: {error}"
    if lacking:
        return f"nothing: it has no {' and no '.join(lacking)}"
    trained = ", ".join(trained_components(meta.config.model))
    return f"step {meta.step + 1} of {meta.config.train.steps}, training {trained}"


def list_lines(dirs: list[Path]) -> list[str]:
    """A table with a row for each checkpoint; its digests are not compared, but names and sizes of its files are."""
    losses = val_losses(dirs)
    best = min((step for step in losses if math.isfinite(losses[step])), key=lambda s: (losses[s], s), default=None)
    rows = [("step", "size", "saved", "val_loss", "files", "resumes")]
    for step_dir in dirs:
        finding = examine(step_dir, "size")
        if finding.state == "damaged":
            rows.append((step_dir.name, readable(size_of(step_dir)), "", "", "damaged", finding.reason))
            continue
        meta = read_meta(step_dir)
        loss = f"{losses[meta.step]:.6g}{' best' if meta.step == best else ''}" if meta.step in losses else ""
        saved = datetime.fromtimestamp((step_dir / "meta" / "meta.json").stat().st_mtime)
        rows.append(
            (
                step_dir.name,
                readable(size_of(step_dir)),
                saved.isoformat(" ", "seconds"),
                loss,
                finding.state,
                resumes(meta, step_dir),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def show_lines(step_dir: Path) -> list[str]:
    """All that a checkpoint says of itself.

    Raises:
      DamagedCheckpoint: it cannot be read.
    """
    meta, data = read_meta(step_dir), read_data(step_dir)
    described = json.loads((step_dir / "meta" / "meta.json").read_text())
    finding = examine(step_dir, "size")
    loss = val_losses([step_dir]).get(meta.step)
    lines = [
        f"checkpoint  {step_dir}",
        f"step        {meta.step} of {meta.config.train.steps}",
        f"format      {described['format']}, "
        + ", ".join(f"{name} {version}" for name, version in described["versions"].items()),
        f"files       {readable(size_of(step_dir))}, {finding.state}{f': {finding.reason}' if finding.reason else ''}",
        f"resumes     {resumes(meta, step_dir)}",
        f"base        {meta.base or 'none'}",
        f"tokenizer   {meta.tokenizer.file}, {meta.tokenizer.size} tokens, sha256 {meta.tokenizer.sha256}",
        f"template    {meta.config.data.template}",
    ]
    if "samples" in data:
        lines.append(f"data        {data['samples']} samples consumed")
    if loss is not None:
        lines.append(f"val_loss    {loss}")
    shapes = saved_shapes(step_dir)
    averaged = {path[0] for path in saved_shapes(step_dir, step_dir)} if meta.ema else set()
    for name in meta.components:
        held = [shape for path, shape in shapes.items() if path[0] == name]
        ema = ", and its average" if name in averaged and name in trained_components(meta.config.model) else ""
        lines.append(f"{name:<11} {len(held)} arrays, {sum(map(math.prod, held)) / 1e6:.2f}M parameters{ema}")
    return lines
