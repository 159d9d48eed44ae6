"""The Llama language model (HF LlamaForCausalLM), and its kin: Mistral's sliding window, Qwen2's biases.

Two things may be left out (training/shortcuts.py): what follows the last layer's attention at positions that are not
`wanted`, and a `prefix` that all rows share, whose keys and values are known.

With `mesh.overlap` a batch goes through the layers (models/llama_layer.py) in two parts that take turns
(models/parts.py).

B rows, T tokens, D hidden size, G key/value heads, K head width, V vocabulary rows, L layers, S cache slots, P tokens
of the prefix, N wanted positions of a row.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.config import LlmConfig, MeshConfig
from neva_jax.derived import head_dim, kv_heads, padded_vocab
from neva_jax.models.attention import MASKED, XLA, Backends
from neva_jax.models.layers import NO_REMAT, Remat, RMSNorm, dropout, normal, param, scan_layers
from neva_jax.models.llama_fp8 import stacks
from neva_jax.models.llama_layer import Block, LayerCache
from neva_jax.models.parts import joined, next_in_turn, parted, shared
from neva_jax.models.rotary import rotary_angles
from neva_jax.parallel.mesh import constrain, constrain_stream, ways
from neva_jax.precision import fp8
from neva_jax.precision.fp8_recipe import Recipe

# A run of equal layers: (its stack, the part of it or None for all, layers of the model, recipe)
Span = tuple[Block, tuple[int, int] | None, tuple[int, int], Recipe | None]


@partial(jax.jit, static_argnums=(0, 5, 6))
def _run(
    graphdef: nnx.GraphDef,
    parameters: nnx.State,
    parts: Sequence[jax.Array],
    given: Sequence[tuple],
    own: tuple,
    recipe: Recipe | None,
    short: bool,
) -> tuple[tuple[jax.Array, ...], LayerCache | None]:
    """A layer for the parts [B, T, D] of a batch, in turn -> (their x [B, T, D] or [B, N, D], the cache of the last).

    A function of its own to JAX: layers that are alike are traced, differentiated and lowered once in a process.

    Args:
      graphdef, parameters: the layer (`Block`), split.
      given: for each part: positions, angles, segment ids, wanted positions.
      own: of this layer: cache, key of dropout, prefix, scales of FP8.
      short: the layer is the last, and its MLP is for the wanted positions alone.
    """
    layer = nnx.merge(graphdef, parameters)
    cache, rng, prefix, in_fp8 = own
    count, layers, scales = len(parts), shared(layer, len(parts), parts[0].dtype), fp8.copies(len(parts), in_fp8)
    rngs = (rng,) * count if rng is None or count == 1 else jax.random.split(rng, count)
    x = list(parts)
    for i, (positions, angles, segment_ids, wanted) in enumerate(given):
        x[i], cache = layers[i].with_attention(
            *(x[i], positions, angles, segment_ids, cache, rngs[i], recipe, scales[i], prefix),
            wanted if short else None,
        )
        x = next_in_turn(x, i)
    for i in range(count):
        x[i] = layers[i].with_mlp(x[i], rngs[i], recipe, scales[i])
        x = next_in_turn(x, i)
    return tuple(x), cache


def _cut(per_layer: Any, first: int, last: int) -> Any:
    """Layers `first` ... `last` - 1 of arrays [L, ...]."""
    return jax.tree.map(lambda a: a[first:last], per_layer)


class Llama(nnx.Module):
    """Token embedding, L decoder layers, final norm and output head."""

    def __init__(
        self,
        rngs: nnx.Rngs | None,
        config: LlmConfig,
        dtype: jnp.dtype,
        backends: Backends = XLA,
        remat: Remat = NO_REMAT,
        unroll: int = 1,
        mesh: MeshConfig = MeshConfig(),  # noqa: B008 (it is frozen)
        recipe: Recipe | None = None,
    ):
        rows, init = padded_vocab(config), normal(config.init_std)
        self.embedding = param(rngs, (rows, config.hidden_size), ("vocab", "columns"), init)
        self.recipe = recipe
        for name, (start, end, own) in stacks(recipe, config.num_layers).items():
            stored = own.sites if own is not None and own.stored else ()
            setattr(self, name, Block(rngs, config, backends, end - start, mesh, stored))
        self.norm = RMSNorm(rngs, config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.head = param(rngs, (config.hidden_size, rows), ("embed", "vocab"), init)
        self.config, self.dtype, self.remat, self.unroll = config, dtype, remat, unroll
        self.sequence_parallel, self.overlap = mesh.sequence_parallel, mesh.overlap

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] i32 -> [B, T, D] in the compute dtype."""
        # The table is split over fsdp by its columns, and looked up where it lies: only rows that are wanted travel.
        tokens = constrain(tokens, "rows", "length")
        table = constrain(self.embedding[...].astype(self.dtype), "vocab", "columns")
        x = constrain(jnp.take(table, tokens, axis=0), "rows", "length", "columns")
        return constrain(x, "batch", "length", "features")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
        rng: jax.Array | None = None,
        states: fp8.State | None = None,
        prefix: LayerCache | None = None,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Runs the decoder.

        Args:
          x: [B, T, D] embeddings.
          positions: [B, T] i32, for the rotary embedding; with a cache also the slots that are written.
          segment_ids: [B, T] i32, or None for one segment per row.
          cache: [L, B, S, G, K] keys and values, or None.
          rng: the key of dropout; None: no dropout.
          states: what the FP8 layers remember (`precision.fp8.State`); None or {} where they need nothing. Current
            scaling does not read it.
          prefix: [L, P, G, K] keys and values of tokens before x, the same in every row; without cache and segments.
          wanted: [B, N] i32, the positions of each row whose hidden states are asked for; None: all. No cache then.

        Returns:
          (normed hidden states [B, T, D], or [B, N, D] with `wanted`; the cache with the new tokens or None)
        """
        angles = tuple(constrain(part, "batch", "length", None) for part in rotary_angles(positions, self.config))
        layer_rngs = None
        if rng is not None:
            rngs = jax.random.split(rng, self.config.num_layers + 1)
            x, layer_rngs = dropout(x, self.config.hidden_dropout, rngs[0]), rngs[1:]
        parts = 2 if self.overlap and cache is None and ways("mlp") > 1 else 1
        given = parted((positions, angles, segment_ids, wanted), parts)
        x = tuple(constrain_stream(part, self.sequence_parallel) for part in parted(x, parts))
        caches, scales = [], fp8.scales(self.recipe, states) if states and self.recipe.delayed else None
        for stack, span, bounds, recipe in self._spans(last_alone=wanted is not None):
            in_fp8 = None if recipe is None else _cut(scales, *(layer - recipe.first for layer in bounds))
            own = (*_cut((cache, layer_rngs, prefix), *bounds), in_fp8)
            short = wanted is not None and bounds[1] == self.config.num_layers

            def call(
                layer: Block, x: tuple[jax.Array, ...], own: tuple, recipe: Any = recipe, short: bool = short
            ) -> tuple[tuple[jax.Array, ...], Any]:
                y, cache = _run(*nnx.split(layer), x, given, own, recipe, short)
                return (x, y) if short else (y, cache)  # what a scan carries keeps its shape

            carried, output = scan_layers(
                stack,
                x,
                per_layer=own,
                remat=self._remat(bounds) if cache is None else NO_REMAT,
                unroll=min(self.unroll, bounds[1] - bounds[0]),
                span=span,
                call=call,
            )
            if short:
                return self.norm(joined([part[0] for part in output])), None
            x = carried
            caches.append(output)
        cache = caches[0] if len(caches) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
        return self.norm(joined(x)), cache

    def _spans(self, last_alone: bool) -> list[Span]:
        """Runs of equal layers; with `last_alone`, the last layer is a run of its own."""
        recipe, total = self.recipe, self.config.num_layers
        if recipe is None or recipe.stored:
            runs = [(getattr(self, name), None, (a, b), own) for name, (a, b, own) in stacks(recipe, total).items()]
        else:
            bounds = [(0, recipe.first, None), (recipe.first, recipe.last, recipe), (recipe.last, total, None)]
            runs = [(self.layers, (a, b) if b - a < total else None, (a, b), own) for a, b, own in bounds if a < b]
        stack, span, (a, b), own = runs[-1]
        if not last_alone or b - a == 1:
            return runs
        start, end = span or (0, b - a)
        last = [(stack, (start, end - 1), (a, b - 1), own), (stack, (end - 1, end), (b - 1, b), own)]
        return runs[:-1] + last

    def _remat(self, bounds: tuple[int, int]) -> Remat:
        """The model's remat policy for the layers of a span: `block` counts from the model's first."""
        if self.remat.policy == "none" or self.remat.method != "block":
            return self.remat
        left = min(self.remat.layers, bounds[1]) - bounds[0]
        return dataclasses.replace(self.remat, layers=left) if left > 0 else NO_REMAT

    def output_kernel(self) -> jax.Array:
        """The output head [D, V] in its stored dtype: the embedding's transpose where they are tied."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def logits(self, hidden: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """hidden [..., D] -> logits [..., V] f32; ids past the vocabulary get a logit that never wins.

        `kernel`: R copies [R, D, V] of the output head, one for each slice of hidden [R, ..., D].
        """
        equation = "...d,dv->...v" if kernel is None else "r...d,rdv->r...v"
        kernel = (self.output_kernel() if kernel is None else kernel).astype(self.dtype)
        logits = _in_fp32(equation, hidden, kernel)
        if kernel.shape[-1] == self.config.vocab_size:
            return logits
        return jnp.where(jnp.arange(kernel.shape[-1]) < self.config.vocab_size, logits, MASKED)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_fp32(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A product with results in fp32, whose gradient is rounded to x's dtype like that of any other product.

    JAX's own would multiply the fp32 gradient: on a GPU in TF32, at half the rate of bf16.
    """
    return jnp.einsum(equation, x, kernel, preferred_element_type=jnp.float32)


def _in_fp32_forward(equation: str, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _in_fp32(equation, x, kernel), (x, kernel)


def _in_fp32_backward(equation: str, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(partial(jnp.einsum, equation), *kept)[1](g.astype(kept[0].dtype))


_in_fp32.defvjp(_in_fp32_forward, _in_fp32_backward)


def empty_cache(config: LlmConfig, rows: int, slots: int, dtype: jnp.dtype) -> LayerCache:
    """A cache of zeros for `rows` rows and positions 0 ... slots - 1."""
    shape = (config.num_layers, rows, slots, kv_heads(config), head_dim(config))
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
