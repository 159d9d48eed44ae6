"""From a configuration to parameters and optimizer state: shapes first, then values straight onto their shards."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from neva_jax.config import COMPONENTS, Config
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.derived import frozen_components, most_segments, trained_components
from neva_jax.errors import UserError
from neva_jax.models.layers import Remat
from neva_jax.models.llama_fp8 import holds_stored, is_stored, quantized
from neva_jax.models.neva import abstract_model, random_parameters
from neva_jax.parallel.mesh import replicated, shardings, zero1_sharding
from neva_jax.precision import fp8
from neva_jax.precision.fp8_recipe import make_recipe
from neva_jax.precision.policy import frozen_dtype
from neva_jax.training.checkpoint_meta import available_components, locate, read_meta, verify
from neva_jax.training.manifest import Level
from neva_jax.training.weights import (
    check_averaged,
    check_compatible,
    load_components,
    merged,
    plan_transfer,
    subtree,
    table,
)

Parameters = dict[str, Any]


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """Fills in `model.llm.vocab_size` from the tokenizer.

    Raises:
      UserError: the configured size is smaller than the tokenizer's.
    """
    llm = config.model.llm
    if llm.vocab_size is None:
        llm = dataclasses.replace(llm, vocab_size=tokenizer.size)
    if llm.vocab_size < tokenizer.size:
        raise UserError(
            f"model.llm.vocab_size={llm.vocab_size} is smaller than the {tokenizer.size} tokens "
            f"of {config.model.tokenizer}"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, llm=llm))


def abstract_parameters(config: Config, mesh: Mesh, quantize_frozen: bool = True) -> tuple[nnx.GraphDef, Parameters]:
    """The model's graph definition, and for each parameter its shape, dtype and sharding (nothing is allocated).

    Trained components are fp32, frozen ones of the storage dtype; with FP8 a frozen language model's kernels are held
    in it, unless `quantize_frozen` is False (they are to be saved).

    Raises:
      UserError: a dimension that the mesh does not divide.
    """
    remat = Remat(config.train.remat, config.train.remat_method, config.train.remat_layers)
    recipe = make_recipe(config, mesh.size, quantize_frozen)
    segments = most_segments(config.data)
    graphdef, state = abstract_model(
        config.model, config.precision, remat, config.train.unroll, config.mesh, recipe, segments, mesh.size
    )
    layout = shardings(mesh, state)
    trained = trained_components(config.model)

    def describe(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if path[0].key in trained else frozen_dtype(config.precision)
        dtype = leaf.dtype if is_stored(part.key for part in path) else dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return graphdef, jax.tree_util.tree_map_with_path(describe, nnx.to_pure_dict(state), layout)


def place_updates(
    optimizer: optax.GradientTransformation, trained: Parameters, zero1: bool
) -> tuple[optax.GradientTransformation, Callable[[Parameters, Parameters], Parameters]]:
    """The optimizer with its place on the mesh: gradients are reduced onto the shards of the moments and no further.

    With `zero1` the moments are split over `data` too: each device updates only its part of a parameter, and the
    new parts are gathered onto the parameters' shards. The numbers stay the same.

    Args:
      trained: shapes and shardings of the parameters.

    Returns:
      (the optimizer, whose updates lie where the moments do; what adds them: (parameters, updates) -> new parameters)
    """
    ours = jax.tree.map(lambda leaf: leaf.sharding, trained)
    finer = jax.tree.map(zero1_sharding, trained) if zero1 else ours
    place = jax.lax.with_sharding_constraint

    def update(grads: Parameters, state: optax.OptState, params: Parameters) -> tuple[Parameters, optax.OptState]:
        updates, state = optimizer.update(place(grads, finer), state, place(params, finer))
        return place(updates, finer), optax.tree_utils.tree_map_params(optimizer, place, state, finer)

    def apply(params: Parameters, updates: Parameters) -> Parameters:
        # Added on the shards: gathered before, all updates would lie on each device at once.
        return place(place(optax.apply_updates(place(params, finer), updates), finer), ours)

    return optax.GradientTransformation(optimizer.init, update), apply


def abstract_optimizer(
    optimizer: optax.GradientTransformation, trained: Parameters, mesh: Mesh, zero1: bool = False
) -> optax.OptState:
    """Shapes and shardings of the optimizer's state: moments lie where their parameters lie, scalars everywhere.

    With `zero1` moments are split over `data` too (see `place_updates`).
    """
    shapes = partial(jax.eval_shape, optimizer.init)  # a device's first array takes 2 seconds
    return optax.tree_utils.tree_map_params(
        shapes,
        lambda leaf, param: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=zero1_sharding(param) if zero1 else param.sharding
        ),
        shapes(trained),
        trained,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
    )


def starting_weights(config: Config) -> dict[str, Path]:
    """Component -> the checkpoint step whose weights it starts with; a component that starts at random is absent.

    Raises:
      UserError: a frozen component without weights, or weights of another architecture (unless model.init_partial).
    """
    model, sources = config.model, {}
    if model.init_from is not None:
        found = available_components(model.init_from)
        sources = {name: step_dir for name, step_dir in found.items() if name in model.init_parts}
        if not sources:
            raise UserError(
                f"model.init_parts={model.init_parts}: model.init_from={model.init_from} has "
                f"{', '.join(found)} only; name one of these"
            )
        for step_dir in sorted(set(sources.values())):
            held = [name for name in COMPONENTS if sources.get(name) == step_dir]
            if not model.init_partial:
                check_compatible(config, read_meta(step_dir).config, held, step_dir)
        if (averaged := _averaged(config)) is not None:
            check_averaged(averaged)
            if not set(read_meta(averaged).components) & {name for name in sources if sources[name] == averaged}:
                raise UserError(f"model.init_ema=true: model.init_parts={model.init_parts} takes nothing of {averaged}")
    missing = [name for name in COMPONENTS if name not in sources]
    stuck = [name for name in missing if name in frozen_components(model)]
    if stuck and not model.allow_random_frozen:
        left_out = [name for name in stuck if name not in model.init_parts]
        why = f"model.init_from={model.init_from} has no {' and no '.join(stuck)}"
        if left_out:
            why = f"model.init_parts={model.init_parts} leaves out {' and '.join(left_out)}"
        raise UserError(
            f"{why}, which would stay frozen at random weights; name another checkpoint, or set "
            "model.allow_random_frozen=true"
        )
    return sources


def _averaged(config: Config) -> Path | None:
    """The checkpoint step whose averaged weights the run starts from, if it does."""
    return locate(config.model.init_from) if config.model.init_ema and config.model.init_from is not None else None


def verify_sources(sources: dict[str, Path], level: Level, say: Callable[[str], None]) -> None:
    """Holds the checkpoints that weights come from against their manifests (process 0 does).

    Raises:
      DamagedCheckpoint: a file differs.
    """
    if jax.process_index() == 0:
        for step_dir in sorted(set(sources.values())):
            if (note := verify(step_dir, level)) is not None:
                say(note)


def initialise_parameters(
    config: Config, abstract: Parameters, sources: dict[str, Path], say: Callable[[str], None]
) -> Parameters:
    """The starting weights: those of `sources` (see `starting_weights`), and random ones for the rest.

    With `model.init_partial` parameters that a source lacks, or has in another shape, are random too. `say` gets a
    table of what was loaded, what was not used, and what is random.

    Raises:
      UserError: a source lacks a parameter, or has it in another shape.
    """
    held, abstract = abstract, as_saved(config, abstract)
    averaged = _averaged(config)
    random = {name: abstract[name] for name in COMPONENTS if name not in sources}
    wanted = {name: abstract[name] for name in sources}
    transfers = plan_transfer(abstract, sources, averaged) if sources else []
    if config.model.init_partial:
        absent = {path for transfer in transfers for path in transfer.random}
        loaded = {path for transfer in transfers for path in transfer.loaded}
        random, wanted = subtree(abstract, absent) if sources else abstract, subtree(abstract, loaded)
    params = load_components(wanted, sources, averaged) if wanted else {}
    for line in table(transfers) if transfers else ():
        say(line)
    if averaged is not None:
        say(f"averaged weights of {averaged}: {', '.join(n for n in COMPONENTS if sources.get(n) == averaged)}")
    if random:
        say(f"{', '.join(random)}: random weights from run.seed={config.run.seed}")
        params = merged(params, random_initialiser(random, config)(jax.random.key(config.run.seed)))
    return as_held(config, {name: params[name] for name in COMPONENTS}, held)


def load_parameters(config: Config, abstract: Parameters, sources: dict[str, Path]) -> Parameters:
    """Reads components as `load_components` does; kernels that `abstract` holds in FP8 are quantized on the way."""
    return as_held(config, load_components(as_saved(config, abstract), sources), abstract)


def as_saved(config: Config, abstract: Parameters) -> Parameters:
    """The same components with every kernel in its own dtype, as checkpoints have them."""
    llm = abstract.get("llm")
    if llm is None or not holds_stored(llm):
        return abstract
    mesh = jax.tree.leaves(llm)[0].sharding.mesh
    return {**abstract, "llm": abstract_parameters(config, mesh, quantize_frozen=False)[1]["llm"]}


def as_held(config: Config, params: Parameters, abstract: Parameters) -> Parameters:
    """Parameters as they are saved -> as `abstract` holds them; those that are quantized are given away."""
    if "llm" not in params or not holds_stored(abstract["llm"]):
        return params
    mesh = jax.tree.leaves(abstract["llm"])[0].sharding.mesh
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract["llm"])
    convert = jax.jit(partial(quantized, recipe=make_recipe(config, mesh.size)), out_shardings=layout, donate_argnums=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers")  # bf16 cannot become FP8 in place
        return {**params, "llm": convert(params["llm"])}


def initial_fp8_state(config: Config, mesh: Mesh) -> fp8.State:
    """The FP8 state of a fresh run, on every device; {} where the recipe has none."""
    state = fp8.initial_state(make_recipe(config, mesh.size), trained=not config.model.llm.freeze)
    return jax.device_put(state, replicated(mesh))


def random_initialiser(abstract: Parameters, config: Config) -> jax.stages.Wrapped:
    """A compiled function: key -> the random parameters that `abstract` names, made on their shards.

    Each device draws its own shards alone: JAX's random bits are a function of an element's place.
    """
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    paths = {tuple(part.key for part in path) for path, _ in leaves}

    def initialise(rng: jax.Array) -> Parameters:
        params = subtree(random_parameters(config.model, config.precision, rng), paths)
        return jax.tree.map(lambda shape, p: p.astype(shape.dtype), abstract, params)

    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # Runs once: unoptimised code compiles in a quarter of the time, and the values are the same.
    quickly = {"xla_backend_optimization_level": 0}
    return jax.jit(initialise, out_shardings=layout, compiler_options=quickly)


def initialise_optimizer(
    optimizer: optax.GradientTransformation, trained: Parameters, abstract: optax.OptState
) -> optax.OptState:
    """Zero moments on their shards (a bare `jit` of `init` would replicate them)."""
    return jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(trained)


def saved_components(config: Config) -> tuple[tuple[str, ...], str | None]:
    """Which components a checkpoint of this run holds, and the base that has the others (None, or the absolute path of
    one step: a base that trains on does not change the run).

    Raises:
      UserError: `checkpoint.contents=trained`, but the base lacks a frozen component.
    """
    frozen, base = frozen_components(config.model), config.model.init_from
    contents = config.checkpoint.contents
    if contents == "full" or not frozen:
        return COMPONENTS, None
    lacking = [name for name in frozen if base is None or not _is_as_in_base(config, name, available_components(base))]
    if not lacking:
        return trained_components(config.model), str(locate(base).resolve())
    if contents == "trained":
        raise UserError(
            f"checkpoint.contents=trained would lose the frozen random weights of {' and '.join(lacking)}, which "
            f"model.init_from={base} lacks; use full"
        )
    return COMPONENTS, None


def _is_as_in_base(config: Config, component: str, found: dict[str, Path]) -> bool:
    """Whether a frozen component is the base's own, so that referring to the base is enough."""
    model = config.model
    averaged = model.init_ema and found.get(component) == locate(model.init_from)
    return component in found and component in model.init_parts and not averaged and not model.init_partial
