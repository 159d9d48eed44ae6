"""Attention, with the mask that a batch needs.

rows of one segment        causal alone is enough: padding stands at the right end, and no earlier token sees it
rows of several segments   token i sees token j if j <= i and both are of the same segment (0 is padding)
decoding with a cache      token at position p sees the cache slots 0 ... p; slot and position are the same number
with a sliding window W    of all those, the last W only, itself included

B rows, T query tokens, S key tokens, H query heads, G key/value heads (H = G * R), K head width.
"""

import jax
import jax.numpy as jnp

from neva_jax.errors import UserError
from neva_jax.models.layers import dropout

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    window: int | None = None,
    backend: str = "xla",
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads.

    Args:
      q: [B, T, H, K].
      k, v: [B, S, G, K] with H a multiple of G; query head h reads key head h // (H / G).
      causal: token i sees only keys j <= i.
      segment_ids: [B, T] i32, T = S: attention stays inside a segment. None: one segment per row.
      positions: [B, T] i32: keys are a cache whose slot j holds position j; token at position p sees slots 0 ... p.
      window: W, tokens that a token sees, itself included; only with a causal mask. None: all.
      backend: `xla`, or `cudnn` (bf16 or fp16 on a GPU; no segments, no cache, no dropout).
      dropout_rate, rng: part of the weights that is zeroed, and by which key; None zeroes nothing.

    Returns:
      [B, T, H, K] in q's dtype; scores and softmax are fp32.

    Raises:
      ValueError: a mask that the backend does not have, or dropout.
    """
    if backend == "cudnn":
        if segment_ids is not None or positions is not None:
            raise ValueError("attention backend cudnn masks causally only; use xla for segments or a cache")
        if dropout_rate and rng is not None:
            raise ValueError("attention backend cudnn has no dropout; use xla")
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, local_window_size=local, implementation="cudnn")
    b, t, h, width = q.shape
    groups = k.shape[2]
    grouped = q.reshape(b, t, groups, h // groups, width)  # [B, T, G, R, K]
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    mask = _mask(t, k.shape[1], causal, segment_ids, positions, window)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(v.dtype), dropout_rate, rng)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, v).reshape(b, t, h, width)


def _mask(
    t: int,
    s: int,
    causal: bool,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    window: int | None,
) -> jax.Array | None:
    """[B or 1, T, S] bool, True where attention is allowed; None where it is allowed everywhere."""
    if positions is None and not causal:
        return None
    query = jnp.arange(t)[None, :, None] if positions is None else positions[:, :, None]
    key = jnp.arange(s)[None, None, :]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def choose_backend(name: str, dtype: jnp.dtype, width: int, dropout_rate: float = 0.0) -> str:
    """The kernel for heads of K = `width`: `auto` -> `cudnn` where it runs, else `xla`; other names stay.

    Raises:
      UserError: `cudnn` is asked for where it does not run, or with dropout.
    """
    if dropout_rate and name == "cudnn":
        # jax.nn.dot_product_attention has no argument for it, and cuDNN's own random bits follow the layout.
        raise UserError(
            f"model.attention=cudnn has no dropout (model.llm.attention_dropout={dropout_rate}); use auto or xla"
        )
    if dropout_rate:
        return "xla"
    device = jax.devices()[0]
    on_gpu = device.platform == "gpu" and "NVIDIA" in device.device_kind.upper()
    # jax.nn.dot_product_attention's own conditions; Ampere is 8.0.
    modern = on_gpu and float(getattr(device, "compute_capability", "0")) >= 8
    possible = modern and dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128
    if name == "cudnn" and not possible:
        raise UserError(
            f"model.attention=cudnn needs bf16 (here {jnp.dtype(dtype).name}), a head width divisible by 8 and at most "
            f"128 (here {width}), and an NVIDIA GPU from Ampere on (here {device.device_kind}); use auto"
        )
    if name == "auto":
        return "cudnn" if possible else "xla"
    return name
