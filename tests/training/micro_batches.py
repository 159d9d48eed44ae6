"""Loss and gradients of one step of the layouts' model, with and without the shortcuts of a frozen language model."""

import dataclasses
from functools import cache, partial
from types import SimpleNamespace

import jax
import numpy as np

from neva_jax.config import Fp8Config, PrecisionConfig
from neva_jax.derived import frozen_components, trained_components
from neva_jax.parallel.mesh import place_batch
from neva_jax.training.setup import abstract_parameters, as_held, initial_fp8_state, initialise_parameters
from neva_jax.training.shortcuts import compute_prefix, whole_graphdef
from neva_jax.training.step import gradients
from tests.training.layouts import LENGTH, ROWS, VOCAB, batch

PREFIX, MOST = 5, 6
FP8 = {kind: PrecisionConfig(compute=kind, fp8=Fp8Config(amax_history=1)) for kind in ("fp8_delayed", "fp8_current")}


@cache
def rows(packed=False):
    """The batch of the layouts' tests, but for at most MOST labels a row, and the same PREFIX tokens before each."""
    arrays = {name: array.copy() for name, array in batch(3, packed).items()}
    weights = arrays["loss_weights"]
    weights *= np.cumsum(weights, axis=1) <= MOST
    if packed:
        return arrays
    draw, images = np.random.default_rng(8), arrays.pop("images")
    front = {name: np.zeros((ROWS, PREFIX), array.dtype) for name, array in arrays.items()}
    front["tokens"][:] = front["targets"][:] = draw.integers(0, VOCAB, PREFIX)
    front["segment_ids"][:], front["image_slots"][:] = 1, -1
    front["positions"][:] = np.arange(PREFIX)
    arrays["positions"] = arrays["positions"] + PREFIX
    joined = {name: np.concatenate([front[name], array], axis=1) for name, array in arrays.items()}
    return {**joined, "images": images}


def config_of(layout, precision=None, llm=None, **train):
    config = layout.config
    model = dataclasses.replace(config.model, llm=dataclasses.replace(config.model.llm, **llm or {}))
    length = config.data.max_length if layout.packed else LENGTH + PREFIX
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, max_length=length),
        precision=precision or config.precision,
        train=dataclasses.replace(config.train, **train),
    )


def compute(layout, arrays, prefix=False, labelled=None, precision=None, llm=None, **train):
    """(loss, gradients) of a micro batch or several; and the prefix if one was used, FP8's state before and after."""
    config, mesh = config_of(layout, precision, llm, **train), layout.mesh
    graphdef, abstract = abstract_parameters(config, mesh)
    with jax.set_mesh(mesh):
        params = held_parameters(config, mesh, abstract)
        trained, frozen = (
            {name: params[name] for name in names(config.model)} for names in (trained_components, frozen_components)
        )
        shared = whole = None
        if prefix:
            shared = compute_prefix(config, mesh, params, rows()["tokens"][0, :PREFIX], quantize_frozen=True)
            whole = whole_graphdef(config_of(layout, precision, llm, constant_prefix=PREFIX, **train), mesh)
        run = jax.jit(
            partial(gradients, graphdef, chunk=4, packed=layout.packed, labelled=labelled, whole_graphdef=whole),
            compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
        )
        placed = place_batch(mesh, arrays, layout.accumulate)
        before = initial_fp8_state(config, mesh)
        loss, grads, after = run(trained, frozen, placed, states=before, prefix=shared)
    return jax.tree.map(np.asarray, (loss, grads)), SimpleNamespace(prefix=shared, before=before, after=after)


def held_parameters(config, mesh, abstract):
    plain = dataclasses.replace(config, precision=PrecisionConfig(compute="fp32"))
    shapes = abstract_parameters(plain, mesh)[1]
    return as_held(config, initialise_parameters(plain, shapes, {}, lambda _: None), abstract)


def flat(tree):
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def assert_same(ours, theirs, bound):
    leaves, expected = jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs)
    for (path, leaf), wanted in zip(leaves, expected, strict=True):
        assert np.linalg.norm(leaf - wanted) <= bound * max(np.linalg.norm(wanted), 1e-12), path
        assert np.linalg.norm(wanted) > 0, path
