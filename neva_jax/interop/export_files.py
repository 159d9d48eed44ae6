"""The small files of an exported folder: tokenizer and processor.

A SentencePiece model is written twice: as it is, and as the tokenizer.json that Hugging Face reads, made from its
pieces and scores. BPE in SentencePiece merges the pair whose piece has the best score; in tokenizer.json the pair that
comes first, so the list of pairs is sorted by the score of what they make.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from neva_jax.config import Config
from neva_jax.data.tokenizer import Tokenizer, add_tokens, parse_model
from neva_jax.errors import UserError
from neva_jax.interop.export_config import select_strategy, special_ids

IMAGE_TOKEN = "<image>"
PROTO = sentencepiece_model_pb2.ModelProto.SentencePiece
BPE = sentencepiece_model_pb2.TrainerSpec.BPE


def image_token_id(tokenizer: Tokenizer) -> int:
    """Id of `<image>`: the tokenizer's own, else the first one behind it."""
    found = tokenizer.token_id(IMAGE_TOKEN)
    return tokenizer.size if found is None else found


def write_tokenizer(folder: Path, tokenizer: Tokenizer, with_image: bool, max_length: int, with_bos: bool) -> bool:
    """tokenizer.json (and tokenizer.model, if that is where it comes from) and tokenizer_config.json.

    Args:
      with_bos: whether conversations start with the bos; then a tokenizer made from a SentencePiece model adds it.

    Returns:
      whether the tokenizer puts the bos before a text by itself

    Raises:
      UserError: a SentencePiece model that tokenizer.json cannot express.
    """
    if tokenizer.file == "tokenizer.model":
        (folder / "tokenizer.model").write_bytes(tokenizer.serialized)
        content = json.dumps(sentencepiece_as_json(tokenizer.serialized, with_bos), ensure_ascii=False).encode()
    else:
        content = tokenizer.serialized
    if with_image and tokenizer.token_id(IMAGE_TOKEN) is None:
        content, _ = add_tokens(content, [IMAGE_TOKEN], True, "tokenizer.json")
    (folder / "tokenizer.json").write_bytes(content)
    names = {i: name for name, i in _vocabulary(json.loads(content)).items()}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, i in special_ids(tokenizer).items():
        if i is not None:
            settings[key.removesuffix("_id")] = names[i]
    if tokenizer.file == "tokenizer.model":
        settings["unk_token"] = names[parse_model(tokenizer.serialized, "tokenizer.model").trainer_spec.unk_id]
    _write_json(folder / "tokenizer_config.json", settings | {"model_max_length": max_length})
    ids = tokenizers.Tokenizer.from_str(content.decode()).encode("a").ids
    return tokenizer.bos_id is not None and ids[0] == tokenizer.bos_id


def _vocabulary(content: dict) -> dict[str, int]:
    return content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}


def sentencepiece_as_json(serialized: bytes, with_bos: bool) -> dict[str, Any]:
    """A SentencePiece BPE model as the content of a tokenizer.json, which puts the bos before a text (`with_bos`).

    Raises:
      UserError: a model of another type, or one that normalizes text.
    """
    proto = parse_model(serialized, "tokenizer.model")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != BPE or normalizer.precompiled_charsmap:
        kind = sentencepiece_model_pb2.TrainerSpec.ModelType.Name(trainer.model_type)
        raise UserError(
            f"tokenizer.model: is a {kind} model with normalization {normalizer.name or 'identity'}; only BPE with "
            "identity (Llama's) can be written as tokenizer.json"
        )
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == PROTO.NORMAL}
    pairs = [
        (score, (piece[:i], piece[i:]))
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    pairs.sort(key=lambda pair: -pair[0])
    special = {PROTO.CONTROL: True, PROTO.UNKNOWN: True, PROTO.USER_DEFINED: False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = [{"type": "Prepend", "prepend": "▁"}] if normalizer.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if normalizer.add_dummy_prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.piece, **flags, "special": special[piece.type]}
            for i, piece in enumerate(proto.pieces)
            if piece.type in special
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "pre_tokenizer": None,
        "post_processor": _bos_first(proto.pieces[trainer.bos_id].piece, trainer.bos_id) if with_bos else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.pieces[trainer.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": trainer.byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [pair for _, pair in pairs],
        },
    }


def _bos_first(bos: str, i: int) -> dict[str, Any]:
    special = [{"SpecialToken": {"id": bos, "type_id": kind}} for kind in (0, 1)]
    texts = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [special[0], texts[0]],
        "pair": [special[0], texts[0], special[1], texts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
    }


PROCESSORS = {  # data.image_mode: Hugging Face's class
    "square": "CLIPImageProcessor",
    "pad": "LlavaImageProcessor",
    "squash": "SiglipImageProcessor",
    "anyres": "LlavaNextImageProcessor",
}


def write_processor(folder: Path, config: Config) -> None:
    """preprocessor_config.json and processor_config.json of LlavaProcessor or LlavaNextProcessor."""
    vision, mode = config.model.vision, config.data.image_mode
    size = vision.image_size
    image: dict[str, Any] = {
        "image_processor_type": PROCESSORS[mode],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    if mode == "squash":
        image |= {"size": {"height": size, "width": size}, "do_center_crop": False}
        del image["crop_size"]
    if mode in ("pad", "anyres"):
        image["do_pad"] = True
    if mode == "anyres":
        image["image_grid_pinpoints"] = config.data.image_grids
    kind = "LlavaNextProcessor" if mode == "anyres" else "LlavaProcessor"
    _write_json(folder / "preprocessor_config.json", image | {"processor_class": kind})
    settings = {
        "processor_class": kind,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": select_strategy(vision),
        "num_additional_image_tokens": int(vision.kind == "clip"),
        "image_token": IMAGE_TOKEN,
    }
    _write_json(folder / "processor_config.json", settings)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
