"""attention.attend against loops over every head, query and key in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neva_jax.errors import UserError
from neva_jax.models.attention import attend, choose_backend


def _by_loops(q, k, v, allowed):
    """allowed(row, query, key) -> bool; each query's softmax is over its allowed keys alone."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    rows, queries, heads, width = q.shape
    keys, groups = k.shape[1:3]
    out = np.zeros_like(q)
    for b in range(rows):
        for h in range(heads):
            g = h * groups // heads
            for i in range(queries):
                seen = [j for j in range(keys) if allowed(b, i, j)]
                scores = np.array([q[b, i, h] @ k[b, j, g] for j in seen]) / np.sqrt(width)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = sum(w * v[b, j, g] for w, j in zip(weights / weights.sum(), seen, strict=True))
    return out


def _qkv(queries=7, keys=7, heads=4, groups=4, width=6, rows=2):
    draw = np.random.default_rng(3)
    shapes = (rows, queries, heads, width), (rows, keys, groups, width), (rows, keys, groups, width)
    return [2 * draw.standard_normal(shape).astype(np.float32) for shape in shapes]


def _close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6)  # values are about 2, all in fp32


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal_with_grouped_heads(groups):
    q, k, v = _qkv(groups=groups)
    _close(attend(q, k, v), _by_loops(q, k, v, lambda b, i, j: j <= i))


@pytest.mark.parametrize("groups", [2, 4])
def test_without_a_mask(groups):
    q, k, v = _qkv(groups=groups)
    _close(attend(q, k, v, causal=False), _by_loops(q, k, v, lambda b, i, j: True))


def test_more_keys_than_queries_without_a_mask():
    q, k, v = _qkv(queries=3, keys=8)
    _close(attend(q, k, v, causal=False), _by_loops(q, k, v, lambda b, i, j: True))


def test_segments():
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]], np.int32)
    q, k, v = _qkv(groups=2)
    expected = _by_loops(q, k, v, lambda b, i, j: j <= i and segments[b, i] == segments[b, j])
    _close(attend(q, k, v, segment_ids=segments), expected)


def test_segments_need_not_be_numbered_in_order():
    segments = np.array([[2, 2, 1, 1, 1, 2, 2]], np.int32)  # the last two tokens belong to the first two
    q, k, v = _qkv(rows=1)
    expected = _by_loops(q, k, v, lambda b, i, j: j <= i and segments[b, i] == segments[b, j])
    _close(attend(q, k, v, segment_ids=segments), expected)


@pytest.mark.parametrize("positions", [[[0, 1, 2], [0, 1, 2]], [[4, 5, 6], [1, 2, 3]], [[8, 8, 8], [0, 3, 7]]])
def test_cache_slots_up_to_the_own_position(positions):
    q, k, v = _qkv(queries=3, keys=9, groups=2)
    positions = np.array(positions, np.int32)
    expected = _by_loops(q, k, v, lambda b, i, j: j <= positions[b, i])
    _close(attend(q, k, v, positions=positions), expected)


@pytest.mark.parametrize("window", [1, 3, 7, 20])
def test_sliding_window(window):
    q, k, v = _qkv(groups=2)
    expected = _by_loops(q, k, v, lambda b, i, j: i - window < j <= i)
    _close(attend(q, k, v, window=window), expected)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_sliding_window_inside_segments(window):
    segments = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2, 0]], np.int32)
    q, k, v = _qkv(groups=2)
    expected = _by_loops(q, k, v, lambda b, i, j: i - window < j <= i and segments[b, i] == segments[b, j])
    _close(attend(q, k, v, segment_ids=segments, window=window), expected)


@pytest.mark.parametrize("window", [1, 3, 9])
def test_sliding_window_over_a_cache(window):
    q, k, v = _qkv(queries=3, keys=9, groups=2)
    positions = np.array([[4, 5, 6], [0, 1, 8]], np.int32)
    expected = _by_loops(q, k, v, lambda b, i, j: positions[b, i] - window < j <= positions[b, i])
    _close(attend(q, k, v, positions=positions, window=window), expected)


def test_cudnn_gets_the_same_window(monkeypatch):
    """cuDNN's arguments, run by XLA."""
    kernel = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: kernel(*a, **{**k, "implementation": "xla"}))
    q, k, v = _qkv(groups=2)
    for window in (None, 1, 3, 20):
        _close(attend(q, k, v, window=window, backend="cudnn"), attend(q, k, v, window=window))


def test_unwritten_cache_slots_are_not_read():
    q, k, v = _qkv(queries=1, keys=9)
    positions = np.array([[3], [5]], np.int32)
    expected = attend(q, k, v, positions=positions)
    for row, position in ((0, 3), (1, 5)):
        k[row, position + 1 :], v[row, position + 1 :] = 1e4, -1e4
    np.testing.assert_array_equal(attend(q, k, v, positions=positions), expected)


def test_a_later_token_does_not_change_an_earlier_one():
    q, k, v = _qkv()
    before = attend(q, k, v)
    k[:, 5:], v[:, 5:] = 1e4, -1e4
    np.testing.assert_array_equal(attend(q, k, v)[:, :5], before[:, :5])


def test_gradients_of_a_masked_row_are_finite_and_stay_in_the_segment():
    segments = np.array([[1, 1, 2, 2, 2, 0, 0]], np.int32)
    q, k, v = _qkv(rows=1)

    def second_segment(k, v):
        return jnp.sum(attend(q, k, v, segment_ids=segments)[:, 2:5] ** 2)

    for grad in jax.grad(second_segment, argnums=(0, 1))(k, v):
        assert np.all(np.isfinite(grad))
        assert np.all(grad[:, [0, 1, 5, 6]] == 0)
        assert np.all(np.any(grad[:, 2:5] != 0, axis=(0, 2, 3)))


def test_scores_are_fp32_in_bf16():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in _qkv(groups=2))
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = _by_loops(*(np.asarray(x, np.float32) for x in (q, k, v)), lambda b, i, j: j <= i)
    # Rounding of the weights and of the result, 2^-9 each, of values up to 6; bf16 scores would be off by 0.1.
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("mask", [{"segment_ids": np.ones((2, 7), np.int32)}, {"positions": np.ones((2, 7), np.int32)}])
def test_cudnn_refuses_masks_that_it_lacks(mask):
    with pytest.raises(ValueError, match="cudnn masks causally only"):
        attend(*_qkv(), backend="cudnn", **mask)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_backend_on_cpu(dtype):
    assert choose_backend("auto", dtype, 128) == "xla"
    assert choose_backend("xla", dtype, 128) == "xla"
    with pytest.raises(UserError, match=r"model\.attention=cudnn needs bf16 .* an NVIDIA GPU .* \(here cpu\)"):
        choose_backend("cudnn", dtype, 128)


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "width", "expected"),
    [
        ("NVIDIA H200", "9.0", jnp.bfloat16, 128, "cudnn"),
        ("NVIDIA B200", "10.0", jnp.bfloat16, 64, "cudnn"),
        ("NVIDIA H200", "9.0", jnp.float32, 128, "xla"),
        ("NVIDIA H200", "9.0", jnp.bfloat16, 100, "xla"),
        ("NVIDIA H200", "9.0", jnp.bfloat16, 256, "xla"),
        ("Tesla T4", "7.5", jnp.bfloat16, 128, "xla"),
        ("AMD Instinct MI300X", "gfx942", jnp.bfloat16, 128, "xla"),
    ],
)
def test_backend_on_a_gpu(monkeypatch, kind, capability, dtype, width, expected):
    class Device:
        platform, device_kind, compute_capability = "gpu", kind, capability

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert choose_backend("auto", dtype, width) == expected
    assert choose_backend("xla", dtype, width) == "xla"
    if expected == "cudnn":
        assert choose_backend("cudnn", dtype, width) == "cudnn"
    else:
        with pytest.raises(UserError, match=r"model\.attention=cudnn needs"):
            choose_backend("cudnn", dtype, width)


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_of_the_weights_keeps_the_mean():
    q, k, v = _qkv(groups=2)
    expected = attend(q, k, v)
    rngs = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda rng: attend(q, k, v, dropout_rate=0.3, rng=rng)))(rngs)
    # The output is linear in the weights. 5 standard errors, of as many numbers as there are.
    error = np.std(drawn, axis=0) / np.sqrt(len(rngs))
    np.testing.assert_array_less(np.abs(np.mean(drawn, axis=0) - expected), 5 * error + 1e-5)
    # The first token sees itself alone: all or nothing.
    first = np.asarray(drawn[:, 0, 0, 0, 0]) / float(expected[0, 0, 0, 0])
    np.testing.assert_allclose(np.unique(np.round(first, 4)), [0, np.round(1 / 0.7, 4)], atol=1e-3)
    assert np.mean(first == 0) == pytest.approx(0.3, abs=0.03)


def test_heads_and_rows_drop_out_independently():
    q, k, v = _qkv()
    dropped = np.asarray(attend(q, k, v, dropout_rate=0.5, rng=jax.random.key(0)))[:, 0, :, 0] == 0
    assert 0 < dropped.sum() < dropped.size


def test_cudnn_refuses_dropout():
    with pytest.raises(ValueError, match="cudnn has no dropout"):
        attend(*_qkv(), backend="cudnn", dropout_rate=0.1, rng=jax.random.key(0))


def test_backend_with_dropout(monkeypatch):
    class Device:
        platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert choose_backend("auto", jnp.bfloat16, 128, 0.1) == "xla"
    assert choose_backend("xla", jnp.bfloat16, 128, 0.1) == "xla"
    with pytest.raises(UserError, match=r"model\.attention=cudnn has no dropout .*attention_dropout=0\.1"):
        choose_backend("cudnn", jnp.bfloat16, 128, 0.1)
