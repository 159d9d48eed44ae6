"""Every field of a config.json is used, known to be without effect, or refused by its name."""

import dataclasses
import json

import pytest
import transformers

from neva_jax.config import ProjectorConfig
from neva_jax.errors import UserError
from neva_jax.interop.hf_config import read_llm, read_vision
from neva_jax.interop.hf_llava import read_llava, read_original_llava, read_preprocessor
from tests.interop import folders

WHERE = "SRC/config.json"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_file_that_says_nothing_takes_hugging_faces_defaults(kind):
    theirs = transformers.CONFIG_MAPPING[kind]()
    ours = read_llm({"model_type": kind}, WHERE)
    assert ours.llm.num_kv_heads == theirs.num_key_value_heads
    assert ours.llm.vocab_size == theirs.vocab_size
    assert ours.llm.norm_eps == theirs.rms_norm_eps == 1e-6
    assert ours.llm.sliding_window == (4096 if kind == "mistral" else None)
    assert ours.llm.qkv_bias == (kind == "qwen2")
    assert ours.max_length == theirs.max_position_embeddings


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "clip_vision_model", "siglip_vision_model"])
def test_whatever_transformers_itself_writes_is_known(kind):
    config = transformers.CONFIG_MAPPING[kind]()
    read = read_vision if "vision" in kind else read_llm
    for raw in (config.to_dict(), json.loads(config.to_json_string())):
        read(raw, WHERE)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_whatever_transformers_itself_writes_of_llava(kind):
    ours = read_llava(json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string()), WHERE)
    assert (ours.vision.image_size, ours.vision.num_layers, ours.vision.select_layer) == (336, 24, -2)
    assert ours.projector == ProjectorConfig(newline=kind == "llava_next")
    empty = read_llava({"model_type": kind}, WHERE)
    assert (empty.llm, empty.vision) == (ours.llm, ours.vision)


OLD_CLIP_DUMP = """{"_name_or_path": "", "add_cross_attention": false, "architectures": null, "attention_dropout": 0.0,
  "bad_words_ids": null, "bos_token_id": null, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": null,
  "decoder_start_token_id": null, "diversity_penalty": 0.0, "do_sample": false, "dropout": 0.0, "early_stopping": false,
  "encoder_no_repeat_ngram_size": 0, "eos_token_id": null, "finetuning_task": null, "forced_bos_token_id": null,
  "forced_eos_token_id": null, "hidden_act": "quick_gelu", "hidden_size": 1024, "id2label": {"0": "LABEL_0"},
  "image_size": 336, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096,
  "is_decoder": false, "is_encoder_decoder": false, "label2id": {"LABEL_0": 0}, "layer_norm_eps": 1e-05,
  "length_penalty": 1.0, "max_length": 20, "min_length": 0, "model_type": "clip_vision_model",
  "no_repeat_ngram_size": 0, "num_attention_heads": 16, "num_beam_groups": 1, "num_beams": 1, "num_hidden_layers": 24,
  "num_return_sequences": 1, "output_attentions": false, "output_hidden_states": false, "output_scores": false,
  "pad_token_id": null, "patch_size": 14, "prefix": null, "problem_type": null, "projection_dim": 768,
  "pruned_heads": {}, "remove_invalid_values": false, "repetition_penalty": 1.0, "return_dict": true,
  "return_dict_in_generate": false, "sep_token_id": null, "task_specific_params": null, "temperature": 1.0,
  "tie_encoder_decoder": false, "tie_word_embeddings": true, "tokenizer_class": null, "top_k": 50, "top_p": 1.0,
  "torch_dtype": null, "torchscript": false, "transformers_version": "4.21.3", "typical_p": 1.0,
  "use_bfloat16": false}"""
LLAVA_15 = {  # the shape of the file on the hub
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": json.loads(OLD_CLIP_DUMP) | {"vocab_size": 32000},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {}},
    "vocab_size": 49152,
}


def test_files_as_they_lie_on_the_hub():
    ours = read_llava(LLAVA_15, WHERE)
    assert (ours.llm.vocab_size, ours.llm.norm_eps, ours.llm.num_kv_heads) == (32064, 1e-5, 32)
    assert (ours.vision.image_size, ours.vision.activation, ours.max_length) == (336, "quick_gelu", 4096)
    small = read_llm(SMOLLM2, WHERE)
    assert (small.llm.rope_base, small.llm.head_dim, small.llm.tie_embeddings) == (1e5, 64, True)


REFUSED = [
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "field rope_scaling.type=yarn is not supported"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "field rope_parameters.rope_type=longrope is not supported"),
    ({"rope_scaling": {"type": "linear"}}, "field rope_scaling.factor is missing, which linear needs"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "field rope_scaling.beta=1 is not supported"),
    ({"rope_scaling": "linear"}, 'field rope_scaling="linear" is not an object'),
    ({"partial_rotary_factor": 0.5}, "field partial_rotary_factor=0.5 is not supported, only 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "field rope_parameters.partial_rotary_factor=0.5"),
    ({"hidden_act": "gelu"}, 'field hidden_act="gelu" is not supported, only "silu"'),
    ({"attention_dropout": 1.0}, "field attention_dropout=1.0 must be in 0"),
    ({"quantization_config": {"bits": 4}}, 'field quantization_config={"bits": 4} is not supported'),
    ({"auto_map": {"AutoModel": "x"}}, "field auto_map="),
    ({"pruned_heads": {"1": [0]}}, "field pruned_heads="),
    ({"rope_interleaved": True}, "field rope_interleaved=true is not supported, only false"),
    ({"sliding_window": 8}, "field sliding_window=8 is none of llama's"),
    ({"num_experts": 8}, "field num_experts=8 is not known"),
    ({"hidden_size": "wide"}, "is no llama configuration"),
    ({"num_attention_heads": 5}, "is no llama configuration"),
    ({"model_type": "mistral", "attention_bias": True}, "field attention_bias=True is none of mistral's"),
    ({"model_type": "qwen2", "mlp_bias": True}, "field mlp_bias=True is none of qwen2's"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "field layer_types"),
    ({"model_type": "mixtral"}, "field model_type=mixtral is not supported"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[next(iter(fields)) for fields, _ in REFUSED])
def test_refused_language_models(fields, message):
    with pytest.raises(UserError) as caught:
        read_llm(folders.LLAMA | fields, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "relu"}, "field hidden_act=relu is not supported"),
        ({"image_size": 13}, "field image_size=13 is not divisible by patch_size=4"),
        ({"num_channels": 1}, "field num_channels=1 is not supported, only 3"),
        ({"dropout": 0.1}, "field dropout=0.1 is not supported, only 0"),
        ({"attention_dropout": 0.1}, "field attention_dropout=0.1 is not supported, only 0"),
        ({"model_type": "siglip2_vision_model"}, "field model_type=siglip2_vision_model is not supported"),
        ({"qkv": 1}, "field qkv=1 is not known"),
    ],
)
def test_refused_vision_encoders(fields, message):
    with pytest.raises(UserError, match=f"^{WHERE}: {message}"):
        read_vision(folders.CLIP | fields, WHERE)


@pytest.mark.parametrize("layer", [0, -4, 4, True, [-2, -5], None])
def test_refused_layers(layer):
    with pytest.raises(UserError, match=r"must be one of -3 … -1"):
        read_vision(folders.CLIP, WHERE, layer)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_model_with_both_sides(kind):
    vision = {name: value for name, value in folders.CLIP.items() if name != "model_type"}
    vision |= {"hidden_act": "gelu_pytorch_tanh"} if kind == "siglip" else {}
    raw = {"model_type": kind, "projection_dim": 8, "text_config": {"hidden_size": 8}, "vision_config": vision}
    ours = read_vision(raw, WHERE)
    assert (ours.kind, ours.image_size, ours.patch_size) == (kind, 12, 4)
    changed = read_vision(raw | {"vision_config_dict": {"patch_size": 3}}, WHERE)
    assert changed == dataclasses.replace(ours, patch_size=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projector_hidden_act": "relu"}, 'field projector_hidden_act="relu" is not supported, only "gelu"'),
        ({"multimodal_projector_bias": False}, "field multimodal_projector_bias=false is not supported, only true"),
        ({"vision_config": folders.SIGLIP}, "field vision_feature_select_strategy=default drops the first token"),
        ({"vision_feature_select_strategy": "cls"}, "is no llava configuration"),
        ({"vision_feature_layer": [-2, -1]}, ": vision_config: the layer whose output is taken must be one of"),
        ({"text_config": {"model_type": "gemma"}}, ": text_config: field model_type=gemma is not supported"),
        ({"adapter": 1}, "field adapter=1 is not known"),
    ],
)
def test_refused_llava(fields, message):
    with pytest.raises(UserError) as caught:
        read_llava(folders.LLAVA | fields, WHERE)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "field mm_projector_type=mlp3x_gelu, but the tensors are those of mlp2x"),
        ({"mm_resampler_type": "qformer"}, "field mm_resampler_type=qformer is not supported"),
        ({"image_aspect_ratio": "keep"}, "field image_aspect_ratio=keep is not supported"),
        ({"image_aspect_ratio": "anyres"}, "field mm_patch_merge_type=flat is not supported with anyres"),
        ({"mm_vision_select_feature": "cls"}, "field mm_vision_select_feature=cls is not supported"),
        ({"s2_scales": "336,672"}, 'field s2_scales="336,672" is not known'),
    ],
)
def test_refused_original_llava(fields, message):
    with pytest.raises(UserError) as caught:
        read_original_llava(folders.ORIGINAL | fields, WHERE, ProjectorConfig())
    assert message in str(caught.value)


def test_original_llava_with_start_and_end_tokens():
    described = read_original_llava(folders.ORIGINAL | {"mm_use_im_start_end": True}, WHERE, ProjectorConfig())
    assert described.data == {"image_mode": "pad", "image_start": "<im_start>", "image_end": "<im_end>"}
    assert (described.select, described.vision_width) == ((-2, "patch"), 16)


def test_siglip_without_a_preprocessor_is_squashed(tmp_path):
    assert read_preprocessor(tmp_path, read_vision(folders.SIGLIP, WHERE)).data == {"image_mode": "squash"}


def test_original_llava_leaves_it_to_the_encoder():
    for ratio in (None, "square"):
        raw = folders.ORIGINAL | {"image_aspect_ratio": ratio}
        assert read_original_llava(raw, WHERE, ProjectorConfig()).data == {}


def test_preprocessor(tmp_path):
    vision = read_vision(folders.CLIP, WHERE)
    assert "mean [0.48145466, 0.4578275, 0.40821073] and" in read_preprocessor(tmp_path, vision).notes[0]
    folders.write_preprocessor(tmp_path)
    ours = read_preprocessor(tmp_path, vision)
    assert (ours.vision.image_mean, ours.vision.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (ours.data, ours.notes) == ({}, [])
    path = tmp_path / "preprocessor_config.json"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "processor_config.json").write_text(f'{{"image_processor": {path.read_text()}}}')
    assert read_preprocessor(tmp_path / "new", vision) == ours
    folders.write_preprocessor(tmp_path, image_processor_type="LlavaImageProcessor", do_pad=True)
    assert read_preprocessor(tmp_path, vision).data == {"image_mode": "pad"}
    folders.write_preprocessor(tmp_path, do_center_crop=False, resample=2)
    notes = read_preprocessor(tmp_path, vision).notes
    assert ["resizes without cropping" in notes[0], "field resample=2" in notes[1]] == [True, True]
    siglip = {"image_processor_type": "SiglipImageProcessor", "do_center_crop": None, "crop_size": None}
    folders.write_preprocessor(tmp_path, size={"height": 12, "width": 12}, **siglip)
    ours = read_preprocessor(tmp_path, vision)
    assert (ours.data, ours.notes) == ({"image_mode": "squash"}, [])
    folders.write_preprocessor(tmp_path, crop_size={"height": 16, "width": 16})
    with pytest.raises(UserError, match=r"makes images of .*16.*, but the vision encoder takes 12"):
        read_preprocessor(tmp_path, vision)
