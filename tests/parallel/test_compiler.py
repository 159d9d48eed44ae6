"""Which options of XLA's compiler a run sets."""

import dataclasses
from types import SimpleNamespace

import pytest

from neva_jax.config import Config, MeshConfig, PrecisionConfig, TrainConfig
from neva_jax.parallel import compiler
from neva_jax.parallel.compiler import HALVES_APART, NO_TRITON_PRODUCTS, WEIGHTS_TOGETHER, compiler_options

LOOP = Config(train=TrainConfig(unroll=1), precision=PrecisionConfig(compute="bf16"))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(compiler, "target_devices", lambda: [SimpleNamespace(platform="gpu")])


def test_another_compiler_is_told_nothing():
    assert compiler_options(dataclasses.replace(LOOP, mesh=MeshConfig(overlap=True)), fsdp=2) is None


@pytest.mark.parametrize(
    ("changes", "fsdp", "expected"),
    [
        ({}, 1, {}),
        ({"train": TrainConfig(unroll=2)}, 1, NO_TRITON_PRODUCTS),
        ({"precision": PrecisionConfig(compute="fp8_current")}, 1, NO_TRITON_PRODUCTS),
        ({"mesh": MeshConfig(overlap=True)}, 1, HALVES_APART),
        ({}, 2, WEIGHTS_TOGETHER),
        (
            {"precision": PrecisionConfig(compute="fp8_delayed"), "mesh": MeshConfig(overlap=True)},
            4,
            NO_TRITON_PRODUCTS | HALVES_APART | WEIGHTS_TOGETHER,
        ),
    ],
)
def test_what_a_run_sets(gpu, changes, fsdp, expected):
    assert compiler_options(dataclasses.replace(LOOP, **changes), fsdp) == expected


def test_what_the_user_sets_stays(gpu, monkeypatch):
    config = dataclasses.replace(LOOP, mesh=MeshConfig(overlap=True))
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_all_gather_combine_threshold_bytes=1")
    assert compiler_options(config, fsdp=2) == HALVES_APART
