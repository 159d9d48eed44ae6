"""One optimizer step as a pure function of (state, frozen parameters, batch).

The loss of a step is sum(weight * nll) / sum(weight) over the whole global batch. The denominator is known before the
first micro batch, so each adds its share of loss and gradient and nothing is averaged: accumulating is exactly the
same as one large batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from neva_jax.training import ema
from neva_jax.training.guard import GOOD, GuardState, judge, kept_where
from neva_jax.training.loss import weighted_nll

Parameters = dict[str, Any]
Arrays = dict[str, jax.Array]
Part = tuple[Arrays, jax.Array | None]  # a micro batch and its key of dropout


class TrainState(NamedTuple):
    """What a step changes: completed steps, the trained fp32 parameters, the optimizer's state, the guard's, and the
    parameters' moving average (empty where `optimizer.ema_decay` is not set).
    """

    step: jax.Array
    trained: Parameters
    optimizer: optax.OptState
    guard: GuardState = GuardState()
    ema: Parameters = {}  # noqa: RUF012 (a NamedTuple's default; nothing changes it)


def batch_nll(
    graphdef: nnx.GraphDef,
    params: Parameters,
    micro: Arrays,
    chunk: int,
    packed: bool = False,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Sum of weighted token losses of a micro batch (arrays [B, ...], see DESIGN), f32.

    packed: rows may hold several segments; rng: dropout's key.
    """
    model = nnx.merge(graphdef, params)
    hidden, _ = model(micro, packed, rng=rng)
    kernel = model.llm.output_kernel()
    return weighted_nll(model.llm.logits, kernel, hidden, micro["targets"], micro["loss_weights"], chunk)


def gradients(
    graphdef: nnx.GraphDef,
    trained: Parameters,
    frozen: Parameters,
    batch: Arrays,
    chunk: int,
    packed: bool = False,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, Parameters]:
    """Mean token loss of the global batch (arrays [A, B, ...]) and its gradients for the trained parameters.

    Both are 0 where nothing is supervised. Micro batch a drops out by the key fold_in(rng, a); rng None: no dropout.
    """
    weights = jnp.sum(batch["loss_weights"])
    weights = jnp.where(weights == 0, 1, weights)
    count = batch["tokens"].shape[0]
    rngs = None if rng is None else jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))

    def micro_loss(trained: Parameters, part: Part) -> jax.Array:
        micro, rng = part
        return batch_nll(graphdef, {**frozen, **trained}, micro, chunk, packed, rng) / weights

    def accumulate(total: tuple[jax.Array, Parameters], part: Part) -> tuple[tuple[jax.Array, Parameters], None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(micro_loss)(trained, part)), None

    if count == 1:
        return jax.value_and_grad(micro_loss)(trained, jax.tree.map(lambda x: x[0], (batch, rngs)))
    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
    return jax.lax.scan(accumulate, zero, (batch, rngs))[0]


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    chunk: int,
    packed: bool = False,
    dropout_seed: int | None = None,
    spike_factor: float | None = None,
    ema_decay: float | None = None,
    ema_every: int = 1,
) -> Callable[[TrainState, Parameters, Arrays], tuple[TrainState, Arrays]]:
    """The compiled step: (state, frozen, batch [A, B, ...]) -> (new state, metrics); the old state is given away.

    A step that the guard does not find good changes nothing but the number of steps (training/guard.py).

    Metrics: `loss`, `grad_norm` (before clipping) and `lr`, f32 scalars, and the guard's `verdict`, i32. Dropout is a
    function of (`dropout_seed`, step, micro batch, layer), so a resumed run repeats it; None for a model without.
    """

    def train_step(state: TrainState, frozen: Parameters, batch: Arrays) -> tuple[TrainState, Arrays]:
        rng = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state.step)
        loss, grads = gradients(graphdef, state.trained, frozen, batch, chunk, packed, rng)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
        norm, weights = optax.global_norm(grads), jnp.sum(batch["loss_weights"])
        verdict, guard = judge(state.guard, loss, norm, weights, spike_factor)
        trained = optax.apply_updates(state.trained, updates)
        average = ema.update(state.ema, trained, state.step + 1, ema_decay, ema_every)
        after = state._replace(trained=trained, optimizer=optimizer_state, ema=average)
        after = kept_where(verdict == GOOD, state, after)._replace(step=state.step + 1, guard=guard)
        lr = schedule(state.step - state.guard.skipped)
        return after, {"loss": loss, "grad_norm": norm, "lr": lr, "verdict": verdict}

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
    graphdef: nnx.GraphDef, chunk: int, packed: bool = False
) -> Callable[[Parameters, Parameters, Arrays], tuple[jax.Array, jax.Array]]:
    """The compiled validation step: (trained, frozen, batch [A, B, ...]) -> (sum of token losses, sum of weights)."""

    def eval_step(trained: Parameters, frozen: Parameters, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        def add(total: jax.Array, micro: Arrays) -> tuple[jax.Array, None]:
            return total + batch_nll(graphdef, {**frozen, **trained}, micro, chunk, packed), None

        return jax.lax.scan(add, jnp.float32(0), batch)[0], jnp.sum(batch["loss_weights"])

    return jax.jit(eval_step)
