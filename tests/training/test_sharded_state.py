"""No device and no host buffer ever holds a whole large array: parameters and moments are made and read as shards."""

import re
from math import prod

import jax
import numpy as np
import pytest

from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.setup import (
    abstract_optimizer,
    abstract_parameters,
    initialise_optimizer,
    place_updates,
    random_initialiser,
)
from neva_jax.training.weights import load_components
from tests.training.layouts import OPTIMIZER, STEPS, Layout

LAYOUTS = [
    Layout("fsdp=8"),
    Layout("tensor=8"),
    Layout("data=2,fsdp=2,tensor=2"),
    Layout("data=2,fsdp=2,tensor=2", zero1=True),
]


def abstract_state(layout):
    """(parameters, trained part, moments, optimizer) of a layout, nothing allocated."""
    params = abstract_parameters(layout.config, layout.mesh)[1]
    trained = {name: params[name] for name in ("projector", "llm")}
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    moments = abstract_optimizer(optimizer, trained, layout.mesh, layout.zero1)
    return params, trained, moments, place_updates(optimizer, trained, layout.zero1)[0]


def largest_shard(tree) -> int:
    return max(prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def largest_array(compiled) -> int:
    """Elements of the largest array that appears anywhere in a device's program, intermediate results included."""
    return max(prod(int(n) for n in dims.split(",")) for dims in re.findall(r"\b\w+\[([\d,]+)\]", compiled.as_text()))


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda layout: layout.shape)
def test_random_parameters_are_drawn_shard_by_shard(layout):
    params = abstract_state(layout)[0]
    whole = max(leaf.size for leaf in jax.tree.leaves(params))
    assert whole >= 4 * largest_shard(params)
    with jax.set_mesh(layout.mesh):
        compiled = random_initialiser(params, layout.config).lower(jax.random.key(0)).compile()
    assert largest_array(compiled) == largest_shard(params)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_moments_are_made_shard_by_shard(layout):
    _, trained, moments, optimizer = abstract_state(layout)
    arrays = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding), trained)
    for array, leaf in zip(
        jax.tree.leaves(initialise_optimizer(optimizer, arrays, moments)), jax.tree.leaves(moments), strict=True
    ):
        assert {shard.data.shape for shard in array.addressable_shards} == {leaf.sharding.shard_shape(leaf.shape)}
    layout_of = jax.tree.map(lambda leaf: leaf.sharding, moments)
    compiled = jax.jit(optimizer.init, out_shardings=layout_of).lower(trained).compile()
    assert largest_array(compiled) <= largest_shard(trained)


@pytest.fixture
def put(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of all host arrays that are given to a device; numpy arrays come there in no other way."""
    shapes: list[tuple[int, ...]] = []
    original = jax.device_put

    def device_put(x, *arguments, **settings):
        shapes.extend(leaf.shape for leaf in jax.tree.leaves(x) if isinstance(leaf, np.ndarray))
        return original(x, *arguments, **settings)

    monkeypatch.setattr(jax, "device_put", device_put)
    return shapes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_checkpoint_is_read_shard_by_shard(layout, put, tokenizer, tmp_path):
    params, _, moments, _ = abstract_state(layout)

    def make(leaf):
        ones = np.ones(leaf.shape, leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: ones[index])

    with Checkpoints(tmp_path, None) as checkpoints:
        meta = Meta(1, layout.config, tuple(params), None, tokenizer)
        checkpoints.save(1, jax.tree.map(make, params), jax.tree.map(make, moments), {"samples": 8}, meta)
    put.clear()
    with Checkpoints(tmp_path, None) as checkpoints:
        restored = checkpoints.restore(1, params, moments)
    expected = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves((params, moments))}
    assert set(put) == expected
    again = load_components(params, dict.fromkeys(params, tmp_path / "checkpoints" / "1"))
    assert set(put) == expected
    for array in jax.tree.leaves((restored, again)):
        assert all(shard.data.shape in expected for shard in array.addressable_shards)
