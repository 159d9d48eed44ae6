"""XLA's limit for pinned memory: from the machine's or the container's memory, and never against the user."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from neva_jax.parallel.mesh import make_mesh
from neva_jax.training import host_memory
from neva_jax.training.checkpoint import Checkpoints

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


@pytest.fixture
def taken(monkeypatch):
    """What a reservation takes, as if the devices were GPUs: bytes of each block, and whether it is on the host."""
    blocks = []
    put = jax.device_put

    def record(array, sharding):
        blocks.append((array.nbytes, sharding.memory_kind))
        return put(array, sharding)

    monkeypatch.setattr(host_memory.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(host_memory.jax, "device_put", record)
    return blocks


def test_a_reservation_takes_what_a_save_copies(taken):
    arrays = sharded(*SPLITS)
    taken.clear()
    reservation = host_memory.Reservation(arrays)
    reservation.wait()
    assert sum(size for size, _ in taken) == sum(array.nbytes for array in arrays)
    assert {kind for _, kind in taken} == {"pinned_host"}


def test_nothing_is_taken_without_a_gpu(monkeypatch):
    monkeypatch.setattr(host_memory.jax, "device_put", lambda *_: pytest.fail("memory was taken"))
    host_memory.Reservation([jax.numpy.zeros(4)]).wait()


def test_memory_that_cannot_be_had_is_left_to_the_save(taken, monkeypatch):
    def refuse(*_):
        taken.append(None)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory")

    arrays = sharded(P())
    taken.clear()
    monkeypatch.setattr(host_memory.jax, "device_put", refuse)
    host_memory.Reservation(arrays).wait()
    assert taken == [None]


def test_a_reservation_that_is_closed_takes_no_more(taken, monkeypatch):
    arrays, put, first, go_on = sharded(P()), host_memory.jax.device_put, threading.Event(), threading.Event()
    taken.clear()

    def slow(*arguments):
        first.set()
        assert go_on.wait(60)
        return put(*arguments)

    monkeypatch.setattr(host_memory.jax, "device_put", slow)
    reservation = host_memory.Reservation(arrays)
    assert first.wait(60)
    reservation._unwanted.set()
    go_on.set()
    reservation.close()
    assert len(taken) == 1


def test_the_first_save_waits_for_its_memory_and_a_run_that_ends_does_not(tmp_path, monkeypatch):
    order = []

    class Slow(host_memory.Reservation):
        def wait(self):
            super().wait()
            order.append("wait")

        def close(self):
            super().close()
            order.append("close")

    monkeypatch.setattr("neva_jax.training.checkpoint.Reservation", Slow)
    with pytest.raises(RuntimeError, match="cannot be saved"), Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.reserve([jax.numpy.zeros(4)])
        (tmp_path / "checkpoints" / "7").mkdir()
        checkpoints.save(3, {}, {}, {}, None)
    assert order == ["wait", "close"]
