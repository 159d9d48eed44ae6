"""FP8 layers on a GPU, both backends, against fp32 products of the same bf16 inputs.

Relative errors (Frobenius). A normal tensor cast to e4m3 with one scale is off by 2.6 %, to e5m2 by 5.2 %; a product of
two casts by the root of the sum of squares, and SwiGLU adds a cast on the way.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neva_jax.config import LlmConfig
from neva_jax.models.rotary import rotary_angles, split_rotated
from neva_jax.parallel.compiler import NO_TRITON_PRODUCTS
from neva_jax.parallel.mesh import constrain_stream, make_mesh
from neva_jax.precision import fp8, fp8_pallas, te
from neva_jax.precision.fp8_recipe import SITES, Recipe

BACKENDS = ("xla", "te")
B, T, D, F, H, K = 4, 128, 256, 512, 4, 64
FORWARD, GRADIENT = 0.045, {jnp.float8_e5m2: 0.075, jnp.float8_e4m3fn: 0.055}
MLP_FORWARD, MLP_GRADIENT = 0.08, {jnp.float8_e5m2: 0.12, jnp.float8_e4m3fn: 0.1}


def _recipe(backend, delayed, gradient=jnp.float8_e5m2, stored=False):
    if backend == "te" and te.problem() is not None:
        pytest.skip(te.problem())
    return Recipe(delayed, gradient, 0, 16, "max", SITES["all"], 0, 1, stored, False, False, False, backend)


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(jnp.bfloat16)


def _off(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


def _run(function, arguments, states, recipe, g, steps=3):
    """(y, gradients of `arguments`, state) after `steps` steps of the state."""

    @partial(jax.jit, compiler_options=NO_TRITON_PRODUCTS)
    def step(arguments, states, g):
        def call(arguments, states):
            scales = fp8.scales(recipe, states) if states else {}
            scales = jax.tree.map(lambda scale: scale[0], scales)
            return function(arguments, {site: scales.get(site, {}) for site in recipe.sites})

        y, back = jax.vjp(call, arguments, states)
        return y, *back(g)

    for _ in range(steps):
        y, gradients, states = step(arguments, states, g)
    return y, gradients, states


def _reference(function, arguments, g):
    arguments = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    with jax.default_matmul_precision("highest"):
        y, back = jax.vjp(function, arguments)
        return y, back(jax.tree.map(lambda x: x.astype(jnp.float32), g))[0]


@pytest.mark.parametrize("gradient", [jnp.float8_e5m2, jnp.float8_e4m3fn], ids=["hybrid", "e4m3"])
@pytest.mark.parametrize("delayed", [False, True], ids=["current", "delayed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear(backend, delayed, gradient):
    recipe = _recipe(backend, delayed, gradient)
    arguments, g = (_normal(0, B, T, H, K), _normal(1, H, K, D) * 0.02), _normal(2, B, T, D) * 1e-3
    run = lambda a, s: fp8.linear(recipe, *a, s["o"], inputs=2)  # noqa: E731
    y, gradients, _ = _run(run, arguments, fp8.initial_state(recipe, True), recipe, g)
    expected, expected_gradients = _reference(lambda a: jnp.einsum("bthk,hkd->btd", *a), arguments, g)
    assert _off(y, expected) < FORWARD
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert _off(ours, theirs) < GRADIENT[gradient]


@pytest.mark.parametrize("gradient", [jnp.float8_e5m2, jnp.float8_e4m3fn], ids=["hybrid", "e4m3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_of_a_run(backend, gradient):
    """Gradients of a mean over many tokens, whose largest values nothing is known of."""
    recipe = _recipe(backend, True, gradient)
    arguments, g = (_normal(0, B, T, D), _normal(1, D, F) * 0.02), _normal(2, B, T, F) * 1e-6
    state = fp8.initial_state(recipe, True)
    y, gradients, _ = _run(lambda a, scales: fp8.linear(recipe, *a, scales["o"]), arguments, state, recipe, g, steps=1)
    expected, expected_gradients = _reference(lambda a: a[0] @ a[1], arguments, g)
    assert _off(y, expected) < FORWARD
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert _off(ours, theirs) < GRADIENT[gradient]


@pytest.mark.parametrize("delayed", [False, True], ids=["current", "delayed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads(backend, delayed):
    """Two groups of a key, a value and two query heads; backend `te` has our Pallas kernel for delayed scaling."""
    recipe = _recipe(backend, delayed)
    g = tuple(_normal(i, B, T, heads, K) * 1e-3 for i, heads in ((5, 4), (6, 2), (7, 2)))
    arguments = (3 * _normal(0, B, T, D), 1 + 0.1 * _normal(3, D), _normal(1, D, 2, 4, K) * 0.06)
    angles = rotary_angles(jnp.broadcast_to(jnp.arange(T), (B, T)), LlmConfig(vocab_size=9, head_dim=K))

    def run(a, scales):
        return fp8.heads(recipe, a[0], a[2], scales["qkv"], norm=(a[1], 1e-5), angles=angles)

    def reference(a):
        y = a[0] * jax.lax.rsqrt(jnp.mean(a[0] * a[0], axis=-1, keepdims=True) + 1e-5) * a[1]
        return split_rotated(jnp.einsum("btd,dgrk->btgrk", y, a[2]), *angles)

    y, gradients, state = _run(run, arguments, fp8.initial_state(recipe, True), recipe, g)
    expected, expected_gradients = _reference(reference, arguments, g)
    for ours, theirs in zip(y, expected, strict=True):
        assert _off(ours, theirs) < FORWARD
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert _off(ours, theirs) < GRADIENT[jnp.float8_e5m2]
    if delayed:
        # Rotation keeps the length of a pair: the largest value is at most sqrt(2) times what came in.
        met = 57344 / float(state["qkv"]["grad"]["scale"][0])
        largest = max(float(jnp.max(jnp.abs(part.astype(jnp.float32)))) for part in g)
        assert largest / 1.5 < met < largest * 1.42


def test_what_is_no_number_stays_none():
    """Our kernel must not hide from the run's guard what attention's gradient got wrong."""
    dq, dk, dv = (_normal(i, 1, 64, 2, 64).at[0, 5, 1, 3].set(jnp.nan) for i in range(3))
    cos, sin = jnp.ones((1, 64, 32)), jnp.zeros((1, 64, 32))
    cast = jax.jit(fp8_pallas.heads_grad_cast, static_argnums=6)
    values = cast(dq, dk, dv, cos, sin, jnp.float32(100), jnp.float8_e5m2).values
    assert int(jnp.isnan(values.astype(jnp.float32)).sum()) == 5


def _mlp(arguments):
    x, gamma, gate_up, down = arguments
    y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gamma
    halves = jnp.einsum("btd,dif->btif", y, gate_up)
    return jnp.einsum("btf,fd->btd", jax.nn.silu(halves[:, :, 0]) * halves[:, :, 1], down)


def _mlp_arguments():
    gamma = 1 + 0.1 * _normal(3, D)
    return (3 * _normal(0, B, T, D), gamma, _normal(1, D, 2, F) * 0.06, _normal(2, F, D) * 0.05)


@pytest.mark.parametrize("gradient", [jnp.float8_e5m2, jnp.float8_e4m3fn], ids=["hybrid", "e4m3"])
@pytest.mark.parametrize("delayed", [False, True], ids=["current", "delayed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mlp(backend, delayed, gradient):
    recipe, arguments, g = _recipe(backend, delayed, gradient), _mlp_arguments(), _normal(5, B, T, D) * 1e-3

    def run(a, scales):
        return fp8.mlp(recipe, a[0], (a[1], 1e-5), a[2:], (scales["gate_up"], scales["down"]))

    y, gradients, _ = _run(run, arguments, fp8.initial_state(recipe, True), recipe, g)
    expected, expected_gradients = _reference(_mlp, arguments, g)
    assert _off(y, expected) < MLP_FORWARD
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert _off(ours, theirs) < MLP_GRADIENT[gradient]


# By current scaling Transformer Engine rounds to bf16 before it casts. XLA's backend, made to do so too, is 0.035 off
# what it computes without.
@pytest.mark.parametrize(("delayed", "bound"), [(False, 0.04), (True, 0.02)], ids=["current", "delayed"])
def test_both_backends_agree(delayed, bound):
    arguments, g, results = _mlp_arguments(), _normal(5, B, T, D) * 1e-3, []
    for backend in BACKENDS:
        recipe = _recipe(backend, delayed)

        def run(a, scales, recipe=recipe):
            y = fp8.linear(recipe, a[0], a[2], scales["gate_up"], norm=(a[1], 1e-5))
            return fp8.mlp(recipe, a[0], (a[1], 1e-5), a[2:], (scales["gate_up"], scales["down"])), y

        states = fp8.initial_state(recipe, True)
        results.append(_run(run, arguments, states, recipe, (g, _normal(6, B, T, 2, F) * 1e-3))[:2])
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        assert _off(ours, theirs) < bound


@pytest.mark.parametrize("delayed", [False, True], ids=["current", "delayed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stored_kernels_give_the_numbers_of_kernels_quantized_in_every_step(backend, delayed):
    recipe, arguments, g = _recipe(backend, delayed), _mlp_arguments(), _normal(5, B, T, D) * 1e-3
    kernels = arguments[2:]
    stored = tuple(jax.jit(lambda kernel: fp8.store(kernel, 1)[0])(kernel) for kernel in kernels)
    results = []
    for held in (kernels, stored):

        def run(x, scales, held=held):
            return fp8.mlp(recipe, x, (arguments[1], 1e-5), held, (scales["gate_up"], scales["down"]))

        results.append(_run(run, arguments[0], fp8.initial_state(recipe, False), recipe, g)[:2])
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        assert _off(ours, theirs) < 1e-3


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_devices_compute_what_one_does(backend, axis, sequence_parallel):
    """Layers of one device and of a mesh: values, gradients, and the largest values that delayed scaling remembers.

    Sums over a split dimension are rounded to bf16 before they are added, so a few values become the next FP8 number.
    """
    recipe = dataclasses.replace(_recipe(backend, True), sequence_parallel=sequence_parallel)
    x, gamma, gate_up, down = _mlp_arguments()
    arguments = (x, gamma, gate_up, down, _normal(1, D, 2, 4, K) * 0.06)
    angles = rotary_angles(jnp.broadcast_to(jnp.arange(T), (B, T)), LlmConfig(vocab_size=9, head_dim=K))
    heads = tuple(_normal(i, B, T, count, K) * 1e-3 for i, count in ((5, 4), (6, 2), (7, 2)))

    def run(a, scales):
        x = constrain_stream(a[0], sequence_parallel)
        norm = (a[1], 1e-5)
        y = fp8.heads(recipe, x, a[4], scales["qkv"], norm=norm, angles=angles)
        return fp8.mlp(recipe, x, norm, a[2:4], (scales["gate_up"], scales["down"])), y

    results = []
    for sizes in ({"data": 1, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": 1, "tensor": 1, axis: 2}):
        with jax.set_mesh(make_mesh(sizes, jax.devices()[: max(sizes.values())])):
            state = fp8.initial_state(recipe, True)
            found = _run(run, arguments, state, recipe, (_normal(5, B, T, D) * 1e-3, heads))
            results.append(jax.tree.map(np.asarray, found))
    (one, one_gradients, one_state), (two, two_gradients, two_state) = jax.tree.map(jnp.asarray, results)
    for ours, theirs in zip(*map(jax.tree.leaves, ((two, two_gradients), (one, one_gradients))), strict=True):
        assert _off(ours, theirs) < 0.03
    for ours, theirs in zip(*map(jax.tree.leaves, (two_state, one_state)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.05)
