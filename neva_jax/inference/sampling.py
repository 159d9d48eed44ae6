"""From logits to the next token."""

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, rng: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws the next token of each row.

    Every row uses the same random number, so that its answer depends on its own prompt and the seed alone, not on the
    rows beside it.

    Args:
      logits: [B, V] f32.
      rng: key of this position.
      temperature: scalar; 0 takes the likeliest token.
      top_p: scalar in (0, 1]; only the likeliest tokens whose probabilities reach it together are drawn from (Holtzman
        et al. 2020; the token that crosses the bound is kept, as in HF TopPLogitsWarper).

    Returns:
      [B] i32.
    """
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    ordered = jnp.sort(jax.nn.softmax(scaled, axis=-1), axis=-1)[:, ::-1]  # [B, V], likeliest first
    before = jnp.cumsum(ordered, axis=-1) - ordered
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    kept = jnp.where(jax.nn.softmax(scaled, axis=-1) >= least, scaled, -jnp.inf)
    noise = jax.random.gumbel(rng, (1, logits.shape[1]))
    drawn = jnp.argmax(kept + noise, axis=-1)
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
