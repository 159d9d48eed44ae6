"""SentencePiece tokenizer for conversations that are joined from segments.

Llama's model puts a `▁` before the first word of whatever it encodes (the dummy prefix). A text that continues
another text must not get one, or `USER: hi` + ` there` would not be what `USER: hi there` is:

    encode("USER:", continues=False)   ▁USER :          with the dummy prefix
    encode(" red",  continues=True)    ▁red             without it; the space is the text's own

Text can never produce a special token: control pieces do not match text in SentencePiece, and user-defined ones
(`<extra_id_0>`) are made control pieces in the copies that encode.
"""

import hashlib
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from neva_jax.errors import UserError

USER_DEFINED = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
CONTROL = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL


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
        raise UserError(f"{name}: is no SentencePiece model")
    return proto


class Tokenizer:
    """Encodes segments and decodes token ids; picklable, so that worker processes can hold it."""

    def __init__(self, serialized: bytes, name: str = "tokenizer.model"):
        """`serialized` is the content of a SentencePiece `.model` file; `name` stands in messages.

        Raises:
          UserError: no SentencePiece model, no bos or eos piece, or one that removes white space.
        """
        proto = parse_model(serialized, name)
        if proto.normalizer_spec.remove_extra_whitespaces:
            raise UserError(
                f"{name}: was trained with remove_extra_whitespaces=true, which loses the spaces between the segments "
                "of a conversation; train it with remove_extra_whitespaces=false, as Llama's is"
            )
        self.serialized = serialized
        self._decoder = _load(proto, name)
        if self._decoder.bos_id() < 0 or self._decoder.eos_id() < 0:
            raise UserError(f"{name}: has no <s> or </s> piece; a conversation needs both")
        for piece in proto.pieces:
            if piece.type == USER_DEFINED:
                piece.type = CONTROL
        self._starting = _load(proto, name)
        proto.normalizer_spec.add_dummy_prefix = False
        self._continuing = _load(proto, name)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads a `.model` file; raises UserError as the constructor does, or when it cannot be read."""
        try:
            serialized = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        return cls(serialized, str(path))

    @property
    def size(self) -> int:
        """Number of token ids."""
        return self._decoder.get_piece_size()

    @property
    def bos_id(self) -> int:
        """Id of `<s>`, which starts a conversation."""
        return self._decoder.bos_id()

    @property
    def eos_id(self) -> int:
        """Id of `</s>`, which ends an answer."""
        return self._decoder.eos_id()

    @property
    def sha256(self) -> str:
        """Digest of the model file."""
        return hashlib.sha256(self.serialized).hexdigest()

    def encode(self, text: str, continues: bool) -> list[int]:
        """Token ids of a segment of text; `continues`: the segment follows another text without a token between."""
        return (self._continuing if continues else self._starting).encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without control tokens; a leading space is dropped, as SentencePiece does."""
        return self._decoder.decode([i for i in ids if i not in (self.bos_id, self.eos_id)])


def _load(proto: sentencepiece_model_pb2.ModelProto, name: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except RuntimeError as error:
        raise UserError(f"{name}: SentencePiece cannot load it ({str(error).splitlines()[0]})") from None


def add_tokens(serialized: bytes, tokens: list[str], control: bool, name: str) -> tuple[bytes, list[int]]:
    """Appends pieces to a SentencePiece model (NeMo's add_special_tokens_to_sentencepiece).

    Args:
      serialized: content of the `.model` file called `name`.
      tokens: the new pieces, in the order of their ids.
      control: control pieces, which text never matches; otherwise user-defined ones.

    Returns:
      (content of the new file, ids of the new pieces)

    Raises:
      UserError: no SentencePiece model, an empty or repeated token, or one that exists.
    """
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
