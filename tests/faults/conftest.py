"""What the tests of faults share: one tiny configuration, compiled once, here and in the processes that are damaged."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from neva_jax import train
from tests.conftest import ONE_DEVICE_FLAGS
from tests.faults.runs import Parent


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """The folder in which JAX keeps compiled programs."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="session")
def parent(programs) -> Iterator[Parent]:
    settings = {
        "XLA_FLAGS": ONE_DEVICE_FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "MALLOC_ARENA_MAX": "2",  # else each new thread of a pool keeps memory of its own, which looks like a leak
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }
    with Parent(settings) as parent:
        yield parent


@pytest.fixture
def tiny(small_overrides) -> list[str]:
    """One layer each, no validation, a checkpoint every second step."""
    return [
        *small_overrides,
        "model.llm.num_layers=1",
        "model.vision.num_layers=1",
        "model.vision.select_layer=-1",
        "data.val=[]",
        "train.global_batch=2",
        "train.micro_batch=2",
        "train.steps=8",
    ]


@dataclass
class Outcome:
    """A run that has ended."""

    status: int
    dir: Path
    stderr: str

    @property
    def steps(self) -> list[int]:
        """Its checkpoints."""
        return checkpoints(self.dir)


@pytest.fixture
def run(parent, tiny, tmp_path) -> Callable[..., Outcome]:
    """Runs a real process: overrides, and `before`, the damage (see runs.py)."""

    def run(*overrides: str, before: str = "", name: str = "run") -> Outcome:
        log = tmp_path / "stderr"
        log.unlink(missing_ok=True)
        status = parent.run([*tiny, f"run.dir={tmp_path / name}", *overrides], log, before)
        return Outcome(status, tmp_path / name, log.read_text())

    return run


@pytest.fixture
def start(tiny, programs) -> Iterator[Callable[..., int]]:
    """Runs `train.main` in this process, on one device."""
    settings = {
        "jax_compilation_cache_dir": str(programs),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield lambda run_dir, *overrides: train.main([*tiny, f"run.dir={run_dir}", *overrides])
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def checkpoints(run_dir: Path) -> list[int]:
    folder = run_dir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the clock says."""
    timed = ("samples_per_s", "tokens_per_s", "data_wait_s")
    logged = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in timed} for row in logged]


def said(run_dir: Path) -> list[str]:
    return [line.split(" ", 1)[1] for line in (run_dir / "log.txt").read_text().splitlines()]


def state(run_dir: Path, step: int) -> dict[str, tuple]:
    """Every array of a checkpoint, as bytes."""
    folder = run_dir / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        saved = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves = ((path, np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(saved))
    return {jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, leaf.tobytes()) for path, leaf in leaves}
