"""Batches from workers to the main process, through memory that both see.

Grain sends what a worker makes through a pipe: pickled, and read 64 KiB at a time by the main process, which is busy
with nothing else where there are many workers. So the arrays take another way, and only the rest goes through the pipe:

    file   in use [workers, PLACES] u8 | entered [workers] u8 | place 0 of worker 0 | place 1 of worker 0 | …

A worker writes the arrays of a batch into its first place that is not in use. The main process copies them out when it
is the batch's turn, which makes the place free again. The file has no name any more once all have opened it.
"""

import functools
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neva_jax.errors import ends_with, forget

BUFFER = 2  # batches that Grain holds for a worker in its queue, and as many again in the main process
PLACES = 2 * BUFFER + 4  # those, and one each that is written, sent, received, copied: a worker never waits for a place
SHARED = "/dev/shm"
ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Parcel:
    """What goes through the pipe: the batch without its arrays, and where and what those are."""

    batch: Any
    worker: int
    place: int
    arrays: dict[str, tuple[np.dtype, tuple[int, ...]]]


class Transport:
    """The shared memory of all workers; picklable. A batch is a dataclass with a field `arrays`: name -> array."""

    def __init__(self, workers: int, size: int, path: str | None = None):
        """`size`: bytes of the largest batch. `path`: of a file that is there; None: a new one is made."""
        self.workers, self.path, self._own = workers, path, 0
        # Each array begins at a multiple of ALIGNMENT, so do the places.
        self.size = -(-size // ALIGNMENT) * ALIGNMENT + 16 * ALIGNMENT
        head = -(-workers * (PLACES + 1) // ALIGNMENT) * ALIGNMENT
        total = head + workers * PLACES * self.size
        if path is None:
            handle, self.path = tempfile.mkstemp(prefix="neva_jax-batches-", dir=_folder(total))
            os.ftruncate(handle, total)  # memory is taken where it is written
            os.close(handle)
            ends_with(self, self.path)
        content = np.memmap(self.path, np.uint8, "r+", shape=(total,)).view(np.ndarray)
        self._used = content[: workers * PLACES].reshape(workers, PLACES)
        self._entered = content[workers * PLACES :][:workers]
        self._places = content[head:].reshape(workers, PLACES, self.size)
        self._given = size

    def __reduce__(self) -> tuple:
        return _opened, (self.workers, self._given, self.path)

    def enter(self, worker: int) -> None:
        """The calling process is worker `worker` from now on."""
        self._own = worker
        self._entered[worker] = 1

    def put(self, batch: Any) -> Parcel:
        """In a worker: writes a batch's arrays into a free place."""
        while self._used[self._own].all():
            time.sleep(0.001)
        place = int(self._used[self._own].argmin())
        arrays = {name: (array.dtype, array.shape) for name, array in batch.arrays.items()}
        for name, view in self._views(self._own, place, arrays).items():
            np.copyto(view, batch.arrays[name], casting="no")
        self._used[self._own, place] = 1
        return Parcel(replace(batch, arrays={}), self._own, place, arrays)

    def take(self, parcel: Parcel) -> Any:
        """In the main process: the batch with its arrays, whose place is then free."""
        if self.path is not None and self._entered.all():
            forget(self.path)
            self.path = None
        views = self._views(parcel.worker, parcel.place, parcel.arrays)
        arrays = {name: view.copy() for name, view in views.items()}
        self._used[parcel.worker, parcel.place] = 0
        return replace(parcel.batch, arrays=arrays)

    def _views(self, worker: int, place: int, arrays: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, Any]:
        content, at, views = self._places[worker, place], 0, {}
        for name, (dtype, shape) in arrays.items():
            end = at + dtype.itemsize * int(np.prod(shape))
            if end > self.size:
                raise ValueError(f"a batch of more than {self._given} bytes: {arrays}")
            views[name] = content[at:end].view(dtype).reshape(shape)
            at = -(-end // ALIGNMENT) * ALIGNMENT
        return views


@functools.cache
def _opened(workers: int, size: int, path: str | None) -> Transport:
    """A worker's: one, however often it is sent to it, and still there when the file has no name any more."""
    return Transport(workers, size, path)


def _folder(size: int) -> str:
    """Where the file lies: in memory, unless that is small, as in containers (Docker's has 64 MB unless told)."""
    if os.path.isdir(SHARED) and os.access(SHARED, os.W_OK) and shutil.disk_usage(SHARED).free > 2 * size:
        return SHARED
    return tempfile.gettempdir()
