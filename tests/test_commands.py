"""Bad usage of the commands: exit status 2, one line on stderr, no traceback, nothing written.

Most run in this process through `exit_with`, which is all that `python -m` adds; a few are real processes.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from neva_jax import errors, evaluate, generate, train
from neva_jax.configfile import load_config
from neva_jax.errors import UserError, exit_with
from neva_jax.inference.engine import Engine

ROOT = Path(__file__).parent.parent
COMMANDS = {"train": train, "generate": generate, "evaluate": evaluate}


def one_line(stderr: str) -> str:
    assert stderr.startswith("error: ") or "error: " in stderr.splitlines()[0]
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    return stderr


def assert_says(text: str, *fragments: str) -> None:
    missing = [fragment for fragment in fragments if fragment not in text]
    assert not missing, f"{text!r} lacks {missing}"


@pytest.fixture
def fails(capfd) -> Callable[..., str]:
    """Runs a command in this process as `python -m` would; returns its one line on stderr."""

    def run(command: str, *arguments: str | Path) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            exit_with(lambda: COMMANDS[command].main([str(argument) for argument in arguments]))
        out, err = capfd.readouterr()
        assert ended.value.code == 2
        assert out == ""
        return one_line(err)

    return run


@pytest.fixture
def overrides(small_overrides) -> list[str]:
    """A tiny run that is good on the 8 devices of the tests."""
    return [*small_overrides, "mesh.shape=data=-1", "train.micro_batch=1"]


def written_by_run(tmp_path: Path) -> list[str]:
    """What there is in (or as) run.dir."""
    run = tmp_path / "run"
    return [str(path.relative_to(tmp_path)) for path in (run, *run.rglob("*")) if path.exists()]


def lines(path: Path, *rows: dict | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


QUESTIONS = (
    {"question_id": 1, "image": "0/00.jpg", "text": "What is in the picture?", "answer": "A red circle."},
    {"question_id": "two", "text": "How many sides does a square have?", "answer": "4", "category": "text"},
)
ANSWERS = ({"question_id": "two", "text": "5"}, {"question_id": 1, "text": " a RED circle "})


@pytest.fixture
def questions(tmp_path) -> Path:
    return lines(tmp_path / "questions.jsonl", *QUESTIONS)


# --- real processes (about 2 s each) ---------------------------------------------------------------------------------


def process(*arguments: str | Path) -> str:
    """Runs `python -m neva_jax.<command>`; returns its one line on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", f"neva_jax.{arguments[0]}", *map(str, arguments[1:])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return one_line(done.stderr)


def test_process_train_unknown_key(overrides, tmp_path):
    text = process("train", *overrides, "train.micro_bach=4")
    assert text == ("error: override train.micro_bach: unknown key train.micro_bach; did you mean train.micro_batch?\n")
    assert written_by_run(tmp_path) == []


def test_process_train_broken_json(overrides, tmp_path):
    (tmp_path / "rows.json").write_text('[\n  {"id": "a",\n]')
    text = process("train", *overrides, f"data.train=[{{json: {tmp_path}/rows.json}}]")
    assert_says(text, f"{tmp_path}/rows.json: line 3 column 1 (byte 16) is no JSON")
    assert written_by_run(tmp_path) == []


def test_process_generate_without_checkpoint(tmp_path):
    text = process("generate", "--checkpoint", tmp_path / "nope", "--prompt", "What is this?")
    assert_says(text, f"{tmp_path}/nope: holds no checkpoint")
    assert not (tmp_path / "nope").exists()


def test_process_evaluate_answered_twice(tmp_path, questions):
    answers = lines(tmp_path / "answers.jsonl", *ANSWERS, ANSWERS[1])
    text = process("evaluate", "score", "--task", "exact", "--questions", questions, "--answers", answers)
    assert_says(text, f"{answers}: line 3: question_id 1 is answered twice")


def test_process_unknown_flag(tmp_path):
    assert_says(process("train", "--confg", tmp_path), "--confg")


# --- how every command ends ------------------------------------------------------------------------------------------


def test_exit_with_turns_a_user_error_into_status_2_and_one_line(capsys):
    def main() -> int:
        raise UserError("key: is wrong")

    with pytest.raises(SystemExit) as ended:
        exit_with(main)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: key: is wrong\n")


@pytest.mark.parametrize(("returned", "status"), [(0, 0), (143, 143), (None, None)])
def test_exit_with_passes_the_status_on(returned, status):
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: returned)
    assert ended.value.code == status


def test_exit_with_hides_no_defect(monkeypatch):
    def main() -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(errors, "_threads", list)  # of other tests
    with pytest.raises(ZeroDivisionError):
        exit_with(main)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["train", "--confg", "x"], ["--confg"]),
        (["train", "--config"], ["--config", "argument"]),
        (["generate", "--prompt", "x"], ["--checkpoint", "required"]),
        (["generate", "--checkpoint", "x", "--prompt", "x", "--temperature", "hot"], ["--temperature", "hot"]),
        (["evaluate"], ["command"]),
        (["evaluate", "score", "--task", "nope", "--questions", "x", "--answers", "x"], ["--task", "nope", "exact"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags_end_in_one_line(fails, arguments, fragments):
    assert_says(fails(*arguments), *fragments)


# --- train -----------------------------------------------------------------------------------------------------------

BAD_RUNS = {
    "nothing given": (None, ["run.dir", "not set"]),
    "missing file": (["--config", "{tmp}/nope.yaml"], ["--config", "nope.yaml", "No such file"]),
    "unknown key in the file": (["--config", "{tmp}/wrong.yaml"], ["wrong.yaml", "train.stpes", "train.steps?"]),
    "mesh": (["--mesh-shape", "data=3"], ["mesh.shape=data=3", "3 devices", "8"]),
    "mesh and batch": (["train.micro_batch=8"], ["train.global_batch=8", "train.micro_batch=8", "64"]),
    "mesh and heads": (["--mesh-shape", "tensor=8"], ["model.llm.num_heads=4", "tensor=8"]),
    "data missing": (["data.train=[{{json: {tmp}/nope.json}}]"], ["data.train[0].json", "nope.json"]),
    "data no JSON": (["data.train=[{{json: {tmp}/wrong.yaml}}]"], ["wrong.yaml", "line 1 column 1 (byte 0)", "JSON"]),
    "data no list": (["data.train=[{{json: {tmp}/object.json}}]"], ["object.json", "holds an object", "list of rows"]),
    "data empty": (["data.train=[{{json: {tmp}/empty.json}}]"], ["empty.json", "no rows"]),
    "validation data no JSON": (["data.val=[{{json: {tmp}/wrong.yaml}}]"], ["wrong.yaml", "JSON"]),
    "weight that leaves no row": (["data.train=[{{json: {tmp}/one.json, weight: 0.1}}]"], ["weight=0.1", "one.json"]),
    "tokenizer is something else": (["model.tokenizer={tmp}/wrong.yaml"], ["wrong.yaml", "SentencePiece"]),
    "vocabulary too small": (["model.llm.vocab_size=399"], ["model.llm.vocab_size=399", "400"]),
    "nothing to resume": (["run.resume=must"], ["run.resume=must", "no checkpoint"]),
    "init_from is no checkpoint": (["model.init_from={tmp}"], ["{tmp}", "no checkpoint"]),
    "init_from is no checkpoint, saved in full": (
        ["model.init_from={tmp}", "checkpoint.contents=full"],
        ["{tmp}", "no checkpoint"],
    ),
    "W&B is not installed": (["log.wandb=offline"], ["log.wandb=offline", "not installed"]),
    "run.dir lies in a file": (["run.dir={tmp}/wrong.yaml/run"], ["run.dir=", "wrong.yaml/run"]),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_run(name, fails, overrides, tmp_path, monkeypatch):
    (tmp_path / "wrong.yaml").write_text("train: {stpes: 5}")
    (tmp_path / "object.json").write_text('{"id": "a"}')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "one.json").write_text("[{}]")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    extra, fragments = BAD_RUNS[name]
    arguments = [] if extra is None else [*[word.format(tmp=tmp_path) for word in extra if "=" not in word], *overrides]
    if extra is not None and extra[0].startswith("--"):
        arguments = [*[word.format(tmp=tmp_path) for word in extra], *overrides]
    elif extra is not None:
        arguments += [word.format(tmp=tmp_path) for word in extra]
    assert_says(fails("train", *arguments), *[fragment.format(tmp=tmp_path) for fragment in fragments])
    assert written_by_run(tmp_path) == []


@pytest.mark.parametrize("override", ["model.vision.patch_size=0", "model.llm.num_heads=0"])
def test_print_config_of_a_wrong_number(fails, override):
    assert_says(fails("train", "--print-config", override), override)


def test_print_config_needs_no_files_and_writes_none(overrides, tmp_path, capsys):
    missing = [*overrides, "model.tokenizer=nope", f"data.train=[{{json: {tmp_path}/nope.json}}]"]
    assert train.main([*missing, "--print-config"]) == 0
    assert "tokenizer: nope" in capsys.readouterr().out
    assert written_by_run(tmp_path) == []


# --- generate --------------------------------------------------------------------------------------------------------


class BadEngine(Engine):
    """An engine that may prepare requests, but must not be asked."""

    def stream(self, *_):
        raise AssertionError("the model was asked")


@pytest.fixture
def checkpoint(tokenizer, overrides, tmp_path, monkeypatch) -> Path:
    """The path of a checkpoint that loads at once, without weights."""
    engine = BadEngine(load_config(None, overrides), tokenizer, {}, None)
    monkeypatch.setattr(Engine, "from_checkpoint", classmethod(lambda cls, path, ema: engine))
    return tmp_path / "checkpoint"


def test_generate_wants_either_prompt_or_input(fails, questions, tmp_path):
    output = tmp_path / "answers.jsonl"
    for arguments in ([], ["--prompt", "x", "--input", questions, "--output", output], ["--image", "x.jpg"]):
        assert_says(fails("generate", "--checkpoint", tmp_path, *arguments), "--prompt", "--input")
    assert not output.exists()


def test_generate_input_needs_output_and_takes_no_image(fails, questions, tmp_path):
    text = fails("generate", "--checkpoint", tmp_path, "--input", questions)
    assert_says(text, "--input", "--output")
    text = fails("generate", "--checkpoint", tmp_path, "--input", questions, "--output", "x", "--image", "x.jpg")
    assert_says(text, "--images", "--image")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-new-tokens", "0"),
        ("--temperature", "-0.5"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--top-p", "nan"),
        ("--batch-size", "0"),
    ],
)
def test_generate_sampling_out_of_range(fails, flag, value, tmp_path):
    # Found before the checkpoint is looked for, which takes longer.
    assert_says(fails("generate", "--checkpoint", tmp_path, "--prompt", "x", flag, value), flag, value)


@pytest.mark.parametrize(
    ("files", "fragments"),
    [
        ({}, ["holds no checkpoint"]),
        ({"meta.json": "{"}, ["meta.json", "broken"]),
        ({"meta.json": "[]"}, ["meta.json", "broken"]),
        ({"meta.json": '{"format": 1}'}, ["tokenizer.model", "cannot be read"]),
        ({"meta.json": '{"format": 1}', "tokenizer.model": ""}, ["tokenizer.model", "SentencePiece"]),
    ],
    ids=["empty folder", "cut", "list", "no tokenizer", "empty tokenizer"],
)
def test_generate_from_something_that_is_no_checkpoint(fails, files, fragments, tmp_path):
    run = tmp_path / "run"
    folder = run / "checkpoints" / "4" / "meta"
    (folder if files else run).mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    assert_says(fails("generate", "--checkpoint", run, "--prompt", "x"), str(run), *fragments)


def test_generate_image_missing(fails, checkpoint, tmp_path):
    text = fails("generate", "--checkpoint", checkpoint, "--prompt", "x", "--image", tmp_path / "nope.jpg")
    assert_says(text, "--image", f"{tmp_path}/nope.jpg", "no such file")
    assert "broken" not in text


def test_generate_image_is_none(fails, checkpoint, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    text = fails("generate", "--checkpoint", checkpoint, "--prompt", "x", "--image", tmp_path / "text.jpg")
    assert_says(text, "--image", f"{tmp_path}/text.jpg")


BAD_QUESTIONS = {
    "no file": (None, ["questions.jsonl", "cannot be read"]),
    "empty": ([], ["questions.jsonl", "no questions"]),
    "no JSON": (["", QUESTIONS[0], "{"], ["questions.jsonl: line 3", "JSON"]),
    "no object": (["[1]"], ["questions.jsonl: line 1", "object"]),
    "no text": ([{"question_id": 1}], ["questions.jsonl: line 1", "text"]),
    "id twice": ([*QUESTIONS, QUESTIONS[0]], ["questions.jsonl: line 3", "question_id 1", "line 1"]),
    "id is a list": ([{"question_id": [1], "text": "x"}], ["questions.jsonl: line 1", "question_id", "[1]"]),
    "image is a number": ([{"text": "x", "image": 3}], ["questions.jsonl: line 1", "image", "3"]),
    "image missing": (
        [QUESTIONS[1], {"text": "x", "image": "0/nope.jpg"}],
        ["questions.jsonl: line 2", "image", "0/nope.jpg"],
    ),
    "image outside the folder": ([{"text": "x", "image": "../val.json"}], ["questions.jsonl: line 1", "../val.json"]),
}


@pytest.mark.parametrize("name", BAD_QUESTIONS)
def test_bad_questions(name, fails, checkpoint, tmp_path, llava_data):
    rows, fragments = BAD_QUESTIONS[name]
    path, output = tmp_path / "questions.jsonl", tmp_path / "out" / "answers.jsonl"
    if rows is not None:
        lines(path, *rows)
    arguments = ["--checkpoint", checkpoint, "--input", path, "--images", llava_data.images, "--output", output]
    # The last line: the progress bar is on stderr, too.
    with pytest.raises(UserError) as caught:
        generate.main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    assert_says(str(caught.value), *fragments)
    assert not output.exists()
    assert list(tmp_path.rglob("*.tmp")) == []


def test_generate_keeps_the_answers_that_were_there(checkpoint, tmp_path, llava_data):
    output = lines(tmp_path / "answers.jsonl", "old")
    path = lines(tmp_path / "questions.jsonl", {"text": "x", "image": "nope.jpg"})
    arguments = ["--checkpoint", checkpoint, "--input", path, "--images", llava_data.images, "--output", output]
    with pytest.raises(UserError, match=r"nope\.jpg"):
        generate.main([str(argument) for argument in arguments])
    assert output.read_text() == "old\n"


@pytest.mark.parametrize("output", ["folder", "file/answers.jsonl"])
def test_generate_output_that_cannot_be_written_is_found_before_the_model_is_asked(
    output, checkpoint, questions, tmp_path, llava_data
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("not a folder")
    arguments = ["--input", questions, "--images", llava_data.images, "--output", tmp_path / output]
    with pytest.raises(UserError) as caught:
        generate.main(["--checkpoint", str(checkpoint), *map(str, arguments)])
    assert_says(str(caught.value), str(tmp_path / output))


# --- evaluate --------------------------------------------------------------------------------------------------------


def score(questions: Path, answers: Path, *flags: str) -> list[str]:
    return ["score", "--task", "exact", "--questions", str(questions), "--answers", str(answers), *flags]


def test_score_of_good_answers(questions, tmp_path, capsys):
    answers = lines(tmp_path / "answers.jsonl", *ANSWERS)
    assert evaluate.main(score(questions, answers)) == 0
    assert capsys.readouterr().out == "  all: 1.00 (1/1)\n  text: 0.00 (0/1)\nexact match: 0.50 (1/2)\n"
    assert evaluate.main(score(questions, answers, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0.5


BAD_ANSWERS = {
    "no file": (None, ["answers.jsonl", "cannot be read"]),
    "no JSON": (["{"], ["answers.jsonl: line 1", "JSON"]),
    "one missing": ([ANSWERS[1]], ["answers.jsonl", "1 question", "'two'"]),
    "all missing": ([], ["answers.jsonl", "2 questions", "question_id 1"]),
    "twice": ([*ANSWERS, ANSWERS[0]], ["answers.jsonl: line 3", "'two'", "twice"]),
    "unknown": ([*ANSWERS, {"question_id": 3, "text": "x"}], ["answers.jsonl: line 3", "question_id 3", "not in"]),
    "text instead of a number": ([{"question_id": "1", "text": "x"}], ["answers.jsonl: line 1", "'1'", "not in"]),
    "no id": ([{"text": "x"}], ["answers.jsonl: line 1", "question_id"]),
    "id is a list": ([{"question_id": [1], "text": "x"}], ["answers.jsonl: line 1", "question_id", "[1]"]),
    "no text": ([{"question_id": 1}], ["answers.jsonl: line 1", "text"]),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answers(name, fails, questions, tmp_path):
    rows, fragments = BAD_ANSWERS[name]
    if rows is not None:
        lines(tmp_path / "answers.jsonl", *rows)
    assert_says(fails("evaluate", *score(questions, tmp_path / "answers.jsonl")), *fragments)


def test_score_without_expected_answers(fails, tmp_path):
    questions = lines(tmp_path / "questions.jsonl", {"question_id": 1, "text": "x"})
    answers = lines(tmp_path / "answers.jsonl", ANSWERS[1])
    assert_says(fails("evaluate", *score(questions, answers)), "questions.jsonl: line 1", "answer")


def test_evaluate_run_without_checkpoint(fails, questions, tmp_path):
    answers = tmp_path / "answers.jsonl"
    arguments = ["run", "--task", "exact", "--questions", questions, "--answers", answers]
    assert_says(fails("evaluate", *arguments, "--checkpoint", tmp_path / "nope"), "nope", "no checkpoint")
    assert_says(fails("evaluate", *arguments, "--checkpoint", tmp_path, "--batch-size", "0"), "--batch-size", "0")
    assert not answers.exists()
