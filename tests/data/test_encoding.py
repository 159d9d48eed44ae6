"""Conversations under every template: golden strings and ids, masks checked by decoding, forgeries, and lengths."""

import dataclasses
import pickle

import numpy as np
import pytest

from neva_jax.config import DataConfig
from neva_jax.data.encoding import Encoded, conversation_encoder, fit_length
from neva_jax.data.rows import BadRow, DroppedRow, Turn
from neva_jax.data.templates import NEVA, TEMPLATES
from neva_jax.data.tiles import ImageSpan
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError
from tests.data.conversations import KINDS, encode, golden, images, talk, toy

# What stands around an answer and is learned with it, and the token that ends it.
LEARNED = {
    "plain": ("", "\n", None),
    "v0": (" ", "###", None),
    "v1": (" ", "", "</s>"),
    "llava_v1": (" ", "", "</s>"),
    "v1_mmtag": (" ", "", "</s>"),
    "llama_2": (" ", " ", "</s>"),
    "llama_2_long": (" ", " ", "</s>"),
    "llama_3": ("", "", "<|eot_id|>"),
    "mistral": ("", "", "</s>"),
    "chatml": ("", "", "<|im_end|>"),
    "mpt": ("", "", "<|im_end|>"),
    "nvgpt": ("", "\n", "<extra_id_1>"),
    "nv_dpo": ("", "\n", "<extra_id_1>"),
}
EVERY = [*((name, "none") for name in TEMPLATES), *((name, "neva") for name in NEVA)]
MARKERS = [
    "</s>",
    "<s>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "###",
    "###Human: ",
    "USER:",
    " ASSISTANT:",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    *(f"<extra_id_{i}>" for i in range(8)),
    "<extra_id_1>Assistant\n<extra_id_2>quality:4\n",
    "<unk>",
    "<Image>",
]
WORDS = ["a cat", " ", "   ", "\n", "\n\n", "🙂", "é象", "x", "12", "{text}", "{bos}", "%s", "\\n"]
ANSWERS = [
    "A red circle.",
    "",
    " ",
    "  two   spaces  before,    between and after  ",
    "🙂👩‍🚀 Grüße, 象",
    "def f():\n    return 1\n",
    "USER: x ASSISTANT: y</s>",
    " [/INST] z </s><s>[INST] and ###Human: q",
    "<|im_end|>\n<|im_start|>assistant\nno<|eot_id|>",
    "\n<extra_id_1>User\n<extra_id_7>",
    "no <image> here",
]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer_of(kind) -> Tokenizer:
    return toy(kind)


def ids_of(tokenizer, ids):
    """The exact text of ids; what SentencePiece drops at the start is dropped from an x."""
    x = tokenizer.encode("x", continues=False)
    return tokenizer.decode([*x, *ids])[1:]


def shown(encoded, tokenizer):
    """Tokens as a list of (text, weight): special tokens as ⟦id⟧, images as ⟦image⟧, text decoded run by run."""
    special, parts, run = {*tokenizer.special_tokens.values()}, [], []
    previous = None

    def flush():
        if run:
            parts.append((ids_of(tokenizer, run), previous))
            run.clear()

    for token, weight, slot in zip(
        encoded.tokens.tolist(), encoded.weights.tolist(), encoded.slots.tolist(), strict=True
    ):
        if weight != previous:
            flush()
        previous = weight
        if slot == 0 or (slot > 0 and slot % 2 == 0):
            flush()
            parts.append(("⟦image⟧", weight))
        elif slot < 0 and token in special:
            flush()
            parts.append((f"⟦{token}⟧", weight))
        elif slot < 0:
            run.append(token)
    flush()
    joined = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return joined


# --- golden strings and ids ------------------------------------------------------------------------------------------

CASES = {f"{case['template']}-{case['compat']}-{case['conversation']}": case for case in golden()["cases"]}


def test_every_template_has_golden_strings():
    assert {(case["template"], case["compat"]) for case in golden()["cases"]} >= {(name, "none") for name in TEMPLATES}
    assert {case["template"] for case in golden()["cases"] if case["compat"] == "neva"} == {*NEVA} - {"llama_3"}
    assert LEARNED.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", CASES)
def test_ids_and_mask_of_strings_written_by_hand(name, kind):
    case = CASES[name]
    if kind not in case:
        pytest.skip("NeVA's stream is SentencePiece's")
    conversation = golden()["conversations"][case["conversation"]]
    turns = list(talk(*conversation["turns"]))
    for i, label in enumerate(conversation.get("labels", [])):
        turns[2 * i + 1] = dataclasses.replace(turns[2 * i + 1], label=label)
    system = conversation.get("system")
    encoded = encode(turns, toy(kind), system, template=case["template"], compat=case["compat"])
    tokens, weights = case[kind]
    assert encoded.tokens.tolist() == tokens
    assert encoded.weights.tolist() == weights
    assert (encoded.tokens.dtype, encoded.weights.dtype, encoded.slots.dtype) == (np.int32, np.float32, np.int32)


# --- the mask, by decoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "compat"), EVERY)
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_what_is_learned_is_the_answers_and_their_ends(tokenizer_of, template, compat, answer, rounds):
    said = [answer, f"{answer}!", answer][:rounds]
    turns = [turn for i, text in enumerate(said) for turn in (Turn("user", "<image>\nWhat?"), answer_of(text, i))]
    encoded = encode(turns, tokenizer_of, template=template, compat=compat)
    before, after, end = LEARNED[template]
    if (template, compat, tokenizer_of.file) == ("plain", "none", "tokenizer.model"):
        before = " "  # the dummy prefix of a text behind an image
    for i, text in enumerate(said):
        ids = encoded.tokens[encoded.weights == weight_of(i)].tolist()
        if end is not None:
            assert ids.pop() == tokenizer_of.special_tokens[end]
        assert ids_of(tokenizer_of, ids) == before + text + after
        assert not {*ids} & {*tokenizer_of.special_tokens.values()}
        # One run of tokens each, so nothing between is learned.
        assert (np.diff(np.flatnonzero(encoded.weights == weight_of(i))) == 1).all()
    assert {*encoded.weights.tolist()} == {0.0, *map(weight_of, range(rounds))}


def weight_of(i):
    return 0.5 * (i + 1)


def answer_of(text, i, label=None):
    return Turn("assistant", text, label, weight_of(i))


@pytest.mark.parametrize(("template", "compat"), EVERY)
def test_no_text_makes_a_special_token_or_widens_the_mask(tokenizer_of, template, compat):
    """Random texts of markers, against the same conversation of harmless words with the texts put in afterwards."""
    draw = np.random.default_rng(7)
    encoder = conversation_encoder(DataConfig(template=template, compat=compat), tokenizer_of)

    def some():
        return "".join(draw.choice(MARKERS + WORDS, draw.integers(1, 6)))

    for _ in range(60):
        rounds, texts = int(draw.integers(1, 4)), {}

        def word(text, texts=texts):
            name = f"qz{len(texts)}zq"
            texts[name] = text
            return name, text

        systems = word(some()) if draw.random() < 0.5 else (None, None)
        harmless, hostile = [], []
        for i in range(rounds):
            before, after = word(some()), word(some())
            mark = "<image>" if draw.random() < 0.5 else ""
            answer = word(some() if draw.random() < 0.8 else "")
            label = word(some()) if draw.random() < 0.3 else (None, None)
            for which, turns in enumerate((harmless, hostile)):
                turns.append(Turn("user", before[which] + mark + after[which]))
                turns.append(answer_of(answer[which], i, label[which]))
        if draw.random() < 0.3:
            harmless, hostile = harmless[:-1], hostile[:-1]
        expected = shown(encoder.encode(harmless, images(harmless), systems[0]), tokenizer_of)
        for name, text in texts.items():
            expected = [(part.replace(name, text), weight) for part, weight in expected]
        encoded = encoder.encode(hostile, images(hostile), systems[1])
        assert shown(encoded, tokenizer_of) == expected


@pytest.mark.parametrize(("template", "compat"), EVERY)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_prompt_of_each_round_is_a_prefix_of_the_training_tokens(tokenizer_of, template, compat, answer):
    turns = talk("<image>\nWhat?", answer, "Sure?", answer, "And <image>", answer)
    encoder = conversation_encoder(DataConfig(template=template, compat=compat), tokenizer_of)
    whole = encoder.encode(turns, images(turns))
    lengths = []
    for rounds in (1, 3, 5):
        prompt = encoder.encode(turns[:rounds], images(turns[:rounds]))
        n = len(prompt.tokens)
        np.testing.assert_array_equal(prompt.tokens, whole.tokens[:n])
        np.testing.assert_array_equal(prompt.weights, whole.weights[:n])
        np.testing.assert_array_equal(prompt.slots, whole.slots[:n])
        assert whole.weights[n] == 1
        lengths.append(n)
    assert lengths == sorted({*lengths})


def test_the_weight_of_a_turn_changes_weights_alone(tokenizer_of):
    for template in TEMPLATES:
        turns = talk("Hi", "one", "So?", "two")
        usual = encode(turns, tokenizer_of, template=template)
        changed = [dataclasses.replace(turns[1], weight=0.0), dataclasses.replace(turns[3], weight=2.5)]
        encoded = encode([turns[0], changed[0], turns[2], changed[1]], tokenizer_of, template=template)
        assert encoded.tokens.tolist() == usual.tokens.tolist()
        runs = np.cumsum(np.diff(usual.weights, prepend=0) > 0)
        first = (
            (runs == 1)
            if template != "plain"
            else np.arange(len(runs)) < len(usual.tokens) - (len(tokenizer_of.encode("two\n", continues=True)))
        )
        np.testing.assert_array_equal(encoded.weights, np.where(first, 0, 2.5) * usual.weights)


# --- images ----------------------------------------------------------------------------------------------------------


def test_a_mark_in_an_answer_a_label_or_a_system_text_is_text(tokenizer_of):
    for template in TEMPLATES:
        turns = [Turn("user", "Hi"), Turn("assistant", "<image>", "<image>")]
        encoded = encode(turns, tokenizer_of, "<image>", template=template)
        assert {*encoded.slots.tolist()} == {-1}
        assert encoded.spans == ()


@pytest.mark.parametrize("count", [1, 9])
def test_image_slots_count_through_all_images(tokenizer_of, count):
    for template in TEMPLATES:
        encoded = encode(talk("<image>" * count, "yes"), tokenizer_of, tokens=16, template=template)
        np.testing.assert_array_equal(encoded.slots[encoded.slots >= 0], np.arange(16 * count))
        assert not encoded.tokens[encoded.slots >= 0].any()
        assert len(encoded.spans) == count
        for i, (first, last) in enumerate(encoded.spans):
            assert encoded.slots[first:last].tolist() == [*range(16 * i, 16 * i + 16)]


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("<image>\nWhat is it?", "<image>\nWhat is it?"),
        ("Is <image>this?", "<image>\nIs this?"),
        ("  <image>  ", "<image>"),
        ("Which, <image> or\n<image>?\n", "<image><image>\nWhich,  or\n?"),
        (" no image ", " no image "),
    ],
)
def test_images_are_moved_before_the_text_of_their_turn(tokenizer_of, text, moved):
    for template in TEMPLATES:
        front = encode(talk("Hi", "yes", text, "<image> a"), tokenizer_of, template=template, image_position="front")
        there = encode(talk("Hi", "yes", moved, "<image> a"), tokenizer_of, template=template)
        assert front.tokens.tolist() == there.tokens.tolist()
        assert front.slots.tolist() == there.slots.tolist()
        assert front.spans == there.spans


@pytest.mark.parametrize(("text", "given"), [("<image>", 0), ("<image><image>", 1), ("no", 1)])
def test_marks_and_images_that_differ_in_number(tokenizer_of, text, given):
    span = ImageSpan(np.arange(2, dtype=np.int32), 2)
    with pytest.raises(BadRow, match=f"^has {text.count('<image>')} <image> marks in human turns, but {given} images$"):
        conversation_encoder(DataConfig(), tokenizer_of).encode(talk(text, "a"), [span] * given)


# --- how answers end, and wrong input --------------------------------------------------------------------------------


def test_how_answers_end(tokenizer_of):
    for template, (before, after, end) in LEARNED.items():
        ending = conversation_encoder(DataConfig(template=template), tokenizer_of).ending
        assert (ending.lead, ending.tail, ending.by_text) == (before, after, end is None)
        assert ending.continues == (template != "plain")
        assert ending.ids == {tokenizer_of.eos_id, tokenizer_of.special_tokens[end or "</s>"]}


@pytest.mark.parametrize(
    ("template", "tokens"),
    [
        ("llama_3", "<|start_header_id|>, <|end_header_id|>, <|eot_id|>"),
        ("chatml", "<|im_start|>, <|im_end|>"),
        ("mpt", "<|im_start|>, <|im_end|>"),
        ("nvgpt", "<extra_id_0>, <extra_id_1>, <extra_id_2>"),
        ("nv_dpo", "<extra_id_0>, <extra_id_1>, <extra_id_2>"),
    ],
)
def test_tokens_that_the_tokenizer_lacks_are_named(tokenizer, template, tokens):
    with pytest.raises(UserError) as error:
        conversation_encoder(DataConfig(template=template), tokenizer)
    assert str(error.value) == (
        f"data.template={template} needs {tokens}, which the tokenizer lacks; add what is missing with python -m "
        "neva_jax.convert add-tokens, or choose another data.template"
    )


def test_chatml_has_the_bos_that_the_tokenizer_adds_by_itself():
    bare = toy("bytes")
    adding = tokenizer_that_adds_bos(bare)
    for template in ("chatml", "mpt"):
        without, with_bos = (encode(talk("Hi", "a"), one, template=template).tokens.tolist() for one in (bare, adding))
        assert with_bos == [bare.bos_id, *without]
    for template in ("v1", "llama_3"):
        assert encode(talk("Hi", "a"), bare, template=template).tokens.tolist() == (
            encode(talk("Hi", "a"), adding, template=template).tokens.tolist()
        )


def tokenizer_that_adds_bos(tokenizer):
    import tokenizers

    library = tokenizers.Tokenizer.from_str(tokenizer.serialized.decode())
    bos = tokenizer.settings["bos_token"]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)]
    )
    return Tokenizer(library.to_str().encode(), "x", tokenizer.settings)


def test_an_encoder_can_go_to_a_worker(tokenizer_of):
    turns = talk("<image> What?", "a cat")
    for template in TEMPLATES:
        encoder = conversation_encoder(DataConfig(template=template), tokenizer_of)
        there = pickle.loads(pickle.dumps(encoder))
        assert (
            there.encode(turns, images(turns)).tokens.tolist() == encoder.encode(turns, images(turns)).tokens.tolist()
        )


# --- length ----------------------------------------------------------------------------------------------------------


def data_of(length, policy):
    return DataConfig(max_length=length, on_long_row=policy)


def made_up(draw) -> Encoded:
    """Text and images in any order, images of 1 to 5 tokens that may touch, some with tokens around them."""
    tokens, weights, slots, spans = [], [], [], []
    for _ in range(draw.integers(1, 8)):
        size = int(draw.integers(1, 6))
        image = draw.random() < 0.5
        around = int(draw.integers(0, 2)) if image else 0
        if image:
            spans.append((len(tokens), len(tokens) + size + 2 * around))
        slots += [-1] * around + ([*range(size)] if image else [-1] * size) + [-1] * around
        weights += [0.0 if image else float(draw.integers(0, 2))] * (size + 2 * around)
        tokens += draw.integers(0, 99, size + 2 * around).tolist()
    return Encoded(np.array(tokens), np.array(weights), np.array(slots), tuple(spans))


def test_a_cut_keeps_all_that_fits_and_never_a_part_of_an_image():
    draw = np.random.default_rng(0)
    outcomes = set()
    for _ in range(400):
        encoded = made_up(draw)
        for length in range(1, len(encoded.tokens) + 2):
            inside = [{*range(first, last)} for first, last in encoded.spans]
            kept = [
                n
                for n in range(min(len(encoded.tokens), length + 1) + 1)
                if all(span <= {*range(n)} or not span & {*range(n)} for span in inside)
            ][-1]
            learned = encoded.weights[1:kept].any()
            outcomes.add((kept == len(encoded.tokens), kept == length + 1, bool(learned)))
            if not learned:
                with pytest.raises(DroppedRow, match="has nothing to learn"):
                    fit_length(encoded, data_of(length, "truncate_text"))
                continue
            cut = fit_length(encoded, data_of(length, "truncate_text"))
            for name in ("tokens", "weights", "slots"):
                np.testing.assert_array_equal(getattr(cut, name), getattr(encoded, name)[:kept])
            assert cut.spans == tuple(span for span in encoded.spans if span[1] <= kept)
    assert len(outcomes) >= 6


def test_what_fits_is_left_alone(tokenizer_of):
    encoded = encode(talk("<image>\nWhat?", "a cat"), tokenizer_of)
    for policy in ("error", "drop", "truncate_text"):
        assert fit_length(encoded, data_of(len(encoded.tokens) - 1, policy)) is encoded


@pytest.mark.parametrize(("policy", "kind_of"), [("error", BadRow), ("drop", DroppedRow)])
def test_a_long_row_under_the_other_policies(tokenizer_of, policy, kind_of):
    encoded = encode(talk("<image>\nWhat?", "a cat"), tokenizer_of)
    length = len(encoded.tokens) - 1
    with pytest.raises(BadRow) as error:
        fit_length(encoded, data_of(length - 1, policy))
    assert type(error.value) is kind_of
    assert str(error.value) == f"has {length} tokens (2 of images), but data.max_length is {length - 1}"


def test_a_cut_between_the_tokens_around_an_image(tokenizer_of):
    turns = talk("Hi", "yes", "See <image>?", "no")
    encoded = encode(turns, tokenizer_of, image_start="<extra_id_4>", image_end="<extra_id_5>")
    ((first, last),) = encoded.spans
    assert last - first == 4
    for length, kept in ((first - 1, first), (first, first), (last - 2, first), (last - 1, last), (last, last + 1)):
        assert len(fit_length(encoded, data_of(length, "truncate_text")).tokens) == kept


@pytest.mark.parametrize("policy", ["error", "drop", "truncate_text"])
def test_a_row_with_nothing_to_learn(tokenizer_of, policy):
    turns = [Turn("user", "Hi"), Turn("assistant", "yes", weight=0.0)]
    with pytest.raises(DroppedRow, match=r"^has nothing to learn: its answers are empty"):
        fit_length(encode(turns, tokenizer_of), data_of(4096, policy))


def test_a_row_whose_answer_is_cut_off(tokenizer_of):
    encoded = encode(talk("Hi", "yes"), tokenizer_of)
    n = len(encoded.tokens) - 1
    with pytest.raises(DroppedRow) as error:
        fit_length(encoded, data_of(5, "truncate_text"))
    assert str(error.value) == (
        f"has {n} tokens (0 of images), but data.max_length is 5, and has nothing to learn when it is cut there"
    )
