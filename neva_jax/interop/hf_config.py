"""Hugging Face's config.json -> our configuration.

Every field of the file is used, or stands below with the reason why it changes nothing, or is refused by its name.
What the file does not say is what Hugging Face's own config class takes by default (they change between families:
Mistral has 8 key and value heads, Llama as many as query heads).
"""

import copy
import dataclasses
import json
import os
from typing import Any

from neva_jax.config import LlmConfig, VisionConfig
from neva_jax.errors import UserError

Raw = dict[str, Any]

LLM_TYPES = ("llama", "mistral", "qwen2")
VISION_TYPES = ("clip_vision_model", "siglip_vision_model")
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

VISION_FIELDS = {  # ours: theirs, with the same value
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
}

NO_EFFECT = {  # reason: fields
    "says where the model comes from, or who wrote the file": """
        _name_or_path _commit_hash model_type architectures transformers_version finetuning_task task_specific_params
        tokenizer_class name_or_path prefix is_llama_config transformers.js_config
        _attn_implementation_autoset attn_implementation _attn_implementation
        unsloth_version unsloth_fixed""",
    "dtypes are those of the tensors, or of --dtype": "torch_dtype dtype use_bfloat16",
    "what a forward pass returns beside the logits, or how it is run": """
        use_cache output_attentions output_hidden_states return_dict torchscript chunk_size_feed_forward tf_legacy_loss
        gradient_checkpointing""",
    "labels of a classifier": "id2label label2id num_labels problem_type",
    "of encoder-decoder models": """
        is_encoder_decoder tie_encoder_decoder decoder_start_token_id cross_attention_hidden_size
        encoder_no_repeat_ngram_size forced_bos_token_id forced_eos_token_id begin_suppress_tokens""",
    "how text is generated, which is the caller's choice": """
        max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
        top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids num_return_sequences
        output_scores return_dict_in_generate remove_invalid_values exponential_decay_length_penalty suppress_tokens""",
    "the tokenizer names its tokens": "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id",
    "splits matrix products without changing them": "pretraining_tp",
    "an older name beside max_position_embeddings": "max_sequence_length",
    "random weights that the file's weights replace": "initializer_factor",
}
COMMON = {name: reason for reason, names in NO_EFFECT.items() for name in names.split()}
FIXED: dict[str, tuple] = {  # field: the values that our model has
    "quantization_config": (None,),
    "auto_map": (None,),
    "pruned_heads": (None, {}),
    "add_cross_attention": (None, False),
    "is_decoder": (None, False),
    "dropout": (0,),
    "attention_dropout": (0, None),
    "num_channels": (3,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
}
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
PROJECTION = {"projection_dim": "of the space that image and text share, which no image token enters"}


@dataclasses.dataclass(frozen=True)
class Described:
    """A converted LLM section, and what has no place in it: the longest row the model was made for."""

    llm: LlmConfig
    max_length: int


def accept(raw: Raw, where: str, used: tuple[str, ...], no_effect: dict[str, str] = COMMON, **fixed: tuple) -> None:
    """Goes through all fields of a config.json.

    Args:
      used: fields that the caller reads.
      no_effect: field -> why it may be ignored, besides `COMMON`.
      fixed: field -> values that may stand there, besides `FIXED`.

    Raises:
      UserError: a field that is none of these, or has another value.
    """
    fixed = FIXED | fixed
    for name, value in raw.items():
        if name in used or name in COMMON or name in no_effect:
            continue
        if name not in fixed:
            raise UserError(
                f"{where}: field {name}={json.dumps(value)[:80]} is not known; remove it if the model is the same "
                "without it"
            )
        if value not in fixed[name]:
            right = " or ".join(json.dumps(v) for v in fixed[name] if v is not None)
            raise UserError(
                f"{where}: field {name}={json.dumps(value)[:80]} is not supported{f', only {right}' if right else ''}"
            )


def hf_class(model_type: str, where: str) -> type:
    """Hugging Face's config class; raises UserError where they have none of that name."""
    # Read at the import: without PyTorch it would say so on stderr, and nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        raise UserError(f"{where}: field model_type={model_type} is not known")
    return transformers.CONFIG_MAPPING[model_type]


def as_hf(raw: Raw, model_type: str, where: str) -> Any:
    """The fields as Hugging Face's config class, with its defaults; raises UserError where it refuses them."""
    try:
        return hf_class(model_type, where).from_dict(copy.deepcopy(raw))
    except UserError:
        raise
    except Exception as error:  # its validators raise many kinds
        text = " ".join(str(error).split())
        raise UserError(f"{where}: is no {model_type} configuration ({text[:300]})") from None


# --- language model --------------------------------------------------------------------------------------------------


def read_llm(raw: Raw, where: str, *also_used: str, **no_effect: str) -> Described:
    """A config.json of Llama, Mistral or Qwen2 (or the `text_config` of a larger one).

    Args:
      also_used: fields that the caller reads; no_effect: further ones to ignore, with the reason.

    Raises:
      UserError: a field that is not supported.
    """
    kind = raw.get("model_type", "llama")
    if kind not in LLM_TYPES:
        raise UserError(
            f"{where}: field model_type={kind} is not supported; language models are {', '.join(LLM_TYPES)}"
        )
    used = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        attention_dropout head_dim max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings
        rope_theta rope_scaling rope_parameters attention_bias mlp_bias sliding_window use_sliding_window
        max_window_layers layer_types"""
    accept(raw, where, (*used.split(), *also_used), no_effect, hidden_act=("silu",))
    rope = _check_rope(raw, where)
    hf = as_hf(raw, kind, where)
    for name in ("attention_bias", "mlp_bias"):
        if kind != "llama" and raw.get(name):
            raise UserError(f"{where}: field {name}={raw[name]} is none of {kind}'s; remove it")
    dropout = float(raw.get("attention_dropout") or 0)
    if not 0 <= dropout < 1:
        raise UserError(f"{where}: field attention_dropout={dropout} must be in 0 … 1, 1 excluded")
    parameters = hf.rope_parameters
    scaling = parameters["rope_type"]
    original = {
        "dynamic": hf.max_position_embeddings,
        "llama3": parameters.get("original_max_position_embeddings"),
    }
    llm = LlmConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rope_base=float(parameters["rope_theta"]),
        rope_scaling="none" if scaling == "default" else scaling,
        rope_factor=float(parameters.get("factor", 1.0)),
        **({"rope_original_length": original[scaling]} if scaling in original else {}),
        **{
            f"rope_{name}": float(parameters[name])
            for name in ("low_freq_factor", "high_freq_factor")
            if scaling == "llama3"
        },
        sliding_window=_sliding_window(raw, hf, kind, where),
        qkv_bias=kind == "qwen2" or (kind == "llama" and hf.attention_bias),
        o_bias=kind == "llama" and hf.attention_bias,
        mlp_bias=kind == "llama" and hf.mlp_bias,
        norm_eps=float(hf.rms_norm_eps),
        tie_embeddings=hf.tie_word_embeddings,
        init_std=float(hf.initializer_range),
        attention_dropout=dropout,
    )
    if rope == "linear" and llm.rope_factor < 1:
        raise UserError(f"{where}: field rope_scaling.factor={llm.rope_factor} must be at least 1")
    return Described(llm, hf.max_position_embeddings)


def _check_rope(raw: Raw, where: str) -> str:
    """Old form: rope_theta and rope_scaling; new form: rope_parameters. Returns the type."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(field) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: field {field}={json.dumps(rope)[:80]} is not an object")
    named = "rope_type" if "rope_type" in rope else "type"
    kind = rope.get(named, "default")
    if kind not in ROPE_KEYS:
        raise UserError(f"{where}: field {field}.{named}={kind} is not supported; only {', '.join(ROPE_KEYS)}")
    for name, value in rope.items():
        if name in ("type", "rope_type", "rope_theta") or (name == "partial_rotary_factor" and value in (None, 1)):
            continue
        if name == "partial_rotary_factor":
            raise UserError(
                f"{where}: field {field}.{name}={value} is not supported: Hugging Face's class for it ignores it"
            )
        if name not in ROPE_KEYS[kind]:
            raise UserError(f"{where}: field {field}.{name}={json.dumps(value)[:80]} is not supported with {kind}")
    for name in ROPE_KEYS[kind]:
        if name not in rope and name != "original_max_position_embeddings":
            raise UserError(f"{where}: field {field}.{name} is missing, which {kind} needs")
    return kind


def _sliding_window(raw: Raw, hf: Any, kind: str, where: str) -> int | None:
    """One window for all layers, or none."""
    if kind == "llama":
        for name in ("sliding_window", "use_sliding_window"):
            if raw.get(name):
                raise UserError(f"{where}: field {name}={raw[name]} is none of llama's; remove it")
        return None
    if kind == "mistral":
        return hf.sliding_window
    kinds = set(hf.layer_types)
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise UserError(
            f"{where}: field layer_types (or use_sliding_window with max_window_layers={hf.max_window_layers}) gives "
            "some layers a sliding window and others none; that is not supported"
        )
    return hf.sliding_window


# --- vision encoder --------------------------------------------------------------------------------------------------


def read_vision(raw: Raw, where: str, select_layer: int = -2, select_feature: str = "patch") -> VisionConfig:
    """A config.json of CLIP or SigLIP: of the vision encoder alone, or of the model with both sides.

    Raises:
      UserError: a field that is not supported.
    """
    kind = raw.get("model_type", "clip_vision_model")
    if kind in ("clip", "siglip"):
        reasons = dict.fromkeys(("text_config", "text_config_dict"), "the text side is not converted")
        reasons |= PROJECTION | dict.fromkeys(
            ("logit_scale_init_value", "initializer_range"), COMMON["initializer_factor"]
        )
        accept(raw, where, ("vision_config", "vision_config_dict"), reasons, tie_word_embeddings=(True, False))
        vision = {**(raw.get("vision_config") or {}), **(raw.get("vision_config_dict") or {})}
        vision["model_type"] = f"{kind}_vision_model"
        return read_vision(vision, f"{where}: vision_config", select_layer, select_feature)
    if kind not in VISION_TYPES:
        raise UserError(f"{where}: field model_type={kind} is not supported; vision encoders are CLIP and SigLIP")
    reasons = PROJECTION | {
        "initializer_range": COMMON["initializer_factor"],
        "vision_use_head": "SigLIP's pooling, which no image token passes",
        "vocab_size": "of the text side",
        "tie_word_embeddings": "an encoder of images has no word embeddings",
    }
    accept(raw, where, ("hidden_act", *VISION_FIELDS.values()), reasons)
    hf = as_hf(raw, kind, where)
    if hf.hidden_act not in ACTIVATIONS:
        raise UserError(f"{where}: field hidden_act={hf.hidden_act} is not supported; only {', '.join(ACTIVATIONS)}")
    if hf.image_size % hf.patch_size:
        raise UserError(f"{where}: field image_size={hf.image_size} is not divisible by patch_size={hf.patch_size}")
    _check_select(select_layer, hf.num_hidden_layers, where)
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if kind.startswith("siglip") else {}
    return VisionConfig(
        kind=kind.split("_")[0],
        **{ours: getattr(hf, theirs) for ours, theirs in VISION_FIELDS.items()},
        activation=ACTIVATIONS[hf.hidden_act],
        select_layer=select_layer if select_layer < 0 else select_layer - hf.num_hidden_layers - 1,
        select_feature=select_feature,
        **mean,
    )


def _check_select(layer: Any, count: int, where: str) -> None:
    if not isinstance(layer, int) or isinstance(layer, bool) or not (-count <= layer <= -1 or 1 <= layer <= count):
        raise UserError(
            f"{where}: the layer whose output is taken must be one of -{count} … -1, not {json.dumps(layer)}"
        )
