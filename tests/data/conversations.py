"""Tokenizers and turns that the tests of conversations share."""

import json
from functools import cache
from pathlib import Path

import numpy as np

from neva_jax.config import DataConfig
from neva_jax.data.encoding import Encoded, conversation_encoder
from neva_jax.data.rows import Turn
from neva_jax.data.tiles import ImageSpan
from neva_jax.data.tokenizer import Tokenizer

FOLDER = Path(__file__).parent.parent / "golden" / "templates"
KINDS = ("sp", "bytes")
# Says what the template `chatml` says, and a line end at the end.
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def golden() -> dict:
    return json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))


@cache
def toy(kind: str) -> Tokenizer:
    """The toy tokenizers with every special token: `sp` or `bytes`."""
    return Tokenizer.from_file(FOLDER / {"sp": "tokenizer.model", "bytes": "tokenizer.json"}[kind])


def talk(*texts: str) -> tuple[Turn, ...]:
    """Turns, the user's first."""
    return tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


def images(turns, tokens=2) -> list[ImageSpan]:
    """A span of one tile for each mark in the user's turns."""
    count = sum(turn.text.count("<image>") for turn in turns if turn.role == "user")
    return [ImageSpan(np.arange(tokens, dtype=np.int32), tokens)] * count


def encode(turns, tokenizer, system=None, tokens=2, **data) -> Encoded:
    """The turns under a `DataConfig` of the keys `data`, its images of `tokens` tokens each."""
    return conversation_encoder(DataConfig(**data), tokenizer).encode(turns, images(turns, tokens), system)
