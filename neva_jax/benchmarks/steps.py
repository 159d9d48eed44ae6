"""The train step of a configuration with random weights, as training runs it: what it costs.

Step, state, mesh and the way of a batch onto it are those of `neva_jax.train`; only weights and batches are made up,
so that nothing has to be downloaded or converted first.
"""

import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from neva_jax.benchmarks.batches import loaded, made_up, tokens_per_sample, with_made_up_files
from neva_jax.benchmarks.conditions import conditions, describe
from neva_jax.benchmarks.profile import kernel_table
from neva_jax.benchmarks.timing import run_steps, spread
from neva_jax.config import Config
from neva_jax.data.pipeline import Batch
from neva_jax.derived import frozen_components, most_segments, parse_mesh_shape, trained_components
from neva_jax.errors import UserError
from neva_jax.models.attention import choose_backends
from neva_jax.parallel.mesh import make_mesh, place_batch, replicated
from neva_jax.planning.compiled import Compiled, compile_step
from neva_jax.planning.flops import flops_per_row
from neva_jax.planning.memory import GIB, estimate
from neva_jax.planning.speed import default_rate
from neva_jax.precision.fp8_recipe import choose_backend
from neva_jax.precision.policy import compute_dtype
from neva_jax.training.guard import guard_state
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.setup import (
    abstract_optimizer,
    abstract_parameters,
    as_held,
    as_saved,
    initial_fp8_state,
    initialise_optimizer,
)
from neva_jax.training.shortcuts import Prefix, compute_prefix, prefix_tokens
from neva_jax.training.step import TrainState

WARMUP = 3  # steps before those that are timed
TRACED = 3  # steps of a profile
PACKAGES = ("jax", "jaxlib", "flax", "optax")
# What of NCCL's environment changes how fast transfers are.
NCCL = (
    *("NCCL_ALGO", "NCCL_CTA_POLICY", "NCCL_MAX_CTAS", "NCCL_MAX_NCHANNELS", "NCCL_MIN_CTAS", "NCCL_MIN_NCHANNELS"),
    *("NCCL_NVLS_ENABLE", "NCCL_P2P_DISABLE", "NCCL_PROTO"),
)


def measure(config: Config, *, steps: int, segments: int, data: str, plan: bool, profile: Path | None) -> dict:
    """The row of one configuration on the devices that are here.

    Args:
      segments: samples in a made-up row.
      data: `synthetic`, `jpeg` or `config` (see `benchmarks.train`).
      plan: also what `neva_jax.plan` estimates.
      profile: folder for a trace of `TRACED` more steps; the row then has their kernels.

    Raises:
      UserError: the configuration does not fit the devices.
      FloatingPointError: a loss is not finite.
    """
    began = time.perf_counter()
    sizes = parse_mesh_shape(config.mesh.shape, jax.device_count())
    with tempfile.TemporaryDirectory(prefix="neva_jax_bench_") as folder:
        if data == "jpeg":
            config = with_made_up_files(config, Path(folder))
        analysis, step, compile_s = timed_compile(config, sizes)
        accumulate = config.train.global_batch // (config.train.micro_batch * sizes["data"] * sizes["fsdp"])
        mesh = make_mesh(sizes)
        devices = list(mesh.devices.flat)
        count = WARMUP + steps + (TRACED + 1 if profile else 0) + 1
        stream = made_up(config, segments) if data == "synthetic" else loaded(config, count)
        with jax.set_mesh(mesh):
            state, frozen = random_state(config, mesh)
            prefix, stream = _prefix(config, mesh, {**frozen, **state.trained}, stream)
            run = _Run(step, state, frozen, stream, mesh, accumulate, prefix)
            before = _peak(devices)
            started = time.perf_counter()
            first_loss = run.wait(run.start(0))
            first_step_s = time.perf_counter() - started
            ready_s = time.perf_counter() - began
            run.data_wait = 0.0
            times, losses = run_steps(run.start, run.wait, steps, WARMUP - 1)
            waited = run.data_wait / (steps + WARMUP - 1)
            kernels = _profile(run, profile, devices[0]) if profile else {}
    peak, samples = _peak(devices), run.batch.samples
    timing = spread(times)
    per_s = samples / timing["step_ms"] * 1e3
    attention = _attention(config, len(devices))
    tflop = flops_per_row(config, attention).model / 1e12 * config.train.global_batch / samples
    rate = default_rate(config)
    return {
        "bench": "train",
        "impl": "neva_jax",
        **describe(config),
        "backend": _linear_backend(config, len(devices)),
        "attention": attention,
        "remat": config.train.remat,
        "unroll": config.train.unroll,
        **({} if run.short is None else {"short": float(run.short)}),
        "mesh": {axis: size for axis, size in sizes.items() if size > 1},
        "sequence_parallel": config.mesh.sequence_parallel,
        "overlap": config.mesh.overlap,
        "accumulate": accumulate,
        **tokens_per_sample(run.batch),
        "samples_per_step": samples,
        **timing,
        "samples_per_s": round(per_s, 3),
        "samples_per_s_per_gpu": round(per_s / len(devices), 3),
        "data": data,
        "data_wait_ms": round(1e3 * waited, 3),
        "tflop_per_sample": round(tflop, 4),
        "tflops_per_gpu": round(tflop * per_s / len(devices), 1),
        "peak_tflops": rate,
        "utilisation": round(tflop * per_s / len(devices) / rate, 4),
        "peak_gib": _gib(peak),
        "peak_before_steps_gib": _gib(before),
        "compiled_gib": _gib(analysis.total),
        **(_planned(config, sizes, devices[0]) if plan else {}),
        "compile_s": round(compile_s, 2),
        "first_step_s": round(first_step_s, 2),
        "start_to_first_step_s": round(ready_s, 2),
        "losses": [first_loss, *losses],
        **kernels,
        "gpu": devices[0].device_kind,
        "gpus": len(devices),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "nccl": {name: os.environ[name] for name in NCCL if name in os.environ},
        **conditions(*PACKAGES),
    }


def timed_compile(config: Config, sizes: dict[str, int]) -> tuple[Compiled, Any, float]:
    """(its memory, the compiled step, seconds of tracing and compiling)"""
    started = time.perf_counter()
    analysis, step = compile_step(config, sizes)
    return analysis, step, time.perf_counter() - started


def random_state(config: Config, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
    """(state, frozen parameters) on their shards, made layer by layer, so that making them holds less than a step."""
    _, abstract = abstract_parameters(config, mesh)
    params = as_held(config, random_weights(as_saved(config, abstract), config.run.seed), abstract)
    trained = {name: params[name] for name in trained_components(config.model)}
    frozen = {name: params[name] for name in frozen_components(config.model)}
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    shapes = {name: abstract[name] for name in trained}
    moments = abstract_optimizer(optimizer, shapes, mesh, config.mesh.zero1)
    counter, guard = jax.device_put((jnp.int32(0), guard_state(config.guard, None)), replicated(mesh))
    moments = initialise_optimizer(optimizer, trained, moments)
    state = TrainState(counter, trained, moments, guard, fp8=initial_fp8_state(config, mesh))
    return jax.block_until_ready((state, frozen))


def _prefix(
    config: Config, mesh: Mesh, params: dict[str, Any], stream: Iterator[Batch]
) -> tuple[Prefix | None, Iterator[Batch]]:
    """What `train.constant_prefix` needs, from the first row of the stream; and the stream, from that row on."""
    if not config.train.constant_prefix:
        return None, stream
    first = next(stream)
    row = {name: array[0] for name, array in first.arrays.items()} | {"bad_rows": first.bad_rows}
    tokens = prefix_tokens(row, config.train.constant_prefix)
    return compute_prefix(config, mesh, params, tokens, quantize_frozen=True), itertools.chain([first], stream)


def random_weights(abstract: dict[str, Any], seed: int) -> dict[str, Any]:
    """Weights of the right scale straight onto their shards, one array and one layer at a time."""
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


@dataclasses.dataclass
class _Run:
    """The loop of training: a batch from the stream, onto the mesh, one step."""

    step: Any
    state: TrainState
    frozen: dict[str, Any]
    stream: Iterator[Batch]
    mesh: Mesh
    accumulate: int
    prefix: Prefix | None = None
    batch: Batch | None = None
    data_wait: float = 0.0
    short: jax.Array | None = None

    def start(self, number: int) -> jax.Array:
        """Starts the next step; its loss is not waited for. Raises UserError for rows that make no batch."""
        before = time.perf_counter()
        self.batch = next(self.stream)
        self.data_wait += time.perf_counter() - before
        if not self.batch.arrays:
            raise UserError(f"{self.batch.bad_rows[0].message}; measure with rows that fit the template and --tokens")
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            arrays = place_batch(self.mesh, self.batch.arrays, self.accumulate)
            self.state, metrics = self.step(self.state, self.frozen, arrays, self.prefix)
        self.short = metrics.get("short")
        return metrics["loss"]

    @staticmethod
    def wait(loss: jax.Array) -> float:
        """The loss, when it is there."""
        return float(loss)


def _profile(run: _Run, folder: Path, device: jax.Device) -> dict[str, Any]:
    run.wait(run.start(0))
    jax.profiler.start_trace(str(folder))
    pending = [run.start(i) for i in range(TRACED)]
    for loss in pending:
        run.wait(loss)
    jax.profiler.stop_trace()
    return kernel_table(folder, TRACED, run.step.as_text()) if device.platform == "gpu" else {}


def _attention(config: Config, devices: int) -> str:
    backends = choose_backends(config.model, compute_dtype(config.precision), most_segments(config.data), devices)
    return backends.packed if config.data.pack else backends.single


def _linear_backend(config: Config, devices: int) -> str:
    fp8 = config.precision.compute.startswith("fp8")
    return choose_backend(config.precision.fp8, config, devices)[0] if fp8 else "xla"


def _peak(devices: list[jax.Device]) -> int | None:
    """The most bytes that a device of this process has held; None where devices do not tell."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices if device in _local()]
    return None if None in peaks else max(peaks)


def _local() -> list[jax.Device]:
    return jax.local_devices()


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / GIB, 3)


def _planned(config: Config, sizes: dict[str, int], device: jax.Device) -> dict[str, Any]:
    memory = estimate(config, sizes, "cpu" if device.platform == "cpu" else "gpu").memory
    parts = {name: _gib(size) for name, size in dataclasses.asdict(memory).items()}
    return {"planned_gib": _gib(memory.total), "planned_parts_gib": parts}
