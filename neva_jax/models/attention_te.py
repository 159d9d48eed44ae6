"""Transformer Engine's attention for packed rows: cuDNN computes the segments alone, not the whole square of a row."""

import jax
from transformer_engine.jax.attention import (
    AttnBiasType,
    AttnMaskType,
    AttnSoftmaxType,
    QKVLayout,
    SequenceDescriptor,
    fused_attn,
)
from transformer_engine.jax.sharding import MeshResource, global_shard_guard


def ragged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    segments: int,
    window: int | None,
) -> jax.Array:
    """Causal attention within each segment; arguments as `attend`'s. What stands at padding is not defined."""
    with global_shard_guard(MeshResource()):
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
