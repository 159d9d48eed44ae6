"""Compiled programs are kept, found again, bounded in size, and never the reason why a run fails."""

import json
import os
import socket
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from neva_jax import train
from neva_jax.compile_cache import prune, use_compile_cache
from neva_jax.errors import UserError

ROOT = Path(__file__).parent.parent
PREFIX = "/jax/compilation_cache/"


@pytest.fixture(autouse=True)
def the_sessions_cache_afterwards() -> Iterator[None]:
    """In a test, programs are kept that compile in no time; afterwards all is as before."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update(names[1], 0.0)
    yield
    for name in names:
        jax.config.update(name, before[name])
    compilation_cache.reset_cache()


@pytest.fixture
def events() -> Iterator[Counter]:
    """How often JAX asked its cache, found a program, and wrote one."""
    counts: Counter = Counter()

    def count(event: str, **_) -> None:
        if event.startswith(PREFIX):
            counts[event.removeprefix(PREFIX)] += 1

    jax.monitoring.register_event_listener(count)
    yield counts
    jax.monitoring.unregister_event_listener(count)


def programs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


def test_the_second_start_compiles_nothing_and_damage_costs_only_time(small_overrides, events, monkeypatch, tmp_path):
    folder = tmp_path / "compiled"
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def start(name: str) -> list[dict]:
        """Metrics of a run by a process that has compiled nothing yet."""
        jax.clear_caches()
        events.clear()
        settings = ["train.steps=2", "checkpoint.every=2", f"run.compile_cache={folder}", f"run.dir={tmp_path / name}"]
        assert train.main([*small_overrides, *settings]) == 0
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{key: row[key] for key in ("step", "loss", "grad_norm", "val_loss") if key in row} for row in rows]

    first = start("first")
    assert events["cache_misses"] == len(programs(folder)) > 3
    assert events["cache_hits"] < events["compile_requests_use_cache"]

    assert start("second") == first
    assert events["cache_hits"] == events["compile_requests_use_cache"] > 3
    assert events["cache_misses"] == 0

    # A disk that was full, a process that was killed as it wrote, and one that flips bits.
    for number, path in enumerate(programs(folder)):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
        path.write_bytes([b"", whole[:middle], flipped][number % 3])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert start("third") == first
    assert events["cache_hits"] == 0


def test_off_keeps_nothing(tmp_path):
    use_compile_cache(str(tmp_path / "compiled"))
    use_compile_cache("off")
    jax.jit(lambda x: x * 3.25)(1.0)
    assert programs(tmp_path / "compiled") == []


def test_the_default_is_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_compile_cache()
    jax.jit(lambda x: x * 3.25)(1.0)
    assert len(programs(tmp_path / "neva_jax" / "compiled")) >= 1
    assert (tmp_path / "neva_jax" / "compiled").stat().st_mode & 0o077 == 0
    assert all(path.name.endswith("-cache") for path in (tmp_path / "neva_jax" / "compiled").iterdir())


def test_jaxs_own_variable_is_respected_unless_a_folder_is_configured(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jaxs"))
    use_compile_cache()
    jax.jit(lambda x: x * 4.25)(1.0)
    assert len(programs(tmp_path / "jaxs")) >= 1
    use_compile_cache(str(tmp_path / "ours"))
    jax.jit(lambda x: x * 5.25)(1.0)
    assert len(programs(tmp_path / "ours")) >= 1


def test_a_default_folder_that_cannot_be_used_is_a_warning(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of JAX, at every program
        use_compile_cache()
        jax.jit(lambda x: x * 6.25)(1.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'file' / 'neva_jax' / 'compiled'}: cannot be written to (")
    assert line.endswith("compiled programs are not kept (run.compile_cache)")


def test_a_configured_folder_that_cannot_be_used_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        use_compile_cache(str(tmp_path / "file"))
    assert str(error.value).startswith(f"run.compile_cache={tmp_path / 'file'}: cannot be written to (")
    assert str(error.value).endswith("name another folder, or off")


def test_what_was_not_used_for_longest_goes_first_and_nothing_else_goes(tmp_path):
    names = [f"jit_step-{number:064x}-cache" for number in range(4)]
    for age, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - 500))  # last read; written
    os.utime(tmp_path / names[3], (1e9 - 3, 1e9 + 1))  # not read since, on a file system that does not record it
    others = ["thesis.txt", "model-cache", f"{0:064x}-cache.txt"]
    for name in others:
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, (1, 1))
    prune(tmp_path, 400)
    assert {path.name for path in tmp_path.iterdir()} == {*names, *others}
    prune(tmp_path, 250)
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[3], *others}


# Twenty programs; with two processes, each of them must come to the same decision.
PROGRAM = """
import sys
import jax
number, count, address, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if count > 1:
    jax.distributed.initialize(address, count, number)
from neva_jax.compile_cache import use_compile_cache
use_compile_cache(folder or None)
print(jax.config.jax_compilation_cache_dir)
print([float(jax.jit(lambda x: (x * 1.1) ** n)(1.5)).hex() for n in range(20)])
"""


def at_once(count: int, address: str, folder: str, environments: list[dict[str, str]]) -> list[tuple[list[str], str]]:
    """(lines of stdout, stderr) of PROGRAM in processes that run at the same time."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), str(count), address, folder],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": "", **changes},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, changes in enumerate(environments)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return [([line for line in out.splitlines() if "[Gloo]" not in line], err) for out, err in outputs]


def test_two_runs_at_once_share_a_folder(tmp_path):
    folder = tmp_path / "compiled"
    outputs = at_once(1, "", str(folder), [{}, {}])
    assert [out for out, _ in outputs] == [[str(folder), outputs[0][0][1]]] * 2
    assert len(programs(folder)) >= 18
    (again,) = at_once(1, "", str(folder), [{}])
    assert again == (outputs[0][0], "")


@pytest.mark.parametrize("shared", [True, False])
def test_processes_of_one_run_use_a_folder_only_if_all_see_it(shared, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    folders = [tmp_path / "a", tmp_path / ("a" if shared else "b")]
    environments = [{"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(folder)} for folder in folders]
    outputs = at_once(2, address, "", environments)
    used = str(tmp_path / "a" / "neva_jax" / "compiled") if shared else "None"
    assert [out[0] for out, _ in outputs] == [used] * 2
    assert outputs[0][0] == outputs[1][0]
    assert ("another process does not see" in outputs[0][1]) is not shared
    assert "warning" not in outputs[1][1]
