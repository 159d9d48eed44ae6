"""Dtypes of a run: fp32 masters for what is trained, a storage dtype for what is frozen, a compute dtype."""

import jax.numpy as jnp

from neva_jax.config import PrecisionConfig

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def compute_dtype(precision: PrecisionConfig) -> jnp.dtype:
    """Dtype of activations and matrix products; norms, softmax and loss are fp32 whatever it is."""
    return DTYPES.get(precision.compute, jnp.bfloat16)


def frozen_dtype(precision: PrecisionConfig) -> jnp.dtype:
    """Dtype in which frozen parameters are stored."""
    return compute_dtype(precision) if precision.frozen is None else DTYPES[precision.frozen]
