"""A training process that is watched: `python -m tests.parallel.several FOLDER [section.key=value ...]`.

What it does is written to FOLDER: `rows-I.txt` has a line for each image that process I reads: the number in the run of
the row that it is for, and the image; `files-I.txt` each file that it opens to write; `restored-I.npz` what lies on its
devices after a restore. SIGNAL=I:STEP:NUMBER sends itself a signal, in process I, before the batch of a step.
"""

import faulthandler
import os
import sys
import threading
from pathlib import Path

import jax
import numpy as np

from neva_jax import train
from neva_jax.data.pipeline import SampleMaker
from neva_jax.data.sources import Sources
from neva_jax.errors import exit_with
from neva_jax.training.checkpoint import Checkpoints

HANGS = 200  # seconds after which it shows where its threads are, and ends
FOLDER, INDEX = Path(sys.argv[1]), os.environ["JAX_PROCESS_ID"]
_row = threading.local()


def watch_rows() -> None:
    make, read = SampleMaker.__call__, Sources.read_image

    def make_row(self, index):
        _row.index = index if self.sources.split == "train" else -1
        return make(self, index)

    def read_image(self, ref, name, field="image"):
        if _row.index >= 0:
            with (FOLDER / f"rows-{INDEX}.txt").open("a") as file:
                file.write(f"{_row.index} {name}\n")
        return read(self, ref, name, field)

    SampleMaker.__call__, Sources.read_image = make_row, read_image


def watch_files() -> None:
    out = (FOLDER / f"files-{INDEX}.txt").open("a", buffering=1)

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            out.write(f"{arguments[0]}\n")

    sys.addaudithook(hook)


def watch_restore() -> None:
    restore = Checkpoints.restore

    def restore_and_tell(self, *arguments, **settings):
        restored = restore(self, *arguments, **settings)
        shards = {}
        for path, array in jax.tree_util.tree_leaves_with_path({"params": restored[0], "optimizer": restored[1]}):
            for shard in array.addressable_shards:
                place = ",".join(f"{part.start or 0}:{part.stop or ''}" for part in shard.index)
                shards[f"{jax.tree_util.keystr(path)}|{place}"] = np.asarray(shard.data)
        np.savez(FOLDER / f"restored-{INDEX}.npz", **shards)
        return restored

    Checkpoints.restore = restore_and_tell


def send_signal() -> None:
    if "SIGNAL" not in os.environ:
        return
    process, step, number = os.environ["SIGNAL"].split(":")
    real, calls = train.Meter.next, []

    def next_batch(self, stream):
        calls.append(None)
        if process == INDEX and len(calls) == int(step):
            os.kill(os.getpid(), int(number))
        return real(self, stream)

    train.Meter.next = next_batch


if __name__ == "__main__":
    faulthandler.dump_traceback_later(HANGS, exit=True)
    watch_rows()
    watch_files()
    watch_restore()
    send_signal()
    exit_with(lambda: train.main(sys.argv[2:]))
