"""Attention, with the mask that a batch needs.

rows of one segment        causal alone is enough: padding stands at the right end, and no earlier token sees it
rows of several segments   token i sees token j if j <= i and both are of the same segment (0 is padding)
decoding with a cache      token at position p sees the cache slots 0 ... p; slot and position are the same number
with a sliding window W    of all those, the last W only, itself included

B rows, T query tokens, S key tokens, H query heads, G key/value heads (H = G * R), K head width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from neva_jax.config import ModelConfig
from neva_jax.derived import head_dim, patch_grid
from neva_jax.errors import UserError
from neva_jax.models.layers import dropout
from neva_jax.parallel.target import target_devices
from neva_jax.precision import te


@dataclass(frozen=True)
class Backends:
    """The kernels of a model: for rows of one segment, for packed rows, and in the vision encoder.

    segments: the most segments of a packed row, padding as one of them (Transformer Engine's kernel must know).
    """

    single: str = "xla"
    packed: str = "xla"
    vision: str = "xla"
    segments: int = 1


XLA = Backends()

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    window: int | None = None,
    backend: str = "xla",
    segment_positions: jax.Array | None = None,
    segments: int = 1,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads.

    Args:
      q: [B, T, H, K].
      k, v: [B, S, G, K] with H a multiple of G; query head h reads key head h // (H / G).
      causal: token i sees only keys j <= i.
      segment_ids: [B, T] i32, T = S: attention stays inside a segment. None: one segment per row.
      positions: [B, T] i32: keys are a cache whose slot j holds position j; token at position p sees slots 0 ... p.
      window: W, tokens that a token sees, itself included; only with a causal mask. None: all.
      backend: `xla`; `cudnn` (bf16 or fp16 on a GPU; no segments, no cache, no dropout); or `te` (with segments only).
      segment_positions: [B, T] i32, each token's place in its segment, and `segments`, the most in a row: for `te`.
      dropout_rate, rng: part of the weights that is zeroed, and by which key; None zeroes nothing.

    Returns:
      [B, T, H, K] in q's dtype; scores and softmax are fp32.

    Raises:
      ValueError: a mask that the backend does not have, or dropout.
    """
    if backend == "cudnn":
        if segment_ids is not None or positions is not None:
            raise ValueError("attention backend cudnn masks causally only; use xla for segments or a cache")
        if dropout_rate and rng is not None:
            raise ValueError("attention backend cudnn has no dropout; use xla")
        local = None if window is None else (window - 1, 0)
        length = q.shape[1]
        if causal and length % 2:
            # JAX refuses to differentiate odd lengths; what is added at the right nobody sees.
            q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        attended = jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, local_window_size=local, implementation="cudnn"
        )
        return attended[:, :length]
    if backend == "te":
        if segment_ids is None or not causal or (dropout_rate and rng is not None):
            raise ValueError("attention backend te is for causal attention in packed rows, without dropout")
        from neva_jax.models.attention_te import ragged

        return ragged(q, k, v, segment_ids, segment_positions, segments, window)
    b, t, h, width = q.shape
    groups = k.shape[2]
    grouped = q.reshape(b, t, groups, h // groups, width)  # [B, T, G, R, K]
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    mask = _mask(t, k.shape[1], causal, segment_ids, positions, window)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(v.dtype), dropout_rate, rng)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, v).reshape(b, t, h, width)


def _mask(
    t: int,
    s: int,
    causal: bool,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    window: int | None,
) -> jax.Array | None:
    """[B or 1, T, S] bool, True where attention is allowed; None where it is allowed everywhere."""
    if positions is None and not causal:
        return None
    query = jnp.arange(t)[None, :, None] if positions is None else positions[:, :, None]
    key = jnp.arange(s)[None, None, :]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def choose_backend(name: str, dtype: jnp.dtype, width: int, dropout_rate: float = 0.0) -> str:
    """The kernel for rows of one segment, heads of K = `width`: `cudnn` for `auto` and `te` where it runs, else `xla`.

    Raises:
      UserError: `cudnn` is asked for where it does not run, or with dropout.
    """
    if dropout_rate and name == "cudnn":
        # jax.nn.dot_product_attention has no argument for it, and cuDNN's own random bits follow the layout.
        raise UserError(
            f"model.attention=cudnn has no dropout (model.llm.attention_dropout={dropout_rate}); use auto or xla"
        )
    possible = _cudnn_problem(dtype, width) is None
    if name == "cudnn" and not possible:
        raise UserError(
            f"model.attention=cudnn needs bf16 (here {jnp.dtype(dtype).name}), a head width divisible by 8 and at most "
            f"128 (here {width}), and an NVIDIA GPU from Ampere on (here {target_devices()[0].device_kind}); use auto"
        )
    return "cudnn" if possible and not dropout_rate and name != "xla" else "xla"


def choose_packed_backend(
    name: str, dtype: jnp.dtype, width: int, dropout_rate: float = 0.0, devices: int = 1
) -> tuple[str, str]:
    """(kernel for packed rows, why): Transformer Engine's for `auto` and `te` where it runs, else `xla`.

    Raises:
      UserError: `te` is asked for where it does not run.
    """
    if name in ("xla", "cudnn"):
        return "xla", "as configured" if name == "xla" else "cudnn knows no segments"
    problem = _cudnn_problem(dtype, width)
    if dropout_rate:
        problem = f"no other has dropout (model.llm.attention_dropout={dropout_rate})"
    if problem is None and devices > 1:
        problem = f"Transformer Engine serves one device so far, the mesh has {devices}"
    if problem is None:
        problem = te.problem()
    if problem is None:
        return "te", "Transformer Engine is there"
    if name == "te":
        raise UserError(f"model.attention=te: {problem}; use auto or xla")
    return "xla", problem


def _cudnn_problem(dtype: jnp.dtype, width: int) -> str | None:
    """Why cuDNN's kernels, Transformer Engine's too, cannot be used (jax.nn.dot_product_attention's rules), or None."""
    device = target_devices()[0]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind.upper():
        return f"no NVIDIA GPU ({device.platform})"
    if float(getattr(device, "compute_capability", "0")) < 8:
        return f"{device.device_kind} is older than Ampere"
    if dtype != jnp.bfloat16:
        return f"{jnp.dtype(dtype).name}, not bf16"
    if width % 8 or width > 128:
        return f"a head width of {width}"
    return None


def choose_backends(config: ModelConfig, dtype: jnp.dtype, segments: int = 1, devices: int = 1) -> Backends:
    """The kernels of a whole model. `segments`: most in a packed row, padding as one; 1: rows are never packed.

    Raises:
      UserError: a kernel is asked for where it does not run.
    """
    name, width, rate = config.attention, head_dim(config.llm), config.llm.attention_dropout
    vision = config.vision
    tokens = patch_grid(vision) ** 2 + (vision.kind == "clip")
    # JAX refuses to differentiate cuDNN's kernel for an odd number of tokens (CLIP's class token makes it odd).
    vision_name = "auto" if name != "xla" and (vision.freeze or tokens % 2 == 0) else "xla"
    packed = choose_packed_backend(name, dtype, width, rate, devices)[0] if segments > 1 else "xla"
    return Backends(
        single=choose_backend(name, dtype, width, rate),
        packed=packed,
        vision=choose_backend(vision_name, dtype, vision.hidden_size // vision.num_heads),
        segments=segments,
    )


def describe(config: ModelConfig, dtype: jnp.dtype, packed: bool, devices: int = 1) -> str:
    """One line for the run's log: which kernels, and why."""
    name, width, rate = config.attention, head_dim(config.llm), config.llm.attention_dropout
    if packed:
        llm, why = choose_packed_backend(name, dtype, width, rate, devices)
        why = f"packed rows, {why}"
    else:
        llm, why = choose_backend(name, dtype, width, rate), "rows of one segment"
        if llm == "xla" and name != "xla":
            why += f", {f'dropout {rate}' if rate else _cudnn_problem(dtype, width)}"
    vision = choose_backends(config, dtype).vision
    return f"attention: {llm} ({why}), {vision} in the vision encoder; model.attention={name}"
