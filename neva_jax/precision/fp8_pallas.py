"""A kernel in Pallas for the one FP8 pass that neither XLA nor Transformer Engine does at the memory's speed.

The gradients of q, k and v are rotated back, joined and cast: each read once, the result written once. XLA joins them
in bf16 in a pass of its own, at under half the memory's rate, and the cast reads that again.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from neva_jax.precision.fp8_xla import Cast, largest

BLOCKS = (64, 32, 16)  # tokens of a program: the first that divides


def fits(dq: jax.Array, dk: jax.Array, cos: jax.Array) -> bool:
    """Whether `heads_grad_cast` serves these shapes: whole blocks of tokens, heads rotated whole, as powers of two."""
    width = dq.shape[-1]
    whole = 2 * cos.shape[-1] == width and width & (width - 1) == 0
    return whole and width >= 32 and (dk.shape[0] * dk.shape[1]) % BLOCKS[-1] == 0


def heads_grad_cast(
    dq: jax.Array,
    dk: jax.Array,
    dv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    scale: jax.Array,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> Cast:
    """See `fp8_xla.heads_grad_cast`; what is rotated back is not rounded to bf16 before it is cast.

    A program has a block of tokens of one group: its R query heads, its key and its value head. A value that is no
    number stays none, but the largest value is that of the others.

    Args:
      scale: f32 scalar; there is no current scaling here, which needs a pass before.
      interpret: without a GPU, slowly.
    """
    rows, length, groups, width = dk.shape
    queries, tokens, half = dq.shape[2] // groups, rows * length, width // 2
    block, top = next(size for size in BLOCKS if tokens % size == 0), largest(dtype)

    def clipped(x: jax.Array) -> jax.Array:
        # Not jnp.clip, which on a GPU makes a number of what is none.
        return jnp.where(x > top, top, jnp.where(x < -top, -top, x)).astype(dtype)

    def kernel(scale_ref, cos_ref, sin_ref, q_ref, k_ref, v_ref, out_ref, amax_ref):
        scale, cos, sin = scale_ref[0], cos_ref[...], sin_ref[...]  # [block, K/2]
        most = jnp.zeros((block, half), jnp.float32)
        parts = [(q_ref, r) for r in range(queries)] + [(k_ref, 0), (v_ref, 0)]
        for place, (ref, head) in enumerate(parts):
            first = ref[:, head, :half].astype(jnp.float32)
            second = ref[:, head, half:].astype(jnp.float32)
            if ref is not v_ref:
                first, second = first * cos + second * sin, second * cos - first * sin
            most = jnp.maximum(most, jnp.maximum(jnp.abs(first), jnp.abs(second)))
            out_ref[:, 0, place, :half] = clipped(first * scale)
            out_ref[:, 0, place, half:] = clipped(second * scale)
        amax_ref[0, 0] = jnp.max(most)

    def heads(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((block, count, width), lambda i, g: (i, g, 0))

    angles = pl.BlockSpec((block, half), lambda i, g: (i, 0))
    values, amax = pl.pallas_call(
        kernel,
        grid=(tokens // block, groups),
        in_specs=[pl.BlockSpec((1,), lambda i, g: (0,)), angles, angles, heads(queries), heads(1), heads(1)],
        out_specs=[
            pl.BlockSpec((block, 1, queries + 2, width), lambda i, g: (i, g, 0, 0)),
            pl.BlockSpec((1, 1), lambda i, g: (i, g)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((tokens, groups, queries + 2, width), dtype),
            jax.ShapeDtypeStruct((tokens // block, groups), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="heads_grad_cast_fp8",
    )(
        scale.reshape(1),
        *(part.reshape(tokens, half) for part in (cos, sin)),
        *(part.reshape(tokens, -1, width) for part in (dq, dk, dv)),
    )
    return Cast(values.reshape(rows, length, groups, queries + 2, width), 1 / scale, jnp.max(amax))
