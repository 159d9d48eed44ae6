"""Norms, the projector, activations and the scan over layers against NumPy."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neva_jax.config import ProjectorConfig
from neva_jax.models.layers import NO_REMAT, LayerNorm, Remat, RMSNorm, dropout, param, scan_layers
from neva_jax.models.projector import Projector, join_neighbours
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


def _projector(kind, in_dim=6, out_dim=10):
    projector = Projector(nnx.Rngs(3), ProjectorConfig(kind=kind), in_dim, out_dim, jnp.float32)
    state = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(projector)))
    return projector, {".".join(name): np.asarray(value, np.float64) for name, value in state.items()}


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_projector(kind, layers):
    projector, weights = _projector(kind)
    assert weights.keys() == {f"{name}_{i + 1}" for i in range(layers) for name in ("kernel", "bias")}
    x = 3 * _normal(2, 4, 6)
    expected = x @ weights["kernel_1"] + weights["bias_1"]
    for i in range(2, layers + 1):
        expected = _gelu(expected) @ weights[f"kernel_{i}"] + weights[f"bias_{i}"]
    np.testing.assert_allclose(projector(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_identity_projector():
    projector, weights = _projector("identity", 6, 6)
    x = _normal(2, 4, 6)
    assert not weights
    np.testing.assert_array_equal(projector(jnp.asarray(x)), x)


def _neighbours(x):
    """[N, n*n, E] -> [N, m*m, 4E]: top left, top right, bottom left, bottom right; zeros beyond the ends."""
    side = math.isqrt(x.shape[1])
    tokens = []
    for top in range(0, side, 2):
        for left in range(0, side, 2):
            parts = []
            for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                inside = row < side and column < side
                parts.append(x[:, row * side + column] if inside else np.zeros_like(x[:, 0]))
            tokens.append(np.concatenate(parts, axis=-1))
    return np.stack(tokens, axis=1)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_joining_neighbours(side):
    x = _normal(2, side * side, 3)
    np.testing.assert_array_equal(join_neighbours(jnp.asarray(x)), _neighbours(x))


@pytest.mark.parametrize("side", [4, 5])
def test_downsampling_projector(side):
    """2 x 2 neighbours, LayerNorm (epsilon 1e-5), Linear, GELU, Linear."""
    projector, weights = _projector("mlp_downsample", 3, 10)
    for name, shape in (("scale", 1 + _normal(12)), ("bias", _normal(12, seed=6))):
        getattr(projector.norm, name)[...] = jnp.asarray(shape)
        weights[f"norm.{name}"] = shape
    assert weights.keys() == {"norm.scale", "norm.bias", "kernel_1", "bias_1", "kernel_2", "bias_2"}
    assert weights["kernel_1"].shape == (12, 10)
    x = 1e-2 * _normal(2, side * side, 3)  # small, so that epsilon matters
    y = _neighbours(x.astype(np.float64))
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = (y * weights["norm.scale"] + weights["norm.bias"]) @ weights["kernel_1"] + weights["bias_1"]
    expected = _gelu(y) @ weights["kernel_2"] + weights["bias_2"]
    np.testing.assert_allclose(projector(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


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


REMATS = (
    NO_REMAT,
    Remat("dots"),
    Remat("full"),
    Remat("full", "uniform", 2),
    Remat("full", "block", 2),
    Remat("dots", "block", 9),
)


@pytest.mark.parametrize("remat", REMATS, ids=str)
@pytest.mark.parametrize(("unroll", "count"), [(1, None), (6, None), (3, 4)])
def test_scan_layers_is_a_loop(remat, unroll, count):
    stack = _Affine(nnx.Rngs(1), layers=6)
    scales, shifts, x = np.asarray(stack.scale[...]), _normal(6, 3), _normal(3, seed=8)
    y, sums = scan_layers(
        stack,
        jnp.asarray(x),
        per_layer=jnp.asarray(shifts[:count]),
        remat=remat,
        unroll=unroll,
        span=None if count is None else (0, count),
        call=lambda layer, x, shift: layer(x, shift),
    )
    expected, expected_sums = x.astype(np.float64), []
    for scale, shift in zip(scales[:count], shifts[:count], strict=True):
        expected = expected * scale + shift
        expected_sums.append(expected.sum())
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5, atol=1e-6)


def _tanh_stack(remat, unroll=1):
    """A function of scales [4, 64] and x [64]: the sum after four layers, each of two products and two tanh."""
    graphdef, _ = nnx.split(_Affine(nnx.Rngs(1), layers=4))

    def run(scales, x):
        stack = nnx.merge(graphdef, {"scale": scales})
        return jnp.sum(scan_layers(stack, x, remat=remat, unroll=unroll, call=layer)[0])

    def layer(module, x, _):
        return jnp.tanh(jnp.tanh(x * module.scale[...]) * module.scale[...]), None

    return run


@pytest.mark.parametrize("remat", REMATS[1:], ids=str)
def test_gradients_do_not_depend_on_remat(remat):
    scales, x = _normal(4, 64), _normal(64, seed=8)
    plain = jax.grad(_tanh_stack(NO_REMAT), argnums=(0, 1))(scales, x)
    for ours, expected in zip(jax.grad(_tanh_stack(remat), argnums=(0, 1))(scales, x), plain, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", [Remat("full"), Remat("full", "uniform", 4), Remat("full", "block", 4)], ids=str)
def test_unrolled_layers_are_recomputed_too(remat):
    """Without a loop the compiler sees both times side by side, and must not keep what the first one computed."""

    def computed(remat, unroll):
        gradient = jax.jit(jax.value_and_grad(_tanh_stack(remat, unroll), argnums=(0, 1)))
        program = gradient.lower(jnp.ones((4, 64)), jnp.ones(64)).compile().as_text()
        return len(re.findall(r" tanh\(", program))

    assert computed(NO_REMAT, 4) == 8
    assert computed(remat, 4) == 16
    if remat.layers == 1:
        assert computed(remat, 3) > 12  # one in a loop that runs once, and one beside it


def _kept(remat):
    """Arrays of the size of x that the backward pass needs besides the parameters."""
    scales, x = jnp.ones((4, 64)), jnp.ones(64)
    backward = jax.eval_shape(lambda s, x: jax.vjp(_tanh_stack(remat), s, x)[1], scales, x)
    return sum(leaf.size for leaf in jax.tree.leaves(backward)) // 64 - 4


def test_groups_keep_one_input_each():
    assert [_kept(Remat("full", "uniform", n)) for n in (1, 2, 4)] == [4, 2, 1]


def test_a_block_recomputes_its_first_layers_only():
    kept = [_kept(Remat("full", "block", n)) for n in (1, 2, 3, 4)]
    assert kept == sorted(kept, reverse=True)
    assert len(set(np.diff(kept))) == 1
    assert kept[0] < _kept(NO_REMAT)
    assert kept[-1] == _kept(Remat("full")) == 4


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
    assert "remat" in program(remat=Remat("dots"))
    assert "remat" not in program()


def test_a_stacked_parameter_has_the_layers_first():
    single = param(nnx.Rngs(0), (4, 2), ("embed", None), jax.nn.initializers.normal(1.0))
    stacked = param(nnx.Rngs(0), (4, 2), ("embed", None), jax.nn.initializers.normal(1.0), layers=3)
    assert (single.shape, single.get_metadata()["axes"]) == ((4, 2), ("embed", None))
    assert (stacked.shape, stacked.get_metadata()["axes"]) == ((3, 4, 2), ("layers", "embed", None))
    assert stacked.dtype == jnp.float32
    assert not np.array_equal(stacked[0], stacked[1])  # each layer has numbers of its own


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_a_part_and_keeps_the_mean(rate, dtype):
    x = jnp.full((200, 500), 3, dtype)
    y = dropout(x, rate, jax.random.key(0))
    assert y.dtype == dtype
    zeros = np.asarray(y == 0)
    # Four standard deviations of a mean of 100000 coins.
    assert abs(zeros.mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / zeros.size)
    np.testing.assert_allclose(np.asarray(y, np.float32)[~zeros], 3 / (1 - rate), rtol=2**-8)
    np.testing.assert_array_equal(y, dropout(x, rate, jax.random.key(0)))
    assert np.any(y != dropout(x, rate, jax.random.key(1)))


def test_no_dropout_is_the_array_itself():
    x = jnp.ones(3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
