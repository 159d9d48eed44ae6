"""The cache folder: keys of what files hold, entries that are whole, several processes at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from neva_jax.data.cache import UNUSED_DAYS, cache_folder, cached, cached_array, file_key, open_regular, prune
from neva_jax.errors import UserError


def test_where_the_folder_is(monkeypatch):
    assert cache_folder("a/b") == Path("a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder(None) == Path("/x/neva_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_folder(None) == Path("/h/.cache/neva_jax")


def test_a_key_changes_with_size_time_head_and_tail(tmp_path):
    path = tmp_path / "a"
    content = bytearray(300_000)
    path.write_bytes(content)
    os.utime(path, ns=(5, 5))
    keys = [file_key(path)]

    def again(time=5):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        keys.append(file_key(path))

    again(time=6)
    content[10] = 1
    again()
    content[-10] = 1
    again()
    content.append(0)
    again()
    assert len(set(keys)) == 5
    path.rename(tmp_path / "b")
    assert file_key(tmp_path / "b") == keys[-1]
    assert file_key(tmp_path / "b", tmp_path / "b") not in keys


def test_files_that_have_no_key(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        "absent": "No such file or directory",
        "pipe": "no regular file",
        ".": "no regular file",
    }.items():
        with pytest.raises(UserError) as error:
            file_key(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: cannot be read ({reason})"


def test_a_device_is_not_opened():
    with pytest.raises(OSError, match="no regular file"):
        open_regular("/dev/zero")


def test_what_is_made_once_is_read_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return np.arange(5)

    for _ in range(3):
        np.testing.assert_array_equal(cached_array(tmp_path / "new" / "folder", "x", make), np.arange(5))
    assert made == [1]


def test_nothing_remains_of_what_failed(tmp_path):
    def fail(path):
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cached(tmp_path, "x", fail)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_array(tmp_path):
    for _ in range(2):
        assert cached_array(tmp_path, "x", lambda: np.zeros((0, 2), np.int64)).shape == (0, 2)


PROCESS = """
import sys
import time
from pathlib import Path
import numpy as np
from neva_jax.data.cache import cached_array
for i in range(30):
    assert cached_array(Path(sys.argv[1]), f"x{i}", lambda: np.full(100_000, i)).sum() == 100_000 * i
"""


def test_processes_may_make_the_same_entry_at_once(tmp_path):
    running = [subprocess.Popen([sys.executable, "-c", PROCESS, tmp_path]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"x{i}.npy" for i in range(30))


# --- what is taken away ----------------------------------------------------------------------------------------------

OLD = f"plan-{'0' * 16}-0.npy"
HOLDER = """
import sys
import time
from pathlib import Path
import numpy as np
from neva_jax.data.cache import cached_array
array = cached_array(Path(sys.argv[1]), sys.argv[2].removesuffix(".npy"), lambda: 1 / 0)
print("held", flush=True)
sys.stdin.read()
"""


def age(path, days):
    os.utime(path, (time.time() - days * 86400,) * 2)


def test_what_was_not_used_for_long_is_taken_away_and_said(tmp_path):
    names = {
        f"lengths-{'a' * 32}": True,
        f"plan-{'0123456789abcdef'}-12": True,
        f"ids-1-{'b' * 32}": True,
        f"rows-3-{'c' * 32}": True,
        f"tar-1-{'d' * 32}-table": True,
        f"parquet-1-{'e' * 32}-names": True,
        "another": False,
        "plan-of-mine": False,
    }
    for name in names:
        np.save(tmp_path / f"{name}.npy", np.zeros(4))
        age(tmp_path / f"{name}.npy", UNUSED_DAYS + 1)
    (tmp_path / f"unpacked-{'f' * 32}").write_bytes(b"x")
    np.save(tmp_path / f"plan-{'1' * 16}-0.npy", np.zeros(4))
    said = []
    prune(tmp_path, said.append)
    kept = {f"{name}.npy" for name, old in names.items() if not old}
    assert {path.name for path in tmp_path.iterdir()} == kept | {f"unpacked-{'f' * 32}", f"plan-{'1' * 16}-0.npy"}
    size = 6 * (128 + 4 * 8)
    assert said == [f"data.cache={tmp_path}: deleted 6 entries ({size} bytes) that were not used for 30 days"]
    prune(tmp_path, said.append)
    prune(tmp_path / "absent", said.append)
    assert len(said) == 1


def test_use_keeps_an_entry(tmp_path):
    cached_array(tmp_path, OLD.removesuffix(".npy"), lambda: np.zeros(4))
    age(tmp_path / OLD, UNUSED_DAYS + 1)
    cached_array(tmp_path, OLD.removesuffix(".npy"), lambda: 1 / 0)
    assert time.time() - (tmp_path / OLD).stat().st_mtime < 60


def test_what_another_process_has_in_use_stays_however_old(tmp_path):
    np.save(tmp_path / OLD, np.zeros(4))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path, OLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        age(tmp_path / OLD, UNUSED_DAYS + 1)
        prune(tmp_path, pytest.fail)
        assert (tmp_path / OLD).exists()
        other.communicate("")
    said = []
    prune(tmp_path, said.append)
    assert said and not (tmp_path / OLD).exists()


def test_an_entry_that_was_taken_away_is_made_again(tmp_path):
    for _ in range(2):
        cached_array(tmp_path, OLD.removesuffix(".npy"), lambda: np.zeros(4))
        (tmp_path / OLD).unlink()
    np.testing.assert_array_equal(cached_array(tmp_path, OLD.removesuffix(".npy"), lambda: np.ones(4)), np.ones(4))
