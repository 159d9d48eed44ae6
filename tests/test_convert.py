"""convert add-tokens: the new pieces as SentencePiece itself sees them, and what is never lost or left behind."""

import hashlib

import pytest
import sentencepiece

from neva_jax.convert import main
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError

TOKENS = ["<extra_id_0>", "<im_start>", "½"]


@pytest.fixture
def convert(tokenizer_path, tmp_path):
    """Runs add-tokens from the tests' tokenizer to `tmp_path / new.model`, unless told otherwise."""

    def run(*tokens, source=tokenizer_path, output=tmp_path / "new.model", flags=()):
        return main(["add-tokens", "--input", str(source), "--output", str(output), "--tokens", *tokens, *flags])

    return run


def pieces(path):
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prints_ids_and_the_new_size(convert, capsys):
    assert convert(*TOKENS) == 0
    assert capsys.readouterr() == ("400  <extra_id_0>\n401  <im_start>\n402  ½\nnew size: 403\n", "")


@pytest.mark.parametrize("control", [False, True])
def test_new_pieces_are_user_defined_or_control(control, convert, tmp_path, tokenizer_path):
    convert(*TOKENS, flags=["--control"] if control else [])
    new, old = pieces(tmp_path / "new.model"), pieces(tokenizer_path)
    assert new.get_piece_size() == old.get_piece_size() + 3
    assert [new.id_to_piece(i) for i in (400, 401, 402)] == TOKENS
    assert [new.is_control(i) for i in (400, 401, 402)] == [control] * 3
    encoded = new.encode("a <im_start>½ b")
    assert {401, 402} & set(encoded) == (set() if control else {401, 402})
    assert not any(new.is_unknown(i) or new.is_byte(i) or new.is_unused(i) for i in (400, 401, 402))
    for i in range(old.get_piece_size()):
        assert (new.id_to_piece(i), new.get_score(i)) == (old.id_to_piece(i), old.get_score(i))
    text = "A red circle, 42 dogs; 日本"
    assert new.encode(text) == old.encode(text)


@pytest.mark.parametrize("flags", [[], ["--control"]])
def test_our_tokenizer_never_reads_a_new_token_from_text(flags, convert, tmp_path, tokenizer):
    convert(*TOKENS[:2], flags=flags)
    new = Tokenizer.from_file(tmp_path / "new.model")
    assert new.size == tokenizer.size + 2
    text = "USER: <im_start><extra_id_0> hi"
    assert new.encode(text, continues=False) == tokenizer.encode(text, continues=False)


def test_tokens_can_be_added_to_what_was_added_to(convert, tmp_path, capsys):
    convert("<a>")
    assert convert("<b>", source=tmp_path / "new.model", output=tmp_path / "deep" / "newer.model") == 0
    assert capsys.readouterr().out.endswith("401  <b>\nnew size: 402\n")
    assert [pieces(tmp_path / "deep" / "newer.model").piece_to_id(token) for token in ("<a>", "<b>")] == [400, 401]


def test_the_input_may_be_replaced_with_force(convert, tmp_path):
    convert("<a>")
    before = files(tmp_path)
    model = tmp_path / "new.model"
    with pytest.raises(UserError, match=r"--output .*new\.model: exists; .*--force"):
        convert("<b>", source=model, output=model)
    assert files(tmp_path) == before
    assert convert("<b>", source=model, output=model, flags=["--force"]) == 0
    assert pieces(model).get_piece_size() == 402
    assert list(files(tmp_path)) == ["new.model"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<new>", "</s>"], "--tokens: </s> exists already, with id 2"),
        (["<new>", "<0x41>"], "--tokens: <0x41> exists already, with id "),
        (["<new>", "<other>", "<new>"], "--tokens: <new> exists already, with id 400"),
        (["<new>", ""], "--tokens: a token is empty"),
    ],
)
def test_tokens_that_cannot_be_added(tokens, message, convert, tmp_path, tokenizer_path, capsys):
    digest = hashlib.sha256(tokenizer_path.read_bytes()).digest()
    (tmp_path / "new.model").write_text("old")
    with pytest.raises(UserError) as caught:
        convert(*tokens, flags=["--force"])
    assert str(caught.value).startswith(message)
    assert files(tmp_path) == {"new.model": b"old"}
    assert hashlib.sha256(tokenizer_path.read_bytes()).digest() == digest
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [None, b"", b"no model", b"\x00" * 64, b'{"vocab": {}}'])
def test_an_input_that_is_no_model(content, convert, tmp_path):
    source = tmp_path / "source.model"
    if content is not None:
        source.write_bytes(content)
    message = "cannot be read" if content is None else "is no SentencePiece model"
    with pytest.raises(UserError, match=rf"source\.model: {message}"):
        convert("<new>", source=source)
    assert files(tmp_path) == ({} if content is None else {"source.model": content})


def test_a_cut_model_is_refused(convert, tmp_path, tokenizer_path):
    content = tokenizer_path.read_bytes()
    (tmp_path / "cut.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.model"):
        convert("<new>", source=tmp_path / "cut.model")
    assert list(files(tmp_path)) == ["cut.model"]


@pytest.mark.parametrize("output", ["folder", "file/new.model"])
def test_an_output_that_cannot_be_written(output, convert, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--output"):
        convert("<new>", output=tmp_path / output, flags=["--force"])
    assert files(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [([], "command"), (["add-tokens"], "--input"), (["add-tokens", "--input", "x", "--output", "y"], "--tokens")],
)
def test_missing_arguments(arguments, named):
    with pytest.raises(UserError, match=named):
        main(arguments)
