"""The cache folder: keys of what files hold, entries that are whole, several processes at once."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neva_jax.data.cache import cache_folder, cached, cached_array, file_key, open_regular
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
