"""A batch in parts that take turns, so that what one part sends travels while another is computed (`mesh.overlap`).

    computed   a's attention | b's attention | a's MLP  | b's MLP  | a's attention ...
    sent                     | a's sums      | b's sums | a's sums | b's sums ...

Attention and MLP each end in a sum over `tensor`, which the next norm of the same rows waits for; other rows do not.
XLA finds this order where there is no other (`next_in_turn`), and where no kernel works for two parts at once, because
it would wait for the sums of both: `shared` and `precision.fp8.copies` hide that two parts use the same small arrays,
and `parallel.compiler.compiler_options` keeps products apart that have a kernel in common.

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
def _in_turn(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are, but `second` is not there before `first`; in the backward pass it is the other way round."""
    return first, jax.lax.optimization_barrier((first, second))[1]


def _in_turn_backward(_: None, g: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    second, first = _in_turn(g[1], g[0])
    return first, second


_in_turn.defvjp(lambda first, second: (_in_turn(first, second), None), _in_turn_backward)


def next_in_turn(x: list[jax.Array], done: int) -> list[jax.Array]:
    """Parts of which `done` has just been computed: it is used no sooner than the part that comes next is there."""
    following = (done + 1) % len(x)
    if following == done:
        return x
    x = list(x)
    x[following], x[done] = _in_turn(x[following], x[done])
    return x


def shared(layer: nnx.Module, parts: int, dtype: jnp.dtype) -> list[nnx.Module]:
    """The layer for each of the parts of a batch.

    Kernels become `dtype` once, before they are shared: the gradients of all parts are then added before they are sent
    over `data`. XLA takes norms' scales and biases for others in each part.
    """
    if parts == 1:
        return [layer]
    graphdef, params = nnx.split(layer)

    def cast(path: tuple, array: jax.Array) -> jax.Array:
        kernel = array.ndim > 1 and array.dtype == jnp.float32 and not _is_small(path)
        return array.astype(dtype) if kernel else array

    def hidden(path: tuple, array: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(array) if _is_small(path) else array

    params = jax.tree_util.tree_map_with_path(cast, params)
    others = (jax.tree_util.tree_map_with_path(hidden, params) for _ in range(parts - 1))
    return [nnx.merge(graphdef, own) for own in (params, *others)]


def _is_small(path: tuple) -> bool:
    """Of a layer's parameter: whether it is a norm's scale or a bias."""
    name = next(entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))
    return name == "scale" or name.endswith("bias")
