"""LLaVA's config.json -> our configuration: Hugging Face's classes, and the layout of LLaVA's own code.

LLaVA's own code puts the fields of the vision encoder and the projector (`mm_…`) among those of the language model, and
only names the encoder. The rule for fields is that of hf_config.py: used, without effect for a reason, or refused.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from neva_jax.config import LlmConfig, ProjectorConfig, VisionConfig
from neva_jax.errors import UserError
from neva_jax.interop.hf_config import Raw, accept, as_hf, read_llm, read_vision
from neva_jax.interop.tensors import read_json


@dataclasses.dataclass(frozen=True)
class LlavaDescribed:
    """The sections that a LLaVA config.json describes; `vision` is None where it only names the encoder."""

    vision: VisionConfig | None
    projector: ProjectorConfig
    llm: LlmConfig
    max_length: int
    data: dict[str, Any]
    select: tuple[int, str] = (-2, "patch")
    vision_name: str | None = None
    vision_width: int | None = None


def read_llava(raw: Raw, where: str) -> LlavaDescribed:
    """A config.json of LlavaForConditionalGeneration or LlavaNextForConditionalGeneration.

    Raises:
      UserError: a field that is not supported.
    """
    kind = raw["model_type"]
    used = """vision_config text_config vision_feature_layer vision_feature_select_strategy tie_word_embeddings
        image_grid_pinpoints"""
    reasons = {
        "image_token_index": "images are placed by position, not by an id",
        "image_token_id": "images are placed by position, not by an id",
        "image_seq_length": "follows from image, patch and projector",
        "ignore_index": "the loss is ours",
        "vocab_size": "of text_config",
    }
    accept(
        raw,
        where,
        tuple(used.split()),
        reasons,
        projector_hidden_act=("gelu",),
        multimodal_projector_bias=(True,),
        use_image_newline_parameter=(True,),
    )
    hf = as_hf(raw, kind, where)
    text = {"model_type": "llama", **(raw.get("text_config") or {})}
    described = read_llm(text, f"{where}: text_config")
    llm = dataclasses.replace(described.llm, tie_embeddings=hf.tie_word_embeddings)
    vision_raw = raw.get("vision_config") or hf.vision_config.to_dict()
    strategy, tower = hf.vision_feature_select_strategy, vision_raw.get("model_type", "clip_vision_model")
    if tower.startswith("siglip") and strategy == "default":
        raise UserError(
            f"{where}: field vision_feature_select_strategy=default drops the first token, which is a patch in SigLIP; "
            "only full is supported with it"
        )
    feature = "patch" if strategy == "default" or tower.startswith("siglip") else "cls_patch"
    vision = read_vision(vision_raw, f"{where}: vision_config", hf.vision_feature_layer, feature)
    newline = kind == "llava_next"
    data = {"image_mode": "anyres", "image_grids": hf.image_grid_pinpoints} if newline else {}
    return LlavaDescribed(vision, ProjectorConfig(newline=newline), llm, described.max_length, data)


ORIGINAL_NO_EFFECT = {  # reason: fields of LLaVA's own config.json
    "how it was trained": """
        freeze_mm_mlp_adapter freeze_mm_vision_resampler tune_mm_mlp_adapter tune_mm_vision_resampler
        unfreeze_mm_vision_tower mm_projector_lr mm_vision_tower_lr mm_tunable_parts use_mm_proj
        group_by_modality_length""",
    "the tokenizer says it": "tokenizer_padding_side tokenizer_model_max_length vocab_size_or_config_json_file",
    "adds a token that stands at no image": "mm_use_im_patch_token",
    "follows from the vision encoder": "image_crop_resolution image_split_resolution",
    "images are placed by position, not by an id": "image_token_index im_start_token im_end_token im_patch_token",
}


def is_original_llava(raw: Raw) -> bool:
    """Whether config.json is of LLaVA's own code (LlavaLlamaForCausalLM and its kin)."""
    return any(name.startswith("mm_") or name == "use_mm_proj" for name in raw)


def read_original_llava(raw: Raw, where: str, projector: ProjectorConfig | None) -> LlavaDescribed:
    """A config.json of LLaVA's own code; `projector` as its tensors show it, if there are any.

    Raises:
      UserError: a field that is not supported, or a projector that is not what the file says.
    """
    kind = {"llava_mistral": "mistral", "llava_qwen": "qwen2"}.get(raw.get("model_type"), "llama")
    if any("Mistral" in name for name in raw.get("architectures") or ()):
        kind = "mistral"
    used = """mm_projector_type mm_hidden_size mm_vision_tower mm_vision_select_layer mm_vision_select_feature
        mm_use_im_start_end mm_patch_merge_type image_aspect_ratio image_grid_pinpoints"""
    reasons = {name: reason for reason, names in ORIGINAL_NO_EFFECT.items() for name in names.split()}
    if raw.get("mm_resampler_type") is not None:
        raise UserError(f"{where}: field mm_resampler_type={raw['mm_resampler_type']} is not supported")
    reasons["mm_resampler_type"] = "null"
    described = read_llm({**raw, "model_type": kind}, where, *used.split(), **reasons)
    named = raw.get("mm_projector_type", "linear")
    if projector is not None and {named, projector.kind} != {"linear", "mlp1x_gelu"} and named != projector.kind:
        raise UserError(f"{where}: field mm_projector_type={named}, but the tensors are those of {projector.kind}")
    merge, ratio = raw.get("mm_patch_merge_type", "flat"), raw.get("image_aspect_ratio", "square")
    if ratio not in (None, "square", "pad", "anyres"):
        raise UserError(f"{where}: field image_aspect_ratio={ratio} is not supported; only square, pad and anyres")
    if ratio == "anyres" and merge != "spatial_unpad":
        raise UserError(f"{where}: field mm_patch_merge_type={merge} is not supported with anyres; only spatial_unpad")
    feature = raw.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise UserError(f"{where}: field mm_vision_select_feature={feature} is not supported; only patch and cls_patch")
    # `square` leaves it to the encoder's own preprocessing, which is CLIP's crop or SigLIP's squash.
    data: dict[str, Any] = {} if ratio in (None, "square") else {"image_mode": ratio}
    if ratio == "anyres":
        data["image_grids"] = _grids(raw.get("image_grid_pinpoints"), where)
    if raw.get("mm_use_im_start_end"):
        data |= {"image_start": "<im_start>", "image_end": "<im_end>"}
    return LlavaDescribed(
        None,
        projector or ProjectorConfig(kind=named, newline=ratio == "anyres"),
        described.llm,
        described.max_length,
        data,
        (raw.get("mm_vision_select_layer", -2), feature),
        raw.get("mm_vision_tower"),
        raw.get("mm_hidden_size"),
    )


def _grids(value: Any, where: str) -> list[list[int]]:
    """LLaVA writes (width, height); ours are [height, width], as Hugging Face's."""
    if isinstance(value, list) and all(isinstance(grid, list) and len(grid) == 2 for grid in value):
        return [[height, width] for width, height in value]
    raise UserError(f"{where}: field image_grid_pinpoints={json.dumps(value)[:80]} is not a list of [width, height]")


# --- preprocessing ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Preprocessed:
    """A vision section with mean and standard deviation, keys of DataConfig, and what a user should know."""

    vision: VisionConfig
    data: dict[str, Any]
    notes: list[str]


def read_preprocessor(folder: Path, vision: VisionConfig) -> Preprocessed:
    """How images are prepared: preprocessor_config.json, or `image_processor` in the newer processor_config.json.

    Raises:
      UserError: it makes images of another size than the encoder takes.
    """
    path, raw = folder / "preprocessor_config.json", None
    if path.is_file():
        raw = read_json(path)
    elif (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        raw = read_json(path).get("image_processor")
    if not isinstance(raw, dict):
        note = f"{path} is not there: mean {vision.image_mean} and std {vision.image_std} are assumed"
        return Preprocessed(vision, {"image_mode": "squash"} if vision.kind == "siglip" else {}, [note])
    notes = []
    size, crop = raw.get("size"), raw.get("crop_size")
    made = crop if raw.get("do_center_crop") and crop else size
    sides = {made} if isinstance(made, int) else {v for v in (made or {}).values() if isinstance(v, int)}
    if sides and sides != {vision.image_size}:
        raise UserError(f"{path}: makes images of {made}, but the vision encoder takes {vision.image_size}")
    data = {"image_mode": "squash"} if isinstance(size, dict) and "height" in size else {}
    if not data and not raw.get("do_center_crop", True):
        notes.append(f"{path} resizes without cropping; data.image_mode=square crops to the centre instead")
    if raw.get("resample", 3) != 3:
        notes.append(f"{path}: field resample={raw['resample']}; images are resized bicubically (3) here")
    kind = str(raw.get("image_processor_type", ""))
    if kind.startswith("LlavaImageProcessor") and raw.get("do_pad"):
        data = {"image_mode": "pad"}
    values = {name: [float(v) for v in raw[name]] for name in ("image_mean", "image_std") if name in raw}
    return Preprocessed(dataclasses.replace(vision, **values), data, notes)
