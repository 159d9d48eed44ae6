"""Make the reference arrays of tests/golden with Hugging Face's models: tiny, random, fp32 on the CPU.

    python scripts/make_golden.py [--out tests/golden]        needs torch and transformers

A file holds arrays named
    config            JSON: the arguments of the Hugging Face configuration
    input/NAME        what the model was given
    weight/NAME       weights that take part, under Hugging Face's names; float16, which holds them exactly
    output/NAME       logits, loss or hidden states
    grad/NAME         gradients of the loss (or of the sum of hidden states times input/cotangent), as float32

Weights and inputs come from NumPy's generator, so only the outputs depend on the versions of torch and transformers.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

Arrays = dict[str, np.ndarray]

IGNORED = -100  # label of a position without loss
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, for values in 0..1
LLAMA = {
    "untied": {
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
    "tied": {
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
LLAVA = {
    "vision_config": {
        **CLIP,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
    "text_config": {**LLAMA["untied"], "num_hidden_layers": 2},
    "image_token_index": 42,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}


def llama_arrays(name: str, seed: int = 11) -> Arrays:
    """`untied`: two rows, the second padded at the right. `tied`: two rows packed with several segments each."""
    config, draw = LLAMA[name], np.random.default_rng(seed)
    model = LlamaForCausalLM(_llama_config(config))
    _randomise(model, draw)
    rows, length = 2, 17
    tokens = draw.integers(0, config["vocab_size"], (rows, length))
    labels = np.where(draw.random((rows, length)) < 0.3, IGNORED, tokens)
    if name == "tied":
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


def clip_arrays(seed: int = 12) -> Arrays:
    """Two images through the vision encoder: the patches' hidden states after the last layer but one."""
    draw = np.random.default_rng(seed)
    model = CLIPVisionModel(CLIPVisionConfig(**CLIP, attn_implementation="eager"))
    _randomise(model, draw)
    images = draw.integers(0, 256, (2, CLIP["image_size"], CLIP["image_size"], 3))
    hidden = model(pixel_values=_pixels(images), output_hidden_states=True, return_dict=True).hidden_states[-2][:, 1:]
    cotangent = draw.standard_normal(hidden.shape).astype(np.float32)
    (hidden * torch.from_numpy(cotangent)).sum().backward()
    return _collect(model, CLIP, {"images": images, "cotangent": cotangent}, {"hidden": hidden})


def llava_arrays(seed: int = 13) -> Arrays:
    """Two rows with an image in the middle of the text, at different places; the second row is padded at the right."""
    draw = np.random.default_rng(seed)
    config = LlavaConfig(
        **LLAVA
        | {
            "vision_config": CLIPVisionConfig(**LLAVA["vision_config"]),
            "text_config": _llama_config(LLAVA["text_config"]),
            "attn_implementation": "eager",
        }
    )
    model = LlavaForConditionalGeneration(config)
    _randomise(model, draw)
    rows, length, image_token = 2, 27, LLAVA["image_token_index"]
    side = LLAVA["vision_config"]["image_size"]
    patches = (side // LLAVA["vision_config"]["patch_size"]) ** 2
    tokens = draw.integers(0, image_token, (rows, length))
    for row, start in enumerate((4, 2)):
        tokens[row, start : start + patches] = image_token
    mask = np.ones((rows, length), np.int64)
    mask[1, -3:] = 0
    labels = np.where((tokens == image_token) | (mask == 0) | (np.arange(length) < 3), IGNORED, tokens)
    images = draw.integers(0, 256, (rows, side, side, 3))
    output = model(
        input_ids=torch.from_numpy(tokens),
        pixel_values=_pixels(images),
        attention_mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
        use_cache=False,
        return_dict=True,
    )
    output.loss.backward()
    inputs = {"tokens": tokens, "images": images, "mask": mask, "labels": labels}
    return _collect(model, LLAVA, inputs, {"logits": output.logits, "loss": output.loss})


def _llama_config(values: dict[str, Any]) -> LlamaConfig:
    rest = {name: value for name, value in values.items() if name != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": values["rope_theta"]}
    return LlamaConfig(**rest, rope_parameters=rope, attn_implementation="eager")


def _randomise(model: torch.nn.Module, draw: np.random.Generator) -> None:
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


def _pixels(images: np.ndarray) -> torch.Tensor:
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
    "llama_untied": lambda: llama_arrays("untied"),
    "llama_tied": lambda: llama_arrays("tied"),
    "clip": clip_arrays,
    "llava": llava_arrays,
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
