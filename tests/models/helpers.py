"""Golden files, and weights under Hugging Face's names as the nested dictionaries of our models."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neva_jax.config import LlmConfig, ModelConfig, PrecisionConfig, ProjectorConfig, VisionConfig
from neva_jax.models.layers import NO_REMAT, Remat
from neva_jax.models.neva import Neva

Arrays = dict[str, np.ndarray]
Tree = dict[str, Any]

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
IGNORED = -100
FP32 = PrecisionConfig(compute="fp32")


@dataclass(frozen=True)
class Golden:
    """A file of scripts/make_golden.py, by the first part of the arrays' names."""

    config: dict[str, Any]
    input: Arrays
    weight: Arrays
    output: Arrays
    grad: Arrays


def load_golden(name: str) -> Golden:
    """Reads tests/golden/NAME.npz."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return to_golden(dict(arrays))


def to_golden(arrays: Arrays) -> Golden:
    """The arrays of a file, sorted by the first part of their names; the weights become fp32."""
    parts: dict[str, Arrays] = {"input": {}, "weight": {}, "output": {}, "grad": {}}
    for key, array in arrays.items():
        part, _, rest = key.partition("/")
        if rest:
            parts[part][rest] = array.astype(np.float32) if part == "weight" else array
    return Golden(json.loads(str(arrays["config"])), **parts)


# --- configurations --------------------------------------------------------------------------------------------------


ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def llm_config(hf: dict[str, Any]) -> LlmConfig:
    """An entry of LLM in scripts/make_golden.py -> ours."""
    rope, kind = hf.get("rope_parameters", {}), hf.get("model_type", "llama")
    scaling = rope.get("rope_type", "none")
    settings = {}
    if scaling != "none":
        settings["rope_factor"] = rope["factor"]
    if scaling == "dynamic":
        settings["rope_original_length"] = hf["max_position_embeddings"]
    if scaling == "llama3":
        settings["rope_original_length"] = rope["original_max_position_embeddings"]
        settings["rope_low_freq_factor"] = rope["low_freq_factor"]
        settings["rope_high_freq_factor"] = rope["high_freq_factor"]
    return LlmConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim"),
        rope_base=hf["rope_theta"],
        rope_scaling=scaling,
        sliding_window=hf.get("sliding_window"),
        qkv_bias=hf.get("attention_bias", kind == "qwen2"),
        o_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf["tie_word_embeddings"],
        **settings,
    )


def vision_config(hf: dict[str, Any], **changes: Any) -> VisionConfig:
    """An entry of VISION in scripts/make_golden.py -> ours."""
    select = hf.get("select", {"layer": -2, "strategy": "default", "image_size": hf["image_size"]})
    kind = hf.get("model_type", "clip_vision_model").removesuffix("_vision_model")
    settings = {
        "kind": kind,
        "image_size": select["image_size"],
        "position_image_size": hf["image_size"] if select["image_size"] != hf["image_size"] else None,
        "patch_size": hf["patch_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "activation": ACTIVATIONS[hf["hidden_act"]],
        "norm_eps": hf["layer_norm_eps"],
        "select_layer": select["layer"],
        # SigLIP has no class token to keep.
        "select_feature": "cls_patch" if select["strategy"] == "full" and kind == "clip" else "patch",
    }
    return VisionConfig(**{**settings, **changes})


def neva_config(hf: dict[str, Any], **changes: Any) -> ModelConfig:
    """An entry of LLAVA (or LLAVA_NEXT) in scripts/make_golden.py -> ours, the vision encoder trained."""
    select = {
        "layer": hf["vision_feature_layer"],
        "strategy": hf["vision_feature_select_strategy"],
        "image_size": hf["vision_config"]["image_size"],
    }
    return ModelConfig(
        vision=vision_config({**hf["vision_config"], "select": select}, freeze=False),
        projector=ProjectorConfig(kind="mlp2x_gelu", newline="image_grid_pinpoints" in hf),
        llm=llm_config(hf["text_config"]),
        **changes,
    )


def tiny_config(*, heads: int = 4, kind: str = "mlp2x_gelu", tied: bool = False, vocab: int = 40) -> ModelConfig:
    """A model of two layers each, wide enough for a tensor axis of 4; weights large enough to see differences."""
    vision = VisionConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, freeze=False
    )
    llm = LlmConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=4,
        tie_embeddings=tied,
        init_std=0.2,
    )
    return ModelConfig(vision=vision, projector=ProjectorConfig(kind=kind), llm=llm)


# --- names and shapes ------------------------------------------------------------------------------------------------


def llm_tree(arrays: Arrays, config: LlmConfig, prefix: str = "model.") -> Tree:
    """Weights (or gradients) of HF LlamaForCausalLM and its kin as the tree of `Llama`."""
    d, k = config.hidden_size, config.head_dim or config.hidden_size // config.num_heads

    def stack(name: str, change: Callable[[np.ndarray], np.ndarray] = lambda w: w) -> np.ndarray:
        return np.stack([change(arrays[f"{prefix}layers.{i}.{name}"]) for i in range(config.num_layers)])

    def heads_out(weight: np.ndarray) -> np.ndarray:  # [H*K, D] -> [D, H, K]
        return weight.T.reshape(d, -1, k)

    layers = {
        "attention_norm": {"scale": stack("input_layernorm.weight")},
        "o": stack("self_attn.o_proj.weight", lambda w: w.T.reshape(-1, k, d)),
        "mlp_norm": {"scale": stack("post_attention_layernorm.weight")},
    }
    for name in "qkv":
        layers[name] = stack(f"self_attn.{name}_proj.weight", heads_out)
        if config.qkv_bias:
            layers[f"{name}_bias"] = stack(f"self_attn.{name}_proj.bias", lambda b: b.reshape(-1, k))
    if config.o_bias:
        layers["o_bias"] = stack("self_attn.o_proj.bias")
    for name in ("gate", "up", "down"):
        layers[name] = stack(f"mlp.{name}_proj.weight", np.transpose)
        if config.mlp_bias:
            layers[f"{name}_bias"] = stack(f"mlp.{name}_proj.bias")
    tree = {
        "embedding": arrays[f"{prefix}embed_tokens.weight"],
        "layers": layers,
        "norm": {"scale": arrays[f"{prefix}norm.weight"]},
    }
    if not config.tie_embeddings:
        tree["head"] = arrays["lm_head.weight"].T
    return tree


def vision_tree(arrays: Arrays, config: VisionConfig, prefix: str = "", unused: float = 0.0) -> Tree:
    """Weights (or gradients) of HF CLIPVisionModel or SiglipVisionModel as the tree of `Vision`.

    The file has no layers above the selected one and no final norm: they become `unused`.
    """
    d, h = config.hidden_size, config.num_heads
    used = config.num_layers + 1 + config.select_layer

    def stack(name: str, change: Callable[[np.ndarray], np.ndarray] = lambda w: w) -> np.ndarray:
        layers = [change(arrays[f"{prefix}encoder.layers.{i}.{name}"]) for i in range(used)]
        return np.stack(layers + [np.full_like(layers[0], unused)] * (config.num_layers - used))

    def norm(name: str) -> Tree:
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    tree = {
        "patch": arrays[f"{prefix}embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0).reshape(-1, d),
        "position": arrays[f"{prefix}embeddings.position_embedding.weight"],
        "post_norm": {name: np.full(d, unused, np.float32) for name in ("scale", "bias")},
        "layers": {
            "attention_norm": norm("layer_norm1"),
            "o": stack("self_attn.out_proj.weight", lambda w: w.T.reshape(h, -1, d)),
            "o_bias": stack("self_attn.out_proj.bias"),
            "mlp_norm": norm("layer_norm2"),
            "up": stack("mlp.fc1.weight", np.transpose),
            "up_bias": stack("mlp.fc1.bias"),
            "down": stack("mlp.fc2.weight", np.transpose),
            "down_bias": stack("mlp.fc2.bias"),
        },
    }
    if config.kind == "clip":
        tree["class_token"] = arrays[f"{prefix}embeddings.class_embedding"]
        tree["pre_norm"] = {
            "scale": arrays[f"{prefix}pre_layrnorm.weight"],
            "bias": arrays[f"{prefix}pre_layrnorm.bias"],
        }
    else:
        tree["patch_bias"] = arrays[f"{prefix}embeddings.patch_embedding.bias"]
    for name in "qkv":
        tree["layers"][name] = stack(f"self_attn.{name}_proj.weight", lambda w: w.T.reshape(d, h, -1))
        tree["layers"][f"{name}_bias"] = stack(f"self_attn.{name}_proj.bias", lambda b: b.reshape(h, -1))
    return tree


def neva_tree(arrays: Arrays, config: ModelConfig, unused: float = 0.0) -> Tree:
    """Weights (or gradients) of HF LlavaForConditionalGeneration or LLaVA-NeXT's as the tree of `Neva`."""
    projector = {
        f"{ours}_{i}": arrays[f"model.multi_modal_projector.linear_{i}.{theirs}"].T
        for i in (1, 2)
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    }
    if config.projector.newline:
        projector["newline"] = arrays["model.image_newline"]
    return {
        "vision": vision_tree(arrays, config.vision, "model.vision_tower.", unused),
        "projector": projector,
        "llm": llm_tree(arrays, config.llm, "model.language_model."),
    }


# --- running and comparing -------------------------------------------------------------------------------------------


def graph(build: Callable[[], nnx.Module]) -> nnx.GraphDef:
    """The graph definition of the module that `build` makes; no parameter is allocated."""
    return nnx.split(nnx.eval_shape(build))[0]


def neva_graph(config: ModelConfig, precision: PrecisionConfig = FP32, **settings: Any) -> nnx.GraphDef:
    """The graph definition of `Neva`; settings: `remat`, `unroll`."""
    return graph(lambda: Neva(nnx.Rngs(0), config, precision, **settings))


def next_token_loss(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """Mean loss of logits [B, T, V] against the labels [B, T] one position later, IGNORED ones left out."""
    chosen = labels[:, 1:]
    log_probabilities = logits[:, :-1] - jax.nn.logsumexp(logits[:, :-1], axis=-1, keepdims=True)
    picked = jnp.take_along_axis(log_probabilities, np.maximum(chosen, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(chosen != IGNORED, picked, 0)) / np.sum(chosen != IGNORED)


def neva_batch(golden: Golden) -> Arrays:
    """The inputs of llava*.npz as our batch: slots where Hugging Face has its image token."""
    if "image_sizes" in golden.input:
        return anyres_batch(golden)
    tokens = golden.input["tokens"]
    is_image = tokens == golden.config["image_token_index"]
    slots = np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1)
    return {
        "tokens": np.where(is_image, 0, tokens),
        "positions": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
        "segment_ids": golden.input["mask"],
        "image_slots": slots,
        "images": golden.input["images"][:, None],
    }


def anyres_batch(golden: Golden) -> Arrays:
    """The inputs of llava_next.npz as our batch: each image's slots drawn on a grid of all its tiles."""
    config, tokens = golden.config, golden.input["tokens"]
    tile = config["vision_config"]["image_size"]
    side = tile // config["vision_config"]["patch_size"]
    slots: list[list[int]] = [[] for _ in tokens]
    tiles: list[list[np.ndarray]] = [[] for _ in tokens]
    waiting = list(golden.input["images"])
    for row, height, width in golden.input["image_sizes"]:
        grid_height, grid_width = _best_grid(height, width, config["image_grid_pinpoints"])
        down, across = grid_height // tile, grid_width // tile
        patch = np.arange(side * side).reshape(side, side)
        first = len(tiles[row]) * side * side
        grid = np.block(
            [[first + (1 + r * across + c) * side * side + patch for c in range(across)] for r in range(down)]
        )
        if width * grid_height > height * grid_width:  # the padding is above and below
            pad = (grid.shape[0] - height * grid.shape[1] // width) // 2
            grid = grid[pad : grid.shape[0] - pad]
        else:
            pad = (grid.shape[1] - width * grid.shape[0] // height) // 2
            grid = grid[:, pad : grid.shape[1] - pad]
        slots[row] += [*(first + patch).ravel(), *np.pad(grid, ((0, 0), (0, 1)), constant_values=-2).ravel()]
        for _ in range(1 + down * across):
            tiles[row].append(waiting.pop(0))
    assert not waiting
    is_image = tokens == config["image_token_index"]
    image_slots = np.full(tokens.shape, -1)
    for row, values in enumerate(slots):
        image_slots[row, is_image[row]] = values
    images = np.zeros((len(tiles), max(map(len, tiles)), tile, tile, 3), np.uint8)
    for row, parts in enumerate(tiles):
        images[row, : len(parts)] = parts
    return {
        "tokens": np.where(is_image, 0, tokens),
        "positions": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
        "segment_ids": np.ones_like(tokens),
        "image_slots": image_slots,
        "images": images,
    }


def _best_grid(height: int, width: int, grids: list[list[int]]) -> list[int]:
    """The grid (height, width) that keeps most of the image's pixels, then the one with fewest pixels left over."""

    def score(grid: list[int]) -> tuple[int, int]:
        scale = min(grid[0] / height, grid[1] / width)
        kept = min(int(height * scale) * int(width * scale), height * width)
        return kept, -(grid[0] * grid[1] - kept)

    return max(grids, key=score)


def run_neva(
    golden: Golden, compute: str = "fp32", remat: Remat = NO_REMAT, unroll: int = 1
) -> tuple[jax.Array, jax.Array, Tree]:
    """(loss, logits, gradients) of our model on the golden inputs."""
    config, batch = neva_config(golden.config), neva_batch(golden)
    graphdef = neva_graph(config, PrecisionConfig(compute=compute), remat=remat, unroll=unroll)

    @jax.jit
    def run(params, batch):
        def loss(params):
            model = nnx.merge(graphdef, params)
            hidden, _ = model(batch)
            logits = model.llm.logits(hidden)
            assert hidden.dtype == {"fp32": jnp.float32, "bf16": jnp.bfloat16}[compute]
            assert logits.dtype == jnp.float32
            return next_token_loss(logits, golden.input["labels"]), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), grads = run(neva_tree(golden.weight, config), batch)
    return loss, logits, grads


def random_batch(config: ModelConfig, rows: int, length: int, images: int, seed: int = 0) -> Arrays:
    """A batch of `Neva`: each row has its images one after the other from token 2 on, then text; one segment."""
    draw = np.random.default_rng(seed)
    patches = (config.vision.image_size // config.vision.patch_size) ** 2
    slots = np.full((rows, length), -1, np.int32)
    slots[:, 2 : 2 + images * patches] = np.arange(images * patches)
    side = config.vision.image_size
    return {
        "tokens": draw.integers(0, config.llm.vocab_size, (rows, length)).astype(np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "segment_ids": np.ones((rows, length), np.int32),
        "image_slots": slots,
        "images": draw.integers(0, 256, (rows, images, side, side, 3)).astype(np.uint8),
    }


def assert_gradients_close(ours: Tree, theirs: Tree, rtol: float) -> None:
    """||ours - theirs|| <= rtol * ||theirs|| for each parameter of each layer.

    Without rotation, a bias of the keys adds the same number to all scores of a query, so its gradient is 0 but for
    rounding: where it is at most 1e-6 of the whole gradient's norm on their side, it is on ours.
    """
    ours, theirs = (nnx.traversals.flatten_mapping(tree) for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    whole = np.linalg.norm([np.linalg.norm(leaf) for leaf in theirs.values()])
    for path, expected in theirs.items():
        actual = np.asarray(ours[path])
        assert actual.shape == expected.shape, path
        for i, (a, e) in enumerate(zip(actual, expected, strict=True) if "layers" in path else [(actual, expected)]):
            error, norm = np.linalg.norm(a.astype(np.float64) - e), np.linalg.norm(e)
            if path[-1] == "k_bias" and norm <= 1e-6 * whole:
                assert np.linalg.norm(a) <= 1e-6 * whole, (path, i)
            else:
                assert error <= rtol * norm, (path, i, error, norm)
