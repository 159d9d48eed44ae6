"""Tokens of conversations -> the rows of a batch."""

import numpy as np

from neva_jax.data.encoding import Encoded
from neva_jax.data.rows import BadRow
from neva_jax.data.tiles import TEXT


def training_row(encoded: Encoded, max_length: int) -> dict[str, np.ndarray]:
    """Shifts by one and pads at the right to T = `max_length`.

    Returns:
      `tokens, targets, positions, segment_ids, image_slots` [T] i32 and `loss_weights` [T] f32. Position t predicts
      `targets[t]`, the token after `tokens[t]`; padding has weight 0, slot -1 and segment 0.

    Raises:
      BadRow: longer than T, or nothing is supervised.
    """
    length = len(encoded.tokens) - 1
    if length > max_length:
        images = int((encoded.slots != TEXT).sum())
        raise BadRow(f"has {length} tokens ({images} of images), but data.max_length is {max_length}")
    if not encoded.weights[1:].any():
        raise BadRow("has nothing to learn: its answers are empty")

    def padded(values: np.ndarray, fill: int) -> np.ndarray:
        return np.concatenate([values, np.full(max_length - length, fill, values.dtype)])

    return {
        "tokens": padded(encoded.tokens[:-1], 0),
        "targets": padded(encoded.tokens[1:], 0),
        "loss_weights": padded(encoded.weights[1:], 0),
        "positions": np.arange(max_length, dtype=np.int32),
        "segment_ids": padded(np.ones(length, np.int32), 0),
        "image_slots": padded(encoded.slots[:-1], TEXT),
    }
