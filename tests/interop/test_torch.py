"""Against PyTorch: folders that transformers itself saved give its logits here, and ours load there without a word."""

import json

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import transformers  # noqa: E402
from flax import nnx  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from neva_jax.config import Config  # noqa: E402
from neva_jax.data.tiles import image_span, picture  # noqa: E402
from neva_jax.derived import image_tokens  # noqa: E402
from neva_jax.interop.tensors import open_weights  # noqa: E402
from neva_jax.models.neva import Neva  # noqa: E402
from neva_jax.training.checkpoint_meta import locate, read_meta  # noqa: E402
from tests.interop import folders  # noqa: E402
from tests.interop.conftest import load  # noqa: E402
from tests.models.helpers import graph  # noqa: E402

IMAGE = 400


def random_model(build, seed=0):
    """A model with weights large enough to see differences."""
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name and name.endswith("weight")))
    return model


def llm(fields):
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    return random_model(lambda: transformers.AutoModelForCausalLM.from_config(config))


def llava(fields):
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    return random_model(lambda: getattr(transformers, fields["architectures"][0])(config))


def our_logits(checkpoint, batch):
    """Logits of a whole checkpoint, or of a language model alone (no images in the batch)."""
    config: Config = read_meta(locate(checkpoint)).config
    params = load(checkpoint)
    if "images" in batch:
        model = nnx.merge(graph(lambda: Neva(nnx.Rngs(0), config.model, config.precision)), params)
        return model.llm.logits(model(batch)[0])
    model = nnx.merge(graph(lambda: Neva(nnx.Rngs(0), config.model, config.precision).llm), params["llm"])
    return model.logits(model(model.embed(batch["tokens"]), batch["positions"])[0])


def text_batch(seed=0, length=24):
    tokens = np.random.default_rng(seed).integers(3, 399, (2, length)).astype(np.int32)
    return {"tokens": tokens, "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)}


def check_language_model(fields, from_hf, to_hf, tmp_path):
    theirs = llm(fields)
    theirs.save_pretrained(tmp_path / "hf")
    out = from_hf(tmp_path / "hf")
    batch = text_batch()
    with torch.no_grad():
        expected = theirs(torch.tensor(batch["tokens"]).long()).logits.numpy()
    np.testing.assert_allclose(our_logits(out, batch), expected, atol=1e-4)
    exported = to_hf(out, text_only=True)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(batch["tokens"]).long()).logits, torch.tensor(expected))


@pytest.mark.parametrize("family", folders.FAMILIES)
def test_language_models(family, from_hf, to_hf, tmp_path):
    check_language_model(folders.FAMILIES[family], from_hf, to_hf, tmp_path)


@pytest.mark.parametrize("seed", range(8))
def test_random_configurations(seed, from_hf, to_hf, tmp_path):
    """Heads, groups, widths, biases and tying drawn at random."""
    draw = np.random.default_rng(seed)
    groups = int(draw.choice([1, 2, 3]))
    heads = groups * int(draw.choice([1, 2]))
    kind = str(draw.choice(["llama", "mistral", "qwen2"]))
    fields = folders.LLAMA | {
        "model_type": kind,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": heads * int(draw.choice([6, 10])),
        "head_dim": int(draw.choice([4, 8])),
        "intermediate_size": int(draw.integers(5, 40)),
        "num_hidden_layers": int(draw.integers(1, 4)),
        "tie_word_embeddings": bool(draw.integers(2)),
        "vocab_size": int(draw.integers(400, 440)),
    }
    if kind == "llama":
        fields |= {"attention_bias": bool(draw.integers(2)), "mlp_bias": bool(draw.integers(2))}
    if kind == "mistral":
        fields["sliding_window"] = int(draw.integers(1, 30))
    check_language_model(fields, from_hf, to_hf, tmp_path)


SIGLIP_QWEN2 = folders.LLAVA | {
    "vision_config": folders.SIGLIP | {"vision_use_head": False},
    "text_config": folders.FAMILIES["qwen2"],
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
}
LLAVAS = {
    "llava": folders.LLAVA,
    "full": folders.LLAVA | {"vision_feature_select_strategy": "full", "vision_feature_layer": 2},
    "siglip_qwen2": SIGLIP_QWEN2,
    "next": folders.NEXT,
    "next_mistral": folders.NEXT | {"text_config": folders.FAMILIES["mistral"]},
}


@pytest.mark.parametrize("name", LLAVAS)
def test_llava(name, from_hf, to_hf, tmp_path):
    theirs = llava(LLAVAS[name])
    theirs.save_pretrained(tmp_path / "hf")
    folders.write_preprocessor(tmp_path / "hf")
    out = from_hf(tmp_path / "hf")
    exported = to_hf(out)
    again, report = type(theirs).from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    processor = transformers.AutoProcessor.from_pretrained(exported)
    pixels = np.random.default_rng(0).integers(0, 256, (25, 12, 3)).astype(np.uint8)
    inputs = processor(text="USER: <image>\nWhat is it? ASSISTANT:", images=[pixels], return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
        assert torch.equal(again(**inputs).logits, torch.tensor(expected))
    config = read_meta(locate(out)).config
    span = image_span(12, 25, config)
    tokens = inputs["input_ids"].numpy().astype(np.int32)
    is_image = tokens[0] == IMAGE
    assert is_image.sum() == len(span.slots)
    slots = np.full_like(tokens, -1)
    slots[0, is_image] = span.slots
    tiles = picture(Image.fromarray(pixels), config).tiles
    assert tiles.shape[0] * image_tokens(config.model) >= span.features
    batch = {
        "tokens": np.where(is_image, 0, tokens),
        "positions": np.arange(tokens.shape[1], dtype=np.int32)[None],
        "segment_ids": np.ones_like(tokens),
        "image_slots": slots,
        "images": tiles[None],
    }
    np.testing.assert_allclose(our_logits(out, batch), expected, atol=1e-4)


def test_clip_folders_that_transformers_saves(from_hf, tmp_path):
    vision = transformers.CLIPVisionConfig.from_dict(dict(folders.CLIP))
    whole = transformers.CLIPConfig(
        vision_config=vision.to_dict(), text_config={"hidden_size": 8, "num_attention_heads": 2}
    )
    for i, model in enumerate((transformers.CLIPVisionModel(vision), transformers.CLIPModel(whole))):
        model.save_pretrained(tmp_path / f"hf{i}")
        theirs = {name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
        ours = load(from_hf(tmp_path / f"hf{i}", tmp_path / f"out{i}"))["vision"]
        expected = theirs["encoder.layers.2.mlp.fc2.weight"].numpy().T
        assert np.array_equal(ours["layers"]["down"][2], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("old", [False, True])
def test_original_layout_in_pickles(dtype, old, from_hf, tmp_path):
    arrays = {name: torch.tensor(array).to(dtype) for name, array in folders.original_arrays().items()}
    vision = folders.write_folder(tmp_path / "clip", folders.CLIP, folders.vision_arrays(folders.CLIP))
    reference = folders.write_folder(tmp_path / "reference", folders.ORIGINAL, {})
    save_file(arrays, reference / "model.safetensors")
    source = folders.write_folder(tmp_path / "hf", folders.ORIGINAL, {})
    (source / "model.safetensors").unlink()
    names = sorted(arrays)
    files = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    for file, part in zip(files, (names[:9], names[9:]), strict=True):
        tensors = {
            name: torch.nn.Parameter(arrays[name]) if name == "lm_head.weight" else arrays[name] for name in part
        }
        torch.save(tensors, source / file, _use_new_zipfile_serialization=not old)
    index = {"weight_map": dict.fromkeys(names[:9], files[0]) | dict.fromkeys(names[9:], files[1])}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    read, expected = open_weights(source, allow_pickle=True), open_weights(reference, allow_pickle=False)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].read().tobytes() == tensor.read().tobytes()
        assert read[name].read(1, 3).tobytes() == tensor.read(1, 3).tobytes()
    out = from_hf(source, vision=vision, allow_pickle=True)
    kernel = load(out)["projector"]["kernel_2"]
    assert np.array_equal(kernel, arrays["model.mm_projector.2.weight"].float().numpy().T)


def test_a_projector_in_a_pickle(from_hf, tmp_path):
    arrays = folders.projector_arrays(folders.MLP2X, "model.mm_projector.")
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, tmp_path / "mm_projector.bin")
    params = load(from_hf(tmp_path / "mm_projector.bin", allow_pickle=True))
    assert np.array_equal(params["projector"]["kernel_1"], arrays["model.mm_projector.0.weight"].T)
    assert jax.tree.structure(params) == jax.tree.structure(
        {"projector": dict.fromkeys(("kernel_1", "bias_1", "kernel_2", "bias_2"), 0)}
    )
