"""Rows of a batch, against arrays written out by hand."""

import numpy as np
import pytest

from neva_jax.data.encoding import Encoded
from neva_jax.data.packing import training_row
from neva_jax.data.rows import BadRow


def example(weights=(0, 0, 0, 1, 1, 1)):
    return Encoded(
        np.array([1, 0, 0, 7, 8, 2], np.int32),
        np.array(weights, np.float32),
        np.array([-1, 0, 1, -1, -1, -1], np.int32),
    )


def test_a_training_row_is_shifted_by_one_and_padded():
    row = training_row(example(), 8)
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


def test_a_row_that_just_fits_has_no_padding():
    row = training_row(example(), 5)
    assert row["tokens"].tolist() == [1, 0, 0, 7, 8]
    assert row["targets"].tolist() == [0, 0, 7, 8, 2]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1]


def test_a_row_that_is_too_long_says_by_how_much():
    with pytest.raises(BadRow) as error:
        training_row(example(), 4)
    assert str(error.value) == "has 5 tokens (2 of images), but data.max_length is 4"


@pytest.mark.parametrize("weights", [(0, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0)])
def test_a_row_with_nothing_to_learn(weights):
    """The first token's weight does not count: nothing predicts it."""
    with pytest.raises(BadRow) as error:
        training_row(example(weights), 8)
    assert str(error.value) == "has nothing to learn: its answers are empty"
