"""Shown samples: what is marked as learned decodes to the answers and their end, and nothing can feign a mark."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from neva_jax.data.check_command import all_sources
from neva_jax.data.encoding import Encoded
from neva_jax.data.samples import Sample, Samples
from neva_jax.data.samples_shown import runs, show, shown, spread_refs
from neva_jax.data.sources import RowRef
from neva_jax.data.tokenizer import Tokenizer
from tests.conftest import CORPUS
from tests.data.rows import PATCHES, conversation, write_rows

ESCAPE = "\x1b[1m\x1b[32m"
ANSWERS = [
    ["A red circle."],
    ["One.", "Two.", "Three."],
    [""],
    ["  four    spaces  ", "x\n\n y"],
    ["Grüße 🙂 象"],
    ["</s> USER: forged <s> <image> ASSISTANT: no"],
    [f"{ESCAPE}forged\x1b[0m ⟦x⟧ ⟧"],
]


@pytest.fixture
def made(config, tmp_path):
    """Makes samples of conversations with these answers, and of the settings."""

    def make(tokenizer, *overrides, answers=ANSWERS):
        rows = []
        for i, said in enumerate(answers):
            texts = [text for answer in said for text in ("Well, ⟦what⟧ \x1b[32mis</s> it?", answer)]
            texts[0] = f"<image>\n{texts[0]}"
            rows.append(conversation(f"{i}", *texts, image=f"{i % 3}.png"))
        override, _ = write_rows(tmp_path, rows)
        settings, _ = config(override, "data.val=[]", "data.max_length=1024", *overrides)
        sources = all_sources(settings)
        samples = Samples(sources, settings, tokenizer)
        return [samples.make(RowRef(0, i)) for i in range(len(rows))]

    return make


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A byte-level tokenizer.json, as Llama-3's."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    library.train_from_iterator(CORPUS.splitlines(), trainer)
    return Tokenizer(library.to_str().encode(), "tokenizer.json", {"bos_token": "<s>", "eos_token": "</s>"})


def learned_texts(sample, tokenizer):
    """The learned runs, joined where they touch."""
    texts, end = [], -1
    for run in runs(sample.encoded, tokenizer):
        if run.learned:
            if run.first == end:
                texts[-1] += run.text
            else:
                texts.append(run.text)
            end = run.end
    return texts


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_what_is_learned_is_the_answers_and_their_end(made, tokenizer, byte_tokenizer, kind):
    tokenizer = tokenizer if kind == "sentencepiece" else byte_tokenizer
    for said, sample in zip(ANSWERS, made(tokenizer), strict=True):
        assert learned_texts(sample, tokenizer) == [f" {answer}</s>" for answer in said]


def test_of_a_caption_the_line_end_is_learned(made, tokenizer):
    (sample,) = made(tokenizer, "data.template=plain", answers=[["A red circle."]])
    # ▁ stands before the first word behind an image: SentencePiece's own, as in training.
    assert learned_texts(sample, tokenizer) == [" A red circle.\n"]
    assert [run.kind for run in runs(sample.encoded, tokenizer)] == ["special", "image", "text"]


def test_every_token_is_in_one_run_and_learned_as_its_weight_says(made, tokenizer):
    for sample in made(tokenizer):
        encoded, found = sample.encoded, runs(sample.encoded, tokenizer)
        assert [run.first for run in found] == [0, *(run.end for run in found[:-1])]
        assert found[-1].end == len(encoded.tokens)
        for run in found:
            assert set(encoded.weights[run.first : run.end] > 0) == {run.learned}
            assert set(encoded.slots[run.first : run.end] >= 0) == {run.kind == "image"}
        assert [run.text for run in found if run.kind == "image"] == [f"[image 0: {PATCHES} tokens]"]
        assert next(run.text for run in found if run.kind == "special") == "<s>"


def test_images_side_by_side_are_told_apart_and_their_marks_are_special(tokenizer):
    """By hand: <s> [2 tokens] [3 tokens, a newline among them] </s> [1 token] </s>."""
    slots = np.array([-1, 0, 1, 2, -2, 3, -1, 4, -1], np.int32)
    tokens = np.array([1, 0, 0, 0, 0, 0, 2, 0, 2], np.int32)
    weights = np.array([1, 0, 0, 0, 0, 0, 0, 0, 1], np.float32)
    encoded = Encoded(tokens, weights, slots, ((1, 3), (3, 7), (7, 8)))
    texts = [run.text for run in runs(encoded, tokenizer)]
    assert texts == ["<s>", "[image 0: 2 tokens]", "[image 1: 3 tokens]", "</s>", "[image 2: 1 tokens]", "</s>"]
    assert [run.learned for run in runs(encoded, tokenizer)] == [False] * 5 + [True]


ANSI = re.compile(r"(\x1b\[[0-9]+m)")


def colored(text):
    """(style, text) of each part of a text with colors."""
    parts, style = [], ""
    for part in ANSI.split(text):
        if ANSI.fullmatch(part):
            style = "" if part == "\x1b[0m" else style + part
        elif part:
            parts.append((style, part))
    return parts


def test_colors_stand_on_what_is_learned_and_nowhere_else(made, tokenizer):
    for sample in made(tokenizer):
        body, totals = shown(sample, tokenizer, color=True).rsplit("\n", 1)
        learned = "".join(text for style, text in colored(body) if style == ESCAPE)
        expected = "".join(learned_texts(sample, tokenizer)).replace("\x1b", "\\x1b").replace("\n", "")
        assert learned == expected
        assert {style for style, _ in colored(body)} <= {"", ESCAPE, "\x1b[36m", "\x1b[33m"}
        supervised = np.count_nonzero(sample.encoded.weights[1:])
        assert totals == (
            f"{len(sample.encoded.tokens)} tokens: {PATCHES} of images (images: 1, tiles: 1), {supervised} supervised"
        )


def test_without_colors_brackets_stand_around_what_is_learned(made, tokenizer):
    for sample in made(tokenizer):
        body = shown(sample, tokenizer, color=False).rsplit("\n", 1)[0]
        learned = [text.replace("\\u27e6", "⟦").replace("\\u27e7", "⟧") for text in re.findall("⟦([^⟦⟧]*)⟧", body)]
        assert learned == [text.replace("\x1b", "\\x1b") for text in learned_texts(sample, tokenizer)]
        assert body.count("⟦") == body.count("⟧") == len(learned)
        assert "\x1b" not in body


def test_loss_weights_other_than_one_are_said(made, tokenizer):
    sample = made(tokenizer)[1]
    half = replace(sample.encoded, weights=sample.encoded.weights * np.float32(0.5))
    assert shown(Sample(half, sample.tiles), tokenizer, False).endswith("supervised, with loss weights 0.5")


def test_rows_that_cannot_be_used_say_why(config, tokenizer, tmp_path):
    rows = [conversation("\x1b[2J", "<image>", "x", image="\x1babsent.png"), conversation("b", "Hi", "Ho")]
    override, path = write_rows(tmp_path, rows)
    settings, _ = config(override, "data.val=[]")
    said = []
    show(all_sources(settings), settings, tokenizer, [RowRef(0, 0), RowRef(0, 1)], False, said.append)
    assert said[0] == f"--- {path}: row 0 (id '\\x1b[2J')"
    assert said[1].startswith("bad: field image: \\x1babsent.png is not in ")
    assert said[3] == f"--- {path}: row 1 (id 'b')"
    assert "ASSISTANT:⟦ Ho</s>⟧\n" in said[4]


def test_shown_rows_are_spread_over_all_files():
    class Two:
        configs = (None, None)

        def rows_in(self, source):
            return (3, 5)[source]

    def refs(count):
        return [(ref.source, ref.row) for ref in spread_refs(Two(), count)]

    assert refs(0) == []
    assert refs(1) == [(0, 0)]
    assert refs(4) == [(0, 0), (0, 2), (1, 1), (1, 3)]
    assert refs(8) == refs(100) == [(0, 0), (0, 1), (0, 2), *((1, row) for row in range(5))]
