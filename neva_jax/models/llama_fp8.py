"""The kernels of Llama's FP8 sites: which parameters they join, and how they are held in FP8.

    site      parameters    [*K, *N]            joined because
    qkv       q, k, v       [D, G, R + 2, K]    the way back adds three products in one, without three results in memory
    o         o             [H, K, D]
    gate_up   gate, up      [D, 2, F]           the same, and SwiGLU reads both
    down      down          [F, D]

A group of qkv is R = H / G query heads, their key head and their value head: no dimension that a mesh splits is joined
with another. D hidden size, H query heads, G key/value heads, K head width, F MLP width, L layers.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.config import LlmConfig
from neva_jax.derived import head_dim, kv_heads
from neva_jax.models.layers import param
from neva_jax.precision import fp8
from neva_jax.precision.fp8_recipe import Recipe

PARAMETERS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
INPUTS = {"qkv": 1, "o": 2, "gate_up": 1, "down": 1}  # dimensions of *K


def native_kernel(site: str, weight: Callable[[str], jax.Array]) -> jax.Array:
    """The kernel [*K, *N] of a site from the parameters `weight(name)` of a layer."""
    first, *others = (weight(name) for name in PARAMETERS[site])
    if site == "gate_up":
        return jnp.stack([first, *others], axis=1)
    if site == "qkv":
        d, groups, width = others[0].shape
        queries = first.reshape(d, groups, -1, width)
        return jnp.concatenate([queries, *(other[:, :, None] for other in others)], axis=2)
    return first


def _shape(site: str, config: LlmConfig) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    """Shape and logical axes of [*K, *N]."""
    d, h, g, k = config.hidden_size, config.num_heads, kv_heads(config), head_dim(config)
    return {
        "qkv": ((d, g, h // g + 2, k), ("embed", "kv_heads", None, "head_dim")),
        "o": ((h, k, d), ("heads", "head_dim", "embed")),
        "gate_up": ((d, 2, config.intermediate_size), ("embed", None, "mlp")),
        "down": ((config.intermediate_size, d), ("mlp", "embed")),
    }[site]


class Fp8Kernel(nnx.Module):
    """A site's kernel in FP8, or a stack of `layers` of them: see `precision.fp8.Stored`."""

    def __init__(self, rngs: nnx.Rngs | None, site: str, config: LlmConfig, layers: int | None = None):
        shape, axes = _shape(site, config)
        n, zeros = INPUTS[site], jax.nn.initializers.zeros
        turned, turned_axes = (*shape[n:], *shape[:n]), (*axes[n:], *axes[:n])
        self.forward = param(rngs, turned, turned_axes, zeros, layers, jnp.float8_e4m3fn)
        self.backward = param(rngs, shape, axes, zeros, layers, jnp.float8_e4m3fn)
        self.inverse = param(rngs, (), (), zeros, layers)

    def __call__(self) -> fp8.Stored:
        """As the functions of `precision.fp8` take it."""
        return fp8.Stored(self.forward[...], self.backward[...], self.inverse[...])


def is_stored(names: Iterable[str]) -> bool:
    """Whether the names of a layer's parameters, or of the path to one, are those of kernels in FP8."""
    return any(name.startswith("fp8_") for name in names)


def holds_stored(llm: dict[str, Any]) -> bool:
    """Whether a language model's parameters, or their shapes, hold kernels in FP8."""
    return any(is_stored(stack) for stack in llm.values() if isinstance(stack, dict))


def stacks(recipe: Recipe | None, total: int) -> dict[str, tuple[int, int, Recipe | None]]:
    """The stacks of equal layers that hold a language model's `total`: name -> (first, last + 1, their recipe).

    One (`layers`), unless kernels are stored in FP8: layers that stay in bf16 are then stacks of their own
    (`first_layers`, `last_layers`), and with `recipe.apart` each layer is one (`layers_0`, ...).
    """
    if recipe is None or not recipe.stored:
        return {"layers": (0, total, recipe)}
    middle = {"layers": (recipe.first, recipe.last, recipe)}
    if recipe.apart:
        middle = {f"layers_{layer}": (layer, layer + 1, recipe) for layer in range(recipe.first, recipe.last)}
    found = {"first_layers": (0, recipe.first, None), **middle, "last_layers": (recipe.last, total, None)}
    return {name: part for name, part in found.items() if part[0] < part[1]}


def quantized(llm: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A language model's parameters with one stack `layers` -> with the kernels of the recipe's sites in FP8.

    The stacks are those of `stacks`.
    """
    llm = dict(llm)
    layers = llm.pop("layers")
    total = layers["attention_norm"]["scale"].shape[0]
    for name, (first, last, own) in stacks(recipe, total).items():
        stack = jax.tree.map(lambda p, first=first, last=last: p[first:last], layers)
        for site in own.sites if own is not None else ():
            stack[f"fp8_{site}"] = _stored(site, {name: stack.pop(name) for name in PARAMETERS[site]})
        llm[name] = stack
    return llm


@partial(jax.jit, static_argnums=0)  # traced and lowered once for all stacks that are alike
def _stored(site: str, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A site's parameters of a stack [L, ...] -> its kernels in FP8."""

    def one(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return fp8.store(native_kernel(site, layer.get), INPUTS[site])[0]._asdict()

    return jax.lax.map(one, parameters)
