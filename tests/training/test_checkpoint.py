"""Checkpoints: bit-equal on any mesh, self-describing, chained to their bases, and complete or absent."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from neva_jax.errors import UserError
from neva_jax.interop.store import SavedArrays
from neva_jax.parallel.mesh import one_device_mesh
from neva_jax.training import checkpoint
from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta, available_components, locate, newest_step, read_data
from neva_jax.training.setup import abstract_parameters
from neva_jax.training.weights import check_compatible, load_components
from tests.training.saved import (
    ALL,
    CONFIG,
    abstract_state,
    assert_placed,
    assert_same,
    config_of,
    eight_devices,
    random_like,
    random_state,
    save,
)

FP32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)

# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_on", [one_device_mesh, eight_devices])
@pytest.mark.parametrize("restored_on", [one_device_mesh, eight_devices])
def test_a_state_is_restored_bit_for_bit_onto_any_mesh(saved_on, restored_on, tokenizer, tmp_path):
    params, optimizer = random_state(saved_on())
    data = {"samples": 24, "bad_rows": ["rows.json: row 3 (id 'ü'): field image: \\ \"1\""]}
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(3, params, optimizer, data, Meta(3, CONFIG, ALL, None, tokenizer))
    abstract = abstract_state(restored_on())
    with Checkpoints(tmp_path, 2) as checkpoints:
        restored_params, restored_optimizer = checkpoints.restore(3, *abstract)
    assert_same((restored_params, restored_optimizer), (params, optimizer))
    assert_placed((restored_params, restored_optimizer), abstract)
    assert read_data(tmp_path / "checkpoints" / "3") == data
    assert {leaf.dtype for leaf in jax.tree.leaves(restored_params["vision"])} == {BF16}
    assert {leaf.dtype for leaf in jax.tree.leaves(restored_params["llm"])} == {FP32}


@pytest.mark.parametrize("saved_on", [one_device_mesh, eight_devices])
def test_large_parameters_are_stored_in_pieces_of_a_layer_or_less(saved_on, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2048)
    params, optimizer = random_state(saved_on())
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(3, params, optimizer, {}, Meta(3, CONFIG, ALL, None, tokenizer))
    saved = SavedArrays(tmp_path / "checkpoints" / "3")

    def piece(*path):
        return saved.open(path).chunk_layout.read_chunk.shape

    assert piece("llm", "layers", "gate")[0] == 1  # [2, 32, 48] f32: 12288 bytes
    assert np.prod(piece("llm", "layers", "gate")) * 4 <= 2048
    assert np.prod(piece("llm", "embedding")) * 4 <= 2048
    assert piece("llm", "layers", "attention_norm", "scale")[0] == 2  # small enough for one
    abstract = abstract_state(eight_devices())
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert_same(checkpoints.restore(3, *abstract), (params, optimizer))


def test_a_part_of_the_parameters_can_be_restored(tokenizer, tmp_path):
    params, optimizer = save(tmp_path, 3, tokenizer)
    abstract_params, abstract_moments = abstract_state(one_device_mesh())
    with Checkpoints(tmp_path, None) as checkpoints:
        restored, moments = checkpoints.restore(3, {"llm": abstract_params["llm"]}, abstract_moments)
    assert_same(restored, {"llm": params["llm"]})
    assert_same(moments, optimizer)


def test_no_more_than_some_gigabytes_are_read_at_once(run, monkeypatch):
    """Orbax refuses arrays that are not smaller than its limit, which no real array must reach."""
    seven_b, seventy_b = (jax.ShapeDtypeStruct(shape, FP32) for shape in ((32, 4096, 11008), (80, 8192, 28672)))
    assert checkpoint._most_at_once([seven_b] * 9) == 16
    assert checkpoint._most_at_once([seven_b, seventy_b]) * 10**9 > 4 * seventy_b.size
    limits, handler = [], checkpoint.ocp.PyTreeCheckpointHandler

    def recorded(**settings):
        limits.append(settings)
        return handler(**settings)

    monkeypatch.setattr(checkpoint.ocp, "PyTreeCheckpointHandler", recorded)
    with Checkpoints(run, None) as checkpoints:
        checkpoints.restore(5, *abstract_state(one_device_mesh()))
    assert limits == [{"restore_concurrent_gb": 16}]


def test_what_was_restored_can_be_saved_by_the_same_manager(tokenizer, tmp_path):
    save(tmp_path, 3, tokenizer)
    abstract = abstract_state(one_device_mesh())
    with Checkpoints(tmp_path, None) as checkpoints:
        params, optimizer = checkpoints.restore(3, *abstract)
        data = read_data(checkpoints.directory / "3")
        checkpoints.save(4, params, optimizer, data, Meta(4, CONFIG, ALL, None, tokenizer))
        checkpoints.wait()
        assert_same(checkpoints.restore(4, *abstract), (params, optimizer))
        assert read_data(checkpoints.directory / "4") == data


def test_saving_takes_the_numbers_of_the_moment(tokenizer, tmp_path):
    """Training goes on in the same memory while they are written."""
    params, optimizer = random_state(one_device_mesh())
    expected = jax.tree.map(np.array, params)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(3, params, optimizer, {}, Meta(3, CONFIG, ALL, None, tokenizer))
        jax.block_until_ready(overwrite(params))  # in place, unless this jax sees that the memory is being read
        checkpoints.wait()
        restored, _ = checkpoints.restore(3, *abstract_state(one_device_mesh()))
    assert_same(restored, expected)


def test_waiting_ends_when_the_checkpoint_is_there(tokenizer, tmp_path):
    params, optimizer = random_state(one_device_mesh())
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(3, params, optimizer, {}, Meta(3, CONFIG, ALL, None, tokenizer))
        checkpoints.wait()
        assert newest_step(checkpoints.directory) == 3
        assert checkpoints.directory == tmp_path / "checkpoints"


@pytest.mark.parametrize(("keep", "left"), [(1, [12]), (2, [9, 12]), (None, [3, 6, 9, 12])])
def test_the_newest_are_kept(keep, left, tokenizer, tmp_path):
    params, optimizer = random_like({"projector": abstract_state(one_device_mesh())[0]["projector"]}, 0), {}
    with Checkpoints(tmp_path, keep) as checkpoints:
        for step in (3, 6, 9, 12):
            checkpoints.save(step, params, optimizer, {}, Meta(step, CONFIG, ("projector",), None, tokenizer))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == left


# --- which checkpoint ------------------------------------------------------------------------------------------------


def test_an_unfinished_checkpoint_is_neither_the_newest_nor_in_the_way(run, tokenizer):
    """What a save that was cut off leaves behind."""
    shutil.copytree(run / "checkpoints" / "5", run / "checkpoints" / "7.orbax-checkpoint-tmp")
    (run / "checkpoints" / "notes").mkdir()
    assert newest_step(run / "checkpoints") == 5
    assert locate(run) == run / "checkpoints" / "5"
    params, optimizer = save(run, 7, tokenizer, seed=1)
    assert newest_step(run / "checkpoints") == 7
    with Checkpoints(run, None) as checkpoints:
        restored = checkpoints.restore(7, *abstract_state(one_device_mesh()))
    assert_same(restored, (params, optimizer))


def test_a_step_that_is_not_saved_is_an_error(run, tokenizer):
    with pytest.raises(RuntimeError, match=rf"^{run}/checkpoints: step 3 cannot be saved; step 5 is there$"):
        save(run, 3, tokenizer)


# --- bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [one_device_mesh, eight_devices])
def test_components_are_loaded_from_the_whole_chain(mesh, chain):
    """Onto their shards, converted to the dtypes of the run: vision fp32, llm bf16."""
    config = config_of(frozen=("llm",))
    abstract = abstract_parameters(config, mesh())[1]
    loaded = load_components(abstract, available_components(chain / "third"))
    expected = {
        name: random_state(one_device_mesh(), seed)[0][name]
        for name, seed in (("vision", 1), ("projector", 2), ("llm", 3))
    }
    assert_same(loaded, jax.tree.map(lambda leaf, a: leaf.astype(a.dtype), expected, abstract))
    assert_placed(loaded, abstract)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded["vision"])} == {FP32}
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded["llm"])} == {BF16}


def test_one_component_is_loaded_alone(run):
    abstract = abstract_parameters(CONFIG, one_device_mesh())[1]
    step_dir = run / "checkpoints" / "5"
    loaded = load_components({"projector": abstract["projector"]}, dict.fromkeys(ALL, step_dir))
    assert_same(loaded, {"projector": random_state(one_device_mesh())[0]["projector"]})


@pytest.mark.parametrize(
    ("parameter", "shape", "message"),
    [
        ("bias_3", (32,), "has no parameter projector.bias_3, which the configured model needs"),
        ("bias_2", (33,), "projector.bias_2 has shape (32,), the configured model (33,)"),
        ("kernel_2", (32,), "projector.kernel_2 has shape (32, 32), the configured model (32,)"),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(parameter, shape, message, run):
    step_dir = run / "checkpoints" / "5"
    abstract = dict(abstract_parameters(CONFIG, one_device_mesh())[1]["projector"])
    whole = NamedSharding(one_device_mesh(), P())
    abstract[parameter] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
    with pytest.raises(UserError) as caught:
        load_components({"projector": abstract}, {"projector": step_dir})
    assert str(caught.value) == f"{step_dir}: {message}"


def test_a_checkpoint_without_its_arrays_is_named(run):
    step_dir = run / "checkpoints" / "5"
    shutil.rmtree(step_dir / "state")
    with pytest.raises(UserError, match=f"^{step_dir}"):
        load_components(abstract_parameters(CONFIG, one_device_mesh())[1], dict.fromkeys(ALL, step_dir))


# --- architectures ---------------------------------------------------------------------------------------------------


def with_change(component, **changes):
    part = dataclasses.replace(getattr(CONFIG.model, component), **changes)
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **{component: part}))


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("llm", {"hidden_size": 64}, "model.llm.hidden_size=64, but the weights in RUN have 32"),
        ("llm", {"num_kv_heads": 2}, "model.llm.num_kv_heads=2, but the weights in RUN have 4"),
        ("llm", {"head_dim": 16}, "model.llm.head_dim=16, but the weights in RUN have 8"),
        ("llm", {"rope_base": 5e5}, "model.llm.rope_base=500000.0, but the weights in RUN have 10000.0"),
        ("llm", {"tie_embeddings": True}, "model.llm.tie_embeddings=True, but the weights in RUN have False"),
        ("projector", {"kind": "linear"}, "model.projector.kind=linear, but the weights in RUN have mlp2x_gelu"),
        ("vision", {"activation": "gelu"}, "model.vision.activation=gelu, but the weights in RUN have quick_gelu"),
        (
            "vision",
            {"image_mean": [0.5, 0.5, 0.5]},
            "model.vision.image_mean=[0.5, 0.5, 0.5], but the weights in RUN have [0.48145466, 0.4578275, 0.40821073]",
        ),
    ],
)
def test_another_architecture_is_refused_with_both_values(component, changes, message):
    changed = with_change(component, **changes)
    with pytest.raises(UserError) as caught:
        check_compatible(changed, CONFIG, ALL, "RUN")
    assert str(caught.value) == message
    check_compatible(changed, CONFIG, [name for name in ALL if name != component], "RUN")


@pytest.mark.parametrize(
    "changes",
    [
        {"freeze": True},
        {"init_std": 0.1},
        {"num_kv_heads": None},  # num_heads, which is 4 as well
        {"head_dim": 8},  # hidden_size / num_heads
    ],
)
def test_what_says_nothing_of_the_weights_may_differ(changes):
    check_compatible(with_change("llm", **changes), CONFIG, ALL, "RUN")
