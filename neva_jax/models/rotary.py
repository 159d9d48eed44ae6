"""The rotary embedding (Su et al. 2021): angles of positions, heads rotated by them, and the way back.

B rows, T tokens, H query heads, G key/value heads, R = H / G, K head width.
"""

import jax
import jax.numpy as jnp

from neva_jax.config import LlmConfig
from neva_jax.derived import rotary_width


def rotary_angles(positions: jax.Array, config: LlmConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary embedding (Su et al. 2021; HF LlamaRotaryEmbedding).

    With R the rotated part of the head width (rope_fraction): angle i is position * base^(-2i/R), and rope_scaling
      linear    divides the frequencies by the factor F
      llama3    divides those of waves longer than the original length N / low, keeps those shorter than N / high, and
                goes from one to the other in between (HF _compute_llama3_parameters)
      dynamic   raises the base where a row is longer than N: base * (F * length / N - (F - 1))^(R / (R - 2)); a row's
                length is its largest position + 1 (HF _compute_dynamic_ntk_parameters, which takes the batch's)

    Args:
      positions: [B, T] i32.

    Returns:
      (cos, sin), each [B, T, R/2] f32.
    """
    width, factor, original = rotary_width(config), config.rope_factor, config.rope_original_length
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    base = jnp.float32(config.rope_base)
    if config.rope_scaling == "dynamic":
        length = jnp.maximum(jnp.max(positions, axis=1) + 1, original).astype(jnp.float32)[:, None, None]
        base = base * (factor * length / original - (factor - 1)) ** (width / (width - 2))
    frequencies = base**-exponents
    if config.rope_scaling == "linear":
        frequencies = frequencies / factor
    if config.rope_scaling == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        kept = jnp.clip((original * frequencies / (2 * jnp.pi) - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + R/2]) of each head's first R channels; x: [B, T, H, K], computed in fp32."""
    half = cos.shape[-1]
    y = x.astype(jnp.float32)
    first, second, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


@jax.custom_vjp
def split_rotated(y: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Heads in groups [B, T, G, R + 2, K] (see `llama_fp8`) -> q [B, T, H, K], k and v [B, T, G, K], q and k rotated.

    Its gradient is put together in one pass; JAX's own pads that of each part to the size of all, and adds them.
    """
    q = y[..., :-2, :].reshape(*y.shape[:2], -1, y.shape[-1])
    return rotate(q, cos, sin), rotate(y[..., -2, :], cos, sin), y[..., -1, :]


def join_rotated_back(q: jax.Array, k: jax.Array, v: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The gradient of `split_rotated`: those of q, k and v -> [B, T, G, R + 2, K], rotated back."""
    q, k = rotate(q, cos, -sin), rotate(k, cos, -sin)
    parts = [q.reshape(*k.shape[:3], -1, k.shape[-1]), k[..., None, :], v[..., None, :]]
    return jnp.concatenate(parts, axis=-2)


def _split_rotated_forward(y: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[tuple[jax.Array, ...], tuple]:
    return split_rotated(y, cos, sin), (cos, sin)


def _split_rotated_backward(angles: tuple[jax.Array, jax.Array], g: tuple[jax.Array, ...]) -> tuple:
    return join_rotated_back(*g, *angles), None, None


split_rotated.defvjp(_split_rotated_forward, _split_rotated_backward)
