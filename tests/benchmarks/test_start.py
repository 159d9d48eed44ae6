"""The lines of `bench start`: what the log of real runs said. Nothing here is timed."""

import json

import pytest

from neva_jax import bench
from neva_jax.benchmarks import batches
from neva_jax.benchmarks.train import TINY
from neva_jax.errors import UserError

SMALL = [*TINY, "data.max_length=96", "train.micro_batch=2", "train.global_batch=2", "mesh.shape=data=1"]


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """One device, and few small photographs."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(batches, "PHOTOGRAPHS", 4)
    monkeypatch.setattr(batches, "SOURCE_SIZE", (64, 48))


def start(tmp_path, *flags) -> int:
    config = tmp_path / "config.yaml"
    config.write_text("model: {vision: {freeze: true}, llm: {freeze: true}}\ndata: {template: plain}\n")
    return bench.main(["start", "--config", str(config), "--dir", str(tmp_path), *SMALL, *flags])


def test_a_cold_start_and_a_warm_one(tmp_path, capsys):
    assert start(tmp_path, "--repeats", "1") == 0
    cold, warm = map(json.loads, capsys.readouterr().out.splitlines())
    assert (cold["cache"], warm["cache"]) == ("cold", "warm")
    for line in (cold, warm):
        assert 0 <= line["first_step_s"] < line["start_to_first_step_s"]
        assert (line["stage"], line["mesh"], line["device"]) == ("pretrain", "data=1,fsdp=1,tensor=1", "cpu")
        assert line["checkpoint_bytes"] > 2 * line["layers"] * 3 * 64 * 160  # bf16: gate, up and down alone
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "--repeats must be above 0, not 0"),
        (["--dir", "/nope"], "--dir /nope: no such directory"),
        (["--limit", "0.3"], r"train took more than 0\.3 s \(--limit\):"),
        (["model.llm.layers=1"], r"override model\.llm\.layers: unknown key"),
        (["mesh.shape=data=7"], r"train ended with [\s\S]*data=7"),
    ],
)
def test_wrong_usage(flags, message, tmp_path):
    with pytest.raises(UserError, match=f"^{message}"):
        start(tmp_path, *flags)
