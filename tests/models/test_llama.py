"""Llama against Hugging Face's (tests/golden) and against formulas."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neva_jax.models.llama import Llama, empty_cache, rotary_angles, rotate
from tests.models.helpers import (
    Golden,
    assert_gradients_close,
    graph,
    llm_config,
    llm_tree,
    load_golden,
    next_token_loss,
)

NAMES = ("untied", "tied")


@pytest.fixture(scope="module", params=NAMES)
def golden(request) -> Golden:
    return load_golden(f"llama_{request.param}")


def _graph(config, remat="none", unroll=1):
    return graph(lambda: Llama(nnx.Rngs(0), config, jnp.float32, "xla", remat, unroll))


def _positions(golden):
    tokens = golden.input["tokens"]
    return golden.input.get("positions", np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens, positions, segment_ids):
    model = nnx.merge(graphdef, params)
    return model.logits(model(model.embed(tokens), positions, segment_ids)[0])


def _loss_and_gradients(golden, graphdef, params):
    @jax.jit
    def run(params):
        def loss(params):
            logits = _logits(
                graphdef, params, golden.input["tokens"], _positions(golden), golden.input.get("segment_ids")
            )
            return next_token_loss(logits, golden.input["labels"]), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), grads = run(params)
    return loss, logits, grads


@cache
def _ours(name):
    golden = load_golden(f"llama_{name}")
    config = llm_config(golden.config)
    return _loss_and_gradients(golden, _graph(config), llm_tree(golden.weight, config))


@pytest.fixture
def ours(golden):
    """(loss, logits, gradients) of our model on the golden inputs."""
    return _ours("tied" if golden.config["tie_word_embeddings"] else "untied")


def _real(golden):
    """[B, T] bool: not padding."""
    return golden.input.get("mask", np.ones_like(golden.input["tokens"])) == 1


def test_logits(golden, ours):
    loss, logits, _ = ours
    real = _real(golden)
    assert np.std(golden.output["logits"]) > 1  # 1e-4 is little
    np.testing.assert_allclose(logits[real], golden.output["logits"][real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, golden.output["loss"], rtol=1e-5)


def test_gradients(golden, ours):
    """Every parameter of every layer within 1e-4 of its norm; none is 0."""
    expected = llm_tree(golden.grad, llm_config(golden.config))
    assert all(np.linalg.norm(leaf) > 0.01 for leaf in jax.tree.leaves(expected))
    assert_gradients_close(ours[2], expected, rtol=1e-4)


@pytest.mark.parametrize(("remat", "unroll"), [("dots", 1), ("full", 1), ("none", 2), ("full", 2)])
def test_remat_and_unroll_change_nothing(remat, unroll):
    """Within 1e-5 for each parameter: only the order of sums may differ. 3 layers: unroll 2 leaves a remainder."""
    golden = load_golden("llama_untied")
    config = llm_config(golden.config)
    _, plain_logits, plain_grads = _ours("untied")
    _, logits, grads = _loss_and_gradients(golden, _graph(config, remat, unroll), llm_tree(golden.weight, config))
    np.testing.assert_allclose(logits, plain_logits, rtol=0, atol=1e-5)
    assert_gradients_close(grads, jax.tree.map(np.asarray, plain_grads), rtol=1e-5)


def test_rematerialisation_keeps_less():
    """What the backward pass needs of a layer: everything, the matrix products, or the layer's input alone."""
    golden = load_golden("llama_untied")
    config = llm_config(golden.config)
    params = llm_tree(golden.weight, config)
    sizes = {}
    for remat in ("none", "dots", "full"):
        graphdef = _graph(config, remat)

        def forward(params, graphdef=graphdef):
            return jnp.sum(_logits(graphdef, params, golden.input["tokens"], _positions(golden), None))

        backward = jax.eval_shape(lambda params, forward=forward: jax.vjp(forward, params)[1], params)
        sizes[remat] = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert sizes["full"] < sizes["dots"] < sizes["none"]


@pytest.mark.parametrize("multiple", [43, 64])
def test_padding_the_vocabulary(golden, ours, multiple):
    """Real logits stay (rounding aside); a padded id never wins, whatever stands in its rows."""
    config = dataclasses.replace(llm_config(golden.config), vocab_multiple=multiple)
    params = llm_tree(golden.weight, config)
    extra = -(-43 // multiple) * multiple - 43
    params["embedding"] = np.pad(params["embedding"], ((0, extra), (0, 0)), constant_values=50)
    if "head" in params:
        params["head"] = np.pad(params["head"], ((0, 0), (0, extra)), constant_values=50)
    logits = _logits(
        _graph(config), params, golden.input["tokens"], _positions(golden), golden.input.get("segment_ids")
    )
    assert logits.shape[-1] == 43 + extra
    np.testing.assert_allclose(logits[..., :43], ours[1], rtol=0, atol=1e-5)
    assert np.all(np.argmax(logits, -1) < 43)
    assert np.all(np.isfinite(logits))
    assert np.all(jax.nn.softmax(logits)[..., 43:] == 0)


def test_packed_rows_need_their_segments():
    """The tied golden file is packed: without segment ids its logits are others."""
    golden = load_golden("llama_tied")
    config = llm_config(golden.config)
    params = llm_tree(golden.weight, config)
    logits = _logits(_graph(config), params, golden.input["tokens"], _positions(golden), None)
    first = golden.input["segment_ids"] == 1
    np.testing.assert_allclose(logits[first], golden.output["logits"][first], rtol=0, atol=1e-4)
    assert np.abs(logits - golden.output["logits"])[~first].max() > 0.1


def test_a_cache_gives_the_same_logits():
    """Rows prefilled with 9 and 6 tokens, then token by token, each row at its own slot."""
    golden = load_golden("llama_untied")
    config = llm_config(golden.config)
    tokens, expected = golden.input["tokens"], golden.output["logits"]
    params = llm_tree(golden.weight, config)
    graphdef = _graph(config)

    @jax.jit
    def run(cache, tokens, positions):
        model = nnx.merge(graphdef, params)
        hidden, cache = model(model.embed(tokens), positions, cache=cache)
        return model.logits(hidden), cache

    lengths = np.array([9, 6])
    prompt = np.where(np.arange(9) < lengths[:, None], tokens[:, :9], 7)  # 7: junk that a later token overwrites
    cache = empty_cache(config, 2, 20, jnp.float32)
    assert cache.k.shape == (3, 2, 20, 2, 12)
    logits, cache = run(cache, prompt, np.broadcast_to(np.arange(9), (2, 9)))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], rtol=0, atol=1e-4)
    for step in range(7):
        at = lengths + step
        logits, cache = run(cache, tokens[np.arange(2), at][:, None], at[:, None])
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(2), at], rtol=0, atol=1e-4)


# --- rotary embedding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "farthest", "atol"), [(10000.0, 60, 1e-5), (150.0, 60, 1e-5), (10000.0, 4096, 2e-3)])
def test_rotary_embedding_is_a_complex_rotation(base, farthest, atol):
    """(x[i], x[i + K/2]) as one complex number times exp(i * position * base^(-2i/K)).

    The angle at position p is rounded to fp32: an error of about p * 2^-23 radians.
    """
    draw = np.random.default_rng(4)
    width = 12
    x = draw.standard_normal((2, 5, 3, width)).astype(np.float32)
    positions = draw.integers(0, farthest, (2, 5))
    positions[0, 0] = 0
    turned = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * np.exp(
        1j * positions[:, :, None, None] * base ** (-2 * np.arange(width // 2) / width)
    )
    out = rotate(jnp.asarray(x), *rotary_angles(jnp.asarray(positions), width, base))
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=atol)
    np.testing.assert_array_equal(out[0, 0], x[0, 0])  # position 0 stays


def test_rotary_embedding_in_bf16_rounds_once():
    """Angles and products are fp32: bf16 angles would be off by whole radians at position 1000."""
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, 4, 2, 8)), jnp.bfloat16)
    angles = rotary_angles(jnp.array([[0, 1, 999, 1000]]), 8, 10000.0)
    assert [a.dtype for a in angles] == [jnp.float32] * 2
    out = rotate(x, *angles)
    assert out.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), *angles)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8)
