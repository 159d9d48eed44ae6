"""python -m neva_jax.evaluate: answers a benchmark's questions, and scores the answers."""

import argparse
import json
import sys
from collections.abc import Sequence

from absl import logging as absl_logging

from neva_jax.compile_cache import use_compile_cache
from neva_jax.errors import CommandParser, UserError, exit_with
from neva_jax.evaluation.exact import exact_match, expected_answers
from neva_jax.files import check_output
from neva_jax.generate import add_sampling_arguments, sampling_options
from neva_jax.inference.engine import Engine
from neva_jax.inference.questions import answer_questions, read_jsonl, read_questions, write_jsonl
from neva_jax.parallel.peers import Peers
from neva_jax.parallel.processes import add_process_arguments, connected

TASKS = {"exact": exact_match}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs or scores; returns the exit status."""
    parser = CommandParser(prog="python -m neva_jax.evaluate", description="Evaluate a trained model.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="answer the questions and score the answers")
    run.add_argument("--checkpoint", required=True, metavar="DIR")
    run.add_argument("--ema", action="store_true", help="the averaged weights (optimizer.ema_decay) of the checkpoint")
    run.add_argument("--images", metavar="DIR", help="folder that the image paths are relative to")
    run.add_argument("--batch-size", type=int, default=32, metavar="N")
    add_sampling_arguments(run)
    add_process_arguments(run)
    score = commands.add_parser("score", help="score answers that are there")
    for command in (run, score):
        command.add_argument("--task", required=True, choices=sorted(TASKS))
        command.add_argument("--questions", required=True, metavar="F.jsonl")
        command.add_argument("--answers", required=True, metavar="F.jsonl")
        command.add_argument("--json", action="store_true", help="print the score as one JSON object")
    options = parser.parse_args(arguments)
    absl_logging.set_verbosity(absl_logging.ERROR)

    if options.command == "run":
        with connected(options, devices=False) as peers:
            return _run(options, peers)
    return _score(options)


def _run(options: argparse.Namespace, peers: Peers) -> int:
    questions = read_questions(options.questions)
    expected_answers(questions, options.questions)
    check_output("--answers", options.answers, options.questions)
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: must be at least 1")
    sampling = sampling_options(options)
    use_compile_cache()
    engine = Engine.from_checkpoint(options.checkpoint, options.ema)
    rows = answer_questions(
        engine, options.questions, questions, options.images, sampling, options.batch_size, options.checkpoint, peers
    )
    write_jsonl(options.answers, rows, writes=peers.first)
    if not peers.first:
        return 0
    print(f"answers in {options.answers}", file=sys.stderr)
    return _score(options)


def _score(options: argparse.Namespace) -> int:
    questions = read_questions(options.questions)
    expected_answers(questions, options.questions)
    answers = _read_answers(options.answers, {question.id for question in questions})
    result = TASKS[options.task](questions, answers, options.questions)
    if options.json:
        print(json.dumps({"task": options.task, "accuracy": result.accuracy, **vars(result)}))
        return 0
    for name, (right, total) in result.categories.items():
        print(f"  {name}: {right / total:.2f} ({right}/{total})")
    print(f"{options.task} match: {result.accuracy:.2f} ({result.right}/{result.total})")
    return 0


def _read_answers(path: str, wanted: set[str | int]) -> dict[str | int, str]:
    """Answers by question_id; raises UserError unless there is just one for each question."""
    answers: dict[str | int, str] = {}
    for number, row in read_jsonl(path):
        identity, text = row.get("question_id"), row.get("text")
        if not isinstance(identity, str | int) or identity not in wanted:
            raise UserError(f"{path}: line {number}: question_id {identity!r} is not in the question file")
        if identity in answers:
            raise UserError(f"{path}: line {number}: question_id {identity!r} is answered twice")
        if not isinstance(text, str):
            raise UserError(f"{path}: line {number}: field text must be text, not {text!r}")
        answers[identity] = text
    if missing := wanted - answers.keys():
        raise UserError(
            f"{path}: {len(missing)} questions have no answer, such as question_id {min(missing, key=str)!r}"
        )
    return answers


if __name__ == "__main__":
    exit_with(main)
