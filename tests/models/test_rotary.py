"""Rotary embedding against complex rotations and the papers' definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neva_jax.config import LlmConfig
from neva_jax.models.rotary import rotary_angles, rotate, split_rotated

_angles = jax.jit(rotary_angles, static_argnums=1)
_rotate = jax.jit(rotate)


def _llm(**settings):
    return LlmConfig(**{"vocab_size": 9, "hidden_size": 24, "num_heads": 2, "head_dim": 12, **settings})


@pytest.mark.parametrize(("base", "farthest", "atol"), [(10000.0, 60, 1e-5), (150.0, 60, 1e-5), (10000.0, 4096, 2e-3)])
@pytest.mark.parametrize(("fraction", "rotated"), [(1.0, 12), (0.5, 6), (0.25, 2)])
def test_rotary_embedding_is_a_complex_rotation(base, farthest, atol, fraction, rotated):
    """(x[i], x[i + R/2]) as one complex number times exp(i * position * base^(-2i/R)); channels from R on stay.

    The angle at position p is rounded to fp32: an error of about p * 2^-23 radians.
    """
    draw = np.random.default_rng(4)
    width = 12 if fraction != 0.25 else 8
    half = rotated // 2
    x = draw.standard_normal((2, 5, 3, width)).astype(np.float32)
    positions = draw.integers(0, farthest, (2, 5))
    positions[0, 0] = 0
    turned = (x[..., :half] + 1j * x[..., half:rotated]) * np.exp(
        1j * positions[:, :, None, None] * base ** (-2 * np.arange(half) / rotated)
    )
    config = _llm(head_dim=width, rope_base=base, rope_fraction=fraction)
    out = _rotate(jnp.asarray(x), *_angles(jnp.asarray(positions), config))
    expected = np.concatenate([turned.real, turned.imag, x[..., rotated:]], -1)
    np.testing.assert_allclose(out, expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(out[0, 0], x[0, 0])  # position 0 stays


def test_rotary_embedding_in_bf16_rounds_once():
    """Angles and products are fp32: bf16 angles would be off by whole radians at position 1000."""
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, 4, 2, 8)), jnp.bfloat16)
    angles = _angles(jnp.array([[0, 1, 999, 1000]]), _llm(head_dim=8))
    assert [a.dtype for a in angles] == [jnp.float32] * 2
    out = _rotate(x, *angles)
    assert out.dtype == jnp.bfloat16
    exact = _rotate(x.astype(jnp.float32), *angles)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8)


@pytest.mark.parametrize("queries", [1, 3])  # of a group
def test_heads_in_groups_come_apart_rotated_and_their_gradient_goes_back(queries):
    draw = np.random.default_rng(5)
    y = jnp.asarray(draw.standard_normal((2, 5, 2, queries + 2, 8)), jnp.float32)
    angles = _angles(jnp.asarray(draw.integers(0, 60, (2, 5))), _llm(head_dim=8, rope_fraction=0.5))

    def plain(y):
        q = y[..., :queries, :].reshape(2, 5, 2 * queries, 8)
        return rotate(q, *angles), rotate(y[..., queries, :], *angles), y[..., queries + 1, :]

    ours, back = jax.vjp(lambda y: split_rotated(y, *angles), y)
    expected, expected_back = jax.vjp(plain, y)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    g = jax.tree.map(lambda part: jnp.asarray(draw.standard_normal(part.shape), jnp.float32), expected)
    np.testing.assert_allclose(back(g)[0], expected_back(g)[0], rtol=0, atol=1e-6)


def _frequency(config, rotated, i, length):
    """Frequency i of a row of `length` tokens, by the definitions of the papers."""
    base, factor, original = config.rope_base, config.rope_factor, config.rope_original_length
    if config.rope_scaling == "dynamic" and length > original:
        base *= (factor * length / original - factor + 1) ** (rotated / (rotated - 2))
    frequency = base ** (-2 * i / rotated)
    if config.rope_scaling == "linear":
        return frequency / factor
    if config.rope_scaling == "llama3":
        wave, low, high = 2 * np.pi / frequency, config.rope_low_freq_factor, config.rope_high_freq_factor
        if wave > original / low:
            return frequency / factor
        if wave > original / high:
            smooth = (original / wave - low) / (high - low)
            return (1 - smooth) * frequency / factor + smooth * frequency
    return frequency


@pytest.mark.parametrize("scaling", ["none", "linear", "dynamic", "llama3"])
@pytest.mark.parametrize(("fraction", "rotated"), [(1.0, 16), (0.5, 8)])
def test_stretched_angles_against_their_definitions(scaling, fraction, rotated):
    config = _llm(
        head_dim=16,
        rope_base=500.0,
        rope_fraction=fraction,
        rope_scaling=scaling,
        rope_factor=3.0,
        rope_original_length=20,
        rope_low_freq_factor=0.5,
        rope_high_freq_factor=2.5,
    )
    positions = np.stack([np.arange(60), np.arange(60) % 15])
    cos, sin = _angles(jnp.asarray(positions), config)
    for row, length in ((0, 60), (1, 15)):
        angles = np.stack([positions[row] * _frequency(config, rotated, i, length) for i in range(rotated // 2)], -1)
        np.testing.assert_allclose(cos[row], np.cos(angles), rtol=0, atol=2e-5)
        np.testing.assert_allclose(sin[row], np.sin(angles), rtol=0, atol=2e-5)


def test_dynamic_rope_does_not_see_other_rows():
    """A row within the original length has the plain angles, whatever stands beside it."""
    config = _llm(rope_scaling="dynamic", rope_factor=4.0, rope_original_length=8)
    positions = jnp.stack([jnp.arange(20) % 8, jnp.arange(20), jnp.arange(20) % 12])
    together = _angles(positions, config)
    for row in range(3):
        for ours, alone in zip(together, _angles(positions[row : row + 1], config), strict=True):
            np.testing.assert_array_equal(ours[row], alone[0])
    for ours, plain in zip(together, _angles(positions, _llm()), strict=True):
        np.testing.assert_allclose(ours[0], plain[0], rtol=0, atol=1e-6)
        assert np.abs(ours[1:] - plain[1:]).max(axis=(1, 2)).min() > 0.1
