"""Question and answer files, by themselves and through the commands, on a checkpoint of random weights."""

import json
import re

import pytest

from neva_jax import evaluate, generate
from neva_jax.errors import UserError
from neva_jax.files import check_output
from neva_jax.inference.questions import Question, read_jsonl, read_questions, write_jsonl
from tests.inference.test_engine import random_checkpoint, tiny_run

ASKED = (
    {"question_id": 7, "image": "0/00.jpg", "text": "What is in the picture?", "category": "shape"},
    {"question_id": "b", "text": "How many sides does a square have?"},
    {"question_id": 3, "image": ["0/01.jpg"], "prompt": "What is in the picture?"},
    {"question_id": "a/2", "image": None, "question": "¿Qué es «esto»? 日本"},
    {"question_id": "7", "image": "1/12.jpg", "text": "Which colour does the shape have?\n<image>"},
    {"question_id": 0, "image": ["0/02.jpg", "0/03.jpg"], "text": "Is <image> the same as <image>?"},
    {"question_id": -1, "text": "Are you sure?"},
)
FLAGS = ["--max-new-tokens", "6"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer, tokenizer_path, llava_data):
    """(folder, arguments for checkpoint and images)."""
    folder = tmp_path_factory.mktemp("questions")
    run = folder / "run"
    random_checkpoint(run, tokenizer, *tiny_run(run, tokenizer_path, llava_data.json, llava_data.images))
    return folder, ["--checkpoint", str(run), "--images", str(llava_data.images), *FLAGS]


@pytest.fixture(scope="module")
def singly(files):
    """The answers, asked one by one."""
    folder, arguments = files
    output = folder / "new" / "folder" / "singly.jsonl"
    questions = write(folder / "asked.jsonl", ASKED)
    answering = ["--input", str(questions), "--output", str(output), "--batch-size", "1"]
    assert generate.main([*arguments, *answering]) == 0
    return read(output)


def test_answers_have_the_order_the_ids_and_the_format_of_llava(singly, files):
    run = str(files[0] / "run")
    assert [row["question_id"] for row in singly] == [row["question_id"] for row in ASKED]
    texts = [next(row[name] for name in ("text", "prompt", "question") if name in row) for row in ASKED]
    assert [row["prompt"] for row in singly] == texts
    for row in singly:
        assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert row["model_id"] == run
        assert row["metadata"] == {"finish_reason": "length"}
        assert row["text"] == row["text"].strip() != ""
        assert re.fullmatch("[0-9a-f]{32}", row["answer_id"])
    assert len({row["answer_id"] for row in singly}) == len(ASKED)
    assert len({row["text"] for row in singly}) >= len(ASKED) - 2  # or equal answers would prove little


def test_a_batch_larger_than_the_file_answers_as_one_by_one(singly, files):
    folder, arguments = files
    output = write(folder / "all.jsonl", [{"old": 1}])
    answering = ["--input", str(folder / "asked.jsonl"), "--output", str(output), "--batch-size", "100"]
    assert generate.main([*arguments, *answering]) == 0
    assert read(output) == singly


def test_evaluate_in_batches_that_do_not_divide_the_file(singly, files, capsys):
    """It answers as `generate` does one by one, and scores by hand: the last two of seven are wrong."""
    folder, arguments = files
    expected = [f" {row['text'].upper()}\n" for row in singly[:5]] + ["something else"] * 2
    questions = write(
        folder / "evaluated.jsonl", [{**row, "answer": text} for row, text in zip(ASKED, expected, strict=True)]
    )
    answers = folder / "evaluated_answers.jsonl"
    named = ["--task", "exact", "--questions", str(questions), "--answers", str(answers)]
    assert evaluate.main(["run", *named, *arguments, "--batch-size", "3", "--json"]) == 0
    printed = capsys.readouterr().out
    assert read(answers) == singly
    assert json.loads(printed) == {
        "task": "exact",
        "accuracy": 5 / 7,
        "right": 5,
        "total": 7,
        "categories": {"all": [4, 6], "shape": [1, 1]},
    }
    assert evaluate.main(["score", *named, "--json"]) == 0
    assert capsys.readouterr().out == printed


def test_marks_and_images_that_differ_in_number_are_named_by_line(files, tmp_path):
    questions = write(tmp_path / "asked.jsonl", [ASKED[1], {"text": "<image>\nWhat is this?"}])
    with pytest.raises(UserError, match=r"asked\.jsonl: line 2: .*<image>"):
        generate.main([*files[1], "--input", str(questions), "--output", str(tmp_path / "answers.jsonl")])


# --- files -----------------------------------------------------------------------------------------------------------


def test_read_questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = [
        '{"question_id": "x", "image": "a/b.jpg", "text": "One?", "answer": "1", "extra": {"n": [2]}}',
        "",
        '{"image": ["c.jpg", "d.jpg"], "prompt": "Two?"}',
        "   ",
        '{"question_id": 0, "image": [], "question": "Three?"}',
        '{"question_id": "0", "text": "first of", "prompt": "three", "question": "names"}',
    ]
    path.write_text("\r\n".join(lines), encoding="utf-8-sig")
    raw = [json.loads(lines[i]) for i in (0, 2, 4, 5)]
    assert read_questions(path) == [
        Question("x", ("a/b.jpg",), "One?", raw[0], 1),
        Question(3, ("c.jpg", "d.jpg"), "Two?", raw[1], 3),
        Question(0, (), "Three?", raw[2], 5),
        Question("0", (), "first of", raw[3], 6),
    ]


def test_a_line_number_that_is_another_line_s_id(tmp_path):
    path = write(tmp_path / "questions.jsonl", [{"question_id": 2, "text": "One?"}, {"text": "Two?"}])
    with pytest.raises(UserError, match=r"line 2: question_id 2 stands in line 1 already"):
        read_questions(path)


def test_written_rows_are_read_back(tmp_path):
    rows = [{"text": 'two\nlines, a "quote", a \\ and \x0b\x1c'}, {"text": "日本 🦊"}, {"n": [1, None, 0.1]}]
    path = tmp_path / "deep" / "down" / "rows.jsonl"
    assert write_jsonl(path, iter(rows)) == 3
    assert "日本 🦊" in path.read_text()
    assert list(read_jsonl(path)) == list(enumerate(rows, start=1))
    assert write_jsonl(path, []) == 0
    assert list(read_jsonl(path)) == []
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029"])
def test_a_unicode_line_separator_in_a_text_ends_no_line(separator, tmp_path):
    rows = [{"text": f"one{separator}two"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [(1, rows[0])]


@pytest.mark.parametrize("old", [None, "old\n"])
def test_rows_that_end_in_an_error_leave_what_was_there(old, tmp_path):
    path = tmp_path / "rows.jsonl"
    if old is not None:
        path.write_text(old)

    def rows():
        yield {"text": "one"}
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_jsonl(path, rows())
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if old is None else [old])


def test_check_output_writes_nothing(tmp_path):
    check_output("--output", tmp_path / "new" / "folder" / "answers.jsonl")
    assert list(tmp_path.iterdir()) == []
