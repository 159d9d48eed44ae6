"""The vision encoder against Hugging Face's CLIP and SigLIP (tests/golden)."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neva_jax.models.layers import NO_REMAT, Remat
from neva_jax.models.vision import Vision, cubic_matrix
from tests.models.helpers import assert_gradients_close, graph, load_golden, vision_config, vision_tree

NAMES = ("clip", "clip_full", "clip_interpolated", "siglip", "siglip_last")


def _graph(config, remat=NO_REMAT):
    return graph(lambda: Vision(nnx.Rngs(0), config, jnp.float32, remat))


def _features(graphdef, params, images):
    return jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))(params, images)


@pytest.fixture(scope="module")
def golden():
    return load_golden("clip")


@pytest.fixture(scope="module")
def config(golden):
    return vision_config(golden.config, select_layer=-2)


def _gradients(golden, config, remat):
    def weighted(params):
        return jnp.sum(_features(_graph(config, remat), params, golden.input["images"]) * golden.input["cotangent"])

    return jax.jit(jax.grad(weighted))(vision_tree(golden.weight, config))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("clip", (2, 16, 48)),
        ("clip_full", (2, 17, 24)),
        ("clip_interpolated", (2, 36, 24)),
        ("siglip", (2, 16, 24)),
        ("siglip_last", (2, 16, 24)),
    ],
)
def test_features(name, shape):
    """Within 1e-5 of the largest; the layer above the selected one and the final norm are NaN and never run."""
    golden = load_golden(name)
    config = vision_config(golden.config)
    features = _features(_graph(config), vision_tree(golden.weight, config, unused=np.nan), golden.input["images"])
    expected = golden.output["hidden"]
    assert features.shape == expected.shape == shape
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        *((name, NO_REMAT) for name in NAMES),
        ("clip", Remat("dots")),
        ("clip", Remat("full", "uniform", 3)),  # of the 3 layers that run
        ("siglip_last", Remat("full", "block", 1)),
    ],
    ids=str,
)
def test_gradients(name, remat):
    """Every parameter of every layer within 1e-4 of its norm; what does not run has gradients of exactly 0."""
    golden = load_golden(name)
    config = vision_config(golden.config)
    expected = vision_tree(golden.grad, config)
    assert_gradients_close(_gradients(golden, config, remat), expected, rtol=1e-4)


@pytest.mark.parametrize("select", [-1, -3])
def test_another_layer(golden, config, select):
    """Selecting layer n of L is the same as an encoder of n layers that selects its last one."""
    params = vision_tree(golden.weight, config, unused=0.1)
    short_layers = config.num_layers + 1 + select
    changes = {"num_hidden_layers": short_layers}
    shorter = vision_config({**golden.config, **changes}, select_layer=-1)
    short_params = {**params, "layers": jax.tree.map(lambda p: p[:short_layers], params["layers"])}
    selected = vision_config(golden.config, select_layer=select)
    ours = _features(_graph(selected), params, golden.input["images"])
    np.testing.assert_allclose(
        ours, _features(_graph(shorter), short_params, golden.input["images"]), rtol=1e-5, atol=1e-5
    )
    assert np.abs(ours - golden.output["hidden"]).max() > 0.1


def test_patches_go_row_by_row_from_the_top_left(config):
    """Patch r*4 + c holds the pixels of rows 4r..4r+3 and columns 4c..4c+3."""
    pixels = np.arange(16 * 16 * 3, dtype=np.float32).reshape(1, 16, 16, 3)
    patches = Vision._patches(SimpleNamespace(config=config), jnp.asarray(pixels))
    for r in range(4):
        for c in range(4):
            expected = pixels[0, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].reshape(-1)
            np.testing.assert_array_equal(patches[0, 4 * r + c], expected)


def test_an_image_does_not_depend_on_its_neighbours(golden, config):
    params = vision_tree(golden.weight, config)
    both = _features(_graph(config), params, golden.input["images"])
    alone = _features(_graph(config), params, golden.input["images"][1:])
    np.testing.assert_allclose(both[1:], alone, rtol=0, atol=1e-5 * np.abs(both).max())


def test_own_mean_and_std(golden, config):
    """Twice the values with twice the mean and the standard deviation are the same picture; others are not."""
    params = vision_tree(golden.weight, config)
    images = golden.input["images"] // 2
    doubled = vision_config(
        golden.config,
        image_mean=[2 * m for m in (0.2, 0.25, 0.15)],
        image_std=[2 * s for s in (0.2, 0.3, 0.1)],
    )
    halved = vision_config(golden.config, image_mean=[0.2, 0.25, 0.15], image_std=[0.2, 0.3, 0.1])
    expected = _features(_graph(halved), params, images)
    np.testing.assert_allclose(_features(_graph(doubled), params, 2 * images), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(_features(_graph(config), params, images) - expected).max() > 0.1


# --- interpolation of the position table -----------------------------------------------------------------------------

SIZES = [(1, 1), (1, 4), (2, 3), (4, 6), (7, 7), (6, 4), (5, 1), (16, 24), (24, 27)]


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_cubic_interpolation(old, new):
    """A constant stays, a mirrored line gives the mirrored result, and each sample sees its four neighbours at most."""
    matrix = cubic_matrix(old, new)
    assert matrix.shape == (new, old)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, rtol=0, atol=1e-6)
    assert np.count_nonzero(matrix, axis=1).max() <= 4
    if old == new:
        np.testing.assert_array_equal(matrix, np.eye(old))


def test_cubic_interpolation_halfway_between_samples():
    """Keys' kernel with a = -0.75 at distances 1/2 and 3/2: 0.59375 and -0.09375."""
    np.testing.assert_allclose(cubic_matrix(8, 4)[1], [0, -0.09375, 0.59375, 0.59375, -0.09375, 0, 0, 0], atol=1e-7)


def test_a_table_of_the_same_size_is_left_alone(golden, config):
    params = vision_tree(golden.weight, config)
    same = vision_config(golden.config, position_image_size=16)
    expected = _features(_graph(config), params, golden.input["images"])
    np.testing.assert_array_equal(_features(_graph(same), params, golden.input["images"]), expected)
