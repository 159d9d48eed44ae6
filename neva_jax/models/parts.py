"""A batch in parts that take turns, so that what one part sends travels while another is computed (`mesh.overlap`).

    computed   a's attention | b's attention | a's MLP  | b's MLP  | a's attention ...
    sent                     | a's sums      | b's sums | a's sums | b's sums ...

Attention and MLP each end in a sum over `tensor`, which the next norm of the same rows waits for; other rows do not.
XLA finds this order where there is no other (`in_turn`), and where no kernel works for two parts at once, for it would
wait for the sums of both: `apart` and `precision.fp8.copies` hide that two parts use the same small arrays, and
`precision.fp8_recipe.compiler_options` keeps products apart that have a kernel in common.

B rows, T tokens, D hidden size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.parallel.mesh import constrain


def parted(arrays: Any, parts: int) -> list[Any]:
    """Arrays [B, ...] as `parts` batches of every `parts`-th row: each device keeps the rows that it has."""
    if parts == 1:
        return [arrays]

    def part(array: jax.Array, i: int) -> jax.Array:
        rows = array.reshape(-1, parts, *array.shape[1:])[:, i]
        return constrain(rows, "batch", *[None] * (rows.ndim - 1))

    return [jax.tree.map(partial(part, i=i), arrays) for i in range(parts)]


def joined(parts: Sequence[jax.Array]) -> jax.Array:
    """The rows [B / parts, T, D] of each of the parts that `parted` made -> [B, T, D]."""
    if len(parts) == 1:
        return parts[0]
    x = jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    return constrain(x, "batch", "length", "features")


@jax.custom_vjp
def in_turn(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are, but `second` is not there before `first`; in the backward pass it is the other way round."""
    return first, jax.lax.optimization_barrier((first, second))[1]


def _in_turn_backward(_: None, g: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    second, first = in_turn(g[1], g[0])
    return first, second


in_turn.defvjp(lambda first, second: (in_turn(first, second), None), _in_turn_backward)


def apart(layer: nnx.Module) -> nnx.Module:
    """The layer with vectors (norms and biases) that XLA takes for others than those of the layer itself."""
    graphdef, params = nnx.split(layer)
    hidden = jax.tree.map(lambda array: jax.lax.optimization_barrier(array) if array.ndim == 1 else array, params)
    return nnx.merge(graphdef, hidden)
