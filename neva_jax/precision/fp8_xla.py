"""FP8 in plain XLA: elementwise code that the compiler fuses, and `dot_general` on float8 operands.

On a GPU such a product becomes one of cublasLt's FP8 kernels, which want both operands contiguous along the sum and
undo both scales while they write. XLA takes them where the operands are scaled back to the result's dtype, though
nothing is computed that way. Elsewhere FP8 numbers are multiplied by conversion and the product is scaled back: the
same numbers up to the order of sums, because the product of two FP8 numbers is exact in fp32.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from neva_jax.models.rotary import join_rotated_back
from neva_jax.parallel.target import target_devices

ONE_DEVICE = False  # whether its kernels know no mesh


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
    return _cast((x,), lambda parts: parts[0], scale, dtype)


def _cast(parts: tuple[jax.Array, ...], join: Callable, scale: jax.Array | None, dtype: Any) -> Cast:
    """Casts the parts of a tensor with one scale, and joins them in FP8: what is joined is written twice."""
    parts, top = tuple(part.astype(jnp.float32) for part in parts), largest(dtype)
    amax = reduce(jnp.maximum, (jnp.max(jnp.abs(part)) for part in parts))
    if scale is None:
        usable = (amax > 0) & jnp.isfinite(amax)
        scale = jnp.where(usable, top / jnp.where(usable, amax, 1), 1)
    values = join(tuple(jnp.clip(part * scale, -top, top).astype(dtype) for part in parts))
    return Cast(values, 1 / scale, amax)


def norm_cast(x: jax.Array, gamma: jax.Array, eps: float, scale: jax.Array | None, dtype: Any) -> Cast:
    """The RMS norm of x [..., D], cast."""
    return cast(_norm(x, gamma, eps), scale, dtype)


def norm_grad(dy: jax.Array, x: jax.Array, gamma: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Gradients of the RMS norm for x and gamma."""
    return jax.vjp(lambda x, gamma: _norm(x, gamma, eps), x, gamma)[1](dy.astype(jnp.float32))


def heads_grad_cast(
    dq: jax.Array, dk: jax.Array, dv: jax.Array, cos: jax.Array, sin: jax.Array, scale: jax.Array | None, dtype: Any
) -> Cast:
    """The gradient of `rotary.split_rotated` for the heads in groups [B, T, G, R + 2, K], cast."""
    return cast(join_rotated_back(dq, dk, dv, cos, sin), scale, dtype)


def swiglu_cast(halves: jax.Array, scale: jax.Array | None, dtype: Any) -> Cast:
    """silu(gate) * up for halves [..., 2, F] (gate, up), cast."""
    return cast(_swiglu(halves), scale, dtype)


def swiglu_grad_cast(dy: jax.Array, halves: jax.Array, scale: jax.Array | None, dtype: Any) -> Cast:
    """The gradient of `swiglu` for its halves [..., 2, F], cast."""
    # Without the barrier XLA would keep what it shares with the forward pass, in fp32.
    halves = jax.lax.optimization_barrier(halves)
    gate, up = halves[..., 0, :].astype(jnp.float32), halves[..., 1, :].astype(jnp.float32)
    dy, gain = dy.astype(jnp.float32), jax.nn.sigmoid(gate)
    dgate = dy * up * gain * (1 + gate * (1 - gain))
    return _cast((dgate, dy * gate * gain), partial(jnp.stack, axis=-2), scale, dtype)


def product(x: Cast, kernel: jax.Array, inverse: jax.Array, inputs: int, dtype: jnp.dtype, fast: bool) -> jax.Array:
    """x [B, T, *K] times kernel [*N, *K], which `inverse` scales back -> [B, T, *N] of dtype.

    fast: sums may be kept in fewer bits than fp32 (the hardware's fast accumulation).
    """
    lhs = tuple(range(x.values.ndim - inputs, x.values.ndim))
    rhs = tuple(range(kernel.ndim - inputs, kernel.ndim))
    return _dot((x.values, x.inverse), (kernel, inverse), (lhs, rhs), dtype, fast)


def outer(x: tuple[jax.Array, jax.Array], g: Cast, dtype: jnp.dtype) -> jax.Array:
    """The kernel's gradient, a sum over rows and tokens: x [B, T, *K] and g [B, T, *N] -> [*K, *N]."""
    return _dot(x, (g.values, g.inverse), ((0, 1), (0, 1)), dtype, fast=False)


def _dot(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array], dims: Any, dtype: jnp.dtype, fast: bool
) -> jax.Array:
    """a and b: (values in FP8, the factor that undoes their scale); dims: those that are summed over."""
    precision = jax.lax.Precision.DEFAULT if fast else jax.lax.Precision.HIGHEST
    if target_devices()[0].platform == "gpu":
        # The first barriers keep XLA from taking out the rounding to FP8, the last from adding a residual inside the
        # product, for which it would be copied first. One for both would have weights wait for activations: over fsdp
        # no gather could begin before them.
        a, b = map(jax.lax.optimization_barrier, (a, b))
        a, b = (values.astype(dtype) * inverse.astype(dtype) for values, inverse in (a, b))
        y = jax.lax.dot_general(a, b, (dims, ((), ())), precision=precision, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y)
    y = jax.lax.dot_general(a[0], b[0], (dims, ((), ())), precision=precision, preferred_element_type=dtype)
    return (y.astype(jnp.float32) * (a[1] * b[1])).astype(dtype)


def _norm(x: jax.Array, gamma: jax.Array, eps: float) -> jax.Array:
    """As `models.layers.RMSNorm`, in fp32: it is rounded once, by the cast."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y * gamma.astype(jnp.float32)


def _swiglu(halves: jax.Array) -> jax.Array:
    gate, up = halves[..., 0, :].astype(jnp.float32), halves[..., 1, :].astype(jnp.float32)
    return jax.nn.silu(gate) * up
