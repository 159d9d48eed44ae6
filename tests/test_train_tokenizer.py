"""scripts/train_tokenizer.py: the layout of Llama's tokenizer, text that survives it, and wrong arguments."""

import importlib.util
import json
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from neva_jax.data.tokenizer import Tokenizer

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_tokenizer.py"
ASKED, SAID = "<image>\nWhat is in the picture?", "A red circle at the left, a blue square at the right."
ROWS = [
    {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    {"conversations": [{"from": "human", "value": "How  many?"}, {"from": "gpt", "value": "2 circles, 17 squares."}]},
]
VOCABULARY = 330
TEXTS = [
    "A red circle.",
    " two  spaces,   three ",
    "\n\nlines\n and\ttabs\r\n",
    "naïve café, 日本語, 🦊👩‍🚀, \u2028 and \x00\x7f",
    "ﬁ ½ Å e\u0301 Ａ",  # NFKC would change each of them
    "0123456789 1000000",
    "<s></s><unk><0x41> <image>",
    "",
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tokenizer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(script, tmp_path):
    """Trains on rows; returns the path of the model."""

    def run(rows, *flags, output="out.model", vocabulary=VOCABULARY):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows))
        arguments = ["--json", path, "--output", tmp_path / output, "--vocab-size", vocabulary, *flags]
        assert script.main([str(argument) for argument in arguments]) == 0
        return tmp_path / output

    return run


@pytest.fixture
def refused(script, tmp_path, capsys):
    """Runs with wrong arguments; returns the last line of stderr. The folder keeps its files."""

    def run(*arguments):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as ended:
            script.main([str(argument) for argument in arguments])
        assert ended.value.code == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def model(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    arguments = ["--json", folder / "rows.json", "--output", folder / "tokenizer.model", "--vocab-size", VOCABULARY]
    assert script.main([str(argument) for argument in arguments]) == 0
    return folder / "tokenizer.model"


def pieces(path):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def test_ids_are_laid_out_as_llama_s(model):
    names = pieces(model)
    assert names[:3] == ["<unk>", "<s>", "</s>"]
    assert names[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert all(processor.is_byte(i) for i in range(3, 259))
    assert [processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()] == [0, 1, 2, -1]
    assert 259 < len(names) == VOCABULARY
    assert "▁circle" in names


def test_options_are_llama_s(model):
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    assert proto.trainer_spec.model_type == proto.trainer_spec.BPE
    assert proto.trainer_spec.byte_fallback
    assert not proto.normalizer_spec.remove_extra_whitespaces
    assert proto.normalizer_spec.add_dummy_prefix
    assert proto.normalizer_spec.name == "identity"
    assert not proto.normalizer_spec.precompiled_charsmap
    assert not any(sum(letter.isdigit() for letter in name) > 1 for name in pieces(model)[259:])


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives(text, model):
    tokenizer = Tokenizer.from_file(model)
    ids = tokenizer.encode(text, continues=False)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert processor.decode(processor.encode(text)) == text


def test_characters_of_the_text_are_pieces_and_others_are_bytes(model):
    names = pieces(model)
    for letter in set((ASKED.removeprefix("<image>") + SAID).replace(" ", "▁").replace("\n", "")):
        assert letter in names
    assert not {"é", "<", ">", "\n"} & set(names)


def test_the_model_follows_from_the_arguments(train, model):
    again = train(ROWS)
    assert again.read_bytes() == model.read_bytes()
    # Neither the order of the rows nor repetitions count.
    assert train(ROWS[::-1] * 3, output="other.model").read_bytes() == model.read_bytes()
    assert train(ROWS[:1], output="less.model").read_bytes() != model.read_bytes()


def test_extra_text_is_learned_too(train, capsys):
    assert "▁zebra" in pieces(train(ROWS, "--extra-text", "zebra zebra", "a zebra", vocabulary=350))
    assert capsys.readouterr().out.endswith("pieces, learned from 6 texts\n")


def test_a_text_with_few_pairs_gives_fewer_pieces_and_prints_their_number(train, capsys):
    path = train([{"conversations": [{"value": "ab ab"}]}], vocabulary=32000)
    count = len(pieces(path))
    assert 259 + 3 <= count < 280
    assert capsys.readouterr().out == f"{path}: {count} pieces, learned from 1 texts\n"


def test_several_files_and_a_new_folder(script, tmp_path):
    for i, row in enumerate(ROWS):
        (tmp_path / f"{i}.json").write_text(json.dumps([row]))
    output = tmp_path / "new" / "folder" / "t.model"
    arguments = ["--json", tmp_path / "0.json", tmp_path / "1.json", "--output", output, "--vocab-size", VOCABULARY]
    assert script.main([str(argument) for argument in arguments]) == 0
    assert {"▁circle", "▁square"} <= set(pieces(output))
    assert [path.name for path in output.parent.iterdir()] == ["t.model"]


# --- wrong arguments -------------------------------------------------------------------------------------------------


def test_an_existing_output_is_kept_without_force(train, refused, tmp_path, model):
    (tmp_path / "out.model").write_text("old")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    arguments = ["--json", tmp_path / "rows.json", "--output", tmp_path / "out.model", "--vocab-size", VOCABULARY]
    assert f"--output {tmp_path}/out.model: exists" in refused(*arguments)
    assert train(ROWS, "--force").read_bytes() == model.read_bytes()


def test_a_vocabulary_without_room_for_the_characters(refused, train, tmp_path):
    (tmp_path / "rows.json").write_text('[{"conversations": [{"value": "ab ab"}]}]')
    arguments = ["--json", tmp_path / "rows.json", "--output", tmp_path / "t.model", "--vocab-size"]
    assert "--vocab-size 261: must be at least 262" in refused(*arguments, 261)
    assert len(pieces(train([{"conversations": [{"value": "ab ab"}]}], vocabulary=262))) == 262


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "rows.json: cannot be read"),
        ("{", "no LLaVA JSON"),
        ('{"id": 1}', "no LLaVA JSON"),
        ("3", "no LLaVA JSON"),
        ('[{"text": "x"}]', "no LLaVA JSON"),
        ('[{"conversations": ["x"]}]', "no LLaVA JSON"),
        ('[{"conversations": [{"from": "human"}]}]', "no LLaVA JSON"),
    ],
)
def test_input_that_is_no_llava_json(content, message, refused, tmp_path):
    if content is not None:
        (tmp_path / "rows.json").write_text(content)
    arguments = ["--json", tmp_path / "rows.json", "--output", tmp_path / "t.model", "--vocab-size", VOCABULARY]
    assert message in refused(*arguments)


NO_TEXT = {
    "no rows": [],
    "nothing said": [{"conversations": [{"value": ""}]}],
    "null": [{"conversations": [{"value": None}]}],
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_input_without_text(name, refused, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(NO_TEXT[name]))
    arguments = ["--json", tmp_path / "rows.json", "--output", tmp_path / "t.model", "--vocab-size", VOCABULARY]
    assert "--json" in refused(*arguments)


def test_a_vocabulary_without_room_for_the_space_of_a_text_that_has_none(refused, tmp_path):
    (tmp_path / "rows.json").write_text('[{"conversations": [{"value": "abab"}]}]')
    arguments = ["--json", tmp_path / "rows.json", "--output", tmp_path / "t.model", "--vocab-size", 261]
    assert "--vocab-size 261: must be at least 262" in refused(*arguments)
