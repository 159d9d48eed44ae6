"""The moving average of the weights: equal to a loop in NumPy, and where the weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from neva_jax.parallel.mesh import make_mesh
from neva_jax.training import ema, step
from neva_jax.training.step import TrainState, make_train_step


@pytest.fixture
def train_step(monkeypatch):
    """Steps whose gradients are the batch: the average is all that is compared."""

    def gradients(graphdef, trained, frozen, batch, *_):
        return jnp.float32(0), {name: tree for name, tree in batch.items() if name != "loss_weights"}, {}

    monkeypatch.setattr(step, "gradients", gradients)

    def make(decay, every):
        optimizer = optax.sgd(0.1)
        made = make_train_step(None, optimizer, lambda n: 0.1, 1, ema_decay=decay, ema_every=every)
        return optimizer, made

    return make


def batch(seed):
    return jax.tree.map(jnp.asarray, {**weights(seed), "loss_weights": np.ones((1, 2, 3), np.float32)})


def weights(seed):
    draw = np.random.default_rng(seed)
    return {"projector": {"kernel": draw.normal(size=(8, 4)).astype(np.float32), "bias": np.float32([1, 2])}}


@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.5, 3), (0.9999, 2), (0.0, 1)])
def test_the_average_is_that_of_a_loop(decay, every, train_step):
    optimizer, run = train_step(decay, every)
    trained = jax.tree.map(jnp.asarray, weights(0))
    state = TrainState(jnp.int32(0), trained, optimizer.init(trained), ema=ema.start(trained, decay))
    expected = jax.tree.map(lambda leaf: leaf.astype(np.float64), weights(0))
    values = weights(0)
    for n in range(1, 11):
        state, _ = run(state, {}, batch(n))
        values = jax.tree.map(lambda p, g: p - np.float32(0.1) * g, values, weights(n))
        if n % every == 0:
            expected = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, expected, values)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.ema, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}


def test_without_a_decay_there_is_no_average(train_step):
    optimizer, run = train_step(None, 1)
    trained = jax.tree.map(jnp.asarray, weights(0))
    state, _ = run(TrainState(jnp.int32(0), trained, optimizer.init(trained)), {}, batch(1))
    assert state.ema == {} == ema.start(trained, None)


def test_it_starts_as_a_copy_on_the_same_shards():
    """A copy: the step gives its old state away, and one buffer cannot be given away twice."""
    mesh = make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    sharding = {"projector": {"kernel": NamedSharding(mesh, P("fsdp")), "bias": NamedSharding(mesh, P())}}
    trained = jax.device_put(weights(0), sharding)
    average = ema.start(trained, 0.9)
    moved = jax.jit(ema.update, static_argnums=(3, 4), donate_argnums=0)(average, trained, jnp.int32(1), 0.9, 2)
    for tree in (ema.start(trained, 0.9), moved):
        jax.tree.map(np.testing.assert_array_equal, tree, weights(0))
        for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(sharding), strict=True):
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trained))
