"""One optimizer step as a pure function of (state, frozen parameters, batch).

The loss of a step is sum(weight * nll) / sum(weight) over the whole global batch. The denominator is known before the
first micro batch, so each adds its share of loss and gradient and nothing is averaged: accumulating is exactly the
same as one large batch.

A shortcut (training/shortcuts.py) is taken by each micro batch that fits it: gradients are computed inside the branch
that is chosen, so nothing that the other would keep is made.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from neva_jax.precision.fp8 import State as Fp8State
from neva_jax.training import ema
from neva_jax.training.guard import GOOD, GuardState, judge
from neva_jax.training.loss import weighted_nll
from neva_jax.training.shortcuts import Prefix, fits, labelled_positions, without_prefix

Parameters = dict[str, Any]
Arrays = dict[str, jax.Array]
Part = tuple[Arrays, jax.Array | None]  # a micro batch and its key of dropout


class TrainState(NamedTuple):
    """What a step changes: completed steps, the trained fp32 parameters, the optimizer's state, the guard's, the
    parameters' moving average (empty where `optimizer.ema_decay` is not set), and the state of FP8 layers.
    """

    step: jax.Array
    trained: Parameters
    optimizer: optax.OptState
    guard: GuardState = GuardState()
    ema: Parameters = {}  # noqa: RUF012 (a NamedTuple's default; nothing changes it)
    fp8: Fp8State = {}  # noqa: RUF012


def batch_nll(
    graphdef: nnx.GraphDef,
    params: Parameters,
    micro: Arrays,
    chunk: int,
    packed: bool = False,
    rng: jax.Array | None = None,
    states: Fp8State | None = None,
    prefix: Prefix | None = None,
    labelled: int | None = None,
) -> jax.Array:
    """Sum of weighted token losses of a micro batch (arrays [B, ...], see DESIGN), f32.

    packed: rows may hold several segments; rng: dropout's key; states: of the FP8 layers; prefix, labelled: shortcuts,
    for a micro batch that `fits` them.
    """
    model = nnx.merge(graphdef, params)
    micro = micro if prefix is None else without_prefix(micro, prefix)
    targets, weights, wanted = micro["targets"], micro["loss_weights"], None
    if labelled is not None:
        wanted = labelled_positions(weights, labelled)
        targets, weights = (jnp.take_along_axis(array, wanted, axis=1) for array in (targets, weights))
    cache = None if prefix is None else prefix.cache
    hidden, _ = model(micro, packed, rng=rng, states=states, prefix=cache, wanted=wanted)
    return weighted_nll(model.llm.logits, model.llm.output_kernel(), hidden, targets, weights, chunk)


def gradients(
    graphdef: nnx.GraphDef,
    trained: Parameters,
    frozen: Parameters,
    batch: Arrays,
    chunk: int,
    packed: bool = False,
    rng: jax.Array | None = None,
    states: Fp8State | None = None,
    prefix: Prefix | None = None,
    labelled: int | None = None,
    whole_graphdef: nnx.GraphDef | None = None,
) -> tuple[jax.Array, Parameters, Fp8State]:
    """Mean token loss of the global batch (arrays [A, B, ...]), gradients of the trained parameters, FP8's new state.

    The first two are 0 where nothing is supervised. Micro batch a drops out by the key fold_in(rng, a); rng None: no
    dropout. The FP8 state's "gradient" is its new value: it is handed from micro batch to micro batch, never added.
    prefix, labelled: shortcuts for the micro batches that fit them. whole_graphdef: of the model for the others, if it
    is another one (`training.shortcuts.whole_graphdef`); the FP8 state then stays as it is.
    """
    states = {} if states is None else states
    weights = jnp.sum(batch["loss_weights"])
    weights = jnp.where(weights == 0, 1, weights)
    count, _, length = batch["tokens"].shape
    left = length - (0 if prefix is None else len(prefix.tokens))
    labelled = labelled if labelled is not None and labelled < left else None  # else nothing is left out
    rngs = None if rng is None else jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))

    def micro_gradients(graph: nnx.GraphDef, shortcuts: tuple, *given: Any) -> tuple[jax.Array, Any]:
        def micro_loss(trained: Parameters, states: Fp8State, part: Part) -> jax.Array:
            micro, rng = part
            return batch_nll(graph, {**frozen, **trained}, micro, chunk, packed, rng, states, *shortcuts) / weights

        return jax.value_and_grad(micro_loss, argnums=(0, 1))(*given)

    def whole(trained: Parameters, states: Fp8State, part: Part) -> tuple[jax.Array, Any]:
        if whole_graphdef is None:
            return micro_gradients(graphdef, (), trained, states, part)
        loss, (grads, _) = micro_gradients(whole_graphdef, (), trained, states, part)
        return loss, (grads, states)

    def differentiated(trained: Parameters, states: Fp8State, part: Part) -> tuple[jax.Array, Any]:
        if prefix is None and labelled is None:
            return whole(trained, states, part)
        short = partial(micro_gradients, graphdef, (prefix, labelled))
        return jax.lax.cond(fits(part[0], prefix, labelled), short, whole, trained, states, part)

    def accumulate(total: tuple[jax.Array, Parameters, Fp8State], part: Part) -> tuple[Any, None]:
        loss, (grads, states) = differentiated(trained, total[2], part)
        return (*jax.tree.map(jnp.add, total[:2], (loss, grads)), states), None

    if count == 1:
        loss, (grads, states) = differentiated(trained, states, jax.tree.map(lambda x: x[0], (batch, rngs)))
        return loss, grads, states
    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained), states)
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
    compiler_options: dict[str, Any] | None = None,
    layout: TrainState | None = None,
    apply_updates: Callable[[Parameters, Parameters], Parameters] = optax.apply_updates,
    labelled: int | None = None,
    whole_graphdef: nnx.GraphDef | None = None,
) -> Callable[[TrainState, Parameters, Arrays, Prefix | None], tuple[TrainState, Arrays]]:
    """The compiled step: (state, frozen, batch [A, B, ...]) -> (new state, metrics); the old state is given away.

    A step that the guard does not find good changes nothing but the number of steps (training/guard.py).

    Metrics: `loss`, `grad_norm` (before clipping) and `lr`, f32 scalars, and the guard's `verdict`, i32. Dropout is a
    function of (`dropout_seed`, step, micro batch, layer), so a resumed run repeats it; None for a model without.
    `compiler_options`: XLA's (`precision.fp8_recipe`). `layout`: where the new state lies, as `layout_of` the old one:
    left to itself, XLA would put a copy of all of it on each GPU. None: one device. `apply_updates`: adds updates to
    the parameters (`training.setup.place_updates`).

    `labelled`, and a `Prefix` as the step's fourth argument, are shortcuts, and `whole_graphdef` is the model of what
    does not fit them (`gradients`). With one, the metrics have `short`, the part of the micro batches that took it.
    """

    def train_step(
        state: TrainState, frozen: Parameters, batch: Arrays, prefix: Prefix | None = None
    ) -> tuple[TrainState, Arrays]:
        rng = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state.step)
        loss, grads, states = gradients(
            *(graphdef, state.trained, frozen, batch, chunk, packed, rng, state.fp8),
            *(prefix, labelled, whole_graphdef),
        )
        norm, weights = optax.global_norm(grads), jnp.sum(batch["loss_weights"])
        verdict, guard = judge(state.guard, loss, norm, weights, spike_factor)

        def updated(state: TrainState, grads: Parameters, states: Fp8State) -> TrainState:
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
            trained = apply_updates(state.trained, updates)
            average = ema.update(state.ema, trained, state.step + 1, ema_decay, ema_every)
            return state._replace(trained=trained, optimizer=optimizer_state, ema=average, fp8=states)

        after = jax.lax.cond(verdict == GOOD, updated, lambda state, *_: state, state, grads, states)
        after = after._replace(step=state.step + 1, guard=guard)
        lr = schedule(state.step - state.guard.skipped)
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr, "verdict": verdict}
        if prefix is not None or labelled is not None:
            metrics["short"] = jnp.mean(jax.vmap(lambda micro: fits(micro, prefix, labelled))(batch), dtype=jnp.float32)
        return after, metrics

    place = {} if layout is None else {"out_shardings": (layout, None)}
    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options, **place)


def layout_of(state: TrainState) -> TrainState:
    """The shardings of a state's arrays, or of their shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def make_eval_step(
    graphdef: nnx.GraphDef, chunk: int, packed: bool = False, compiler_options: dict[str, Any] | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The compiled validation step: (trained, frozen, batch [A, B, ...]) -> (sum of token losses, sum of weights).

    A fourth argument is the FP8 state, where there is one: its scales are used as they are.
    """

    def eval_step(
        trained: Parameters, frozen: Parameters, batch: Arrays, states: Fp8State | None = None
    ) -> tuple[jax.Array, jax.Array]:
        def add(total: jax.Array, micro: Arrays) -> tuple[jax.Array, None]:
            nll = batch_nll(graphdef, {**frozen, **trained}, micro, chunk, packed, states=states)
            return total + nll, None

        return jax.lax.scan(add, jnp.float32(0), batch)[0], jnp.sum(batch["loss_weights"])

    return jax.jit(eval_step, compiler_options=compiler_options)
