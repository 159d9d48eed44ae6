"""Llama against Hugging Face's (tests/golden) and against formulas."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neva_jax.config import LlmConfig
from neva_jax.models.layers import NO_REMAT, Remat
from neva_jax.models.llama import Llama, empty_cache
from neva_jax.models.llama_layer import Block
from neva_jax.models.rotary import rotary_angles
from tests.models.helpers import (
    assert_gradients_close,
    graph,
    llm_config,
    llm_tree,
    load_golden,
    next_token_loss,
)

NAMES = (
    "llama_untied",
    "llama_tied",
    "llama_rope_llama3",
    "llama_rope_linear",
    "llama_rope_dynamic",
    "llama_biases",
    "mistral",
    "qwen2",
)


def _graph(config, remat=NO_REMAT, unroll=1):
    return graph(lambda: Llama(nnx.Rngs(0), config, jnp.float32, remat=remat, unroll=unroll))


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
    """(loss, logits, gradients) of our model on the golden inputs."""
    golden = load_golden(name)
    config = llm_config(golden.config)
    return _loss_and_gradients(golden, _graph(config), llm_tree(golden.weight, config))


def _real(golden):
    """[B, T] bool: not padding."""
    return golden.input.get("mask", np.ones_like(golden.input["tokens"])) == 1


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    golden = load_golden(name)
    loss, logits, _ = _ours(name)
    real = _real(golden)
    assert np.std(golden.output["logits"]) > 1  # 1e-4 is little
    np.testing.assert_allclose(logits[real], golden.output["logits"][real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, golden.output["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    """Every parameter of every layer within 1e-4 of its norm; none is 0."""
    golden = load_golden(name)
    expected = llm_tree(golden.grad, llm_config(golden.config))
    assert all(np.linalg.norm(leaf) > 0.01 for leaf in jax.tree.leaves(expected))
    assert_gradients_close(_ours(name)[2], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [
        (Remat("dots"), 2),
        (Remat("full", "uniform", 3), 1),
        (Remat("full", "block", 2), 2),
    ],
    ids=str,
)
def test_remat_and_unroll_change_nothing(remat, unroll):
    """Within 1e-5 for each parameter: only the order of sums may differ. 3 layers: 2 leaves a remainder."""
    golden = load_golden("llama_untied")
    config = llm_config(golden.config)
    _, plain_logits, plain_grads = _ours("llama_untied")
    _, logits, grads = _loss_and_gradients(golden, _graph(config, remat, unroll), llm_tree(golden.weight, config))
    np.testing.assert_allclose(logits, plain_logits, rtol=0, atol=1e-5)
    assert_gradients_close(grads, jax.tree.map(np.asarray, plain_grads), rtol=1e-5)


def test_rematerialisation_keeps_less():
    """What the backward pass needs: everything, the matrix products, each layer's input, or fewer layers' inputs."""
    golden = load_golden("llama_untied")
    config = llm_config(golden.config)
    params = llm_tree(golden.weight, config)

    def kept(*settings):
        graphdef = _graph(config, Remat(*settings))

        def forward(params):
            return jnp.sum(_logits(graphdef, params, golden.input["tokens"], _positions(golden), None))

        backward = jax.eval_shape(lambda params: jax.vjp(forward, params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    full = kept("full")
    assert kept("full", "uniform", 3) == full - 2 * 2 * 17 * 48  # two boundaries [B, T, D] fewer
    assert full < kept("dots") < kept("none")
    assert full == kept("full", "block", 3) < kept("full", "block", 2) < kept("full", "block", 1) < kept("none")


@pytest.mark.parametrize("name", ["llama_untied", "llama_tied"])
@pytest.mark.parametrize("multiple", [43, 64])
def test_padding_the_vocabulary(name, multiple):
    """Real logits stay (rounding aside); a padded id never wins, whatever stands in its rows."""
    golden = load_golden(name)
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
    np.testing.assert_allclose(logits[..., :43], _ours(name)[1], rtol=0, atol=1e-5)
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


def test_packed_rows_with_a_sliding_window():
    """Both rows of the Mistral file, without their padding, as two segments of one row: the same logits."""
    golden = load_golden("mistral")
    config = llm_config(golden.config)
    lengths = golden.input["mask"].sum(axis=1)
    assert min(lengths) > 2 * config.sliding_window
    tokens, expected = (
        np.concatenate([values[row, :length] for row, length in enumerate(lengths)])
        for values in (golden.input["tokens"], golden.output["logits"])
    )
    positions = np.concatenate([np.arange(length) for length in lengths])
    segments = np.repeat([1, 2], lengths)
    params = llm_tree(golden.weight, config)
    logits = _logits(_graph(config), params, tokens[None], positions[None], segments[None])
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4)


def test_the_window_matters():
    golden = load_golden("mistral")
    config = dataclasses.replace(llm_config(golden.config), sliding_window=None)
    params, real = llm_tree(golden.weight, config), _real(golden)
    logits = _logits(_graph(config), params, golden.input["tokens"], _positions(golden), None)
    error = np.abs(logits - golden.output["logits"])
    assert error[:, :5].max() < 1e-4
    assert np.all(error[:, 5:].max(axis=-1)[real[:, 5:]] > 1e-3)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("llama_untied", [9, 6]),
        ("llama_rope_llama3", [9, 6]),
        ("qwen2", [9, 6]),
        ("mistral", [9, 6]),
        ("mistral", [1, 1]),
    ],
    ids=str,
)
def test_a_cache_gives_the_same_logits(name, start):
    """Rows prefilled with some tokens (more than the window), then token by token, each row at its own slot."""
    golden = load_golden(name)
    config = llm_config(golden.config)
    tokens, expected = golden.input["tokens"], golden.output["logits"]
    params = llm_tree(golden.weight, config)
    graphdef = _graph(config)

    @jax.jit
    def run(cache, tokens, positions):
        model = nnx.merge(graphdef, params)
        hidden, cache = model(model.embed(tokens), positions, cache=cache)
        return model.logits(hidden), cache

    lengths, longest = np.array(start), max(start)
    # 7: junk that a later token overwrites
    prompt = np.where(np.arange(longest) < lengths[:, None], tokens[:, :longest], 7)
    cache = empty_cache(config, 2, 20, jnp.float32)
    assert cache.k.shape == (config.num_layers, 2, 20, 2, config.head_dim or 12)
    logits, cache = run(cache, prompt, np.broadcast_to(np.arange(longest), (2, longest)))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], rtol=0, atol=1e-4)
    for step in range(13 - min(start)):  # row 1 has 13 tokens
        at = lengths + step
        logits, cache = run(cache, tokens[np.arange(2), at][:, None], at[:, None])
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(2), at], rtol=0, atol=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
def test_scaled_output_projections_start_smaller(scaled):
    """Standard deviation of o and down: init_std / sqrt(2 L) = 0.05, or init_std as all others; biases 0."""
    config = LlmConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_layers=8,
        num_heads=4,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        init_std=0.2,
        scaled_output_init=scaled,
    )
    params = nnx.to_pure_dict(nnx.state(Llama(nnx.Rngs(3), config, jnp.float32)))
    for name, leaf in nnx.traversals.flatten_mapping(params).items():
        if name[-1].endswith("_bias"):
            assert np.all(leaf == 0)
        elif name[-1] != "scale":
            std = 0.05 if scaled and name[-1] in ("o", "down") else 0.2
            np.testing.assert_allclose(np.std(leaf), std, rtol=0.1, err_msg=str(name))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_logits_are_fp32_and_their_gradient_is_rounded_as_that_of_other_products(dtype):
    """Two copies of the head, each for rows of its own."""
    draw = np.random.default_rng(6)
    hidden, heads = (jnp.asarray(draw.standard_normal(shape), dtype) for shape in ((2, 5, 24), (2, 24, 9)))
    g = jnp.asarray(draw.standard_normal((2, 5, 9)), jnp.float32)
    config = LlmConfig(vocab_size=9, hidden_size=24, num_layers=1, num_heads=2, head_dim=12, intermediate_size=8)
    model = Llama(nnx.Rngs(0), config, dtype)
    logits, back = jax.vjp(model.logits, hidden, heads)
    assert logits.dtype == jnp.float32
    exact = [np.asarray(x, np.float64) for x in (hidden, heads, g.astype(dtype))]
    np.testing.assert_allclose(logits, exact[0] @ exact[1], rtol=0, atol=2e-5)
    expected = exact[2] @ exact[1].swapaxes(1, 2), exact[0].swapaxes(1, 2) @ exact[2]
    for ours, theirs in zip(back(g), expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=float(jnp.finfo(dtype).eps), atol=2e-5)


# --- dropout ---------------------------------------------------------------------------------------------------------

ALL = 1 - 1e-7  # zeroes everything, with this key
TINY = LlmConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2, init_std=0.2
)


def _tiny(remat=NO_REMAT, unroll=1, **rates):
    return Llama(nnx.Rngs(0), dataclasses.replace(TINY, **rates), jnp.float32, remat=remat, unroll=unroll)


def _hidden(model, seed=0):
    """[2, 6, D] of random embeddings, with dropout by the key `seed`; None: without."""
    x, positions = _inputs()
    return x, _run(model, x, positions, None if seed is None else jax.random.key(seed))


def _inputs():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 32)), jnp.float32)
    return x, jnp.broadcast_to(jnp.arange(6), (2, 6))


@nnx.jit
def _run(model, x, positions, rng):
    return model(x, positions, rng=rng)[0]


def test_hidden_dropout_is_after_the_embedding_and_on_both_branches():
    assert not np.any(_hidden(_tiny(hidden_dropout=ALL))[1])
    block = Block(nnx.Rngs(0), dataclasses.replace(TINY, hidden_dropout=ALL, mlp_bias=True))
    block.down_bias[...] = jnp.ones(32)  # the bias belongs to the branch
    x, angles = _hidden(_tiny())[0], rotary_angles(jnp.broadcast_to(jnp.arange(6), (2, 6)), TINY)
    np.testing.assert_array_equal(block.with_attention(x, None, angles, rng=jax.random.key(0))[0], x)
    np.testing.assert_array_equal(block.with_mlp(x, jax.random.key(0)), x)


@pytest.mark.parametrize(("rate", "silenced"), [("attention_dropout", "o"), ("ffn_dropout", "down")])
def test_other_dropouts_silence_their_branch(rate, silenced):
    model, without = _tiny(**{rate: ALL}), _tiny()
    kernel = getattr(without.layers, silenced)
    kernel[...] = jnp.zeros_like(kernel[...])
    dropped = _hidden(model)[1]
    np.testing.assert_allclose(dropped, _hidden(without, None)[1], rtol=0, atol=1e-5)
    assert np.any(np.abs(dropped - _hidden(_tiny(), None)[1]) > 0.1)


RATES = {"hidden_dropout": 0.2, "attention_dropout": 0.3, "ffn_dropout": 0.1}


@pytest.mark.parametrize("rate", RATES)
def test_each_layer_and_key_drops_out_otherwise(rate):
    """Equal layers: with the same masks in all of them, a layer's output would depend on its input alone."""
    model = _tiny(**{rate: 0.5})
    drawn = [np.asarray(_hidden(model, seed)[1]) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.any(drawn[0] != drawn[2])
    np.testing.assert_array_equal(_hidden(model, None)[1], _hidden(_tiny(), None)[1])
    seen = []
    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(jax.random, "bernoulli", lambda rng, p, shape: seen.append(rng) or jnp.ones(shape, bool))
        patch.setattr("neva_jax.models.llama.scan_layers", _by_hand)
        model(*_inputs(), rng=jax.random.key(0))
    keys = {tuple(np.asarray(jax.random.key_data(rng))) for rng in seen}
    assert len(keys) == len(seen) == {"hidden_dropout": 9, "attention_dropout": 4, "ffn_dropout": 4}[rate]


def _by_hand(stack, x, *, per_layer, call, **_):
    graphdef, parameters = nnx.split(stack)
    for layer in range(TINY.num_layers):
        own_parameters, own = jax.tree.map(lambda a, layer=layer: a[layer], (parameters, per_layer))
        x, _ = call(nnx.merge(graphdef, own_parameters), x, own)
    return x, None


def _dropped_loss_and_gradients(remat, unroll):
    graphdef, params = nnx.split(_tiny(remat, unroll, **RATES))
    return jax.jit(jax.value_and_grad(lambda params: jnp.sum(_hidden(nnx.merge(graphdef, params))[1] ** 3)))(params)


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [(Remat("full"), 1), (Remat("dots"), 2), (Remat("full", "uniform", 2), 1), (Remat("full", "block", 3), 1)],
    ids=str,
)
def test_what_is_recomputed_drops_out_as_before(remat, unroll):
    loss, grads = _dropped_loss_and_gradients(NO_REMAT, 1)
    other_loss, other_grads = _dropped_loss_and_gradients(remat, unroll)
    assert float(other_loss) == pytest.approx(float(loss), rel=1e-6)
    assert_gradients_close(
        *(nnx.to_pure_dict(jax.tree.map(np.asarray, tree)) for tree in (other_grads, grads)), rtol=1e-5
    )
