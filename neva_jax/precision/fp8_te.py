"""FP8 by Transformer Engine's kernels: the same five functions as `fp8_xla`, each one kernel with the cast inside.

Its layers (`dense`, `layernorm_mlp`) quantize the kernel in every step and compute its gradient always; these are the
kernels that they are made of, so that a frozen kernel is quantized once. They see matrices: leading dimensions are
joined. Written against 2.11 (docs/fp8.md); one device.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from transformer_engine.jax import cpp_extensions as te
from transformer_engine.jax.quantize import (
    CurrentScaleQuantizer,
    DelayedScaleQuantizer,
    QuantizeLayout,
    ScaledTensorFactory,
    ScalingMode,
)
from transformer_engine.jax.sharding import MeshResource, global_shard_guard

from neva_jax.precision.fp8_xla import Cast

SWIGLU = ("silu", "linear")
NO_MESH = MeshResource()


@dataclass
class _Delayed(DelayedScaleQuantizer):
    """Tells the largest value that a kernel met, instead of keeping a history of its own."""

    amax: jax.Array | None = None

    def update(self, new_amax: jax.Array) -> None:
        self.amax = new_amax


def _quantizer(scale: jax.Array | None, dtype: Any) -> Any:
    if scale is None:
        return CurrentScaleQuantizer(q_dtype=dtype, q_layout=QuantizeLayout.ROWWISE)
    return _Delayed(
        q_dtype=dtype,
        scaling_mode=ScalingMode.DELAYED_TENSOR_SCALING,
        q_layout=QuantizeLayout.ROWWISE,
        scale=scale.reshape(1),
        amax_history=jnp.zeros((1,), jnp.float32),
    )


def _cast(tensor: Any, quantizer: Any, shape: tuple[int, ...]) -> Cast:
    # By current scaling nobody reads the amax.
    amax = jnp.float32(0) if getattr(quantizer, "amax", None) is None else quantizer.amax.reshape(())
    return Cast(tensor.data.reshape(shape), tensor.scale_inv.reshape(()), amax)


def cast(x: jax.Array, scale: jax.Array | None, dtype: Any) -> Cast:
    """See `fp8_xla.cast`."""
    quantizer = _quantizer(scale, dtype)
    with global_shard_guard(NO_MESH):
        return _cast(te.quantize(x.reshape(-1, x.shape[-1]), quantizer=quantizer), quantizer, x.shape)


def norm_cast(x: jax.Array, gamma: jax.Array, eps: float, scale: jax.Array | None, dtype: Any) -> Cast:
    """See `fp8_xla.norm_cast`."""
    quantizer = _quantizer(scale, dtype)
    with global_shard_guard(NO_MESH):
        tensor, _, _ = te.normalization_fwd(
            x.reshape(-1, x.shape[-1]), gamma.astype(x.dtype), None, False, eps, "rmsnorm", quantizer
        )
    return _cast(tensor, quantizer, x.shape)


def norm_grad(dy: jax.Array, x: jax.Array, gamma: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """See `fp8_xla.norm_grad`."""
    rows = x.reshape(-1, x.shape[-1])
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(rows.astype(jnp.float32)), axis=-1) + eps)
    with global_shard_guard(NO_MESH):
        dx, dgamma, _ = te.normalization_bwd(
            dy.reshape(rows.shape), rows, None, inverse, gamma.astype(x.dtype), None, False, eps, "rmsnorm"
        )
    return dx.reshape(x.shape), dgamma.astype(gamma.dtype)


def swiglu_cast(halves: jax.Array, scale: jax.Array | None, dtype: Any) -> Cast:
    """See `fp8_xla.swiglu_cast`."""
    quantizer = _quantizer(scale, dtype)
    rows = halves.reshape(-1, *halves.shape[-2:])
    with global_shard_guard(NO_MESH):
        tensor = te.act_lu(rows, SWIGLU, quantizer=quantizer)
    return _cast(tensor, quantizer, (*halves.shape[:-2], halves.shape[-1]))


def swiglu_grad_cast(dy: jax.Array, halves: jax.Array, scale: jax.Array | None, dtype: Any) -> Cast:
    """See `fp8_xla.swiglu_grad_cast`."""
    quantizer = _quantizer(scale, dtype)
    rows = halves.reshape(-1, *halves.shape[-2:])
    with global_shard_guard(NO_MESH):
        tensor, _ = te.quantize_dact_dbias(
            dy.reshape(-1, dy.shape[-1]), rows, activation_type=SWIGLU, is_dbias=False, quantizer=quantizer
        )
    return _cast(tensor, quantizer, halves.shape)


def product(x: Cast, kernel: jax.Array, inverse: jax.Array, inputs: int, dtype: jnp.dtype, fast: bool) -> jax.Array:
    """See `fp8_xla.product`."""
    rows, outputs = x.values.shape[: x.values.ndim - inputs], kernel.shape[: kernel.ndim - inputs]
    width = math.prod(kernel.shape[kernel.ndim - inputs :])
    y = _matmul(x.values.reshape(-1, width), x.inverse, kernel.reshape(-1, width), inverse, dtype, fast)
    return y.reshape(*rows, *outputs)


def outer(x: tuple[jax.Array, jax.Array], g: Cast, dtype: jnp.dtype) -> jax.Array:
    """See `fp8_xla.outer`."""
    values, inverse = x
    tokens = values.shape[0] * values.shape[1]
    a, b = values.reshape(tokens, -1).T, g.values.reshape(tokens, -1).T
    y = _matmul(a, inverse, b, g.inverse, dtype, fast=False)
    return y.reshape(*values.shape[2:], *g.values.shape[2:])


def _matmul(
    a: jax.Array, a_inverse: jax.Array, b: jax.Array, b_inverse: jax.Array, dtype: jnp.dtype, fast: bool
) -> jax.Array:
    """a [M, K], b [N, K] -> [M, N]; the one layout of FP8 operands that Hopper's products know."""

    def scaled(values: jax.Array, inverse: jax.Array) -> Any:
        return ScaledTensorFactory.create_1x(
            values, inverse.reshape(1), scaling_mode=ScalingMode.DELAYED_TENSOR_SCALING, dq_dtype=dtype
        )

    with global_shard_guard(NO_MESH):
        return te.gemm(
            scaled(a, a_inverse), scaled(b, b_inverse), contracting_dims=((1,), (1,)), use_split_accumulator=not fast
        )
