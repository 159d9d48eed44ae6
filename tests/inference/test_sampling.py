"""sample() against numpy: the argmax, the nucleus of each row, and the frequencies that the softmax gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neva_jax.inference.sampling import sample

SEEDS = 20_000
LOGITS = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32) * 1.5


@partial(jax.jit, static_argnames="seeds")
def draws(logits, temperature, top_p, seeds=SEEDS):
    """Tokens [seeds, B], each row of them drawn with another key."""
    keys = jax.random.split(jax.random.key(7), seeds)
    return jax.vmap(lambda key: sample(logits, key, temperature, top_p))(keys)


def softmax(logits, temperature=1.0):
    scores = np.exp((logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)) / temperature)
    return scores / scores.sum(axis=-1, keepdims=True)


def nucleus(probabilities, top_p):
    """The smallest set of the likeliest tokens whose probabilities reach `top_p`, found token by token."""
    kept, reached = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        kept.add(token)
        reached += probabilities[token]
        if reached >= top_p:
            break
    return kept


def assert_frequencies(tokens, expected):
    """tokens [N] occur as `expected` [V] says, within 5 standard deviations of a count."""
    counts = np.bincount(tokens, minlength=len(expected))
    deviation = np.sqrt(len(tokens) * expected * (1 - expected))
    np.testing.assert_array_less(np.abs(counts - len(tokens) * expected), 5 * deviation + 1e-9)


@pytest.mark.parametrize("top_p", [1e-3, 0.5, 1.0])
def test_temperature_zero_takes_the_likeliest_token(top_p):
    for seed in range(3):
        tokens = sample(LOGITS, jax.random.key(seed), 0.0, top_p)
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, LOGITS.argmax(axis=-1))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_are_the_softmax_at_that_temperature(temperature):
    tokens = np.asarray(draws(LOGITS, temperature, 1.0))
    for row, expected in enumerate(softmax(LOGITS, temperature)):
        assert_frequencies(tokens[:, row], expected)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.62, 0.9, 0.97])
def test_drawn_from_the_nucleus_and_from_all_of_it(top_p, temperature):
    """The temperature comes before the nucleus, as in HF; what is kept keeps its proportions."""
    tokens = np.asarray(draws(LOGITS, temperature, top_p))
    for row, probabilities in enumerate(softmax(LOGITS, temperature)):
        kept = nucleus(probabilities, top_p)
        expected = np.array([p if token in kept else 0 for token, p in enumerate(probabilities)])
        expected /= expected.sum()
        assert expected[list(kept)].min() * SEEDS > 30  # or a kept token might never be drawn
        assert set(tokens[:, row]) == kept
        assert_frequencies(tokens[:, row], expected)


@pytest.mark.parametrize(("top_p", "kept"), [(0.499, {1}), (0.501, {1, 3}), (0.749, {1, 3}), (0.751, {0, 1, 3})])
def test_the_token_that_crosses_the_bound_is_kept(top_p, kept):
    logits = np.log(np.array([[0.1875, 0.5, 0.0625, 0.25]], np.float32))
    assert set(np.asarray(draws(logits, 1.0, top_p))[:, 0]) == kept


def test_extreme_logits_and_padded_ids():
    """Ids past the vocabulary have a logit near the least fp32 number; they are never drawn, at any temperature."""
    logits = np.array([[3e4, 3e4, -3e4, -2.4e38], [0, 0, 0, -2.4e38]], np.float32)
    for temperature in (0.01, 1.0, 100.0):
        tokens = np.asarray(draws(logits, temperature, 1.0, seeds=2000))
        assert set(tokens[:, 0]) == {0, 1}
        assert set(tokens[:, 1]) == {0, 1, 2}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.5, 0.8)])
def test_a_row_gets_the_same_token_whatever_rows_are_beside_it(temperature, top_p):
    draw = np.random.default_rng(3)
    seen = set()
    for seed in range(8):
        key = jax.random.key(seed)
        alone = int(sample(LOGITS[2:3], key, temperature, top_p)[0])
        for place in (0, 2):
            beside = draw.normal(size=(3, LOGITS.shape[1])).astype(np.float32) * 5
            beside[place] = LOGITS[2]
            assert int(sample(beside, key, temperature, top_p)[place]) == alone
        seen.add(alone)
    assert len(seen) > 1
