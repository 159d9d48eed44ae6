"""Rows of a batch, against arrays written out by hand; what shares a row, against the limits and the best there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neva_jax.data.encoding import Encoded
from neva_jax.data.packing import pack, training_row


def encoded(tokens, weights, slots):
    return Encoded(np.array(tokens, np.int32), np.array(weights, np.float32), np.array(slots, np.int32))


IMAGE = encoded([1, 0, 0, 7, 8, 2], [0, 0, 0, 1, 1, 1], [-1, 0, 1, -1, -1, -1])
TEXT = encoded([1, 5, 6, 2], [0, 0, 0.5, 1], [-1, -1, -1, -1])
TILES = encoded([1, 0, 0, 0, 9, 2], [0, 0, 0, 0, 1, 1], [-1, 0, -2, 3, -1, -1])  # two tiles of 2, a newline


def test_one_sample_is_shifted_by_one_and_padded():
    row = training_row([IMAGE], [2], 8)
    assert {name: values.tolist() for name, values in row.items()} == {
        "tokens": [1, 0, 0, 7, 8, 0, 0, 0],
        "targets": [0, 0, 7, 8, 2, 0, 0, 0],
        "loss_weights": [0, 0, 1, 1, 1, 0, 0, 0],
        "positions": [0, 1, 2, 3, 4, 5, 6, 7],
        "segment_ids": [1, 1, 1, 1, 1, 0, 0, 0],
        "image_slots": [-1, 0, 1, -1, -1, -1, -1, -1],
    }
    assert {name: values.dtype for name, values in row.items()} == {
        **dict.fromkeys(["tokens", "targets", "positions", "segment_ids", "image_slots"], np.int32),
        "loss_weights": np.float32,
    }


def test_samples_stand_one_after_another():
    """Positions begin anew, slots go on, a newline stays one, and no target reaches into the next sample."""
    row = training_row([IMAGE, TEXT, TILES], [2, 0, 4], 16)
    assert {name: values.tolist() for name, values in row.items()} == {
        "tokens": [1, 0, 0, 7, 8, 1, 5, 6, 1, 0, 0, 0, 9, 0, 0, 0],
        "targets": [0, 0, 7, 8, 2, 5, 6, 2, 0, 0, 0, 9, 2, 0, 0, 0],
        "loss_weights": [0, 0, 1, 1, 1, 0, 0.5, 1, 0, 0, 0, 1, 1, 0, 0, 0],
        "positions": [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7],
        "segment_ids": [1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 0, 0, 0],
        "image_slots": [-1, 0, 1, -1, -1, -1, -1, -1, -1, 2, -2, 5, -1, -1, -1, -1],
    }


def test_a_row_that_just_fits_has_no_padding():
    row = training_row([IMAGE, TEXT], [2, 0], 8)
    assert row["tokens"].tolist() == [1, 0, 0, 7, 8, 1, 5, 6]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2]


# --- what shares a row -----------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    length, tiles = draw(st.integers(1, 40)), draw(st.integers(0, 6))
    samples = draw(st.lists(st.tuples(st.integers(1, length), st.integers(0, tiles)), max_size=80))
    return np.array(samples, np.int64).reshape(-1, 2).T, length, tiles, draw(st.integers(1, 8))


@settings(deadline=None, max_examples=400)
@given(problems())
def test_every_sample_has_one_row_and_no_row_has_too_much(problem):
    (tokens, tiles), length, most_tiles, segments = problem
    rows = pack(tokens, tiles, length, most_tiles, segments)
    assert rows.shape == tokens.shape
    if not len(rows):
        return
    assert sorted(set(rows.tolist())) == list(range(rows.max() + 1))
    assert np.bincount(rows, tokens).max() <= length
    assert np.bincount(rows, tiles).max() <= most_tiles
    assert np.bincount(rows).max() <= segments
    np.testing.assert_array_equal(rows, pack(tokens, tiles, length, most_tiles, segments))


@settings(deadline=None, max_examples=200)
@given(problems())
def test_no_sample_stays_outside_that_fits_into_the_row_before(problem):
    """A row is closed only when nothing that comes after it fits any more."""
    (tokens, tiles), length, most_tiles, segments = problem
    rows = pack(tokens, tiles, length, most_tiles, segments)
    for row in range(rows.max(initial=-1) + 1):
        here, later = rows == row, rows > row
        if here.sum() < segments and later.any():
            space, room = length - tokens[here].sum(), most_tiles - tiles[here].sum()
            assert not ((tokens[later] <= space) & (tiles[later] <= room)).any()


def test_first_is_the_first_of_the_order_and_then_what_fills_exactly():
    tokens = np.array([6, 3, 5, 4, 1, 9])
    assert pack(tokens, np.zeros(6, int), 10, 0, 4).tolist() == [0, 1, 1, 0, 1, 2]


def test_a_row_without_room_for_tiles_takes_text():
    tokens, tiles = np.array([5, 5, 3, 3]), np.array([1, 1, 0, 0])
    assert pack(tokens, tiles, 10, 1, 4).tolist() == [0, 1, 0, 1]


def llava_mix(count):
    """Lengths as in LLaVA 1.5's finetuning: conversations, short answers, several rounds, and text alone."""
    draw = np.random.default_rng(0)
    kind = draw.choice(5, count, p=[0.24, 0.42, 0.2, 0.08, 0.06])
    median = np.array([260, 110, 320, 90, 900])[kind]
    spread = np.array([0.45, 0.4, 0.5, 0.3, 0.7])[kind]
    text = np.maximum(20, median * np.exp(spread * draw.standard_normal(count))).astype(int)
    image = (kind != 4).astype(int)
    return np.minimum(text + 576 * image, 2048), image


@pytest.mark.parametrize(("length", "images"), [(4096, 8), (8192, 16)])
def test_nearly_all_positions_are_useful(length, images):
    tokens, tiles = llava_mix(100_000)
    rows = pack(tokens, tiles, length, images, 16)
    assert tokens.sum() / (length * (rows.max() + 1)) > 0.985


@pytest.mark.parametrize(("tokens", "tiles"), [([0], [0]), ([11], [0]), ([5], [3])])
def test_a_sample_that_fits_into_no_row_is_refused(tokens, tiles):
    with pytest.raises(ValueError, match="does not fit into a row of 10 tokens and 2 tiles"):
        pack(np.array(tokens), np.array(tiles), 10, 2, 4)
