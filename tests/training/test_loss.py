"""weighted_nll against the formula written out in float64 over all positions, and what it never computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neva_jax.config import LlmConfig
from neva_jax.models.llama import Llama
from neva_jax.training.loss import weighted_nll

B, T, D, V = 4, 11, 6, 13


def brute_force(hidden, kernel, targets, weights):
    """(sum of weight * -log softmax, its gradients for hidden and kernel), all in float64."""
    hidden, kernel = hidden.astype(np.float64), kernel.astype(np.float64)
    scores = hidden @ kernel
    scores -= scores.max(axis=-1, keepdims=True)
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    picked = np.take_along_axis(probabilities, targets[..., None], axis=-1)[..., 0]
    one_hot = np.eye(kernel.shape[1])[targets]
    grad_scores = weights[..., None] * (probabilities - one_hot)
    grad_kernel = np.einsum("btd,btv->dv", hidden, grad_scores)
    return -(weights * np.log(picked)).sum(), grad_scores @ kernel.T, grad_kernel


def logits_of(hidden, kernel):
    return jnp.einsum("rbcd,rdv->rbcv", hidden, kernel)


@partial(jax.jit, static_argnames="chunk")
def loss_and_gradients(hidden, kernel, targets, weights, chunk):
    def loss(hidden, kernel):
        return weighted_nll(logits_of, kernel, hidden, targets, weights, chunk)

    total, (grad_hidden, grad_kernel) = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)
    return total, grad_hidden, grad_kernel


def random_inputs(seed=0):
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(B, T, D)).astype(np.float32)
    kernel = draw.normal(size=(D, V)).astype(np.float32)
    return hidden, kernel, draw.integers(0, V, (B, T)).astype(np.int32)


def random_fractions():
    draw = np.random.default_rng(1)
    return (draw.random((B, T)) * (draw.random((B, T)) < 0.6)).astype(np.float32)


def zeros_and_ones():
    return (np.random.default_rng(2).random((B, T)) < 0.4).astype(np.float32)


def rows_without_labels():
    weights = random_fractions()
    weights[[0, 2]] = 0
    return weights


def answers_at_the_end():
    weights = np.zeros((B, T), np.float32)
    weights[:, -3:] = 1
    return weights


def one_label():
    weights = np.zeros((B, T), np.float32)
    weights[2, 7] = 0.25
    return weights


def every_position():
    return np.full((B, T), 0.5, np.float32)


WEIGHTS = [random_fractions, zeros_and_ones, rows_without_labels, answers_at_the_end, one_label, every_position]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("chunk", [1, 3, 4, T, T + 1, 512])
def test_value_and_gradients_against_the_formula(chunk, weights):
    hidden, kernel, targets = random_inputs()
    expected = brute_force(hidden, kernel, targets, weights())
    assert expected[0] > 0.1
    for ours, theirs in zip(loss_and_gradients(hidden, kernel, targets, weights(), chunk=chunk), expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, T, 512])
def test_without_any_label_loss_and_gradients_are_zero(chunk):
    hidden, kernel, targets = random_inputs()
    for value in loss_and_gradients(hidden, kernel, targets, np.zeros((B, T), np.float32), chunk=chunk):
        np.testing.assert_array_equal(value, 0)


def test_a_position_without_weight_is_not_read():
    hidden, kernel, targets = random_inputs()
    other_hidden, _, other_targets = random_inputs(seed=5)
    weights = zeros_and_ones()
    unlabelled = weights == 0
    changed_hidden = np.where(unlabelled[..., None], other_hidden, hidden)
    changed_targets = np.where(unlabelled, other_targets, targets)
    before = loss_and_gradients(hidden, kernel, targets, weights, chunk=3)
    after = loss_and_gradients(changed_hidden, kernel, changed_targets, weights, chunk=3)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_extreme_logits_give_no_nan():
    """Scores of +-1e4 overflow a softmax that does not subtract the maximum."""
    hidden, kernel, targets = random_inputs()
    weights = zeros_and_ones()
    values = loss_and_gradients(hidden * 1e4, kernel, targets, weights, chunk=4)
    assert all(np.all(np.isfinite(value)) for value in values)
    scores = (hidden * 1e4).astype(np.float64) @ kernel.astype(np.float64)
    picked = np.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    # At this scale the log of the sum is the largest score.
    np.testing.assert_allclose(values[0], ((scores.max(axis=-1) - picked) * weights).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "chunk", "computed"),
    [
        ((0, 0, 0, 0), 2, 0),
        ((1, 0, 0, 0), 2, 1),
        ((2, 2, 1, 0), 2, 1),
        ((3, 1, 1, 1), 2, 2),
        ((11, 0, 0, 0), 2, 6),
        ((4, 4, 4, 4), 11, 1),
    ],
)
def test_only_chunks_with_labels_are_computed(labels, chunk, computed):
    """As many chunks as the row with the most labels fills, wherever its labels stand."""
    hidden, kernel, targets = random_inputs()
    weights = np.zeros((B, T), np.float32)
    for row, count in enumerate(labels):
        weights[row, np.random.default_rng(row).permutation(T)[:count]] = 1
    calls = []

    def logits(chunk_hidden, kernel):
        jax.debug.callback(lambda: calls.append(chunk_hidden.shape))
        return logits_of(chunk_hidden, kernel)

    jax.block_until_ready(jax.jit(lambda h: weighted_nll(logits, kernel, h, targets, weights, chunk))(hidden))
    jax.effects_barrier()
    assert calls == [(1, B, chunk, D)] * computed


def test_logits_of_all_positions_never_exist():
    """Neither forward nor backward holds an array with a value for each position and token id."""
    hidden, kernel, targets = random_inputs()
    arguments = (hidden, kernel, targets, random_fractions())
    chunked, whole = (str(jax.make_jaxpr(partial(loss_and_gradients, chunk=chunk))(*arguments)) for chunk in (3, T))
    assert f"[1,{B},{T},{V}]" in whole
    assert f"[1,{B},3,{V}]" in chunked
    for shape in (f"{B},{T},{V}", f"{B},12,{V}", f"4,1,{B},3,{V}"):  # whole, padded, chunks stacked
        assert f"{shape}]" not in chunked


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [2, 512])
def test_padded_vocabulary_ids_never_contribute(tied, chunk):
    """Vocabulary 13 in 16 rows: the formula over 13 ids, whatever the rows 13 ... 15 hold, and no gradient for them."""
    config = LlmConfig(
        vocab_size=V,
        vocab_multiple=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        tie_embeddings=tied,
    )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(nnx.Rngs(0), config, jnp.float32, "xla", "none", 1)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), nnx.to_pure_dict(state))
    name = "embedding" if tied else "head"
    assert params[name].shape == ((16, 8) if tied else (8, 16))
    draw = np.random.default_rng(3)
    kernel = draw.normal(size=(8, 16)).astype(np.float32)
    kernel[:, V:] = 100  # would win everywhere
    hidden = draw.normal(size=(B, T, 8)).astype(np.float32)
    targets = draw.integers(0, V, (B, T)).astype(np.int32)
    weights = random_fractions()

    @jax.jit
    def run(hidden, kernel):
        def loss(hidden, kernel):
            model = nnx.merge(graphdef, {**params, name: kernel.T if tied else kernel})
            return weighted_nll(model.logits, model.output_kernel(), hidden, targets, weights, chunk)

        total, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)
        return total, *grads

    total, grad_hidden, grad_kernel = run(hidden, kernel)
    expected = brute_force(hidden, kernel[:, :V], targets, weights)
    np.testing.assert_allclose(total, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grad_hidden, expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_kernel[:, :V], expected[2], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(grad_kernel[:, V:], 0)
