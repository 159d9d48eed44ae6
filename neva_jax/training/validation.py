"""Validation while a run trains."""

import math
from dataclasses import dataclass, replace
from typing import Any

from neva_jax.config import Config
from neva_jax.data.bad_rows import BadRowCount
from neva_jax.data.pipeline import Share, batches
from neva_jax.data.plans import Plans
from neva_jax.data.sources import Sources
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.parallel.mesh import place_batch
from neva_jax.training.metrics import RunLog, SilentLog, count_bad_rows
from neva_jax.training.step import TrainState
from neva_jax.training.watchdog import Watchdog


@dataclass
class Validation:
    """The mean token loss over the first `eval.batches` global batches of the validation rows, each row at most once.

    eval_step: of `make_eval_step`; accumulate: its micro batches per global batch.
    """

    eval_step: Any
    rows: Sources
    plans: Plans | None
    bad_rows: BadRowCount
    config: Config
    tokenizer: Tokenizer
    accumulate: int
    share: Share
    log: RunLog | SilentLog

    def __post_init__(self) -> None:
        # Threads: starting worker processes would take longer than a short validation.
        self.threaded = replace(self.config, data=replace(self.config.data, workers=0))

    def run(self, step: int, state: TrainState, frozen: dict, mesh: Any, watchdog: Watchdog) -> float:
        """The loss after `step`."""
        size = self.config.train.global_batch
        there = self.rows.epoch_size if self.plans is None else self.plans[0].rows
        wanted = min(self.config.eval.batches * size, there)
        total, weights = 0.0, 0.0
        stream = batches(self.rows, self.threaded, self.tokenizer, 0, wanted, self.plans, self.share)
        for i, batch in enumerate(stream):
            watchdog.alive(f"validation after step {step}, batch {i + 1}")
            count_bad_rows(batch, self.bad_rows, self.log, step)
            surplus = i * size + batch.rows >= wanted  # the last batch was filled up with further rows
            batch.arrays["loss_weights"][surplus] = 0
            arrays = place_batch(mesh, batch.arrays, self.accumulate)
            nll, weight = self.eval_step(state.ema or state.trained, frozen, arrays, state.fp8)  # NeMo averages too
            total, weights = total + float(nll), weights + float(weight)
        return total / weights if weights else math.nan
