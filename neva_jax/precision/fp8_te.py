"""FP8 with Transformer Engine's kernels where they are the faster: norm and SwiGLU with the cast inside.

Casts alone, products and the norm's gradient are XLA's: it tries cublasLt's algorithms out, which undo the scales. When
this mixture was chosen, eight 7B layers of 10,240 tokens on an H100, forward and back, delayed scaling: Transformer
Engine throughout 90.9 ms, XLA throughout 91.1, this mixture 85.2 (docs/fp8.md). Its layers (`dense`, `layernorm_mlp`)
would besides quantize a frozen kernel in every step. Written against 2.11.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from transformer_engine.jax import cpp_extensions as te
from transformer_engine.jax.quantize import CurrentScaleQuantizer, DelayedScaleQuantizer, QuantizeLayout, ScalingMode

from neva_jax.precision import fp8_pallas, fp8_xla
from neva_jax.precision.fp8_xla import Cast, cast, norm_grad, outer, product
from neva_jax.precision.te import one_device

__all__ = ["cast", "heads_grad_cast", "norm_cast", "norm_grad", "outer", "product", "swiglu_cast", "swiglu_grad_cast"]

SWIGLU = ("silu", "linear")
ONE_DEVICE = True  # see `fp8._by_part`


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


def norm_cast(x: jax.Array, gamma: jax.Array, eps: float, scale: jax.Array | None, dtype: Any) -> Cast:
    """See `fp8_xla.norm_cast`."""
    quantizer = _quantizer(scale, dtype)
    with one_device():
        tensor, _, _ = te.normalization_fwd(
            x.reshape(-1, x.shape[-1]), gamma.astype(x.dtype), None, False, eps, "rmsnorm", quantizer
        )
    return _cast(tensor, quantizer, x.shape)


def heads_grad_cast(
    dq: jax.Array, dk: jax.Array, dv: jax.Array, cos: jax.Array, sin: jax.Array, scale: jax.Array | None, dtype: Any
) -> Cast:
    """See `fp8_xla.heads_grad_cast`."""
    # By current scaling what is joined is read twice, so it must be there.
    ours = fp8_xla if scale is None or not fp8_pallas.fits(dq, dk, cos) else fp8_pallas
    return ours.heads_grad_cast(dq, dk, dv, cos, sin, scale, dtype)


def swiglu_cast(halves: jax.Array, scale: jax.Array | None, dtype: Any) -> Cast:
    """See `fp8_xla.swiglu_cast`."""
    if halves.shape[-1] % 16:  # of a device's part
        return fp8_xla.swiglu_cast(halves, scale, dtype)
    quantizer = _quantizer(scale, dtype)
    rows = halves.reshape(-1, *halves.shape[-2:])
    with one_device():
        tensor = te.act_lu(rows, SWIGLU, quantizer=quantizer)
    return _cast(tensor, quantizer, (*halves.shape[:-2], halves.shape[-1]))


def swiglu_grad_cast(dy: jax.Array, halves: jax.Array, scale: jax.Array | None, dtype: Any) -> Cast:
    """See `fp8_xla.swiglu_grad_cast`."""
    if halves.shape[-1] % 16:
        return fp8_xla.swiglu_grad_cast(dy, halves, scale, dtype)
    quantizer = _quantizer(scale, dtype)
    rows = halves.reshape(-1, *halves.shape[-2:])
    with one_device():
        tensor, _ = te.quantize_dact_dbias(
            dy.reshape(-1, dy.shape[-1]), rows, activation_type=SWIGLU, is_dbias=False, quantizer=quantizer
        )
    return _cast(tensor, quantizer, halves.shape)
