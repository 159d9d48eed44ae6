"""Conversations as tokens, against layouts written out by hand.

The layouts use a tokenizer whose pieces are single characters, so that a list of pieces is the text itself: `▁` is a
space or the dummy prefix, `[0]` stands for the two tokens of image 0.
"""

import re

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from neva_jax.config import DataConfig
from neva_jax.data.encoding import conversation_encoder
from neva_jax.data.packing import training_row
from neva_jax.data.tiles import ImageSpan
from neva_jax.data.tokenizer import Tokenizer, add_tokens
from neva_jax.errors import UserError
from tests.data.conversations import encode, talk

SYSTEM = (
    "▁A▁chat▁between▁a▁curious▁user▁and▁an▁artificial▁intelligence▁assistant.▁The▁assistant▁gives▁helpful,▁detailed,"
    "▁and▁polite▁answers▁to▁the▁user's▁questions.▁"
)
CHARACTERS = ["<unk>", "<s>", "</s>", "▁", "\n", *map(chr, range(33, 127))]


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    """A tokenizer with one piece for each ASCII character."""
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    for i, piece in enumerate(CHARACTERS):
        proto.pieces.add(
            piece=piece, score=0, type=(kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.NORMAL)[min(i, 3)]
        )
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.CHAR
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    return Tokenizer(proto.SerializeToString())


def laid_out(*parts):
    """(tokens, weights, slots) of parts `(text, weight)`; `<s>`, `</s>` and `[k]` are one thing each."""
    tokens, weights, slots = [], [], []
    for text, weight in parts:
        image = re.fullmatch(r"\[(\d)\]", text)
        if image:
            k = int(image[1])
            tokens += [0, 0]
            slots += [2 * k, 2 * k + 1]
        else:
            units = [text] if text in ("<s>", "</s>") else list(text)
            tokens += [CHARACTERS.index(unit) for unit in units]
            slots += [-1] * len(units)
        weights += [weight] * (len(tokens) - len(weights))
    return tokens, weights, slots


LAYOUTS = {
    "v1, image in front": (
        "v1",
        talk("<image>\nWhat is it?", "a cat"),
        [("<s>", 0), (f"{SYSTEM}USER:▁", 0), ("[0]", 0), ("▁\nWhat▁is▁it?▁ASSISTANT:", 0), ("▁a▁cat", 1), ("</s>", 1)],
    ),
    "v1, image at the end": (
        "v1",
        talk("What is it?\n<image>", "a cat"),
        [("<s>", 0), (f"{SYSTEM}USER:▁What▁is▁it?\n", 0), ("[0]", 0), ("▁▁ASSISTANT:", 0), ("▁a▁cat", 1), ("</s>", 1)],
    ),
    "v1, image in the middle": (
        "v1",
        talk("Is<image>it?", "no"),
        [("<s>", 0), (f"{SYSTEM}USER:▁Is", 0), ("[0]", 0), ("▁it?▁ASSISTANT:", 0), ("▁no", 1), ("</s>", 1)],
    ),
    "v1, two images": (
        "v1",
        talk("<image><image>\nSame?", "no"),
        [
            ("<s>", 0),
            (f"{SYSTEM}USER:▁", 0),
            ("[0]", 0),
            ("[1]", 0),
            ("▁\nSame?▁ASSISTANT:", 0),
            ("▁no", 1),
            ("</s>", 1),
        ],
    ),
    "v1, no image": (
        "v1",
        talk("Hi {} %s", "{}!"),
        [("<s>", 0), (f"{SYSTEM}USER:▁Hi▁{{}}▁%s▁ASSISTANT:", 0), ("▁{}!", 1), ("</s>", 1)],
    ),
    "v1, three rounds": (
        "v1",
        talk("<image>\nWhat?", "a cat", "Sure?", " yes\n", "And <image> here?", ""),
        [
            ("<s>", 0),
            (f"{SYSTEM}USER:▁", 0),
            ("[0]", 0),
            ("▁\nWhat?▁ASSISTANT:", 0),
            ("▁a▁cat", 1),
            ("</s>", 1),
            ("▁USER:▁Sure?▁ASSISTANT:", 0),
            ("▁▁yes\n", 1),
            ("</s>", 1),
            ("▁USER:▁And▁", 0),
            ("[1]", 0),
            ("▁▁here?▁ASSISTANT:", 0),
            ("▁", 1),
            ("</s>", 1),
        ],
    ),
    "plain, image in front": (
        "plain",
        talk("<image>\nDescribe it.", "a cat"),
        [("<s>", 0), ("[0]", 0), ("▁a▁cat\n", 1)],
    ),
    "plain, image in the middle": (
        "plain",
        talk("Look at <image> now", "a  cat"),
        [("<s>", 0), ("[0]", 0), ("▁a▁▁cat\n", 1)],
    ),
    "plain, two images, the second at the end": (
        "plain",
        talk("<image> or <image>", "a cat"),
        [("<s>", 0), ("[0]", 0), ("[1]", 0), ("▁a▁cat\n", 1)],
    ),
    "plain, no image": (
        "plain",
        talk("Say something.", "a cat"),
        [("<s>", 0), ("▁a▁cat\n", 1)],
    ),
    "plain, three rounds": (
        "plain",
        talk("<image>", "one", "Describe <image>", "", "more", "three"),
        [("<s>", 0), ("[0]", 0), ("▁one\n", 1), ("[1]", 0), ("▁\nthree\n", 1)],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_weights_and_slots_as_written_by_hand(characters, name):
    template, turns, parts = LAYOUTS[name]
    tokens, weights, slots = laid_out(*parts)
    encoded = encode(turns, characters, template=template)
    assert encoded.tokens.tolist() == tokens
    assert encoded.weights.tolist() == weights
    assert encoded.slots.tolist() == slots
    assert (encoded.tokens.dtype, encoded.weights.dtype, encoded.slots.dtype) == (np.int32, np.float32, np.int32)


def test_a_prompt_ends_where_the_answer_begins(characters):
    encoded = encode(talk("<image>\nWhat?", "a cat", "Sure?"), characters)
    expected = laid_out(
        ("<s>", 0),
        (f"{SYSTEM}USER:▁", 0),
        ("[0]", 0),
        ("▁\nWhat?▁ASSISTANT:", 0),
        ("▁a▁cat", 1),
        ("</s>", 1),
        ("▁USER:▁Sure?▁ASSISTANT:", 0),
    )
    assert (encoded.tokens.tolist(), encoded.weights.tolist(), encoded.slots.tolist()) == expected


# --- several tiles, newlines, and tokens around an image --------------------------------------------------------------

MIXED = [
    ImageSpan(np.array([0, 1, 3, -2, 5, -2], np.int32), 8),  # 4 tiles, the last of which has only padding
    ImageSpan(np.array([0, 1], np.int32), 2),
    ImageSpan(np.array([0, 1, 2, -2], np.int32), 4),
]


def test_slots_count_through_the_tiles_of_all_images_whether_they_are_used_or_not(characters):
    turns = talk("<image>a<image>", "no", "<image>", "b")
    encoded = conversation_encoder(DataConfig(template="plain"), characters).encode(turns, MIXED)
    assert encoded.slots.tolist() == [-1, 0, 1, 3, -2, 5, -2, 8, 9, *[-1] * 4, 10, 11, 12, -2, *[-1] * 3]
    assert encoded.tokens[np.array(encoded.slots) != -1].tolist() == [0] * 12
    assert encoded.weights.tolist() == [0] * 9 + [1] * 4 + [0] * 4 + [1] * 3
    row = training_row([encoded], [14], 24)
    assert row["image_slots"].tolist() == [*encoded.slots.tolist()[:-1], *[-1] * 5]


@pytest.fixture(scope="module")
def marked(characters) -> Tokenizer:
    """`characters` with NeVA's tokens for start and end, as control pieces."""
    return Tokenizer(add_tokens(characters.serialized, ["<extra_id_4>", "<extra_id_5>"], True, "x")[0])


@pytest.mark.parametrize(
    ("start", "end"), [("<extra_id_4>", "<extra_id_5>"), ("<extra_id_4>", None), (None, "<extra_id_5>"), (None, None)]
)
def test_tokens_around_each_image(marked, start, end):
    """They are the spans' neighbours, and nothing else changes: each has weight 0 and slot -1."""
    turns = talk("See <image><image>.", "no", "<image>", "<image>")
    size = len(CHARACTERS)
    bare = conversation_encoder(DataConfig(), marked).encode(turns, MIXED)
    encoded = conversation_encoder(DataConfig(image_start=start, image_end=end), marked).encode(turns, MIXED)
    firsts = np.flatnonzero(np.isin(bare.slots, (0, 8, 10)))
    behind = firsts + np.array([6, 2, 4])
    # Ends before starts: between two images that touch, the end of the first comes first.
    places = np.concatenate([behind if end else [], firsts if start else []]).astype(int)
    ids = [size + 1] * 3 * bool(end) + [size] * 3 * bool(start)
    assert encoded.tokens.tolist() == np.insert(bare.tokens, places, ids).tolist()
    assert encoded.weights.tolist() == np.insert(bare.weights, places, 0).tolist()
    assert encoded.slots.tolist() == np.insert(bare.slots, places, -1).tolist()
    around = [encoded.tokens[first:last].tolist() for first, last in encoded.spans]
    inside = [[size] * bool(start) + [0] * len(span.slots) + [size + 1] * bool(end) for span in MIXED]
    assert around == inside


def test_the_layout_of_an_image_between_its_tokens(marked):
    turns = talk("<image>", "a")
    encoded = encode(turns, marked, template="plain", image_start="<extra_id_4>", image_end="<extra_id_5>")
    size = len(CHARACTERS)
    a = [CHARACTERS.index(piece) for piece in "▁a\n"]
    assert encoded.tokens.tolist() == [1, size, 0, 0, size + 1, *a]
    assert encoded.slots.tolist() == [-1, -1, 0, 1, -1, -1, -1, -1]
    assert encoded.weights.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("key", ["image_start", "image_end"])
@pytest.mark.parametrize("name", ["<extra_id_9>", "a", "", "the"])
def test_an_unknown_token_around_images_is_refused(marked, key, name):
    with pytest.raises(UserError) as error:
        conversation_encoder(DataConfig(**{key: name}), marked)
    assert str(error.value) == (
        f"data.{key}={name}: the tokenizer has no such token; add it with python -m neva_jax.convert add-tokens, or "
        f"set data.{key}=null"
    )


def test_a_tokenizer_without_a_start_token(characters):
    """Qwen2's: nothing stands before the system prompt."""

    class Startless:
        bos_id, eos_id, encode = None, characters.eos_id, staticmethod(characters.encode)
        file = characters.file

    turns = talk("<image>\nWhat?", "a cat")
    ours, usual = encode(turns, Startless()), encode(turns, characters)
    assert ours.tokens.tolist() == usual.tokens.tolist()[1:]
    assert (ours.weights.tolist(), ours.slots.tolist()) == (usual.weights.tolist()[1:], usual.slots.tolist()[1:])
