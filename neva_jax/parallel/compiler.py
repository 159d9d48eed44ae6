"""What XLA is told about a step: options of its GPU compiler that made one faster, or compile sooner."""

import os
from typing import Any

from neva_jax.config import Config
from neva_jax.parallel.target import target_devices

# XLA would try its Triton products too, for minutes (for eight 7B layers in FP8 on an H100 more than 150 s against 5,
# for eight unrolled ones in bf16 more than 55 s; without, 32 take 16), though cublasLt's are there.
NO_TRITON_PRODUCTS = {"xla_gpu_enable_triton_gemm": False}
# The products of both halves have the weights in common, and must not be joined.
HALVES_APART = {"xla_gpu_dot_merger_threshold_mb": 0}
# Two of a 7B's weights at once, for as much memory: fewer transfers begin and end, and none waits for another that has
# nothing beside it (docs/performance.md).
WEIGHTS_TOGETHER = {"xla_gpu_all_gather_combine_threshold_bytes": 128 * 2**20}


def compiler_options(config: Config, fsdp: int) -> dict[str, Any] | None:
    """Options for the programs of a run, over `fsdp` devices of that axis, but for those that XLA_FLAGS sets.

    None: nothing to tell, because this is no GPU.
    """
    if target_devices()[0].platform != "gpu":
        return None
    options = {}
    if config.train.unroll > 1 or config.precision.compute.startswith("fp8"):
        options |= NO_TRITON_PRODUCTS
    if config.mesh.overlap:
        options |= HALVES_APART
    if fsdp > 1:
        options |= WEIGHTS_TOGETHER
    given = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if f"--{name}=" not in given}
