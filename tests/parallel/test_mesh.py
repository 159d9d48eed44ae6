"""The table from logical to mesh axes, where parameters and batches land, and what does not divide."""

import dataclasses
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from neva_jax.config import MeshConfig
from neva_jax.derived import nearest
from neva_jax.errors import UserError
from neva_jax.models.neva import abstract_model
from neva_jax.parallel.mesh import (
    constrain,
    copy_for_each,
    in_order,
    make_mesh,
    one_device_mesh,
    place_batch,
    replicated,
    shardings,
    spec,
    spread,
    ways,
    zero1_sharding,
)
from tests.models.helpers import FP32, tiny_config


def mesh_of(data=1, fsdp=1, tensor=1):
    return make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, jax.devices()[: data * fsdp * tensor])


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ((), P()),
        ((None, None), P(None, None)),
        (("batch", "length", "features"), P(("data", "fsdp"), None, None)),
        (("batch", "length", "heads", "head_dim"), P(("data", "fsdp"), None, "tensor", None)),
        (("batch", "length", "kv_heads", "head_dim"), P(("data", "fsdp"), None, "tensor", None)),
        (("batch", "length", "mlp"), P(("data", "fsdp"), None, "tensor")),
        (("layers", "embed", "heads", "head_dim"), P(None, "fsdp", "tensor", None)),
        (("vocab", "columns"), P("tensor", "fsdp")),
        (("patch", "embed"), P(None, "fsdp")),
        (("position", "embed"), P(None, "fsdp")),
        (("layers", "norm"), P(None, None)),
        ((None, "embed"), P(None, "fsdp")),
    ],
)
def test_spec(axes, expected):
    assert spec(axes) == expected


def test_an_unknown_axis_is_named():
    with pytest.raises(ValueError, match=r"unknown logical axis 'head'; the table knows batch, .*heads.*, norm"):
        spec(("embed", "head"))


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("embed", "embed"), ("batch", "embed"), ("vocab", None, "heads")])
def test_two_dimensions_on_one_mesh_axis_are_refused(axes):
    with pytest.raises(ValueError, match="put two dimensions on one mesh axis"):
        spec(axes)


# --- meshes ----------------------------------------------------------------------------------------------------------


def test_a_mesh_has_all_axes_and_all_devices():
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 4})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert list(mesh.shape) == ["data", "fsdp", "tensor"]
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}


def test_one_device_mesh():
    mesh = one_device_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert list(mesh.devices.flat) == jax.devices()[:1]


def test_replicated():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    array = jax.device_put(np.arange(6), replicated(mesh))
    assert len(array.addressable_shards) == 8
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(6))


@dataclass(frozen=True)
class FakeDevice:
    """A device of several hosts, and perhaps of several slices."""

    id: int
    process_index: int
    slice_index: int = 0


def test_data_runs_over_hosts_and_tensor_stays_on_one():
    """2 hosts of 4 devices each, listed in turns: data=2,fsdp=2,tensor=2."""
    devices = [FakeDevice(id=4 * host + i, process_index=host) for i in (2, 0, 3, 1) for host in (1, 0)]
    mesh = np.array(in_order(devices)).reshape(2, 2, 2)
    for data, host in enumerate(mesh):
        assert {device.process_index for device in host.flat} == {data}
        assert [device.id for device in host.flat] == [4 * data, 4 * data + 1, 4 * data + 2, 4 * data + 3]


def test_a_slice_is_not_torn_apart_whatever_its_hosts_are_called():
    devices = [FakeDevice(id=i, process_index=i % 4, slice_index=i % 2) for i in range(8)]
    assert [device.slice_index for device in in_order(devices)] == [0] * 4 + [1] * 4


def test_a_mesh_does_not_depend_on_how_devices_are_listed():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(sizes, jax.devices()[::-1]) == make_mesh(sizes)


# --- parameters ------------------------------------------------------------------------------------------------------

WHOLE = P(None)
LAYER_WHOLE = P(None, None)
IN, OUT = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")  # of an MLP
TO_HEADS, FROM_HEADS = P(None, "fsdp", "tensor", None), P(None, "tensor", None, "fsdp")

EXPECTED = {
    "vision.class_token": WHOLE,
    "vision.patch": P("fsdp", None),
    "vision.position": P(None, "fsdp"),
    **{f"vision.{norm}.{part}": WHOLE for norm in ("pre_norm", "post_norm") for part in ("scale", "bias")},
    **{
        f"vision.layers.{norm}.{part}": LAYER_WHOLE
        for norm in ("attention_norm", "mlp_norm")
        for part in ("scale", "bias")
    },
    **{f"vision.layers.{name}": TO_HEADS for name in ("q", "k", "v")},
    **{f"vision.layers.{name}_bias": P(None, "tensor", None) for name in ("q", "k", "v")},
    "vision.layers.o": FROM_HEADS,
    "vision.layers.o_bias": LAYER_WHOLE,
    "vision.layers.up": IN,
    "vision.layers.up_bias": P(None, "tensor"),
    "vision.layers.down": OUT,
    "vision.layers.down_bias": LAYER_WHOLE,
    "projector.kernel_1": P("fsdp", "tensor"),
    "projector.bias_1": P("tensor"),
    "projector.kernel_2": P("tensor", "fsdp"),
    "projector.bias_2": WHOLE,
    "llm.embedding": P("tensor", "fsdp"),
    "llm.head": P("fsdp", "tensor"),
    "llm.norm.scale": WHOLE,
    "llm.layers.attention_norm.scale": LAYER_WHOLE,
    "llm.layers.mlp_norm.scale": LAYER_WHOLE,
    **{f"llm.layers.{name}": TO_HEADS for name in ("q", "k", "v")},
    "llm.layers.o": FROM_HEADS,
    "llm.layers.gate": IN,
    "llm.layers.up": IN,
    "llm.layers.down": OUT,
}


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, NamedSharding))
    return {".".join(str(part.key) for part in path): leaf for path, leaf in leaves}


def test_where_every_parameter_lives():
    mesh = mesh_of(fsdp=2, tensor=4)
    layout = by_name(shardings(mesh, abstract_model(tiny_config(), FP32)[1]))
    assert {name: sharding.spec for name, sharding in layout.items()} == EXPECTED
    assert all(sharding.mesh == mesh for sharding in layout.values())


@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [
        ({"data": 8}, {"llm.embedding": (40, 32), "llm.layers.q": (2, 32, 4, 8), "llm.layers.down": (2, 48, 32)}),
        ({"fsdp": 8}, {"llm.embedding": (40, 4), "llm.layers.q": (2, 4, 4, 8), "llm.layers.down": (2, 6, 32)}),
        (
            {"fsdp": 2, "tensor": 4},
            {"llm.embedding": (10, 16), "llm.layers.q": (2, 16, 1, 8), "llm.layers.down": (2, 12, 16)},
        ),
    ],
)
def test_what_one_device_holds(sizes, shapes):
    """Vocabulary 40, width 32, 4 heads of 8, MLP 48, 2 layers."""
    layout = by_name(shardings(mesh_of(**sizes), abstract_model(tiny_config(), FP32)[1]))
    whole = {"llm.embedding": (40, 32), "llm.layers.q": (2, 32, 4, 8), "llm.layers.down": (2, 48, 32)}
    assert {name: layout[name].shard_shape(shape) for name, shape in whole.items()} == shapes


@pytest.mark.parametrize(
    ("shape", "axes", "sizes", "expected"),
    [
        ((2, 6, 16), ("layers", "mlp", "embed"), {"fsdp": 2}, P(None, "fsdp", None)),
        ((2, 6, 16), ("layers", "mlp", "embed"), {"fsdp": 4}, P(None, "tensor", "fsdp")),  # 6 does not divide
        ((2, 6, 16), ("layers", "mlp", "embed"), {"fsdp": 2, "tensor": 2}, P(None, "tensor", "fsdp")),
        ((2, 6, 8, 16), ("layers", "heads", "head_dim", "embed"), {"fsdp": 4}, P(None, "tensor", "fsdp", None)),
        ((6, 8, 16), ("heads", "head_dim", "embed"), {"fsdp": 2, "tensor": 2}, P("tensor", None, "fsdp")),
        ((2, 12, 16), (None, "mlp", "embed"), {"fsdp": 2, "tensor": 2}, P("fsdp", "tensor", None)),
        ((2, 12, 16), (None, "mlp", "embed"), {"fsdp": 4}, P(None, "fsdp", None)),
        ((2, 12, 16), (None, "mlp", "embed"), {"fsdp": 4, "tensor": 2}, P(None, "tensor", "fsdp")),
        ((2, 16, 6), ("layers", "embed", "mlp"), {"fsdp": 2}, P(None, "fsdp", "tensor")),
        ((40, 16), ("vocab", "columns"), {"fsdp": 2}, P("tensor", "fsdp")),
    ],
)
def test_fsdp_splits_what_is_gathered_in_one_piece(shape, axes, sizes, expected):
    variable = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)
    found = shardings(mesh_of(**sizes), nnx.State({"kernel": variable}))
    assert found["kernel"].spec == expected


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (tiny_config(vocab=42), {"tensor": 4}, r"vocab=42 of llm\.(embedding \(42, 32\)|head \(32, 42\)) .* tensor=4"),
        (tiny_config(), {"tensor": 8}, r"(kv_)?heads=4 of (vision|llm)\.layers\.\w+ .* tensor=8"),
        (tiny_config(), {"fsdp": 3}, r"(embed|columns)=(16|32) of .* .* fsdp=3"),
    ],
)
def test_a_dimension_that_does_not_divide_is_named(config, sizes, message):
    with pytest.raises(UserError, match=rf"^mesh\.shape: {message}; .* would do$"):
        shardings(mesh_of(**sizes), abstract_model(config, FP32)[1])


@pytest.mark.parametrize(
    ("size", "ways", "text"),
    [
        (90, 4, "88 or 92 (or an axis of 3 or 5)"),
        (6, 4, "4 or 8 (or an axis of 3 or 6)"),
        (3, 8, "8 (or an axis of 3)"),
        (7, 2, "6 or 8 (or an axis of 1 or 7)"),
    ],
)
def test_nearest_sizes_that_divide(size, ways, text):
    assert nearest(size, ways) == text
    sizes, axes = (re.findall(r"\d+", part) for part in text.split("("))
    assert not [number for number in sizes if int(number) % ways]
    assert not [number for number in axes if size % int(number)]


def with_kv_heads(count):
    config = tiny_config(heads=8)
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, num_kv_heads=count))


@pytest.mark.parametrize("sizes", [{"tensor": 4}, {"fsdp": 2, "tensor": 4}])
def test_fewer_kv_heads_than_devices_lie_whole_on_each(sizes):
    layout = by_name(shardings(mesh_of(**sizes), abstract_model(with_kv_heads(2), FP32)[1]))
    assert layout["llm.layers.k"].spec == layout["llm.layers.v"].spec == P(None, "fsdp", None, None)
    assert layout["llm.layers.q"].spec == TO_HEADS
    split = by_name(shardings(mesh_of(**sizes), abstract_model(with_kv_heads(8), FP32)[1]))
    assert split["llm.layers.k"].spec == TO_HEADS


def test_kv_heads_that_are_no_divisor_are_refused():
    config = dataclasses.replace(
        tiny_config(), llm=dataclasses.replace(tiny_config().llm, num_heads=12, head_dim=4, num_kv_heads=6)
    )
    with pytest.raises(
        UserError, match=r"kv_heads=6 of llm\.layers\.[kv] .* tensor=4; 4 or 8 \(or an axis of 3 or 6\)"
    ):
        shardings(mesh_of(tensor=4), abstract_model(config, FP32)[1])


def test_a_vision_encoder_that_is_not_split_is_whole_on_each_device_of_tensor():
    state = abstract_model(tiny_config(), FP32, mesh=MeshConfig(vision_tensor=False))[1]
    layout = by_name(shardings(mesh_of(fsdp=2, tensor=4), state))
    vision = {name: sharding.spec for name, sharding in layout.items() if name.startswith("vision.")}
    assert not [name for name, partition in vision.items() if "tensor" in partition]
    assert vision["vision.layers.q"] == P(None, "fsdp", None, None)
    assert {name: sharding.spec for name, sharding in layout.items() if name not in vision} == {
        name: partition for name, partition in EXPECTED.items() if name not in vision
    }


@pytest.mark.parametrize(
    ("sizes", "shape", "partition", "expected"),
    [
        ({"data": 8}, (2, 32, 4, 8), (), P(None, "data", None, None)),  # the largest
        ({"data": 4, "tensor": 2}, (2, 32, 64), (None, None, "tensor"), P(None, "data", "tensor")),  # not over tensor
        ({"data": 4, "tensor": 2}, (2, 64), (None, "tensor"), P(None, ("tensor", "data"))),  # unless it must
        ({"data": 8}, (64, 32), ("tensor", "fsdp"), P(("tensor", "data"), "fsdp")),  # or an axis of 1
        ({"data": 2, "fsdp": 4}, (2, 32, 8), (None, "fsdp", None), P("data", "fsdp", None)),  # the first, if it can
        ({"data": 2, "fsdp": 4}, (3, 32, 8), (None, "fsdp", None), P(None, ("fsdp", "data"), None)),
        ({"data": 8}, (3, 5), (), P()),  # nothing divides
        ({"fsdp": 8}, (2, 32), (None, "fsdp"), P(None, "fsdp")),  # nothing to split over
    ],
)
def test_where_zero1_splits_a_moment(sizes, shape, partition, expected):
    mesh = mesh_of(**sizes)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*partition)))
    assert zero1_sharding(leaf) == NamedSharding(mesh, expected)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 4}])
def test_micro_batches_hold_the_rows_in_order_on_every_mesh(sizes):
    """24 rows in 3 micro batches: number a holds the rows 8a ... 8a + 7."""
    mesh = mesh_of(**sizes)
    host = {"tokens": np.arange(24 * 5).reshape(24, 5), "images": np.arange(24 * 4, dtype=np.uint8).reshape(24, 1, 4)}
    placed = place_batch(mesh, host, accumulate=3)
    assert set(placed) == {"tokens", "images"}
    for name, array in host.items():
        assert placed[name].dtype == (jnp.int32 if name == "tokens" else jnp.uint8)
        assert placed[name].shape == (3, 8, *array.shape[1:])
        for a in range(3):
            np.testing.assert_array_equal(placed[name][a], array[8 * a : 8 * a + 8])


def test_rows_are_spread_over_data_and_fsdp_and_copied_over_tensor():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    placed = place_batch(mesh, {"tokens": np.arange(24).reshape(24, 1)}, accumulate=3)["tokens"]
    held = {shard.device: np.asarray(shard.data)[:, :, 0] for shard in placed.addressable_shards}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        first = 2 * (2 * data + fsdp)
        np.testing.assert_array_equal(held[device], [[8 * a + first, 8 * a + first + 1] for a in range(3)])


# --- activations -----------------------------------------------------------------------------------------------------


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.ones((8, 4, 16))
    assert constrain(x, "batch", "length", "features") is x
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: constrain(x, "batch", "length", "mlp"))(x))


def test_constrain_places_an_activation():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: constrain(x + 1, "batch", "length", "mlp"))(jnp.zeros((8, 4, 16)))
    np.testing.assert_array_equal(out, np.ones((8, 4, 16)))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3)
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, 4, 8)}


def test_constrain_on_a_mesh_refuses_an_unknown_axis():
    with jax.set_mesh(mesh_of(data=2)), pytest.raises(ValueError, match="unknown logical axis 'width'"):
        jax.jit(lambda x: constrain(x, "batch", "width"))(jnp.zeros((8, 4)))


def test_heads_are_repeated_until_each_device_has_one():
    """2 heads on 4 devices; the gradient of a head is the sum over its two devices."""
    x = np.arange(6, dtype=np.float32).reshape(3, 2, 1)
    weight = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    with jax.set_mesh(mesh_of(data=2, tensor=4)):
        out = jax.jit(lambda x: spread(x, 1, (None, "kv_heads", None)))(x)
        grad = jax.jit(jax.grad(lambda x: jnp.sum(spread(x, 1, (None, "kv_heads", None)) * weight)))(x)
    np.testing.assert_array_equal(out, np.repeat(x, 2, axis=1))
    assert {shard.data.shape for shard in out.addressable_shards} == {(3, 1, 1)}
    np.testing.assert_array_equal(grad, weight.reshape(3, 2, 2, 1).sum(axis=2))


def test_heads_that_divide_are_left_alone():
    x = jnp.ones((3, 4, 1))
    assert spread(x, 1, (None, "kv_heads", None)) is x
    with jax.set_mesh(mesh_of(tensor=4)):
        assert jax.eval_shape(lambda x: spread(x, 1, (None, "kv_heads", None)), x).shape == (3, 4, 1)


def test_each_group_of_rows_has_a_copy():
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert copy_for_each(jnp.array(x), "batch", None, "vocab").shape == (1, 2, 4)
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        out = jax.jit(lambda x: copy_for_each(x, "batch", None, "vocab"))(x)
        assert ways("batch") == 4
    np.testing.assert_array_equal(out, np.broadcast_to(x, (4, 2, 4)))
    assert {shard.data.shape for shard in out.addressable_shards} == {(1, 2, 2)}
    assert ways("batch") == 1
