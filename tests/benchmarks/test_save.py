"""The lines of `bench save`: all fields are there and agree with each other. Nothing here is timed."""

import json

import pytest

from neva_jax import bench
from neva_jax.errors import UserError

FIELDS = """bench impl state model mesh device arrays state_bytes bytes reserve_s blocked_ms blocked_ms_max
    blocked_ms_first total_s total_s_first restore_s verify_s repeats cpu cores load versions date"""


def test_a_line_for_each_state(capsys, tmp_path):
    assert bench.main(["save", "--repeats", "1", "--mesh-shape", "fsdp=8", "--dir", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["state"] for line in lines] == ["projector", "full"]
    for line in lines:
        assert set(line) == set(FIELDS.split())
        assert line["mesh"] == "data=1,fsdp=8,tensor=1"
        assert 0 < line["blocked_ms"] <= line["blocked_ms_max"] <= line["total_s"] * 1000
        assert line["bytes"] > 0.8 * line["state_bytes"]
    # Projector: kernels 32 x 64 and 64 x 64, biases 2 x 64; three times (Adam), and the moments' and schedule's counts.
    assert lines[0]["state_bytes"] == 3 * 4 * (32 * 64 + 64 * 64 + 2 * 64) + 2 * 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--states", "all"], "--states all: all is none of projector, full"),
        (["--repeats", "-1"], "--repeats -1: must be at least 0"),
        (["--dir", "/nope"], "--dir /nope: no such directory"),
        (["model.llm.layers=1"], "override model.llm.layers: unknown key model.llm.layers"),
    ],
)
def test_wrong_usage(flags, message):
    with pytest.raises(UserError) as caught:
        bench.main(["save", *flags])
    assert str(caught.value).startswith(message)
