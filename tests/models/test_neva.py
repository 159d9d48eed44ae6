"""The whole model against Hugging Face's LLaVA (tests/golden/llava.npz), and how images enter the text."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neva_jax.config import PrecisionConfig
from neva_jax.derived import frozen_components, image_tokens, trained_components
from neva_jax.models.layers import NO_REMAT, Remat
from neva_jax.models.neva import Neva, abstract_model, random_parameters
from neva_jax.parallel.mesh import LOGICAL_AXES, spec
from neva_jax.precision.policy import compute_dtype, frozen_dtype
from tests.models.helpers import (
    FP32,
    assert_gradients_close,
    load_golden,
    neva_batch,
    neva_config,
    neva_graph,
    neva_tree,
    random_batch,
    run_neva,
    tiny_config,
)

PATCHES = 16  # of an image in the golden file


NAMES = ("llava", "llava_siglip_qwen2", "llava_next")


@cache
def _golden(name="llava"):
    golden = load_golden(name)
    return golden, neva_config(golden.config)


@cache
def _run(name="llava", compute="fp32", remat=NO_REMAT, unroll=1):
    return run_neva(_golden(name)[0], compute, remat, unroll)


# --- against Hugging Face --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    golden, _ = _golden(name)
    loss, logits, _ = _run(name)
    real = golden.input.get("mask", np.ones_like(golden.input["tokens"])) == 1
    assert np.std(golden.output["logits"]) > 1
    np.testing.assert_allclose(logits[real], golden.output["logits"][real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, golden.output["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    """Of vision encoder, projector and language model: every parameter of every layer within 1e-4 of its norm."""
    golden, config = _golden(name)
    assert_gradients_close(_run(name)[2], neva_tree(golden.grad, config), rtol=1e-4)


def test_anyres_slots_are_not_trivial():
    """Of the golden file: padding was cut off both ways, and rows of tiles interleave the patches of two tiles."""
    golden, _ = _golden("llava_next")
    slots = neva_batch(golden)["image_slots"]
    wide = slots[0][slots[0] != -1][16:]
    widths = np.diff(np.flatnonzero(np.concatenate([[-2], wide]) == -2)) - 1
    assert widths.tolist() == [8, 8]  # of 4 rows; 8 patches from 2 tiles
    assert wide[:9].tolist() == [20, 21, 22, 23, 36, 37, 38, 39, -2]
    assert np.sum(slots[0] == -2) == 2
    assert np.sum(slots[1] == -2) == 8 + 8


def test_remat_and_unroll_change_nothing():
    _, plain_logits, plain_grads = _run()
    _, logits, grads = _run(remat=Remat("full", "uniform", 2), unroll=2)
    np.testing.assert_allclose(logits, plain_logits, rtol=0, atol=1e-5)
    assert_gradients_close(grads, jax.tree.map(np.asarray, plain_grads), rtol=1e-5)


def test_bf16_is_close_to_fp32():
    """Relative to their norms: logits within 5 %, the gradient of each component within 10 %, fp32 gradients.

    bf16 keeps 8 bits (0.4 %), and the error of a few layers adds up; less than 0.05 % would mean that fp32 was used.
    """
    _, logits, grads = _run(compute="bf16")
    _, exact_logits, exact_grads = _run()
    error = np.linalg.norm(logits - exact_logits) / np.linalg.norm(exact_logits)
    assert 5e-4 < error < 0.05
    for name, component in grads.items():
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(component))
        flat, exact = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
            for tree in (component, exact_grads[name])
        )
        assert 5e-4 < np.linalg.norm(flat - exact) / np.linalg.norm(exact) < 0.1, name


def test_two_rows_packed_into_one():
    """Both golden rows, without their padding, as two segments of one row with two images: the same logits."""
    golden, config = _golden()
    rows = neva_batch(golden)
    lengths = golden.input["mask"].sum(axis=1)
    parts = {
        name: [rows[name][i, :length].copy() for i, length in enumerate(lengths)]
        for name in ("tokens", "positions", "image_slots", "segment_ids")
    }
    parts["segment_ids"][1] += 1
    slots = parts["image_slots"][1]
    slots[slots >= 0] += PATCHES
    batch = {name: np.concatenate(values)[None] for name, values in parts.items()}
    batch["images"] = golden.input["images"][None]
    graphdef = neva_graph(config)

    @partial(jax.jit, static_argnames="packed")
    def run(params, packed):
        model = nnx.merge(graphdef, params)
        return model.llm.logits(model(batch, packed=packed)[0])[0]

    params = neva_tree(golden.weight, config)
    expected = np.concatenate([golden.output["logits"][i, :length] for i, length in enumerate(lengths)])
    np.testing.assert_allclose(run(params, packed=True), expected, rtol=0, atol=1e-4)
    unpacked = run(params, packed=False)
    assert np.abs(unpacked[lengths[0] :] - expected[lengths[0] :]).max() > 0.1


# --- splice ----------------------------------------------------------------------------------------------------------


@cache
def _tiny():
    config = tiny_config()
    return config, neva_graph(config), jax.tree.map(np.asarray, _random_tiny()(jax.random.key(1)))


@cache
def _random_tiny():
    return jax.jit(partial(random_parameters, tiny_config(), FP32))


@cache
def _embed():
    graphdef = _tiny()[1]
    return jax.jit(lambda params, *inputs: nnx.merge(graphdef, params).embed(*inputs))


@cache
def _image_features():
    graphdef = _tiny()[1]
    return jax.jit(lambda params, images: nnx.merge(graphdef, params).image_features(images))


def _mixed_batch():
    """Four patches an image. Row 0: images apart, the second first; row 1: text only; row 2: one image, then text."""
    draw = np.random.default_rng(9)
    tokens = draw.integers(0, 40, (3, 14))
    images = draw.integers(0, 256, (3, 2, 8, 8, 3)).astype(np.uint8)
    images[1] = 0
    slots = np.full((3, 14), -1)
    slots[0, 1:5] = [4, 5, 6, 7]
    slots[0, 8:12] = [0, 1, 2, 3]
    slots[2, :4] = [0, 1, 2, 3]
    return tokens, images, slots


def test_splice_against_a_loop():
    _, _, params = _tiny()
    tokens, images, slots = _mixed_batch()
    features = np.asarray(_image_features()(params, images)).reshape(3, 2, 4, 32)
    table = params["llm"]["embedding"]
    expected = np.zeros((3, 14, 32), np.float32)
    for row in range(3):
        for i in range(14):
            if slots[row, i] < 0:
                expected[row, i] = table[tokens[row, i]]
            else:
                image, patch = divmod(slots[row, i], 4)
                expected[row, i] = features[row, image, patch]
    np.testing.assert_allclose(_embed()(params, tokens, images, slots), expected, rtol=1e-6, atol=1e-6)


def test_newlines_against_a_loop():
    """Slot -2 is the projector's newline; its gradient is the sum over the places where it stands."""
    config, _, params = _tiny()
    config = dataclasses.replace(config, projector=dataclasses.replace(config.projector, newline=True))
    newline = np.linspace(-1, 1, 32).astype(np.float32)
    params = {**params, "projector": {**params["projector"], "newline": newline}}
    tokens, images, slots = _mixed_batch()
    slots[0, 1:7] = [4, 5, -2, 6, 7, -2]
    slots[1, 13] = -2
    embed = jax.jit(lambda params: nnx.merge(neva_graph(config), params).embed(tokens, images, slots))
    expected = np.array(_embed()(_tiny()[2], tokens, images, slots))
    for row, i in ((0, 3), (0, 6), (1, 13)):
        expected[row, i] = newline
    np.testing.assert_allclose(embed(params), expected, rtol=0, atol=1e-6)
    cotangent = np.random.default_rng(2).standard_normal(expected.shape).astype(np.float32)
    grads = jax.grad(lambda params: jnp.sum(embed(params) * cotangent))(params)
    np.testing.assert_allclose(
        grads["projector"]["newline"], cotangent[0, 3] + cotangent[0, 6] + cotangent[1, 13], rtol=1e-5
    )
    # The token at a newline is not read.
    assert np.all(grads["llm"]["embedding"][np.setdiff1d(np.arange(40), tokens[slots == -1])] == 0)


@pytest.mark.parametrize("kind", ["identity", "linear", "mlp3x_gelu", "mlp_downsample"])
@pytest.mark.parametrize(("vision", "size"), [("clip", 8), ("clip", 12), ("siglip", 12)])
def test_the_stated_number_of_image_tokens_is_the_models(kind, vision, size):
    config = tiny_config(kind=kind)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, kind=vision, image_size=size))
    if kind == "identity":
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, hidden_size=32))
    model = nnx.eval_shape(lambda: Neva(nnx.Rngs(0), config, FP32))
    images = jax.ShapeDtypeStruct((2, 3, size, size, 3), jnp.uint8)
    assert nnx.eval_shape(Neva.image_features, model, images).shape == (2, 3 * image_tokens(config), 32)


def test_the_class_token_counts_where_it_is_kept():
    config = tiny_config()
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, select_feature="cls_patch"))
    model = nnx.eval_shape(lambda: Neva(nnx.Rngs(0), config, FP32))
    images = jax.ShapeDtypeStruct((2, 3, 8, 8, 3), jnp.uint8)
    assert image_tokens(config) == 5
    assert nnx.eval_shape(Neva.image_features, model, images).shape == (2, 15, 32)


def test_features_come_in_the_order_of_rows_and_images():
    _, _, params = _tiny()
    images = _mixed_batch()[1]
    together = np.asarray(_image_features()(params, images)).reshape(3, 2, 4, 32)
    for row in range(3):
        for k in range(2):
            alone = _image_features()(params, images[row : row + 1, k : k + 1])
            np.testing.assert_allclose(together[row, k], alone[0], rtol=1e-5, atol=1e-5)
    assert np.abs(together[0, 0] - together[0, 1]).max() > 0.01


def test_a_token_at_an_image_slot_is_not_read():
    _, _, params = _tiny()
    tokens, images, slots = _mixed_batch()
    other = np.where(slots >= 0, 39 - tokens, tokens)
    assert np.any(other != tokens)
    np.testing.assert_array_equal(_embed()(params, tokens, images, slots), _embed()(params, other, images, slots))


def test_a_text_only_row_gives_the_image_side_no_gradient():
    _, graphdef, params = _tiny()
    tokens, images, slots = _mixed_batch()

    @jax.jit
    def gradient(params, row):
        def loss(params):
            embedded = nnx.merge(graphdef, params).embed(tokens, images, slots)
            return jnp.sum(jnp.where(jnp.arange(3)[:, None, None] == row, embedded, 0) ** 2)

        return jax.grad(loss)(params)

    text_only, with_image = gradient(params, 1), gradient(params, 2)
    for name in ("projector", "vision"):
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(text_only[name])), name
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(with_image[name])), name
    assert np.any(text_only["llm"]["embedding"] != 0)


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [("vision",), ("vision", "llm"), ("vision", "projector")])
def test_parts_merge_to_the_same_model(frozen):
    """Trained and frozen parameters, split by component and joined as a step joins them."""
    config, graphdef, params = _tiny()
    freeze = {
        name: dataclasses.replace(getattr(config, name), freeze=name in frozen)
        for name in ("vision", "projector", "llm")
    }
    config = dataclasses.replace(config, **freeze)
    assert frozen_components(config) == frozen
    assert set(trained_components(config)) | set(frozen) == set(params)
    trained = {name: params[name] for name in trained_components(config)}
    rest = {name: params[name] for name in frozen_components(config)}
    batch = random_batch(config, rows=2, length=10, images=1)

    @jax.jit
    def run(*parts):
        merged = {name: tree for part in parts for name, tree in part.items()}
        return nnx.merge(graphdef, merged)(batch)[0]

    whole = jax.jit(lambda params: nnx.merge(graphdef, params)(batch)[0])(params)
    np.testing.assert_array_equal(run(rest, trained), whole)
    doubled = jax.tree.map(lambda p: 2 * p, trained)
    assert np.any(run(rest, doubled) != whole)


def test_frozen_weights_stored_in_bf16_compute_in_fp32():
    """What is stored smaller gives the same as its rounded values in fp32."""
    config, graphdef, params = _tiny()
    batch = random_batch(config, rows=2, length=10, images=1)
    run = jax.jit(lambda params: nnx.merge(graphdef, params)(batch)[0])
    stored = {**params, "vision": jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params["vision"])}
    rounded = {**params, "vision": jax.tree.map(lambda p: np.asarray(p, np.float32), stored["vision"])}
    out = run(stored)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, run(rounded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("compute", "frozen", "expected"),
    [
        ("fp32", None, (jnp.float32, jnp.float32)),
        ("bf16", None, (jnp.bfloat16, jnp.bfloat16)),
        ("bf16", "fp32", (jnp.bfloat16, jnp.float32)),
        ("fp32", "bf16", (jnp.float32, jnp.bfloat16)),
        ("fp8_delayed", None, (jnp.bfloat16, jnp.bfloat16)),
    ],
)
def test_dtypes(compute, frozen, expected):
    precision = PrecisionConfig(compute=compute, frozen=frozen)
    assert (compute_dtype(precision), frozen_dtype(precision)) == expected


@pytest.mark.parametrize(("kind", "tied"), [("mlp2x_gelu", False), ("linear", True)])
def test_every_parameter_has_logical_axes(kind, tied):
    _, state = abstract_model(tiny_config(kind=kind, tied=tied), FP32)
    parameters = nnx.to_flat_state(state)
    names = {".".join(map(str, path)) for path, _ in parameters}
    assert ("llm.head" in names) is not tied
    assert ("projector.kernel_2" in names) is (kind == "mlp2x_gelu")
    for path, variable in parameters:
        axes = variable.get_metadata()["axes"]
        assert len(axes) == len(variable.get_value().shape), path
        assert all(axis is None or axis in LOGICAL_AXES for axis in axes), path
        assert ("layers" in axes) is ("layers" in path), path
        assert axes.index("layers") == 0 if "layers" in axes else True, path
        spec(axes)  # raises where two dimensions would land on one mesh axis
        assert isinstance(variable.get_value(), jax.ShapeDtypeStruct), path  # nothing is allocated


def test_random_parameters_match_the_abstract_model():
    config, _, params = _tiny()
    _, state = abstract_model(config, FP32)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == shapes


def test_random_parameters_follow_the_key_alone():
    _, _, params = _tiny()
    again, other = _random_tiny()(jax.random.key(1)), _random_tiny()(jax.random.key(2))
    for path, leaf in nnx.traversals.flatten_mapping(params).items():
        same, changed = (nnx.traversals.flatten_mapping(tree)[path] for tree in (again, other))
        np.testing.assert_array_equal(same, leaf)
        if leaf.std() > 0:
            assert np.any(changed != leaf), path


def test_random_parameters_have_the_stated_spread():
    """Standard deviations of HF's CLIP and of model.llm.init_std, within 12 %; norms 1 and biases 0."""
    _, _, params = _tiny()
    d, layers = 16, 2
    vision, llm = params["vision"], params["llm"]
    inner = d**-0.5 * (2 * layers) ** -0.5
    expected = {
        **{f"vision.layers.{name}": inner for name in ("q", "k", "v", "down")},
        "vision.layers.o": d**-0.5,
        "vision.layers.up": (2 * d) ** -0.5,
        "vision.patch": 0.02,
        **{f"llm.layers.{name}": 0.2 for name in ("q", "k", "v", "o", "gate", "up", "down")},
        "llm.embedding": 0.2,
        "llm.head": 0.2,
    }
    for name, std in expected.items():
        leaf = params
        for part in name.split("."):
            leaf = leaf[part]
        np.testing.assert_allclose(leaf.std(), std, rtol=0.12, err_msg=name)
        np.testing.assert_allclose(leaf.mean(), 0, atol=0.2 * std, err_msg=name)
    for norm in (llm["norm"], llm["layers"]["mlp_norm"], vision["pre_norm"], vision["layers"]["attention_norm"]):
        assert np.all(norm["scale"] == 1)
        assert np.all(norm.get("bias", 0) == 0)
    for name in ("q_bias", "o_bias", "up_bias", "down_bias"):
        assert np.all(vision["layers"][name] == 0)


def test_a_frozen_encoder_is_not_rematerialised():
    config = tiny_config()
    frozen = dataclasses.replace(config, vision=dataclasses.replace(config.vision, freeze=True))
    full = Remat("full")
    for model_config, expected in ((config, full), (frozen, NO_REMAT)):
        model = nnx.eval_shape(lambda c=model_config: Neva(nnx.Rngs(0), c, FP32, remat=full))
        assert (model.vision.remat, model.llm.remat) == (expected, full)
