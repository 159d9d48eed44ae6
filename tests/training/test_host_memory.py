"""Pinned memory: how much XLA may take, never against the user; and taking it before the first save."""

import threading
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from neva_jax.parallel.mesh import make_mesh
from neva_jax.training import host_memory

GIB = 2**30


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """limit(GiB of the machine, content of the container's file, environment) -> the environment afterwards."""

    def limit(gib, container=None, environment=None):
        monkeypatch.setattr(host_memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gib * GIB // 4096}.get)
        if container is not None:
            (tmp_path / "memory.max").write_text(container)
        environment = {} if environment is None else environment
        host_memory.allow_large_saves(environment, tmp_path)
        return environment

    return limit


@pytest.mark.parametrize(
    ("gib", "container", "expected"),
    [(256, None, "204"), (256, "max\n", "204"), (256, f"{100 * GIB}\n", "80"), (2048, f"{2**63 - 4096}\n", "1638")],
)
def test_most_of_the_memory_that_is_ours(machine, gib, container, expected):
    assert machine(gib, container) == {host_memory.LIMIT: expected}


@pytest.mark.parametrize(("gib", "container"), [(64, None), (256, f"{32 * GIB}")])
def test_xlas_own_limit_is_not_lowered(machine, gib, container):
    assert machine(gib, container) == {}


def test_a_limit_that_is_set_stands(machine):
    assert machine(256, None, {host_memory.LIMIT: "16"}) == {host_memory.LIMIT: "16"}


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_of_all_groups_around_a_process(tmp_path, version):
    top = tmp_path / "memory" if version == 1 else tmp_path
    name = {1: "memory.limit_in_bytes", 2: "memory.max"}[version]
    (top / "slurm" / "job_7" / "step_0").mkdir(parents=True)
    (top / "slurm" / "job_7" / name).write_text(f"{100 * GIB}")
    (top / "slurm" / "job_7" / "step_0" / name).write_text(f"{2**63 - 4096}" if version == 1 else "max")
    own = tmp_path / "own"
    own.write_text("4:cpu:/other\n" + {1: "3:memory:", 2: "0::"}[version] + "/slurm/job_7/step_0\n")
    found = [host_memory._limit(file) for file in host_memory._files(tmp_path, own)]
    assert min(found) == 100 * GIB
    assert len([limit for limit in found if limit < float("inf")]) == (2 if version == 1 else 1)


def test_this_machine_can_be_asked():
    environment = {}
    host_memory.allow_large_saves(environment)
    assert int(environment.get(host_memory.LIMIT, 65)) > host_memory.DEFAULT_GIB


SPLITS = [P(), P("fsdp"), P("fsdp", "tensor"), P(None, ("data", "fsdp", "tensor"))]


def sharded(*splits):
    """Zeros [8, 16], one array for each split."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    return [jax.device_put(np.zeros((8, 16), np.float32), NamedSharding(mesh, split)) for split in splits]


@pytest.mark.parametrize("split", SPLITS)
def test_each_device_copies_its_share_of_what_it_holds(split):
    (array,) = sharded(split)
    copies = 1 + max(shard.replica_id for shard in array.addressable_shards)
    expected = {shard.device: shard.data.nbytes // copies for shard in array.addressable_shards}
    assert dict(host_memory.copied_blocks([array])) == expected
    assert sum(expected.values()) == array.nbytes


def test_the_largest_first_and_what_does_not_divide_rounded_up():
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    small = jax.ShapeDtypeStruct((3,), np.float32, sharding=NamedSharding(mesh, P()))
    number = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, P()))
    large = jax.ShapeDtypeStruct((64, 2), np.float16, sharding=NamedSharding(mesh, P("data")))
    sizes = [size for _, size in host_memory.copied_blocks({"a": small, "b": number, "c": large})]
    assert sizes == [8 * 2 * 2] * 8 + [4] * 16


class Taken:
    """What a reservation takes, as if the devices were GPUs: size and place of each block, and how many it held."""

    def __init__(self, monkeypatch):
        self.blocks, self.held, self._kept, self._put = [], [], [], jax.device_put
        monkeypatch.setattr(host_memory.jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(host_memory.jax, "device_put", self)

    def __call__(self, array, sharding):
        self.held.append(sum(kept() is not None for kept in self._kept))
        self.blocks.append((array.nbytes, sharding.memory_kind))
        block = self._put(array, sharding)
        self._kept.append(weakref.ref(block))
        return block


def test_a_reservation_takes_what_a_save_copies_all_together(monkeypatch):
    arrays = sharded(*SPLITS)
    taken = Taken(monkeypatch)
    with host_memory.Reservation(arrays) as reservation:
        reservation.wait()
    assert sum(size for size, _ in taken.blocks) == sum(array.nbytes for array in arrays)
    assert {kind for _, kind in taken.blocks} == {"pinned_host"}
    assert taken.held == list(range(len(taken.blocks)))
    assert reservation.said == ""  # it took no time


def test_nothing_is_taken_without_a_gpu(monkeypatch):
    arrays, puts = sharded(*SPLITS), []
    monkeypatch.setattr(host_memory.jax, "device_put", lambda *given: puts.append(given))
    with host_memory.Reservation(arrays) as reservation:
        reservation.wait()
    assert puts == []


def test_what_takes_long_is_said(monkeypatch):
    arrays = sharded(P())
    Taken(monkeypatch)
    monkeypatch.setattr(host_memory, "WORTH_SAYING", 0.0)
    with host_memory.Reservation(arrays) as reservation:
        reservation.wait()
    assert reservation.said == "pinned 0.0 MiB of host memory for saves in 0 s"


def test_memory_that_cannot_be_had_is_said(monkeypatch):
    arrays, calls = sharded(P()), []

    def refuse(array, sharding):
        calls.append(None)
        if len(calls) == 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory")
        return taken(array, sharding)

    taken = Taken(monkeypatch)
    monkeypatch.setattr(host_memory.jax, "device_put", refuse)
    monkeypatch.setattr(host_memory, "readable", str)
    with host_memory.Reservation(arrays) as reservation:
        reservation.wait()
    assert len(calls) == 3
    assert reservation.said.startswith("only 128 of the 512 of host memory that a save copies to could be pinned (")
    assert "Out of host memory" in reservation.said


@pytest.fixture
def slow(monkeypatch):
    """(its first block is asked for, it gets it, what was taken) of a reservation of 8 blocks."""
    arrays, first, go_on = sharded(P()), threading.Event(), threading.Event()
    taken = Taken(monkeypatch)

    def put(*given):
        first.set()
        go_on.wait(30)
        return taken(*given)

    monkeypatch.setattr(host_memory.jax, "device_put", put)
    return arrays, first, go_on, taken


def test_on_the_way_out_no_more_is_taken(slow):
    arrays, first, go_on, taken = slow
    reservation = host_memory.Reservation(arrays)
    assert first.wait(30)
    leaving = threading.Thread(target=reservation.__exit__, args=(None, None, None))
    leaving.start()
    assert reservation._unwanted.wait(30)
    assert leaving.is_alive()  # the block under way is waited for
    go_on.set()
    leaving.join(30)
    assert len(taken.blocks) == 1


def test_waiting_ends_where_a_stop_is_asked_for(slow):
    arrays, first, go_on, taken = slow
    with host_memory.Reservation(arrays) as reservation:
        reservation.wait(unless=first.is_set)
        assert taken.blocks == []
        go_on.set()
        reservation.wait()
        assert len(taken.blocks) == 8
