"""Who trains in a directory: a second run, locks that were left, locks and directories that go away."""

import errno
import json
import os
import re
import socket

import pytest

from neva_jax.errors import UserError
from neva_jax.training import run_lock
from neva_jax.training.run_lock import NAME, STALE, RunLock
from tests.faults.conftest import checkpoints
from tests.faults.test_signals import at_step_3

GONE = {"pid": 2**22 + 1, "since": "2024-11-24T10:00:00+00:00"}  # no process has a larger number than 2^22


def left(run_dir, host, begun, age=0.0):
    """A lock as another run left it, `age` seconds ago."""
    run_dir.mkdir(exist_ok=True)
    path = run_dir / NAME
    path.write_text(json.dumps({"host": host, "begun": begun, **GONE}))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return path


def test_the_second_run_names_the_first_and_leaves_it_alone(run, tmp_path):
    with RunLock(tmp_path / "run") as lock:
        before = lock.path.read_bytes()
        second = run()
        assert second.status == 2, second.stderr
        since = json.loads(before)["since"]
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {since}, trains there"
        assert f"run.dir={tmp_path / 'run'}: {holder}; stop it, or name another run.dir" in second.stderr
        assert lock.path.read_bytes() == before
        assert os.listdir(tmp_path / "run") == [NAME]
        lock.look()
        assert lock.lost is None
    assert not (tmp_path / "run").exists()


def test_the_lock_of_a_process_that_is_gone_is_taken_over(run, tmp_path):
    left(tmp_path / "run", socket.gethostname(), run_lock._begun(os.getpid()))
    finished = run("train.steps=2")
    assert finished.status == 0, finished.stderr
    assert f"left by process {GONE['pid']} on {socket.gethostname()}, since {GONE['since']},; " in finished.stderr
    assert "that process is gone, the lock is taken over" in finished.stderr
    assert not (finished.dir / NAME).exists()


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no flock"])
def test_the_lock_of_another_host_counts_as_long_as_it_beats(locks, tmp_path, monkeypatch, capsys):
    if not locks:
        _without_flock(monkeypatch)
    left(tmp_path / "run", "elsewhere", "boot-1", STALE - 20)
    with pytest.raises(UserError, match=rf"on elsewhere, .*sign of life is 4\d s old, and counts for {STALE:.0f} s"):
        RunLock(tmp_path / "run").__enter__()
    path = left(tmp_path / "run", "elsewhere", "boot-1", STALE + 20)
    with RunLock(tmp_path / "run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert re.search(r"left by process \d+ on elsewhere.* 8\d s old, the lock is taken over", capsys.readouterr().err)


def _without_flock(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)


def test_without_flock_the_process_decides_on_its_own_host(tmp_path, monkeypatch):
    _without_flock(monkeypatch)
    with RunLock(tmp_path / "run"), pytest.raises(UserError, match=f"process {os.getpid()} on "):
        RunLock(tmp_path / "run").__enter__()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b'{"pid": "x"}'])
def test_a_lock_that_says_nothing_is_taken(content, tmp_path):
    (tmp_path / NAME).write_bytes(content)
    os.utime(tmp_path / NAME, (0, 0))
    with RunLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


QUICK = "from neva_jax.training import run_lock; run_lock.BEAT = 0.05\nimport json\n"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("os.unlink('{run}/run.lock')", "run.lock: was taken away"),
        ("os.rename('{run}', '{run}.gone')", "taken away|is gone"),  # the plot may have made it again
        (
            "open('{run}/run.lock', 'w').write(json.dumps(dict(pid=7, host='elsewhere', since='now')))",
            "run: was taken over by process 7 on elsewhere, since now,",
        ),
    ],
    ids=["lock deleted", "directory gone", "taken over"],
)
def test_a_run_that_lost_its_directory_stops(damage, reason, run, tmp_path):
    damage = damage.format(run=tmp_path / "run")
    before = QUICK + at_step_3(f"{damage}; time.sleep(0.5)")
    stopped = run("checkpoint.every=2", before=before)
    assert stopped.status == 1, stopped.stderr
    (error,) = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(reason, error)
    assert error.endswith("; stopped after step 3")
    if "rename" not in damage:
        assert stopped.steps == [2]
    if "elsewhere" in damage:
        assert (stopped.dir / NAME).exists()  # the other's


def test_a_directory_that_is_gone_is_told_as_such(tmp_path):
    with RunLock(tmp_path / "run") as lock:
        os.rename(tmp_path / "run", tmp_path / "moved")
        lock.look()
        assert lock.lost == f"run.dir={tmp_path / 'run'}: is gone (deleted, or no longer mounted)"


def test_a_directory_that_cannot_be_written_to(run, tmp_path):
    """Also for root, whom modes do not stop: the system says that the disk is read-only."""
    before = """
import errno, os
real = os.open
def open_(path, flags, *more, **named):
    if flags & os.O_CREAT and str(path).endswith("run.lock"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    return real(path, flags, *more, **named)
os.open = open_
"""
    refused = run(before=before)
    assert refused.status == 2, refused.stderr
    assert f"run.dir={tmp_path / 'run'}: cannot be written to (Read-only file system)" in refused.stderr
    assert checkpoints(tmp_path / "run") == []
    (tmp_path / "file").write_text("")
    refused = run(name="file")
    assert refused.status == 2, refused.stderr
    assert f"{tmp_path / 'file'} is a file; name a directory" in refused.stderr
