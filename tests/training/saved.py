"""A small model's state, random and saved: what the tests of checkpoints begin with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from neva_jax.config import Config, DataConfig, PrecisionConfig
from neva_jax.parallel.mesh import make_mesh, one_device_mesh
from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.setup import abstract_optimizer, abstract_parameters
from tests.models.helpers import tiny_config

ALL = ("vision", "projector", "llm")


def config_of(frozen=("vision",), compute="bf16", **llm):
    model = tiny_config()
    parts = {name: dataclasses.replace(getattr(model, name), freeze=name in frozen) for name in ALL}
    parts["llm"] = dataclasses.replace(parts["llm"], **llm)
    model = dataclasses.replace(model, **parts)
    return Config(model=model, data=DataConfig(template="plain"), precision=PrecisionConfig(compute=compute))


CONFIG = config_of()


def eight_devices():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def abstract_state(mesh, config=CONFIG):
    """(parameters, optimizer state) as shapes: vision in bf16, the rest in fp32."""
    params = abstract_parameters(config, mesh)[1]
    optimizer = make_optimizer(config.optimizer, 10)
    return params, abstract_optimizer(optimizer, {name: params[name] for name in ("projector", "llm")}, mesh)


def random_like(abstract, seed):
    draw = np.random.default_rng(seed)

    def array(leaf):
        values = draw.normal(size=leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else draw.integers(0, 99)
        return jax.device_put(jnp.asarray(values, leaf.dtype).reshape(leaf.shape), leaf.sharding)

    return jax.tree.map(array, abstract)


def random_state(mesh, seed=0, config=CONFIG):
    return random_like(abstract_state(mesh, config), seed)


def save(run_dir, step, tokenizer, *, components=ALL, seed=0, config=CONFIG, base=None):
    """Saves random numbers as the state of a step; returns (params, optimizer state)."""
    random_params, optimizer = random_state(one_device_mesh(), seed, config)
    params = {name: random_params[name] for name in components}
    with Checkpoints(run_dir, None) as checkpoints:
        meta = Meta(step, config, components, base, tokenizer)
        checkpoints.save(step, params, optimizer, {"samples": 8 * step, "bad_rows": ["a: row 3"]}, meta)
    return params, optimizer


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def assert_placed(arrays, abstract):
    for array, leaf in zip(jax.tree.leaves(arrays), jax.tree.leaves(abstract), strict=True):
        assert array.sharding.is_equivalent_to(leaf.sharding, array.ndim)
