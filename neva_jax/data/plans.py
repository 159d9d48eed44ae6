"""The packing plan of each epoch: a pure function of the lengths, the order of the sources, and what a row holds.

    sample of the run   0 … n-1 | n … 2n-1 | …        n samples an epoch, in the order of `Sources.order`
    row of epoch e      0 … rows(e)-1                  the samples of a row are numbers within the epoch

A run that has consumed S samples stands in epoch S // n, at the row before which S % n samples of the epoch stand: one
number resumes it. Plans lie in the cache folder as plain arrays, so that workers map them instead of receiving them;
whoever needs one that is not there makes it, once:

    int64   rows | useful tokens | starts [rows + 1] | samples [n]        row r holds samples[starts[r] : starts[r + 1]]
"""

import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from neva_jax.config import Config
from neva_jax.data.cache import cache_folder, cached_array, locked
from neva_jax.data.lengths import Lengths
from neva_jax.data.packing import pack
from neva_jax.data.sources import Sources
from neva_jax.data.tiles import tiles_per_row
from neva_jax.errors import UserError

VERSION = 2  # of the plans: another one makes all of them anew
OPEN = 3  # plans that a process keeps mapped


@dataclass(frozen=True)
class Plan:
    """One epoch: `starts` [rows + 1] and `samples` [n], see above; `tokens`, positions that are no padding."""

    starts: np.ndarray
    samples: np.ndarray
    tokens: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    def row(self, number: int) -> list[int]:
        """The samples of a row, as numbers within the epoch."""
        return self.samples[self.starts[number] : self.starts[number + 1]].tolist()


class Plans:
    """The plans of all epochs of a run, made when they are needed; picklable, without what they hold."""

    def __init__(self, sources: Sources, lengths: Lengths, config: Config):
        data = config.data
        self.sources, self.lengths = sources, lengths
        self.room = (data.max_length, tiles_per_row(config), data.segments_per_row)
        identity = {
            "version": VERSION,
            "lengths": lengths.digest,
            "room": self.room,
            "seed": sources.seed,
            "shuffle": sources.shuffle,
            "weights": [source.weight for source in sources.configs],
            "sampling": data.sampling,
            "chosen": sources.chosen_digest,
            "epoch_size": sources.epoch_size,
        }
        # What a checkpoint remembers: within an epoch, a run may go on only with the plan that it began.
        self.digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = cache_folder(data.cache)
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[int, Plan] = OrderedDict()
        self._rows: dict[int, int] = {}
        self._lock = threading.Lock()  # a worker reads with several threads

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_rows", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __getitem__(self, epoch: int) -> Plan:
        """The plan of an epoch, from the cache or made now.

        Raises:
          UserError: the cache folder cannot be used.
        """
        with self._lock:
            if epoch not in self._open:
                self._open[epoch] = self._load(epoch)
                self._rows[epoch] = self._open[epoch].rows
                while len(self._open) > OPEN:
                    self._open.popitem(last=False)
            return self._open[epoch]

    def _load(self, epoch: int) -> Plan:
        with locked(self.folder / "plans.lock"):  # the other workers need the same plan now
            name = f"plan-{self.digest}-{epoch}"
            content = cached_array(self.folder, name, lambda: self._make(epoch))
        rows, tokens = (int(number) for number in content[:2])
        return Plan(content[2 : rows + 3], content[rows + 3 :], tokens)

    def locate(self, epoch: int, row: int) -> tuple[int, int]:
        """A row counted from the first of `epoch`, however far -> (its epoch, its number there)."""
        while row >= (rows := self._rows.get(epoch) or self[epoch].rows):
            epoch, row = epoch + 1, row - rows
        return epoch, row

    def consumed(self, epoch: int, row: int) -> int:
        """Samples of the run before a row."""
        return epoch * self.sources.epoch_size + int(self[epoch].starts[row])

    def start(self, samples: int) -> tuple[int, int]:
        """(epoch, row) before which so many samples of the run stand: the inverse of `consumed`.

        Raises:
          UserError: no row begins there.
        """
        epoch, place = divmod(int(samples), self.sources.epoch_size)
        starts = self[epoch].starts
        row = int(np.searchsorted(starts, place))
        if starts[row] != place:
            raise UserError(f"{samples} samples of the run end within a packed row; use a new run.dir")
        return epoch, row

    def _make(self, epoch: int) -> np.ndarray:
        count = self.sources.epoch_size
        table = self.lengths.of(*self.sources.order_many(epoch * count, count))
        # A row that will turn out bad is planned too, so that it is met in its place; it needs no room.
        tokens, tiles = np.maximum(table["tokens"], 1), table["tiles"].astype(np.int64)
        rows = pack(tokens, tiles, *self.room)
        if self.sources.shuffle:
            # The last rows are the emptiest; raw random bits, because NumPy promises that those never change.
            bits = np.random.Philox(key=[self.sources.seed, epoch]).random_raw(int(rows.max()) + 1)
            rows = np.argsort(np.argsort(bits, kind="stable"))[rows]
        samples = np.argsort(rows, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        header = [len(starts) - 1, int(table["tokens"].sum(dtype=np.int64))]
        return np.concatenate([header, starts, samples]).astype(np.int64)
