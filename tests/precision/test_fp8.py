"""The XLA backend against numpy: ml_dtypes casts, float64 sums, and the state's evolution over steps."""

import dataclasses
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.extend as jex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from neva_jax.config import (
    Config,
    DataConfig,
    Fp8Config,
    LlmConfig,
    MeshConfig,
    ModelConfig,
    PrecisionConfig,
    TrainConfig,
)
from neva_jax.errors import UserError
from neva_jax.models.llama_fp8 import stacks
from neva_jax.models.rotary import rotary_angles, split_rotated
from neva_jax.parallel.mesh import constrain_stream, make_mesh
from neva_jax.precision import fp8, fp8_xla, te
from neva_jax.precision.fp8_recipe import SITES, Recipe, describe, make_recipe

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
TOP = {E4M3: 448.0, E5M2: 57344.0}
B, T, D, F = 2, 5, 16, 24
CURRENT = Recipe(False, jnp.float8_e5m2, 0, 4, "max", SITES["all"], 0, 1, False, False, False, False, "xla")
DELAYED = dataclasses.replace(CURRENT, delayed=True)


def _normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _cast(x, dtype, scale=None):
    """What a tensor is after its cast and back, in float64."""
    x = np.asarray(x, np.float32)
    scale = np.float32(TOP[dtype] / np.abs(x).max()) if scale is None else np.float32(scale)
    inverse = np.float64(np.float32(1) / scale)
    return np.clip(x * scale, -TOP[dtype], TOP[dtype]).astype(dtype).astype(np.float64) * inverse


def _off(ours, expected):
    return np.linalg.norm(np.asarray(ours, np.float64) - expected) / np.linalg.norm(expected)


# --- casts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale", [None, 3.0, 1e4])
def test_a_cast_is_ml_dtypes_with_saturation(dtype, scale):
    x = _normal(0, 7, 33) * 5
    cast = jax.jit(lambda x: fp8_xla.cast(x, None if scale is None else jnp.float32(scale), dtype))(x)
    used = np.float32(TOP[dtype] / np.abs(x).max()) if scale is None else np.float32(scale)
    expected = np.clip(x * used, -TOP[dtype], TOP[dtype]).astype(dtype)
    np.testing.assert_array_equal(np.asarray(cast.values).view(np.uint8), expected.view(np.uint8))
    assert float(cast.amax) == np.abs(x).max()
    assert float(cast.inverse) == np.float32(1) / used


@pytest.mark.parametrize("bad", [0.0, np.inf])
def test_a_tensor_without_a_usable_largest_value_keeps_scale_one(bad):
    x = np.full((4, 4), bad, np.float32)
    cast = fp8_xla.cast(jnp.asarray(x), None, jnp.float8_e4m3fn)
    assert float(cast.inverse) == 1


# --- layers ----------------------------------------------------------------------------------------------------------


@cache
def _arguments():
    gamma = 1 + 0.1 * _normal(3, D)
    return 3 * _normal(0, B, T, D), gamma, 0.3 * _normal(1, D, 2, F), 0.2 * _normal(2, F, D), 1e-3 * _normal(4, B, T, D)


def _norm(x, gamma, eps=1e-5):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gamma


def _norm_grad(dy, x, gamma, eps=1e-5):
    x = np.asarray(x, np.float64)
    inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    dx = inverse * (dy * gamma - x * inverse**2 * np.mean(dy * gamma * x, axis=-1, keepdims=True))
    return dx, np.sum(dy * x * inverse, axis=(0, 1))


@pytest.mark.parametrize("gradient", [E5M2, E4M3])
def test_linear_and_its_gradients(gradient):
    x, _, _, _, g = _arguments()
    kernel = 0.3 * _normal(7, 4, 4, D)  # two dimensions that are summed over
    x = x.reshape(B, T, 4, 4)
    recipe = dataclasses.replace(CURRENT, gradient=gradient)
    y, back = jax.vjp(lambda x, kernel: fp8.linear(recipe, x, kernel, {}, inputs=2), x, kernel)
    dx, dkernel = back(jnp.asarray(g))
    qx, qk, qg = _cast(x, E4M3), _cast(kernel, E4M3), _cast(g, gradient)
    assert _off(y, np.einsum("btij,ijd->btd", qx, qk)) < 1e-6
    assert _off(dx, np.einsum("btd,ijd->btij", qg, qk)) < 1e-6
    assert _off(dkernel, np.einsum("btij,btd->ijd", qx, qg)) < 1e-6


def test_parts_of_a_batch_are_cast_and_remembered_like_the_whole():
    """Delayed scaling: the same scales for all parts, and the largest value of all of them."""
    x, _, _, _, g = _arguments()
    kernel = 0.3 * _normal(7, D, D)
    scales = {"o": {name: jnp.float32(scale) for name, scale in (("x", 20), ("grad", 4000), ("kernel", 300))}}

    def run(x, kernel, scales, parts):
        pieces = zip(jnp.split(x, parts), fp8.copies(parts, scales), strict=True)
        return jnp.concatenate([fp8.linear(DELAYED, piece, kernel, own["o"]) for piece, own in pieces])

    whole, halves = (jax.vjp(partial(run, parts=parts), x, kernel, scales) for parts in (1, 2))
    np.testing.assert_array_equal(halves[0], whole[0])
    (dx, dkernel, amax), (wanted_dx, wanted_dkernel, wanted_amax) = (
        back(jnp.asarray(g)) for _, back in (halves, whole)
    )
    np.testing.assert_array_equal(dx, wanted_dx)
    assert _off(dkernel, wanted_dkernel) < 1e-6
    found = {name: float(value) for name, value in amax["o"].items()}
    assert found == {name: float(value) for name, value in wanted_amax["o"].items()}
    assert found["x"] == np.abs(x).max() > min(np.abs(half).max() for half in np.split(x, 2))


def test_mlp_and_its_gradients():
    x, gamma, gate_up, down, g = _arguments()
    run = lambda x, gamma, a, b: fp8.mlp(CURRENT, x, (gamma, 1e-5), (a, b), ({}, {}))  # noqa: E731
    y, back = jax.vjp(run, x, gamma, gate_up, down)
    gradients = back(jnp.asarray(g))

    normed = _cast(_norm(x, gamma), E4M3)
    halves = np.einsum("btd,dif->btif", normed, _cast(gate_up, E4M3))
    gate, up = halves[:, :, 0], halves[:, :, 1]
    gain = 1 / (1 + np.exp(-gate))
    inner = _cast(gate * gain * up, E4M3)
    qg = _cast(g, E5M2)
    dinner = qg @ _cast(down, E4M3).T
    dhalves = np.stack([dinner * up * gain * (1 + gate * (1 - gain)), dinner * gate * gain], axis=2)
    dhalves = _cast(dhalves, E5M2)
    dnormed = np.einsum("btif,dif->btd", dhalves, _cast(gate_up, E4M3))
    dx, dgamma = _norm_grad(dnormed, x, gamma)
    expected = (
        dx,
        dgamma,
        np.einsum("btd,btif->dif", normed, dhalves),
        np.einsum("btf,btd->fd", inner, qg),
    )
    # A value next to the middle of two FP8 numbers may round the other way in fp32: a step of 6 % of one element.
    assert _off(y, inner @ _cast(down, E4M3)) < 3e-3
    for ours, theirs in zip(gradients, expected, strict=True):
        assert _off(ours, theirs) < 1e-2


@pytest.mark.parametrize("recipe", [CURRENT, DELAYED], ids=["current", "delayed"])
@pytest.mark.parametrize("stored", [False, True])
def test_heads_are_a_linear_layer_and_the_rotary_embedding(recipe, stored):
    """Values, gradients and what delayed scaling meets, with two query heads in a group."""
    x, gamma, *_ = _arguments()
    kernel = jnp.asarray(0.3 * _normal(8, D, 2, 4, 8))  # [D, G, R + 2, K]
    kernel = fp8.store(kernel, 1)[0] if stored else kernel
    angles = rotary_angles(jnp.arange(B * T).reshape(B, T), LlmConfig(vocab_size=9, head_dim=8))
    tensors = ("x", "grad") if stored else ("x", "grad", "kernel")
    scales = {tensor: jnp.float32(2 + i) for i, tensor in enumerate(tensors)} if recipe.delayed else {}
    norm = (jnp.asarray(gamma), 1e-5)

    def heads(x, gamma, kernel, scales):
        return fp8.heads(recipe, x, kernel, scales, norm=(gamma, 1e-5), angles=angles)

    def apart(x, gamma, kernel, scales):
        return split_rotated(fp8.linear(recipe, x, kernel, scales, norm=(gamma, 1e-5)), *angles)

    results = []
    for function in (heads, apart):
        y, back = jax.vjp(lambda x, gamma, scales, run=function: run(x, gamma, kernel, scales), x, norm[0], scales)
        g = jax.tree.map(lambda part: jnp.asarray(1e-3 * _normal(9, *part.shape)), y)
        results.append((y, back(g)))
        if not stored:
            results[-1] += (jax.vjp(lambda kernel, run=function: run(x, norm[0], kernel, scales), kernel)[1](g),)
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert [part.shape for part in results[0][0]] == [(B, T, 4, 8), (B, T, 2, 8), (B, T, 2, 8)]


CASTS = ("norm_cast", "swiglu_cast", "swiglu_grad_cast", "heads_grad_cast")


@pytest.mark.parametrize(
    ("groups", "sequence_parallel", "parts"),
    [
        (2, False, {"norm_cast": (1, 8, D), "heads_grad_cast": (1, 8, 1, 8)}),
        (2, True, {"norm_cast": (1, 4, D), "heads_grad_cast": (1, 8, 1, 8)}),
        (1, False, {"norm_cast": (1, 8, D)}),  # XLA's own for the heads
    ],
    ids=["rows and heads", "length", "a key head for two devices"],
)
def test_kernels_of_one_device_get_its_part(monkeypatch, groups, sequence_parallel, parts):
    """A backend that knows no mesh, played by XLA's functions, gives the numbers of XLA's on the mesh, bit by bit."""
    met = {}

    def noted(name):
        def run(*arguments):
            met[name] = arguments[0].shape
            return getattr(fp8_xla, name)(*arguments)

        return run

    functions = {name: getattr(fp8_xla, name) for name in ("cast", "norm_grad", "outer", "product")}
    fake = SimpleNamespace(ONE_DEVICE=True, **functions, **{name: noted(name) for name in CASTS})
    monkeypatch.setattr(fp8, "backend_functions", lambda name: fake if name == "te" else fp8_xla)
    x, g = 3 * _normal(0, 4, 8, D), 1e-3 * _normal(4, 4, 8, D)
    kernels = 0.3 * _normal(1, D, 2, F), 0.2 * _normal(2, F, D), 0.3 * _normal(5, D, groups, 2 // groups + 2, 8)
    norm = (jnp.asarray(1 + 0.1 * _normal(3, D)), 1e-5)
    angles = rotary_angles(jnp.broadcast_to(jnp.arange(8), (4, 8)), LlmConfig(vocab_size=9, head_dim=8))
    scales = {tensor: jnp.float32(2 + i) for i, tensor in enumerate(("x", "grad", "kernel"))}

    def step(x, kernels, scales, backend):
        recipe = dataclasses.replace(DELAYED, backend=backend, sequence_parallel=sequence_parallel)

        def run(x, kernels, scales):
            x = constrain_stream(x, sequence_parallel)
            heads = fp8.heads(recipe, x, kernels[2], scales, norm=norm, angles=angles)
            return fp8.mlp(recipe, x, norm, kernels[:2], (scales, scales)), heads

        y, back = jax.vjp(run, x, kernels, scales)
        return y, back((g, tuple(1e-3 * part for part in y[1])))

    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        ours, expected = (jax.jit(step, static_argnums=3)(x, kernels, scales, backend) for backend in ("te", "xla"))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert met == {**parts, "swiglu_cast": (1, 8, 2, F // 2), "swiglu_grad_cast": (1, 8, F // 2)}


def test_a_norm_before_a_linear_layer_is_cast_without_rounding():
    x, gamma, gate_up, _, _ = _arguments()
    y = fp8.linear(CURRENT, x, gate_up, {}, norm=(gamma, 1e-5))
    assert _off(y, np.einsum("btd,dif->btif", _cast(_norm(x, gamma), E4M3), _cast(gate_up, E4M3))) < 3e-3


def test_fp32_is_near():
    x, gamma, gate_up, down, g = _arguments()

    def exact(x, gamma, gate_up, down):
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gamma
        halves = jnp.einsum("btd,dif->btif", y, gate_up)
        return jnp.einsum("btf,fd->btd", jax.nn.silu(halves[:, :, 0]) * halves[:, :, 1], down)

    run = lambda x, gamma, a, b: fp8.mlp(CURRENT, x, (gamma, 1e-5), (a, b), ({}, {}))  # noqa: E731
    (y, back), (expected, expected_back) = (jax.vjp(f, x, gamma, gate_up, down) for f in (run, exact))
    assert _off(y, np.asarray(expected)) < 0.1
    for ours, theirs in zip(back(jnp.asarray(g)), expected_back(jnp.asarray(g)), strict=True):
        assert _off(ours, np.asarray(theirs)) < 0.15


# --- the state of delayed scaling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "margin"), [("max", 0), ("most_recent", 0), ("max", 2)])
def test_scales_follow_the_largest_values_of_past_steps(algorithm, margin):
    """Six steps of one layer: numpy keeps the last four largest values of each tensor."""
    recipe = dataclasses.replace(DELAYED, algorithm=algorithm, margin=margin, sites=("o",))
    states = fp8.initial_state(recipe, trained=True)
    seen = {"x": [], "kernel": [], "grad": []}
    scale = {"x": 1.0 / 2**margin, "kernel": 112.0 / 2**margin, "grad": 57344.0 / 2**margin}

    @jax.jit
    def step(x, kernel, states, g):
        def call(x, kernel, states):
            scales = jax.tree.map(lambda s: s[0], fp8.scales(recipe, states)["o"])
            return fp8.linear(recipe, x, kernel, scales)

        y, back = jax.vjp(call, x, kernel, states)
        return y, *back(g)

    for i, size in enumerate((1.0, 8.0, 2.0, 0.5, 0.0, 0.25)):
        x, kernel, g = size * _normal(i, B, T, D), _normal(50 + i, D, F), size * _normal(90 + i, B, T, F)
        y, dx, _, states = step(x, kernel, states, g)
        qx, qk = _cast(x, E4M3, scale["x"]), _cast(kernel, E4M3, scale["kernel"])
        if size:
            assert _off(y, qx @ qk) < 1e-6
            assert _off(dx, _cast(g, E5M2, scale["grad"]) @ qk.T) < 1e-6
        for tensor, value in (("x", x), ("kernel", kernel), ("grad", g)):
            seen[tensor].append(np.abs(value).max())
            top = max(seen[tensor][-4:]) if algorithm == "max" else seen[tensor][-1]
            if top > 0:
                scale[tensor] = TOP[E5M2 if tensor == "grad" else E4M3] / top / 2**margin
            meta = states["o"][tensor]
            np.testing.assert_allclose(meta["scale"], [scale[tensor]], rtol=1e-6)
            # The newest at the end, the free place for the next one first.
            np.testing.assert_array_equal(
                np.sort(np.asarray(meta["history"][0])), np.sort([*([0.0] * 4 + seen[tensor])[-3:], 0.0])
            )


@pytest.mark.parametrize("gradient", [E5M2, E4M3])
def test_the_first_step_has_gradients_as_small_as_those_of_a_mean_over_thousands_of_tokens(gradient):
    """And kernels as small as they are drawn: neither is below the smallest number of the first scale."""
    recipe = dataclasses.replace(DELAYED, gradient=gradient, sites=("o",))
    scales = jax.tree.map(lambda s: s[0], fp8.scales(recipe, fp8.initial_state(recipe, trained=True))["o"])
    x, kernel, g = _normal(1, B, T, D), 0.02 * _normal(2, D, F), 1e-6 * _normal(3, B, T, F)
    y, back = jax.vjp(lambda x, kernel: fp8.linear(recipe, x, kernel, scales), x, kernel)
    dx, dkernel = back(g)
    assert _off(y, x @ kernel) < 0.05
    assert _off(dx, g @ kernel.T) < 0.08
    assert _off(dkernel, np.einsum("btd,btf->df", x, g)) < 0.08


def test_a_history_of_one_and_non_finite_values():
    recipe = dataclasses.replace(DELAYED, history=1)
    meta = {"scale": jnp.array([3.0, 3.0, 3.0]), "history": jnp.zeros((3, 1))}
    new = fp8.updated(meta, jnp.array([7.0, jnp.inf, jnp.nan]), jnp.float8_e4m3fn, recipe)
    np.testing.assert_allclose(new["scale"], [64, 3, 3])
    np.testing.assert_array_equal(new["history"], np.zeros((3, 1)))


def test_what_has_a_state():
    assert fp8.initial_state(None, True) == fp8.initial_state(CURRENT, True) == {}
    recipe = dataclasses.replace(DELAYED, sites=SITES["mlp"], first=2, last=7)
    state = fp8.initial_state(recipe, trained=False)
    assert {site: set(tensors) for site, tensors in state.items()} == {"gate_up": {"x", "grad"}, "down": {"x", "grad"}}
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(5,), (5, 4)}
    assert set(fp8.initial_state(recipe, trained=True)["down"]) == {"x", "grad", "kernel"}


# --- recipes ---------------------------------------------------------------------------------------------------------


def _config(compute="fp8_delayed", freeze=True, **settings):
    model = ModelConfig(llm=LlmConfig(num_layers=8, freeze=freeze))
    return Config(model=model, precision=PrecisionConfig(compute=compute, fp8=Fp8Config(**settings)))


def test_scales_inside_the_product_change_its_rounding_alone(monkeypatch):
    """As on a GPU, where cublasLt undoes both scales: here the operands are rounded to bf16 once more."""
    x = fp8_xla.cast(jnp.asarray(_normal(0, 2, 16, 32), jnp.bfloat16), None, jnp.float8_e4m3fn)
    kernel = fp8_xla.cast(jnp.asarray(_normal(1, 48, 32), jnp.bfloat16), None, jnp.float8_e4m3fn)

    def product():
        run = jax.jit(lambda x, kernel: fp8_xla.product(x, kernel.values, kernel.inverse, 1, jnp.bfloat16, fast=True))
        return np.asarray(run(x, kernel), np.float32)

    expected = product()
    monkeypatch.setattr(jax, "devices", lambda: [_Gpu("9.0")])
    ours = product()
    assert not np.array_equal(ours, expected)
    assert np.linalg.norm(ours - expected) < 0.005 * np.linalg.norm(expected)


def test_a_recipe_follows_the_configuration():
    assert make_recipe(_config("bf16")) is None
    recipe = make_recipe(_config(format="e4m3", margin=1, layers="attention", first_layers_bf16=1, last_layers_bf16=2))
    assert recipe.delayed and recipe.stored and recipe.backend == "xla"
    assert (recipe.gradient, recipe.margin, recipe.history) == (jnp.float8_e4m3fn, 1, 1024)
    assert recipe.covers("qkv", "o") and not recipe.covers("down")
    assert (recipe.first, recipe.last) == (1, 6)
    assert not make_recipe(_config(freeze=False)).stored
    assert not make_recipe(_config(), quantize_frozen=False).stored
    assert not make_recipe(_config(quantize_frozen=False)).stored
    assert make_recipe(_config("fp8_current", margin=3)).margin == 0


def test_unrolled_frozen_layers_are_held_apart():
    frozen = dataclasses.replace(_config(first_layers_bf16=1), train=TrainConfig(unroll=7))
    recipe = make_recipe(frozen)
    assert recipe.apart
    layers = [(f"layers_{i}", (i, i + 1, recipe)) for i in range(1, 8)]
    assert list(stacks(recipe, 8).items()) == [("first_layers", (0, 1, None)), *layers]
    recipe = make_recipe(dataclasses.replace(frozen, train=TrainConfig(unroll=6)))
    assert list(stacks(recipe, 8).items()) == [("first_layers", (0, 1, None)), ("layers", (1, 8, recipe))]
    grouped = TrainConfig(unroll=7, remat="full", remat_layers=7)  # recomputed from one input for several layers
    assert not make_recipe(dataclasses.replace(frozen, train=grouped)).apart
    trained = make_recipe(dataclasses.replace(frozen, model=_config(freeze=False).model))
    assert not trained.apart and list(stacks(trained, 8)) == list(stacks(None, 8)) == ["layers"]


class _Gpu:
    platform, device_kind = "gpu", "NVIDIA GPU"

    def __init__(self, capability):
        self.compute_capability = capability


def test_transformer_engine_where_it_is_not(monkeypatch):
    with pytest.raises(
        UserError, match=r"precision\.fp8\.backend=te: Transformer Engine needs a GPU, here is cpu; use"
    ):
        make_recipe(_config(backend="te"))
    assert "xla backend (Transformer Engine needs a GPU, here is cpu)" in describe(_config(), 1, True)
    monkeypatch.setattr(jax, "devices", lambda: [_Gpu("9.0")])
    te.problem.cache_clear()
    with pytest.raises(UserError, match=r"Transformer Engine is not installed \(requirements-gpu.txt\)"):
        make_recipe(_config(backend="te"))
    monkeypatch.setattr(te, "version", lambda _: "2.9.0")
    te.problem.cache_clear()
    with pytest.raises(UserError, match=r"Transformer Engine 2\.9\.0 is too old, 2\.11 is needed"):
        make_recipe(_config(backend="te"))
    monkeypatch.setattr(te, "version", lambda _: "2.11.0")
    te.problem.cache_clear()
    with pytest.raises(UserError, match=r"2\.11\.0 cannot be imported \(ModuleNotFoundError"):
        make_recipe(_config(backend="te"))
    monkeypatch.setattr(te, "problem", lambda: None)
    assert make_recipe(_config()).backend == make_recipe(_config(backend="te")).backend == "te"
    assert make_recipe(_config(), devices=2).backend == "te"
    assert (
        make_recipe(_config("fp8_current"), devices=2).backend == make_recipe(_config(backend="xla")).backend == "xla"
    )
    with pytest.raises(UserError, match="by current scaling it serves one device, the mesh has 2"):
        make_recipe(_config("fp8_current", backend="te"), devices=2)
    narrow = dataclasses.replace(_config(backend="te").model.llm, intermediate_size=100)
    config = dataclasses.replace(_config(backend="te"), model=ModelConfig(llm=narrow))
    with pytest.raises(UserError, match="widths that 16 divides, not 4096, 100"):
        make_recipe(config)


def test_a_card_without_fp8(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [_Gpu("8.0")])
    with pytest.raises(
        UserError, match=r"precision\.compute=fp8_delayed needs .* 8\.9 .* not NVIDIA GPU \(8\.0\); use"
    ):
        make_recipe(_config())


def test_what_the_log_says():
    line = describe(_config(last_layers_bf16=1, layers="mlp"), 1, stored=True)
    assert line == (
        "fp8: xla backend (Transformer Engine needs a GPU, here is cpu), hybrid, delayed scaling (max of 1024 steps, "
        "margin 0), linear layers of the mlp of 7 of 8 layers, weights quantized once"
    )
    assert describe(_config("fp8_current", freeze=False), 1, False).endswith("weights trained")
    odd = dataclasses.replace(
        _config(), data=DataConfig(max_length=2418), train=TrainConfig(micro_batch=3, global_batch=3)
    )
    assert describe(odd, 1, True).endswith(
        "3 rows of 2418 tokens are no multiple of 16: data.max_length=2432 would be one"
    )
    short = TrainConfig(micro_batch=3, global_batch=3, constant_prefix=7)
    odd = dataclasses.replace(odd, train=short)
    assert describe(odd, 1, True).endswith(
        "3 rows of 2411 tokens are no multiple of 16: data.max_length=2423 would be one"
    )
    halves = dataclasses.replace(
        _config(),
        mesh=MeshConfig("tensor=2", overlap=True),
        data=DataConfig(max_length=808),
        train=TrainConfig(micro_batch=2, global_batch=2),
    )
    assert "because 1 rows of 808 tokens are no multiple of 16: data.max_length=816" in describe(halves, 2, True)
    assert "padded" not in describe(dataclasses.replace(halves, mesh=MeshConfig("tensor=2")), 2, True)


def test_weights_do_not_wait_for_activations(monkeypatch):
    """On GPUs, over fsdp: what ties both ties the gather of the weights to the activations."""
    monkeypatch.setattr(fp8_xla, "target_devices", lambda: [SimpleNamespace(platform="gpu")])

    def product(values, inverse, kernel, kernel_inverse):
        x = fp8_xla.Cast(values, inverse, jnp.float32(0))
        return fp8_xla.product(x, kernel, kernel_inverse, 1, jnp.bfloat16, True)

    x, kernel, one = jnp.zeros((B, T, D), E4M3), jnp.zeros((F, D), E4M3), jnp.float32(1)
    jaxpr = jax.make_jaxpr(product)(x, one, kernel, one).jaxpr
    names = dict(zip(jaxpr.invars, ("x", "x", "kernel", "kernel"), strict=True))
    sources = {var: {name} for var, name in names.items()}
    tied = []
    for equation in jaxpr.eqns:
        known = set().union(*(sources.get(var, set()) for var in equation.invars if isinstance(var, jex.core.Var)))
        sources |= dict.fromkeys(equation.outvars, known)
        if equation.primitive.name == "optimization_barrier":
            tied.append(known)
    assert tied == [{"x"}, {"kernel"}, {"x", "kernel"}]  # the last is the product itself
