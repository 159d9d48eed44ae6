"""The tokenizer against the `sentencepiece` library, which encodes the whole text in one go."""

import hashlib
import itertools
import pickle

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from neva_jax.data.tokenizer import Tokenizer, add_tokens
from neva_jax.errors import UserError

TEXTS = [
    "USER: What is in the picture? ASSISTANT: A red circle, 2 squares and 10 dogs.",
    " two leading spaces,  four    spaces, two trailing  ",
    "line one\nline two\n\n\tindented\r\n",
    "unseen: Grüße, 象は鼻が長い, 🙂👩‍🚀🇨🇭, \u200b\ufeff\x00\x7f",
    "looks special: <s> </s> <unk> <0x41> <extra_id_0> [INST]",
    " ",
    "x",
    "",
]
NEW = ["<extra_id_0>", "<extra_id_1>"]


@pytest.fixture(scope="module")
def reference(tokenizer_path):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))


def pieces(reference, ids):
    return [reference.id_to_piece(i) for i in ids]


def joined(tokenizer, parts):
    """The ids of a text that is encoded part by part."""
    return list(itertools.chain(*(tokenizer.encode(part, continues=i > 0) for i, part in enumerate(parts))))


def edited(tokenizer, edit):
    """The model file after `edit(proto)`."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.serialized)
    edit(proto)
    return proto.SerializeToString()


# --- encoding segments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_whole_text_has_the_ids_that_sentencepiece_gives(tokenizer, reference, text):
    assert tokenizer.encode(text, continues=False) == reference.encode(text)


@pytest.mark.parametrize("text", [TEXTS[0], "The quick brown fox jumps over the lazy dog; it is 3 o'clock"])
def test_segments_split_before_words_join_to_the_ids_of_the_whole(tokenizer, reference, text):
    """No piece reaches across a word's start, so any of these cuts, and all together, leave the ids as they are."""
    whole = reference.encode(text)
    words = text.split(" ")
    for cut in range(1, len(words)):
        assert joined(tokenizer, [" ".join(words[:cut]), " " + " ".join(words[cut:])]) == whole
    assert joined(tokenizer, [words[0], *(f" {word}" for word in words[1:])]) == whole


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_split_anywhere_decodes_to_itself(tokenizer, reference, text):
    draw = np.random.default_rng(0)
    cuts = [[cut] for cut in range(1, len(text))]
    cuts += [sorted({*draw.integers(1, len(text), 5).tolist()}) for _ in range(20 if len(text) > 1 else 0)]
    for cut in [[], *cuts]:
        parts = [text[a:b] for a, b in itertools.pairwise([0, *cut, len(text)])]
        ids = joined(tokenizer, parts)
        assert reference.decode(ids) == text, parts
        assert tokenizer.decode(ids) == text, parts


def test_only_a_starting_segment_gets_the_dummy_prefix(tokenizer, reference):
    def written(text, continues):
        return "".join(pieces(reference, tokenizer.encode(text, continues)))

    assert written("red", continues=False) == "▁red"
    assert written("red", continues=True) == "red"
    assert written(" red", continues=True) == "▁red"
    assert written(" red", continues=False) == "▁▁red"
    assert tokenizer.encode(" red", continues=True) == reference.encode("red")
    assert tokenizer.encode("", continues=False) == tokenizer.encode("", continues=True) == []


# --- special tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("control", [False, True])
def test_text_never_produces_a_special_token(tokenizer, control, continues):
    serialized, new_ids = add_tokens(tokenizer.serialized, NEW, control, "tokenizer.model")
    library = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    # The library itself does match user-defined pieces in text.
    assert (new_ids[0] in library.encode(f"a{NEW[0]}b")) == (not control)
    special = {library.unk_id(), library.bos_id(), library.eos_id(), *new_ids}
    extended = Tokenizer(serialized)
    for word in ("<s>", "</s>", "<unk>", *NEW):
        for text in (word, f" {word}", f"a{word}b", f"say {word} twice: {word}{word}", f"{word}\n"):
            ids = extended.encode(text, continues)
            assert not special & set(ids), text
            assert library.decode(tokenizer.encode(".", continues=False) + extended.encode(text, True)) == "." + text


def test_the_name_of_a_byte_piece_is_text(tokenizer, reference):
    (byte,) = [i for i in range(reference.get_piece_size()) if reference.id_to_piece(i) == "<0x41>"]
    for continues in (False, True):
        assert byte not in tokenizer.encode("<0x41>", continues)


def test_decode_drops_special_tokens_wherever_they_stand(tokenizer):
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    answer, more = tokenizer.encode("It is blue.", continues=False), tokenizer.encode(" Yes, 🙂", continues=True)
    assert tokenizer.decode([bos, *answer, eos]) == "It is blue."
    assert tokenizer.decode([bos, bos, *answer, eos, *more, eos, eos]) == "It is blue. Yes, 🙂"
    assert tokenizer.decode([bos, eos]) == tokenizer.decode([]) == ""
    serialized, (control,) = add_tokens(tokenizer.serialized, NEW[:1], True, "tokenizer.model")
    assert Tokenizer(serialized).decode([*answer, control, *more]) == "It is blue. Yes, 🙂"


def test_decode_drops_one_leading_space_as_sentencepiece_does(tokenizer, reference):
    for text in (" red", "  red", "   red"):
        ids = tokenizer.encode(text, continues=True)
        assert tokenizer.decode(ids) == reference.decode(ids) == text[1:]


def test_properties_are_those_of_the_file(tokenizer, tokenizer_path):
    assert (tokenizer.size, tokenizer.bos_id, tokenizer.eos_id) == (400, 1, 2)
    assert tokenizer.sha256 == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    assert tokenizer.serialized == tokenizer_path.read_bytes()


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    serialized, new_ids = add_tokens(tokenizer.serialized, NEW, False, "tokenizer.model")
    tokenizer = Tokenizer(serialized)
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in (*TEXTS, "a<extra_id_0>b"):
        for continues in (False, True):
            ids = tokenizer.encode(text, continues)
            assert copy.encode(text, continues) == ids
            assert copy.decode(ids) == tokenizer.decode(ids)
            assert not set(new_ids) & set(ids)
    assert (copy.size, copy.bos_id, copy.eos_id, copy.sha256) == (402, 1, 2, tokenizer.sha256)


# --- added tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", [False, True])
def test_added_tokens_come_last_and_change_nothing_before_them(tokenizer, reference, control):
    serialized, ids = add_tokens(tokenizer.serialized, NEW, control, "tokenizer.model")
    assert ids == [400, 401]
    library = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    assert library.get_piece_size() == Tokenizer(serialized).size == 402
    assert pieces(library, ids) == NEW
    assert [library.piece_to_id(token) for token in NEW] == ids
    assert [library.is_control(i) for i in ids] == [control, control]
    for i in range(400):
        assert library.id_to_piece(i) == reference.id_to_piece(i)
        assert library.get_score(i) == reference.get_score(i)
        assert library.is_control(i) == reference.is_control(i)
    for text in TEXTS:
        if NEW[0] not in text:
            assert library.encode(text) == reference.encode(text)
        for continues in (False, True):
            assert Tokenizer(serialized).encode(text, continues) == tokenizer.encode(text, continues)


def test_tokens_can_be_added_twice_over(tokenizer):
    once, first = add_tokens(tokenizer.serialized, NEW[:1], False, "tokenizer.model")
    twice, second = add_tokens(once, NEW[1:], True, "tokenizer.model")
    assert (first, second, Tokenizer(twice).size) == ([400], [401], 402)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["</s>"], "--tokens: </s> exists already, with id 2"),
        (["<a>", "<0x00>"], "--tokens: <0x00> exists already, with id 3"),
        (["<a>", "<b>", "<a>"], "--tokens: <a> exists already, with id 400"),
        (["<a>", ""], "--tokens: a token is empty"),
        (
            ["<a\x00>"],
            "tokenizer.model: SentencePiece cannot load it (INTERNAL: piece must not include null character.)",
        ),
    ],
)
def test_tokens_that_cannot_be_added(tokenizer, tokens, message):
    with pytest.raises(UserError) as error:
        add_tokens(tokenizer.serialized, tokens, False, "tokenizer.model")
    assert str(error.value) == message


# --- files that are no tokenizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"{", b'{"model": 1}', b'{"model": {}', b"[]", b"\x89PNG\r\n\x1a\n\x00\x00", "Grüße\n".encode() * 50],
)
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "some.model"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(path)
    assert str(error.value) == f"{path}: is no SentencePiece model and no tokenizer.json"
    with pytest.raises(UserError, match=r"^x: is no SentencePiece model and no tokenizer.json$"):
        add_tokens(content, NEW, False, "x")


@pytest.mark.parametrize("kept", [10, 2000, -1])
def test_a_truncated_model(tokenizer, kept):
    with pytest.raises(UserError, match=r"^x: is no SentencePiece model and no tokenizer.json$"):
        Tokenizer(tokenizer.serialized[:kept], "x")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(tmp_path / "absent.model")
    assert str(error.value) == f"{tmp_path}/absent.model: cannot be read (No such file or directory)"
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(tmp_path)
    assert str(error.value) == f"{tmp_path}: cannot be read (Is a directory)"


def test_a_model_that_removes_white_space_is_refused(tokenizer):
    model = edited(tokenizer, lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True))
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert library.decode(library.encode("a  b")) == "a b"
    with pytest.raises(
        UserError, match=r"^x: was trained with remove_extra_whitespaces=true, .*=false, as Llama's is$"
    ):
        Tokenizer(model, "x")


@pytest.mark.parametrize("piece", ["<s>", "</s>"])
def test_a_model_without_start_or_end_is_refused(tokenizer, piece):
    def rename(proto):
        (found,) = [one for one in proto.pieces if one.piece == piece]
        found.piece = "<other>"

    with pytest.raises(UserError, match=r"^x: has no <s> or </s> piece; a conversation needs both$"):
        Tokenizer(edited(tokenizer, rename), "x")


def test_a_model_with_a_piece_twice_is_refused(tokenizer):
    model = edited(tokenizer, lambda proto: proto.pieces.add(piece=proto.pieces[300].piece, score=-1.0))
    with pytest.raises(UserError, match=r"^x: SentencePiece cannot load it \(.*already defined.*\)$"):
        Tokenizer(model, "x")
