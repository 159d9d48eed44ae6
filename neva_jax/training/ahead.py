"""The train step from shapes alone: it is compiled while the weights are read, so that a start takes the longer of both
and not their sum."""

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neva_jax.config import Config
from neva_jax.data.tiles import tiles_per_row
from neva_jax.derived import dropout_seed, frozen_components, trained_components
from neva_jax.parallel.mesh import replicated, spec
from neva_jax.precision import fp8
from neva_jax.precision.fp8_recipe import make_recipe
from neva_jax.training.guard import guard_state
from neva_jax.training.optimizer import learning_rate
from neva_jax.training.setup import Parameters
from neva_jax.training.shortcuts import Arrays, Prefix, abstract_prefix
from neva_jax.training.step import TrainState, layout_of, make_train_step


def step_shapes(
    config: Config, mesh: Mesh, parameters: Parameters, moments: Any, accumulate: int
) -> tuple[TrainState, Parameters, Arrays, Prefix | None]:
    """What a train step takes (`training.step.make_train_step`), as shapes with shardings; batches of the longest rows.

    Args:
      parameters, moments: as `setup.abstract_parameters` and `abstract_optimizer` describe them.
    """

    def everywhere(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree)

    trained = {name: parameters[name] for name in trained_components(config.model)}
    frozen = {name: parameters[name] for name in frozen_components(config.model)}
    recipe = make_recipe(config, mesh.size)
    scales = jax.eval_shape(lambda: fp8.initial_state(recipe, trained=not config.model.llm.freeze))
    step, guard, scales = everywhere((np.int32(0), guard_state(config.guard, None), scales))
    average = {} if config.optimizer.ema_decay is None else trained
    prefix = abstract_prefix(config, mesh) if config.train.constant_prefix else None
    batch = batch_shapes(config, accumulate, config.train.global_batch // accumulate, mesh)
    return TrainState(step, trained, moments, guard, average, scales), frozen, batch, prefix


def batch_shapes(config: Config, accumulate: int, rows: int, mesh: Mesh | None = None) -> Arrays:
    """A step's batch [A, rows, ...] as shapes, spread over `mesh` if there is one (parallel.mesh.place_batch)."""
    length, side = config.data.max_length, config.model.vision.image_size
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, *spec(("batch",))))

    def array(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((accumulate, rows, *shape), dtype, sharding=sharding)

    names = ("tokens", "targets", "positions", "segment_ids", "image_slots")
    return {
        **{name: array((length,), jnp.int32) for name in names},
        "loss_weights": array((length,), jnp.float32),
        "images": array((tiles_per_row(config), side, side, 3), jnp.uint8),
    }


def configured_step(
    config: Config,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    apply_updates: Callable[[Parameters, Parameters], Parameters],
    state: TrainState,
    compiler_options: dict[str, Any] | None,
    whole_graphdef: nnx.GraphDef | None,
) -> Callable[[TrainState, Parameters, Arrays, Prefix | None], tuple[TrainState, Arrays]]:
    """`training.step.make_train_step` with what the configuration decides.

    Args:
      optimizer, apply_updates: as `setup.place_updates` returns them.
      state: the state, or its shapes.
    """
    return make_train_step(
        *(graphdef, optimizer, learning_rate(config.optimizer, config.train.steps), config.train.loss_chunk),
        *(config.data.pack, dropout_seed(config)),
        *(config.guard.spike_factor, config.optimizer.ema_decay, config.optimizer.ema_every),
        *(compiler_options, layout_of(state), apply_updates, config.train.labelled_positions, whole_graphdef),
    )


class CompiledAhead(threading.Thread):
    """Compiles a jitted step for `shapes`; once this has ended, a call with such arguments compiles no more.

    What goes wrong (`error`) is left to that call, which meets it again unless it was the thread's own.
    """

    def __init__(self, step: Any, mesh: Mesh, shapes: tuple, ready: Callable[[], bool] = lambda: True):
        """`ready` is asked between tracing and compiling, and may wait: XLA times kernels. False: do not compile."""
        super().__init__(name="compile")
        self.error: Exception | None = None
        self._step, self._mesh, self._shapes, self._ready = step, mesh, shapes, ready
        self.start()

    def run(self) -> None:
        """The thread."""
        try:
            with jax.set_mesh(self._mesh):
                lowered = self._step.lower(*self._shapes)
                if self._ready():
                    lowered.compile()
        except Exception as error:
            self.error = error
