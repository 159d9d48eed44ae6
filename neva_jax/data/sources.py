"""Rows by index: the files of a run as one list, and the order in which an epoch visits them.

    virtual index   0 … n0-1 | n0 … n0+n1-1 | …          n_i = round(weight_i * rows_i), the samples of one epoch
    order(i)        epoch, place = divmod(i, n);  virtual index = shuffle(place; seed, epoch)
    row             of source i at virtual index v:  (epoch * n_i + v) mod rows_i

So a weight of 2 shows each row twice an epoch, and 0.5 shows one half in one epoch and the other in the next. With
`data.sampling=replacement`, sample i is drawn by itself: source j with probability n_j / n, and any of its rows; an
epoch is still n samples. Both orders are pure functions of (seed, index): a resumed run needs one number.

`data.val_fraction` holds out the rows whose id hashes to a number below it. A row is on the same side whatever other
rows there are, and so is another row with its id, in any source: no image of a row is seen on both sides.
"""

import hashlib
import struct
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from grain.experimental import index_shuffle
from tqdm import tqdm

from neva_jax.config import DataConfig, SourceConfig
from neva_jax.data.cache import cache_folder, cached_array, locked
from neva_jax.data.row_files import RowFile, open_rows
from neva_jax.data.rows import BadRow, Row, from_steerlm, parse_row
from neva_jax.data.stores import NoStore, Store, open_store
from neva_jax.errors import UserError

_HASH_VERSION = 1
_FEW = 10_000


@dataclass(frozen=True)
class RowRef:
    """Where a row stands: source number, row number in its file."""

    source: int
    row: int


class Sources:
    """All rows of a split, and their images. Its pickle is paths and settings: a worker opens the files again."""

    def __init__(self, data: DataConfig, split: Literal["train", "val"], seed: int, shuffle: bool):
        """Opens the files of rows and of images; rows are read later.

        Args:
          data: `val` without sources of its own is the held-out part of `train`.
          seed: of the order. shuffle: without it, samples come in the order of the files.

        Raises:
          UserError: a file that cannot be used, or a weight or a fraction that leaves no row.
        """
        self.data, self.split, self.seed, self.shuffle = data, split, seed, shuffle
        self.held_out = split == "val" and not data.val
        self.configs: list[SourceConfig] = list(data.val if split == "val" and data.val else data.train)
        cache = cache_folder(data.cache)
        self.files: list[RowFile] = [open_rows(config, cache) for config in self.configs]
        self.stores: list[Store] = [open_store(config.images, cache) for config in self.configs]
        self._choose()
        weights = [1.0 if self.held_out else config.weight for config in self.configs]
        self.counts = [round(weight * rows) for weight, rows in zip(weights, self._sizes, strict=True)]
        for file, weight, count, rows in zip(self.files, weights, self.counts, self._sizes, strict=True):
            if not count and rows:
                raise UserError(f"weight={weight} of {file.path} leaves none of its {rows} rows")
        if not sum(self.counts):
            part = f"no row for {'validation' if split == 'val' else 'training'}"
            raise UserError(f"data.val_fraction={data.val_fraction} leaves {part} of {sum(map(len, self.files))} rows")
        self.ends = list(accumulate(self.counts))

    def _choose(self) -> None:
        """The rows of the split, where it is a part of the rows."""
        self._chosen: list[np.ndarray | None] = [None] * len(self.files)
        if self.data.val_fraction and (self.held_out or self.split == "train"):
            bound = min(int(self.data.val_fraction * 2.0**64), 2**64 - 1)
            for i, file in enumerate(self.files):
                below = _id_hashes(file, self.data) < np.uint64(bound)
                side = below if self.held_out else ~below
                self._chosen[i] = np.flatnonzero(side).astype(np.int32 if len(file) < 2**31 else np.int64)
        self._sizes = [
            len(file) if rows is None else len(rows) for file, rows in zip(self.files, self._chosen, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_chosen", "_sizes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._choose()

    @property
    def epoch_size(self) -> int:
        """Samples in one epoch."""
        return sum(self.counts)

    @property
    def row_count(self) -> int:
        """Rows of the split, of all files together."""
        return sum(self._sizes)

    @property
    def chosen_digest(self) -> str | None:
        """Of the rows that `data.val_fraction` left to this split; None where the split has all rows."""
        if all(rows is None for rows in self._chosen):
            return None
        digest = hashlib.blake2b(digest_size=16)
        for rows in self._chosen:
            digest.update(rows.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def _replaces(self) -> bool:
        return self.data.sampling == "replacement" and self.split == "train"

    def rows_in(self, source: int) -> int:
        """Rows in the file of one source, whether or not the split has them: the bound of `RowRef.row`."""
        return len(self.files[source])

    def order(self, index: int) -> RowRef:
        """The row that the `index`-th sample of the run is made from; index 0, 1, 2, … without end."""
        if self._replaces:
            # Each draw is 64 bits, scaled to its range: the bias is below 2^-32 for any number of rows.
            digest = hashlib.blake2b(struct.pack("<QQ", self.seed, index), digest_size=16, person=b"order").digest()
            place, row = struct.unpack("<QQ", digest)
            source = bisect_right(self.ends, (place * self.epoch_size) >> 64)
            return self._ref(source, (row * self._sizes[source]) >> 64)
        epoch, place = divmod(index, self.epoch_size)
        if self.shuffle and self.epoch_size > 1:
            place = index_shuffle(place, max_index=self.epoch_size - 1, seed=_mix(self.seed, epoch), rounds=4)
        source = bisect_right(self.ends, place)
        count = self.counts[source]
        place -= self.ends[source] - count
        return self._ref(source, (epoch * count + place) % self._sizes[source])

    def order_many(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`order` of the samples `start` … `start + count - 1`: their source numbers and row numbers, [count] each."""
        if self._replaces:
            refs = [self.order(index) for index in range(start, start + count)]
            return np.array([ref.source for ref in refs]), np.array([ref.row for ref in refs])
        size = self.epoch_size
        epochs, places = np.divmod(np.arange(start, start + count), size)
        if self.shuffle and size > 1:
            seeds = {epoch: _mix(self.seed, epoch) for epoch in np.unique(epochs).tolist()}
            pairs = zip(places.tolist(), epochs.tolist(), strict=True)
            places = np.array([index_shuffle(place, size - 1, seeds[epoch], 4) for place, epoch in pairs])
        ends, counts, sizes = np.array(self.ends), np.array(self.counts), np.array(self._sizes)
        sources = np.searchsorted(ends, places, side="right")
        own = counts[sources]
        rows = (epochs * own + places - (ends[sources] - own)) % sizes[sources]
        for source, chosen in enumerate(self._chosen):
            if chosen is not None:
                rows[sources == source] = chosen[rows[sources == source]]
        return sources, rows

    def _ref(self, source: int, place: int) -> RowRef:
        chosen = self._chosen[source]
        return RowRef(source, place if chosen is None else int(chosen[place]))

    def after(self, ref: RowRef, steps: int) -> RowRef:
        """The row `steps` further down the same file and split, round its end: what stands in for a bad row."""
        chosen = self._chosen[ref.source]
        place = ref.row if chosen is None else int(np.searchsorted(chosen, ref.row))
        return self._ref(ref.source, (place + steps) % self._sizes[ref.source])

    def raw(self, ref: RowRef) -> Any:
        """The row as an element of LLaVA JSON, unchecked. Raises BadRow: it is no JSON, or such SteerLM."""
        raw = self.files[ref.source].raw(ref.row)
        return from_steerlm(raw) if self.tags_are_images(ref.source) else raw

    def tags_are_images(self, source: int) -> bool:
        """Whether `<img src=…>` in lines stands for an image; where there are no images it is text: of HTML, say."""
        return self.files[source].lines and not isinstance(self.stores[source], NoStore)

    def read(self, ref: RowRef) -> Row:
        """The checked row; raises BadRow."""
        return parse_row(self.raw(ref))

    def read_image(self, ref: RowRef, name: str, field: str = "image") -> bytes:
        """The bytes of an image of a row, or of a frame of its video (`field="video"`). Raises BadRow."""
        return self._store(ref, name).read(name, field)

    def check_image(self, ref: RowRef, name: str, field: str = "image") -> None:
        """Raises BadRow where `read_image` would, as far as that can be told without reading the file."""
        self._store(ref, name).check(name, field)

    def frames(self, ref: RowRef, name: str) -> list[str]:
        """The names of the frames of a row's video, in order, for `read_image`. Raises BadRow."""
        return self._store(ref, name).frames(name)

    def _store(self, ref: RowRef, name: str) -> Store:
        store, own = self.stores[ref.source], self.files[ref.source].images(ref.row)
        return store if own is None or (name not in own and not isinstance(store, NoStore)) else own

    def row_id(self, ref: RowRef) -> str:
        """The id that a row gives itself; empty if it has none, or cannot be read."""
        try:
            raw = self.files[ref.source].raw(ref.row)
        except BadRow:
            return ""
        return str(raw.get("id", "")) if isinstance(raw, dict) else ""

    def describe(self, ref: RowRef) -> str:
        """Names a row for a message: file, row number (from 0) and id."""
        file = self.files[ref.source]
        try:
            raw = file.raw(ref.row)
        except BadRow:
            raw = None
        name = f" (id {raw['id']!r})" if isinstance(raw, dict) and "id" in raw else ""
        return f"{file.path}: row {ref.row}{name}"

    def fingerprint(self, source: int) -> str:
        """A key of what the source's file of rows holds, wherever it lies; its images do not count."""
        return self.files[source].key


def _id_hashes(file: RowFile, data: DataConfig) -> np.ndarray:
    """[rows] uint64: a hash of each row's id, or of its number where it has none."""

    def make() -> np.ndarray:
        hashes = np.zeros(len(file), np.uint64)
        for row in tqdm(range(len(file)), desc="hashing ids", unit="row", delay=2, leave=False, disable=None):
            try:
                raw = file.raw(row)
            except BadRow:
                raw = None
            name = raw.get("id") if isinstance(raw, dict) else None
            key = f"row {row}" if name is None else f"id {name}"
            digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, person=b"split")
            hashes[row] = int.from_bytes(digest.digest(), "little")
        return hashes

    if len(file) <= _FEW:
        return make()
    cache = cache_folder(data.cache)
    with locked(cache / "rows.lock"):
        return cached_array(cache, f"ids-{_HASH_VERSION}-{file.key}", make)


def _mix(seed: int, epoch: int) -> int:
    """A 32-bit seed for an epoch; the multiplier is Knuth's, 2^32 divided by the golden ratio."""
    return (seed + epoch * 2654435761) % 2**32
