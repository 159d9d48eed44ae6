"""Conversation templates, and how a conversation becomes tokens with a loss weight for each.

Segments are tokenized once and the mask is built as they are joined, so it cannot be off by one. Template `v1`,
one image of P = 4 tokens, two rounds (w: loss weight):

    text    <s> A chat … USER:  [image] What is it? ASSISTANT:   a cat   </s>  USER: Sure? ASSISTANT:   yes   </s>
    weight   0   0 …      0      0 0 0 0  0 …            0        1  1     1     0 …         0           1     1
    slot    -1  -1       -1      0 1 2 3 -1              -1       -1                                          -1

With `data.image_start` and `data.image_end`, a token stands before and after each image's slots:

    text    USER: <start> [image] <end> What is it?
    slot     -1     -1    0 1 2 3  -1   -1

A template is a row of the table below: what stands before, around and after the texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neva_jax.config import DataConfig
from neva_jax.data.rows import IMAGE_MARK, BadRow, DroppedRow, Turn
from neva_jax.data.tiles import TEXT, ImageSpan
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError


@dataclass(frozen=True)
class Template:
    """The frame of a conversation.

    system: text before the first turn.
    user: frame of what the user says, up to where the answer begins; `{}` stands for the text.
    answer: frame of the answer, which is supervised.
    end: whether the end token `</s>` closes an answer (supervised too).
    stop: text that ends an answer when there is no end token.
    image_only: the user's text is dropped, and only its images stay (LLaVA's `plain`).
    """

    system: str
    user: str
    answer: str
    end: bool
    stop: str = ""
    image_only: bool = False


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES = {
    "plain": Template(system="", user="{}", answer="{}\n", end=False, stop="\n", image_only=True),
    "v1": Template(system=f"{VICUNA_SYSTEM} ", user="USER: {} ASSISTANT:", answer=" {}", end=True),
}


@dataclass(frozen=True)
class ImageFrame:
    """The tokens before and after each image: none or one each."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()


def image_frame(data: DataConfig, tokenizer: Tokenizer) -> ImageFrame:
    """The ids of `data.image_start` and `data.image_end`.

    Raises:
      UserError: the tokenizer has no such token.
    """

    def ids(key: str) -> tuple[int, ...]:
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

    return ImageFrame(ids("image_start"), ids("image_end"))


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


class _Joiner:
    """Joins segments. Neighbouring text of one weight is kept together, so that it is tokenized as a whole."""

    def __init__(self, tokenizer: Tokenizer, frame: ImageFrame):
        self.tokenizer, self.frame = tokenizer, frame
        self.tokens: list[int] = []
        self.weights: list[float] = []
        self.slots: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.features = 0  # of the images so far
        self.after_text = False
        self.pending, self.pending_weight = "", 0.0

    def text(self, text: str, weight: float = 0.0) -> None:
        if weight != self.pending_weight:
            self.flush()
            self.pending_weight = weight
        self.pending += text

    def special(self, token: int, weight: float = 0.0) -> None:
        self.flush()
        self._append([token], weight)
        self.after_text = False

    def image(self, span: ImageSpan) -> None:
        self.flush()
        first = len(self.tokens)
        self._append(self.frame.start)
        slots = np.where(span.slots >= 0, span.slots + self.features, span.slots)
        self._append([0] * len(slots), slots=slots.tolist())
        self._append(self.frame.end)
        self.spans.append((first, len(self.tokens)))
        self.features += span.features
        self.after_text = False

    def flush(self) -> None:
        if self.pending:
            self._append(self.tokenizer.encode(self.pending, continues=self.after_text), self.pending_weight)
            self.pending, self.after_text = "", True

    def _append(self, ids: Sequence[int], weight: float = 0.0, slots: Sequence[int] | None = None) -> None:
        self.tokens += ids
        self.weights += [weight] * len(ids)
        self.slots += slots if slots is not None else [TEXT] * len(ids)


def encode_conversation(
    turns: tuple[Turn, ...],
    template: Template,
    tokenizer: Tokenizer,
    images: Sequence[ImageSpan],
    frame: ImageFrame = ImageFrame(),
) -> Encoded:
    """A conversation -> tokens, weights and slots.

    The n-th `<image>` mark in the user's turns is replaced by the slots of the n-th image, within `frame`; there are
    as many marks as images. The slots count through the tiles of all images.

    The last turn may be the user's: the tokens then end where the answer begins, ready for generation.
    """
    joiner, spans = _Joiner(tokenizer, frame), iter(images)
    if tokenizer.bos_id is not None:
        joiner.special(tokenizer.bos_id)
    joiner.text(template.system)
    for turn in turns:
        if turn.role == "user":
            text = IMAGE_MARK * turn.text.count(IMAGE_MARK) if template.image_only else turn.text
            before, after = template.user.split("{}")
            joiner.text(before)
            for i, part in enumerate(text.split(IMAGE_MARK)):
                if i:
                    joiner.image(next(spans))
                joiner.text(part)
            joiner.text(after)
        else:
            before, after = template.answer.split("{}")
            joiner.text(before + turn.text + after, weight=1.0)
            if template.end:
                joiner.special(tokenizer.eos_id, weight=1.0)
    joiner.flush()
    return Encoded(
        np.asarray(joiner.tokens, np.int32),
        np.asarray(joiner.weights, np.float32),
        np.asarray(joiner.slots, np.int32),
        tuple(joiner.spans),
    )


def fit_length(encoded: Encoded, data: DataConfig) -> Encoded:
    """A conversation that fits `data.max_length` positions and has something to learn, by `data.on_long_row`.

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
        end = next((first for first, last in encoded.spans if first <= data.max_length < last - 1), data.max_length + 1)
        spans = tuple(span for span in encoded.spans if span[1] <= end)
        encoded = Encoded(encoded.tokens[:end], encoded.weights[:end], encoded.slots[:end], spans)
        if not encoded.weights[1:].any():
            raise DroppedRow(f"{message}, and has nothing to learn when it is cut there")
    if not encoded.weights[1:].any():
        raise DroppedRow("has nothing to learn: its answers are empty, or of weight 0")
    return encoded
