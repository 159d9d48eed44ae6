"""generate with one prompt: what it prints, on a checkpoint of random weights. Files of questions are tested in
inference/test_questions.py, bad usage in test_commands.py."""

import io
import sys

import pytest

from neva_jax import generate
from neva_jax.errors import UserError
from neva_jax.inference.engine import Engine, Request, SamplingOptions
from tests.inference.test_engine import random_checkpoint, tiny_run

PROMPT = "What is in the picture?"
LIMIT = 30


@pytest.fixture(scope="module")
def engine(tmp_path_factory, tokenizer, tokenizer_path, llava_data):
    run = tmp_path_factory.mktemp("runs") / "random"
    random_checkpoint(run, tokenizer, *tiny_run(run, tokenizer_path, llava_data.json, llava_data.images))
    return Engine.from_checkpoint(run)


@pytest.fixture
def ask(engine, monkeypatch, capsys):
    """Runs the command with one loaded engine, whose programs are compiled once; returns what is printed."""
    monkeypatch.setattr(Engine, "from_checkpoint", classmethod(lambda cls, path, ema: engine))

    def run(*arguments):
        capsys.readouterr()
        limit = ["--max-new-tokens", str(LIMIT)]
        assert generate.main(["--checkpoint", "run", *limit, *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def paths(llava_data):
    return [llava_data.images / "0" / f"0{i}.jpg" for i in range(2)]


def expected(engine, paths, text=PROMPT, **options):
    request = Request(text, tuple(engine.read_image(path) for path in paths))
    (reply,) = engine.generate([request], SamplingOptions(max_new_tokens=LIMIT, **options))
    assert reply.text.strip()
    return reply.text + "\n"


def test_prints_the_answer_about_an_image(ask, engine, paths):
    printed = [ask("--prompt", PROMPT, "--image", path) for path in paths]
    assert printed == [expected(engine, [path]) for path in paths]
    assert printed[0] != printed[1]


def test_an_image_is_not_needed(ask, engine, paths):
    assert ask("--prompt", PROMPT) == expected(engine, []) != expected(engine, paths[:1])


def test_several_images_in_the_order_of_their_marks(ask, engine, paths):
    text = "Is <image> the same as <image>?"
    flags = ["--prompt", text, "--image", paths[0], "--image", paths[1]]
    assert ask(*flags) == expected(engine, paths, text) != expected(engine, paths[::-1], text)


def test_sampling_flags_reach_the_engine(ask, engine, paths):
    flags = ["--prompt", PROMPT, "--image", paths[0], "--temperature", "1.3", "--top-p", "0.8", "--seed", "5"]
    sampled = expected(engine, paths[:1], temperature=1.3, top_p=0.8, seed=5)
    assert ask(*flags) == ask(*flags) == sampled
    others = [{"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.3, "seed": 5}, {"temperature": 3.0, "seed": 5}, {}]
    assert sampled not in [expected(engine, paths[:1], **options) for options in others]


def test_the_answer_is_printed_as_it_grows(ask, engine, paths, monkeypatch):
    class Recorder(io.StringIO):
        def __init__(self):
            super().__init__()
            self.shown = []

        def flush(self):
            self.shown.append(self.getvalue())

    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", recorder)
        ask("--prompt", PROMPT, "--image", paths[0])
    whole = expected(engine, paths[:1])
    assert recorder.getvalue() == whole
    assert len(set(recorder.shown)) > 5
    assert all(whole.startswith(shown) for shown in recorder.shown)


def test_marks_and_images_that_differ_in_number(ask, paths):
    with pytest.raises(UserError, match="--image or --prompt: the prompt has 2 <image> marks, but 1 images are given"):
        ask("--prompt", "<image> or <image>?", "--image", paths[0])
