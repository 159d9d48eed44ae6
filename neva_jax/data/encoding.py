"""How a conversation becomes tokens, with a loss weight and an image slot for each.

Segments are tokenized once and the mask is built as they are joined, so it cannot be off by one. Template `v1`,
one image of P = 4 tokens, two rounds (w: loss weight):

    text    <s> A chat … USER:  [image] What is it? ASSISTANT:   a cat   </s>  USER: Sure? ASSISTANT:   yes   </s>
    weight   0   0 …      0      0 0 0 0  0 …            0        1  1     1     0 …         0           1     1
    slot    -1  -1       -1      0 1 2 3 -1              -1       -1                                          -1

With `data.image_start` and `data.image_end`, a token stands before and after each image's slots:

    text    USER: <start> [image] <end> What is it?
    slot     -1     -1    0 1 2 3  -1   -1

A layout (of a template of the table, or of a Jinja template) says which pieces there are; here they are joined.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from neva_jax.config import DataConfig
from neva_jax.data.chat_template import JinjaLayout
from neva_jax.data.rows import IMAGE_MARK, BadRow, DroppedRow, Turn
from neva_jax.data.templates import NEVA, TEMPLATES, Ending, FrameLayout, Piece
from neva_jax.data.tiles import TEXT, ImageSpan
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens: ids [N] i32, loss weights [N] f32, image slots [N] i32.

    Slots: -1 = text, -2 = the learned newline, else k*P + p, feature p of tile k.
    spans: (first, last + 1) of the tokens of each image, the tokens around it included.
    """

    tokens: np.ndarray
    weights: np.ndarray
    slots: np.ndarray
    spans: tuple[tuple[int, int], ...] = ()

    def beginning(self) -> np.ndarray:
        """The tokens [P] i32 before the first image and before the first that is predicted from those before it."""
        stop = np.flatnonzero((self.slots[:-1] != -1) | (self.weights[1:] != 0))
        return self.tokens[: stop[0]] if len(stop) else self.tokens[:-1]


@dataclass(frozen=True)
class ConversationEncoder:
    """Turns -> tokens, weights and slots, under one configuration; picklable, so that workers can hold it.

    image_start, image_end: ids before and after each image, none or one each.
    front: a turn's images are moved before its text.
    """

    tokenizer: Tokenizer
    layout: FrameLayout | JinjaLayout
    whole: bool = False  # see Template
    image_start: tuple[int, ...] = ()
    image_end: tuple[int, ...] = ()
    front: bool = False

    @property
    def ending(self) -> Ending:
        """How an answer begins and ends when it is generated."""
        return self.layout.ending

    def encode(self, turns: Sequence[Turn], images: Sequence[ImageSpan], system: str | None = None) -> Encoded:
        """Encodes a conversation that begins with the user.

        The n-th `<image>` mark in the user's turns is replaced by the slots of the n-th image. The slots count through
        the tiles of all images. The last turn may be the user's: the tokens then end where the answer begins, ready
        for generation.

        Args:
          system: system text of this conversation; None: the template's.

        Raises:
          BadRow: marks and images differ in number, or a Jinja template refuses the conversation.
        """
        if self.front:
            turns = [_images_first(turn) for turn in turns]
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
        if marks != len(images):
            raise BadRow(f"has {marks} {IMAGE_MARK} marks in human turns, but {len(images)} images")
        joiner = _Joiner(self, turns, images)
        return joiner.join(self.layout.pieces(turns, system))

    def answer(self, ids: Sequence[int]) -> str:
        """The text of an answer, or of its beginning, from the tokens behind a prompt; without the template's lead."""
        # SentencePiece drops the space before a text's first word, which is the answer's own where the text continues.
        exact = self.whole or self.ending.continues
        before = self.tokenizer.encode("x", continues=False) if exact else []
        text = self.tokenizer.decode([*before, *ids])[len(self.tokenizer.decode(before)) :]
        return text.removeprefix(self.ending.lead)


def conversation_encoder(data: DataConfig, tokenizer: Tokenizer) -> ConversationEncoder:
    """What `data.template` and its kin ask for, with this tokenizer.

    Raises:
      UserError: the tokenizer lacks a token, or the Jinja template cannot be used.
    """
    whole = False
    if data.template == "jinja":
        layout = JinjaLayout.from_config(data, tokenizer)
    else:
        template = (NEVA if data.compat == "neva" else TEMPLATES)[data.template]
        layout, whole = FrameLayout(data.template, template, tokenizer), template.whole
    start, end = (_image_token(data, key, tokenizer) for key in ("image_start", "image_end"))
    return ConversationEncoder(tokenizer, layout, whole, start, end, data.image_position == "front")


def _image_token(data: DataConfig, key: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    name = getattr(data, key)
    if name is None:
        return ()
    token = tokenizer.token_id(name)
    if token is None:
        raise UserError(
            f"data.{key}={name}: the tokenizer has no such token; add it with python -m neva_jax.convert "
            f"add-tokens, or set data.{key}=null"
        )
    return (token,)


def _images_first(turn: Turn) -> Turn:
    """As LLaVA does with its one image: the marks, a line end, then the rest without white space around it."""
    marks = turn.text.count(IMAGE_MARK)
    if turn.role != "user" or not marks:
        return turn
    return replace(turn, text=f"{IMAGE_MARK * marks}\n{turn.text.replace(IMAGE_MARK, '').strip()}".strip())


class _Joiner:
    """Joins pieces. Neighbouring text of one kind is kept together, so that it is tokenized as a whole."""

    def __init__(self, encoder: ConversationEncoder, turns: Sequence[Turn], images: Sequence[ImageSpan]):
        self.encoder, self.turns, self.images = encoder, turns, iter(images)
        self.tokens: list[int] = []
        self.weights: list[tuple[float, int]] = []  # each with the number of tokens that have it
        self.slots: list[tuple[int, np.ndarray]] = []  # of each image, with the place of the first; text has TEXT
        self.spans: list[tuple[int, int]] = []
        self.features = 0  # of the images so far
        self.continues = False
        self.pending, self.answer = "", None

    def join(self, pieces: Iterable[Piece]) -> Encoded:
        for piece in pieces:
            if piece.answer != self.answer or not isinstance(piece.value, str):
                self._flush()
                self.answer = piece.answer
            if isinstance(piece.value, str):
                self.pending += piece.value
                continue
            if self.encoder.whole and not self.tokens:
                self._append(_dummy_prefix(self.encoder.tokenizer))
            if piece.value is None:
                self._image(next(self.images))
            else:
                self._append([piece.value])
            self.continues = self.encoder.whole
        self._flush()
        tokens = np.asarray(self.tokens, np.int32)
        weights, counts = zip(*self.weights, strict=True) if self.weights else ((), ())
        slots = np.full(len(tokens), TEXT, np.int32)
        for first, of_image in self.slots:
            slots[first : first + len(of_image)] = of_image
        return Encoded(
            tokens, np.repeat(np.asarray(weights, np.float32), np.asarray(counts, int)), slots, tuple(self.spans)
        )

    def _image(self, span: ImageSpan) -> None:
        first = len(self.tokens)
        self._append(self.encoder.image_start)
        slots = np.where(span.slots >= 0, span.slots + self.features, span.slots)
        self.slots.append((len(self.tokens), slots))
        self._append([0] * len(slots))
        self._append(self.encoder.image_end)
        self.spans.append((first, len(self.tokens)))
        self.features += span.features

    def _flush(self) -> None:
        if self.pending:
            self._append(self.encoder.tokenizer.encode(self.pending, continues=self.continues))
            self.pending, self.continues = "", True

    def _append(self, ids: Sequence[int]) -> None:
        self.tokens += ids
        self.weights.append((0.0 if self.answer is None else self.turns[self.answer].weight, len(ids)))


def _dummy_prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text that starts: `▁` in SentencePiece, nothing in byte-level ones."""
    starting, continuing = (tokenizer.encode("\n", continues=continues) for continues in (False, True))
    return starting[: len(starting) - len(continuing)]


def fit_length(encoded: Encoded, data: DataConfig) -> Encoded:
    """A conversation that fits `data.max_length` positions and has something to learn, by `data.on_long_row`.

    N tokens make N - 1 positions, each of which predicts the next token. `truncate_text` cuts the end off; an image
    that would be cut goes as a whole, with the tokens around it and everything behind it.

    Raises:
      BadRow: too long, and the policy is `error`.
      DroppedRow: too long and the policy is `drop`, or nothing supervised is (or stays) there.
    """
    length = len(encoded.tokens) - 1
    if length > data.max_length:
        images = int((encoded.slots != TEXT).sum())
        message = f"has {length} tokens ({images} of images), but data.max_length is {data.max_length}"
        if data.on_long_row == "error":
            raise BadRow(message)
        if data.on_long_row == "drop":
            raise DroppedRow(message)
        encoded = _cut(encoded, data.max_length + 1)
        if not encoded.weights[1:].any():
            raise DroppedRow(f"{message}, and has nothing to learn when it is cut there")
    if not encoded.weights[1:].any():
        raise DroppedRow("has nothing to learn: its answers are empty, or of weight 0")
    return encoded


def _cut(encoded: Encoded, length: int) -> Encoded:
    end = next((first for first, last in encoded.spans if first < length < last), length)
    spans = tuple(span for span in encoded.spans if span[1] <= end)
    return Encoded(encoded.tokens[:end], encoded.weights[:end], encoded.slots[:end], spans)
