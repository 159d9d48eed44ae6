"""Token-weighted cross-entropy without ever holding the logits of a whole batch.

Each row's labelled positions are moved to its front, the row is cut into chunks, and a chunk without a label in any
row is skipped. Within a chunk the logits are computed, reduced and thrown away; the backward pass computes them again.

    weights   0 0 0 0 1 1 1 0 0 1 0 0   ->   1 1 1 1 | 0 0 0 0 | 0 0 0 0     chunk = 4: one of three is computed

On a mesh, each group of devices that has rows of its own works with a copy of the output head. The head is gathered
before the first chunk and its gradient reduced after the last, not in every chunk; and the vocabulary stays split:
only sums and maxima over it travel, never logits.

    B rows, T tokens, D hidden size, V vocabulary, C positions per chunk, N chunks, R groups of rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from neva_jax.parallel.mesh import constrain, copy_for_each, ways


def weighted_nll(
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    kernel: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
) -> jax.Array:
    """Sum over all positions of weight * -log p(target).

    Args:
      logits: hidden [R, B / R, C, D] and as many copies of the kernel [R, D, V] -> logits [R, B / R, C, V] f32.
      kernel: [D, V], the output head.
      hidden: [B, T, D]; targets: [B, T] i32; weights: [B, T] f32.
      chunk: C, positions per row whose logits exist at a time.

    Returns:
      f32 scalar; the caller divides by the weights of the whole global batch.
    """
    b, t = targets.shape
    chunk, groups = min(chunk, t), ways("batch")
    order = jnp.argsort(weights == 0, axis=1, stable=True)  # labelled positions first
    pad = -t % chunk
    copies = copy_for_each(kernel, "batch", None, "vocab")
    hidden = constrain(hidden, "batch", "length", "features")

    def chunked(x: jax.Array) -> jax.Array:
        """[B, T, ...] in the new order -> [N, R, B / R, C, ...], padded with zeros."""
        x = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(groups, b // groups, -1, chunk, *x.shape[2:])
        return constrain(jnp.moveaxis(x, 2, 0), None, "batch", *(None,) * (x.ndim - 2))

    @jax.checkpoint
    def chunk_nll(copies: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """-> [R], the sum of each group."""
        scores = constrain(logits(hidden, copies), "batch", None, None, "vocab")
        # Not a gather: each device looks for the target among its own part of the vocabulary.
        is_target = jnp.arange(scores.shape[-1]) == targets[..., None]
        picked = jnp.sum(jnp.where(is_target, scores, 0), axis=-1)
        return jnp.sum((jax.nn.logsumexp(scores, axis=-1) - picked) * weights, axis=(1, 2))

    # Around the condition too: what a branch keeps is a result of the condition, and the loop would stack the head's
    # copies once for each chunk.
    @jax.checkpoint
    def share(labelled: jax.Array, copies: jax.Array, *arrays: jax.Array) -> jax.Array:
        return jax.lax.cond(labelled, chunk_nll, lambda *_: jnp.zeros(groups), copies, *arrays)

    def body(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        labelled, *arrays = xs
        return total + share(labelled, copies, *arrays), None

    arrays = (chunked(hidden), chunked(targets), chunked(weights))
    labelled = jnp.any(arrays[2] != 0, axis=(1, 2, 3))
    totals, _ = jax.lax.scan(body, constrain(jnp.zeros(groups), "batch"), (labelled, *arrays))
    return jnp.sum(totals)
