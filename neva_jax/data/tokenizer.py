"""Tokenizers for conversations joined from segments: SentencePiece's `.model` and Hugging Face's `tokenizer.json`.

Llama's model puts a `▁` before the first word of whatever it encodes (the dummy prefix). A text that continues
another text must not get one, or `USER: hi` + ` there` would not be what `USER: hi there` is:

    encode("USER:", continues=False)   ▁USER :          with the dummy prefix
    encode(" red",  continues=True)    ▁red             without it; the space is the text's own

Byte-level models (`tokenizer.json` of Llama-3, Qwen2, SmolLM2) have no such prefix, and encode both alike.

Text can never produce a special token: control pieces do not match text in SentencePiece, and user-defined ones
(`<extra_id_0>`) are made control pieces in the copies that encode; for `tokenizer.json` see `tokenizer_json.py`.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from neva_jax.data.tokenizer_json import JsonCodec, add_json_tokens
from neva_jax.errors import UserError

USER_DEFINED = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
CONTROL = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
RECENT = 64  # texts whose tokens are kept: what a template writes, its system text above all, comes in every row


class Tokenizer:
    """Encodes segments and decodes token ids; picklable, so that worker processes can hold it.

    serialized: content of the file.
    file: how a file of its kind is called, `tokenizer.model` or `tokenizer.json`.
    """

    def __init__(self, serialized: bytes, name: str = "tokenizer.model", settings: dict[str, Any] | None = None):
        """`serialized` is the content of a SentencePiece `.model` or of a `tokenizer.json`; `name` stands in messages.

        `settings`: `bos_token` and `eos_token` as `tokenizer_config.json` has them, for `tokenizer.json` only; keys
        that are absent are found by well-known names.

        Raises:
          UserError: neither of the two, no bos or eos (a `tokenizer.json` may do without bos), or one that loses text.
        """
        self.serialized, self._name = serialized, name
        codec = JsonCodec if _is_json(serialized) else SentencePieceCodec
        self._codec = codec(serialized, name, settings or {})
        self._encode = functools.lru_cache(RECENT)(self._codec.encode)
        self.file = codec.file

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.serialized, self._name, self.settings)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads a `.model`, or a `tokenizer.json` and the `tokenizer_config.json` beside it, when there is one.

        Raises:
          UserError: as the constructor does, or when a file cannot be read.
        """
        serialized = _read(Path(path))
        settings = Path(path).parent / "tokenizer_config.json"
        if not _is_json(serialized) or not settings.exists():
            return cls(serialized, str(path))
        try:
            found = json.loads(_read(settings))
        except ValueError as error:
            raise UserError(f"{settings}: is no JSON ({error})") from None
        if not isinstance(found, dict):
            raise UserError(f"{settings}: is no JSON object")
        return cls(serialized, str(path), found)

    @property
    def size(self) -> int:
        """Number of token ids."""
        return self._codec.size

    @property
    def bos_id(self) -> int | None:
        """Id of the token that starts a conversation (`<s>`); None where the tokenizer has none (Qwen2)."""
        return self._codec.bos_id

    @property
    def eos_id(self) -> int:
        """Id of the token that ends an answer (`</s>`)."""
        return self._codec.eos_id

    @property
    def settings(self) -> dict[str, str | None]:
        """Names of both, `bos_token` and `eos_token`: what the constructor needs besides the file."""
        return {"bos_token": self._codec.bos, "eos_token": self._codec.eos}

    @property
    def sha256(self) -> str:
        """Digest of the file."""
        return hashlib.sha256(self.serialized).hexdigest()

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special and added tokens, which text never has."""
        return self._codec.special_ids

    def token_id(self, name: str) -> int | None:
        """Id of a special or added token (`<|im_end|>`), None if there is none of that name; text has no such ids."""
        return self._codec.special_ids.get(name)

    def encode(self, text: str, continues: bool) -> list[int]:
        """Token ids of a segment of text; `continues`: the segment follows another text without a token between."""
        return self._encode(text, continues).copy()

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens.

        Where the tokenizer puts a dummy prefix, one leading space is dropped, as SentencePiece does. Bytes that are no
        character (yet) become replacement characters; what stands before them stays as more ids follow.
        """
        return self._codec.decode(ids)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text that each id adds, and what was held back at the end; never a part of a character."""
        seen: list[int] = []
        shown = 0
        for token in ids:
            seen.append(token)
            text = self.decode(seen).rstrip("\N{REPLACEMENT CHARACTER}")
            yield text[shown:]
            shown = max(shown, len(text))
        yield self.decode(seen)[shown:]


class SentencePieceCodec:
    """Encodes and decodes with a SentencePiece model."""

    file = "tokenizer.model"

    def __init__(self, serialized: bytes, name: str, settings: dict[str, Any]):
        """`settings` is not used: the model names its bos and eos.

        Raises:
          UserError: no SentencePiece model, no bos or eos piece, or one that removes white space.
        """
        proto = parse_model(serialized, name)
        if proto.normalizer_spec.remove_extra_whitespaces:
            raise UserError(
                f"{name}: was trained with remove_extra_whitespaces=true, which loses the spaces between the segments "
                "of a conversation; train it with remove_extra_whitespaces=false, as Llama's is"
            )
        self._decoder = _load(proto, name)
        self.size = self._decoder.get_piece_size()
        self.bos_id, self.eos_id = self._decoder.bos_id(), self._decoder.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{name}: has no <s> or </s> piece; a conversation needs both")
        self.bos, self.eos = proto.pieces[self.bos_id].piece, proto.pieces[self.eos_id].piece
        self.special_ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type in (CONTROL, USER_DEFINED)}
        for piece in proto.pieces:
            if piece.type == USER_DEFINED:
                piece.type = CONTROL
        self._starting = _load(proto, name)
        proto.normalizer_spec.add_dummy_prefix = False
        self._continuing = _load(proto, name)

    def encode(self, text: str, continues: bool) -> list[int]:
        """Token ids of a segment; no special token, whatever the text says."""
        return (self._continuing if continues else self._starting).encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without control tokens."""
        return self._decoder.decode([i for i in ids if i not in (self.bos_id, self.eos_id)])


def parse_model(serialized: bytes, name: str) -> sentencepiece_model_pb2.ModelProto:
    """The bytes of a `.model` file as a protocol buffer.

    Raises:
      UserError: they are no SentencePiece model.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(serialized)
    except Exception:
        proto.Clear()
    if not proto.pieces or not proto.trainer_spec.ByteSize():
        raise UserError(f"{name}: is no SentencePiece model and no tokenizer.json")
    return proto


def _is_json(serialized: bytes) -> bool:
    return serialized.startswith(b"{")  # a SentencePiece model starts with a line feed, the tag of its first piece


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _load(proto: sentencepiece_model_pb2.ModelProto, name: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except RuntimeError as error:
        raise UserError(f"{name}: SentencePiece cannot load it ({str(error).splitlines()[0]})") from None


def add_tokens(serialized: bytes, tokens: list[str], control: bool, name: str) -> tuple[bytes, list[int]]:
    """Appends tokens: pieces of a SentencePiece model (NeMo's add_special_tokens_to_sentencepiece), or `added_tokens`.

    Args:
      serialized: content of the `.model` or `tokenizer.json` called `name`.
      tokens: the new tokens, in the order of their ids.
      control: control pieces, which text never matches (in `tokenizer.json`: special ones, which are not shown);
        otherwise user-defined ones. Our own `Tokenizer` matches neither in text.

    Returns:
      (content of the new file, ids of the new tokens)

    Raises:
      UserError: no tokenizer, an empty or repeated token, or one that exists.
    """
    if _is_json(serialized):
        return add_json_tokens(serialized, tokens, control, name)
    proto = parse_model(serialized, name)
    known = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    ids = []
    for token in tokens:
        if not token:
            raise UserError("--tokens: a token is empty")
        if token in known:
            raise UserError(f"--tokens: {token} exists already, with id {known[token]}")
        known[token] = len(proto.pieces)
        ids.append(known[token])
        proto.pieces.add(piece=token, score=0.0, type=CONTROL if control else USER_DEFINED)
    serialized = proto.SerializeToString()
    _load(proto, name)
    return serialized, ids
