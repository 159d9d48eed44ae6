"""Norms, the projector, activations and the scan over layers against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neva_jax.config import ProjectorConfig
from neva_jax.models.layers import LayerNorm, RMSNorm, param, scan_layers
from neva_jax.models.projector import Projector
from neva_jax.models.vision import ACTIVATIONS

_erf = np.vectorize(math.erf)


def _gelu(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _normal(*shape, seed=5):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(eps):
    x, scale = 3 * _normal(2, 5, 8), _normal(8, seed=6)
    norm = RMSNorm(nnx.Rngs(0), 8, eps)
    norm.scale[...] = jnp.asarray(scale)
    y = x.astype(np.float64)
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_layer_norm(eps):
    x, scale, bias = 3 * _normal(2, 5, 8) + 2, _normal(8, seed=6), _normal(8, seed=7)
    norm = LayerNorm(nnx.Rngs(0), 8, eps)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    y = x.astype(np.float64)
    expected = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps) * scale + bias
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norms_compute_in_fp32(kind):
    norm = kind(nnx.Rngs(0), 512, 1e-5)
    # 1 + a little: squares and means of 512 such values in bf16 (8 bits) would be far off.
    x = jnp.asarray(1 + 0.1 * _normal(4, 512), jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    exact = norm(x.astype(jnp.float32))
    np.testing.assert_allclose(norm(x).astype(jnp.float32), exact, rtol=2**-8)


def test_a_new_norm_is_neutral():
    x = _normal(3, 8)
    scaled = LayerNorm(nnx.Rngs(0), 8, 1e-6)(jnp.asarray(x))
    np.testing.assert_allclose(np.mean(scaled, -1), 0, atol=1e-6)
    np.testing.assert_allclose(np.std(scaled, -1), 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("quick_gelu", lambda x: x / (1 + np.exp(-1.702 * x))),
        ("gelu", _gelu),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ],
)
def test_activations(name, formula):
    x = np.linspace(-6, 6, 401)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), formula(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_projector(kind):
    projector = Projector(nnx.Rngs(3), ProjectorConfig(kind=kind), 6, 10, jnp.float32)
    weights = {name: np.asarray(value, np.float64) for name, value in nnx.to_pure_dict(nnx.state(projector)).items()}
    x = 3 * _normal(2, 4, 6)
    expected = x @ weights["kernel_1"] + weights["bias_1"]
    if kind == "mlp2x_gelu":
        expected = _gelu(expected) @ weights["kernel_2"] + weights["bias_2"]
    else:
        assert weights.keys() == {"kernel_1", "bias_1"}
    np.testing.assert_allclose(projector(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_projector_starts_like_a_torch_linear():
    projector = Projector(nnx.Rngs(3), ProjectorConfig(), 64, 100, jnp.float32)
    for names, bound in ((("kernel_1", "bias_1"), 1 / 8), (("kernel_2", "bias_2"), 1 / 10)):
        for name in names:
            values = np.asarray(getattr(projector, name)[...])
            assert np.abs(values).max() <= bound
            # Of a uniform distribution: standard deviation bound / sqrt(3); 100 values vary by a few percent.
            np.testing.assert_allclose(values.std(), bound / math.sqrt(3), rtol=0.15)


class _Affine(nnx.Module):
    """x -> x * scale + shift, one layer or a stack."""

    def __init__(self, rngs: nnx.Rngs, layers: int | None = None):
        self.scale = param(rngs, (3,), ("norm",), jax.nn.initializers.normal(1.0), layers)

    def __call__(self, x, shift):
        y = x * self.scale[...] + shift
        return y, jnp.sum(y)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("unroll", [1, 2, 5])
@pytest.mark.parametrize("count", [None, 1, 3])
def test_scan_layers_is_a_loop(remat, unroll, count):
    stack = _Affine(nnx.Rngs(1), layers=5)
    scales, shifts, x = np.asarray(stack.scale[...]), _normal(5, 3), _normal(3, seed=8)
    y, sums = scan_layers(
        stack,
        jnp.asarray(x),
        per_layer=jnp.asarray(shifts[:count]),
        remat=remat,
        unroll=unroll,
        count=count,
        call=lambda layer, x, shift: layer(x, shift),
    )
    expected, expected_sums = x.astype(np.float64), []
    for scale, shift in zip(scales[:count], shifts[:count], strict=True):
        expected = expected * scale + shift
        expected_sums.append(expected.sum())
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5, atol=1e-6)


def test_unroll_and_remat_reach_the_scan():
    def program(**settings):
        return str(
            jax.make_jaxpr(
                lambda x: scan_layers(
                    _Affine(nnx.Rngs(1), layers=4), x, call=lambda layer, x, _: layer(x, 0.0), **settings
                )[0]
            )(jnp.ones(3))
        )

    assert "unroll=2" in program(unroll=2)
    assert "unroll=1" in program()
    assert "remat" in program(remat="dots")
    assert "remat" not in program()


def test_a_stacked_parameter_has_the_layers_first():
    single = param(nnx.Rngs(0), (4, 2), ("embed", None), jax.nn.initializers.normal(1.0))
    stacked = param(nnx.Rngs(0), (4, 2), ("embed", None), jax.nn.initializers.normal(1.0), layers=3)
    assert (single.shape, single.get_metadata()["axes"]) == ((4, 2), ("embed", None))
    assert (stacked.shape, stacked.get_metadata()["axes"]) == ((3, 4, 2), ("layers", "embed", None))
    assert stacked.dtype == jnp.float32
    assert not np.array_equal(stacked[0], stacked[1])  # each layer has numbers of its own
