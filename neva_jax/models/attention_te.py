"""Transformer Engine's attention for packed rows: cuDNN computes the segments alone, not the whole square of a row.

Its kernels leave what stands at padding as it was in memory, forward and backward; here it is zero. They ask for the
mesh while they are traced, which for the backward pass is later than the call: hence a `custom_vjp` around theirs.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from transformer_engine.jax.attention import (
    AttnBiasType,
    AttnMaskType,
    AttnSoftmaxType,
    QKVLayout,
    SequenceDescriptor,
    fused_attn,
)

from neva_jax.precision.te import one_device


def ragged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    segments: int,
    window: int | None,
) -> jax.Array:
    """Causal attention within each segment; arguments as `attend`'s."""
    real = (segment_ids > 0)[:, :, None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))  # for their gradients
    return jnp.where(real, _fused(segments, window, q, k, v, segment_ids, positions), 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(segments: int, window: int | None, *arrays: jax.Array) -> jax.Array:
    return _forward(segments, window, *arrays)[0]


def _forward(
    segments: int,
    window: int | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, Callable]:
    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return fused_attn(
            (q, k, v),
            None,
            SequenceDescriptor.from_segment_ids_and_pos(segment_ids, positions),
            None,
            attn_bias_type=AttnBiasType.NO_BIAS,
            attn_mask_type=AttnMaskType.PADDING_CAUSAL_MASK,
            qkv_layout=QKVLayout.THD_THD_THD,
            softmax_type=AttnSoftmaxType.VANILLA_SOFTMAX,
            scaling_factor=q.shape[-1] ** -0.5,
            dropout_probability=0.0,
            is_training=True,
            max_segments_per_seq=segments,
            window_size=None if window is None else (window - 1, 0),
        )

    with one_device():
        return jax.vjp(call, q, k, v)


def _backward(segments: int, window: int | None, back: Callable, g: jax.Array) -> tuple[jax.Array | None, ...]:
    with one_device():
        return *back(g), None, None


_fused.defvjp(_forward, _backward)
