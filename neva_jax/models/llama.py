"""The Llama language model (HF LlamaForCausalLM).

B rows, T tokens, D hidden size, H query heads, G key/value heads, K head width, F MLP width, V vocabulary rows,
L layers, S cache slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.config import LlmConfig, head_dim, kv_heads, padded_vocab
from neva_jax.models.attention import MASKED, attend
from neva_jax.models.layers import RMSNorm, normal, param, scan_layers
from neva_jax.parallel.mesh import constrain


class LayerCache(NamedTuple):
    """Keys and values of the tokens so far: [L, B, S, G, K] for the model, [B, S, G, K] for one layer."""

    k: jax.Array
    v: jax.Array


def rotary_angles(positions: jax.Array, width: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary embedding (Su et al. 2021; HF LlamaRotaryEmbedding).

    Args:
      positions: [B, T] i32.
      width: K, the head width; base: theta.

    Returns:
      (cos, sin), each [B, T, K/2] f32, of positions * base^(-2i/K).
    """
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + K/2]) of each head by the angles; x: [B, T, H, K], computed in fp32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """One decoder layer, or a stack of `layers` of them: attention and SwiGLU MLP, each behind an RMS norm."""

    def __init__(self, rngs: nnx.Rngs, config: LlmConfig, backend: str, layers: int | None = None):
        d, h, g, k, f = (
            config.hidden_size,
            config.num_heads,
            kv_heads(config),
            head_dim(config),
            config.intermediate_size,
        )
        init = normal(config.init_std)
        self.attention_norm = RMSNorm(rngs, d, config.norm_eps, layers)
        self.q = param(rngs, (d, h, k), ("embed", "heads", "head_dim"), init, layers)
        self.k = param(rngs, (d, g, k), ("embed", "kv_heads", "head_dim"), init, layers)
        self.v = param(rngs, (d, g, k), ("embed", "kv_heads", "head_dim"), init, layers)
        self.o = param(rngs, (h, k, d), ("heads", "head_dim", "embed"), init, layers)
        self.mlp_norm = RMSNorm(rngs, d, config.norm_eps, layers)
        self.gate = param(rngs, (d, f), ("embed", "mlp"), init, layers)
        self.up = param(rngs, (d, f), ("embed", "mlp"), init, layers)
        self.down = param(rngs, (f, d), ("mlp", "embed"), init, layers)
        self.backend = backend

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D], with the layer's cache if there is one -> (x [B, T, D], the cache with the new tokens)."""
        dtype = x.dtype
        with jax.named_scope("attention"):
            y = self.attention_norm(x)
            q = rotate(jnp.einsum("btd,dhk->bthk", y, self.q[...].astype(dtype)), *angles)
            k = rotate(jnp.einsum("btd,dgk->btgk", y, self.k[...].astype(dtype)), *angles)
            v = jnp.einsum("btd,dgk->btgk", y, self.v[...].astype(dtype))
            q = constrain(q, "batch", "length", "heads", "head_dim")
            k = constrain(k, "batch", "length", "kv_heads", "head_dim")
            v = constrain(v, "batch", "length", "kv_heads", "head_dim")
            if cache is None:
                attended = attend(q, k, v, segment_ids=segment_ids, backend=self.backend)
            else:
                cache = LayerCache(_write(cache.k, k, positions), _write(cache.v, v, positions))
                attended = attend(q, cache.k, cache.v, positions=positions)
            x = x + jnp.einsum("bthk,hkd->btd", attended, self.o[...].astype(dtype))
            x = constrain(x, "batch", "length", "features")
        with jax.named_scope("mlp"):
            y = self.mlp_norm(x)
            gate = jnp.einsum("btd,df->btf", y, self.gate[...].astype(dtype))
            up = jnp.einsum("btd,df->btf", y, self.up[...].astype(dtype))
            inner = constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp")
            x = x + jnp.einsum("btf,fd->btd", inner, self.down[...].astype(dtype))
            return constrain(x, "batch", "length", "features"), cache


def _write(cache: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes new [B, T, G, K] into cache [B, S, G, K] at the slots `positions` [B, T] of each row."""
    return cache.at[jnp.arange(cache.shape[0])[:, None], positions].set(new.astype(cache.dtype))


class Llama(nnx.Module):
    """Token embedding, L decoder layers, final norm and output head."""

    def __init__(self, rngs: nnx.Rngs, config: LlmConfig, dtype: jnp.dtype, backend: str, remat: str, unroll: int):
        rows, init = padded_vocab(config), normal(config.init_std)
        self.embedding = param(rngs, (rows, config.hidden_size), ("vocab", "embed"), init)
        self.layers = Block(rngs, config, backend, config.num_layers)
        self.norm = RMSNorm(rngs, config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.head = param(rngs, (config.hidden_size, rows), ("embed", "vocab"), init)
        self.config, self.dtype, self.remat, self.unroll = config, dtype, remat, unroll

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] i32 -> [B, T, D] in the compute dtype."""
        return jnp.take(self.embedding[...].astype(self.dtype), tokens, axis=0)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Runs the decoder.

        Args:
          x: [B, T, D] embeddings.
          positions: [B, T] i32, for the rotary embedding; with a cache also the slots that are written.
          segment_ids: [B, T] i32, or None for one segment per row.
          cache: [L, B, S, G, K] keys and values, or None.

        Returns:
          (normed hidden states [B, T, D], the cache with the new tokens or None)
        """
        angles = rotary_angles(positions, head_dim(self.config), self.config.rope_base)
        x = constrain(x, "batch", "length", "features")
        x, cache = scan_layers(
            self.layers,
            x,
            per_layer=cache,
            remat=self.remat if cache is None else "none",
            unroll=self.unroll,
            call=lambda layer, x, layer_cache: layer(x, positions, angles, segment_ids, layer_cache),
        )
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., V] f32; ids past the vocabulary get a logit that never wins."""
        if self.config.tie_embeddings:
            kernel = self.embedding[...].astype(self.dtype).T
        else:
            kernel = self.head[...].astype(self.dtype)
        logits = jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)
        if kernel.shape[1] == self.config.vocab_size:
            return logits
        return jnp.where(jnp.arange(kernel.shape[1]) < self.config.vocab_size, logits, MASKED)


def empty_cache(config: LlmConfig, rows: int, slots: int, dtype: jnp.dtype) -> LayerCache:
    """A cache of zeros for `rows` rows and positions 0 ... slots - 1."""
    shape = (config.num_layers, rows, slots, kv_heads(config), head_dim(config))
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
