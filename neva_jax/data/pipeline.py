"""Batches: rows by index through Grain, in worker processes, with prefetch.

Everything that leaves a worker is plain numpy, and a bad row is data, not an exception: it travels with the batch as
a report, so the main process can count it in the order of the run, whatever worker met it.
"""

import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags

from neva_jax.config import Config
from neva_jax.data.bad_rows import BadRowReport, report
from neva_jax.data.cache import cache_folder, locked
from neva_jax.data.lengths import row_lengths
from neva_jax.data.packing import training_row
from neva_jax.data.plans import Plans
from neva_jax.data.rows import BadRow, DroppedRow
from neva_jax.data.samples import Sample, Samples
from neva_jax.data.sources import RowRef, Sources
from neva_jax.data.tiles import tiles_per_row
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.data.transport import BUFFER, PLACES, Transport
from neva_jax.data.watch import THREADS, Board, Watched
from neva_jax.derived import image_tokens
from neva_jax.errors import forget
from neva_jax.parallel.peers import ALONE, Peers

ARRAYS = ("tokens", "targets", "loss_weights", "positions", "segment_ids", "image_slots", "images")
AHEAD = 4  # batches that the reading threads of a process make before they are asked for
ATTEMPTS = 100  # places of the order that may fail one after another; past them the source itself is broken


@dataclass
class Batch:
    """B rows as host arrays (DESIGN, "Batch"), and the bad rows met while they were made.

    Of several processes each has its own rows alone, and all the rest is said of the whole batch.

    rows: the numbers of the rows within the batch.
    complete: whether all rows are there; where not, there may be no arrays.
    consumed: samples of the run up to the end of this batch, which is where the next one begins.
    samples, tokens: in it: rows, or the segments of packed rows; and positions that are no padding.
    refs: the rows of the sources that it was made from.
    """

    arrays: dict[str, np.ndarray]
    bad_rows: list[BadRowReport] = field(default_factory=list)
    consumed: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    complete: bool = True
    samples: int = 0
    tokens: int = 0
    refs: list[RowRef] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """The part of each batch that this process reads (`parallel.mesh.own_rows`), and the processes of the run.

    rows: numbers within the batch; told: [len(rows)] bool, the rows that this process speaks for.
    """

    rows: np.ndarray
    told: np.ndarray
    peers: Peers = ALONE

    @classmethod
    def whole(cls, size: int) -> "Share":
        """Of a process that is alone."""
        return cls(np.arange(size), np.ones(size, bool))


# Kept until the process ends: Grain closes an iterator that nobody holds, and then waits up to 25 s for each worker
# that is writing a batch. `exit_with` ends the workers of a run that stops early at once.
_STREAMS: list[Iterator] = []


class SampleMaker:
    """Number of the row -> one training row with its images; runs in the workers.

    Without plans, row i is made from sample i of the run alone. With them, from the samples of the i-th row after
    the run's `start`, (epoch, row).
    """

    def __init__(
        self,
        sources: Sources,
        config: Config,
        tokenizer: Tokenizer,
        plans: Plans | None = None,
        start: tuple[int, int] = (0, 0),
        board: Board | None = None,
    ):
        """Raises UserError as `Samples` does."""
        self.sources, self.config, self.plans, self.start, self.board = sources, config, plans, start, board
        self.samples = Samples(sources, config, tokenizer)

    def __call__(self, index: int) -> dict[str, Any]:
        """The arrays of one row (without B), which are missing if none could be made; `bad_rows`, `refs`, `consumed`.

        A place of the order that gives no sample is replaced by the next place that gives some.
        """
        if self.board is not None:
            self.board.say(_line(), index)
        consumed, places = self._places(index)
        bad: list[BadRowReport] = []
        arrays: dict[str, np.ndarray] = {}
        made: list[Sample] = []
        for place in itertools.islice(places, ATTEMPTS):
            made = self._make_all(place, bad)
            if made:
                arrays = self.row(made)
            if made or (self.config.data.on_bad_row == "error" and any(one.kind == "bad" for one in bad)):
                break
        if self.board is not None:
            self.board.say(_line(), -1)
        return {**arrays, "bad_rows": bad, "refs": [sample.ref for sample in made], "consumed": consumed}

    def make(self, ref: RowRef) -> dict[str, np.ndarray]:
        """One source row alone in its training row; raises BadRow."""
        return self.row([self.samples.make(ref)])

    def row(self, made: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Samples -> the arrays of `training_row`, and `images` [K, S, S, 3] uint8 (zeros where there is no tile)."""
        tokens, size = image_tokens(self.config.model), self.config.model.vision.image_size
        features = [len(sample.tiles) * tokens for sample in made]
        arrays = training_row([sample.encoded for sample in made], features, self.config.data.max_length)
        arrays["images"] = np.zeros((tiles_per_row(self.config), size, size, 3), np.uint8)
        first = 0
        for sample in made:
            arrays["images"][first : first + len(sample.tiles)] = sample.tiles
            first += len(sample.tiles)
        return arrays

    def describe(self, index: int) -> str:
        """Names what the row `index` is made from."""
        _, places = self._places(index)
        first, *others = next(places)
        name = self.sources.describe(first[1])
        return f"{name} and {len(others)} others of its packed row" if others else name

    def _places(self, index: int) -> tuple[int, Iterator[list[tuple[int, RowRef]]]]:
        """Samples of the run up to the end of the row `index`; and what it may be made from, the first choice first.

        A choice is a list of (number of the sample in the run, row of a source).
        """
        if self.plans is None:
            first = self.sources.order(index)
            return index + 1, ([(index, self.sources.after(first, step))] for step in itertools.count())
        plans, size = self.plans, self.sources.epoch_size
        epoch, row = plans.locate(self.start[0], self.start[1] + index)

        def rows() -> Iterator[list[tuple[int, RowRef]]]:
            for step in itertools.count():
                at, number = plans.locate(epoch, row + step)
                numbers = [at * size + sample for sample in plans[at].row(number)]
                yield [(sample, self.sources.order(sample)) for sample in numbers]

        return plans.consumed(epoch, row + 1), rows()

    def _make_all(self, place: list[tuple[int, RowRef]], bad: list[BadRowReport]) -> list[Sample]:
        """The samples of a place that can be made and fit; reports of the others go to `bad`."""
        made: list[Sample] = []
        tokens, tiles = 0, 0
        for number, ref in place:
            try:
                sample = self.samples.make(ref)
                length = len(sample.encoded.tokens) - 1
                if tokens + length > self.config.data.max_length or tiles + len(sample.tiles) > tiles_per_row(
                    self.config
                ):
                    raise BadRow(
                        f"needs {length} tokens and {len(sample.tiles)} tiles, more than when its row was planned; "
                        "its images have changed since, or were not there: delete data.cache before the next run; "
                        "this one goes on with data.on_bad_row=skip"
                    )
            except BadRow as error:
                bad.append(report(self.sources, ref, number, error))
                if self.config.data.on_bad_row == "error" and not isinstance(error, DroppedRow):
                    return []
                continue
            made.append(sample)
            tokens, tiles = tokens + length, tiles + len(sample.tiles)
        return made


_threads: dict[int, int] = {}


def _line() -> int:
    """A number of the calling thread, from 0 on."""
    return _threads.setdefault(threading.get_ident(), len(_threads))


def plan_rows(
    sources: Sources, config: Config, tokenizer: Tokenizer, say: Callable[[str], None], name: str
) -> Plans | None:
    """The packing plans with `data.pack`, else None; the lengths that they need are measured where none are cached.

    `name` (training, validation) stands in what is said.

    Raises:
      UserError: the cache folder cannot be used.
    """
    if not config.data.pack:
        return None
    with locked(cache_folder(config.data.cache) / "lengths.lock"):  # other processes need the same lengths now
        lengths = row_lengths(sources, config, tokenizer, say)
    plans = Plans(sources, lengths, config)
    first, length = plans[0], config.data.max_length
    say(
        f"{name}: {sources.epoch_size} samples packed into {first.rows} rows of {length} tokens, "
        f"{100 * first.tokens / (first.rows * length):.1f} % of them useful"
    )
    return plans


def batches(
    sources: Sources,
    config: Config,
    tokenizer: Tokenizer,
    first_sample: int,
    rows: int,
    plans: Plans | None = None,
    share: Share | None = None,
) -> Iterator[Batch]:
    """Batches of `train.global_batch` rows: `rows` rows of the run, from the one that begins with `first_sample`.

    The stream depends on (seed, configuration, index) alone: the number of workers changes only the speed, and that of
    processes only who reads which of its rows (`share`). The last batch is padded by going on in the order, so that
    every batch is whole. Workers start, and batches are made, before the first is asked for.

    Raises:
      UserError: `first_sample` is within a packed row.
      WorkerError: while iterating; see `Watched`.
    """
    size = config.train.global_batch
    share = Share.whole(size) if share is None else share
    count = -(-rows // size)
    workers = min(config.data.workers, count)
    board = Board(workers)
    start = (0, 0) if plans is None else plans.start(first_sample)
    maker = SampleMaker(sources, config, tokenizer, plans, start, board)
    first = first_sample if plans is None else 0
    dataset = (
        grain.MapDataset.range(count * len(share.rows))
        .map(partial(_row_number, first, size, share.rows))
        .map(maker)
        .batch(len(share.rows), batch_fn=partial(_collate, share.rows, share.told))
        .to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD))
    )
    if workers:
        # Grain's workers read absl flags, which only absl's own main would have parsed.
        flags.FLAGS.mark_as_parsed()
        # The semaphores of workers that were killed are cleaned up, which is nothing to warn about.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=BUFFER)
        transport = Transport(workers, len(share.rows) * row_bytes(config))
        become = partial(_become_worker, board, transport, os.getpid())
        dataset = dataset.map(transport.put).mp_prefetch(options, worker_init_fn=become).map(transport.take)
    stream = iter(dataset)
    if workers:
        _STREAMS.append(stream)
    watched = stream, config.data.worker_timeout, board, maker.describe
    return _Agreed(*watched, lengths=batch_lengths(config), share=share)


def batches_ahead(workers: int) -> int:
    """Batches that may be ready before anyone asks: in all threads and queues, and two on their way out."""
    return max(workers, 1) * AHEAD + workers * PLACES + 2


def batch_lengths(config: Config) -> list[int]:
    """The lengths T that batches may have, in order."""
    return sorted({*config.data.length_buckets, config.data.max_length})


def row_bytes(config: Config) -> int:
    """Bytes of the arrays of one row of the longest batches."""
    text = (len(ARRAYS) - 1) * 4 * config.data.max_length
    return text + tiles_per_row(config) * 3 * config.model.vision.image_size**2


def _row_number(first: int, size: int, rows: np.ndarray, index: int) -> int:
    """The `index`-th row that a process reads -> its number in the run."""
    batch, place = divmod(index, len(rows))
    return first + batch * size + int(rows[place])


@dataclass
class _Part:
    """A process's part of a batch; reports and refs by the number of the row in the batch, `longest` in tokens."""

    arrays: dict[str, np.ndarray]
    reports: list[tuple[int, BadRowReport]]
    refs: list[tuple[int, RowRef]]
    consumed: int
    longest: int
    samples: int
    tokens: int

    def note(self) -> dict[str, Any]:
        """What the other processes need to know."""
        reports = [(row, dataclasses.asdict(report)) for row, report in self.reports]
        numbers = {name: getattr(self, name) for name in ("consumed", "longest", "samples", "tokens")}
        refs = [(row, *dataclasses.astuple(ref)) for row, ref in self.refs]
        return {"complete": bool(self.arrays), "reports": reports, "refs": refs, **numbers}


def _collate(rows: np.ndarray, told: np.ndarray, samples: list[dict[str, Any]]) -> _Part:
    spoken_for = [(row, sample) for row, sample, own in zip(rows.tolist(), samples, told, strict=True) if own]
    reports = [(row, report) for row, sample in spoken_for for report in sample["bad_rows"]]
    refs = [(row, ref) for row, sample in spoken_for for ref in sample["refs"]]
    consumed = samples[-1]["consumed"]
    if not all("tokens" in sample for sample in samples):
        return _Part({}, reports, refs, consumed, 0, 0, 0)
    arrays = {name: np.stack([sample[name] for sample in samples]) for name in ARRAYS}
    segments = arrays["segment_ids"]
    longest, own = int((segments > 0).sum(axis=1).max()), segments[told]
    return _Part(arrays, reports, refs, consumed, longest, int(own.max(axis=1).sum()), int((own > 0).sum()))


class _Agreed(Watched):
    """Parts -> batches of the smallest of `lengths` that holds the rows of all processes."""

    def __init__(self, *watched: Any, lengths: Sequence[int], share: Share):
        super().__init__(*watched)
        self.lengths, self.share = lengths, share

    def __next__(self) -> Batch:
        """The next batch, when all processes have theirs. Raises as `Watched`."""
        part: _Part = super().__next__()
        notes = self.share.peers.exchange(part.note())
        longest = max(note["longest"] for note in notes)
        length = next(length for length in self.lengths if length >= longest)
        arrays = {name: array if name == "images" else array[:, :length] for name, array in part.arrays.items()}
        reports = sorted((row, at, one) for note in notes for at, (row, one) in enumerate(note["reports"]))
        refs = sorted((row, at, ref) for note in notes for at, (row, *ref) in enumerate(note["refs"]))
        return Batch(
            arrays,
            [BadRowReport(**{**one, "ref": RowRef(**one["ref"])}) for _, _, one in reports],
            max(note["consumed"] for note in notes),
            self.share.rows,
            all(note["complete"] for note in notes),
            sum(note["samples"] for note in notes),
            sum(note["tokens"] for note in notes),
            [RowRef(*ref) for _, _, ref in refs],
        )


def _become_worker(board: Board, transport: Transport, parent: int, index: int, count: int) -> None:
    """Leaves signals to the main process, which saves and then closes its workers; ends with it, however it ends, and
    takes away the files that it may have left.

    A terminal's Ctrl-C and a scheduler's SIGTERM reach the whole process group: a worker that died of one would leave
    the main process waiting for its batch.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    board.enter(index)
    transport.enter(index)
    threading.Thread(target=_end_with, args=(parent, board.path, transport.path), daemon=True).start()


def _end_with(parent: int, *paths: str) -> None:
    """Ends this process within a second of its parent, which may have ended before it was here; `paths` are deleted."""
    while os.getppid() == parent:
        time.sleep(1)
    for path in paths:
        forget(path)
    os._exit(1)
