"""Samples -> the rows of a batch, and which samples share a row.

Two samples of 5 and 3 tokens in one row of T = 10 (P = 2 tokens per image; the first has an image of one tile):

    tokens      <s>  ·  · It 's | <s> Hi you |  .  .        what a sample ends with is a target only
    targets      ·   · It 's </s>| Hi you </s>| .  .
    segment_ids  1   1  1  1  1 |  2  2  2   |  0  0        0 is padding
    positions    0   1  2  3  4 |  0  1  2   |  3  4
    image_slots -1   0  1 -1 -1 | -1 -1 -1   | -1 -1        the next image of the row would begin at slot 2

`pack` decides what shares a row. All lengths are known beforehand and are small integers, so "the longest sample that
still fits" is one look at a bit set (bit T - n says that a sample of n tokens is left) instead of a search:

    1. the first sample of the epoch's order that has no row yet opens one
    2. if one more sample, or one of the next few of the order and one more, fill the row exactly, they close it
    3. else, if three would fit, the next sample of the order joins, and 2. again
    4. else the one or two that leave the least space close it

Step 3 takes samples as the order has them, so what is left keeps the mix of lengths, and exact fits stay easy to find.
"""

from collections.abc import Sequence

import numpy as np

from neva_jax.data.encoding import Encoded
from neva_jax.data.tiles import TEXT

CANDIDATES = 8  # samples of the order that step 2 tries


def training_row(samples: Sequence[Encoded], features: Sequence[int], max_length: int) -> dict[str, np.ndarray]:
    """Samples one after another, each shifted by one; padded at the right to T = `max_length`.

    Args:
      samples: at least one; together at most T tokens, their last ones not counted.
      features: of each sample, image features that its slots count through: tiles x P.

    Returns:
      `tokens, targets, positions, segment_ids, image_slots` [T] i32 and `loss_weights` [T] f32. Position t predicts
      `targets[t]`, the token after `tokens[t]`; padding has weight 0, slot -1 and segment 0.
    """
    row = {
        name: np.zeros(max_length, np.float32 if name == "loss_weights" else np.int32)
        for name in ("tokens", "targets", "loss_weights", "positions", "segment_ids", "image_slots")
    }
    row["image_slots"][:] = TEXT
    start = before = 0
    for number, (sample, count) in enumerate(zip(samples, features, strict=True), 1):
        end = start + len(sample.tokens) - 1
        here = slice(start, end)
        row["tokens"][here], row["targets"][here] = sample.tokens[:-1], sample.tokens[1:]
        row["loss_weights"][here] = sample.weights[1:]
        row["positions"][start:] = np.arange(max_length - start)
        row["segment_ids"][here] = number
        slots = sample.slots[:-1]
        row["image_slots"][here] = np.where(slots >= 0, slots + before, slots)
        start, before = end, before + count
    return row


def pack(tokens: np.ndarray, tiles: np.ndarray, max_length: int, most_tiles: int, most_segments: int) -> np.ndarray:
    """Which row each sample goes to.

    Args:
      tokens: [n] whole numbers, 1 … `max_length`, the samples' lengths in the order of the epoch.
      tiles: [n] whole numbers, 0 … `most_tiles`, the tiles that each may need.
      max_length, most_tiles, most_segments: what a row has room for.

    Returns:
      [n] i32 row numbers, 0 … rows - 1, numbered as they are opened.
    """
    if len(tokens) == 0:
        return np.zeros(0, np.int32)
    if tokens.min() < 1 or tokens.max() > max_length or tiles.max() > most_tiles:
        raise ValueError(f"a sample does not fit into a row of {max_length} tokens and {most_tiles} tiles")
    return _Packer(tokens.tolist(), tiles.tolist(), max_length).run(most_tiles, most_segments)


class _Packer:
    """The samples that have no row yet, by (tiles, tokens)."""

    def __init__(self, tokens: list[int], tiles: list[int], max_length: int):
        self.tokens, self.tiles, self.max_length = tokens, tiles, max_length
        self.rows = [-1] * len(tokens)
        self.queues: dict[tuple[int, int], list[int]] = {}
        for sample in range(len(tokens) - 1, -1, -1):  # so that a queue's last is the order's first
            self.queues.setdefault((tiles[sample], tokens[sample]), []).append(sample)
        self.left = {key: len(queue) for key, queue in self.queues.items()}
        # For each number of tiles, a set of lengths: bit `max_length - n` stands for n tokens.
        self.lengths = dict.fromkeys(sorted({tile for tile, _ in self.queues}), 0)
        for tile, length in self.queues:
            self.lengths[tile] |= 1 << (max_length - length)

    def run(self, most_tiles: int, most_segments: int) -> np.ndarray:
        row = coming = 0
        window: list[int] = []  # the first samples of the order that have no row yet
        while True:
            window = [sample for sample in window if self.rows[sample] < 0]
            while len(window) < CANDIDATES and coming < len(self.rows):
                if self.rows[coming] < 0:
                    window.append(coming)
                coming += 1
            if not window:
                return np.array(self.rows, np.int32)
            self._take(window[0], row)
            space, room = self.max_length - self.tokens[window[0]], most_tiles - self.tiles[window[0]]
            segments = most_segments - 1
            while segments and (chosen := self._choose(window, space, room, segments)):
                for sample in chosen:
                    self._take(sample, row)
                    space, room, segments = space - self.tokens[sample], room - self.tiles[sample], segments - 1
            row += 1

    def _choose(self, window: list[int], space: int, room: int, segments: int) -> list[int]:
        """The next one or two samples of a row with so much space, room for tiles and segments; [] if none fits."""
        longest = self._longest(space, room)
        if longest is None:
            return []
        slack, first, partner = space - longest[1], None, None
        if slack and segments > 1:
            for sample in window:
                tokens, tiles = self.tokens[sample], self.tiles[sample]
                if self.rows[sample] >= 0 or tokens > space or tiles > room:
                    continue
                if first is None:
                    first = sample
                second = self._longest(space - tokens, room - tiles)
                # Not the sample itself once more.
                if second is None or (second == (tiles, tokens) and self.left[second] < 2):
                    continue
                if space - tokens - second[1] < slack:
                    slack, partner = space - tokens - second[1], sample
                if slack == 0:
                    break
            if slack and first is not None and segments > 2:
                shortest = self._shortest(room)
                if space - self.tokens[first] >= 2 * shortest:
                    return [first]
        if partner is None:
            return [self._first(longest)]
        second = self._longest(space - self.tokens[partner], room - self.tiles[partner])
        return [partner, self._first(second, besides=partner)]

    def _longest(self, space: int, room: int) -> tuple[int, int] | None:
        """(tiles, tokens) of the longest samples that fit."""
        found, length = None, 0
        for tiles, lengths in self.lengths.items():
            if tiles > room:
                break
            fitting = lengths >> (self.max_length - space)
            if fitting and (candidate := space + 1 - (fitting & -fitting).bit_length()) > length:
                found, length = (tiles, candidate), candidate
        return found

    def _shortest(self, room: int) -> int:
        """Tokens of the shortest sample with so few tiles; there is one."""
        return self.max_length + 1 - max(bits.bit_length() for tiles, bits in self.lengths.items() if tiles <= room)

    def _first(self, key: tuple[int, int], besides: int = -1) -> int:
        """The order's first sample of these (tiles, tokens)."""
        queue = self.queues[key]
        while self.rows[queue[-1]] >= 0:
            queue.pop()
        if queue[-1] != besides:
            return queue[-1]
        return next(sample for sample in reversed(queue[:-1]) if self.rows[sample] < 0)

    def _take(self, sample: int, row: int) -> None:
        key = (self.tiles[sample], self.tokens[sample])
        self.rows[sample] = row
        self.left[key] -= 1
        if not self.left[key]:
            self.lengths[key[0]] ^= 1 << (self.max_length - key[1])
