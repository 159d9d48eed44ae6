"""The devices that programs are compiled for: those that are here, or GPUs of a named kind that need not be.

XLA compiles for a GPU that it has only a description of, on any machine with JAX's CUDA packages (`jax[cuda13]`). The
program cannot run, but what it holds and sends is what it will be: memory, kernels, collectives.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.experimental import topologies

from neva_jax.errors import UserError

_devices: ContextVar[Sequence[jax.Device] | None] = ContextVar("devices", default=None)

# What XLA's compiler asks of a card, from its makers' tables (Hopper: 132 multiprocessors, 228 KiB of shared memory in
# each, 50 MiB of L2) and as CUDA reports them.
_HOPPER = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: BANDWIDTH device_memory_size: MEMORY
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NAME"
"""
TARGETS = {  # name on a card, bytes per second, bytes of memory
    "h100": ("NVIDIA H100 80GB HBM3", 3_352_320_000_000, 84_978_434_048),
    "h200": ("NVIDIA H200", 4_800_000_000_000, 150_754_820_096),
}


def target_devices() -> Sequence[jax.Device]:
    """The devices that are compiled for: JAX's, but inside `compiling_for`."""
    return jax.devices() if _devices.get() is None else _devices.get()


@contextmanager
def compiling_for(devices: Sequence[jax.Device] | None) -> Iterator[None]:
    """Models, recipes and programs made inside are for these devices; None changes nothing."""
    token = _devices.set(devices)
    try:
        yield
    finally:
        _devices.reset(token)


def described_gpus(name: str, count: int) -> list[jax.Device]:
    """`count` GPUs of one host that need not be here, for `compiling_for`.

    Args:
      name: of `TARGETS`.

    Raises:
      UserError: an unknown name, or JAX's CUDA packages are not here.
    """
    if name not in TARGETS:
        raise UserError(f"--compile-for {name}: known are {', '.join(TARGETS)}")
    card, bandwidth, memory = TARGETS[name]
    described = _HOPPER.replace("NAME", card).replace("BANDWIDTH", str(bandwidth)).replace("MEMORY", str(memory))
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=described
        )
    except Exception as error:  # whatever a missing, broken or too old plugin raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--compile-for {name}: JAX cannot compile for a GPU here ({reason}); it needs no GPU, "
            'but its CUDA packages: pip install "jax[cuda13]"'
        ) from None
    return list(topology.devices)
