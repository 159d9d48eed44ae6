"""Token-weighted cross-entropy without ever holding the logits of a whole batch.

Each row's labelled positions are moved to its front, the row is cut into chunks, and a chunk without a label in any
row is skipped. Within a chunk the logits are computed, reduced and thrown away; the backward pass computes them again.

    weights   0 0 0 0 1 1 1 0 0 1 0 0   ->   1 1 1 1 | 0 0 0 0 | 0 0 0 0     chunk = 4: one of three is computed

    B rows, T tokens, D hidden size, V vocabulary, C positions per chunk, N chunks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def weighted_nll(
    logits: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """Sum over all positions of weight * -log p(target).

    Args:
      logits: hidden [B, C, D] -> logits [B, C, V] f32.
      hidden: [B, T, D]; targets: [B, T] i32; weights: [B, T] f32.
      chunk: C, positions per row whose logits exist at a time.

    Returns:
      f32 scalar; the caller divides by the weights of the whole global batch.
    """
    b, t = targets.shape
    chunk = min(chunk, t)
    order = jnp.argsort(weights == 0, axis=1, stable=True)  # labelled positions first
    pad = -t % chunk

    def chunked(x: jax.Array) -> jax.Array:
        """[B, T, ...] in the new order -> [N, B, C, ...], padded with zeros."""
        x = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_nll(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        scores = logits(hidden)
        picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(scores, axis=-1) - picked) * weights)

    def body(total: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        labelled = jnp.any(xs[2] != 0)
        return total + jax.lax.cond(labelled, chunk_nll, lambda *_: jnp.float32(0), *xs), None

    total, _ = jax.lax.scan(body, jnp.float32(0), (chunked(hidden), chunked(targets), chunked(weights)))
    return total
