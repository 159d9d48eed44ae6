"""Kills a real run, resumes it, and holds it against one that was left alone: one JSON line.

    python scripts/check_resume.py --config configs/quickstart_finetune.yaml --dir runs/resume --kill-after 7 \\
        train.steps=12 checkpoint.every=4

The runs are `--dir`/whole and `--dir`/killed. The second is killed (SIGKILL) when step `--kill-after` is in its
metrics.jsonl and a checkpoint is complete, then started again. The exit status is 0 where every row of metrics.jsonl
and every bit of the last checkpoint agree, else 1.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from neva_jax.benchmarks.conditions import conditions
from neva_jax.training.retention import steps_in

TIMED = ("samples_per_s", "tokens_per_s", "data_wait_s")


def main() -> int:
    """Runs, compares, prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--kill-after", required=True, type=int, metavar="STEP")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # here arrays are only compared: the device is the runs'
    if options.dir.exists():
        parser.error(f"--dir {options.dir}: is there already; name another, or delete it")
    whole, killed = options.dir / "whole", options.dir / "killed"

    def start(run_dir: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "neva_jax.train", "--config", options.config, *options.overrides]
        return subprocess.Popen([*command, f"run.dir={run_dir}", "log.every=1"], stdout=sys.stderr)

    def finish(run: subprocess.Popen) -> None:
        if run.wait() != 0:
            raise SystemExit(f"error: a run ended with status {run.returncode}, see above")

    finish(start(whole))
    run = start(killed)
    checkpoints = killed / "checkpoints"
    while not (rows := metrics(killed)) or rows[-1]["step"] < options.kill_after or not steps_in(checkpoints):
        if run.poll() is not None:
            raise SystemExit(
                f"error: the run ended (status {run.returncode}) before step {options.kill_after} was done and a "
                "checkpoint complete; give it more train.steps"
            )
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    died_after, newest = metrics(killed)[-1]["step"], steps_in(checkpoints)[-1]
    if newest == steps_in(whole / "checkpoints")[-1]:
        raise SystemExit(f"error: the run was at its end, step {newest}, when it was killed; give it more train.steps")
    finish(start(killed))

    rows = [[{k: v for k, v in row.items() if k not in TIMED} for row in metrics(run)] for run in (whole, killed)]
    last = steps_in(whole / "checkpoints")[-1]
    saved = [arrays(run / "checkpoints" / str(last) / "state") for run in (whole, killed)]
    different = differing(*saved)
    rates = [row["samples_per_s"] for row in metrics(whole) if "samples_per_s" in row]
    line = {
        "bench": "resume",
        "steps": last,
        "killed_after_step": died_after,
        "resumed_from": newest,
        "metrics_equal": rows[0] == rows[1],
        "largest_loss_difference": max(
            abs(a["loss"] - b["loss"]) for a, b in zip(*rows, strict=True) if "loss" in a and "loss" in b
        ),
        "arrays": len(saved[0]),
        "arrays_different": different,
        "samples_per_s": round(statistics.median(rates), 1),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "overrides": options.overrides,
        **conditions("jax", "orbax-checkpoint"),
    }
    print(json.dumps(line))
    return 0 if rows[0] == rows[1] and not different else 1


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The complete rows of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def arrays(state_dir: Path) -> dict[str, np.ndarray]:
    """Everything in a saved state, by its path."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(state_dir.resolve()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        saved = checkpointer.restore(state_dir.resolve(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """The names of the arrays whose bits differ, or that only one state has."""
    return sorted(name for name in a.keys() | b.keys() if not same(a.get(name), b.get(name)))


def same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """Whether two arrays have the same bits."""
    return a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


if __name__ == "__main__":
    sys.exit(main())
