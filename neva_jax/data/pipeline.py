"""Batches: rows by index through Grain, in worker processes, with prefetch.

Everything that leaves a worker is plain numpy, and a bad row is data, not an exception: it travels with the batch as
a report, so the main process can count it in the order of the run, whatever worker met it.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np
from absl import flags

from neva_jax.config import Config
from neva_jax.data.encoding import conversation_encoder, fit_length
from neva_jax.data.images import find_frames, find_image, load_image, sample_frames
from neva_jax.data.packing import training_row
from neva_jax.data.rows import VIDEO_MARK, BadRow, Row
from neva_jax.data.sources import RowRef, Sources
from neva_jax.data.tiles import Picture, tiles_per_row
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError

ARRAYS = ("tokens", "targets", "loss_weights", "positions", "segment_ids", "image_slots", "images")


@dataclass(frozen=True)
class BadRowReport:
    """A row that was met and could not be used."""

    ref: RowRef
    message: str


@dataclass
class Batch:
    """B rows as host arrays (DESIGN, "Batch"), and the bad rows met while they were made."""

    arrays: dict[str, np.ndarray]
    bad_rows: list[BadRowReport] = field(default_factory=list)


# Kept until the process ends: Grain closes an iterator that nobody holds, and then waits up to 25 s for each worker
# that is writing a batch. `exit_with` ends the workers of a run that stops early at once.
_STREAMS: list[Iterator[Batch]] = []


class SampleMaker:
    """Index of the run -> one training row with its images; runs in the workers."""

    def __init__(self, sources: Sources, config: Config, tokenizer: Tokenizer):
        """Raises UserError: the tokenizer lacks a token of the template, or `data.image_start` or `_end` is none."""
        self.sources, self.config = sources, config
        self.conversations = conversation_encoder(config.data, tokenizer)
        # A row is replaced by the next good one; past this many in a row the source itself is broken.
        self.attempts = 1 if config.data.on_bad_row == "error" else 100

    def __call__(self, index: int) -> dict[str, Any]:
        """The arrays of one row (without B), plus `bad_rows`; arrays are missing if no row could be used."""
        first = self.sources.order(index)
        bad: list[BadRowReport] = []
        for step in range(self.attempts):
            ref = self.sources.after(first, step)
            try:
                return {**self.make(ref), "bad_rows": bad}
            except BadRow as error:
                bad.append(BadRowReport(ref, f"{self.sources.describe(ref)}: {error}"))
        return {"bad_rows": bad}

    def make(self, ref: RowRef) -> dict[str, np.ndarray]:
        """One row: the arrays of `training_row`, and `images` [K, S, S, 3] uint8 (zeros where there is no tile)."""
        row = self.sources.read(ref)
        folder = self.sources.configs[ref.source].images
        if row.video is None:
            turns, pictures = row.turns, self._images(row, folder)
        else:
            pictures = self._video(row.video, folder)
            turns = row.with_frames(len(pictures))
        spans = [picture.span for picture in pictures]
        encoded = fit_length(self.conversations.encode(turns, spans, row.system), self.config.data)
        arrays = training_row(encoded, self.config.data.max_length)
        size = self.config.model.vision.image_size
        arrays["images"] = np.zeros((tiles_per_row(self.config), size, size, 3), np.uint8)
        if pictures:
            tiles = np.concatenate([picture.tiles for picture in pictures])
            arrays["images"][: len(tiles)] = tiles
        return arrays

    def _images(self, row: Row, folder: str | None) -> list[Picture]:
        most = self.config.data.images_per_row
        if len(row.images) > most:
            raise BadRow(f"field image has {len(row.images)} images, but data.images_per_row is {most}")
        # Where there are no videos, the word is text: of HTML, say.
        if self.config.data.video_frames and (marks := row.count(VIDEO_MARK)):
            raise BadRow(f"field conversations has {marks} {VIDEO_MARK} marks in human turns, but no field video")
        return [load_image(find_image(folder, name), self.config) for name in row.images]

    def _video(self, name: str, folder: str | None) -> list[Picture]:
        data = self.config.data
        if not data.video_frames:
            raise BadRow("has a field video, but data.video_frames is 0; set the number of frames to take of a video")
        frames = sample_frames(find_frames(folder, name), data.video_frames, data.splice_single_frame)
        loaded = {path: load_image(path, self.config, frame=True) for path in dict.fromkeys(frames)}
        return [loaded[path] for path in frames]


def _collate(samples: list[dict[str, Any]]) -> Batch:
    bad_rows = [report for sample in samples for report in sample["bad_rows"]]
    if not all("tokens" in sample for sample in samples):
        return Batch({}, bad_rows)
    return Batch({name: np.stack([sample[name] for sample in samples]) for name in ARRAYS}, bad_rows)


class BadRowCount:
    """Counts the distinct bad rows of a run and stops it when the configured bound is passed."""

    def __init__(self, sources: Sources, on_bad_row: str, max_fraction: float, known: list[str] = ()):
        self.on_bad_row, self.max_fraction, self.total = on_bad_row, max_fraction, sources.row_count
        self.messages: dict[str, None] = dict.fromkeys(known)

    def add(self, batch: Batch) -> list[str]:
        """Takes a batch's reports; returns the messages that are new.

        Raises:
          UserError: the policy is `error` and there is a report, or the fraction of bad rows is above the bound.
        """
        if batch.bad_rows and self.on_bad_row == "error":
            raise UserError(f"{batch.bad_rows[0].message}; mend the row, or set data.on_bad_row=skip")
        found = dict.fromkeys(report.message for report in batch.bad_rows)
        new = [message for message in found if message not in self.messages]
        self.messages.update(found)
        if len(self.messages) > self.max_fraction * self.total:
            raise UserError(
                f"{len(self.messages)} of {self.total} rows are bad, more than data.max_bad_fraction="
                f"{self.max_fraction}; the last: {list(self.messages)[-1]}"
            )
        if not batch.arrays:
            raise UserError(f"no good row within 100 rows of {batch.bad_rows[-1].message}")
        return new


def batches(sources: Sources, config: Config, tokenizer: Tokenizer, first_sample: int, samples: int) -> Iterator[Batch]:
    """Batches of `train.global_batch` rows for the samples `first_sample` … `first_sample + samples - 1` of the run.

    The stream depends on (seed, configuration, index) alone: the number of workers changes only the speed. The last
    batch is padded by going on in the order, so that every batch is whole.
    """
    size = config.train.global_batch
    count = -(-samples // size)
    dataset = (
        grain.MapDataset.range(first_sample, first_sample + count * size)
        .map(SampleMaker(sources, config, tokenizer))
        .batch(size, batch_fn=_collate)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    )
    if config.data.workers:
        # Grain's workers read absl flags, which only absl's own main would have parsed.
        flags.FLAGS.mark_as_parsed()
        # The semaphores of workers that were killed are cleaned up, which is nothing to warn about.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        options = grain.MultiprocessingOptions(num_workers=min(config.data.workers, count), per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_become_worker)
    stream = iter(dataset)
    if config.data.workers:
        _STREAMS.append(stream)
    return stream


def _become_worker(index: int, count: int) -> None:
    """Leaves signals to the main process, which saves and then closes its workers; ends with it, however it ends.

    A terminal's Ctrl-C and a scheduler's SIGTERM reach the whole process group: a worker that died of one would leave
    the main process waiting for its batch.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process within a second of its parent."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
