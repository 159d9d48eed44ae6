"""Trains the same on several layouts of two devices, and moves a checkpoint between them: one JSON line.

    python scripts/check_layouts.py --config configs/quickstart_finetune.yaml --dir runs/layouts train.steps=30

    data        data=2: the run that the others are held against
    processes   the same as two processes with one device each (scripts/launch_local.sh): every bit must agree
    tensor, sequence, fsdp, one
                tensor=2, also with sequence parallelism, fsdp=2, one device
    moved       data's checkpoint after a third of the steps goes on with tensor=2, and its last with one device

All steps are one micro batch, so that FP8's history has the same entries. Losses of different layouts differ by their
rounding; `seed` says what another seed (of the data's order, and of weights that are drawn) does. The exit status is 0
where `processes` agrees and no loss is further off than --bound. With --cpu the devices are made up. With --jobs
several runs share the devices: on GPUs XLA_PYTHON_CLIENT_MEM_FRACTION then says each one's part of their memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from check_resume import arrays, differing, metrics

from neva_jax.benchmarks.conditions import conditions
from neva_jax.configfile import load_config
from neva_jax.training.retention import steps_in

LAUNCH = Path(__file__).resolve().parent / "launch_local.sh"


def main() -> int:
    """Runs, compares, prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--bound", type=float, default=0.02, help="largest relative difference of a loss (0.02)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument("--cpu", action="store_true", help="two made-up devices, for a try without GPUs")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    jax.config.update("jax_platforms", "cpu")  # here arrays are only compared: the devices are the runs'
    if options.dir.exists():
        parser.error(f"--dir {options.dir}: is there already; name another, or delete it")
    config = load_config(options.config, options.overrides)
    batch, steps = config.train.global_batch, config.train.steps
    if steps % 3 or batch % 2:
        parser.error(f"train.steps={steps} must be divisible by 3, and train.global_batch={batch} by 2")

    def run(name: str, mesh: str, *more: str, processes: int = 1) -> list[dict[str, Any]]:
        """Trains; returns the rows of its metrics that have a loss."""
        groups = 2 if mesh in ("data=2", "fsdp=2") else 1
        command = [sys.executable, "-m", "neva_jax.train", "--config", options.config, *options.overrides]
        command += [f"run.dir={options.dir / name}", f"mesh.shape={mesh}", f"train.micro_batch={batch // groups}"]
        command += [f"checkpoint.every={steps // 3}", "checkpoint.keep=3", "log.every=1", *more]
        environment, devices = dict(os.environ), 1 if mesh == "data=1" else 2
        if processes > 1:
            command = [str(LAUNCH), str(processes), *(["--cpu", "1"] if options.cpu else []), *command]
        elif options.cpu:
            flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
            environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        elif devices == 1:
            environment |= {"CUDA_VISIBLE_DEVICES": "0"}
        print("$", *command, file=sys.stderr, flush=True)
        if status := subprocess.run(command, stdout=sys.stderr, env=environment, check=False).returncode:
            raise SystemExit(f"error: {name} ended with status {status}, see above")
        return [row for row in metrics(options.dir / name) if "loss" in row]

    def move(source: str, step: int, target: str) -> None:
        """A run's checkpoint as that of a run that is to go on with it."""
        checkpoint = Path("checkpoints") / str(step)
        shutil.copytree(options.dir / source / checkpoint, options.dir / target / checkpoint)

    with ThreadPoolExecutor(options.jobs) as pool:
        started = {
            "data": pool.submit(run, "data", "data=2"),
            "processes": pool.submit(run, "processes", "data=2", processes=2),
            "tensor": pool.submit(run, "tensor", "tensor=2"),
            "sequence": pool.submit(run, "sequence", "tensor=2", "mesh.sequence_parallel=true"),
            "fsdp": pool.submit(run, "fsdp", "fsdp=2"),
            "one": pool.submit(run, "one", "data=1"),
            "seed": pool.submit(run, "seed", "data=2", f"run.seed={config.run.seed + 1}"),
        }
        losses = {"data": started["data"].result()}
        move("data", steps // 3, "moved_tensor")
        losses["moved_tensor"] = pool.submit(run, "moved_tensor", "tensor=2").result()
        move("moved_tensor", 2 * steps // 3, "moved_one")
        losses["moved_one"] = pool.submit(run, "moved_one", "data=1").result()
        losses |= {name: rows.result() for name, rows in started.items()}

    last = [arrays(options.dir / name / "checkpoints" / str(steps) / "state") for name in ("data", "processes")]
    different = differing(*last)
    whole = {row["step"]: row["loss"] for row in losses["data"]}
    off = {
        name: max(abs(row["loss"] / whole[row["step"]] - 1) for row in rows)
        for name, rows in losses.items()
        if name != "data"
    }
    line = {
        "bench": "layouts",
        "steps": steps,
        "first_steps": {name: rows[0]["step"] for name, rows in losses.items()},
        "checkpoints": {name: list(map(int, steps_in(options.dir / name / "checkpoints"))) for name in losses},
        "last_loss": {name: rows[-1]["loss"] for name, rows in losses.items()},
        "largest_relative_difference": off,
        "processes_losses_equal": [row["loss"] for row in losses["processes"]] == list(whole.values()),
        "processes_arrays_different": different,
        "arrays": len(last[0]),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "overrides": options.overrides,
        **conditions("jax", "orbax-checkpoint"),
    }
    print(json.dumps(line))
    near = all(value <= options.bound for name, value in off.items() if name != "seed")
    return 0 if near and not different and line["processes_losses_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
