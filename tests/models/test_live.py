"""The golden files are what scripts/make_golden.py makes with the torch and transformers that are installed here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.phi.modeling_phi import PhiConfig, PhiRotaryEmbedding, apply_rotary_pos_emb

from neva_jax.config import LlmConfig
from neva_jax.models.layers import NO_REMAT
from neva_jax.models.llama import Llama
from neva_jax.models.rotary import rotary_angles, rotate
from neva_jax.models.vision import Vision, cubic_matrix
from scripts.make_golden import GOLDEN, llava_arrays, llm_config, normalised_pixels, randomise, vision_config
from tests.models import helpers

torch.set_num_threads(1)  # as the script; several only wait for one another on models this small


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_file_is_reproduced(name):
    """Weights and inputs exactly, outputs and gradients within 1e-5 of their norm (kernels differ among machines)."""
    fresh = GOLDEN[name]()
    with np.load(helpers.GOLDEN / f"{name}.npz") as stored:
        assert fresh.keys() == set(stored.files)
        whole = np.linalg.norm([np.linalg.norm(stored[key]) for key in stored.files if key.startswith("grad/")])
        for key in stored.files:
            if key.startswith(("output/", "grad/")):
                # What is 0 but for rounding (a bias of the keys) is compared with the whole gradient.
                bound = 1e-5 * np.linalg.norm(stored[key]) + 1e-7 * whole * key.startswith("grad/")
                assert np.linalg.norm(fresh[key] - stored[key]) <= bound, key
            else:
                np.testing.assert_array_equal(fresh[key], stored[key], err_msg=key)


def test_other_weights_and_inputs():
    """Logits and gradients of the whole model against Hugging Face's, as in test_neva, for numbers not in a file."""
    golden = helpers.to_golden(llava_arrays(seed=99))
    assert np.any(golden.input["tokens"] != helpers.load_golden("llava").input["tokens"])
    loss, logits, grads = helpers.run_neva(golden)
    real = golden.input["mask"] == 1
    np.testing.assert_allclose(logits[real], golden.output["logits"][real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, golden.output["loss"], rtol=1e-5)
    config = helpers.neva_config(golden.config)
    helpers.assert_gradients_close(grads, helpers.neva_tree(golden.grad, config), rtol=1e-4)


def _weights(model):
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def _random_llm(draw):
    """Arguments as in LLM of scripts/make_golden.py, and the length of the rows."""
    kind = draw.choice(["llama", "mistral", "qwen2"])
    groups, per_group = draw.integers(1, 4, 2)
    heads, width = int(groups * per_group), int(draw.choice([2, 4, 6, 10]))
    config = {
        "model_type": str(kind),
        "vocab_size": int(draw.integers(5, 50)),
        "hidden_size": heads * int(draw.integers(1, 8)),
        "intermediate_size": int(draw.integers(3, 40)),
        "num_hidden_layers": int(draw.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": int(groups),
        "head_dim": width,
        "rms_norm_eps": float(draw.choice([1e-6, 1e-5, 1e-2])),
        "rope_theta": float(draw.choice([100.0, 10000.0, 1e6])),
        "tie_word_embeddings": bool(draw.integers(2)),
        "max_position_embeddings": int(draw.integers(4, 40)),
    }
    if kind == "llama":
        config |= {"attention_bias": bool(draw.integers(2)), "mlp_bias": bool(draw.integers(2))}
    if kind == "mistral":
        config["sliding_window"] = [None, 1, 4, 30][draw.integers(4)]
    scaling, factor = draw.choice(["default", "linear", "dynamic", "llama3"]), float(draw.choice([1.5, 8.0]))
    if scaling != "default" and not (scaling == "dynamic" and width == 2):  # its exponent is R / (R - 2)
        config["rope_parameters"] = {"rope_type": str(scaling), "factor": factor}
    if scaling == "llama3":
        config["rope_parameters"] |= {
            "low_freq_factor": float(draw.choice([0.5, 1.0])),
            "high_freq_factor": float(draw.choice([2.0, 4.0])),
            "original_max_position_embeddings": int(draw.choice([8, 40])),
        }
    return config, int(draw.integers(1, 24))


@pytest.mark.parametrize("seed", range(15))
def test_random_language_models(seed):
    draw = np.random.default_rng([seed, 4])
    values, length = _random_llm(draw)
    theirs = AutoModelForCausalLM.from_config(llm_config(values))
    randomise(theirs, draw)
    tokens = draw.integers(0, values["vocab_size"], (2, length))
    config = helpers.llm_config(values)
    params = helpers.llm_tree(_weights(theirs), config)
    graphdef = helpers.graph(lambda: Llama(nnx.Rngs(0), config, jnp.float32))

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(model.embed(tokens), jnp.broadcast_to(jnp.arange(length), tokens.shape))[0])

    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    np.testing.assert_allclose(run(params), expected, rtol=0, atol=1e-4, err_msg=str(values))


@pytest.mark.parametrize("seed", range(8))
def test_random_vision_encoders(seed):
    draw = np.random.default_rng([seed, 5])
    kind, patch, heads = ("clip", "siglip")[seed % 2], int(draw.integers(1, 4)), int(draw.integers(1, 4))
    side, new_side = (patch * int(n) for n in draw.integers(1, 6, 2))
    layers = int(draw.integers(1, 4))
    values = {
        "model_type": f"{kind}_vision_model",
        "hidden_size": heads * int(draw.integers(1, 9)),
        "intermediate_size": int(draw.integers(3, 30)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
        "hidden_act": str(draw.choice(list(helpers.ACTIVATIONS))),
        "layer_norm_eps": float(draw.choice([1e-6, 1e-5, 1e-2])),
        "select": {
            "layer": -int(draw.integers(1, layers + 1)),
            "strategy": "full" if kind == "siglip" or draw.integers(2) else "default",
            "image_size": new_side if draw.integers(2) else side,
        },
    }
    if kind == "siglip":
        values["vision_use_head"] = False
    theirs = AutoModel.from_config(vision_config(values))
    randomise(theirs, draw)
    select = values["select"]
    images = draw.integers(0, 256, (2, select["image_size"], select["image_size"], 3))
    with torch.no_grad():
        states = theirs(
            pixel_values=normalised_pixels(images),
            output_hidden_states=True,
            interpolate_pos_encoding=select["image_size"] != side,
        ).hidden_states
    expected = states[select["layer"]].numpy()[:, 1 if select["strategy"] == "default" else 0 :]
    config = helpers.vision_config(values)
    graphdef = helpers.graph(lambda: Vision(nnx.Rngs(0), config, jnp.float32, NO_REMAT))
    params = helpers.vision_tree(_weights(theirs), config)
    ours = jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.asarray(images, jnp.uint8)))(params)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=str(values))


@pytest.mark.parametrize(("old", "new"), [(1, 4), (2, 3), (4, 6), (6, 4), (5, 1), (16, 24), (24, 27)])
def test_cubic_interpolation_is_torchs(old, new):
    grid = np.random.default_rng(old).standard_normal((old, old)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(grid)[None, None], size=(new, new), mode="bicubic", align_corners=False
    )
    matrix = cubic_matrix(old, new)
    np.testing.assert_allclose(matrix @ grid @ matrix.T, theirs[0, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("scaling", ["default", "linear", "dynamic"])
def test_partial_rotation_is_phis(fraction, scaling):
    rope = {"rope_type": scaling, "rope_theta": 500.0, "factor": 3.0, "partial_rotary_factor": fraction}
    theirs = PhiRotaryEmbedding(
        PhiConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=10, rope_parameters=rope)
    )
    width = int(16 * fraction)
    draw = np.random.default_rng(3)
    q, k = (draw.standard_normal((1, 25, 2, 16)).astype(np.float32) for _ in range(2))
    positions = np.arange(25)[None]
    cos, sin = theirs(torch.zeros(1), torch.from_numpy(positions))
    rotated = apply_rotary_pos_emb(*(torch.from_numpy(x[..., :width].copy()) for x in (q, k)), cos, sin, 2)
    config = LlmConfig(
        vocab_size=9,
        hidden_size=32,
        num_heads=2,
        rope_base=500.0,
        rope_fraction=fraction,
        rope_scaling="none" if scaling == "default" else scaling,
        rope_factor=3.0,
        rope_original_length=10,
    )
    angles = rotary_angles(jnp.asarray(positions), config)
    for x, expected in zip((q, k), rotated, strict=True):
        expected = np.concatenate([expected.numpy(), x[..., width:]], axis=-1)
        np.testing.assert_allclose(rotate(jnp.asarray(x), *angles), expected, rtol=0, atol=1e-5)
