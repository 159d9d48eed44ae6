"""Rows by index: the JSON files of a run as one list, and the order in which an epoch visits them.

    virtual index   0 … n0-1 | n0 … n0+n1-1 | …          n_i = round(weight_i * rows_i), the samples of one epoch
    order(i)        epoch, place = divmod(i, n);  virtual index = shuffle(place; seed, epoch)
    row             of source i at virtual index v:  (epoch * n_i + v) mod rows_i

So a weight of 2 shows each row twice an epoch, and 0.5 shows one half in one epoch and the other in the next. The
order is a pure function of (seed, epoch, index): a resumed run needs one number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from neva_jax.config import SourceConfig
from neva_jax.data.cache import file_key
from neva_jax.data.images import find_frames, find_image
from neva_jax.data.rows import Row, parse_row, read_json
from neva_jax.errors import UserError


@dataclass(frozen=True)
class RowRef:
    """Where a row stands: source number, row number in its JSON file."""

    source: int
    row: int


class Sources:
    """All rows of a split."""

    def __init__(self, configs: Sequence[SourceConfig], seed: int, shuffle: bool):
        """Reads the JSON files; images are opened later.

        Raises:
          UserError: a file that is no LLaVA JSON, or a weight that leaves no row.
        """
        self.configs = list(configs)
        self.rows: list[list[Any]] = [read_json(config.json) for config in configs]
        self.counts = [round(c.weight * len(rows)) for c, rows in zip(self.configs, self.rows, strict=True)]
        for config, count, rows in zip(self.configs, self.counts, self.rows, strict=True):
            if count == 0:
                raise UserError(f"weight={config.weight} of {config.json} leaves none of its {len(rows)} rows")
        self.seed, self.shuffle = seed, shuffle

    @property
    def epoch_size(self) -> int:
        """Samples in one epoch."""
        return sum(self.counts)

    @property
    def row_count(self) -> int:
        """Rows in all JSON files together."""
        return sum(len(rows) for rows in self.rows)

    def order(self, index: int) -> RowRef:
        """The row that the `index`-th sample of the run is made from; index 0, 1, 2, … without end."""
        epoch, place = divmod(index, self.epoch_size)
        if self.shuffle and self.epoch_size > 1:
            place = index_shuffle(place, max_index=self.epoch_size - 1, seed=_mix(self.seed, epoch), rounds=4)
        for source, count in enumerate(self.counts):
            if place < count:
                return RowRef(source, (epoch * count + place) % len(self.rows[source]))
            place -= count
        raise AssertionError(index)

    def order_many(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`order` of the samples `start` … `start + count - 1`: their source numbers and row numbers, [count] each."""
        refs = [self.order(index) for index in range(start, start + count)]
        return np.array([ref.source for ref in refs]), np.array([ref.row for ref in refs])

    def rows_in(self, source: int) -> int:
        """Rows of one source."""
        return len(self.rows[source])

    def fingerprint(self, source: int) -> str:
        """A key of what the source's file of rows holds."""
        return file_key(self.configs[source].json)

    def row_id(self, ref: RowRef) -> str:
        """The id that a row gives itself; empty if it has none."""
        raw = self.rows[ref.source][ref.row]
        return str(raw.get("id", "")) if isinstance(raw, dict) else ""

    def after(self, ref: RowRef, steps: int) -> RowRef:
        """The row `steps` further down the same JSON file, round its end: what stands in for a bad row."""
        return RowRef(ref.source, (ref.row + steps) % len(self.rows[ref.source]))

    def raw(self, ref: RowRef) -> Any:
        """The row as an element of LLaVA JSON, unchecked."""
        return self.rows[ref.source][ref.row]

    def read(self, ref: RowRef) -> Row:
        """The checked row; raises BadRow."""
        return parse_row(self.raw(ref))

    def check_image(self, ref: RowRef, name: str, field: str = "image") -> None:
        """Whether there is an image file of that name, without reading it; raises BadRow as `read_image`."""
        find_image(self.configs[ref.source].images, name, field)

    def read_image(self, ref: RowRef, name: str, field: str = "image") -> bytes:
        """The bytes of an image of a row, or of a frame of its video (`field="video"`). Raises BadRow."""
        return find_image(self.configs[ref.source].images, name, field).read_bytes()

    def frames(self, ref: RowRef, name: str) -> list[str]:
        """The names of the frames of a row's video, in order, for `read_image`. Raises BadRow."""
        return [f"{name}/{frame.name}" for frame in find_frames(self.configs[ref.source].images, name)]

    def describe(self, ref: RowRef) -> str:
        """Names a row for a message: file, row number (from 0) and id."""
        raw = self.rows[ref.source][ref.row]
        name = f" (id {raw['id']!r})" if isinstance(raw, dict) and "id" in raw else ""
        return f"{self.configs[ref.source].json}: row {ref.row}{name}"


def _mix(seed: int, epoch: int) -> int:
    """A 32-bit seed for an epoch; the multiplier is Knuth's, 2^32 divided by the golden ratio."""
    return (seed + epoch * 2654435761) % 2**32
