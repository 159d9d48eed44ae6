"""The Llama language model (HF LlamaForCausalLM), and its kin: Mistral's sliding window, Qwen2's biases.

B rows, T tokens, D hidden size, H query heads, G key/value heads, K head width, F MLP width, V vocabulary rows,
L layers, S cache slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.config import LlmConfig, MeshConfig
from neva_jax.derived import head_dim, kv_heads, padded_vocab, rotary_width
from neva_jax.models.attention import MASKED, attend
from neva_jax.models.layers import NO_REMAT, Remat, RMSNorm, dropout, normal, param, scan_layers
from neva_jax.parallel.mesh import constrain, spread


class LayerCache(NamedTuple):
    """Keys and values of the tokens so far: [L, B, S, G, K] for the model, [B, S, G, K] for one layer."""

    k: jax.Array
    v: jax.Array


def rotary_angles(positions: jax.Array, config: LlmConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary embedding (Su et al. 2021; HF LlamaRotaryEmbedding).

    With R the rotated part of the head width (rope_fraction): angle i is position * base^(-2i/R), and rope_scaling
      linear    divides the frequencies by the factor F
      llama3    divides those of waves longer than the original length N / low, keeps those shorter than N / high, and
                goes from one to the other in between (HF _compute_llama3_parameters)
      dynamic   raises the base where a row is longer than N: base * (F * length / N - (F - 1))^(R / (R - 2)); a row's
                length is its largest position + 1 (HF _compute_dynamic_ntk_parameters, which takes the batch's)

    Args:
      positions: [B, T] i32.

    Returns:
      (cos, sin), each [B, T, R/2] f32.
    """
    width, factor, original = rotary_width(config), config.rope_factor, config.rope_original_length
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    base = jnp.float32(config.rope_base)
    if config.rope_scaling == "dynamic":
        length = jnp.maximum(jnp.max(positions, axis=1) + 1, original).astype(jnp.float32)[:, None, None]
        base = base * (factor * length / original - (factor - 1)) ** (width / (width - 2))
    frequencies = base**-exponents
    if config.rope_scaling == "linear":
        frequencies = frequencies / factor
    if config.rope_scaling == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        kept = jnp.clip((original * frequencies / (2 * jnp.pi) - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + R/2]) of each head's first R channels; x: [B, T, H, K], computed in fp32."""
    half = cos.shape[-1]
    y = x.astype(jnp.float32)
    first, second, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """One decoder layer, or a stack of `layers` of them: attention and SwiGLU MLP, each behind an RMS norm."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: LlmConfig,
        backend: str,
        layers: int | None = None,
        mesh: MeshConfig = MeshConfig(),  # noqa: B008 (it is frozen)
    ):
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
        self.q = param(rngs, (d, h, k), ("embed", "heads", "head_dim"), init, layers)
        self.k = param(rngs, (d, g, k), ("embed", "kv_heads", "head_dim"), init, layers)
        self.v = param(rngs, (d, g, k), ("embed", "kv_heads", "head_dim"), init, layers)
        self.o = param(rngs, (h, k, d), ("heads", "head_dim", "embed"), out, layers)
        if config.qkv_bias:
            self.q_bias = param(rngs, (h, k), ("heads", "head_dim"), zeros, layers)
            self.k_bias = param(rngs, (g, k), ("kv_heads", "head_dim"), zeros, layers)
            self.v_bias = param(rngs, (g, k), ("kv_heads", "head_dim"), zeros, layers)
        if config.o_bias:
            self.o_bias = param(rngs, (d,), ("norm",), zeros, layers)
        self.mlp_norm = RMSNorm(rngs, d, config.norm_eps, layers)
        self.gate = param(rngs, (d, f), ("embed", "mlp"), init, layers)
        self.up = param(rngs, (d, f), ("embed", "mlp"), init, layers)
        self.down = param(rngs, (f, d), ("mlp", "embed"), out, layers)
        if config.mlp_bias:
            self.gate_bias = param(rngs, (f,), ("mlp",), zeros, layers)
            self.up_bias = param(rngs, (f,), ("mlp",), zeros, layers)
            self.down_bias = param(rngs, (d,), ("norm",), zeros, layers)
        self.config, self.backend, self.stream = config, backend, stream_axes(mesh)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D], with the layer's cache if there is one -> (x [B, T, D], the cache with the new tokens).

        With `rng`, dropout where NeMo has it: on the attention weights, the products inside the MLP, and what attention
        and MLP add to x.
        """
        dtype, config, window = x.dtype, self.config, self.config.sliding_window
        rngs = (None,) * 4 if rng is None else jax.random.split(rng, 4)

        def weight(name: str) -> jax.Array:
            variable = getattr(self, name)
            value, axes = variable[...].astype(dtype), variable.get_metadata()["axes"][-variable[...].ndim :]
            # A cache holds each head once.
            return spread(value, axes.index("kv_heads"), axes) if "kv_heads" in axes and cache is None else value

        def linear(equation: str, x: jax.Array, name: str, biased: bool) -> jax.Array:
            y = jnp.einsum(equation, x, weight(name))
            return y + weight(f"{name}_bias") if biased else y

        with jax.named_scope("attention"):
            y = constrain(self.attention_norm(x), "batch", "length", "features")
            q = rotate(linear("btd,dhk->bthk", y, "q", config.qkv_bias), *angles)
            k = rotate(linear("btd,dgk->btgk", y, "k", config.qkv_bias), *angles)
            v = linear("btd,dgk->btgk", y, "v", config.qkv_bias)
            q = constrain(q, "batch", "length", "heads", "head_dim")
            k = constrain(k, "batch", "length", "kv_heads", "head_dim")
            v = constrain(v, "batch", "length", "kv_heads", "head_dim")
            if cache is None:
                attended = attend(
                    *(q, k, v),
                    segment_ids=segment_ids,
                    window=window,
                    # The other kernel knows no segments.
                    backend=self.backend if segment_ids is None else "xla",
                    dropout_rate=config.attention_dropout,
                    rng=rngs[0],
                )
            else:
                cache = LayerCache(_write(cache.k, k, positions), _write(cache.v, v, positions))
                attended = attend(q, cache.k, cache.v, positions=positions, window=window)
            attended = constrain(attended, "batch", "length", "heads", "head_dim")
            x = x + dropout(linear("bthk,hkd->btd", attended, "o", config.o_bias), config.hidden_dropout, rngs[1])
            x = constrain(x, *self.stream)
        with jax.named_scope("mlp"):
            y = constrain(self.mlp_norm(x), "batch", "length", "features")
            gate = linear("btd,df->btf", y, "gate", config.mlp_bias)
            up = linear("btd,df->btf", y, "up", config.mlp_bias)
            inner = constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp")
            inner = dropout(inner, config.ffn_dropout, rngs[2])
            x = x + dropout(linear("btf,fd->btd", inner, "down", config.mlp_bias), config.hidden_dropout, rngs[3])
            return constrain(x, *self.stream), cache


def _write(cache: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes new [B, T, G, K] into cache [B, S, G, K] at the slots `positions` [B, T] of each row."""
    return cache.at[jnp.arange(cache.shape[0])[:, None], positions].set(new.astype(cache.dtype))


def stream_axes(mesh: MeshConfig) -> tuple[str, str, str]:
    """The logical axes of the residual stream [B, T, D]; with sequence parallelism its length is split."""
    return "batch", "split_length" if mesh.sequence_parallel else "length", "features"


class Llama(nnx.Module):
    """Token embedding, L decoder layers, final norm and output head."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: LlmConfig,
        dtype: jnp.dtype,
        backend: str,
        remat: Remat,
        unroll: int,
        mesh: MeshConfig = MeshConfig(),  # noqa: B008 (it is frozen)
    ):
        rows, init = padded_vocab(config), normal(config.init_std)
        self.embedding = param(rngs, (rows, config.hidden_size), ("vocab", "embed"), init)
        self.layers = Block(rngs, config, backend, config.num_layers, mesh)
        self.norm = RMSNorm(rngs, config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.head = param(rngs, (config.hidden_size, rows), ("embed", "vocab"), init)
        self.config, self.dtype, self.remat, self.unroll = config, dtype, remat, unroll
        self.stream = stream_axes(mesh)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] i32 -> [B, T, D] in the compute dtype."""
        # The table is split over fsdp by its columns, and looked up where it lies: only rows that are wanted travel.
        tokens = constrain(tokens, "rows", "length")
        table = constrain(self.embedding[...].astype(self.dtype), "vocab", "embed")
        x = constrain(jnp.take(table, tokens, axis=0), "rows", "length", "embed")
        return constrain(x, "batch", "length", "features")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Runs the decoder.

        Args:
          x: [B, T, D] embeddings.
          positions: [B, T] i32, for the rotary embedding; with a cache also the slots that are written.
          segment_ids: [B, T] i32, or None for one segment per row.
          cache: [L, B, S, G, K] keys and values, or None.
          rng: the key of dropout; None: no dropout.

        Returns:
          (normed hidden states [B, T, D], the cache with the new tokens or None)
        """
        angles = tuple(constrain(part, "batch", "length", None) for part in rotary_angles(positions, self.config))
        layer_rngs = None
        if rng is not None:
            rngs = jax.random.split(rng, self.config.num_layers + 1)
            x, layer_rngs = dropout(x, self.config.hidden_dropout, rngs[0]), rngs[1:]
        x = constrain(x, *self.stream)
        x, cache = scan_layers(
            self.layers,
            x,
            per_layer=(cache, layer_rngs),
            remat=self.remat if cache is None else NO_REMAT,
            unroll=self.unroll,
            call=lambda layer, x, own: layer(x, positions, angles, segment_ids, *own),
        )
        return self.norm(x), cache

    def output_kernel(self) -> jax.Array:
        """The output head [D, V] in its stored dtype: the embedding's transpose where they are tied."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def logits(self, hidden: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """hidden [..., D] -> logits [..., V] f32; ids past the vocabulary get a logit that never wins.

        `kernel`: R copies [R, D, V] of the output head, one for each slice of hidden [R, ..., D].
        """
        equation = "...d,dv->...v" if kernel is None else "r...d,rdv->r...v"
        kernel = (self.output_kernel() if kernel is None else kernel).astype(self.dtype)
        logits = jnp.einsum(equation, hidden, kernel, preferred_element_type=jnp.float32)
        if kernel.shape[-1] == self.config.vocab_size:
            return logits
        return jnp.where(jnp.arange(kernel.shape[-1]) < self.config.vocab_size, logits, MASKED)


def empty_cache(config: LlmConfig, rows: int, slots: int, dtype: jnp.dtype) -> LayerCache:
    """A cache of zeros for `rows` rows and positions 0 ... slots - 1."""
    shape = (config.num_layers, rows, slots, kv_heads(config), head_dim(config))
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
