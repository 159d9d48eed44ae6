"""Attention kernels on a GPU, forward and backward, against masked fp32: relative errors (Frobenius) in bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neva_jax.models.attention import attend
from neva_jax.precision import te

BOUND = 0.006  # bf16 keeps 8 bits, q, k and v are rounded before


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(jnp.bfloat16)


def _check(arguments, real, **how):
    """Output and gradients of `attend(**how)` where `real` [B, T] is true, against the XLA kernel in fp32."""
    g = jnp.where(real[..., None, None], _normal(7, *arguments[0].shape), 0)
    backend = {name: how.pop(name) for name in ("backend", "segment_positions", "segments") if name in how}

    def run(dtype, **backend):
        @jax.jit
        def both(q, k, v):
            y, back = jax.vjp(lambda *a: jnp.where(real[..., None, None], attend(*a, **how, **backend), 0), q, k, v)
            return y, *back(g.astype(y.dtype))

        with jax.default_matmul_precision("highest"):
            return both(*(x.astype(dtype) for x in arguments))

    for ours, expected in zip(run(jnp.bfloat16, **backend), run(jnp.float32), strict=True):
        ours = ours.astype(jnp.float32)
        assert float(jnp.linalg.norm((ours - expected).ravel()) / jnp.linalg.norm(expected.ravel())) < BOUND


def _qkv(b, t, heads, groups, width):
    return _normal(0, b, t, heads, width), _normal(1, b, t, groups, width), _normal(2, b, t, groups, width)


@pytest.mark.parametrize(("tokens", "heads", "width"), [(257, 16, 64), (577, 16, 64), (729, 4, 72)])
def test_a_frozen_encoder_by_cudnn(tokens, heads, width):
    q, k, v = _qkv(2, tokens, heads, heads, width)
    ours = jax.jit(lambda *a: attend(*a, causal=False, backend="cudnn"))(q, k, v)
    with jax.default_matmul_precision("highest"):
        expected = attend(*(x.astype(jnp.float32) for x in (q, k, v)), causal=False)
    assert float(jnp.linalg.norm((ours - expected).ravel()) / jnp.linalg.norm(expected.ravel())) < BOUND


def test_a_trained_encoder_by_cudnn():
    _check(_qkv(2, 196, 16, 16, 64), jnp.ones((2, 196), bool), causal=False, backend="cudnn")


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("groups", "tokens"), [(8, 320), (2, 320), (8, 345)])
def test_rows_of_one_segment_by_cudnn(groups, tokens, window):
    _check(_qkv(2, tokens, 8, groups, 128), jnp.ones((2, tokens), bool), window=window, backend="cudnn")


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("groups", "width"), [(8, 128), (2, 128), (8, 64)])
def test_packed_rows_by_transformer_engine(groups, width, window):
    if te.problem() is not None:
        pytest.skip(te.problem())
    lengths = [[100, 7, 150, 1, 200], [300, 212], [512], [1]]
    ids, places = np.zeros((4, 512), np.int32), np.zeros((4, 512), np.int32)
    for row, parts in enumerate(lengths):
        start = 0
        for i, length in enumerate(parts):
            ids[row, start : start + length] = i + 1
            places[row, start : start + length] = np.arange(length)
            start += length
    _check(
        _qkv(4, 512, 8, groups, width),
        jnp.asarray(ids > 0),
        segment_ids=jnp.asarray(ids),
        window=window,
        backend="te",
        segment_positions=jnp.asarray(places),
        segments=9,
    )
