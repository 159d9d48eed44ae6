"""Checkpoints: bit-equal on any mesh, self-describing, chained to their bases, and complete or absent."""

import dataclasses
import hashlib
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from neva_jax.config import Config, DataConfig, PrecisionConfig
from neva_jax.configfile import to_dict
from neva_jax.errors import UserError
from neva_jax.interop.store import SavedArrays
from neva_jax.parallel.mesh import make_mesh, one_device_mesh
from neva_jax.training import checkpoint
from neva_jax.training.checkpoint import (
    Checkpoints,
    Meta,
    available_components,
    locate,
    newest_step,
    read_meta,
)
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.setup import abstract_optimizer, abstract_parameters
from neva_jax.training.weights import check_compatible, load_components
from tests.models.helpers import tiny_config

ALL = ("vision", "projector", "llm")
FP32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


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
        restored_params, restored_optimizer, restored_data = checkpoints.restore(3, *abstract)
    assert_same((restored_params, restored_optimizer), (params, optimizer))
    assert_placed((restored_params, restored_optimizer), abstract)
    assert restored_data == data
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
        assert_same(checkpoints.restore(3, *abstract)[:2], (params, optimizer))


def test_a_part_of_the_parameters_can_be_restored(tokenizer, tmp_path):
    params, optimizer = save(tmp_path, 3, tokenizer)
    abstract_params, abstract_moments = abstract_state(one_device_mesh())
    with Checkpoints(tmp_path, None) as checkpoints:
        restored, moments, _ = checkpoints.restore(3, {"llm": abstract_params["llm"]}, abstract_moments)
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
        params, optimizer, data = checkpoints.restore(3, *abstract)
        checkpoints.save(4, params, optimizer, data, Meta(4, CONFIG, ALL, None, tokenizer))
        checkpoints.wait()
        assert_same(checkpoints.restore(4, *abstract), (params, optimizer, data))


def test_saving_takes_the_numbers_of_the_moment(tokenizer, tmp_path):
    """Training goes on in the same memory while they are written."""
    params, optimizer = random_state(one_device_mesh())
    expected = jax.tree.map(np.array, params)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(3, params, optimizer, {}, Meta(3, CONFIG, ALL, None, tokenizer))
        jax.block_until_ready(overwrite(params))  # in place, unless this jax sees that the memory is being read
        checkpoints.wait()
        restored, _, _ = checkpoints.restore(3, *abstract_state(one_device_mesh()))
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


@pytest.fixture
def run(tokenizer, tmp_path) -> Path:
    """A run with one complete checkpoint, of step 5."""
    save(tmp_path / "run", 5, tokenizer)
    return tmp_path / "run"


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
    assert_same(restored[:2], (params, optimizer))


def test_a_damaged_newest_checkpoint_is_named_with_the_way_back(run):
    """To go on from an older one without a word would lose steps."""
    newest = run / "checkpoints" / "9"
    (newest / "state").mkdir(parents=True)
    for find in (lambda: newest_step(run / "checkpoints"), lambda: locate(run)):
        with pytest.raises(UserError, match=rf"^{newest}: is damaged, .* move it away to go back to step 5$"):
            find()
    shutil.rmtree(run / "checkpoints" / "5")
    with pytest.raises(UserError, match=r"to go back to the start$"):
        newest_step(run / "checkpoints")


def test_a_step_that_is_not_saved_is_an_error(run, tokenizer):
    with pytest.raises(RuntimeError, match=rf"^{run}/checkpoints: step 3 cannot be saved; step 5 is there$"):
        save(run, 3, tokenizer)


def test_steps_are_numbers(run, tokenizer):
    save(run, 10, tokenizer)
    assert newest_step(run / "checkpoints") == 10


def test_a_checkpoint_is_found_from_its_run_its_folder_and_itself(run):
    step_dir = run / "checkpoints" / "5"
    for path in (run, run / "checkpoints", step_dir, str(run)):
        assert locate(path) == step_dir


def test_a_folder_without_checkpoint_is_named(tmp_path):
    assert newest_step(tmp_path / "nope") is None
    for path in (tmp_path, tmp_path / "nope"):
        message = f"{path}: holds no checkpoint; name a run's directory, or a step in its checkpoints/"
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            locate(path)


# --- meta ------------------------------------------------------------------------------------------------------------


def test_meta_json(tokenizer, tokenizer_path, tmp_path):
    save(tmp_path, 5, tokenizer, components=("projector", "llm"), base="/somewhere/base")
    folder = tmp_path / "checkpoints" / "5" / "meta"
    assert (folder / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()
    sha256 = hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    packages = ("neva_jax", "jax", "flax", "optax", "orbax-checkpoint")
    assert json.loads((folder / "meta.json").read_text()) == {
        "format": 2,
        "step": 5,
        "components": ["projector", "llm"],
        "base": "/somewhere/base",
        "ema": False,
        "template": "plain",
        "tokenizer": {
            "file": "tokenizer.model",
            "sha256": sha256,
            "size": 400,
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
        "versions": {name: version(name) for name in packages},
        "config": to_dict(CONFIG),
    }


def test_meta_is_read_back(run, tokenizer):
    meta = read_meta(run / "checkpoints" / "5")
    assert (meta.step, meta.config, meta.components, meta.base) == (5, CONFIG, ALL, None)
    assert meta.tokenizer.serialized == tokenizer.serialized


def set_json(path: Path, **changes) -> None:
    described = json.loads(path.read_text())
    for name, value in changes.items():
        described[name] = value
    path.write_text(json.dumps({name: value for name, value in described.items() if value is not None}))


BROKEN = {
    "a newer format": (
        lambda meta: set_json(meta / "meta.json", format=3),
        "{meta}/meta.json: is of format 3, this version reads 1 to 2: was written by a newer neva_jax; install that",
    ),
    "another tokenizer": (
        lambda meta: (meta / "tokenizer.model").write_bytes((meta / "tokenizer.model").read_bytes() + b"\x1a\x00"),
        "{meta}/tokenizer.model: is not the file that the checkpoint was saved with",
    ),
    "no tokenizer": (lambda meta: (meta / "tokenizer.model").unlink(), "{meta}/tokenizer.model: cannot be read"),
    "cut": (lambda meta: (meta / "meta.json").write_text('{"format": 1, '), "{meta}/meta.json: is broken"),
    "empty": (lambda meta: (meta / "meta.json").write_text(""), "{meta}/meta.json: is broken"),
    "a list": (lambda meta: (meta / "meta.json").write_text("[]"), "{meta}/meta.json: is broken"),
    "no text": (lambda meta: (meta / "meta.json").write_bytes(b"\xff\x00\xfe"), "{meta}/meta.json: is broken"),
    "a folder": (
        lambda meta: ((meta / "meta.json").unlink(), (meta / "meta.json").mkdir()),
        "{meta}/meta.json: is broken",
    ),
    "no components": (lambda meta: set_json(meta / "meta.json", components=None), "{meta}/meta.json: is broken"),
    "no configuration": (lambda meta: set_json(meta / "meta.json", config=None), "{meta}/meta.json: is broken"),
    "an unknown key": (
        lambda meta: set_json(meta / "meta.json", config={"model": {"lllm": {"hidden_size": 1}}}),
        "unknown key model.lllm",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_named(name, run):
    damage, message = BROKEN[name]
    meta = run / "checkpoints" / "5" / "meta"
    damage(meta)
    with pytest.raises(UserError) as caught:
        read_meta(meta.parent)
    assert message.format(meta=meta) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- bases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tokenizer, tmp_path) -> Path:
    """Three runs: `first` has everything, `second` a projector, `third` a language model; each starts from the last."""
    save(tmp_path / "first", 2, tokenizer, seed=1)
    save(tmp_path / "second", 4, tokenizer, components=("projector",), seed=2, base=str(tmp_path / "first"))
    save(tmp_path / "third", 6, tokenizer, components=("llm",), seed=3, base=str(tmp_path / "second"))
    return tmp_path


def test_components_come_from_the_nearest_checkpoint_that_has_them(chain):
    first, second, third = (
        chain / name / "checkpoints" / step for name, step in (("first", "2"), ("second", "4"), ("third", "6"))
    )
    assert available_components(chain / "first") == dict.fromkeys(ALL, first)
    assert available_components(chain / "second") == {"vision": first, "projector": second, "llm": first}
    assert available_components(third) == {"vision": first, "projector": second, "llm": third}


def test_a_base_that_is_gone_is_named_with_the_checkpoint_that_needs_it(chain):
    (chain / "first").rename(chain / "away")
    second, third = chain / "second" / "checkpoints" / "4", chain / "third" / "checkpoints" / "6"
    with pytest.raises(UserError) as caught:
        available_components(chain / "third")
    assert str(caught.value).startswith(
        f"{third}: its base cannot be read: {second}: its base cannot be read: {chain}/first: holds no checkpoint"
    )


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
