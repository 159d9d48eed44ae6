"""Writes tests/golden/templates/: two toy tokenizers, and conversations as strings written by hand with their ids.

    python scripts/make_template_golden.py

The strings follow the published templates (LLaVA's conversation.py, NeVA's, Meta's, Qwen2's), written out here and not
taken from neva_jax; ⟪ and ⟫ enclose what is learned. The ids come from `sentencepiece` and `tokenizers` alone, which
encode whole texts, and the mask from the offsets that they report:

    sp      SentencePiece, text between special tokens and images encoded by itself (LLaVA, Hugging Face)
    whole   SentencePiece, the string in one go, its special tokens being user-defined pieces (NeVA)
    bytes   a byte-level tokenizer.json, in one go

An image is `<image>` in the strings and two ids 0 in the ids, as NeVA's patches are once they are rewritten.
"""

import io
import json
import re
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parent.parent / "tests" / "golden" / "templates"
CORPUS = """\
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and \
polite answers to the user's questions. USER: What is in the picture? ASSISTANT: A red circle on a white ground.
You are a helpful language and vision assistant. You are able to understand the visual content that the user provides.
[INST] <<SYS>> <</SYS>> [/INST] Human: Which colour? Assistant: It is blue. User System Assistant
quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4
def area(side):    return side * side  # four  spaces, two  spaces
""".splitlines()
SPECIAL = [
    *(f"<extra_id_{i}>" for i in range(10)),
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# --- the strings -----------------------------------------------------------------------------------------------------

VICUNA = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."  # noqa: E501
HUMAN = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the human's questions."  # noqa: E501
MMTAG = "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the visual content that the user provides, and assist the user with a variety of tasks using natural language.The visual content will be provided with the following format: <Image>visual content</Image>."  # noqa: E501
LLAVA = "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist the user with a variety of tasks using natural language."  # noqa: E501
META = "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't know the answer to a question, please don't share false information."  # noqa: E501
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
QUALITY = "quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4"

ONE = ["<image>\nWhat is it?", "A red  circle."]
THREE = ["<image>\nWhat is it?", "a cat", "Sure?", "", "And\n\nhere?\n<image>", "🙂  two\n    spaces "]
CONVERSATIONS = {
    "one": {"turns": ONE},
    "three": {"turns": THREE},
    "system": {"turns": ["Hi", "Yes."], "system": "Be brief."},
    "no system": {"turns": ["Hi", "Yes."], "system": ""},
    "label": {"turns": ["Hi", "Yes.", "So?", "No."], "labels": ["quality:1", None]},
    "prompt": {"turns": ["Hi", "Yes.", "So?"]},
}
# {template: {conversation: string}}
TEXTS = {
    "plain": {
        "one": "<s><image>⟪A red  circle.\n⟫",
        "three": "<s><image>⟪a cat\n⟫⟪\n⟫<image>⟪🙂  two\n    spaces \n⟫",
    },
    "v0": {
        "one": f"<s>{HUMAN}###Human: <image>\nWhat is it?###Assistant:⟪ A red  circle.###⟫",
        "three": f"<s>{HUMAN}###Human: <image>\nWhat is it?###Assistant:⟪ a cat###⟫Human: Sure?###Assistant:⟪ ###⟫"
        "Human: And\n\nhere?\n<image>###Assistant:⟪ 🙂  two\n    spaces ###⟫",
        "system": "<s>Be brief.###Human: Hi###Assistant:⟪ Yes.###⟫",
        "prompt": f"<s>{HUMAN}###Human: Hi###Assistant:⟪ Yes.###⟫Human: So?###Assistant:",
    },
    "v1": {
        "one": f"<s>{VICUNA} USER: <image>\nWhat is it? ASSISTANT:⟪ A red  circle.</s>⟫",
        "three": f"<s>{VICUNA} USER: <image>\nWhat is it? ASSISTANT:⟪ a cat</s>⟫USER: Sure? ASSISTANT:⟪ </s>⟫"
        "USER: And\n\nhere?\n<image> ASSISTANT:⟪ 🙂  two\n    spaces </s>⟫",
        "system": "<s>Be brief. USER: Hi ASSISTANT:⟪ Yes.</s>⟫",
        "no system": "<s>USER: Hi ASSISTANT:⟪ Yes.</s>⟫",
        "prompt": f"<s>{VICUNA} USER: Hi ASSISTANT:⟪ Yes.</s>⟫USER: So? ASSISTANT:",
    },
    "llava_v1": {"one": f"<s>{HUMAN} USER: <image>\nWhat is it? ASSISTANT:⟪ A red  circle.</s>⟫"},
    "v1_mmtag": {
        "one": f"<s>{MMTAG} USER: <Image><image></Image>\nWhat is it? ASSISTANT:⟪ A red  circle.</s>⟫",
        "three": f"<s>{MMTAG} USER: <Image><image></Image>\nWhat is it? ASSISTANT:⟪ a cat</s>⟫"
        "USER: Sure? ASSISTANT:⟪ </s>⟫"
        "USER: And\n\nhere?\n<Image><image></Image> ASSISTANT:⟪ 🙂  two\n    spaces </s>⟫",
    },
    "llama_2": {
        "one": f"<s>[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]⟪ A red  circle. </s>⟫",
        "three": f"<s>[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]⟪ a cat </s>⟫"
        "<s>[INST] Sure? [/INST]⟪  </s>⟫<s>[INST] And\n\nhere?\n<image> [/INST]⟪ 🙂  two\n    spaces  </s>⟫",
        "system": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]⟪ Yes. </s>⟫",
        "no system": "<s>[INST] Hi [/INST]⟪ Yes. </s>⟫",
        "prompt": f"<s>[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\nHi [/INST]⟪ Yes. </s>⟫<s>[INST] So? [/INST]",
    },
    "llama_2_long": {
        "one": f"<s>[INST] <<SYS>>\n{META}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]⟪ A red  circle. </s>⟫",
    },
    "llama_3": {
        "one": f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAVA}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟪A red  circle.<|eot_id|>⟫",
        "three": f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAVA}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟪a cat<|eot_id|>⟫"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟪<|eot_id|>⟫"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd\n\nhere?\n<image><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟪🙂  two\n    spaces <|eot_id|>⟫",
        "system": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟪Yes.<|eot_id|>⟫",
        "no system": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟪Yes.<|eot_id|>⟫",
    },
    "mistral": {
        "one": "<s> [INST] <image>\nWhat is it? [/INST]⟪A red  circle.</s>⟫",
        "three": "<s> [INST] <image>\nWhat is it? [/INST]⟪a cat</s>⟫ [INST] Sure? [/INST]⟪</s>⟫"
        " [INST] And\n\nhere?\n<image> [/INST]⟪🙂  two\n    spaces </s>⟫",
        "system": "<s> [INST] Be brief.\n\nHi [/INST]⟪Yes.</s>⟫",
    },
    "chatml": {
        "one": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n⟪A red  circle.<|im_end|>⟫",
        "three": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n⟪a cat<|im_end|>⟫\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟪<|im_end|>⟫\n"
        "<|im_start|>user\nAnd\n\nhere?\n<image><|im_end|>\n<|im_start|>assistant\n⟪🙂  two\n    spaces <|im_end|>⟫",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟪Yes.<|im_end|>⟫",
        "no system": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟪Yes.<|im_end|>⟫",
        "prompt": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟪Yes.<|im_end|>⟫\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n",
    },
    "mpt": {
        "one": f"<|im_start|>system\n{MPT}<|im_end|>"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|><|im_start|>assistant\n⟪A red  circle.<|im_end|>⟫",
        "three": f"<|im_start|>system\n{MPT}<|im_end|>"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|><|im_start|>assistant\n⟪a cat<|im_end|>⟫"
        "<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n⟪<|im_end|>⟫"
        "<|im_start|>user\nAnd\n\nhere?\n<image><|im_end|><|im_start|>assistant\n⟪🙂  two\n    spaces <|im_end|>⟫",
    },
    "nvgpt": {
        "one": f"<extra_id_0>System\n{VICUNA}\n\n<extra_id_1>User\n<image>\nWhat is it?\n"
        f"<extra_id_1>Assistant\n<extra_id_2>{QUALITY}\n⟪A red  circle.\n<extra_id_1>⟫",
        "three": f"<extra_id_0>System\n{VICUNA}\n\n<extra_id_1>User\n<image>\nWhat is it?\n"
        f"<extra_id_1>Assistant\n<extra_id_2>{QUALITY}\n⟪a cat\n<extra_id_1>⟫"
        f"User\nSure?\n<extra_id_1>Assistant\n<extra_id_2>{QUALITY}\n⟪\n<extra_id_1>⟫"
        f"User\nAnd\n\nhere?\n<image>\n<extra_id_1>Assistant\n<extra_id_2>{QUALITY}\n"
        "⟪🙂  two\n    spaces \n<extra_id_1>⟫",
        "system": "<extra_id_0>System\nBe brief.\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n"
        f"<extra_id_2>{QUALITY}\n⟪Yes.\n<extra_id_1>⟫",
        "label": f"<extra_id_0>System\n{VICUNA}\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n<extra_id_2>quality:1\n"
        f"⟪Yes.\n<extra_id_1>⟫User\nSo?\n<extra_id_1>Assistant\n<extra_id_2>{QUALITY}\n⟪No.\n<extra_id_1>⟫",
        "prompt": f"<extra_id_0>System\n{VICUNA}\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n"
        f"<extra_id_2>{QUALITY}\n⟪Yes.\n<extra_id_1>⟫User\nSo?\n<extra_id_1>Assistant\n<extra_id_2>{QUALITY}\n",
    },
    "nv_dpo": {
        "one": "<extra_id_0>System\n\n<extra_id_1>User\n<image>\nWhat is it?\n"
        "<extra_id_1>Assistant\n⟪A red  circle.\n<extra_id_1>⟫",
        "system": "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n⟪Yes.\n<extra_id_1>⟫",
        "label": "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n<extra_id_2>quality:1\n"
        "⟪Yes.\n<extra_id_1>⟫User\nSo?\n<extra_id_1>Assistant\n⟪No.\n<extra_id_1>⟫",
    },
}
# What NeVA encodes in one go; <extra_id_6> and <extra_id_7> become <s> and </s> afterwards.
NEVA = {
    "plain": {"one": "<image>⟪A red  circle.\n⟫"},
    "v1": {
        "one": f"{VICUNA} USER: <image>\nWhat is it? ASSISTANT:⟪ A red  circle.<extra_id_7>⟫",
        "three": f"{VICUNA} USER: <image>\nWhat is it? ASSISTANT:⟪ a cat<extra_id_7>⟫"
        " USER: Sure? ASSISTANT:⟪ <extra_id_7>⟫"
        " USER: And\n\nhere?\n<image> ASSISTANT:⟪ 🙂  two\n    spaces <extra_id_7>⟫",
        "system": "Be brief. USER: Hi ASSISTANT:⟪ Yes.<extra_id_7>⟫",
    },
    "llama_2": {
        "one": f"[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]⟪ A red  circle. <extra_id_7>⟫",
        "three": f"[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]⟪ a cat <extra_id_7>⟫"
        "<extra_id_6> [INST] Sure? [/INST]⟪  <extra_id_7>⟫"
        "<extra_id_6> [INST] And\n\nhere?\n<image> [/INST]⟪ 🙂  two\n    spaces  <extra_id_7>⟫",
    },
    "mistral": {
        "three": "<extra_id_6> [INST] <image>\nWhat is it? [/INST]⟪a cat<extra_id_7>⟫"
        " [INST] Sure? [/INST]⟪<extra_id_7>⟫"
        " [INST] And\n\nhere?\n<image> [/INST]⟪🙂  two\n    spaces <extra_id_7>⟫",
    },
    "nvgpt": {
        "three": TEXTS["nvgpt"]["three"],
        "label": TEXTS["nvgpt"]["label"],
        "system": f"<extra_id_0>System\nBe brief.<extra_id_1>User\nHi\n<extra_id_1>Assistant\n<extra_id_2>{QUALITY}\n"
        "⟪Yes.\n<extra_id_1>⟫",
    },
    "nv_dpo": {"one": TEXTS["nv_dpo"]["one"], "label": TEXTS["nv_dpo"]["label"]},
}

# --- the tokenizers --------------------------------------------------------------------------------------------------


def make_sentencepiece() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for token in SPECIAL:
        proto.pieces.add(piece=token, score=0.0, type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED)
    return proto.SerializeToString()


def make_byte_level() -> str:
    library = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    library.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", *SPECIAL)])
    return library.to_str()


# --- the ids ---------------------------------------------------------------------------------------------------------


def unmarked(text: str) -> tuple[str, list[bool]]:
    """A string without ⟪ and ⟫, and for each of its characters whether it stood between them."""
    plain, mask, inside = [], [], False
    for character in text:
        if character in "⟪⟫":
            inside = character == "⟪"
        else:
            plain.append(character)
            mask.append(inside)
    return "".join(plain), mask


def by_byte(text: str, mask: list[bool]) -> list[bool]:
    """The mask of the bytes, in which SentencePiece counts."""
    return [inside for character, inside in zip(text, mask, strict=True) for _ in character.encode()]


def weight(mask: list[bool], begin: int, end: int) -> int:
    """Of a token; it must lie on one side."""
    (one,) = {*mask[begin : max(end, begin + 1)]}
    return int(one)


def by_parts(processor: sentencepiece.SentencePieceProcessor, text: str) -> tuple[list[int], list[int]]:
    text, mask = unmarked(text)
    mask = by_byte(text, mask)
    ids, weights, place = [], [], 0
    for part in re.split("(" + "|".join(map(re.escape, ("<s>", "</s>", "<image>", *SPECIAL))) + ")", text):
        if part == "<image>":
            ids, weights = [*ids, 0, 0], [*weights, 0, 0]
        elif part in ("<s>", "</s>", *SPECIAL):
            ids, weights = [*ids, processor.piece_to_id(part)], [*weights, weight(mask, place, place + len(part))]
        else:
            for piece in processor.encode(part, return_type="proto").pieces:
                ids.append(piece.id)
                weights.append(weight(mask, place + piece.begin, place + piece.end))
        place += len(part.encode())
    return ids, weights


def in_one_go(processor: sentencepiece.SentencePieceProcessor, text: str) -> tuple[list[int], list[int]]:
    text, mask = unmarked(text.replace("<image>", "<extra_id_3>" * 2))
    mask = by_byte(text, mask)
    become = {"<extra_id_3>": 0, "<extra_id_6>": processor.bos_id(), "<extra_id_7>": processor.eos_id()}
    pieces = processor.encode(text, return_type="proto").pieces
    ids = [become.get(piece.piece, piece.id) for piece in pieces]
    return ids, [weight(mask, piece.begin, piece.end) for piece in pieces]


def byte_level(library: tokenizers.Tokenizer, text: str) -> tuple[list[int], list[int]]:
    text, mask = unmarked(text.replace("<image>", "<extra_id_3>" * 2))
    encoding = library.encode(text, add_special_tokens=False)
    patch = library.token_to_id("<extra_id_3>")
    ids = [0 if i == patch else i for i in encoding.ids]
    return ids, [weight(mask, begin, end) for begin, end in encoding.offsets]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    model, content = make_sentencepiece(), make_byte_level()
    (FOLDER / "tokenizer.model").write_bytes(model)
    (FOLDER / "tokenizer.json").write_text(content + "\n", encoding="utf-8")
    (FOLDER / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}\n', encoding="utf-8")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    library = tokenizers.Tokenizer.from_str(content)
    cases = []
    for compat, texts in (("none", TEXTS), ("neva", NEVA)):
        for template, strings in texts.items():
            for name, text in strings.items():
                whole = compat == "neva" or template in ("nvgpt", "nv_dpo")
                case = {"template": template, "compat": compat, "conversation": name, "text": text}
                case["sp"] = (in_one_go if whole else by_parts)(processor, text)
                if compat == "none":
                    case["bytes"] = byte_level(library, text)
                cases.append(case)
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    header = json.dumps(CONVERSATIONS, ensure_ascii=False)
    (FOLDER / "cases.json").write_text(f'{{"conversations": {header},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{FOLDER}: {len(cases)} strings")


if __name__ == "__main__":
    main()
