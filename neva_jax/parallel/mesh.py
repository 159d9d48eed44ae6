"""The mesh, and the one table from logical axes to mesh axes.

Models name what a dimension means (`heads`, `mlp`, `batch`, …) and never a mesh axis. This table alone says where
each dimension lives; changing a layout means changing a line here.

    mesh axis   what it splits
    data        rows of the batch; parameters are copies
    fsdp        rows of the batch, and the embedding dimension of parameters
    tensor      heads, MLP width and vocabulary
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neva_jax.config import MESH_AXES
from neva_jax.errors import UserError

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    # of activations
    "batch": ("data", "fsdp"),
    "length": None,
    "features": None,
    # of parameters; heads, kv_heads, mlp and vocab of activations as well
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "patch": None,
    "position": None,
    "norm": None,
}

Axes = Sequence[str | None]


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor over all devices (or those given), which the compiler may partition."""
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def one_device_mesh() -> Mesh:
    """The mesh of a command that runs on a single device."""
    return make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])


def spec(axes: Axes) -> PartitionSpec:
    """Logical axes of one array -> its PartitionSpec; None leaves a dimension whole.

    Raises:
      ValueError: an unknown logical axis, or two dimensions of one array on the same mesh axis.
    """
    parts = [None if axis is None else _mesh_axes(axis) for axis in axes]
    used = [name for part in parts for name in ((part,) if isinstance(part, str) else part or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} put two dimensions on one mesh axis: {parts}")
    return PartitionSpec(*parts)


def _mesh_axes(axis: str) -> str | tuple[str, ...] | None:
    if axis not in LOGICAL_AXES:
        raise ValueError(f"unknown logical axis {axis!r}; the table knows {', '.join(LOGICAL_AXES)}")
    return LOGICAL_AXES[axis]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler where an activation lives; does nothing where no mesh is set (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def shardings(mesh: Mesh, variables: nnx.State) -> dict:
    """A NamedSharding for each variable of a (possibly abstract) state, as a dictionary of the same tree.

    Raises:
      UserError: a dimension that the mesh does not divide, with parameter, shape and axis size.
    """
    leaves = {path: _variable_sharding(mesh, path, variable) for path, variable in nnx.to_flat_state(variables)}
    return nnx.traversals.unflatten_mapping(leaves)


def _variable_sharding(mesh: Mesh, path: tuple, variable: nnx.Variable) -> NamedSharding:
    axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
    assert len(axes) == len(shape), (path, axes, shape)
    partition = spec(axes)
    for axis, size, part in zip(axes, shape, partition, strict=True):
        ways = int(np.prod([mesh.shape[name] for name in ((part,) if isinstance(part, str) else part or ())]))
        if size % ways:
            name = ".".join(map(str, path))
            raise UserError(
                f"mesh.shape: {axis}={size} of {name} {shape} is not divisible by the mesh axis {part}={ways}"
            )
    return NamedSharding(mesh, partition)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def place_batch(mesh: Mesh, batch: dict[str, Any], accumulate: int) -> dict[str, jax.Array]:
    """Host arrays [B, ...] -> device arrays [A, B/A, ...], rows spread over the axes of `batch`.

    Micro batch a holds rows a*B/A ... (a+1)*B/A - 1, whatever the mesh.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, *spec(("batch",))))
    return {
        name: jax.device_put(array.reshape(accumulate, -1, *array.shape[1:]), sharding) for name, array in batch.items()
    }
