"""What vLLM needs of an exported folder, written down from its source and checked without it.

Read in vLLM 0.33.0 (the newest release in November 2026), in vllm/:
  model_executor/models/llava.py, llava_next.py   the classes, which fields of config.json they read, tokens per image
  model_executor/models/clip.py, siglip.py        the encoder: built up to the selected layer, without the last norm
  model_executor/models/llama.py, mistral.py, qwen2.py      the language model: biases, widths of heads
  model_executor/models/utils.py                  names of tensors: a prefix table, then module by module; a name that
                                                  leads nowhere is an error
  model_executor/layers/vocab_parallel_embedding.py         the table must have just `vocab_size` rows
  model_executor/layers/activation.py, models/registry.py   known activations and architectures
  model_executor/model_loader/weight_utils.py     files that the index does not name are left out
  transformers_utils/processor.py, config.py      both are transformers' own, found by `processor_class`, `model_type`
  renderers/hf.py                                 the processor's chat template; images stay parts of a message only if
                                                  the template loops over a message's content, of messages that it finds
                                                  through assignments
"""

import json
import math

import jinja2
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file

from neva_jax.data.tiles import image_span
from neva_jax.training.checkpoint_meta import locate, read_meta
from tests.interop import folders

IMAGE = 400  # the tests' tokenizer has 400 tokens
QWEN2, MISTRAL = folders.FAMILIES["qwen2"], folders.FAMILIES["mistral"]
SIGLIP = {"vision_config": folders.SIGLIP, "vision_feature_select_strategy": "full"}
MODELS = {
    "llava": folders.LLAVA,
    "llava_all_layers": folders.LLAVA | {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    "llava_biases": folders.LLAVA | {"text_config": folders.FAMILIES["llama_biases"]},
    "llava_head_dim": folders.LLAVA | {"text_config": folders.FAMILIES["llama_head_dim"]},
    "llava_tied": folders.LLAVA | {"text_config": folders.FAMILIES["llama_tied"]},
    "llava_siglip_qwen2": folders.LLAVA | SIGLIP | {"text_config": QWEN2},
    "next": folders.NEXT,
    "next_mistral": folders.NEXT | {"text_config": MISTRAL},
    "next_siglip": folders.NEXT | SIGLIP,
}

# --- the contract: parameters ----------------------------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]
STACKED = {  # in the language model and in both encoders
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", "0"),
    "up_proj": ("gate_up_proj", "1"),
}
PREFIXES = {  # names that transformers writes since 4.52
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}


def language_model(config) -> Shapes:
    """Parameters that vLLM makes; a stacked one by its parts, `NAME@PART`."""
    d, f, heads, groups = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    kind = config.architectures[0]
    assert kind in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
    assert config.hidden_act == "silu"
    width = d // heads  # Qwen2's class reads no other
    if kind != "Qwen2ForCausalLM":
        width = getattr(config, "head_dim", None) or width
    bias = getattr(config, "attention_bias", False) or getattr(config, "bias", False)
    qkv_bias, mlp_bias = kind == "Qwen2ForCausalLM" or bias, getattr(config, "mlp_bias", False)
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}input_layernorm.weight": (d,), f"{layer}post_attention_layernorm.weight": (d,)}
        linear = {
            "self_attn.qkv_proj@q": (heads * width, d, qkv_bias),
            "self_attn.qkv_proj@k": (groups * width, d, qkv_bias),
            "self_attn.qkv_proj@v": (groups * width, d, qkv_bias),
            "self_attn.o_proj": (d, heads * width, bias and kind != "Qwen2ForCausalLM"),
            "mlp.gate_up_proj@0": (f, d, mlp_bias),
            "mlp.gate_up_proj@1": (f, d, mlp_bias),
            "mlp.down_proj": (d, f, mlp_bias),
        }
        shapes |= linears(layer, linear)
    return shapes


def linears(prefix: str, layers: dict[str, tuple[int, int, bool]]) -> Shapes:
    shapes: Shapes = {}
    for name, (outputs, inputs, biased) in layers.items():
        name, _, part = name.partition("@")
        end = f"@{part}" if part else ""
        shapes[f"{prefix}{name}.weight{end}"] = (outputs, inputs)
        if biased:
            shapes[f"{prefix}{name}.bias{end}"] = (outputs,)
    return shapes


def encoder_layers(config) -> int:
    """Layers up to the selected one; the others are never built."""
    layer, count = config.vision_feature_layer, config.vision_config.num_hidden_layers
    assert isinstance(layer, int)
    built = count + layer + 1 if layer < 0 else layer
    assert 0 < built <= count
    return built


def encoder(config) -> Shapes:
    vision = config.vision_config
    assert vision.model_type in ("clip_vision_model", "siglip_vision_model")  # the classes that it asks for
    assert vision.hidden_act in ("gelu", "quick_gelu", "gelu_pytorch_tanh", "relu")
    assert vision.image_size % vision.patch_size == vision.hidden_size % vision.num_attention_heads == 0
    clip, d, f = vision.model_type.startswith("clip"), vision.hidden_size, vision.intermediate_size
    patch = (d, vision.num_channels, vision.patch_size, vision.patch_size)
    positions = (vision.image_size // vision.patch_size) ** 2 + clip
    shapes: Shapes = {
        "embeddings.patch_embedding.weight": patch,
        "embeddings.position_embedding.weight": (positions, d),
    }
    if clip:
        shapes |= {"embeddings.class_embedding": (d,), "pre_layrnorm.weight": (d,), "pre_layrnorm.bias": (d,)}
    else:
        shapes["embeddings.patch_embedding.bias"] = (d,)
    for i in range(encoder_layers(config)):
        layer = f"encoder.layers.{i}."
        linear = {f"self_attn.qkv_proj@{part}": (d, d, True) for part in "qkv"}
        linear |= {"self_attn.out_proj": (d, d, True), "mlp.fc1": (f, d, True), "mlp.fc2": (d, f, True)}
        shapes |= linears(layer, linear)
        shapes |= {f"{layer}layer_norm{n}.{part}": (d,) for n in "12" for part in ("weight", "bias")}
    return shapes


def whole_model(config) -> Shapes:
    vision, text = config.vision_config, config.text_config
    assert config.projector_hidden_act in ("gelu", "silu", "relu")
    projector = {
        "linear_1": (text.hidden_size, vision.hidden_size, config.multimodal_projector_bias),
        "linear_2": (text.hidden_size, text.hidden_size, config.multimodal_projector_bias),
    }
    shapes = {f"language_model.{name}": shape for name, shape in language_model(text).items()}
    shapes |= {f"vision_tower.vision_model.{name}": shape for name, shape in encoder(config).items()}
    shapes |= linears("multi_modal_projector.", projector)
    if config.architectures[0] == "LlavaNextForConditionalGeneration":
        shapes["image_newline"] = (text.hidden_size,)
    return shapes


def where_it_goes(name: str, layers: int | None) -> str | None:
    """The parameter (and part) that a tensor of a file fills; None: it is left out on purpose.

    layers: those of the encoder; None for a language model alone.
    """
    if layers is not None:
        old = next((old for old in PREFIXES if name.startswith(old)), "")
        name = PREFIXES.get(old, "") + name.removeprefix(old)
    if name.startswith("vision_tower.vision_model."):
        inner = name.removeprefix("vision_tower.vision_model.")
        if inner.startswith(("post_layernorm.", "head.")):
            return None
        if inner.startswith("encoder.layers.") and int(inner.split(".")[2]) >= layers:
            return None
    stem, _, leaf = name.rpartition(".")
    module = stem.rpartition(".")[2]
    if module in STACKED:
        fused, part = STACKED[module]
        return f"{stem.removesuffix(module)}{fused}.{leaf}@{part}"
    return name


def tensors(folder) -> dict[str, np.ndarray]:
    """As its loader reads them: where there is an index, only the files that it names."""
    index = folder / "model.safetensors.index.json"
    files = {path.name for path in folder.glob("*.safetensors")}
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert files == set(weight_map.values())
        for name, file in weight_map.items():
            assert name in load_file(folder / file)
    found = {}
    for file in files:
        arrays = load_file(folder / file)
        assert not found.keys() & arrays.keys()
        found |= arrays
    return found


def check_weights(folder, expected: Shapes, layers: int | None = None) -> None:
    filled = {}
    for name, array in tensors(folder).items():
        target = where_it_goes(name, layers)
        if target is None:
            continue
        assert target in expected, f"vLLM has no place for {name} ({target})"
        assert target not in filled, f"{name} and {filled[target]} are the same parameter"
        assert array.shape == expected[target], name
        filled[target] = name
    assert filled.keys() == expected.keys(), f"nothing fills {sorted(expected.keys() - filled.keys())}"


# --- the contract: configuration, tokens, processor ------------------------------------------------------------------


def tokens_per_image(config, width: int, height: int) -> int:
    """The placeholders that it makes room for; the encoder must deliver as many features."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    base = side**2 + vision.model_type.startswith("clip")
    base -= {"default": 1, "full": 0}[config.vision_feature_select_strategy]
    if config.model_type == "llava":
        return base
    assert base == side**2, "its LLaVA-NeXT takes a square of patches alone"
    best = transformers.image_processing_utils.select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, columns = (side * (size // vision.image_size) for size in best)
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
    return base + rows * columns + rows


def check_configuration(folder) -> transformers.PreTrainedConfig:
    raw = json.loads((folder / "config.json").read_text())
    config = transformers.AutoConfig.from_pretrained(folder)
    assert raw["architectures"][0] == type(config).__name__.replace("Config", "ForConditionalGeneration")
    assert raw["text_config"]["architectures"], "the language model is found by it"
    for name in ("image_token_index", "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"):
        assert name in raw and hasattr(config, name), name
    assert config.image_token_index < config.text_config.vocab_size
    assert raw["dtype"] in ("float32", "float16", "bfloat16")
    # The longest row is the smaller of the two.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == config.text_config.max_position_embeddings
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == config.text_config.eos_token_id is not None
    return config


def check_processor(folder, config) -> None:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    expected = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}[config.model_type]
    assert type(processor).__name__ == expected
    # The first of these files that has the field decides.
    assert json.loads((folder / "processor_config.json").read_text())["processor_class"] == expected
    assert processor.patch_size == config.vision_config.patch_size
    assert processor.image_token == "<image>"
    encoded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a<image>b").ids
    assert encoded.count(config.image_token_index) == 1
    size = config.vision_config.image_size
    for width, height in ((30, 20), (12, 12), (7, 33), (50, 51)):
        image = np.zeros((height, width, 3), np.uint8)
        made = processor(images=[image], text="<image>", return_tensors="np")
        assert made["pixel_values"].shape[-3:] == (3, size, size)
        ids = made["input_ids"][0].tolist()
        assert ids.count(config.image_token_index) == tokens_per_image(config, width, height)


def variable(node) -> str | None:
    """The variable that an expression is, or is filtered or cut from."""
    cuts = isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Slice)
    if cuts or isinstance(node, jinja2.nodes.Filter):
        return variable(node.node)
    return node.name if isinstance(node, jinja2.nodes.Name) else None


def names_of_messages(tree) -> set[str]:
    """`messages`, and what is assigned from it. It goes by the names alone: scopes and macros mean nothing to it."""
    names, before = {"messages"}, set()
    while names != before:
        before = set(names)
        names |= {set_.target.name for set_ in tree.find_all(jinja2.nodes.Assign) if variable(set_.node) in before}
    return names


def check_chat_template(folder) -> None:
    """A loop over `message.content`, so that an image arrives as a part; one `<image>` comes out for each."""
    text = (folder / "chat_template.jinja").read_text()
    assert transformers.AutoProcessor.from_pretrained(folder).chat_template == text
    tree = jinja2.Environment().parse(text)
    loops = list(tree.find_all(jinja2.nodes.For))
    messages = names_of_messages(tree)
    of_messages = [loop.target.name for loop in loops if variable(loop.iter) in messages]
    of_content = [loop for loop in loops if isinstance(loop.iter, jinja2.nodes.Getattr) and loop.iter.attr == "content"]
    assert any(variable(loop.iter.node) in of_messages for loop in of_content)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    rendered = jinja2.Template(text).render(
        messages=[{"role": "user", "content": parts}], add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert rendered.count("<image>") == 2 and "Which?" in rendered


# --- exports ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=MODELS)
def exported(request, from_hf, to_hf, tmp_path):
    """(folder, our configuration) of a model that went through a checkpoint of ours."""
    hf = MODELS[request.param]
    source = folders.write_folder(tmp_path / "hf", hf, folders.llava_arrays(hf))
    checkpoint = from_hf(source)
    return to_hf(checkpoint, shard_gib=60_000 / 2**30), read_meta(locate(checkpoint)).config


def test_an_exported_llava_is_all_that_vllm_asks_for(exported):
    folder, ours = exported
    config = check_configuration(folder)
    check_weights(folder, whole_model(config), encoder_layers(config))
    check_processor(folder, config)
    check_chat_template(folder)
    for width, height in ((30, 20), (12, 12), (7, 33), (50, 51), (640, 480), (1, 100)):
        assert tokens_per_image(config, width, height) == len(image_span(width, height, ours).slots)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "llama_biases", "llama_head_dim", "mistral", "qwen2_window"])
def test_an_exported_language_model_is_all_that_vllm_asks_for(family, from_hf, to_hf, tmp_path):
    hf = folders.FAMILIES[family]
    folder = to_hf(from_hf(folders.write_folder(tmp_path / "hf", hf, folders.llm_arrays(hf))), text_only=True)
    config = transformers.AutoConfig.from_pretrained(folder)
    check_weights(folder, language_model(config))
    if family == "qwen2_window":  # one window for all layers; some with and some without are refused there
        assert set(config.layer_types) == {"sliding_attention"} and config.sliding_window == 4


def test_the_contract_sees_what_is_wrong(from_hf, to_hf, tmp_path):
    """A name too many, one too few, another shape."""
    hf = folders.LLAVA
    folder = to_hf(from_hf(folders.write_folder(tmp_path / "hf", hf, folders.llava_arrays(hf))))
    config = transformers.AutoConfig.from_pretrained(folder)
    arrays, expected = load_file(folder / "model.safetensors"), whole_model(config)
    name = "language_model.model.norm.weight"
    for spoilt, message in (
        (arrays | {"language_model.norm.weight": arrays[name]}, "no place for language_model.norm.weight"),
        ({key: array for key, array in arrays.items() if key != name}, f"nothing fills .*{name}"),
        (arrays | {name: arrays[name][1:]}, name),
    ):
        folders.write_tensors(folder / "model.safetensors", spoilt)
        with pytest.raises(AssertionError, match=message):
            check_weights(folder, expected, encoder_layers(config))
    assert math.prod(expected["multi_modal_projector.linear_1.weight"]) == 32 * 16
