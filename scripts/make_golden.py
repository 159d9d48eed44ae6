"""Make the reference arrays of tests/golden with Hugging Face's models: tiny, random, fp32 on the CPU.

    python scripts/make_golden.py [--out tests/golden]        needs torch and transformers

A file holds arrays named
    config            JSON: the arguments of the Hugging Face configuration, and `select` (see VISION)
    input/NAME        what the model was given
    weight/NAME       weights that take part, under Hugging Face's names; float16, which holds them exactly
    output/NAME       logits, loss or hidden states
    grad/NAME         gradients of the loss (or of the sum of hidden states times input/cotangent), as float32

Weights and inputs come from NumPy's generator, so only the outputs depend on the versions of torch and transformers.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

Arrays = dict[str, np.ndarray]

IGNORED = -100  # label of a position without loss
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, for values in 0..1
SMALL = {
    "vocab_size": 43,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
LLM = {
    "llama_untied": {
        "vocab_size": 43,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "llama_tied": {
        "vocab_size": 43,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rms_norm_eps": 1e-2,
        "rope_theta": 150.0,
        "tie_word_embeddings": True,
    },
    # One frequency is kept, one lies in between, two are divided.
    "llama_rope_llama3": {
        **SMALL,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_rope_linear": {**SMALL, "rope_parameters": {"rope_type": "linear", "factor": 2.5}},
    "llama_rope_dynamic": {
        **SMALL,
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0},
    },
    "llama_biases": {**SMALL, "attention_bias": True, "mlp_bias": True},
    "mistral": {**SMALL, "model_type": "mistral", "sliding_window": 5},
    "qwen2": {**SMALL, "model_type": "qwen2", "head_dim": 6, "tie_word_embeddings": True},
}
CLIP = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TINY_TEXT = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
SMALL_CLIP = {**CLIP, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIGLIP = {
    **SMALL_CLIP,
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}
# select: the hidden state, whether the class token is dropped, the side of the images.
VISION = {
    "clip": CLIP,
    "clip_full": {**SMALL_CLIP, "hidden_act": "gelu", "select": {"layer": -1, "strategy": "full", "image_size": 16}},
    "clip_interpolated": {**SMALL_CLIP, "select": {"layer": -2, "strategy": "default", "image_size": 24}},
    "siglip": {**SIGLIP, "select": {"layer": -2, "strategy": "full", "image_size": 16}},
    "siglip_last": {**SIGLIP, "select": {"layer": -1, "strategy": "full", "image_size": 16}},
}
LLAVA = {
    "llava": {
        "vision_config": {
            **CLIP,
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        },
        "text_config": {**LLM["llama_untied"], "num_hidden_layers": 2},
        "image_token_index": 42,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    },
    "llava_siglip_qwen2": {
        "vision_config": {**SIGLIP, "hidden_size": 16, "intermediate_size": 12},
        "text_config": {**LLM["qwen2"], **TINY_TEXT, "tie_word_embeddings": False},
        "image_token_index": 18,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
    },
}
LLAVA_NEXT = {
    "vision_config": {**SMALL_CLIP, "hidden_size": 16, "intermediate_size": 12},
    "text_config": {**SMALL, **TINY_TEXT, "model_type": "mistral", "sliding_window": None},
    "image_token_index": 18,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
}


def llm_arrays(name: str, seed: int = 11) -> Arrays:
    """Two rows, the second padded at the right; `llama_tied`: two rows packed with several segments each."""
    config, draw = LLM[name], np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_config(llm_config(config))
    randomise(model, draw)
    rows, length = 2, 17
    tokens = draw.integers(0, config["vocab_size"], (rows, length))
    labels = np.where(draw.random((rows, length)) < 0.3, IGNORED, tokens)
    if name == "llama_tied":
        # Positions start again with each segment; that is how transformers recognises packed rows.
        segments = np.array([[1] * 5 + [2] * 12, [1] * 9 + [2] * 3 + [3] * 5])
        positions = np.concatenate([np.arange(n) for n in (5, 12, 9, 3, 5)]).reshape(rows, length)
        inputs = {"tokens": tokens, "labels": labels, "positions": positions, "segment_ids": segments}
        given = {"position_ids": torch.from_numpy(positions)}
    else:
        mask = np.ones((rows, length), np.int64)
        mask[1, -4:] = 0
        labels[mask == 0] = IGNORED
        inputs = {"tokens": tokens, "labels": labels, "mask": mask}
        given = {"attention_mask": torch.from_numpy(mask)}
    output = model(
        input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(labels), use_cache=False, return_dict=True, **given
    )
    output.loss.backward()
    return _collect(model, config, inputs, {"logits": output.logits, "loss": output.loss})


def vision_arrays(name: str, seed: int = 12) -> Arrays:
    """Two images through a vision encoder: the hidden states after the selected layer."""
    config, draw = VISION[name], np.random.default_rng(seed)
    select = config.get("select", {"layer": -2, "strategy": "default", "image_size": config["image_size"]})
    model = AutoModel.from_config(vision_config(config))
    randomise(model, draw)
    images = draw.integers(0, 256, (2, select["image_size"], select["image_size"], 3))
    given = {"interpolate_pos_encoding": True} if select["image_size"] != config["image_size"] else {}
    states = model(
        pixel_values=normalised_pixels(images), output_hidden_states=True, return_dict=True, **given
    ).hidden_states
    hidden = states[select["layer"]][:, 1 if select["strategy"] == "default" else 0 :]
    cotangent = draw.standard_normal(hidden.shape).astype(np.float32)
    (hidden * torch.from_numpy(cotangent)).sum().backward()
    return _collect(model, config, {"images": images, "cotangent": cotangent}, {"hidden": hidden})


def llava_arrays(name: str = "llava", seed: int = 13) -> Arrays:
    """Two rows with an image in the middle of the text, at different places; the second row is padded at the right."""
    config, draw = LLAVA[name], np.random.default_rng(seed)
    model = LlavaForConditionalGeneration(LlavaConfig(**_with_parts(config)))
    randomise(model, draw)
    rows, length, image_token = 2, 27, config["image_token_index"]
    side = config["vision_config"]["image_size"]
    patches = (side // config["vision_config"]["patch_size"]) ** 2
    tokens = draw.integers(0, image_token, (rows, length))
    for row, start in enumerate((4, 2)):
        tokens[row, start : start + patches] = image_token
    mask = np.ones((rows, length), np.int64)
    mask[1, -3:] = 0
    labels = np.where((tokens == image_token) | (mask == 0) | (np.arange(length) < 3), IGNORED, tokens)
    images = draw.integers(0, 256, (rows, side, side, 3))
    output = model(
        input_ids=torch.from_numpy(tokens),
        pixel_values=normalised_pixels(images),
        attention_mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
        use_cache=False,
        return_dict=True,
    )
    output.loss.backward()
    inputs = {"tokens": tokens, "images": images, "mask": mask, "labels": labels}
    return _collect(model, config, inputs, {"logits": output.logits, "loss": output.loss})


def llava_next_arrays(seed: int = 14) -> Arrays:
    """Row 0 has a wide image, row 1 a tall and a square one; input/images are the tiles of all, one after the other.

    input/image_sizes [I, 3]: row, height and width of each image before it was cut into tiles.
    """
    config, draw = LLAVA_NEXT, np.random.default_rng(seed)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**_with_parts(config)))
    randomise(model, draw)
    side, image_token = config["vision_config"]["image_size"], config["image_token_index"]
    sizes = np.array([[0, 21, 60], [1, 50, 17], [1, 40, 33]])
    tiles = [image_size_to_num_patches(size.tolist(), config["image_grid_pinpoints"], side) for size in sizes[:, 1:]]
    images = draw.integers(0, 256, (sum(tiles), side, side, 3))
    pixels = torch.zeros(len(tiles), max(tiles), 3, side, side)
    for i, part in enumerate(torch.split(normalised_pixels(images), tiles)):
        pixels[i, : len(part)] = part
    with torch.no_grad():
        features = model.model.get_image_features(pixels, torch.from_numpy(sizes[:, 1:])).pooler_output
    rows: list[list[int]] = [[], []]
    for (row, _, _), feature in zip(sizes, features, strict=True):
        rows[row] += [*draw.integers(0, image_token, 3), *[image_token] * len(feature)]
    length = max(map(len, rows)) + 6
    tokens = np.stack([[*row, *draw.integers(0, image_token, length - len(row))] for row in rows])
    labels = np.where((tokens == image_token) | (np.arange(length) < 2), IGNORED, tokens)
    output = model(
        input_ids=torch.from_numpy(tokens),
        pixel_values=pixels,
        image_sizes=torch.from_numpy(sizes[:, 1:]),
        labels=torch.from_numpy(labels),
        use_cache=False,
        return_dict=True,
    )
    output.loss.backward()
    inputs = {"tokens": tokens, "images": images, "image_sizes": sizes, "labels": labels}
    return _collect(model, config, inputs, {"logits": output.logits, "loss": output.loss})


def llm_config(values: dict[str, Any]) -> PreTrainedConfig:
    """An entry of LLM as the Hugging Face configuration of its `model_type` (Llama's without one)."""
    rest = {name: value for name, value in values.items() if name not in ("rope_theta", "rope_parameters")}
    rope = {"rope_type": "default", **values.get("rope_parameters", {}), "rope_theta": values["rope_theta"]}
    model_type = rest.pop("model_type", "llama")
    return AutoConfig.for_model(model_type, **rest, rope_parameters=rope, attn_implementation="eager")


def vision_config(values: dict[str, Any]) -> PreTrainedConfig:
    """An entry of VISION as the Hugging Face configuration of its `model_type` (CLIP's without one)."""
    rest = {name: value for name, value in values.items() if name != "select"}
    model_type = rest.pop("model_type", "clip_vision_model")
    return AutoConfig.for_model(model_type, **rest, attn_implementation="eager")


def _with_parts(values: dict[str, Any]) -> dict[str, Any]:
    return values | {
        "vision_config": vision_config(values["vision_config"]),
        "text_config": llm_config(values["text_config"]),
        "attn_implementation": "eager",
    }


def randomise(model: torch.nn.Module, draw: np.random.Generator) -> None:
    """Weights large enough that every part matters: wide logits, attention far from uniform, norms and biases not 1, 0.

    The values are rounded to float16, so that half the bytes hold them exactly.
    """
    for name, parameter in model.named_parameters():
        noise = draw.standard_normal(tuple(parameter.shape))
        if parameter.dim() == 1:
            is_scale = "norm" in name and name.endswith("weight")
            values = 1 + 0.3 * noise if is_scale else 0.3 * noise
        elif "embedding" in name or "embed_tokens" in name:
            values = 0.3 * noise  # of tokens, positions and patches
        else:
            values = 1.4 * noise / np.sqrt(parameter.shape[1])
        parameter.data = torch.from_numpy(values.astype(np.float16).astype(np.float32))
    model.tie_weights()
    model.train(False)


def normalised_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 values [N, S, S, 3] -> normalised fp32 [N, 3, S, S]."""
    values = (images / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32))


def _collect(
    model: torch.nn.Module, config: dict[str, Any], inputs: Arrays, outputs: dict[str, torch.Tensor]
) -> Arrays:
    """The arrays of a file; a weight without a gradient had no part in the output and is left out."""
    arrays = {"config": np.array(json.dumps(config))}
    dtypes = {"images": np.uint8, "cotangent": np.float32}
    for name, value in inputs.items():
        arrays[f"input/{name}"] = value.astype(dtypes.get(name, np.int32))
    for name, value in outputs.items():
        arrays[f"output/{name}"] = value.detach().numpy()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            arrays[f"weight/{name}"] = parameter.detach().numpy().astype(np.float16)
            arrays[f"grad/{name}"] = parameter.grad.numpy()
    return arrays


GOLDEN: dict[str, Callable[[], Arrays]] = {
    **{name: partial(llm_arrays, name) for name in LLM},
    **{name: partial(vision_arrays, name) for name in VISION},
    **{name: partial(llava_arrays, name) for name in LLAVA},
    "llava_next": llava_next_arrays,
}


def main() -> None:
    """Writes one .npz file for each entry of GOLDEN."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests" / "golden")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, make in GOLDEN.items():
        path = out / f"{name}.npz"
        np.savez_compressed(path, **make())
        print(f"{path}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
