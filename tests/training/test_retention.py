"""Which checkpoints stay, and what becomes of saves and deletions that were cut off."""

import math
import random
import shutil
from pathlib import Path

import pytest

from neva_jax.training import retention
from neva_jax.training.manifest import check_manifest
from neva_jax.training.retention import Retention, SaveTimes, remove, seal, set_aside, steps_in, tidy

STEPS = [10, 20, 25, 30, 40, 50]


@pytest.mark.parametrize(
    ("rule", "losses", "left"),
    [
        (Retention(2), {}, [40, 50]),
        (Retention(None), {}, STEPS),
        (Retention(None, 20, 1), {10: 1.0}, STEPS),
        (Retention(1, 20), {}, [20, 40, 50]),
        (Retention(1, 25), {}, [25, 50]),
        (Retention(1, None, 1), {10: 3.0, 20: 2.0, 30: 2.5}, [20, 50]),
        (Retention(1, None, 2), {10: 3.0, 20: 2.0, 30: 2.5}, [20, 30, 50]),
        (Retention(1, None, 9), {10: 3.0, 20: 2.0, 30: 2.5}, [10, 20, 30, 50]),
        (Retention(1, None, 1), {10: 2.0, 20: 2.0, 50: 2.0}, [10, 50]),  # the oldest of equals
        (Retention(1, None, 1), {20: math.nan, 30: math.inf, 40: -math.inf}, [50]),  # no numbers
        (Retention(1, None, 1), {}, [50]),
        (Retention(1, None, 1), {21: 0.1, 30: 0.2}, [30, 50]),  # 21 was validated, but not saved
        (Retention(1, None, 1), {50: 0.1, 30: 0.2}, [50]),  # the newest is the best
    ],
)
def test_what_one_rule_keeps_stays(rule, losses, left):
    assert sorted(rule.kept(STEPS, losses)) == left


def test_against_rules_written_out():
    draw = random.Random(0)
    for _ in range(300):
        steps = sorted(draw.sample(range(1, 60), draw.randint(1, 12)))
        losses = {step: draw.choice([0.5, 1.0, 1.5, math.nan]) for step in steps if draw.random() < 0.7}
        keep, every, best = draw.randint(1, 4), draw.choice([None, 1, 5, 7]), draw.randint(0, 3)
        left = Retention(keep, every, best).kept(steps, losses)
        for step in steps:
            newer = sum(other > step for other in steps)
            better = sum(
                losses.get(other, math.nan) < losses.get(step, math.nan)
                or (losses.get(other) == losses.get(step) and other < step)
                for other in steps
            )
            rated = not math.isnan(losses.get(step, math.nan))
            assert (step in left) == (
                newer < keep or (every is not None and step % every == 0) or (rated and better < best)
            )


def make(folder: Path, name: str) -> Path:
    """What Orbax has committed under that name."""
    path = folder / name
    (path / "state").mkdir(parents=True)
    (path / "state" / "array").write_bytes(b"1" * 100)
    (path / "_CHECKPOINT_METADATA").write_text("{}")
    return path


def test_steps_are_folders_named_by_numbers(tmp_path):
    for name in ("100", "20", "3.writing", "4.deleting", "notes", "5.damaged", "²"):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [20, 100]
    assert steps_in(tmp_path / "nope") == []


def test_a_checkpoint_gets_its_name_with_its_manifest(tmp_path):
    assert seal(make(tmp_path, "3.writing"), tmp_path / "3") == 102
    assert steps_in(tmp_path) == [3]
    check_manifest(tmp_path / "3", "full")


def test_a_deleted_checkpoint_loses_its_name_first(tmp_path, monkeypatch):
    step_dir = make(tmp_path, "3")
    monkeypatch.setattr(retention.shutil, "rmtree", lambda path, **named: None)  # a process that is killed there
    remove(step_dir)
    assert steps_in(tmp_path) == []
    monkeypatch.undo()
    make(tmp_path, "3")
    remove(step_dir)  # with the rest of the other one in the way
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints_are_put_aside_and_never_deleted(tmp_path):
    assert [set_aside(make(tmp_path, "3")).name for _ in range(3)] == ["3.damaged", "3.damaged-2", "3.damaged-3"]
    assert tidy(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_kill_left_is_ended_at_the_next_start(tmp_path):
    seal(make(tmp_path, "1.writing"), tmp_path / "1")
    shutil.copytree(make(tmp_path, "2"), tmp_path / "2.writing")  # renamed, and begun once more
    make(tmp_path, "3.writing")  # whole
    make(tmp_path, "4.writing.orbax-checkpoint-tmp")
    make(tmp_path, "5.deleting")
    make(tmp_path, "6.writing") / "_CHECKPOINT_METADATA"
    (tmp_path / "6.writing" / "_CHECKPOINT_METADATA").unlink()
    make(tmp_path, "7.orbax-checkpoint-tmp")  # of format 1
    (tmp_path / "notes").mkdir()
    (tmp_path / "8.writing").write_text("a file of somebody's")
    assert tidy(tmp_path) == [
        "removed an unfinished checkpoint, of step 2",
        "checkpoint 3 was whole, but its manifest was not written yet: sealed now",
        "removed an unfinished checkpoint, of step 4",
        "removed the rest of a deleted checkpoint, of step 5",
        "removed an unfinished checkpoint, of step 6",
        "removed an unfinished checkpoint, of step 7",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "8.writing", "notes"]
    check_manifest(tmp_path / "3", "full")
    assert tidy(tmp_path) == []
    assert tidy(tmp_path / "nope") == []


def test_saves_come_by_steps_and_by_minutes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(retention.time, "monotonic", lambda: clock[0])
    by_steps, by_both = SaveTimes(10, None, 1), SaveTimes(10, 0.5, 1)
    saved = []
    for step in range(1, 31):
        clock[0] += 1 if step <= 20 else 7
        assert by_steps.due(step) == (step % 10 == 0)
        if by_both.due(step):
            saved.append(step)
            by_both.saved()
    # 35 s after step 20 (5 steps of 7 s), then 5 more: step 30 comes first by its number.
    assert saved == [10, 20, 25, 30]


def test_several_processes_ask_one_clock(monkeypatch):
    """Process 0's answer is taken, and asked for every few steps only: it costs a collective."""
    clock, asked = [0.0], []
    monkeypatch.setattr(retention.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(retention.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        retention.multihost_utils, "broadcast_one_to_all", lambda late: asked.append(bool(late)) or late
    )
    times = SaveTimes(100, 1.0, 5)
    clock[0] = 61.0
    assert [step for step in range(1, 12) if times.due(step)] == [5, 10]
    assert asked == [True, True]
    asked.clear()
    assert not SaveTimes(100, None, 5).due(5)  # nobody asks where minutes do not count
    assert asked == []
