"""The real train step, compiled from shapes, for the devices here or for GPUs that need not be: what it will hold."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from neva_jax.checks import check_mesh
from neva_jax.config import Config
from neva_jax.derived import trained_components
from neva_jax.errors import UserError
from neva_jax.parallel.compiler import compiler_options
from neva_jax.parallel.mesh import make_mesh
from neva_jax.parallel.target import compiling_for, described_gpus, target_devices
from neva_jax.training.ahead import configured_step, step_shapes
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.setup import abstract_optimizer, abstract_parameters, place_updates
from neva_jax.training.shortcuts import whole_graphdef


@dataclass(frozen=True)
class Compiled:
    """`compiled.memory_analysis()` in bytes per device.

    arguments of the step, results that take no argument's place, and temporary buffers: kept activations and gradients
    are among these. platform: JAX's, or the target (`h200`).
    """

    arguments: int
    results: int
    temporary: int
    platform: str

    @property
    def total(self) -> int:
        """What must fit at once."""
        return self.arguments + self.results + self.temporary


def compile_step(config: Config, sizes: dict[str, int], target: str | None = None) -> tuple[Compiled, Any]:
    """Compiles the train step for a mesh of the devices present, or of GPUs that are not; nothing is allocated.

    Args:
      target: a kind of GPU that need not be here (`parallel.target.TARGETS`). XLA then tries no kernels out, and
        Transformer Engine, which `auto` would take there, is left out where it is not installed.

    Returns:
      (its memory, the compiled step)

    Raises:
      UserError: fewer devices than the mesh needs, or a dimension that it does not divide.
    """
    needed = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    with compiling_for(None if target is None else described_gpus(target, needed)):
        if needed > len(target_devices()):
            raise UserError(
                f"--compile: the mesh needs {needed} devices, but {len(target_devices())} are here; on a CPU, "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={needed} makes them"
            )
        mesh = make_mesh(sizes, target_devices()[:needed])
        lowered = _lowered(config, sizes, mesh)
        compiled = lowered.compile(None if target is None else {"xla_gpu_autotune_level": 0})
    analysis = compiled.memory_analysis()
    memory = Compiled(
        arguments=analysis.argument_size_in_bytes,
        results=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporary=analysis.temp_size_in_bytes,
        platform=mesh.devices.flat[0].platform if target is None else target,
    )
    return memory, compiled


def _lowered(config: Config, sizes: dict[str, int], mesh: Mesh) -> jax.stages.Lowered:
    """The train step as train.py makes it, from shapes."""
    accumulate = check_mesh(config, sizes)
    graphdef, parameters = abstract_parameters(config, mesh)
    trained = {name: parameters[name] for name in trained_components(config.model)}
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    moments = abstract_optimizer(optimizer, trained, mesh, config.mesh.zero1)
    optimizer, apply_updates = place_updates(optimizer, trained, config.mesh.zero1)
    shapes = step_shapes(config, mesh, parameters, moments, accumulate)
    options = compiler_options(config, sizes["fsdp"])
    whole = whole_graphdef(config, mesh)
    step = configured_step(config, graphdef, optimizer, apply_updates, shapes[0], options, whole)
    with jax.set_mesh(mesh):
        return step.lower(*shapes)
