"""Whether a run goes on where it stopped, and whether it may."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from neva_jax.config import COMPONENTS, Config, lookup, walk
from neva_jax.data.plans import Plans
from neva_jax.data.sources import Sources
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError
from neva_jax.precision import fp8
from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta, newest_step, read_data, read_meta, verify
from neva_jax.training.manifest import DamagedCheckpoint, Level
from neva_jax.training.retention import set_aside, steps_in, tidy
from neva_jax.training.weights import SHAPELESS, differences

# Changed, they would make another run of it: other weights, or other samples under the numbers already consumed.
FIXED = (
    *("run.seed", "model.tokenizer", "data.train", "data.val_fraction", "data.sampling"),
    *("data.template", "data.chat_template", "data.compat", "data.image_position"),
)
# The same, and nothing can make the state fit again.
NEVER = tuple(f"model.{name}.freeze" for name in COMPONENTS)
_FAILED = -1


def resumed_meta(
    config: Config,
    tokenizer: Tokenizer,
    run_dir: Path,
    rows: Sequence[int] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Meta | None:
    """What the checkpoint that the run goes on from says of itself, or None for a fresh run.

    It is the newest one, verified as `checkpoint.verify` says; with `run.allow_fallback`, the newest good one.

    Args:
      rows: how many each of `data.train` has; None: that is not compared. say: gets what should be known of the choice.

    Raises:
      DamagedCheckpoint: the newest is damaged (and no fallback).
      UserError: `run.resume` forbids what is there, or the configuration is of another run.
    """
    folder = run_dir / "checkpoints"
    newest = max(steps_in(folder), default=None)
    if newest is None:
        if config.run.resume == "must":
            raise UserError(f"run.resume=must, but {run_dir} holds no checkpoint")
        return None
    if config.run.resume == "never":
        raise UserError(f"run.resume=never, but {run_dir} holds a checkpoint of step {newest}; name another run.dir")
    damaged: list[DamagedCheckpoint] = []  # of process 0
    step = _from_process_0(
        lambda: _usable_step(folder, config.checkpoint.verify, config.run.allow_fallback, damaged, say)
    )
    meta = read_meta(folder / str(step))
    before = read_data(folder / str(step)).get("rows")
    _check_same_run(config, tokenizer, meta, (before, rows), run_dir, say)
    for error, bad in zip(damaged, reversed(steps_in(folder)), strict=False):  # not before it may go on
        say(f"{error}; put aside as {set_aside(folder / str(bad)).name}")
    if damaged:
        say(f"going back to step {step}, the newest good checkpoint (--allow-fallback)")
    return meta


def resumed_fp8_state(
    checkpoints: Checkpoints, step: int, before: Config, now: Config, fresh: fp8.State, say: Callable[[str], None]
) -> fp8.State:
    """The FP8 state that a step was saved with, or `fresh` where that was another recipe's."""
    keys = ("compute", "fp8.amax_history", "fp8.layers", "fp8.first_layers_bf16", "fp8.last_layers_bf16")
    if all(lookup(before.precision, key) == lookup(now.precision, key) for key in keys):
        as_shape = partial(
            jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        )
        return checkpoints.restore_fp8(step, as_shape(fresh))
    say("fp8: scales and histories start anew, the checkpoint has none of this recipe")
    return fresh


def tidied(run_dir: Path) -> list[str]:
    """Ends what a killed run had begun to save or to delete; returns a line for each thing (of process 0)."""
    lines = tidy(run_dir / "checkpoints") if jax.process_index() == 0 else []
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("neva_jax checkpoints tidied")
    return lines


def _from_process_0(find: Callable[[], int]) -> int:
    """What `find` returns on process 0, on every process; where it raises there, all end."""
    if jax.process_count() == 1:
        return find()
    found, error = _FAILED, None
    if jax.process_index() == 0:
        try:
            found = find()
        except UserError as caught:
            error = caught
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == _FAILED:
        raise error or UserError("process 0 found no checkpoint that can be used; it says why")
    return found


def _usable_step(
    folder: Path, level: Level, allow_fallback: bool, damaged: list[DamagedCheckpoint], say: Callable[[str], None]
) -> int:
    """The newest step that is what was saved; `damaged` gets those above it, if falling back is allowed.

    Raises:
      DamagedCheckpoint: the newest is damaged, and falling back is not allowed, or there is nothing to fall back to.
    """
    for step in reversed(steps_in(folder)):
        step_dir = folder / str(step)
        try:
            newest_step(folder) if not damaged else None  # without meta.json it says so itself
            if (note := verify(step_dir, level)) is not None:
                say(note)
            read_meta(step_dir)
        except DamagedCheckpoint as error:
            damaged.append(error)
            if allow_fallback:
                continue
            older = [other for other in steps_in(folder) if other < step]
            way = (
                f"add --allow-fallback to go on from the newest good checkpoint before it (of {older[-1]} and older)"
                if older
                else "there is no older one; move it away to start anew"
            )
            raise DamagedCheckpoint(f"{error}; {way}") from None
        return step
    raise DamagedCheckpoint(f"{damaged[0]}; no checkpoint in {folder} is good; restore one from a copy")


def _check_same_run(
    config: Config,
    tokenizer: Tokenizer,
    meta: Meta,
    rows: tuple[Sequence[int] | None, Sequence[int] | None],
    run_dir: Path,
    say: Callable[[str], None],
) -> None:
    """Raises UserError with a line for each difference that would make another run of it, unless it is allowed.

    rows: of each source, before and now; None: not known.
    """
    differing = changes(meta.config, config)
    # The tokenizer's file may lie elsewhere now; its contents decide.
    found = {name: differing[name] for name in FIXED if name in differing and name != "model.tokenizer"}
    if None not in rows and rows[0] != rows[1] and "data.train" not in found:
        found["data.train"] = tuple(f"files of {', '.join(map(str, counts))} rows" for counts in rows)
    if "data.chat_template" in found:  # whole texts
        found["data.chat_template"] = ("the template it was trained with", "another one")
    if meta.tokenizer.sha256 != tokenizer.sha256:
        files = (f"{kept.file} {kept.sha256[:12]}, {kept.size} tokens" for kept in (meta.tokenizer, tokenizer))
        found["model.tokenizer"] = (next(files), next(files))
    elif meta.tokenizer.settings != tokenizer.settings:
        found["model.tokenizer"] = (_ends(meta.tokenizer), f"{_ends(tokenizer)} (tokenizer_config.json beside it)")
    model = differences(config, meta.config)
    found |= {name: pair for name, pair in model.items() if name.rpartition(".")[2] in SHAPELESS}
    never = {name: differing[name] for name in NEVER if name in differing}
    never |= {name: pair for name, pair in model.items() if name not in found}
    allowed = set(config.run.allow_changed)
    for name in sorted(found.keys() & allowed):
        say(f"--allow-changed {name}: {found[name][1]}, was {found[name][0]}")
    refused = {name: pair for name, pair in {**found, **never}.items() if name not in allowed or name in never}
    if not refused:
        return
    lines = [f"  {name}: before {before}, now {now}" for name, (before, now) in refused.items()]
    ways = "use a new run.dir"
    if passable := [name for name in refused if name not in never]:
        ways += f", or add {' '.join(f'--allow-changed {name}' for name in passable)} if that is meant"
    if impossible := [name for name in refused if name in never]:
        ways += f" ({', '.join(impossible)} cannot change: the saved arrays would not fit)"
    raise UserError("\n".join([f"{run_dir}: was trained with other settings; {ways}", *lines]))


def _ends(tokenizer: Tokenizer) -> str:
    return ", ".join(f"{name}={token}" for name, token in tokenizer.settings.items())


def changes(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ -> (value before, value now)."""
    pairs = {name: (lookup(before, name), lookup(now, name)) for name, _ in walk()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def resumed_samples(progress: dict[str, Any], plans: Plans | None, rows: Sources) -> int:
    """Samples that the run has consumed; within an epoch, they are known only together with the plan of their rows.

    Raises:
      DamagedCheckpoint: they are not known.
      UserError: another plan than the one that the run began the epoch with.
    """
    if "samples" not in progress:
        raise DamagedCheckpoint("the checkpoint's data/metadata does not say how many samples are consumed")
    samples, plan = progress["samples"], None if plans is None else plans.digest
    if samples % rows.epoch_size and progress.get("plan") != plan:
        raise UserError(
            f"data.pack={plans is not None}: the checkpoint stands {samples % rows.epoch_size} samples into an epoch "
            "that was packed otherwise; data.pack, data.max_length, data.images_per_row, data.segments_per_row, the "
            "rows and all settings that change their lengths must stay as they were, or use a new run.dir"
        )
    return samples
