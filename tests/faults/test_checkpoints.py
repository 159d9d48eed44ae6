"""Runs that are killed, checkpoints that are damaged, disks that refuse: what is left, and what comes of it.

What is about a process is a real one (`runs.py`); where a function is enough, it is called.
"""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from neva_jax.config import Config, RunConfig
from neva_jax.errors import RunError, UserError
from neva_jax.parallel.mesh import one_device_mesh, replicated
from neva_jax.training import checkpoint, disk
from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta, read_data, read_meta, verify
from neva_jax.training.disk import probe
from neva_jax.training.manifest import DamagedCheckpoint, files_of
from neva_jax.training.resume import resumed_meta, resumed_samples
from neva_jax.training.weights import load_components
from tests.faults.conftest import checkpoints as steps
from tests.faults.conftest import rows, state
from tests.faults.kills import kill

# Where the runs of the chain kill themselves; each comes one or two checkpoints further than the one before.
KILLS = [
    ("copied", 2),  # arrays copied, nothing written
    ("committed", 2),  # Orbax has written all, no manifest
    ("digesting", 25),  # in the middle of the manifest's digests
    ("manifest", 2),  # manifest there, name not
    ("named", 1),  # complete; older ones not deleted yet
    ("deleting", 1),  # an older one half deleted
    ("validating", 1),  # after the first batch of a validation
    ("validated", 1),  # val_loss known, not logged
    ("batch", 5),  # the epoch changes every 3.125 steps
    ("time", 0.05),
]
MORE = [  # with --thorough
    ("deleted", 1),
    ("logged", 3),
    ("batch", 4),
    *(("time", seconds) for seconds in (0.005, 0.01, 0.02, 0.08, 0.12, 0.16, 0.2)),
]
SEED = 7


@pytest.fixture
def settings(small_overrides) -> list[str]:
    """Two accumulated micro batches, dropout, averaged weights, and something to keep by every rule."""
    return [
        *small_overrides,
        "train.micro_batch=4",
        "model.llm.hidden_dropout=0.1",
        "model.llm.num_layers=1",
        "model.vision.num_layers=1",
        "model.vision.select_layer=-1",
        "optimizer.ema_decay=0.9",
        "optimizer.ema_every=2",
        "checkpoint.keep_every=10",
        "checkpoint.keep_best=1",
        "eval.every=3",
        "optimizer.min_lr=2.0e-3",  # constant, so that a run of more steps begins like one of fewer
    ]


def test_no_kill_changes_a_bit(parent, settings, tmp_path, pytestconfig):
    settings = [*settings, "train.steps=64", "optimizer.constant_steps=3"]
    log, killed, whole = tmp_path / "log", tmp_path / "killed", tmp_path / "whole"
    assert parent.run([*settings, f"run.dir={whole}"], log) == 0, log.read_text()
    kills = KILLS + (MORE if pytestconfig.getoption("thorough") else [])
    random.Random(SEED).shuffle(kills)
    for point, when in kills:
        status = parent.run([*settings, f"run.dir={killed}"], log, kill(point, when))
        assert status == -9, (point, when, log.read_text()[-3000:])
    assert parent.run([*settings, f"run.dir={killed}"], log) == 0, log.read_text()[-3000:]
    assert rows(killed) == rows(whole)
    assert [row["step"] for row in rows(whole) if "loss" in row] == list(range(1, 65))
    ours, theirs = (state(run, 64) for run in (killed, whole))
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert any(name.startswith("['ema']['llm']") for name in ours)
    ours, theirs = ((run / "checkpoints" / "64" / "data" / "metadata").read_text() for run in (killed, whole))
    assert json.loads(ours) == json.loads(theirs)
    losses = {int(step): loss for step, loss in json.loads(ours)["val_losses"].items()}
    assert set(losses) == {*range(3, 64, 3), 64}
    # The best of those that were saved and validated at the same step, the newest two, and the multiples of ten.
    best = min((step for step in losses if step % 2 == 0), key=losses.get)
    assert steps(whole) == sorted({best, 62, 64, *range(10, 64, 10)})
    assert set(steps(killed)) == set(steps(whole))
    assert [path.name for path in (killed / "checkpoints").iterdir() if not path.name.isdecimal()] == []


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(parent, tmp_path_factory):
    """A run of 6 steps with the checkpoints 2, 4 and 6, and its settings. Copy it."""
    made = {}

    def get(settings: list[str]) -> tuple[Path, list[str]]:
        if not made:
            folder = tmp_path_factory.mktemp("trained")
            made["settings"] = [*settings, "train.steps=6", "checkpoint.keep=null"]
            made["run"] = folder / "run"
            log = folder / "log"
            assert parent.run([*made["settings"], f"run.dir={made['run']}"], log) == 0, log.read_text()
        return made["run"], made["settings"]

    return get


@pytest.fixture
def run(trained, settings, tmp_path) -> tuple[Path, list[str]]:
    """A copy of the run, and the settings that continue it to step 8."""
    source, settings = trained(settings)
    copy = tmp_path / "run"
    shutil.copytree(source, copy)
    return copy, [*settings, f"run.dir={copy}", "train.steps=8"]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


def largest(step_dir: Path) -> Path:
    return max((step_dir / name for name in files_of(step_dir)), key=lambda path: path.stat().st_size)


DAMAGES = {
    "a flipped bit": (lambda path: flip_bit(path), "{file}: its contents are not what was saved"),
    "a zeroed page": (lambda path: zero_page(path), "{file}: its contents are not what was saved"),
    "a truncated file": (lambda path: os.truncate(path, 5000), "{file}: has 5000 bytes, but was saved with "),
    "a missing file": (lambda path: path.unlink(), "{file}: is missing"),
    "an extra file": (lambda path: (path.parent / "extra").touch(), "{folder}/extra: was not there when"),
    "no manifest": (lambda path: (step_of(path) / "manifest.json").unlink(), "{step}/manifest.json: is missing"),
    "no meta.json": (lambda path: (step_of(path) / "meta/meta.json").unlink(), "{step}: is damaged, it has no meta/"),
}


def step_of(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name.isdecimal())


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_nothing_is_resumed_from_it(name, run, tokenizer):
    folder, _ = run
    damage, message = DAMAGES[name]
    file = largest(folder / "checkpoints" / "6")
    config = read_meta(folder / "checkpoints" / "6").config
    damage(file)
    expected = message.format(file=file, folder=file.parent, step=folder / "checkpoints" / "6")
    with pytest.raises(DamagedCheckpoint) as caught:
        resumed_meta(config, tokenizer, folder)
    text = str(caught.value)
    assert text.startswith(expected)
    assert text.endswith("; add --allow-fallback to go on from the newest good checkpoint before it (of 4 and older)")
    said = []
    fall_back = dataclasses.replace(config, run=RunConfig(allow_fallback=True))
    assert resumed_meta(fall_back, tokenizer, folder, say=said.append).step == 4
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4", "6.damaged"]
    assert said[0].startswith(expected)
    assert said[0].endswith("; put aside as 6.damaged")
    assert said[1] == "going back to step 4, the newest good checkpoint (--allow-fallback)"


def test_one_flipped_bit_in_any_file_of_a_real_checkpoint_is_found(run):
    step_dir = run[0] / "checkpoints" / "6"
    for name in files_of(step_dir):
        whole = (step_dir / name).read_bytes()
        flip_bit(step_dir / name)
        with pytest.raises(DamagedCheckpoint, match=f"^{re.escape(str(step_dir / name))}: its contents"):
            verify(step_dir, "full")
        (step_dir / name).write_bytes(whole)
    assert verify(step_dir, "full") is None


def test_a_run_falls_back_and_ends_as_if_nothing_had_been(run, parent, trained, settings, tmp_path):
    folder, arguments = run
    log = tmp_path / "log"
    flip_bit(largest(folder / "checkpoints" / "6"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert parent.run(arguments, log) == 2
    (line,) = log.read_text().splitlines()
    assert line.startswith(f"error: {folder}/checkpoints/6/state/")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert parent.run([*arguments, "--allow-fallback"], log) == 0, log.read_text()
    assert "going back to step 4" in (folder / "log.txt").read_text()
    assert steps(folder) == [2, 4, 6, 8]
    first = [row for row in rows(trained(settings)[0]) if row["step"] <= 5]
    assert [row for row in rows(folder) if row["step"] <= 5] == first
    assert verify(folder / "checkpoints" / "6", "full") is None


def test_where_no_checkpoint_is_good_nothing_is_touched(run, tokenizer):
    folder, _ = run
    config = read_meta(folder / "checkpoints" / "6").config
    fall_back = dataclasses.replace(config, run=RunConfig(allow_fallback=True))
    for step in (2, 4, 6):
        flip_bit(largest(folder / "checkpoints" / str(step)))
    with pytest.raises(DamagedCheckpoint, match=r"/6/state/.*; no checkpoint in .* is good; restore one from a copy$"):
        resumed_meta(fall_back, tokenizer, folder)
    assert steps(folder) == [2, 4, 6]


def test_what_is_not_looked_for_is_found_when_it_is_read(run, tokenizer):
    """checkpoint.verify=off saves the time; a file that cannot be read is still an error in one line."""
    step_dir = run[0] / "checkpoints" / "6"
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(one_device_mesh())),
        ocp.PyTreeCheckpointHandler().metadata(step_dir / "state").tree["params"]["llm"],
    )
    for path in (step_dir / name for name in files_of(step_dir) if name.startswith("state/")):
        if path.stat().st_size > 5000:  # any of them may hold what is read
            os.truncate(path, 5000)
    assert verify(step_dir, "off") is None
    with pytest.raises(DamagedCheckpoint, match=rf"^{step_dir}: its state/ cannot be read \("):
        load_components({"llm": params}, {"llm": step_dir})


def test_a_checkpoint_of_format_1_is_told_and_its_structure_looked_at(run, tokenizer):
    folder, _ = run
    step_dir = folder / "checkpoints" / "6"
    (step_dir / "manifest.json").unlink()
    described = json.loads((step_dir / "meta" / "meta.json").read_text())
    described["format"] = 1
    del described["ema"]
    (step_dir / "meta" / "meta.json").write_text(json.dumps(described))
    said = []
    config = read_meta(step_dir).config
    assert resumed_meta(config, tokenizer, folder, say=said.append).step == 6
    (line,) = said
    assert re.fullmatch(rf"{step_dir}: is of format 1, which had no digests: its \d+ arrays are there, .*", line)
    (step_dir / "state" / "_METADATA").write_text("{")
    with pytest.raises(DamagedCheckpoint, match=rf"^{step_dir}: its state/ cannot be read \("):
        resumed_meta(config, tokenizer, folder)
    (step_dir / "data" / "metadata").write_text("{")
    with pytest.raises(DamagedCheckpoint, match=rf"^{step_dir}/data/metadata: is broken \("):
        read_data(step_dir)
    (step_dir / "data" / "metadata").unlink()
    with pytest.raises(DamagedCheckpoint, match="data/metadata does not say how many samples are consumed"):
        resumed_samples(read_data(step_dir), None, None)


# --- disks -----------------------------------------------------------------------------------------------------------


def save(checkpoints: Checkpoints, step: int, tokenizer: Any) -> None:
    """4 MiB that do not compress: more than anything else that is being written here."""
    kernel = jax.random.normal(jax.random.key(step), (1024, 1024))
    meta = Meta(step, Config(), ("projector",), None, tokenizer)
    checkpoints.save(step, {"projector": {"kernel": kernel}}, {}, {"samples": step}, meta)


@pytest.fixture
def small_disk(tmp_path):
    """A run's directory whose checkpoints lie on a disk of 20 MiB."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder.parent
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def full(run: Path):
    ballast = run / "checkpoints" / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(run / "checkpoints").free - 16384))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(run: Path):
    subprocess.run(["mount", "-o", "remount,ro", str(run / "checkpoints")], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(run / "checkpoints")], check=True)


@contextmanager
def gone(run: Path):
    (run / "checkpoints").rename(run / "away")
    yield
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "away").rename(run / "checkpoints")


@contextmanager
def limited(run: Path):
    """No file above 2 MiB: what a quota does, on any disk and for any user."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


REFUSALS = {
    "full": (full, "small_disk", "No space left on device"),
    "read_only": (read_only, "small_disk", "Read-only file system"),
    "gone": (gone, "tmp_path", "the directory is gone"),
    "limited": (limited, "tmp_path", "File too large"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_save_that_fails_is_told_and_tried_again_and_deletes_nothing(name, tokenizer, request):
    refuse, where, why = REFUSALS[name]
    run = request.getfixturevalue(where)
    with Checkpoints(run, 1) as checkpoints:
        save(checkpoints, 2, tokenizer)
        checkpoints.wait()
        assert [line.split(":")[0] for line in checkpoints.news()] == ["checkpoint 2"]
        with refuse(run):
            save(checkpoints, 4, tokenizer)
            if checkpoints._thread is not None:
                checkpoints._thread.join()
            (line,) = checkpoints.news()
            good = "there is none yet" if name == "gone" else "step 2 is the newest good one"
            assert re.fullmatch(
                rf"{run}/checkpoints: checkpoint 4 could not be written \({why}; .* free there\); {good}; "
                "training goes on, the next save tries again",
                line,
            ), line
        assert steps(run) == [2]
        assert verify(run / "checkpoints" / "2", "full") is None
        save(checkpoints, 6, tokenizer)
        checkpoints.wait()
    assert steps(run) == [6]
    assert verify(run / "checkpoints" / "6", "full") is None
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["6"]


def test_two_failures_in_a_row_stop_the_run_and_a_success_between_them_does_not(tokenizer, tmp_path):
    with pytest.raises(RunError) as caught, Checkpoints(tmp_path, 1) as checkpoints:
        for step in (2, 6):
            save(checkpoints, step, tokenizer)
            checkpoints.wait()
            with limited(tmp_path):
                save(checkpoints, step + 2, tokenizer)
                checkpoints._thread.join()
        save(checkpoints, 10, tokenizer)
        checkpoints.wait()
        with limited(tmp_path):
            for step in (12, 14, 16):
                save(checkpoints, step, tokenizer)
                checkpoints._thread.join()
    assert re.fullmatch(
        rf"{tmp_path}/checkpoints: checkpoint 14 could not be written \(File too large; .* are free there\); "
        "step 10 is the newest good one; 2 saves in a row failed",
        str(caught.value),
    )
    assert steps(tmp_path) == [10]


def test_the_last_save_of_all_has_to_succeed(tokenizer, tmp_path):
    failed = r"checkpoint 4 could not be written .*; step 2 is the newest good one$"
    with pytest.raises(RunError, match=failed), Checkpoints(tmp_path, 1) as checkpoints:
        save(checkpoints, 2, tokenizer)
        checkpoints.wait()
        with limited(tmp_path):
            save(checkpoints, 4, tokenizer)
            checkpoints._thread.join()
    assert steps(tmp_path) == [2]


def test_a_run_on_a_disk_that_fills_ends_with_its_newest_checkpoint_intact(small_disk, parent, settings, tmp_path):
    """Nothing is deleted there (checkpoint.keep=null)."""
    subprocess.run(["mount", "-o", "remount,size=1500k", str(small_disk / "checkpoints")], check=True)
    log = tmp_path / "log"
    status = parent.run([*settings, f"run.dir={small_disk}", "train.steps=40", "checkpoint.keep=null"], log)
    assert status == 1, log.read_text()
    last = [line for line in log.read_text().splitlines() if line.startswith("error: ")][-1]
    newest = max(steps(small_disk))
    assert re.fullmatch(
        rf"error: {small_disk}/checkpoints: checkpoint {newest + 4} could not be written \(No space left on device; .* "
        rf"are free there\); step {newest} is the newest good one; 2 saves in a row failed",
        last,
    ), last
    assert f"checkpoint {newest + 2} could not be written" in (small_disk / "log.txt").read_text()
    for step in steps(small_disk):
        assert verify(small_disk / "checkpoints" / str(step), "full") is None
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk / "checkpoints")], check=True)
    assert parent.run([*settings, f"run.dir={small_disk}", f"train.steps={newest + 3}"], log) == 0, log.read_text()


def test_a_directory_is_tried_before_the_first_step(small_disk):
    state = {"kernel": jax.ShapeDtypeStruct((9 * 2**18,), np.float32)}  # 9 MiB
    probe(small_disk, state)
    assert list((small_disk / "checkpoints").iterdir()) == []
    with read_only(small_disk), pytest.raises(UserError) as caught:
        probe(small_disk, state)
    assert str(caught.value) == f"run.dir={small_disk}: cannot be written to (Read-only file system)"
    with pytest.raises(UserError) as caught:
        probe(small_disk, {"kernel": jax.ShapeDtypeStruct((11 * 2**18,), np.float32)})
    assert str(caught.value) == (
        f"run.dir={small_disk}: a checkpoint takes 11.0 MiB, and two must fit, but only 20.0 MiB are free there; free "
        "some, or name another run.dir"
    )


def test_space_for_two_checkpoints_or_for_one_beside_one_that_is_there(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=3 * 2**29)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: free)
    gib = {"kernel": jax.ShapeDtypeStruct((2**28,), np.float32)}
    with pytest.raises(UserError, match=r"a checkpoint takes 1.00 GiB, and two must fit, but only 1.50 GiB are free"):
        probe(tmp_path, gib)
    (tmp_path / "checkpoints" / "5").mkdir()
    probe(tmp_path, gib)


def test_a_run_without_space_is_refused_before_anything_is_computed(small_disk, parent, settings, tmp_path):
    log = tmp_path / "log"
    subprocess.run(["mount", "-o", "remount,size=100k", str(small_disk / "checkpoints")], check=True)
    assert parent.run([*settings, f"run.dir={small_disk}"], log) == 2
    (line,) = log.read_text().splitlines()
    assert re.match(rf"error: run\.dir={small_disk}: a checkpoint takes 0\.. MiB, and two must fit, but only ", line)
    assert [path.name for path in small_disk.rglob("*")] == ["checkpoints"]


# --- time ------------------------------------------------------------------------------------------------------------


def test_digests_hold_up_nobody_and_an_unsealed_checkpoint_is_not_there(tokenizer, tmp_path, monkeypatch):
    """save() returns while they are taken; wait() waits for them; older ones go only after that."""
    may_go_on, real = threading.Event(), checkpoint.seal
    monkeypatch.setattr(checkpoint, "seal", lambda *paths: may_go_on.wait(30) and real(*paths))
    with Checkpoints(tmp_path, 1) as checkpoints:
        may_go_on.set()
        save(checkpoints, 2, tokenizer)
        checkpoints.wait()
        may_go_on.clear()
        save(checkpoints, 4, tokenizer)
        checkpoints._checkpointer.wait_until_finished()  # Orbax has committed
        assert checkpoints.news()[1:] == []
        assert steps(tmp_path) == [2]
        waiting = threading.Thread(target=checkpoints.wait)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        may_go_on.set()
        waiting.join(30)
        assert steps(tmp_path) == [4]


# --- what a checkpoint may be made of --------------------------------------------------------------------------------


def test_nothing_of_a_checkpoint_is_pickled(tokenizer, tmp_path, monkeypatch):
    """Who loads a pickle runs what its author likes."""
    import pickle

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    with Checkpoints(tmp_path, 1) as checkpoints:
        save(checkpoints, 2, tokenizer)
        checkpoints.wait()
        kernel = jax.ShapeDtypeStruct((1024, 1024), np.float32, sharding=replicated(one_device_mesh()))
        params, _ = checkpoints.restore(2, {"projector": {"kernel": kernel}}, {})
    np.testing.assert_array_equal(params["projector"]["kernel"], jax.random.normal(jax.random.key(2), (1024, 1024)))
    assert read_data(tmp_path / "checkpoints" / "2") == {"samples": 2}
    read_meta(tmp_path / "checkpoints" / "2")
    # No file is one, either: a pickle of protocol 2 and later begins with 0x80 and its number, and ends with a dot.
    for name in files_of(tmp_path / "checkpoints" / "2"):
        content = (tmp_path / "checkpoints" / "2" / name).read_bytes()
        assert not (content[:1] == b"\x80" and content[-1:] == b"."), name


@pytest.mark.parametrize(("umask", "shared"), [(0o022, 0o755), (0o077, 0o700)])
def test_files_are_as_open_as_the_umask_says_and_no_more(umask, shared, tokenizer, tmp_path):
    before = os.umask(umask)
    try:
        with Checkpoints(tmp_path, 1) as checkpoints:
            save(checkpoints, 2, tokenizer)
    finally:
        os.umask(before)
    for path in (tmp_path / "checkpoints").rglob("*"):
        mode = path.stat().st_mode & 0o7777
        assert mode & ~shared == 0, (path, oct(mode))
        assert mode & 0o600 == 0o600, (path, oct(mode))


@pytest.mark.parametrize("file", ["../../../secret", "/etc/passwd", "tokenizer.model/../../x", "", "meta.json"])
def test_a_name_in_meta_json_leads_nowhere(file, tokenizer, tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        save(checkpoints, 2, tokenizer)
    path = tmp_path / "checkpoints" / "2" / "meta" / "meta.json"
    described = json.loads(path.read_text())
    described["tokenizer"]["file"] = file
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=f"^{path}: tokenizer.file={re.escape(file)} is neither"):
        read_meta(path.parent.parent)


@pytest.mark.parametrize("components", [["projector", "../x"], ["llm", "head"], [1], "llm"])
def test_components_in_meta_json_are_those_of_the_model(components, tokenizer, tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        save(checkpoints, 2, tokenizer)
    path = tmp_path / "checkpoints" / "2" / "meta" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"components": components}))
    with pytest.raises(DamagedCheckpoint, match=rf"^{path}: is broken \("):
        read_meta(path.parent.parent)


def test_a_checkpoint_under_another_number_is_refused(tokenizer, tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        save(checkpoints, 2, tokenizer)
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "20")
    with pytest.raises(UserError, match=r"/20: is the checkpoint of step 2; give the folder that name back$"):
        read_meta(tmp_path / "checkpoints" / "20")
