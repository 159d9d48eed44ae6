"""Our configuration -> Hugging Face's config.json, and what their classes cannot express, refused with the reason."""

import json
from typing import Any

from neva_jax.config import Config, LlmConfig, VisionConfig
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.derived import head_dim, image_tokens, kv_heads
from neva_jax.errors import UserError
from neva_jax.interop.hf_config import ACTIVATIONS, VISION_FIELDS, hf_class

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}
PAD_TOKENS = ("<pad>", "<unk>", "<|endoftext|>")
NOT_MLP2X = {
    "linear": "has one layer, LLaVA's class always two with a GELU between them",
    "identity": "has no layer, LLaVA's class always two",
    "mlp_downsample": "joins 2 x 2 patches to one token, LLaVA's class keeps one token for each patch",
}


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """bos, eos and pad; the latter is the first of PAD_TOKENS that there is, else eos."""
    pads = [tokenizer.token_id(name) for name in PAD_TOKENS]
    pad = next((i for i in pads if i is not None), None)
    if pad is None and tokenizer.file == "tokenizer.model":
        pad = 0  # SentencePiece's <unk>, as LLaVA pads
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id if pad is None else pad,
    }


def text_config(llm: LlmConfig, rows: int, max_length: int, ids: dict[str, int | None]) -> dict[str, Any]:
    """config.json of the language model, `rows` of its embedding.

    Raises:
      UserError: no class of Hugging Face computes this model.
    """
    kind, extra = _family(llm)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": llm.rope_base}
    if llm.rope_scaling != "none":
        rope |= {"rope_type": llm.rope_scaling, "factor": llm.rope_factor}
    if llm.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": llm.rope_low_freq_factor,
            "high_freq_factor": llm.rope_high_freq_factor,
            "original_max_position_embeddings": llm.rope_original_length,
        }
    described = _described(
        kind,
        vocab_size=rows,
        hidden_size=llm.hidden_size,
        intermediate_size=llm.intermediate_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=kv_heads(llm),
        max_position_embeddings=llm.rope_original_length if llm.rope_scaling == "dynamic" else max_length,
        initializer_range=llm.init_std,
        attention_dropout=llm.attention_dropout,
        rms_norm_eps=llm.norm_eps,
        tie_word_embeddings=llm.tie_embeddings,
        rope_parameters=dict(rope),
        **({} if kind == "qwen2" and head_dim(llm) * llm.num_heads == llm.hidden_size else {"head_dim": head_dim(llm)}),
        **ids,
        **extra,
    )
    # The older form too, for readers from before rope_parameters.
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    old = {"rope_theta": llm.rope_base, "rope_scaling": None if llm.rope_scaling == "none" else scaling}
    return described | old | {"architectures": [ARCHITECTURES[kind]]}


def _family(llm: LlmConfig) -> tuple[str, dict[str, Any]]:
    """The class that computes the model, and the fields that only it has."""
    if llm.rope_fraction != 1:
        raise UserError(
            f"model.llm.rope_fraction={llm.rope_fraction}: Hugging Face's Llama, Mistral and Qwen2 turn all channels "
            "of a head; this model cannot be exported"
        )
    if llm.qkv_bias and not llm.o_bias and not llm.mlp_bias:
        window = llm.sliding_window
        return "qwen2", {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    if llm.sliding_window is not None:
        if llm.qkv_bias or llm.o_bias or llm.mlp_bias:
            raise UserError(
                f"model.llm.sliding_window={llm.sliding_window}: Hugging Face has it in Mistral (no biases) and Qwen2 "
                f"(qkv_bias alone), but here qkv_bias={llm.qkv_bias}, o_bias={llm.o_bias}, mlp_bias={llm.mlp_bias}"
            )
        return "mistral", {"sliding_window": llm.sliding_window}
    if llm.qkv_bias != llm.o_bias:
        raise UserError(
            f"model.llm.qkv_bias={llm.qkv_bias}, o_bias={llm.o_bias}, mlp_bias={llm.mlp_bias}: Hugging Face's Llama "
            "has both of the first two or none, and Qwen2 qkv_bias alone; this model cannot be exported"
        )
    return "llama", {"attention_bias": llm.qkv_bias, "mlp_bias": llm.mlp_bias}


def vision_config(vision: VisionConfig) -> dict[str, Any]:
    """config.json of the vision encoder.

    Raises:
      UserError: its position table is for another image size.
    """
    if vision.position_image_size not in (None, vision.image_size):
        raise UserError(
            f"model.vision.position_image_size={vision.position_image_size}: the position table is interpolated to "
            f"image_size={vision.image_size}, which LLaVA's class does not do; this model cannot be exported"
        )
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    kind = f"{vision.kind}_vision_model"
    return _described(
        kind,
        **{theirs: getattr(vision, ours) for ours, theirs in VISION_FIELDS.items()},
        hidden_act=names[vision.activation],
        **({"vision_use_head": False} if vision.kind == "siglip" else {}),
    )


def select_strategy(vision: VisionConfig) -> str:
    """Hugging Face's name of select_feature; SigLIP has no class token to drop."""
    return "default" if vision.kind == "clip" and vision.select_feature == "patch" else "full"


def check_llava(config: Config) -> str:
    """The LLaVA class that computes the model, `llava` or `llava_next`.

    Raises:
      UserError: none does.
    """
    projector, mode = config.model.projector, config.data.image_mode
    if projector.kind != "mlp2x_gelu":
        reason = NOT_MLP2X.get(projector.kind, "has another number of layers, LLaVA's class always two")
        raise UserError(
            f"model.projector.kind={projector.kind} {reason}; --text-only exports the language model without it"
        )
    if projector.newline != (mode == "anyres"):
        raise UserError(
            f"model.projector.newline={projector.newline} with data.image_mode={mode}: LLaVA-NeXT's class cuts images "
            "and has the newline, LLaVA's neither; --text-only exports the language model alone"
        )
    if mode == "keep":
        raise UserError("data.image_mode=keep: no Hugging Face processor does it; --text-only exports without images")
    return "llava_next" if projector.newline else "llava"


def llava_config(config: Config, rows: int, max_length: int, ids: dict, image_token: int) -> dict[str, Any]:
    """config.json of LlavaForConditionalGeneration or LlavaNextForConditionalGeneration.

    Raises:
      UserError: they do not compute this model.
    """
    kind, model = check_llava(config), config.model
    text = text_config(model.llm, rows, max_length, ids)
    return _described(
        kind,
        text_config=text,
        vision_config=vision_config(model.vision),
        image_token_index=image_token,
        image_seq_length=image_tokens(model),
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=model.vision.select_layer,
        vision_feature_select_strategy=select_strategy(model.vision),
        tie_word_embeddings=model.llm.tie_embeddings,
        **({"image_grid_pinpoints": config.data.image_grids} if kind == "llava_next" else {}),
    ) | {"architectures": [ARCHITECTURES[kind]], "text_config": text, **ids}


def _described(kind: str, **fields: Any) -> dict[str, Any]:
    """The fields as Hugging Face's config class writes them; raises UserError where it refuses them."""
    try:
        return json.loads(hf_class(kind, kind)(**fields).to_json_string())
    except (ValueError, TypeError) as error:
        raise UserError(f"Hugging Face's {kind} refuses this model: {' '.join(str(error).split())[:300]}") from None
