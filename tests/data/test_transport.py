"""Batches through shared memory: equal, in any order of taking, and nothing is left behind.

That workers' batches are those of the main process alone is `test_pipeline.py`'s and `test_resume`'s."""

import gc
import pickle
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from neva_jax.data import transport
from neva_jax.data.transport import PLACES, Transport


@dataclass
class Thing:
    arrays: dict
    others: list = field(default_factory=list)


def thing(seed, shape=(3, 5)):
    rng = np.random.default_rng(seed)
    arrays = {"a": rng.integers(0, 9, shape, np.int32), "b": rng.random(shape), "c": rng.integers(0, 9, (7,), np.uint8)}
    return Thing(arrays, [seed])


def same(a, b):
    return a.others == b.others and all(
        a.arrays[name].dtype == b.arrays[name].dtype and np.array_equal(a.arrays[name], b.arrays[name])
        for name in a.arrays | b.arrays
    )


def test_what_is_taken_is_what_was_put():
    ours = Transport(2, 1000)
    theirs = Transport(*pickle.loads(pickle.dumps(ours)).__reduce__()[1])
    theirs.enter(1)
    rng = np.random.default_rng(0)
    waiting = []
    for seed in range(200):
        if waiting and (len(waiting) == PLACES or rng.random() < 0.5):
            parcel, wanted = waiting.pop(int(rng.integers(len(waiting))))
            assert same(ours.take(pickle.loads(pickle.dumps(parcel))), wanted)
        made = thing(seed, (int(rng.integers(0, 8)), 5))
        waiting.append((theirs.put(made), made))
    assert all(same(ours.take(parcel), wanted) for parcel, wanted in waiting)


def test_what_was_taken_stays_when_its_place_is_used_again():
    both = Transport(1, 1000)
    taken = [both.take(both.put(thing(seed))) for seed in range(3 * PLACES)]
    assert all(same(one, thing(seed)) for seed, one in enumerate(taken))


def test_a_batch_without_arrays():
    both = Transport(1, 1000)
    assert both.take(both.put(Thing({}, [3]))) == Thing({}, [3])


def test_a_batch_larger_than_said_is_no_silent_damage():
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        Transport(2, 1000).put(thing(0, (1000, 5)))


def test_the_file_has_no_name_once_all_have_opened_it():
    ours = Transport(2, 1000)
    path = Path(ours.path)
    first, second = (Transport(2, 1000, ours.path) for _ in range(2))
    first.enter(0)
    ours.take(first.put(thing(0)))
    assert path.exists()
    second.enter(1)
    assert same(ours.take(second.put(thing(1))), thing(1)) and not path.exists()
    assert same(ours.take(first.put(thing(2))), thing(2))


def test_a_file_that_nobody_opened_goes_with_its_transport():
    path = Path(Transport(1, 1000).path)
    gc.collect()
    assert not path.exists()


def test_where_shared_memory_is_small_the_file_lies_elsewhere(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    assert transport._folder(2**20) == transport.SHARED or not Path(transport.SHARED).is_dir()
    assert transport._folder(64 * 2**20) == tempfile.gettempdir()
