"""Tiny folders in Hugging Face's layouts, written without PyTorch and without the code under test."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Arrays = dict[str, np.ndarray]

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 7000.0,
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama_tied": LLAMA | {"tie_word_embeddings": True},
    "llama_head_dim": LLAMA | {"head_dim": 6, "num_key_value_heads": 4},
    "llama_biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1},
    "llama_linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama_dynamic": LLAMA | {"max_position_embeddings": 8, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "llama3": LLAMA | {"rope_parameters": LLAMA3},
    "mistral": LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
    "mistral_full": LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4},
    "qwen2_window": LLAMA
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "vision_config": CLIP,
    "text_config": LLAMA,
    "image_token_index": 400,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}
NEXT = LLAVA | {
    "model_type": "llava_next",
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": [[12, 24], [24, 12], [24, 24]],
}
ORIGINAL = LLAMA | {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 16,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "freeze_mm_mlp_adapter": False,
    "pad_token_id": 0,
    "pretraining_tp": 1,
}


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Arrays:
    """Random weights; scales of norms near 1."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * 0.2 + ("norm" in name and name.endswith("weight"))).astype(np.float32)
        for name, shape in shapes.items()
    }


def llm_arrays(c: dict[str, Any], prefix: str = "model.", head: str = "lm_head.", seed: int = 0) -> Arrays:
    """Weights of LlamaForCausalLM and its kin."""
    d, f, kind = c["hidden_size"], c["intermediate_size"], c["model_type"]
    width = c.get("head_dim") or d // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * width, c["num_key_value_heads"] * width
    attention, mlp = c.get("attention_bias", False), c.get("mlp_bias", False)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (c["vocab_size"], d)}
    for i in range(c["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}."
        for name, size, inner in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (size, inner)
            if attention or (kind == "qwen2" and name != "o"):
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (size,)
        for name, size, inner in (("gate", f, d), ("up", f, d), ("down", d, f)):
            shapes[f"{layer}mlp.{name}_proj.weight"] = (size, inner)
            if mlp:
                shapes[f"{layer}mlp.{name}_proj.bias"] = (size,)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (d,)
    shapes[f"{prefix}norm.weight"] = (d,)
    if not c["tie_word_embeddings"]:
        shapes[f"{head}weight"] = (c["vocab_size"], d)
    return draw(shapes, seed)


def vision_arrays(c: dict[str, Any], prefix: str = "", seed: int = 1) -> Arrays:
    """Weights of CLIPVisionModel or SiglipVisionModel (without its pooling)."""
    d, f, p, clip = c["hidden_size"], c["intermediate_size"], c["patch_size"], c["model_type"].startswith("clip")
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (d, 3, p, p),
        "embeddings.position_embedding.weight": ((c["image_size"] // p) ** 2 + clip, d),
    }
    if clip:
        shapes |= {"embeddings.class_embedding": (d,), "pre_layrnorm.weight": (d,), "pre_layrnorm.bias": (d,)}
    else:
        shapes["embeddings.patch_embedding.bias"] = (d,)
    for i in range(c["num_hidden_layers"]):
        layer = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": (d, d), f"{layer}self_attn.{name}.bias": (d,)}
        shapes |= {f"{layer}mlp.fc1.weight": (f, d), f"{layer}mlp.fc1.bias": (f,)}
        shapes |= {f"{layer}mlp.fc2.weight": (d, f), f"{layer}mlp.fc2.bias": (d,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (d,), f"{layer}{name}.bias": (d,)}
    shapes |= {"post_layernorm.weight": (d,), "post_layernorm.bias": (d,)}
    return draw({prefix + name: shape for name, shape in shapes.items()}, seed)


def projector_arrays(names: dict[str, tuple[int, ...]] | None = None, prefix: str = "multi_modal_projector.") -> Arrays:
    """Weights of a projector from 16 to 32; default: LLaVA's of Hugging Face."""
    two = {"linear_1.weight": (32, 16), "linear_1.bias": (32,), "linear_2.weight": (32, 32), "linear_2.bias": (32,)}
    return draw({prefix + name: shape for name, shape in (names or two).items()}, 2)


MLP2X = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
PROJECTORS = {  # kind -> names of LLaVA's own code (and VILA's)
    "linear": {"weight": (32, 16), "bias": (32,)},
    "mlp1x_gelu": {"0.weight": (32, 16), "0.bias": (32,)},
    "mlp2x_gelu": MLP2X,
    "mlp3x_gelu": MLP2X | {"4.weight": (32, 32), "4.bias": (32,)},
    "mlp_downsample": {
        "layers.1.weight": (64,),
        "layers.1.bias": (64,),
        "layers.2.weight": (32, 64),
        "layers.2.bias": (32,),
        "layers.4.weight": (32, 32),
        "layers.4.bias": (32,),
    },
}


def llava_arrays(c: dict[str, Any], names: str = "hub") -> Arrays:
    """Weights of LlavaForConditionalGeneration under the names of the hub, of today's files, or of today's memory."""
    llm, head, vision, projector = {
        "hub": ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", ""),
        "disk": ("language_model.model.", "language_model.lm_head.", "vision_tower.", ""),
        "memory": ("model.language_model.", "lm_head.", "model.vision_tower.", "model."),
    }[names]
    arrays = llm_arrays(c["text_config"], llm, head) | vision_arrays(c["vision_config"], vision)
    arrays |= projector_arrays(prefix=f"{projector}multi_modal_projector.")
    if c["model_type"] == "llava_next":
        arrays |= draw({f"{projector}image_newline": (32,)}, 3)
    return arrays


def original_arrays(newline: bool = False) -> Arrays:
    """Weights of LlavaLlamaForCausalLM."""
    arrays = llm_arrays(ORIGINAL) | projector_arrays(MLP2X, "model.mm_projector.")
    return arrays | (draw({"model.image_newline": (32,)}, 3) if newline else {})


def write_tensors(path: Path, arrays: Arrays) -> Path:
    """One safetensors file, by the library itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    return path


def write_folder(
    folder: Path, config: dict[str, Any], arrays: Arrays, tokenizer: Path | None = None, shards: int = 1
) -> Path:
    """config.json, weights (in several files with an index), and a copy of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())
    if shards == 1:
        write_tensors(folder / "model.safetensors", arrays)
        return folder
    names = list(arrays)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_tensors(folder / file, {name: arrays[name] for name in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_preprocessor(folder: Path, **changes: Any) -> None:
    """CLIP's preprocessor_config.json for images of 12 pixels."""
    content = {
        "do_resize": True,
        "size": {"shortest_edge": 12},
        "do_center_crop": True,
        "crop_size": {"height": 12, "width": 12},
        "resample": 3,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content | changes))


def cast(arrays: Arrays, dtype: Any) -> Arrays:
    """All arrays in another dtype."""
    return {name: array.astype(dtype) for name, array in arrays.items()}
