"""Losses and gradients that are no numbers, spikes, and batches with nothing to learn."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neva_jax import train
from neva_jax.config import GuardConfig
from neva_jax.errors import RunError
from neva_jax.training.guard import EMPTY, GOOD, NOT_FINITE, SPIKE, Guard, GuardState, guard_state, judge
from neva_jax.training.meter import Meter
from tests.faults.conftest import checkpoints, rows, said, state

BATCH = 2


@pytest.fixture
def poison(monkeypatch):
    """Sets the loss weights of the batches that end at these samples of the run to a value, before they are placed."""

    def poison(ends, value=np.inf):
        real = Meter.next

        def next_batch(self, stream):
            batch = real(self, stream)
            if batch.consumed in ends:
                batch.arrays["loss_weights"][:] = value
            return batch

        monkeypatch.setattr(Meter, "next", next_batch)

    return poison


@pytest.fixture
def watched(monkeypatch):
    """(state before, state after, metrics) of every step, on the host."""
    real, seen = train.configured_step, []

    def make(*arguments):
        step = real(*arguments)

        def train_step(state, *given):
            before = jax.device_get(state)
            state, metrics = step(state, *given)
            seen.append((before, jax.device_get(state), jax.device_get(metrics)))
            return state, metrics

        return train_step

    monkeypatch.setattr(train, "configured_step", make)
    return seen


def same(ours, theirs) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))


def skipped(run: Path) -> list[dict]:
    path = run / "skipped_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- one bad step ----------------------------------------------------------------------------------------------------


def test_a_step_without_a_finite_loss_changes_nothing_and_its_rows_are_named(start, poison, watched, tmp_path):
    poison({3 * BATCH})
    run = tmp_path / "run"
    assert start(run, "checkpoint.every=3", "log.every=4") == 0
    for step, (before, after, metrics) in enumerate(watched, 1):
        assert int(after.step) == step
        assert same(before[1:3], after[1:3]) == (step == 3)
        assert metrics["verdict"] == (NOT_FINITE if step == 3 else GOOD)
    assert watched[3][2]["lr"] == watched[2][2]["lr"]  # the schedule counts updates
    (record,) = skipped(run)
    assert record["step"] == 3
    assert len(record["rows"]) == BATCH
    assert all("rows.json: row " in name and "(id '" in name for name in record["rows"])
    (line,) = [line for line in said(run) if "skipped" in line]
    assert line.startswith("step 3: skipped, loss nan, gradient norm nan; its rows, listed in skipped_steps.jsonl: ")
    assert record["rows"][0] in line
    # Not saved where nothing was learnt (a rollback must not find it), but in the end.
    assert checkpoints(run) == [6, 8]
    assert [(row["step"], row.get("skipped")) for row in rows(run)] == [(4, 1), (8, 1)]


def test_a_loss_that_is_no_number_is_left_out_of_the_log(start, poison, tmp_path):
    poison({3 * BATCH})
    assert start(tmp_path / "run", "train.steps=4") == 0
    logged = rows(tmp_path / "run")
    assert ["loss" in row for row in logged] == [True, True, False, True]
    assert all(math.isfinite(value) for row in logged for value in row.values())


def test_a_batch_with_nothing_supervised_changes_nothing_and_is_not_bad(start, poison, watched, tmp_path):
    poison({BATCH * step for step in range(2, 9)}, 0)
    run = tmp_path / "run"
    assert start(run, "guard.max_bad_steps=2") == 0
    assert [metrics["verdict"] for _, _, metrics in watched] == [GOOD, *[EMPTY] * 7]
    assert all(same(before[1:3], after[1:3]) for before, after, _ in watched[1:])
    assert not same(watched[0][0][1], watched[0][1][1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(watched[-1][1]))
    assert all(metrics["loss"] == 0 for _, _, metrics in watched[1:])
    assert sum("nothing of its rows is supervised" in line for line in said(run)) == 7


@pytest.mark.parametrize(
    ("loss", "norm", "weights", "verdict"),
    [
        (2.0, 1.0, 5.0, GOOD),
        (np.nan, 1.0, 5.0, NOT_FINITE),
        (np.inf, 1.0, 5.0, NOT_FINITE),
        (2.0, np.inf, 5.0, NOT_FINITE),
        (2.0, np.nan, 5.0, NOT_FINITE),
        (0.0, 0.0, 0.0, EMPTY),
    ],
)
def test_verdicts(loss, norm, weights, verdict):
    found, after = judge(GuardState(), jnp.float32(loss), jnp.float32(norm), jnp.float32(weights), None)
    assert found == verdict
    assert int(after.skipped) == (verdict != GOOD)


# --- too many --------------------------------------------------------------------------------------------------------


def test_bad_steps_in_a_row_end_the_run_with_its_checkpoint_as_it_was(start, poison, tmp_path):
    poison({BATCH * step for step in (4, 5, 6)})
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"^3 bad steps in a row, the last is step 6 .* nothing is saved after step 2, "):
        start(run, "guard.max_bad_steps=3", "log.every=100")
    assert checkpoints(run) == [2]
    assert [record["step"] for record in skipped(run)] == [4, 5, 6]


def test_bad_steps_that_are_not_in_a_row_do_not(start, poison, tmp_path):
    poison({BATCH * step for step in (2, 4, 6, 8)})
    assert start(tmp_path / "run", "guard.max_bad_steps=2") == 0


ROLLBACK = ["guard.on_bad=rollback", "guard.max_bad_steps=2", "train.steps=10", "checkpoint.every=2"]


def test_a_rollback_takes_other_rows_and_is_repeated_by_a_resumed_run(start, poison, watched, tmp_path, monkeypatch):
    """Steps 6 and 7 are bad: back to 4, and on with the rows after step 7."""
    poison({BATCH * 6, BATCH * 7})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole, *ROLLBACK, "log.every=3") == 0
    # Looked at for the log in step 9: 8 and 9 do not count. Then steps 5 to 10, with 6 more batches.
    assert [int(after.step) for _, after, _ in watched] == [*range(1, 9), *range(5, 11)]
    assert same(watched[8][0][1:3], watched[3][1][1:3])
    assert json.loads((whole / "checkpoints" / "10" / "data" / "metadata").read_text())["samples"] == BATCH * (7 + 6)
    assert [line for line in said(whole) if "rollback 1 of at most 2" in line]
    assert "back to step 4; its next rows are those after step 7" in said(whole)
    assert [row["step"] for row in rows(whole)] == [3, 6, 9, 10]

    # Stopped after the rollback, before anything is saved: the resumed run rolls back itself.
    real = train.Guard.look

    def look(self, saved):
        found = real(self, saved)
        if found is not None:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Guard, "look", look)
        start(cut, *ROLLBACK, "log.every=3")
    assert checkpoints(cut)[-1] == 4
    assert start(cut, *ROLLBACK, "log.every=3") == 0
    assert state(cut, 10) == state(whole, 10)
    assert rows(cut) == rows(whole)

    # Stopped when something is saved already: it goes on behind the bad rows.
    shutil.rmtree(cut / "checkpoints" / "10")
    assert checkpoints(cut) == [8]
    assert start(cut, *ROLLBACK, "log.every=3") == 0
    assert state(cut, 10) == state(whole, 10)
    assert json.loads((cut / "checkpoints" / "10" / "data" / "metadata").read_text())["guard"]["rollbacks"] == 1


def test_more_rollbacks_than_allowed_end_the_run(start, poison, tmp_path):
    poison({BATCH * step for step in range(4, 100)})
    with pytest.raises(RunError, match=r"^2 bad steps in a row, .* after 1 rollbacks .guard.max_rollbacks.; nothing"):
        start(tmp_path / "run", *ROLLBACK, "guard.max_rollbacks=1")
    assert checkpoints(tmp_path / "run") == [2]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(start, poison, tmp_path):
    poison({BATCH, 2 * BATCH})
    with pytest.raises(RunError, match=r"^no checkpoint to go back to from step 2; "):
        start(tmp_path / "run", *ROLLBACK)


# --- spikes ----------------------------------------------------------------------------------------------------------


def noisy_losses(count: int, seed: int) -> np.ndarray:
    """A run's losses: a fall, noise of 4 % that is a little heavy-tailed (Student's t, 5 degrees) and correlated."""
    draw = np.random.default_rng(seed)
    trend = 1.1 + 5 * np.exp(-np.arange(count) / 60) + 0.6 * np.exp(-np.arange(count) / 600)
    noise = draw.standard_t(5, count)
    noise[1:] += 0.3 * noise[:-1]
    return (trend * (1 + 0.04 * noise)).astype(np.float32)


@partial(jax.jit, static_argnums=(1, 2))
def verdicts(losses, factor, window):
    """Of steps with these losses."""

    def step(guard, loss):
        verdict, guard = judge(guard, loss, jnp.float32(1), jnp.float32(1), factor)
        return guard, verdict

    begin = jax.tree.map(jnp.asarray, guard_state(GuardConfig(spike_factor=factor, spike_window=window), None))
    return jax.lax.scan(step, begin, losses)


@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_clean_steps_are_no_false_alarm(seed):
    losses = noisy_losses(1000, seed)
    assert np.asarray(verdicts(losses, 15.0, 128)[1]).tolist() == [GOOD] * 1000


def test_a_spike_is_found_and_does_not_move_the_bound():
    losses = noisy_losses(600, 0)
    losses[[400, 401, 402]] *= 3
    guard, found = verdicts(losses, 15.0, 128)
    assert np.flatnonzero(np.asarray(found) == SPIKE).tolist() == [400, 401, 402]
    kept = np.delete(losses, [400, 401, 402])
    assert int(guard.seen) == len(kept)
    assert sorted(np.asarray(guard.losses)) == sorted(kept[-128:])


def test_the_bound_is_the_median_and_its_deviation():
    losses = noisy_losses(300, 3)
    for at in (128, 200, 299):
        window = losses[at - 128 : at].astype(np.float64)
        bound = np.median(window) + 4 * np.median(np.abs(window - np.median(window)))
        for value, verdict in ((bound * 0.999, GOOD), (bound * 1.001, SPIKE)):
            found = np.asarray(verdicts(np.append(losses[:at], np.float32(value)), 4.0, 128)[1])[at]
            assert found == verdict


def test_equal_losses_are_no_spread_of_zero():
    losses = np.full(40, 2, np.float32)
    losses[30] = 2.0001
    assert not np.asarray(verdicts(losses, 5.0, 16)[1]).any()


def test_what_is_saved_is_what_is_restored():
    config = GuardConfig(spike_factor=15.0, spike_window=128)
    losses = noisy_losses(700, 1)
    losses[[300, 301, 650]] *= 4
    half, first = verdicts(losses[:500], 15.0, 128)
    guard = Guard(config, None, print, print, None)
    saved = json.loads(json.dumps(guard.saved(half)))
    restored = jax.tree.map(jnp.asarray, guard_state(config, saved))
    found = []
    for loss in losses[500:]:
        verdict, restored = judge(restored, jnp.float32(loss), jnp.float32(1), jnp.float32(1), 15.0)
        found.append(int(verdict))
    whole, expected = verdicts(losses, 15.0, 128)
    assert [*np.asarray(first).tolist(), *found] == np.asarray(expected).tolist()
    assert same(restored, whole)
    # Another window begins anew; the number of skipped steps, which the schedule needs, stays.
    other = guard_state(GuardConfig(spike_factor=15.0, spike_window=64), saved)
    assert (int(other.skipped), int(other.seen), other.losses.shape) == (2, 0, (64,))
