"""`tokenizer.json` against the `tokenizers` library and transformers, which encode the whole text in one go.

Five tiny tokenizers of the layouts that the models of the family have, trained here:

    llama3      byte-level, Split + ByteLevel, ignore_merges, added tokens after the vocabulary, <|begin_of_text|> first
    qwen2       byte-level, NFC, no bos, one added token that is not special
    smollm2     byte-level, Digits + ByteLevel, special tokens inside the vocabulary
    llama2      ▁ by a Prepend normalizer, byte fallback; merges that spell </s> and <s>
    metaspace   ▁ by a Metaspace pre-tokenizer at the first word, byte fallback
"""

import hashlib
import itertools
import json
import pickle
import time
import unicodedata

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from neva_jax.config import Config
from neva_jax.configfile import load_config
from neva_jax.data.tokenizer import Tokenizer, add_tokens
from neva_jax.errors import UserError
from neva_jax.training.checkpoint_meta import Meta, read_meta
from neva_jax.training.resume import resumed_meta

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is in the picture? ASSISTANT:",
    "It's a red circle on a white ground, 12 squares and 345 dogs; they're here.\nHow many shapes are there?\n\n",
    "    def area(side):    return side * side  # four  spaces",
    "Grüße aus Köln, 象は鼻が長い, 🙂🙂",
] * 4
TEXTS = [
    CORPUS[0],
    "A red circle, 2 squares and 1024 dogs; it's o'clock: WE'LL see",
    "two trailing  spaces,  four    spaces  ",
    "line one\nline two\n\n\tindented\r\n \n x",
    "unseen: Grüße, 象は鼻が長い, 🙂👩‍🚀🇨🇭, \u200b\ufeff\x00\x7f",
    "<0x41> <unused> [INST] ▁ĠĊ",
    "x",
    "",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
KINDS = ("llama3", "qwen2", "smollm2", "llama2", "metaspace")
BYTE_LEVEL = KINDS[:3]
ADDED = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
    "llama2": ["<unk>", "<s>", "</s>"],
    "metaspace": ["<unk>", "<s>", "</s>", "<image>"],
}
SPELLED_OUT = {"__type": "AddedToken", "content": "</s>", "special": True, "normalized": False}
CONFIGS = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2": {"bos_token": None, "eos_token": "<|im_end|>"},
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "llama2": {"bos_token": "<s>", "eos_token": SPELLED_OUT},
    "metaspace": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}


def byte_level(kind):
    """A byte-level tokenizer, as the library makes it."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")
    first = pre_tokenizers.Digits(individual_digits=True)
    if kind != "smollm2":
        first = pre_tokenizers.Split(Regex(LLAMA3 if kind == "llama3" else QWEN2), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([first, plain])
    library.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        library.normalizer = normalizers.NFC()
    inside = ADDED[kind] if kind == "smollm2" else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=inside, show_progress=False),
    )
    for token in ADDED[kind]:
        library.add_tokens([AddedToken(token, special=token != "<tool_call>", normalized=False)])
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    if kind == "llama3":
        bos = ADDED[kind][0]
        ids = [(bos, library.token_to_id(bos))]
        library.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return json.loads(library.to_str())


def metaspace(kind):
    """A tokenizer in the layout of Llama's SentencePiece model."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    first = [*ADDED[kind], *(f"<0x{byte:02X}>" for byte in range(256))]
    library.train_from_iterator(
        CORPUS[:3] * 4, trainers.BpeTrainer(vocab_size=500, special_tokens=first, show_progress=False)
    )
    library.pre_tokenizer = None
    if kind == "llama2":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", library.token_to_id("<s>"))]
    )
    content = json.loads(library.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in ADDED[kind]]
    if kind == "llama2":  # as a conversion of all pieces to merges would have it
        model = content["model"]
        for piece in ("<", "/", "s", ">", "s>", "</", "<s"):
            model["vocab"].setdefault(piece, len(model["vocab"]))
        model["merges"][:0] = [["s", ">"], ["<", "/"], ["<", "s"], ["</", "s>"], ["<", "s>"], ["<s", ">"]]
    return content


@pytest.fixture(scope="module")
def contents():
    """Kind -> content of its tokenizer.json. Do not change them."""
    return {kind: (byte_level if kind in BYTE_LEVEL else metaspace)(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(contents, tmp_path_factory):
    """Kind -> folder with tokenizer.json and tokenizer_config.json. Do not change them."""
    found = {}
    for kind, content in contents.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        (found[kind] / "tokenizer.json").write_text(json.dumps(content))
        settings = {**CONFIGS[kind], "tokenizer_class": "PreTrainedTokenizerFast"}
        (found[kind] / "tokenizer_config.json").write_text(json.dumps(settings))
    return found


@pytest.fixture(scope="module")
def loaded(folders):
    return {kind: Tokenizer.from_file(folder / "tokenizer.json") for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def ours(loaded, kind):
    return loaded[kind]


@pytest.fixture
def library(folders, kind):
    return tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))


@pytest.fixture
def edited(contents, kind):
    """edit(content) -> bytes of the file after it."""

    def make(edit):
        content = json.loads(json.dumps(contents[kind]))
        edit(content)
        return json.dumps(content).encode()

    return make


def only(*kinds):
    return pytest.mark.parametrize("kind", kinds)


def joined(tokenizer, parts):
    """The ids of a text that is encoded part by part."""
    return list(itertools.chain(*(tokenizer.encode(part, continues=i > 0) for i, part in enumerate(parts))))


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        Tokenizer(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- encoding segments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_whole_text_has_the_ids_that_the_library_gives(ours, library, text):
    assert ours.encode(text, continues=False) == library.encode(text, add_special_tokens=False).ids


def test_a_whole_text_has_the_ids_that_transformers_gives(ours, folders, kind):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folders[kind])
    assert reference.is_fast and len(reference) == ours.size
    assert (reference.bos_token_id, reference.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False)
        assert ours.encode(text, continues=False) == ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@only("qwen2")
def test_ids_are_those_of_the_model_class_of_qwen2(ours, folders, kind):
    from transformers import Qwen2TokenizerFast

    reference = Qwen2TokenizerFast.from_pretrained(folders[kind])
    for text in TEXTS:
        assert ours.encode(text, continues=False) == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS[:2])
def test_segments_split_before_words_join_to_the_ids_of_the_whole(ours, library, text):
    """No piece of these reaches across a word's start, so any of these cuts leave the ids as they are."""
    whole = library.encode(text, add_special_tokens=False).ids
    words = text.split(" ")
    for cut in range(1, len(words)):
        assert joined(ours, [" ".join(words[:cut]), " " + " ".join(words[cut:])]) == whole
    assert joined(ours, [words[0], *(f" {word}" for word in words[1:])]) == whole


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_split_anywhere_decodes_to_itself(ours, library, kind, text):
    draw = np.random.default_rng(0)
    cuts = [[cut] for cut in range(1, len(text))]
    cuts += [sorted({*draw.integers(1, len(text), 5).tolist()}) for _ in range(20 if len(text) > 1 else 0)]
    for cut in [[], *cuts]:
        parts = [text[a:b] for a, b in itertools.pairwise([0, *cut, len(text)])]
        ids = joined(ours, parts)
        assert ours.decode(ids) == (text if kind in BYTE_LEVEL else text.replace("▁", " ")), parts
        assert library.decode(ids) == ours.decode(ids), parts


@only("llama2", "metaspace")
def test_only_a_starting_segment_gets_the_prefix(ours, library):
    def written(text, continues):
        return "".join(library.id_to_token(i) for i in ours.encode(text, continues))

    assert written("red", continues=False) == "▁red"
    assert written("red", continues=True) == "red"
    assert written(" red", continues=True) == "▁red"
    assert written("  red", continues=True) == "▁▁red"
    assert ours.encode("", continues=False) == ours.encode("", continues=True) == []
    assert ours.decode(ours.encode(" red", continues=True)) == "red"


@only(*BYTE_LEVEL)
def test_byte_level_segments_are_alike_wherever_they_stand(ours, library):
    for text in [*TEXTS, " red", "  red"]:
        ids = ours.encode(text, continues=True)
        assert ids == ours.encode(text, continues=False)
        assert ours.decode(ids) == library.decode(ids) == text


@only("metaspace")
def test_the_older_spelling_of_metaspace(edited, ours):
    def older(content):
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        del content["model"]["type"]

    serialized = edited(older)
    library = tokenizers.Tokenizer.from_str(serialized.decode())
    tokenizer = Tokenizer(serialized)
    for text in TEXTS[:3]:
        assert tokenizer.encode(text, continues=False) == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(f" {text}", continues=True) == ours.encode(f" {text}", continues=True)


@only("qwen2")
def test_unicode_normalization_is_that_of_the_file(ours):
    text = unicodedata.normalize("NFD", "Grüße é")
    assert ours.decode(ours.encode(text, continues=False)) == unicodedata.normalize("NFC", text)


@only("llama3")
def test_truncation_and_padding_are_not_applied(edited, ours, contents, kind):
    library = tokenizers.Tokenizer.from_str(json.dumps(contents[kind]))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    tokenizer = Tokenizer(library.to_str().encode())
    assert tokenizer.encode(TEXTS[0], continues=False) == ours.encode(TEXTS[0], continues=False)


# --- special tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continues", [False, True])
def test_text_never_produces_a_special_token(ours, library, kind, continues):
    special = {library.token_to_id(token): token for token in ADDED[kind]}
    assert len(special) == len(ADDED[kind])
    for i, word in special.items():
        # The library itself does match them in text.
        assert i in library.encode(f"a{word}b", add_special_tokens=False).ids
        for text in (
            word,
            f" {word}",
            f"a{word}b",
            f"say {word} twice: {word}{word}",
            f"{word}\n",
            f"x {word} </s><s>",
        ):
            ids = ours.encode(text, continues)
            assert not {*special} & {*ids}, text
            assert library.decode(ours.encode(".", continues=False) + ours.encode(text, True)) == "." + text


@only("llama2")
def test_without_its_added_tokens_the_library_would_merge_them(ours, contents, kind):
    """What the copy that encodes is good for: the merges spell </s>."""
    content = {**contents[kind], "added_tokens": [], "post_processor": None}
    naive = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert ours.eos_id in naive.encode("</s>").ids
    assert ours.eos_id not in ours.encode("</s>", continues=True)


@only("llama3")
def test_a_special_token_that_is_a_whole_word_of_the_vocabulary(edited, contents, kind):
    """With ignore_merges the library takes a whole word from the vocabulary at once."""

    def make_special(content):
        content["added_tokens"].insert(0, {**content["added_tokens"][0], "id": word_id, "content": word})

    word = next(p for p, i in contents[kind]["model"]["vocab"].items() if p == "square" or (len(p) > 3 and p.isalpha()))
    word_id = contents[kind]["model"]["vocab"][word]
    tokenizer = Tokenizer(edited(make_special))
    assert tokenizer.token_id(word) == word_id
    for text in (word, f"{word}s", f"x{word}"):
        ids = tokenizer.encode(text, continues=False)
        assert word_id not in ids
        assert tokenizer.decode(ids) == text


def test_special_ids_are_found_by_name(ours, library, kind):
    for token in ADDED[kind]:
        assert ours.token_id(token) == library.token_to_id(token)
    assert ours.token_id("a") is None  # a piece of text
    assert ours.token_id("<|nothing|>") is None


def test_special_ids_of_sentencepiece_are_found_by_name(tokenizer):
    serialized, (new,) = add_tokens(tokenizer.serialized, ["<new>"], False, "x")
    assert [Tokenizer(serialized).token_id(name) for name in ("<s>", "</s>", "<new>", "▁a", "<0x41>")] == [
        1,
        2,
        new,
        None,
        None,
    ]


def test_decode_drops_special_tokens_and_keeps_other_added_ones(ours, kind):
    answer, more = ours.encode("It is blue.", continues=False), ours.encode(" Yes, 🙂", continues=True)
    special = [ours.token_id(token) for token in ADDED[kind] if token != "<tool_call>"]
    assert ours.decode([*special, *answer, ours.eos_id, *more, *special]) == "It is blue. Yes, 🙂"
    assert ours.decode(special) == ours.decode([]) == ""
    if kind == "qwen2":
        assert ours.decode([*answer, ours.token_id("<tool_call>"), *more]) == "It is blue.<tool_call> Yes, 🙂"


# --- bos, eos and the other properties -------------------------------------------------------------------------------


def test_properties_are_those_of_the_files(ours, library, folders, kind):
    serialized = (folders[kind] / "tokenizer.json").read_bytes()
    assert ours.serialized == serialized
    assert ours.sha256 == hashlib.sha256(serialized).hexdigest()
    assert ours.file == "tokenizer.json"
    assert ours.size == library.get_vocab_size(with_added_tokens=True)
    names = {"llama2": ("<s>", "</s>")}.get(kind, (CONFIGS[kind]["bos_token"], CONFIGS[kind]["eos_token"]))
    assert tuple(ours.settings.values()) == names
    assert ours.bos_id == (None if names[0] is None else library.token_to_id(names[0]))
    assert ours.eos_id == library.token_to_id(names[1])


def test_without_a_configuration_the_names_are_well_known_ones(contents, kind):
    found = Tokenizer(json.dumps(contents[kind]).encode()).settings
    bos, eos = {
        "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
        "qwen2": (None, "<|endoftext|>"),
        "smollm2": (None, "<|endoftext|>"),
    }.get(kind, ("<s>", "</s>"))
    assert found == {"bos_token": bos, "eos_token": eos}


@only("qwen2")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token": {"content": None}}, "no token is known to end an answer; "),
        ({"eos_token": ["a"]}, "has no token ['a'], which tokenizer_config.json gives as eos_token; "),
        (
            {"eos_token": None},
            "no token is known to end an answer; name it as eos_token in tokenizer_config.json beside",
        ),
        (
            {"eos_token": "<end>"},
            "has no token <end>, which tokenizer_config.json gives as eos_token; correct it there",
        ),
        ({"bos_token": "<start>"}, "has no token <start>, which tokenizer_config.json gives as bos_token; correct it"),
        (
            {"added_tokens_decoder": {"900": {"content": "<new>"}}},
            "has no token <new> with id 900, which tokenizer_con",
        ),
    ],
)
def test_a_configuration_that_does_not_fit(folders, kind, settings, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders[kind] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert str(error.value).startswith(f"{tmp_path}/tokenizer.json: {message}")


@only("qwen2")
@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON ("), ("[]", "is no JSON object")])
def test_a_configuration_that_is_broken(folders, kind, text, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders[kind] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert str(error.value).startswith(f"{tmp_path}/tokenizer_config.json: {message}")


@only("qwen2")
def test_no_token_to_end_an_answer(edited):
    assert refusal(edited(lambda content: content.update(added_tokens=[])), "x") == (
        "x: no token is known to end an answer; name it as eos_token in tokenizer_config.json beside the file"
    )


@only("qwen2")
def test_an_end_token_that_is_not_an_added_one_is_special_all_the_same(edited, contents, kind):
    (eos,) = [
        piece for piece, i in contents[kind]["model"]["vocab"].items() if i == len(contents[kind]["model"]["vocab"]) - 1
    ]
    word = eos.replace("Ġ", " ")
    tokenizer = Tokenizer(json.dumps(contents[kind]).encode(), "x", {"bos_token": None, "eos_token": eos})
    assert tokenizer.token_id(eos) == tokenizer.eos_id
    ids = tokenizer.encode(word, continues=True)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == word
    assert tokenizer.decode([tokenizer.eos_id]) == ""


@only("qwen2")
def test_an_end_token_is_never_shown(ours):
    """Even when its added token says special=false."""
    tokenizer = Tokenizer(ours.serialized, "x", {"eos_token": "<tool_call>"})
    assert tokenizer.decode([*tokenizer.encode("It is", continues=False), tokenizer.eos_id]) == "It is"


def test_a_pickled_tokenizer_is_the_same(ours):
    copy = pickle.loads(pickle.dumps(ours))
    for text in (*TEXTS, "a<|im_end|>b</s>"):
        for continues in (False, True):
            ids = ours.encode(text, continues)
            assert copy.encode(text, continues) == ids
            assert copy.decode(ids) == ours.decode(ids)
    for name in ("size", "bos_id", "eos_id", "sha256", "settings", "file"):
        assert getattr(copy, name) == getattr(ours, name)


# --- streams ---------------------------------------------------------------------------------------------------------

STREAMED = "象は🙂👩‍🚀 é\N{REPLACEMENT CHARACTER}x, Grüße 象象象"


@pytest.mark.parametrize("text", [STREAMED, *TEXTS])
def test_a_stream_shows_whole_characters_and_all_of_them(ours, text):
    ids = ours.encode(text, continues=False)
    shown = ""
    for i, part in enumerate(ours.stream(iter(ids))):
        shown += part
        assert ours.decode(ids).startswith(shown)
        assert shown.count("\N{REPLACEMENT CHARACTER}") <= text.count("\N{REPLACEMENT CHARACTER}")
        # Never behind by more than one character, and the replacement characters that could be half ones.
        if i < len(ids):
            settled = ours.decode(ids[: i + 1]).rstrip("\N{REPLACEMENT CHARACTER}")
            assert shown == settled
    assert shown == ours.decode(ids)


def test_a_stream_of_sentencepiece_shows_whole_characters(tokenizer):
    ids = tokenizer.encode(STREAMED, continues=False)
    parts = list(tokenizer.stream(ids))
    assert len(parts) == len(ids) + 1
    assert "".join(parts) == STREAMED
    assert all(text.startswith("".join(parts[:i])) for i, text in enumerate([STREAMED] * len(parts)))


def test_what_stands_before_an_incomplete_character_does_not_change(ours, tokenizer):
    """The library's byte fallback decodes a run of bytes as a whole: one half character at its end spoils it all."""
    for one in (ours, tokenizer):
        ids = one.encode("ok 象は鼻", continues=False)
        settled = [one.decode(ids[:n]).rstrip("\N{REPLACEMENT CHARACTER}") for n in range(len(ids) + 1)]
        assert all(b.startswith(a) for a, b in itertools.pairwise(settled))
        assert settled[-1] == "ok 象は鼻"


def test_a_stream_that_ends_within_a_character_says_so(ours):
    ids = ours.encode("象", continues=False)
    cut = list(ours.stream(ids[:-1]))
    assert cut[-1] == "\N{REPLACEMENT CHARACTER}"
    assert "".join(cut[:-1]) == ""


@only("llama3", "llama2")
def test_random_ids_stream_to_what_they_decode_to(ours, library):
    draw = np.random.default_rng(1)
    for _ in range(50):
        ids = draw.integers(0, ours.size, 40).tolist()
        assert "".join(ours.stream(ids)) == ours.decode(ids)
        if "\N{REPLACEMENT CHARACTER}" not in library.decode(ids):
            assert ours.decode(ids) == library.decode(ids)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def step(ours, tmp_path):
    """A checkpoint step that has no arrays."""
    folder = tmp_path / "run" / "checkpoints" / "3"
    (folder / "meta").mkdir(parents=True)
    for name, content in Meta(3, load_config(None, []), ("llm",), None, ours).files().items():
        (folder / "meta" / name).write_bytes(content)
    (folder / "data").mkdir()
    (folder / "data" / "metadata").write_text("{}")
    return folder


def test_a_checkpoint_gives_the_tokenizer_back(step, ours, folders, kind):
    assert sorted(path.name for path in (step / "meta").iterdir()) == ["meta.json", "tokenizer.json"]
    assert (step / "meta" / "tokenizer.json").read_bytes() == (folders[kind] / "tokenizer.json").read_bytes()
    meta = read_meta(step)
    for name in ("size", "bos_id", "eos_id", "sha256", "settings"):
        assert getattr(meta.tokenizer, name) == getattr(ours, name)
    assert meta.tokenizer.encode(TEXTS[4], continues=True) == ours.encode(TEXTS[4], continues=True)


@only("qwen2")
def test_a_checkpoint_whose_tokenizer_is_another(step):
    path = step / "meta" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"meta/tokenizer\.json: is not the file that the checkpoint was saved with$"):
        read_meta(step)
    path.unlink()
    with pytest.raises(UserError, match=r"meta/tokenizer\.json: cannot be read \(No such file or directory\)$"):
        read_meta(step)


@only("qwen2")
@pytest.mark.parametrize("name", ["../tokenizer.json", "/etc/passwd", "meta.json", "", "../meta/tokenizer.json"])
def test_a_checkpoint_names_a_tokenizer_beside_it(step, name):
    path = step / "meta" / "meta.json"
    described = json.loads(path.read_text())
    described["tokenizer"]["file"] = name
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"is neither tokenizer\.model nor tokenizer\.json$"):
        read_meta(step)


@only("qwen2")
@pytest.mark.parametrize("value", [[], "x", {"file": 3}, None])
def test_a_checkpoint_whose_description_is_broken(step, value):
    path = step / "meta" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": value}))
    with pytest.raises(UserError):
        read_meta(step)


@only("qwen2")
def test_a_run_goes_on_with_the_same_end_token_only(step, ours):
    config: Config = load_config(None, ["model.tokenizer=t/tokenizer.json", "checkpoint.verify=off"])
    run = step.parent.parent
    assert resumed_meta(config, ours, run).step == 3
    other = Tokenizer(ours.serialized, "x", {"eos_token": "<|endoftext|>"})
    with pytest.raises(UserError) as error:
        resumed_meta(config, other, run)
    assert (
        "model.tokenizer: before bos_token=None, eos_token=<|im_end|>, "
        "now bos_token=None, eos_token=<|endoftext|> (tokenizer_config.json beside it)"
    ) in str(error.value)


# --- added tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_come_last_and_change_nothing_before_them(ours, special, kind):
    new = ["<image>" if kind != "metaspace" else "<picture>", "<pad>"]
    serialized, ids = add_tokens(ours.serialized, new, special, "x")
    assert ids == [ours.size, ours.size + 1]
    library = tokenizers.Tokenizer.from_str(serialized.decode())
    extended = Tokenizer(serialized, "x", ours.settings)
    assert extended.size == library.get_vocab_size() == ours.size + 2
    assert [library.token_to_id(token) for token in new] == [extended.token_id(token) for token in new] == ids
    assert library.encode(f"a{new[0]}b", add_special_tokens=False).ids.count(ids[0]) == 1
    assert extended.decode(ids) == library.decode(ids) == ("" if special else "".join(new))
    for text in (*TEXTS, f"a{new[0]}b"):
        for continues in (False, True):
            assert extended.encode(text, continues) == ours.encode(text, continues)


@only("qwen2")
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<a>", "<|im_end|>"], r"^--tokens: <\|im_end\|> exists already, with id \d+$"),
        (["a"], r"^--tokens: a exists already, with id \d+$"),
        (["<a>", "<a>"], r"^--tokens: <a> exists already, with id \d+$"),
        (["<a>", ""], r"^--tokens: a token is empty$"),
    ],
)
def test_tokens_that_cannot_be_added(ours, tokens, message):
    with pytest.raises(UserError, match=message):
        add_tokens(ours.serialized, tokens, False, "x")


# --- files that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "llama2"])
@pytest.mark.parametrize(
    "step",
    [
        {"type": "Lowercase"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": False,
        },
        {"type": "Replace", "pattern": {"Regex": "[ ▁]+"}, "content": " "},
    ],
    ids=lambda step: step["type"],
)
def test_a_normalizer_that_changes_text(edited, step):
    def add(content):
        before = [content["normalizer"]] if content["normalizer"] else []
        content["normalizer"] = {"type": "Sequence", "normalizers": [step, *before]}

    assert refusal(edited(add), "x").startswith(
        r"x: changes text ('A  b\n\n\tc \r\n é   象🙂 <0x41>  12 d  ' comes back as "
    )


@only("qwen2")
def test_a_pre_tokenizer_that_loses_spaces(edited):
    def split(content):
        content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "WhitespaceSplit"})

    assert refusal(edited(split), "x").startswith("x: changes text (")


@only("smollm2")
def test_a_pre_tokenizer_that_adds_a_space(edited):
    def prefix(content):
        content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True

    assert refusal(edited(prefix), "x").startswith("x: changes text (")


def test_a_decoder_that_is_missing(edited, kind):
    message = refusal(edited(lambda content: content.update(decoder=None)), "x", CONFIGS[kind])
    assert message.startswith(
        "x: is neither byte-level nor has byte_fallback" if kind in BYTE_LEVEL else "x: changes text ("
    )


@only("llama2")
def test_a_model_that_has_no_piece_for_some_text(edited):
    assert refusal(edited(lambda content: content["model"].update(byte_fallback=False)), "x") == (
        "x: is neither byte-level nor has byte_fallback, so that some text cannot be encoded"
    )


@pytest.mark.parametrize(("kind", "piece"), [("llama2", "<0x41>"), ("qwen2", "!")])
def test_a_byte_that_is_an_added_token(edited, piece):
    def add(content):
        token = {**content["added_tokens"][0], "content": piece, "id": content["model"]["vocab"][piece]}
        content["added_tokens"].append(token)

    assert refusal(edited(add), "x") == (f"x: lacks 1 of the 256 byte pieces, or has them as added tokens ({piece})")


@pytest.mark.parametrize(
    "model", [models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), models.WordPiece({"a": 0}), models.WordLevel({"a": 0})]
)
def test_another_kind_of_model(model):
    serialized = tokenizers.Tokenizer(model).to_str().encode()
    assert refusal(serialized, "x") == (
        f"x: its model is {type(model).__name__}; supported are BPE, and SentencePiece's tokenizer.model"
    )


@only("qwen2")
def test_dropout(edited):
    message = refusal(edited(lambda content: content["model"].update(dropout=0.1)), "x")
    assert message == "x: model.dropout=0.1 makes the ids of a text random; set it to null"


@only("qwen2")
def test_added_ids_that_leave_a_gap(edited, contents, kind):
    vocabulary = len(contents[kind]["model"]["vocab"])
    message = refusal(edited(lambda content: content["added_tokens"][0].update(id=999)), "x")
    assert message == (
        f"x: added token <|endoftext|> has id 999, but the tokenizers library gives it {vocabulary}; added ids must "
        f"follow the {vocabulary} of the vocabulary without a gap"
    )


@only("qwen2")
def test_ids_that_leave_a_gap(edited, ours):
    def widen(content):
        vocab = content["model"]["vocab"]
        vocab[max(vocab, key=vocab.get)] = 5000
        content["added_tokens"] = []

    message = refusal(edited(widen), "x", {"eos_token": "a"})
    assert message == f"x: has {ours.size - 4} tokens, but ids up to 5000; some are missing or doubled"


@only("qwen2")
@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["model"].update(vocab=[]),
        lambda content: content["model"]["merges"].append(["zzz", "yyy"]),
        lambda content: content["model"]["merges"].append(3),
        lambda content: content.update(decoder={"type": "Nonsense"}),
        lambda content: content.update(added_tokens=[{"content": "<|endoftext|>"}]),
        lambda content: content.update(added_tokens=[3]),
        lambda content: content.update(added_tokens={"a": 1}),
        lambda content: content.update(added_tokens=5),
        lambda content: content["added_tokens"][0].update(content=None),
    ],
)
def test_a_file_that_the_library_cannot_load(edited, edit):
    message = refusal(edited(edit), "x")
    assert message.startswith(("x: the tokenizers library cannot load it (", "x: is no SentencePiece model and no tok"))


@only("qwen2", "llama2")
def test_a_cut_file(ours):
    for kept in (1, 10, len(ours.serialized) // 2, -1):
        assert refusal(ours.serialized[:kept], "x") == "x: is no SentencePiece model and no tokenizer.json"


# --- size ------------------------------------------------------------------------------------------------------------


def test_a_vocabulary_of_the_size_of_llama_3_loads_in_seconds(contents):
    content = json.loads(json.dumps(contents["llama3"]))
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    letters = [chr(97 + i) for i in range(26)]
    for length in (2, 3, 4):
        for letter in itertools.product(letters, repeat=length):
            piece = "".join(letter)
            if piece not in vocab and len(vocab) < 128_000:
                vocab[piece] = len(vocab)
                merges.append([piece[:-1], piece[-1]])
    for i, token in enumerate(content["added_tokens"]):
        token["id"] = len(vocab) + i
    started = time.monotonic()
    tokenizer = Tokenizer(json.dumps(content).encode())
    assert time.monotonic() - started < 20
    assert tokenizer.size == 128_000 + len(ADDED["llama3"])
    assert tokenizer.decode(tokenizer.encode(TEXTS[4], continues=False)) == TEXTS[4]
