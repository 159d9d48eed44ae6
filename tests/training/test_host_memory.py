"""XLA's limit for pinned memory: from the machine's or the container's memory, and never against the user."""

import pytest

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
