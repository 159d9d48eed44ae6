"""`bench attention`: right before fast."""

import json

import pytest

from neva_jax import bench
from neva_jax.benchmarks import attention
from neva_jax.errors import UserError

SMALL = ["attention", "--rows", "2", "--tokens", "24", "--heads", "4", "--kv-heads", "2", "--width", "8"]


def lines(capsys, *arguments):
    assert bench.main([*SMALL, *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(attention, "CALLS", 1)
    monkeypatch.setattr(attention, "REPEATS", 2)


def test_a_row_for_each_backend_and_number_of_segments(capsys):
    made = lines(capsys, "--backends", "xla,cudnn", "--segments", "1,5")
    assert [(row["backend"], row["segments"], "ms" in row) for row in made] == [
        ("xla", 1, True), ("cudnn", 1, False), ("xla", 5, True), ("cudnn", 5, False),
    ]  # fmt: skip
    assert 0 < made[0]["error"] < 1e-2 and 0 < made[2]["gradient_error"] < 1e-2  # bf16
    assert "cudnn masks causally only" in made[3]["error_text"]
    (row,) = lines(capsys, "--backends", "xla", "--dtype", "fp32", "--bidirectional")
    assert row["error"] < 1e-5 and not row["causal"]


def test_a_wrong_backend_is_not_timed(capsys, monkeypatch):
    real = attention.attend

    def leaky(*arguments, backend, causal, **more):
        return real(*arguments, causal=causal and backend != "cudnn", backend="xla", **more)

    monkeypatch.setattr(attention, "attend", leaky)
    (row,) = lines(capsys, "--backends", "cudnn")
    assert "ms" not in row and "wrong, so not timed" in row["error_text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--segments", "a"], "--segments a: write numbers"),
        (["--segments", "25"], "--segments 25: must be between 1 and --tokens 24"),
        (["--kv-heads", "3"], "--heads 4 is not divisible by --kv-heads 3"),
        (["--rows", "0"], "--rows must be at least 1"),
    ],
)
def test_bad_usage(arguments, message):
    with pytest.raises(UserError, match=message):
        bench.main([*SMALL, *arguments])
