"""The pieces that the vision encoder, the projector and the language model share.

A parameter is an `nnx.Param` with the logical axes of its dimensions in its metadata `axes`. A module that stands
for L equal layers is built once with `layers=L`: every parameter then has a leading dimension L, and `scan_layers`
runs the module once for each slice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.precision.fp8 import KEPT

# What `dots` keeps beside `dot_general`: the kernels that stand in its place, known by their primitive's name because
# Transformer Engine may not be there. An attention kernel's output is as small as its input, and dear to compute again.
KERNELS = ("te_gemm_ffi", "dot_product_attention_fwd", "te_fused_attn_forward_ffi")


def _keep_products(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    return primitive.name.startswith(KERNELS) or jax.checkpoint_policies.dots_saveable(
        primitive, *arguments, **parameters
    )


# The largest values that FP8 casts have met are numbers, each of which costs a pass.
_AMAX = jax.checkpoint_policies.save_only_these_names(KEPT)
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(_keep_products, _AMAX),
    "full": _AMAX,
}


@dataclass(frozen=True)
class Remat:
    """What the backward pass computes again (NeMo's activation checkpointing).

    policy: `none`, `dots` or `full`.
    method, layers: `uniform` recomputes groups of `layers` layers, each from its input; `block` only the first
    `layers` layers.
    """

    policy: str = "none"
    method: str = "uniform"
    layers: int = 1


NO_REMAT = Remat()


def normal(std: float) -> Callable:
    """Initializer N(0, std^2)."""
    return jax.nn.initializers.normal(std)


def uniform(bound: float) -> Callable:
    """Initializer U(-bound, bound)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def param(
    rngs: nnx.Rngs | None,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Callable,
    layers: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> nnx.Param:
    """A parameter with logical axes; `layers` puts a leading dimension before `shape`.

    rngs None: its shape and dtype alone.
    """
    if layers is not None:
        shape, axes = (layers, *shape), ("layers", *axes)
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes)


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Each element is 0 with probability `rate` and divided by 1 - rate otherwise; rng None: x as it is.

    What is zeroed depends on `rng` and the shape alone, not on the mesh: JAX's threefry is partitionable.
    """
    if rng is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0)


class LayerNorm(nnx.Module):
    """Layer norm over the last dimension, computed in fp32 (torch.nn.LayerNorm)."""

    def __init__(self, rngs: nnx.Rngs | None, dim: int, eps: float, layers: int | None = None):
        self.scale = param(rngs, (dim,), ("norm",), jax.nn.initializers.ones, layers)
        self.bias = param(rngs, (dim,), ("norm",), jax.nn.initializers.zeros, layers)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype."""
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(y - mean), axis=-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dimension, computed in fp32 (HF LlamaRMSNorm)."""

    def __init__(self, rngs: nnx.Rngs | None, dim: int, eps: float, layers: int | None = None):
        self.scale = param(rngs, (dim,), ("norm",), jax.nn.initializers.ones, layers)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def scan_layers(
    stack: nnx.Module,
    x: Any,
    *,
    per_layer: Any = None,
    remat: Remat = NO_REMAT,
    unroll: int = 1,
    span: tuple[int, int] | None = None,
    call: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
) -> tuple[Any, Any]:
    """Runs the L layers of `stack` one after the other.

    Args:
      x: carried from layer to layer.
      per_layer: pytree of arrays [L, ...]; layer l gets slice l.
      remat: which activations are kept for the backward pass, and of which layers.
      unroll: layers per iteration of the scan.
      span: (first, last): run these layers alone, `last` excluded; None runs all.
      call: `(layer, x, slice of per_layer) -> (x, output)`.

    Returns:
      (x, outputs of all layers stacked [L, ...])
    """
    graphdef, parameters = nnx.split(stack)
    if span is not None:
        parameters = jax.tree.map(lambda p: p[span[0] : span[1]], parameters)
    slices = (parameters, per_layer)

    def body(x, slices):
        layer_parameters, layer_input = slices
        return call(nnx.merge(graphdef, layer_parameters), x, layer_input)

    if remat.policy == "none":
        return jax.lax.scan(body, x, slices, unroll=unroll)
    total = jax.tree.leaves(parameters)[0].shape[0]
    if remat.method == "block" and remat.layers < total:
        first = jax.tree.map(lambda a: a[: remat.layers], slices)
        rest = jax.tree.map(lambda a: a[remat.layers :], slices)
        again = _checkpoint(body, remat.policy, _dissolves(remat.layers, unroll))
        x, first_output = jax.lax.scan(again, x, first, unroll=unroll)
        x, rest_output = jax.lax.scan(body, x, rest, unroll=unroll)
        return x, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first_output, rest_output)
    if remat.method == "uniform" and remat.layers > 1:
        group = remat.layers
        grouped = jax.tree.map(lambda a: a.reshape(total // group, group, *a.shape[1:]), slices)
        whole = partial(jax.lax.scan, body, unroll=unroll)
        x, output = jax.lax.scan(_checkpoint(whole, remat.policy, _dissolves(total // group, 1)), x, grouped)
        return x, jax.tree.map(lambda a: a.reshape(total, *a.shape[2:]), output)
    return jax.lax.scan(_checkpoint(body, remat.policy, _dissolves(total, unroll)), x, slices, unroll=unroll)


def _checkpoint(body: Callable, policy: str, dissolves: bool) -> Callable:
    """dissolves: XLA would find what is computed again beside the first time, and keep that."""
    return jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=dissolves)


def _dissolves(length: int, unroll: int) -> bool:
    """Whether iterations of a scan come to stand outside its loop: one trip is no loop, a remainder is beside it."""
    return length < 2 * unroll or length % unroll > 0
