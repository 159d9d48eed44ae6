"""The real train step, compiled from shapes for the devices that are here: what XLA says it will hold."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from neva_jax.checks import check_mesh
from neva_jax.config import Config
from neva_jax.derived import dropout_seed, frozen_components, trained_components
from neva_jax.errors import UserError
from neva_jax.parallel.mesh import make_mesh, replicated
from neva_jax.planning.trace import batch_shapes
from neva_jax.precision import fp8
from neva_jax.training.guard import guard_state
from neva_jax.training.optimizer import learning_rate, make_optimizer
from neva_jax.training.setup import abstract_optimizer, abstract_parameters, initial_fp8_state, place_updates
from neva_jax.training.step import TrainState, layout_of, make_train_step


@dataclass(frozen=True)
class Compiled:
    """`compiled.memory_analysis()` in bytes per device.

    arguments of the step, results that take no argument's place, and temporary buffers: kept activations and gradients
    are among these.
    """

    arguments: int
    results: int
    temporary: int
    platform: str

    @property
    def total(self) -> int:
        """What must fit at once."""
        return self.arguments + self.results + self.temporary


def compile_step(config: Config, sizes: dict[str, int]) -> tuple[Compiled, Any]:
    """Compiles the train step for a mesh of the devices present; nothing is allocated on them.

    Returns:
      (its memory, the compiled step)

    Raises:
      UserError: fewer devices than the mesh needs, or a dimension that it does not divide.
    """
    needed = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    if needed > jax.device_count():
        raise UserError(
            f"--compile: the mesh needs {needed} devices, but {jax.device_count()} are here; on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed} makes them"
        )
    mesh = make_mesh(sizes, jax.devices()[:needed])
    accumulate = check_mesh(config, sizes)
    graphdef, parameters = abstract_parameters(config, mesh)
    trained = {name: parameters[name] for name in trained_components(config.model)}
    frozen = {name: parameters[name] for name in frozen_components(config.model)}
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    moments = abstract_optimizer(optimizer, trained, mesh, config.mesh.zero1)
    optimizer = place_updates(optimizer, trained, config.mesh.zero1)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)),
        trained,
        moments,
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), guard_state(config.guard, None)
        ),
        fp8=initial_fp8_state(config, mesh),
    )
    if config.optimizer.ema_decay is not None:
        state = state._replace(ema=trained)
    judged_by = config.guard.spike_factor, config.optimizer.ema_decay, config.optimizer.ema_every
    schedule, chunk = learning_rate(config.optimizer, config.train.steps), config.train.loss_chunk
    options = fp8.compiler_options(fp8.recipe(config, mesh.size), config.train.unroll)
    step = make_train_step(
        *(graphdef, optimizer, schedule, chunk, config.data.pack, dropout_seed(config)),
        *judged_by,
        compiler_options=options,
        layout=layout_of(state),
    )
    batch = batch_shapes(config, accumulate, config.train.global_batch // accumulate, mesh)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, frozen, batch).compile()
    analysis = compiled.memory_analysis()
    memory = Compiled(
        arguments=analysis.argument_size_in_bytes,
        results=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporary=analysis.temp_size_in_bytes,
        platform=jax.devices()[0].platform,
    )
    return memory, compiled
