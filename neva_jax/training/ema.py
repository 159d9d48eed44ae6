"""The moving average of the trained weights (`optimizer.ema_decay`), as NeMo's EMA callback keeps it.

    average <- decay * average + (1 - decay) * weights        every `ema_every` steps, after the optimizer's update

It starts as a copy of the weights that the run starts with, lies where they lie (fp32, the same shards), and is what
validation runs on: NeMo swaps it in too, unless `validate_original_weights` is set.
"""

from typing import Any

import jax
import jax.numpy as jnp

Parameters = dict[str, Any]


def start(trained: Parameters, decay: float | None) -> Parameters:
    """The average before the first step: a copy of the weights; empty where there is no average."""
    return {} if decay is None else jax.tree.map(jnp.copy, trained)


def update(average: Parameters, trained: Parameters, step: jax.Array, decay: float | None, every: int) -> Parameters:
    """The average after `step` (the number of completed steps) left the weights `trained`."""
    if decay is None:
        return average

    def moved() -> Parameters:
        return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, trained)

    if every == 1:
        return moved()
    return jax.lax.cond(step % every == 0, moved, lambda: average)
