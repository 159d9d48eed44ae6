"""Runs train steps with random weights and compares their peak memory with the plan; figures in docs/planning.md.

python scripts/measure_memory.py --results F.jsonl [--size tiny] [--only NAME ...] [--steps 3] [--limit 110]

Each case is a process of its own, because the peak that a device reports is its process's. A case makes weights on
the device layer by layer (so that making them holds less than a step), compiles the step ahead of time, runs it on
made-up rows, and writes one JSON line: the plan's estimate, XLA's memory_analysis, the device's peak, the steps' times.
It needs no data, no tokenizer and no checkpoint. `--size tiny` tries the script on a CPU, which reports no peak.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMON = ["model.init_from=null", "model.allow_random_frozen=true", "mesh.shape=data=1"]
# name -> (configuration file, overrides); without accumulation unless a case says so
CASES: dict[str, tuple[str, list[str]]] = {
    "pretrain_7b_dots": (
        "pretrain_7b",
        ["data.max_length=320", "train.micro_batch=32", "train.global_batch=32", "train.remat=dots"],
    ),
    "pretrain_7b_full": (
        "pretrain_7b",
        ["data.max_length=320", "train.micro_batch=32", "train.global_batch=32", "train.remat=full"],
    ),
    "pretrain_7b_16_layers_none": (
        "pretrain_7b",
        [
            "data.max_length=320",
            "train.micro_batch=32",
            "train.global_batch=32",
            "train.remat=none",
            "model.llm.num_layers=16",
        ],
    ),
    "finetune_7b_8_layers_dots": (
        "finetune_7b",
        [
            "data.max_length=768",
            "train.micro_batch=4",
            "train.global_batch=4",
            "train.remat=dots",
            "model.llm.num_layers=8",
        ],
    ),
    "pretrain_13b_dots": (
        "pretrain_13b",
        ["data.max_length=320", "train.micro_batch=8", "train.global_batch=8", "train.remat=dots"],
    ),
    "finetune_7b_8_layers_accumulated": (
        "finetune_7b",
        [
            "data.max_length=768",
            "train.micro_batch=4",
            "train.global_batch=8",
            "train.remat=full",
            "model.llm.num_layers=8",
        ],
    ),
}
TINY = [
    "model.llm.hidden_size=64",
    "model.llm.intermediate_size=160",
    "model.llm.num_layers=4",
    "model.llm.num_heads=4",
    "model.llm.num_kv_heads=4",
    "model.llm.vocab_size=512",
    "model.vision.image_size=28",
    "model.vision.hidden_size=32",
    "model.vision.intermediate_size=64",
    "model.vision.num_layers=2",
    "model.vision.num_heads=2",
]


def main() -> int:
    """Runs the cases one after the other, or one of them in this process; returns the exit status."""
    parser = argparse.ArgumentParser(description="Measured memory of train steps against the plan.")
    parser.add_argument("--results", required=True, metavar="F", help="JSON lines are appended to this file")
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, after one that is not")
    parser.add_argument("--limit", type=float, default=110, help="seconds that a case may take")
    parser.add_argument("--without-mesh", action="store_true", help="time the step with no mesh as well")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        line = measure(options.only[0], options.size, options.steps, options.without_mesh)
        with open(options.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(summary(line), flush=True)
        return 0
    failed = []
    for name in options.only:
        command = [sys.executable, __file__, "--in-process", "--results", options.results, "--size", options.size]
        command += ["--only", name, "--steps", str(options.steps)]
        command += ["--without-mesh"] if options.without_mesh else []
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
        try:
            status = subprocess.run(command, env=environment, timeout=options.limit, check=False).returncode
        except subprocess.TimeoutExpired:
            status = f"more than {options.limit:g} s"
        if status:
            failed.append(name)
            print(f"{name}: failed ({status})", file=sys.stderr, flush=True)
    return 1 if failed else 0


def summary(line: dict[str, Any]) -> str:
    """One line for people."""
    gib = {name: line[name] and f"{line[name] / 2**30:.2f}" for name in ("estimate", "compiled", "peak")}
    ratio = line["estimate_over_peak"]
    return (
        f"{line['case']}: estimate {gib['estimate']}, memory_analysis {gib['compiled']}, peak {gib['peak']} GiB"
        f"{'' if ratio is None else f', estimate / peak {ratio:.3f}'}; step {line['step_ms']:.1f} ms, "
        f"compiled in {line['compile_s']:.0f} s"
    )


def measure(name: str, size: str, steps: int, without_mesh: bool) -> dict[str, Any]:
    """One case: plan, compile, run; `without_mesh`: once more with no mesh, to see what one of 1 x 1 x 1 costs."""
    import jax

    from neva_jax.checks import check_numbers
    from neva_jax.configfile import load_config
    from neva_jax.derived import frozen_components, trained_components
    from neva_jax.parallel.mesh import make_mesh, place_batch
    from neva_jax.planning.compiled import compile_step
    from neva_jax.planning.memory import estimate
    from neva_jax.planning.speed import Machine, default_rate, predict
    from neva_jax.training.optimizer import make_optimizer
    from neva_jax.training.setup import abstract_optimizer, abstract_parameters, initialise_optimizer
    from neva_jax.training.step import TrainState

    file, overrides = CASES[name]
    config = load_config(ROOT / "configs" / f"{file}.yaml", [*COMMON, *overrides, *(TINY if size == "tiny" else [])])
    check_numbers(config)
    device, sizes = jax.devices()[0], {"data": 1, "fsdp": 1, "tensor": 1}
    plan = estimate(config, sizes, "cpu" if device.platform == "cpu" else "gpu")

    started = time.monotonic()
    analysis, step = compile_step(config, sizes)
    compiled_after = time.monotonic() - started

    mesh = make_mesh(sizes, [device])
    trained, frozen = trained_components(config.model), frozen_components(config.model)
    with jax.set_mesh(mesh):
        _, abstract = abstract_parameters(config, mesh)
        params = random_weights(abstract, config.run.seed)
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        trained_params = {part: params[part] for part in trained}
        moments = abstract_optimizer(optimizer, {part: abstract[part] for part in trained}, mesh)
        counter = jax.device_put(jax.numpy.int32(0), jax.tree.leaves(moments)[0].sharding)
        state = TrainState(counter, trained_params, initialise_optimizer(optimizer, trained_params, moments))
        frozen_params = {part: params[part] for part in frozen}
        del params, trained_params
        jax.block_until_ready((state, frozen_params))
        before = device.memory_stats() or {}
        batch = place_batch(mesh, made_up_rows(config), plan.accumulate)
        times, losses = [], []
        for _ in range(steps + 1):
            started = time.monotonic()
            state, metrics = step(state, frozen_params, batch)
            losses.append(float(metrics["loss"]))
            times.append(time.monotonic() - started)
    without = time_without_mesh(config, optimizer, state, frozen_params, batch, steps) if without_mesh else []
    after = device.memory_stats() or {}
    peak = after.get("peak_bytes_in_use")
    predicted = predict(plan, Machine(flops=default_rate(config) * 1e12))
    seconds = statistics.median(times[1:])
    return {
        "case": name,
        "size": size,
        "config": file,
        "overrides": overrides,
        "estimate": plan.memory.total,
        "estimate_parts": dataclasses.asdict(plan.memory),
        "compiled": analysis.total,
        "compiled_parts": dataclasses.asdict(analysis),
        "peak": peak,
        "estimate_over_peak": peak and plan.memory.total / peak,
        "compiled_over_peak": peak and analysis.total / peak,
        # Where the peak was reached while the weights were made, it says nothing of the step.
        "peak_before_first_step": before.get("peak_bytes_in_use"),
        "bytes_in_use_before_first_step": before.get("bytes_in_use"),
        "bytes_limit": after.get("bytes_limit"),
        "attention_planned": plan.backend,
        "step_ms": seconds * 1e3,
        "steps_ms": [t * 1e3 for t in times],
        "steps_ms_without_mesh": [t * 1e3 for t in without],
        "samples_per_s": config.train.global_batch / seconds,
        "step_ms_bound": predicted.seconds * 1e3,
        "tflop_per_sample": predicted.flops.model / 1e12,
        "compile_s": compiled_after,
        "losses": losses,
        "gpu": device.device_kind,
        "flags": {key: os.environ[key] for key in os.environ if key.startswith(("XLA_", "JAX_"))},
        "versions": {package: version(package) for package in ("jax", "jaxlib", "flax", "optax")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def time_without_mesh(
    config: Any, optimizer: Any, state: Any, frozen: dict[str, Any], batch: dict[str, Any], steps: int
) -> list[float]:
    """Seconds of each step of the same program, compiled where no mesh is set, on arrays that know of none."""
    import jax

    from neva_jax.models.layers import Remat
    from neva_jax.models.neva import abstract_model
    from neva_jax.training.optimizer import learning_rate
    from neva_jax.training.step import make_train_step

    train = config.train
    remat = Remat(train.remat, train.remat_method, train.remat_layers)
    graphdef, _ = abstract_model(config.model, config.precision, remat, train.unroll)
    step = make_train_step(graphdef, optimizer, learning_rate(config.optimizer, train.steps), train.loss_chunk)
    state, frozen, batch = jax.device_put((state, frozen, batch), jax.devices()[0])
    times = []
    for _ in range(steps + 1):
        started = time.monotonic()
        state, metrics = step(state, frozen, batch)
        float(metrics["loss"])
        times.append(time.monotonic() - started)
    return times[1:]


def random_weights(abstract: dict[str, Any], seed: int) -> dict[str, Any]:
    """Weights of the right scale straight onto their shards, one array and one layer at a time."""
    import jax
    import jax.numpy as jnp

    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    made = []
    for i, (path, leaf) in enumerate(leaves):
        kind = path[-1].key

        def make(key: jax.Array, leaf: jax.ShapeDtypeStruct = leaf, kind: str = kind) -> jax.Array:
            if kind == "scale":
                return jnp.ones(leaf.shape, leaf.dtype)
            if "bias" in kind:
                return jnp.zeros(leaf.shape, leaf.dtype)
            inner = leaf.shape[1:] if len(leaf.shape) > 2 else leaf.shape
            outer = leaf.shape[0] if len(leaf.shape) > 2 else 1
            slices = jax.lax.map(
                lambda k: (0.02 * jax.random.normal(k, inner)).astype(leaf.dtype), jax.random.split(key, outer)
            )
            return slices.reshape(leaf.shape)

        key = jax.random.fold_in(jax.random.key(seed), i)
        made.append(jax.jit(make, out_shardings=leaf.sharding)(key))
    return jax.tree_util.tree_unflatten(tree, made)


def made_up_rows(config: Any) -> dict[str, Any]:
    """A global batch of host arrays: image tokens first, then text, every text token labelled."""
    import numpy as np

    from neva_jax.data.tiles import tiles_per_row
    from neva_jax.derived import image_tokens

    rng = np.random.default_rng(config.run.seed)
    rows, length = config.train.global_batch, config.data.max_length
    tiles, side = tiles_per_row(config), config.model.vision.image_size
    taken = min(tiles * image_tokens(config.model), length - 1)
    slots = np.full((rows, length), -1, np.int32)
    slots[:, :taken] = np.arange(taken)
    tokens = rng.integers(0, config.model.llm.vocab_size, (rows, length), dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": (slots < 0).astype(np.float32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy(),
        "segment_ids": np.ones((rows, length), np.int32),
        "image_slots": slots,
        "images": rng.integers(0, 256, (rows, tiles, side, side, 3), dtype=np.uint8),
    }


if __name__ == "__main__":
    sys.exit(main())
