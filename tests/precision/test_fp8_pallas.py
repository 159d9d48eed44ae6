"""The Pallas kernel, interpreted on a CPU, against numpy: complex rotations and ml_dtypes casts."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from neva_jax.precision import fp8_pallas, fp8_xla

B, T, G, K = 2, 96, 3, 32  # 192 tokens: three programs


def _gradients(queries, dtype=jnp.bfloat16):
    draw = np.random.default_rng(0)
    shapes = ((B, T, G * queries, K), (B, T, G, K), (B, T, G, K))
    angles = draw.uniform(0, 6, (B, T, K // 2)).astype(np.float32)
    return [jnp.asarray(draw.standard_normal(shape), dtype) for shape in shapes], np.cos(angles), np.sin(angles)


def _rotated_back(x, cos, sin):
    """(x[i], x[i + K/2]) as one complex number times exp(-i * angle)."""
    x = np.asarray(x, np.float64)
    turned = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * (cos - 1j * sin)[:, :, None]
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("queries", [1, 2])  # of a group
def test_gradients_of_heads_are_rotated_back_joined_and_cast(queries, dtype):
    (dq, dk, dv), cos, sin = _gradients(queries)
    scale = np.float32(150)  # saturates e4m3 (448), and never e5m2
    cast = fp8_pallas.heads_grad_cast(dq, dk, dv, cos, sin, jnp.float32(scale), jnp.dtype(dtype), interpret=True)
    q, k = _rotated_back(dq, cos, sin), _rotated_back(dk, cos, sin)
    joined = np.concatenate(
        [q.reshape(B, T, G, queries, K), k[..., None, :], np.asarray(dv, np.float64)[..., None, :]], axis=-2
    )
    top = float(ml_dtypes.finfo(dtype).max)
    expected = np.clip(joined * scale, -top, top).astype(np.float32).astype(dtype)
    assert cast.values.shape == (B, T, G, queries + 2, K)
    assert cast.values.dtype == dtype
    # fp32 beside float64: a value in the middle between two FP8 numbers may round the other way.
    different = np.asarray(cast.values).view(np.uint8).astype(int) - expected.view(np.uint8)
    assert np.abs(different).max() <= 1
    assert np.mean(different != 0) < 1e-4
    assert np.any(np.abs(joined * scale) > top) == (dtype == ml_dtypes.float8_e4m3fn)
    np.testing.assert_allclose(cast.amax, np.abs(joined).max(), rtol=1e-6)
    assert float(cast.inverse) == np.float32(1) / scale


@pytest.mark.parametrize("tokens", [96, 80])  # blocks of 32 and of 16
def test_smaller_blocks_and_what_is_no_number(tokens):
    parts, cos, sin = _gradients(1)
    dq, dk, dv = (part[:1, :tokens].at[0, 5, 1, 3].set(jnp.nan) for part in parts)
    arguments = (dq, dk, dv, cos[:1, :tokens], sin[:1, :tokens], jnp.float32(100))
    ours = fp8_pallas.heads_grad_cast(*arguments, jnp.float8_e5m2, interpret=True)
    theirs = fp8_xla.heads_grad_cast(*arguments, jnp.float8_e5m2)
    bad = np.isnan(np.asarray(theirs.values, np.float32))
    assert bad.sum() == 5  # two channels of q and of k are mixed, one of v is not
    np.testing.assert_array_equal(np.isnan(np.asarray(ours.values, np.float32)), bad)
    # XLA rounds to bf16 between rotation and cast.
    np.testing.assert_allclose(*(np.asarray(cast.values, np.float32)[~bad] for cast in (ours, theirs)), rtol=0.26)


def test_shapes_that_the_kernel_does_not_serve():
    (dq, dk, _), cos, _ = _gradients(1)
    assert fp8_pallas.fits(dq, dk, cos)
    assert not fp8_pallas.fits(dq[:, :5], dk[:, :5], cos[:, :5])  # tokens
    assert not fp8_pallas.fits(dq, dk, cos[..., : K // 4])  # heads that are rotated in part
    assert not fp8_pallas.fits(dq[..., :24], dk[..., :24], cos[..., :12])  # width
