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
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.config import LlmConfig
from neva_jax.derived import head_dim, kv_heads
from neva_jax.models.layers import param
from neva_jax.precision import fp8

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


def quantized(llm: dict[str, Any], recipe: fp8.Recipe) -> dict[str, Any]:
    """A language model's parameters with one stack `layers` -> with the kernels of the recipe's sites in FP8.

    Layers that stay in bf16 become stacks of their own (`first_layers`, `last_layers`).
    """
    layers = llm["layers"]
    total = layers["attention_norm"]["scale"].shape[0]
    parts = {
        "first_layers": (0, recipe.first),
        "layers": (recipe.first, recipe.last),
        "last_layers": (recipe.last, total),
    }
    stacks = {name: jax.tree.map(lambda p, a=a, b=b: p[a:b], layers) for name, (a, b) in parts.items() if a < b}
    middle = stacks["layers"]
    for site in recipe.sites:
        names = PARAMETERS[site]

        def one(parameters: dict[str, jax.Array], site: str = site) -> dict[str, jax.Array]:
            return fp8.store(native_kernel(site, parameters.get), INPUTS[site])[0]._asdict()

        middle[f"fp8_{site}"] = jax.lax.map(one, {name: middle.pop(name) for name in names})
    return {**llm, **stacks}
