"""How a run starts: its weights, their dtypes and shards, the optimizer's state, and what its checkpoints will hold."""

import dataclasses
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from neva_jax.config import CheckpointConfig, Config, PrecisionConfig, RunConfig
from neva_jax.errors import UserError
from neva_jax.models.neva import abstract_model
from neva_jax.parallel.mesh import make_mesh, one_device_mesh, shardings
from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.setup import (
    abstract_optimizer,
    abstract_parameters,
    initialise_optimizer,
    initialise_parameters,
    saved_components,
    starting_weights,
    with_vocabulary,
)
from tests.models.helpers import tiny_config

ALL = ("vision", "projector", "llm")


def config_of(frozen=(), *, compute="bf16", stored=None, seed=1, contents="auto", init_from=None, llm=None, **model):
    parts = tiny_config()
    changes = {name: dataclasses.replace(getattr(parts, name), freeze=name in frozen) for name in ALL}
    changes["llm"] = dataclasses.replace(changes["llm"], **(llm or {}))
    init_from = None if init_from is None else str(init_from)
    return Config(
        run=RunConfig(seed=seed),
        model=dataclasses.replace(parts, **changes, init_from=init_from, **model),
        precision=PrecisionConfig(compute=compute, frozen=stored),
        checkpoint=CheckpointConfig(contents=contents),
    )


def mesh_of(**sizes):
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1, **sizes})


def say_nothing(message):
    pass


@cache
def random_start(seed=1, mesh=None):
    """The weights of a run without sources, vision frozen."""
    config = config_of(("vision",), seed=seed)
    mesh = one_device_mesh() if mesh is None else make_mesh(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    return initialise_parameters(config, abstract_parameters(config, mesh)[1], {}, say_nothing)


def paths(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def differing(ours, theirs):
    """The paths at which two trees of the same structure are not bit-equal."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    bits = [[(leaf.dtype, leaf.tobytes()) for leaf in paths(tree).values()] for tree in (ours, theirs)]
    return [name for name, a, b in zip(paths(ours), *bits, strict=True) if a != b]


# --- vocabulary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("configured", "result"), [(None, 400), (400, 400), (512, 512)])
def test_the_vocabulary_is_the_tokenizers_or_larger(configured, result, tokenizer):
    config = with_vocabulary(config_of(llm={"vocab_size": configured}), tokenizer)
    assert config == config_of(llm={"vocab_size": result})


def test_a_vocabulary_that_is_too_small_is_refused(tokenizer):
    config = config_of(llm={"vocab_size": 399}, tokenizer="llama.model")
    with pytest.raises(UserError, match=r"^model\.llm\.vocab_size=399 is smaller than the 400 tokens of llama\.model$"):
        with_vocabulary(config, tokenizer)


# --- shapes, dtypes, shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "stored", "frozen_dtype"),
    [
        ("bf16", None, "bfloat16"),
        ("fp32", None, "float32"),
        ("bf16", "fp32", "float32"),
        ("fp32", "bf16", "bfloat16"),
    ],
)
def test_trained_parameters_are_fp32_and_frozen_ones_of_the_storage_dtype(compute, stored, frozen_dtype):
    config = config_of(("vision", "llm"), compute=compute, stored=stored)
    _, abstract = abstract_parameters(config, one_device_mesh())
    dtypes = {name: {leaf.dtype.name for leaf in jax.tree.leaves(abstract[name])} for name in ALL}
    assert dtypes == {"vision": {frozen_dtype}, "projector": {"float32"}, "llm": {frozen_dtype}}


def test_parameters_are_described_with_their_shards_and_not_allocated():
    config, mesh = config_of(("vision",)), mesh_of(fsdp=2, tensor=4)
    _, abstract = abstract_parameters(config, mesh)
    layout = shardings(mesh, abstract_model(config.model, config.precision)[1])
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert jax.tree.map(lambda leaf: leaf.sharding, abstract) == layout
    assert abstract["llm"]["layers"]["q"].shape == (2, 32, 4, 8)
    assert abstract["llm"]["layers"]["q"].sharding.spec == P(None, "fsdp", "tensor", None)


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(
        UserError, match=r"^mesh\.shape: .* not divisible by the mesh axis tensor=8; 8 \(or an axis of 4\) would do$"
    ):
        abstract_parameters(config_of(), mesh_of(tensor=8))


# --- the optimizer's state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}])
def test_moments_lie_where_their_parameters_lie(sizes):
    config, mesh = config_of(("vision",)), mesh_of(**sizes)
    trained = {name: abstract_parameters(config, mesh)[1][name] for name in ("projector", "llm")}
    optimizer = make_optimizer(config.optimizer, 10)
    abstract = abstract_optimizer(optimizer, trained, mesh)
    params = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding), trained)
    moments = initialise_optimizer(optimizer, params, abstract)
    assert jax.tree.structure(moments) == jax.tree.structure(optimizer.init(params))
    adam = next(part for part in moments if isinstance(part, optax.ScaleByAdamState))
    for moment in (adam.mu, adam.nu):
        for array, param in zip(jax.tree.leaves(moment), jax.tree.leaves(trained), strict=True):
            assert array.dtype == jnp.float32
            assert not array.any()
            assert array.addressable_shards[0].data.shape == param.sharding.shard_shape(param.shape)
            assert array.sharding.is_equivalent_to(param.sharding, array.ndim)
    for array, leaf in zip(jax.tree.leaves(moments), jax.tree.leaves(abstract), strict=True):
        assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype)
        assert array.sharding.is_equivalent_to(leaf.sharding, array.ndim)
        assert array.ndim or (array.sharding.is_fully_replicated and len(array.addressable_shards) == 8)


def test_no_moment_of_a_matrix_is_copied_under_fsdp():
    config, mesh = config_of(("vision",)), mesh_of(fsdp=8)
    trained = {name: abstract_parameters(config, mesh)[1][name] for name in ("projector", "llm")}
    abstract = abstract_optimizer(make_optimizer(config.optimizer, 10), trained, mesh)
    matrices = [leaf for leaf in jax.tree.leaves(abstract) if leaf.size >= 32 * 8]
    # 2 moments of the projector's 2 kernels, embedding, head, and 7 kernels of the layers
    assert len(matrices) == 2 * (2 + 2 + 7)
    for leaf in matrices:
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size / 8


# --- starting weights ------------------------------------------------------------------------------------------------


def test_random_weights_follow_from_the_seed():
    config = config_of(("vision",), seed=1)
    again = initialise_parameters(config, abstract_parameters(config, one_device_mesh())[1], {}, say_nothing)
    assert differing(again, random_start(seed=1)) == []
    random = [name for name in paths(again) if not name.endswith(("['scale']", "bias']"))]
    assert differing(again, random_start(seed=2)) == random


def test_random_weights_are_the_same_on_every_mesh():
    sharded = random_start(mesh=(1, 2, 4))
    assert differing(sharded, random_start()) == []
    assert sharded["llm"]["head"].addressable_shards[0].data.shape == (16, 10)
    assert {leaf.dtype for leaf in jax.tree.leaves(sharded["vision"])} == {jnp.dtype("bfloat16")}


def test_random_weights_do_not_depend_on_what_is_frozen():
    """Nor does the part that is stored in bf16: it is the fp32 part, rounded."""
    config = config_of(("llm",))
    params = initialise_parameters(config, abstract_parameters(config, one_device_mesh())[1], {}, say_nothing)
    expected = random_start()
    assert differing(params["projector"], expected["projector"]) == []
    for frozen, trained in ((params["llm"], expected["llm"]), (expected["vision"], params["vision"])):
        assert differing(frozen, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trained)) == []


@pytest.fixture
def pretrained(tokenizer, tmp_path) -> Path:
    """A run whose checkpoint of step 4 has a vision encoder and a projector, of seed 2."""
    params = {name: random_start(seed=2)[name] for name in ("vision", "projector")}
    with Checkpoints(tmp_path / "pretrained", None) as checkpoints:
        meta = Meta(4, config_of(("vision",), seed=2), ("vision", "projector"), None, tokenizer)
        checkpoints.save(4, params, {}, {}, meta)
    return tmp_path / "pretrained"


def test_weights_come_from_the_checkpoint_and_the_rest_is_random(pretrained):
    config = config_of(("vision",), init_from=pretrained)
    step_dir, said = pretrained / "checkpoints" / "4", []
    sources = starting_weights(config)
    assert sources == {"vision": step_dir, "projector": step_dir}
    params = initialise_parameters(config, abstract_parameters(config, one_device_mesh())[1], sources, said.append)
    assert list(params) == list(ALL)
    assert differing(params["vision"], random_start(seed=2)["vision"]) == []
    assert differing(params["projector"], random_start(seed=2)["projector"]) == []
    assert differing(params["llm"], random_start(seed=1)["llm"]) == []
    assert said == [
        "weights    loaded  random  skipped  from",
        f"vision     23      0       0        {step_dir}",
        f"projector  4       0       0        {step_dir}",
        "llm        0       12      0        -",
        "llm: random weights from run.seed=1",
    ]


def test_without_a_checkpoint_there_are_no_sources():
    assert starting_weights(config_of()) == {}
    assert starting_weights(config_of(("vision",), allow_random_frozen=True)) == {}


def test_a_frozen_component_without_weights_is_refused(pretrained):
    with pytest.raises(UserError) as caught:
        starting_weights(config_of(("vision", "llm"), init_from=pretrained))
    assert str(caught.value) == (
        f"model.init_from={pretrained} has no llm, which would stay frozen at random weights; name another "
        "checkpoint, or set model.allow_random_frozen=true"
    )
    allowed = config_of(("vision", "llm"), init_from=pretrained, allow_random_frozen=True)
    assert set(starting_weights(allowed)) == {"vision", "projector"}


def test_weights_of_another_architecture_are_refused(pretrained):
    config = config_of(init_from=pretrained)
    vision = dataclasses.replace(config.model.vision, num_layers=3)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    with pytest.raises(UserError) as caught:
        starting_weights(config)
    step_dir = pretrained / "checkpoints" / "4"
    assert str(caught.value) == f"model.vision.num_layers=3, but the weights in {step_dir} have 2"


def test_the_architecture_of_what_is_not_taken_does_not_matter(pretrained):
    assert set(starting_weights(config_of(init_from=pretrained, llm={"num_layers": 5}))) == {"vision", "projector"}


@pytest.fixture
def averaged(tokenizer, tmp_path) -> Path:
    """A run with all components, of seed 3; it trained projector and language model, whose averages are of seed 4."""
    averages = {name: random_start(seed=4)[name] for name in ("projector", "llm")}
    with Checkpoints(tmp_path / "averaged", None) as checkpoints:
        meta = Meta(6, config_of(("vision",), seed=3), ALL, None, tokenizer, ema=True)
        checkpoints.save(6, random_start(seed=3), {}, {}, meta, averages)
    return tmp_path / "averaged"


def started(config, say=say_nothing):
    abstract = abstract_parameters(config, one_device_mesh())[1]
    return initialise_parameters(config, abstract, starting_weights(config), say)


def test_a_run_starts_from_the_averages_of_another(averaged):
    said = []
    params = started(config_of(("vision",), init_from=averaged, init_ema=True), said.append)
    assert differing(params["vision"], random_start(seed=3)["vision"]) == []  # it was not trained
    assert differing(params["projector"], random_start(seed=4)["projector"]) == []
    assert differing(params["llm"], random_start(seed=4)["llm"]) == []
    assert said[-1] == f"averaged weights of {averaged}/checkpoints/6: vision, projector, llm"
    params = started(config_of(("vision",), init_from=averaged))
    assert differing(params["llm"], random_start(seed=3)["llm"]) == []


def test_averages_that_are_not_there_or_not_asked_for_are_an_error(pretrained, averaged):
    with pytest.raises(UserError, match=r"/pretrained/checkpoints/4: has no averaged weights \(it was trained without"):
        starting_weights(config_of(init_from=pretrained, init_ema=True))


def test_some_components_alone(averaged):
    config = config_of(init_from=averaged, init_parts=["projector"])
    params = started(config)
    assert differing(params["projector"], random_start(seed=3)["projector"]) == []
    assert differing(params["llm"], random_start(seed=1)["llm"]) == []
    with pytest.raises(UserError, match=r"^model.init_parts=\['projector'\] leaves out llm, which would stay frozen"):
        starting_weights(config_of(("llm",), init_from=averaged, init_parts=["projector"]))


def test_components_that_the_checkpoint_lacks_altogether(pretrained):
    with pytest.raises(UserError, match=r"^model.init_parts=\['llm'\]: model.init_from=.* has vision, projector only"):
        starting_weights(config_of(init_from=pretrained, init_parts=["llm"]))


def test_a_partial_start_takes_what_fits_and_says_what_does_not(averaged):
    """Another number of language layers, and a projector of one layer more."""
    model = tiny_config()
    config = config_of(("vision",), init_from=averaged, init_partial=True, llm={"num_layers": 3})
    projector = dataclasses.replace(model.projector, kind="mlp1x_gelu")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, projector=projector))
    said = []
    params = started(config, said.append)
    saved = random_start(seed=3)
    assert list(params) == list(ALL)
    assert differing(params["vision"], saved["vision"]) == []
    for name in ("embedding", "head"):
        np.testing.assert_array_equal(params["llm"][name], saved["llm"][name])
    alone = dataclasses.replace(config.model, init_from=None, allow_random_frozen=True, init_partial=False)
    fresh = started(dataclasses.replace(config, model=alone))
    assert differing(params["llm"]["layers"], fresh["llm"]["layers"]) == []
    assert jax.tree.leaves(params["llm"]["layers"])[0].shape[0] == 3
    rows = [line.split()[:4] for line in said[:4]]
    assert rows[1] == ["vision", "23", "0", "0"]
    assert rows[2] == ["projector", "2", "0", "2"]
    assert rows[3] == ["llm", "3", "9", "0"]
    assert "  llm.layers.q [3, 32, 4, 8]: random, the checkpoint has [2, 32, 4, 8]" in said
    assert "  projector.kernel_2 [32, 32]: skipped, the configured model has none" in said
    assert said[-1] == "llm: random weights from run.seed=1"


def test_what_was_changed_on_the_way_in_is_saved_in_full(averaged):
    """The base does not have those weights."""
    base = str(averaged / "checkpoints" / "6")
    assert saved_components(config_of(("vision", "llm"), init_from=averaged)) == (("projector",), base)
    for change in ({"init_ema": True}, {"init_partial": True}, {"init_parts": ["projector"]}):
        config = config_of(("vision", "llm"), init_from=averaged, allow_random_frozen=True, **change)
        assert saved_components(config) == (ALL, None), change


# --- what a checkpoint will hold -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frozen", "contents", "expected"),
    [
        (("vision",), "auto", ("projector", "llm")),
        (("vision",), "trained", ("projector", "llm")),
        (("vision",), "full", ALL),
        (("vision", "projector"), "auto", ("llm",)),
        ((), "auto", ALL),
        ((), "trained", ALL),
        (("llm",), "auto", ALL),  # random: `pretrained` has none
        (("llm",), "full", ALL),
    ],
)
def test_a_checkpoint_leaves_out_what_its_base_has(frozen, contents, expected, pretrained):
    config = config_of(frozen, contents=contents, init_from=pretrained, allow_random_frozen=True)
    components, base = saved_components(config)
    assert components == expected
    if expected == ALL:
        assert base is None
    else:
        assert base == str(pretrained / "checkpoints" / "4")


def test_the_base_is_the_absolute_path_of_the_step_that_was_read(pretrained, monkeypatch):
    """A base that trains on does not change the run."""
    monkeypatch.chdir(pretrained.parent)
    _, base = saved_components(config_of(("vision",), init_from="pretrained"))
    assert base == str(pretrained / "checkpoints" / "4")


def test_without_a_base_everything_is_saved():
    assert saved_components(config_of(("vision",), allow_random_frozen=True)) == (ALL, None)


def test_contents_that_would_lose_frozen_weights_are_refused(pretrained):
    config = config_of(("vision", "llm"), contents="trained", init_from=pretrained, allow_random_frozen=True)
    with pytest.raises(UserError) as caught:
        saved_components(config)
    assert str(caught.value) == (
        "checkpoint.contents=trained would lose the frozen random weights of llm, which "
        f"model.init_from={pretrained} lacks; use full"
    )
