"""Hugging Face's `tokenizer.json`: byte-level BPE (Llama-3, Qwen2, SmolLM2), BPE with `▁` and byte fallback (Llama-2).

Text is encoded by a copy of the file that knows no special token: the added tokens are gone, from the vocabulary and
the merges too, and so is the post-processor. What the copy does not have, text cannot produce:

    tokenizer.json   vocab { … }   merges [ … ]   added_tokens <|im_end|> …   post_processor adds <s>
    the copy         vocab { … }   merges [ … ]   -                           -

Every text must come back as it went in, up to the file's own Unicode normalization; a file that loses spaces, or has no
piece for some bytes, is refused. Ids are decoded by a table of bytes: the library's own decoder turns a whole run of
byte tokens into replacement characters as long as its last character is not complete.
"""

import json
import re
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from neva_jax.errors import UserError

# (bos, eos) of base models, where no tokenizer_config.json names them.
WELL_KNOWN = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<|startoftext|>", "<|endoftext|>"),
    (None, "<|endoftext|>"),
)
PROBE = ("A  b\n\n\tc \r\n é  ", " 象🙂 <0x41>  12 d  ")  # a start and its continuation
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


class JsonCodec:
    """Encodes and decodes with a `tokenizer.json`."""

    file = "tokenizer.json"

    def __init__(self, serialized: bytes, name: str, settings: dict[str, Any]):
        """`settings`: keys of `tokenizer_config.json`; `bos_token` and `eos_token` are taken from it when there.

        Raises:
          UserError: no `tokenizer.json`, one that loses text, or no token that ends an answer.
        """
        content = parse_json(serialized, name)
        model = content["model"]
        if dropout := model.get("dropout"):
            raise UserError(f"{name}: model.dropout={dropout} makes the ids of a text random; set it to null")
        ids = _ids(content, _load(content, name), name)
        added = {token["content"]: token for token in content["added_tokens"]}
        self.size = len(ids)
        self.bos, self.eos = _ends(added, settings, name)
        for key, token in (("bos_token", self.bos), ("eos_token", self.eos)):
            if token is not None and token not in ids:
                raise UserError(
                    f"{name}: has no token {token}, which tokenizer_config.json gives as {key}; correct it there, or "
                    "add the token with `python -m neva_jax.convert add-tokens`"
                )
        self.bos_id, self.eos_id = ids.get(self.bos), ids[self.eos]
        for number, token in (settings.get("added_tokens_decoder") or {}).items():
            if str(ids.get(_text(token))) != number:
                raise UserError(
                    f"{name}: has no token {_text(token)} with id {number}, which tokenizer_config.json adds; load and "
                    "save the tokenizer with transformers, so that both files agree"
                )
        special = {*added, self.eos, self.bos, model.get("unk_token")} - {None}
        self.special_ids = {token: ids[token] for token in special if token in ids}
        self._starting, self._continuing = _encoders(content, special, name)
        self._bytes = _table(content, ids)
        for token in special & {*ids}:
            shown = token in added and not added[token]["special"] and token not in (self.bos, self.eos)
            self._bytes[ids[token]] = token.encode() if shown else b""
        self._check_probe(_load({**content, "model": {**model, "merges": []}}, name), name)

    def encode(self, text: str, continues: bool) -> list[int]:
        """Token ids of a segment; no special token, whatever the text says."""
        return (self._continuing if continues else self._starting).encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        text = b"".join([self._bytes[i] for i in ids]).decode(errors="replace")
        return text[1:] if self._drops_space and text.startswith(" ") else text

    def _check_probe(self, library: tokenizers.Tokenizer, name: str) -> None:
        """Refuses a file that does not keep text, and one that the library decodes differently."""
        self._drops_space = not library.decode(self.encode(" a", continues=True)).startswith(" ")
        ids = self.encode(PROBE[0], continues=False) + self.encode(PROBE[1], continues=True)
        for text in (self.decode(ids), library.decode(ids)):
            if text != "".join(PROBE):
                raise UserError(
                    f"{name}: changes text ({''.join(PROBE)!r} comes back as {text!r}); a conversation needs a "
                    "normalizer, pre-tokenizer and decoder that keep white space, as those of Llama and Qwen2 do"
                )


def parse_json(serialized: bytes, name: str) -> dict[str, Any]:
    """The content of a `tokenizer.json` with a model that is supported.

    Raises:
      UserError: not JSON, no tokenizer, or not BPE that covers every byte.
    """
    try:
        content = json.loads(serialized)
        model = content["model"]
        kind = model.get("type", "BPE" if "merges" in model else None)
        content["added_tokens"] = list(content.get("added_tokens") or [])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{name}: is no SentencePiece model and no tokenizer.json") from None
    if kind != "BPE":
        raise UserError(f"{name}: its model is {kind}; supported are BPE, and SentencePiece's tokenizer.model")
    return content


def add_json_tokens(serialized: bytes, tokens: list[str], special: bool, name: str) -> tuple[bytes, list[int]]:
    """Appends to `added_tokens`; arguments, result and errors are those of `tokenizer.add_tokens`."""
    content = parse_json(serialized, name)
    known = dict(_ids(content, _load(content, name), name))
    new = []
    for token in tokens:
        if not token:
            raise UserError("--tokens: a token is empty")
        if token in known:
            raise UserError(f"--tokens: {token} exists already, with id {known[token]}")
        known[token] = len(known)
        new.append(known[token])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": known[token], "content": token, **flags, "special": special})
    _ids(content, _load(content, name), name)
    return json.dumps(content, ensure_ascii=False, indent=2).encode(), new


def _load(content: dict, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        raise UserError(f"{name}: the tokenizers library cannot load it ({str(error).splitlines()[0]})") from None


def _ids(content: dict, library: tokenizers.Tokenizer, name: str) -> dict[str, int]:
    """Token -> id, of the vocabulary and the added tokens; the library must agree, and no id may be missing."""
    for token in content["added_tokens"]:
        found = library.token_to_id(token["content"])
        if found != token["id"]:
            raise UserError(
                f"{name}: added token {token['content']} has id {token['id']}, but the tokenizers library gives it "
                f"{found}; added ids must follow the {len(content['model']['vocab'])} of the vocabulary without a gap"
            )
    ids = library.get_vocab(with_added_tokens=True)
    if {*ids.values()} != {*range(len(ids))}:
        raise UserError(
            f"{name}: has {len(ids)} tokens, but ids up to {max(ids.values(), default=-1)}; some are missing or doubled"
        )
    return ids


def _text(token: Any) -> str | None:
    """A token as Hugging Face writes it: its text, or an object that holds it."""
    token = token.get("content") if isinstance(token, dict) else token
    return None if token is None else str(token)


def _ends(added: dict, settings: dict[str, Any], name: str) -> tuple[str | None, str]:
    """Names of the tokens that start and end: from `settings`, else well-known ones."""
    pairs = (pair for pair in WELL_KNOWN if pair[0] in {*added, None} and pair[1] in added)
    bos, eos = next(pairs, (None, None))
    bos, eos = _text(settings.get("bos_token", bos)), _text(settings.get("eos_token", eos))
    if eos is None:
        raise UserError(
            f"{name}: no token is known to end an answer; name it as eos_token in tokenizer_config.json beside the file"
        )
    return bos, eos


def _steps(part: dict | None, key: str) -> list[dict]:
    """A normalizer, pre-tokenizer or decoder as the list of its steps; `key` names the parts of a sequence."""
    if part is None:
        return []
    return [step for one in part[key] for step in _steps(one, key)] if part["type"] == "Sequence" else [part]


def _encoders(content: dict, special: set[str], name: str) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Copies without special tokens, for a text that starts and for one that continues another (no space before it)."""
    model = content["model"]
    vocab = {piece: i for piece, i in model["vocab"].items() if piece not in special}
    # A merge is a pair, or in older files a text with one space.
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [pair for pair in merges if not {*pair, "".join(pair)} & special]
    byte_level = _is_byte_level(content)
    bases = pre_tokenizers.ByteLevel.alphabet() if byte_level else BYTE_PIECES
    if not (byte_level or model.get("byte_fallback")):
        raise UserError(f"{name}: is neither byte-level nor has byte_fallback, so that some text cannot be encoded")
    if lacking := sorted({*bases} - {*vocab}):
        raise UserError(
            f"{name}: lacks {len(lacking)} of the 256 byte pieces, or has them as added tokens ({lacking[0]})"
        )
    starting = {
        **content,
        "model": {**model, "vocab": vocab, "merges": merges},
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    normalizers = [step for step in _steps(content.get("normalizer"), "normalizers") if step["type"] != "Prepend"]
    splitters = []
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            step = {**step, "prepend_scheme": "never"}
        splitters.append(step)
    continuing = {
        **starting,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters} if splitters else None,
    }
    return _load(starting, name), _load(continuing, name)


def _is_byte_level(content: dict) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(content.get("decoder"), "decoders"))


def _table(content: dict, ids: dict[str, int]) -> list[bytes]:
    """The bytes of each id, special tokens not yet considered."""
    table = [b""] * len(ids)
    if _is_byte_level(content):
        # GPT-2's alphabet: visible bytes are their Latin-1 character, the others follow from 256 on, in their order.
        visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
        hidden = [byte for byte in range(256) if byte not in visible]
        byte_of = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
        for piece, i in ids.items():
            known = all(character in byte_of for character in piece)
            table[i] = bytes([byte_of[character] for character in piece]) if known else piece.encode()
    else:
        for piece, i in ids.items():
            is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
            table[i] = bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()
    return table
