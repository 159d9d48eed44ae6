"""The reader of HLO that the tests of the layouts rely on."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from neva_jax.parallel.mesh import make_mesh
from neva_jax.planning.collectives import collectives

MESH = make_mesh({"data": 2, "fsdp": 1, "tensor": 4})


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("tensor",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{}", ("data", "tensor")),
        ("[2,4]<=[8]", ("tensor",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[1,8]<=[8]", ("data", "tensor")),
        ("mesh['a'=2,'b'=4] {'b'}", ("tensor",)),
        ("mesh['a'=2,'b'=4] {'a','b'}", ("data", "tensor")),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",)),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ("part of tensor",)),
        ("{{0,5},{1,4},{2,7},{3,6}}", ("?",)),
    ],
)
def test_groups_of_devices_become_axes(groups, axes):
    line = f"  %a = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add"
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{line}\n}}"
    (found,) = collectives(text, MESH)
    assert (found.kind, found.axes, found.shapes, found.times, found.size) == (
        "all-reduce",
        axes,
        (("f32", (4,)),),
        1,
        16,
    )


def test_a_loop_counts_each_of_its_iterations():
    """x [8, 6] split by its columns times w [6, 6] split by its rows, five times."""

    def program(x, w):
        def body(x, _):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(MESH, P("data", "tensor"))), None

        return jax.lax.scan(body, x, None, length=5)[0]

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(MESH, P("data", "tensor")))
    w = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(MESH, P("tensor", None)))
    found = collectives(jax.jit(program).lower(x, w).compile().as_text(), MESH)
    assert {(one.axes, one.times) for one in found} == {(("tensor",), 5)}
    assert "all-reduce" in {one.kind for one in found}


@pytest.mark.parametrize(
    ("operation", "size", "sent"),
    [
        ("((f8e4m3fn[2,3]{1,0}), f8e4m3fn[8,3]{1,0}) all-gather-start(%p)", 24, 18),
        ("((bf16[8,3]{1,0}, f32[]), (bf16[2,3]{1,0}, f32[])) reduce-scatter-start(%p, %q)", 16, 48),
        ("((f32[8]{0}), f32[8]{0}) all-reduce-start(%p)", 32, 48),
        ("(f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%p)", 96, 72),
        ("(bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%p)", 16, 16),
        ("f32[8]{0} all-reduce-start(%p)", 32, 48),
        ("f32[8]{0} all-reduce(%p)", 32, 48),
        ("bf16[8]{0} all-to-all(%p)", 16, 12),
        ("bf16[8]{0} collective-permute(%p)", 16, 16),
    ],
)
def test_bytes_made_and_sent_among_four(operation, size, sent):
    """What a GPU's compiler starts and waits for later lists its operands before its results."""
    line = f"  %a = {operation}, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}"
    (found,) = collectives(f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{line}\n}}", MESH)
    assert (found.size, found.members, found.sent) == (size, 4, sent)
