"""Trains one model in several precisions from one checkpoint, on the same batches, and compares the losses.

python scripts/compare_precision.py --results F.jsonl --plot F.png [--recipes bf16,fp8_delayed,fp8_current]
    [--seeds 1,2,3] [--start-steps N] [--jobs N] [--runs DIR] [--limit SECONDS] [section.key=value ...]

A first run of --start-steps in the first recipe makes the checkpoint that all start from (model.init_from). Then each
recipe trains with each seed (of the data order) for `train.steps`. One JSON line for each run: its losses, the mean of
the last LAST of them, its validation loss, and both relative to the first recipe's with the same seed. The task is
configs/precision_300m.yaml's, which says how its data is made. With --jobs several runs share the GPU:
XLA_PYTHON_CLIENT_MEM_FRACTION then says each one's part of its memory. The exit status is 1 where a run failed.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
LAST = 50  # losses at the end that are averaged


def train(run_dir: Path, overrides: list[str], limit: float) -> list[dict[str, Any]]:
    """One run; returns the rows of its metrics.jsonl. Raises RuntimeError where it fails."""
    command = [sys.executable, "-m", "neva_jax.train", "--config", str(ROOT / "configs" / "precision_300m.yaml")]
    command += [f"run.dir={run_dir}", *overrides]
    print("$", *command[1:], file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, timeout=limit, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{run_dir}: exit status {done.returncode}")
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def compared(recipe: str, seed: int, rows: list[dict[str, Any]], reference: dict[str, Any] | None) -> dict[str, Any]:
    """The line of one run; `reference` is the first recipe's with the same seed, None for itself."""
    losses = [row["loss"] for row in rows if "loss" in row]
    line: dict[str, Any] = {
        "bench": "precision_convergence",
        "recipe": recipe,
        "seed": seed,
        "steps": len(losses),
        "last_loss": statistics.mean(losses[-LAST:]),
        "val_loss": next((row["val_loss"] for row in reversed(rows) if "val_loss" in row), None),
        "samples_per_s": statistics.median(row["samples_per_s"] for row in rows if "loss" in row),
        "losses": losses,
    }
    if reference is not None:
        line["last_loss_relative"] = line["last_loss"] / reference["last_loss"] - 1
        if line["val_loss"] is not None:
            line["val_loss_relative"] = line["val_loss"] / reference["val_loss"] - 1
    return line


def plot(lines: list[dict[str, Any]], reference: str, path: Path) -> None:
    """Losses side by side, and below them what each recipe differs by from `reference` (means of 20 steps)."""
    figure = Figure(figsize=(8, 6), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    first = {line["seed"]: smooth(line["losses"]) for line in lines if line["recipe"] == reference}
    for line in lines:
        label = f"{line['recipe']}, seed {line['seed']}"
        losses = smooth(line["losses"])
        above.plot(losses, linewidth=1, label=label)
        if line["recipe"] != reference and line["seed"] in first:
            pairs = zip(losses, first[line["seed"]], strict=False)
            below.plot([100 * (ours / theirs - 1) for ours, theirs in pairs], linewidth=1, label=label)
    above.set(ylabel="loss per token (mean of 20 steps)", yscale="log")
    below.set(xlabel="step", ylabel=f"% above {reference}")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def smooth(values: list[float], window: int = 20) -> list[float]:
    """Means of the last `window` values, or of as many as there are."""
    return [statistics.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def main() -> int:
    """Trains, compares, writes; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, metavar="F")
    parser.add_argument("--plot", type=Path, required=True, metavar="F")
    parser.add_argument("--recipes", default="bf16,fp8_delayed,fp8_current", metavar="A,B")
    parser.add_argument("--seeds", default="1", metavar="N,M")
    parser.add_argument("--start-steps", type=int, default=50, metavar="N", help="steps of the first run (50)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "precision", metavar="DIR")
    parser.add_argument("--limit", type=float, default=600, help="seconds for all runs together")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    recipes, seeds = options.recipes.split(","), [int(seed) for seed in options.seeds.split(",")]
    deadline = time.monotonic() + options.limit

    # Asked in a process of its own: whoever asks JAX for devices takes their memory.
    kind = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
    about = {
        "gpu": subprocess.run(kind, check=True, capture_output=True, text=True).stdout.strip(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    start, steps = options.runs / f"start_{options.start_steps}", options.start_steps
    warm = [f"train.steps={steps}", f"optimizer.warmup_steps={min(10, steps)}", f"precision.compute={recipes[0]}"]
    warm += ["eval.every=1000000"]
    train(start, [*options.overrides, *warm], deadline - time.monotonic())

    def finished(recipe: str, seed: int) -> list[dict[str, Any]]:
        overrides = [f"model.init_from={start}", f"precision.compute={recipe}", f"run.seed={seed}"]
        run_dir = options.runs / f"{recipe}_{seed}"
        return train(run_dir, [*options.overrides, *overrides], deadline - time.monotonic())

    lines: list[dict[str, Any]] = []
    failures = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {(seed, recipe): pool.submit(finished, recipe, seed) for seed in seeds for recipe in recipes}
        try:
            for (seed, recipe), run in runs.items():
                try:
                    rows = run.result()
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    print(f"error: {error}", file=sys.stderr)
                    failures += 1
                    continue
                same = (line for line in lines if (line["seed"], line["recipe"]) == (seed, recipes[0]))
                lines.append({**compared(recipe, seed, rows, next(same, None)), "jobs": options.jobs, **about})
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                short = {name: value for name, value in lines[-1].items() if name != "losses"}
                print(json.dumps(short), flush=True)
        except BaseException:  # Ctrl-C ends the runs at work; those that wait must not take their places
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if lines:
        plot(lines, recipes[0], options.plot)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
