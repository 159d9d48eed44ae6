"""Work of a step that changes neither loss nor gradients, and how it is left out.

    train.labelled_positions=N   behind the last layer's attention only labelled positions matter: N of a row are
                                 computed
    train.constant_prefix=P      all rows begin with the same P tokens (<s>, the system text, "USER: "). With a frozen
                                 language model their keys and values are constants: computed once, at the start

A micro batch that does not fit, with more labels in a row or another beginning, is computed whole: both programs are in
the step, and the batch chooses. So no row needs to be checked beforehand.

B rows, T tokens, L layers, G key/value heads, K head width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from neva_jax.config import Config
from neva_jax.derived import head_dim, kv_heads
from neva_jax.errors import UserError
from neva_jax.models.llama import empty_cache
from neva_jax.models.llama_layer import LayerCache
from neva_jax.parallel.compiler import compiler_options
from neva_jax.parallel.mesh import replicated, ways_of
from neva_jax.precision.policy import compute_dtype
from neva_jax.training.setup import Parameters, abstract_parameters

Arrays = dict[str, jax.Array]


class Prefix(NamedTuple):
    """Tokens [P] i32 that rows begin with, and their keys and values [L, P, G, K]."""

    tokens: jax.Array
    cache: LayerCache


def prefix_tokens(row: dict[str, np.ndarray], count: int) -> np.ndarray:
    """The first `count` tokens [P] i32 of a row (without B, see DESIGN).

    Raises:
      UserError: there are fewer before the row's first image or label, or the row has none at all.
    """
    if "tokens" not in row:
        problem = row["bad_rows"][0].message
        raise UserError(f"train.constant_prefix={count}: the first training row cannot be made: {problem}")
    plain = _is_plain(row) & (row["segment_ids"] > 0)
    most = int(np.argmin(np.append(plain, False)))
    if count > most:
        raise UserError(
            f"train.constant_prefix={count}: the first training row has {most} tokens before its first image or label; "
            f"use at most {most}"
        )
    return np.asarray(row["tokens"][:count], np.int32)


def compute_prefix(config: Config, mesh: Mesh, params: Parameters, tokens: np.ndarray, quantize_frozen: bool) -> Prefix:
    """Keys and values of `tokens` [P] with the parameters of all components, on every device.

    In FP8 by current scaling (`whole_graphdef`).

    Args:
      quantize_frozen: as in `abstract_parameters`; how `params` are held.
    """
    options = compiler_options(config, mesh.shape["fsdp"])
    graphdef, _ = abstract_parameters(by_current_scaling(config), mesh, quantize_frozen)
    rows, llm = ways_of(mesh, "batch"), config.model.llm  # one for each group of devices: a batch is split

    def compute(params: Parameters, tokens: jax.Array) -> LayerCache:
        model = nnx.merge(graphdef, params)
        x = model.llm.embed(jnp.broadcast_to(tokens, (rows, len(tokens))))
        positions = jnp.broadcast_to(jnp.arange(len(tokens)), x.shape[:2])
        cache = empty_cache(llm, rows, len(tokens), compute_dtype(config.precision))
        return jax.tree.map(lambda a: a[:, 0], model.llm(x, positions, cache=cache)[1])

    placed = jax.device_put(tokens, replicated(mesh))
    run = jax.jit(compute, out_shardings=replicated(mesh), compiler_options=options)
    return Prefix(placed, run(params, placed))


def by_current_scaling(config: Config) -> Config:
    """The configuration, with `fp8_current` in place of `fp8_delayed`: parameters stay what they are."""
    if config.precision.compute != "fp8_delayed":
        return config
    backend = "xla" if config.precision.fp8.backend == "xla" else "auto"  # Transformer Engine's serves one device
    settings = dataclasses.replace(config.precision.fp8, backend=backend)
    precision = dataclasses.replace(config.precision, compute="fp8_current", fp8=settings)
    return dataclasses.replace(config, precision=precision)


def whole_graphdef(config: Config, mesh: Mesh, quantize_frozen: bool = True) -> nnx.GraphDef | None:
    """The model for batches that hold the prefix, validation's too; None: the model of the step.

    Delayed scaling would quantize the prefix with the scales of steps that never saw it, and what a Llama computes for
    its first tokens is larger than anything later (Sun et al., Massive Activations, 2024).
    """
    if not config.train.constant_prefix or config.precision.compute != "fp8_delayed":
        return None
    return abstract_parameters(by_current_scaling(config), mesh, quantize_frozen)[0]


def abstract_prefix(config: Config, mesh: Mesh) -> Prefix:
    """Shapes and shardings of what `compute_prefix` returns."""
    llm, count, place = config.model.llm, config.train.constant_prefix, replicated(mesh)
    shape, dtype = (llm.num_layers, count, kv_heads(llm), head_dim(llm)), compute_dtype(config.precision)
    one = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    return Prefix(jax.ShapeDtypeStruct((count,), jnp.int32, sharding=place), LayerCache(one, one))


def fits(micro: Arrays, prefix: Prefix | None, labelled: int | None) -> jax.Array:
    """Whether nothing is lost by the shortcuts in this micro batch (arrays [B, T]): a bool scalar."""
    fit = jnp.bool(True)
    if labelled is not None:
        fit &= jnp.all(jnp.count_nonzero(micro["loss_weights"], axis=1) <= labelled)
    if prefix is not None:
        first = {name: micro[name][:, : len(prefix.tokens)] for name in ("tokens", "image_slots", "loss_weights")}
        fit &= jnp.all((first["tokens"] == prefix.tokens) & _is_plain(first))
    return fit


def _is_plain(arrays: dict[str, Any]) -> Any:
    """Where text without a label stands."""
    return (arrays["image_slots"] == -1) & (arrays["loss_weights"] == 0)


def without_prefix(micro: Arrays, prefix: Prefix) -> Arrays:
    """The micro batch without its first P positions."""
    count = len(prefix.tokens)
    return {name: array if name == "images" else array[:, count:] for name, array in micro.items()}


def labelled_positions(weights: jax.Array, most: int) -> jax.Array:
    """The first `most` labelled positions of each row of weights [B, T], filled up with others -> [B, N] i32."""
    return jnp.argsort(weights == 0, axis=1, stable=True)[:, :most]
