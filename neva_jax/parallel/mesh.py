"""The mesh, and the one table from logical axes to mesh axes.

Models name what a dimension means (`heads`, `mlp`, `batch`, …) and never a mesh axis. This table alone says where
each dimension lives; changing a layout means changing a line here.

    mesh axis   what it splits
    data        rows of the batch; parameters are copies (their moments may be split: `zero1`)
    fsdp        rows of the batch, and parameters (which dimension of them: `_variable_sharding`)
    tensor      heads, MLP width and vocabulary; with sequence parallelism the residual stream's rows (or length) too

`data` is outermost: its groups lie on different hosts where there are several, and those of `tensor` on one. Which
collectives follow from the table is written down, layout by layout, in docs/parallelism.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neva_jax.config import MESH_AXES
from neva_jax.derived import nearest
from neva_jax.errors import UserError

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    # of activations
    "batch": ("data", "fsdp"),
    "rows": "data",  # the batch during the look-up in a table whose other dimension is split over fsdp
    "images": ("data", "fsdp", "tensor"),  # the images of a batch, in a vision encoder that is not split itself
    "length": None,
    "split_batch": ("data", "fsdp", "tensor"),  # of the residual stream, with sequence parallelism,
    "split_length": "tensor",  # or where there are too few rows for that
    "features": None,
    # of parameters; heads, kv_heads, mlp and vocab of activations as well
    "layers": None,
    "embed": "fsdp",
    "columns": "fsdp",  # the embedding dimension of a table whose rows are looked up
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "patch": None,
    "position": None,
    "norm": None,
}

# Axes that may be shorter than their mesh axis, which they must then divide: each device holds them whole, and
# computes with the one slice that is its own (`spread`).
GROUPED = ("kv_heads",)

Axes = Sequence[str | None]


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor over the first devices (of those given); the compiler may partition."""
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    ordered = in_order(jax.devices() if devices is None else devices)[: math.prod(shape)]
    return Mesh(np.array(ordered).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def in_order(devices: Sequence[Any]) -> list[Any]:
    """Devices slice by slice and host by host: cut into a mesh, the last axes stay within a host as far as they fit."""
    return sorted(devices, key=lambda device: (getattr(device, "slice_index", 0), device.process_index, device.id))


def one_device_mesh() -> Mesh:
    """The mesh of a command that runs on a single device."""
    return make_mesh(dict.fromkeys(MESH_AXES, 1), jax.local_devices()[:1])


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
    """Tells the compiler where an activation lives; does nothing where no mesh is set (`jax.set_mesh`).

    A dimension of `GROUPED` that is shorter than its mesh axis stays whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    whole = [axis in GROUPED and size % ways(axis) for axis, size in zip(axes, x.shape, strict=True)]
    axes = tuple(None if short else axis for axis, short in zip(axes, whole, strict=True))
    return jax.lax.with_sharding_constraint(x, spec(axes))


def constrain_stream(x: jax.Array, sequence_parallel: bool) -> jax.Array:
    """`constrain` for the residual stream [B, T, D]."""
    return constrain(x, *stream_axes(x, sequence_parallel))


def stream_axes(x: jax.Array, sequence_parallel: bool) -> tuple[str, str, str]:
    """The logical axes of the residual stream [B, T, D].

    With sequence parallelism each device of `tensor` holds rows of its own or, where there are too few, a part of each
    row: collectives put rows in place, but parts take a copy before or after each.
    """
    if sequence_parallel and x.shape[0] % ways("split_batch") == 0:
        return "split_batch", "length", "features"
    return "batch", "split_length" if sequence_parallel else "length", "features"


def divides(x: jax.Array, axes: Axes) -> bool:
    """Whether the current mesh splits an array with these logical axes into equal parts."""
    return all(axis is None or size % ways(axis) == 0 for axis, size in zip(axes, x.shape, strict=True))


def ways(axis: str) -> int:
    """Into how many parts the current mesh (`jax.set_mesh`) splits a logical axis; 1 where none is set."""
    return _ways(jax.sharding.get_abstract_mesh().shape, _mesh_axes(axis))


def ways_of(mesh: Mesh, axis: str) -> int:
    """Into how many parts a mesh splits a logical axis."""
    return _ways(mesh.shape, _mesh_axes(axis))


def _ways(shape: Mapping[str, int], part: str | tuple[str, ...] | None) -> int:
    return math.prod(shape.get(name, 1) for name in ((part,) if isinstance(part, str) else part or ()))


def spread(x: jax.Array, dim: int, axes: Axes) -> jax.Array:
    """Repeats each slice of dimension `dim` until every device of its mesh axis has one (see `GROUPED`).

    With 2 heads on 8 devices: a b -> a a a a b b b b. Where the dimension divides, x is returned as it is.
    """
    split, size = ways(axes[dim]), x.shape[dim]
    if size % split == 0:
        return x
    whole = constrain(x, *(None if i == dim else axis for i, axis in enumerate(axes)))
    return constrain(jnp.repeat(whole, split // size, axis=dim), *axes)


def copy_for_each(x: jax.Array, axis: str, *axes: str | None) -> jax.Array:
    """[...] -> [R, ...], a copy of x for each of the R parts of logical `axis`; x itself has the logical `axes`.

    The gradients of the copies are added only at the end. A weight that a loop uses is gathered once before the loop,
    and its gradient reduced once after it, instead of in every iteration.
    """
    return constrain(jnp.broadcast_to(x, (ways(axis), *x.shape)), axis, *axes)


def shardings(mesh: Mesh, variables: nnx.State) -> dict:
    """A NamedSharding for each variable of a (possibly abstract) state, as a dictionary of the same tree.

    Raises:
      UserError: a dimension that the mesh does not divide, with parameter, shape and axis size.
    """
    leaves = {path: _variable_sharding(mesh, path, variable) for path, variable in nnx.to_flat_state(variables)}
    return nnx.traversals.unflatten_mapping(leaves)


def _variable_sharding(mesh: Mesh, path: tuple, variable: nnx.Variable) -> NamedSharding:
    """What the table says; but `fsdp` splits a dimension before `embed`, if there is one to split.

    Parts of the first dimension are gathered one behind the other. Those of another must be put in place: XLA gathers
    them transposed and, where a product wants them as they were (FP8's), transposes the whole once more.
    """
    axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
    assert len(axes) == len(shape), (path, axes, shape)
    parts = list(spec(axes))
    if "embed" in axes and mesh.shape["fsdp"] > 1:
        embed = axes.index("embed")
        for i in range(axes[0] == "layers", embed):
            if _ways(mesh.shape, parts[i]) > 1:
                break  # nothing behind it lies in one piece
            if shape[i] % mesh.shape["fsdp"] == 0:
                parts[i], parts[embed] = "fsdp", None
                break
    for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        split = _ways(mesh.shape, parts[i])
        if axis in GROUPED and split % size == 0 and split > size:
            parts[i] = None
        elif size % split:
            name = ".".join(map(str, path))
            raise UserError(
                f"mesh.shape: {axis}={size} of {name} {shape} is not divisible by the mesh axis {parts[i]}={split}; "
                f"{nearest(size, split)} would do"
            )
    return NamedSharding(mesh, PartitionSpec(*parts))


def zero1_sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """The sharding of a parameter's optimizer moments, split over `data` too (ZeRO-1, Rajbhandari et al. 2020).

    The first dimension is split further where it divides, else the largest that does: what is gathered along any other
    must be copied into place. One over `tensor` comes last of all: the gradient is a sum over rows, which ends on the
    other dimensions' shards for nothing. A parameter without such a dimension keeps whole moments.
    """
    mesh, parts = leaf.sharding.mesh, list(leaf.sharding.spec)
    parts += [None] * (len(leaf.shape) - len(parts))
    inner = leaf.sharding.shard_shape(leaf.shape)
    candidates = [i for i in range(len(inner)) if inner[i] % mesh.shape["data"] == 0]
    if mesh.shape["data"] == 1 or not candidates:
        return leaf.sharding
    cut = ["tensor" in (part or ()) and mesh.shape["tensor"] > 1 for part in parts]
    best = max(candidates, key=lambda i: (not cut[i], i == 0, inner[i]))
    before = (parts[best],) if isinstance(parts[best], str) else tuple(parts[best] or ())
    parts[best] = (*before, "data")
    return NamedSharding(mesh, PartitionSpec(*parts))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def own_rows(mesh: Mesh, size: int, accumulate: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the `size` rows of a global batch lie on devices of this process.

    Returns:
      rows: their numbers, ascending. told: [len(rows)] bool, those that no process before this one has as well: each
      row of a batch is told by one process, however many read it (where `tensor` reaches across processes).
    """
    columns = size // accumulate
    parts = NamedSharding(mesh, spec(("batch",))).devices_indices_map((columns,))
    reader = np.full(columns, jax.process_count())
    mine = np.zeros(columns, bool)
    for device, (part,) in parts.items():
        reader[part] = np.minimum(reader[part], device.process_index)
        mine[part] |= device.process_index == jax.process_index()
    held = np.flatnonzero(mine)
    rows = np.concatenate([micro * columns + held for micro in range(accumulate)])
    return rows, np.tile(reader[held] == jax.process_index(), accumulate)


def place_batch(mesh: Mesh, batch: dict[str, Any], accumulate: int) -> dict[str, jax.Array]:
    """Host arrays [b, ...] of this process's rows -> device arrays [A, B/A, ...], rows spread over the axes of `batch`.

    b is B for one process; for several, the rows are those of `own_rows`. Micro batch a holds rows a*B/A ...
    (a+1)*B/A - 1, whatever the mesh.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, *spec(("batch",))))
    groups = ways_of(mesh, "batch")
    held, _ = own_rows(mesh, groups, 1)

    def place(array: np.ndarray) -> jax.Array:
        local = array.reshape(accumulate, -1, *array.shape[1:])
        each = local.shape[1] // len(held)  # columns of a group

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            first = int(np.searchsorted(held, (index[1].start or 0) // each)) * each
            return local[:, first : first + each]

        return jax.make_array_from_callback((accumulate, each * groups, *local.shape[2:]), sharding, shard)

    return {name: place(array) for name, array in batch.items()}
