"""FP8 in plain XLA: elementwise code that the compiler fuses, and `dot_general` on float8 operands.

On a GPU such a product becomes one of cublasLt's FP8 kernels, which want both operands contiguous along the sum; the
scales are undone afterwards. Elsewhere it is computed by conversion, with the same numbers up to the order of sums:
the product of two FP8 numbers is exact in fp32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cast(NamedTuple):
    """A tensor in FP8, the factor that undoes its scale (f32), and its largest absolute value before (f32)."""

    values: jax.Array
    inverse: jax.Array
    amax: jax.Array


def largest(dtype: Any) -> float:
    """The largest finite number of an FP8 dtype: 448 of e4m3, 57344 of e5m2."""
    return float(jnp.finfo(dtype).max)


def cast(x: jax.Array, scale: jax.Array | None, dtype: Any) -> Cast:
    """round(clip(scale * x)); scale None: the one that makes the largest value of x the largest of dtype."""
    y = x.astype(jnp.float32)
    amax, top = jnp.max(jnp.abs(y)), largest(dtype)
    if scale is None:
        usable = (amax > 0) & jnp.isfinite(amax)
        scale = jnp.where(usable, top / jnp.where(usable, amax, 1), 1)
    return Cast(jnp.clip(y * scale, -top, top).astype(dtype), 1 / scale, amax)


def norm_cast(x: jax.Array, gamma: jax.Array, eps: float, scale: jax.Array | None, dtype: Any) -> Cast:
    """The RMS norm of x [..., D], cast."""
    return cast(_norm(x, gamma, eps), scale, dtype)


def norm_grad(dy: jax.Array, x: jax.Array, gamma: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Gradients of the RMS norm for x and gamma."""
    return jax.vjp(lambda x, gamma: _norm(x, gamma, eps), x, gamma)[1](dy.astype(jnp.float32))


def swiglu_cast(halves: jax.Array, scale: jax.Array | None, dtype: Any) -> Cast:
    """silu(gate) * up for halves [..., 2, F] (gate, up), cast."""
    return cast(_swiglu(halves), scale, dtype)


def swiglu_grad_cast(dy: jax.Array, halves: jax.Array, scale: jax.Array | None, dtype: Any) -> Cast:
    """The gradient of `swiglu` for its halves [..., 2, F], cast."""
    gate, up = halves[..., 0, :].astype(jnp.float32), halves[..., 1, :].astype(jnp.float32)
    dy, gain = dy.astype(jnp.float32), jax.nn.sigmoid(gate)
    dgate = dy * up * gain * (1 + gate * (1 - gain))
    return cast(jnp.stack([dgate, dy * gate * gain], axis=-2), scale, dtype)


def product(x: Cast, kernel: jax.Array, inverse: jax.Array, inputs: int, dtype: jnp.dtype, fast: bool) -> jax.Array:
    """x [B, T, *K] times kernel [*N, *K], which `inverse` scales back -> [B, T, *N] of dtype.

    fast: sums may be kept in fewer bits than fp32 (the hardware's fast accumulation).
    """
    lhs = tuple(range(x.values.ndim - inputs, x.values.ndim))
    rhs = tuple(range(kernel.ndim - inputs, kernel.ndim))
    return _dot(x.values, kernel, (lhs, rhs), x.inverse * inverse, dtype, fast)


def outer(x: tuple[jax.Array, jax.Array], g: Cast, dtype: jnp.dtype) -> jax.Array:
    """The kernel's gradient, a sum over rows and tokens: x [B, T, *K] and g [B, T, *N] -> [*K, *N]."""
    return _dot(x[0], g.values, ((0, 1), (0, 1)), x[1] * g.inverse, dtype, fast=False)


def _dot(a: jax.Array, b: jax.Array, dims: Any, inverse: jax.Array, dtype: jnp.dtype, fast: bool) -> jax.Array:
    precision = jax.lax.Precision.DEFAULT if fast else jax.lax.Precision.HIGHEST
    y = jax.lax.dot_general(a, b, (dims, ((), ())), precision=precision, preferred_element_type=dtype)
    return (y.astype(jnp.float32) * inverse).astype(dtype)


def _norm(x: jax.Array, gamma: jax.Array, eps: float) -> jax.Array:
    """As `models.layers.RMSNorm`, in fp32: it is rounded once, by the cast."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y * gamma.astype(jnp.float32)


def _swiglu(halves: jax.Array) -> jax.Array:
    gate, up = halves[..., 0, :].astype(jnp.float32), halves[..., 1, :].astype(jnp.float32)
    return jax.nn.silu(gate) * up
