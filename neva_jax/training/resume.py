"""Whether a run goes on where it stopped, and whether it may."""

from pathlib import Path
from typing import Any

from neva_jax.config import COMPONENTS, Config, lookup, walk
from neva_jax.data.plans import Plans
from neva_jax.data.sources import Sources
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError
from neva_jax.training.checkpoint import Meta, check_compatible, newest_step, read_meta

# Changed, they would make another run of it: other weights, or other samples under the numbers already consumed.
FIXED = (
    *(f"model.{name}.freeze" for name in COMPONENTS),
    *("run.seed", "data.train", "data.val_fraction", "data.sampling"),
    *("data.template", "data.compat", "data.image_position"),
)


def resumed_meta(config: Config, tokenizer: Tokenizer, run_dir: Path) -> Meta | None:
    """What the newest checkpoint of `run_dir` says of itself, or None for a fresh run.

    Raises:
      UserError: `run.resume` forbids what is there, or the configuration is of another run.
    """
    step = newest_step(run_dir / "checkpoints")
    if step is None:
        if config.run.resume == "must":
            raise UserError(f"run.resume=must, but {run_dir} holds no checkpoint")
        return None
    if config.run.resume == "never":
        raise UserError(f"run.resume=never, but {run_dir} holds a checkpoint of step {step}; name another run.dir")
    meta = read_meta(run_dir / "checkpoints" / str(step))
    if meta.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(f"model.tokenizer={config.model.tokenizer} is not the file that {run_dir} was trained with")
    if meta.tokenizer.settings != tokenizer.settings:
        raise UserError(
            f"tokenizer_config.json beside model.tokenizer={config.model.tokenizer} gives {_ends(tokenizer)}, but "
            f"{run_dir} was trained with {_ends(meta.tokenizer)}"
        )
    check_compatible(config, meta.config, COMPONENTS, run_dir)
    differing = changes(meta.config, config)
    if "data.chat_template" in differing:  # whole texts
        raise UserError(f"data.chat_template is not the template that {run_dir} was trained with; use a new run.dir")
    for name in FIXED:
        if name in differing:
            before, now = differing[name]
            raise UserError(f"{name}={now}, but {run_dir} was trained with {before}; use a new run.dir")
    return meta


def _ends(tokenizer: Tokenizer) -> str:
    return ", ".join(f"{name}={token}" for name, token in tokenizer.settings.items())


def changes(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ -> (value before, value now)."""
    pairs = {name: (lookup(before, name), lookup(now, name)) for name, _ in walk()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def resumed_samples(progress: dict[str, Any], plans: Plans | None, rows: Sources) -> int:
    """Samples that the run has consumed; within an epoch, they are known only together with the plan of their rows.

    Raises:
      UserError: another plan than the one that the run began the epoch with.
    """
    samples, plan = progress["samples"], None if plans is None else plans.digest
    if samples % rows.epoch_size and progress.get("plan") != plan:
        raise UserError(
            f"data.pack={plans is not None}: the checkpoint stands {samples % rows.epoch_size} samples into an epoch "
            "that was packed otherwise; data.pack, data.max_length, data.images_per_row, data.segments_per_row, the "
            "rows and all settings that change their lengths must stay as they were, or use a new run.dir"
        )
    return samples
