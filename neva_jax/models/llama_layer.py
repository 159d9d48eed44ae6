"""One decoder layer of the Llama language model (HF LlamaDecoderLayer), and its kin's (models/llama.py).

B rows, T tokens, D hidden size, H query heads, G key/value heads, R = H/G, K head width, F MLP width, L layers, S cache
slots, P tokens of the prefix, N wanted positions of a row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.config import LlmConfig, MeshConfig
from neva_jax.derived import head_dim, kv_heads
from neva_jax.models.attention import XLA, Backends, attend
from neva_jax.models.layers import RMSNorm, dropout, normal, param
from neva_jax.models.llama_fp8 import Fp8Kernel, native_kernel
from neva_jax.models.rotary import rotate, split_rotated
from neva_jax.parallel.mesh import constrain, constrain_stream, spread
from neva_jax.precision import fp8
from neva_jax.precision.fp8_recipe import Recipe


class LayerCache(NamedTuple):
    """Keys and values of the tokens so far: [L, B, S, G, K] for the model, [B, S, G, K] for one layer."""

    k: jax.Array
    v: jax.Array


class Block(nnx.Module):
    """One decoder layer, or a stack of `layers` of them: attention and SwiGLU MLP, each behind an RMS norm."""

    def __init__(
        self,
        rngs: nnx.Rngs | None,
        config: LlmConfig,
        backends: Backends = XLA,
        layers: int | None = None,
        mesh: MeshConfig = MeshConfig(),  # noqa: B008 (it is frozen)
        stored: tuple[str, ...] = (),
    ):
        """stored: the FP8 sites whose kernels are held in FP8, in place of their parameters."""
        d, h, g, k, f = (
            config.hidden_size,
            config.num_heads,
            kv_heads(config),
            head_dim(config),
            config.intermediate_size,
        )
        init, zeros = normal(config.init_std), jax.nn.initializers.zeros
        out = normal(config.init_std / (2 * config.num_layers) ** 0.5) if config.scaled_output_init else init
        self.attention_norm = RMSNorm(rngs, d, config.norm_eps, layers)
        if "qkv" not in stored:
            self.q = param(rngs, (d, h, k), ("embed", "heads", "head_dim"), init, layers)
            self.k = param(rngs, (d, g, k), ("embed", "kv_heads", "head_dim"), init, layers)
            self.v = param(rngs, (d, g, k), ("embed", "kv_heads", "head_dim"), init, layers)
        if "o" not in stored:
            self.o = param(rngs, (h, k, d), ("heads", "head_dim", "embed"), out, layers)
        if config.qkv_bias:
            self.q_bias = param(rngs, (h, k), ("heads", "head_dim"), zeros, layers)
            self.k_bias = param(rngs, (g, k), ("kv_heads", "head_dim"), zeros, layers)
            self.v_bias = param(rngs, (g, k), ("kv_heads", "head_dim"), zeros, layers)
        if config.o_bias:
            self.o_bias = param(rngs, (d,), ("norm",), zeros, layers)
        self.mlp_norm = RMSNorm(rngs, d, config.norm_eps, layers)
        if "gate_up" not in stored:
            self.gate = param(rngs, (d, f), ("embed", "mlp"), init, layers)
            self.up = param(rngs, (d, f), ("embed", "mlp"), init, layers)
        if "down" not in stored:
            self.down = param(rngs, (f, d), ("mlp", "embed"), out, layers)
        for site in stored:
            setattr(self, f"fp8_{site}", Fp8Kernel(rngs, site, config, layers))
        if config.mlp_bias:
            self.gate_bias = param(rngs, (f,), ("mlp",), zeros, layers)
            self.up_bias = param(rngs, (f,), ("mlp",), zeros, layers)
            self.down_bias = param(rngs, (d,), ("norm",), zeros, layers)
        self.config, self.backends, self.sequence_parallel = config, backends, mesh.sequence_parallel

    @jax.named_scope("attention")
    def with_attention(
        self,
        x: jax.Array,
        positions: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
        rng: jax.Array | None = None,
        recipe: Recipe | None = None,
        scales: fp8.Scales | None = None,
        prefix: LayerCache | None = None,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D], with the layer's cache if there is one -> (x [B, T, D], the cache with the new tokens).

        With `rng`, dropout where NeMo has it: on the attention weights and on what is added to x. With `recipe`, its
        sites run in FP8, with the scales of delayed scaling in `scales`. With `prefix` [P, G, K], P tokens stand before
        those of x. With `wanted` [B, N] i32, x is [B, N, D] at the end.
        """
        config = self.config
        rngs = (None,) * 4 if rng is None else jax.random.split(rng, 4)
        once = cache is not None or hasattr(self, "fp8_qkv")
        weight, linear = partial(self._weight, dtype=x.dtype, once=once), partial(self._linear, once=once)
        if recipe is not None and recipe.covers("qkv"):
            norm, site = (self.attention_norm.scale[...], config.norm_eps), self._site("qkv", scales, weight)
            if config.qkv_bias:
                y = fp8.linear(recipe, x, *site, norm=norm)  # [B, T, G, R + 2, K]
                y = y + native_kernel("qkv", lambda name: weight(f"{name}_bias")[None])[0]
                q, k, v = split_rotated(y, *angles)
            else:
                q, k, v = fp8.heads(recipe, x, *site, norm=norm, angles=angles)
        else:
            y = self._normed(self.attention_norm, x)
            q = linear("btd,dhk->bthk", y, "q", config.qkv_bias)
            k = linear("btd,dgk->btgk", y, "k", config.qkv_bias)
            v = linear("btd,dgk->btgk", y, "v", config.qkv_bias)
            q, k = rotate(q, *angles), rotate(k, *angles)
        q = constrain(q, "batch", "length", "heads", "head_dim")
        k = constrain(k, "batch", "length", "kv_heads", "head_dim")
        v = constrain(v, "batch", "length", "kv_heads", "head_dim")
        attended, cache = self._attend(q, k, v, positions, segment_ids, cache, rngs[0], prefix)
        attended = constrain(attended, "batch", "length", "heads", "head_dim")
        if wanted is not None:
            attended, x = _at(attended, wanted), _at(x, wanted)
        if recipe is not None and recipe.covers("o"):
            y = fp8.linear(recipe, attended, *self._site("o", scales, weight), inputs=2)
            y = self._biased(y, "o", config.o_bias)
        else:
            y = linear("bthk,hkd->btd", attended, "o", config.o_bias)
        x = x + dropout(y, config.hidden_dropout, rngs[1])
        return constrain_stream(x, self.sequence_parallel), cache

    @jax.named_scope("mlp")
    def with_mlp(
        self,
        x: jax.Array,
        rng: jax.Array | None = None,
        recipe: Recipe | None = None,
        scales: fp8.Scales | None = None,
    ) -> jax.Array:
        """x [B, T, D] -> x [B, T, D]; `rng` drops out products inside the MLP, and what is added to x."""
        config = self.config
        rngs = (None,) * 4 if rng is None else jax.random.split(rng, 4)
        if recipe is not None and recipe.covers("gate_up", "down"):
            y = self._biased(self._fp8_mlp(recipe, x, scales, rngs[2]), "down", config.mlp_bias)
        else:
            y = self._normed(self.mlp_norm, x)
            gate = self._linear("btd,df->btf", y, "gate", config.mlp_bias)
            up = self._linear("btd,df->btf", y, "up", config.mlp_bias)
            inner = constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp")
            y = self._linear("btf,fd->btd", dropout(inner, config.ffn_dropout, rngs[2]), "down", config.mlp_bias)
        return constrain_stream(x + dropout(y, config.hidden_dropout, rngs[3]), self.sequence_parallel)

    def _weight(self, name: str, dtype: jnp.dtype, once: bool = False) -> jax.Array:
        """A parameter; `once`: each key/value head once, as a cache and kernels in FP8 hold it, not `spread`."""
        variable = getattr(self, name)
        value, axes = variable[...].astype(dtype), variable.get_metadata()["axes"][-variable[...].ndim :]
        return spread(value, axes.index("kv_heads"), axes) if "kv_heads" in axes and not once else value

    def _linear(self, equation: str, x: jax.Array, name: str, has_bias: bool, once: bool = False) -> jax.Array:
        return self._biased(jnp.einsum(equation, x, self._weight(name, x.dtype, once)), name, has_bias, once)

    def _biased(self, y: jax.Array, name: str, has: bool, once: bool = False) -> jax.Array:
        return y + self._weight(f"{name}_bias", y.dtype, once) if has else y

    def _site(self, name: str, scales: fp8.Scales | None, weight: Callable) -> tuple[Any, fp8.Scales]:
        """The kernel of an FP8 site, and its scales."""
        stored = getattr(self, f"fp8_{name}", None)
        return native_kernel(name, weight) if stored is None else stored(), (scales or {}).get(name, {})

    def _normed(self, norm: RMSNorm, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D], whole on each device of `tensor`."""
        y = norm(x)
        if self.sequence_parallel:  # else XLA gathers the fp32 values from before the cast
            y = jax.lax.optimization_barrier(y)
        return constrain(y, "batch", "length", "features")

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: LayerCache | None,
        rng: jax.Array | None,
        prefix: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """q [B, T, H, K], k and v [B, T, G, K] -> ([B, T, H, K], the cache with the new tokens)."""
        window, backends = self.config.sliding_window, self.backends
        if prefix is not None:
            # Kernels want as many queries as keys: those before x attend for nobody.
            before = prefix.k.shape[0]
            q = jnp.pad(q, ((0, 0), (before, 0), (0, 0), (0, 0)))
            k, v = _behind(prefix.k, k), _behind(prefix.v, v)
            return attend(q, k, v, window=window, backend=backends.single)[:, before:], None
        if cache is not None:
            cache = LayerCache(_write(cache.k, k, positions), _write(cache.v, v, positions))
            return attend(q, cache.k, cache.v, positions=positions, window=window), cache
        attended = attend(
            *(q, k, v),
            segment_ids=segment_ids,
            window=window,
            backend=backends.single if segment_ids is None else backends.packed,
            segment_positions=positions,
            segments=backends.segments,
            dropout_rate=self.config.attention_dropout,
            rng=rng,
        )
        return attended, None

    def _fp8_mlp(self, recipe: Recipe, x: jax.Array, scales: fp8.Scales | None, rng: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D] without the last bias; in one piece where nothing stands between the casts."""
        config, norm = self.config, (self.mlp_norm.scale[...], self.config.norm_eps)
        weight = partial(self._weight, dtype=x.dtype)
        (gate_up, gate_up_scales), (down, down_scales) = (self._site(n, scales, weight) for n in ("gate_up", "down"))
        if not config.mlp_bias and (rng is None or not config.ffn_dropout):
            return fp8.mlp(recipe, x, norm, (gate_up, down), (gate_up_scales, down_scales))
        halves = fp8.linear(recipe, x, gate_up, gate_up_scales, norm=norm)  # [B, T, 2, F]
        gate, up = halves[..., 0, :], halves[..., 1, :]
        if config.mlp_bias:
            gate, up = gate + self.gate_bias[...].astype(x.dtype), up + self.up_bias[...].astype(x.dtype)
        inner = constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp")
        return fp8.linear(recipe, dropout(inner, config.ffn_dropout, rng), down, down_scales)


def _behind(prefix: jax.Array, x: jax.Array) -> jax.Array:
    """[P, G, K] before each row of x [B, T, G', K], where heads may be repeated (`spread`) -> [B, P + T, G', K]."""
    prefix = jnp.repeat(prefix.astype(x.dtype), x.shape[2] // prefix.shape[1], axis=1)
    prefix = jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape))
    return constrain(jnp.concatenate([prefix, x], axis=1), "batch", "length", "kv_heads", "head_dim")


def _at(x: jax.Array, wanted: jax.Array) -> jax.Array:
    """x [B, T, ...] at the positions `wanted` [B, N] of its rows, all different -> [B, N, ...]."""
    return jax.vmap(lambda row, at: row.at[at].get(unique_indices=True))(x, wanted)


def _write(cache: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes new [B, T, G, K] into cache [B, S, G, K] at the slots `positions` [B, T] of each row."""
    return cache.at[jnp.arange(cache.shape[0])[:, None], positions].set(new.astype(cache.dtype))
