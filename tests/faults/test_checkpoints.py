"""Runs that are killed, and checkpoints that are damaged: what is left, and what the next start makes of it."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.faults.forks import Forks

# Where the runs of the chain kill themselves; each comes one or two checkpoints further than the one before.
KILLS = [
    ["copied", 2],  # arrays copied, nothing written
    ["committed", 2],  # Orbax has written all, no manifest
    ["digesting", 25],  # in the middle of the manifest's digests
    ["manifest", 2],  # manifest there, name not
    ["named", 1],  # complete; older ones not deleted yet
    ["deleting", 1],  # an older one half deleted
    ["deleted", 1],
    ["validating", 1],  # after the first batch of a validation
    ["validated", 1],  # val_loss known, not logged
    ["logged", 3],
    ["batch", 4],  # the epoch changes every 3.125 steps
    ["batch", 5],
    *(["time", seconds] for seconds in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)),
]
SEED = 7


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Runs of one program compile it once."""
    settings = {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with Forks(settings) as forks:
        yield forks


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
    ]


def state(step_dir: Path) -> dict[str, tuple]:
    """Every array of a checkpoint, as bytes."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(step_dir / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        saved = checkpointer.restore(step_dir / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves = ((path, np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(saved))
    return {jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, leaf.tobytes()) for path, leaf in leaves}


def repeatable(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the clock says."""
    timed = ("samples_per_s", "tokens_per_s", "data_wait_s")
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def test_twenty_kills_change_no_bit(forks, settings, tmp_path):
    settings = [*settings, "train.steps=64", "optimizer.constant_steps=3"]
    log, killed, whole = tmp_path / "log", tmp_path / "killed", tmp_path / "whole"
    assert forks.run([*settings, f"run.dir={whole}"], log) == 0, log.read_text()
    kills = random.Random(SEED).sample(KILLS, len(KILLS))
    for kill in kills:
        assert forks.run([*settings, f"run.dir={killed}"], log, kill) == -9, (kill, log.read_text()[-3000:])
    assert forks.run([*settings, f"run.dir={killed}"], log) == 0, log.read_text()[-3000:]
    assert repeatable(killed) == repeatable(whole)
    assert [row["step"] for row in repeatable(whole) if "loss" in row] == list(range(1, 65))
    ours, theirs = (state(run / "checkpoints" / "64") for run in (killed, whole))
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
