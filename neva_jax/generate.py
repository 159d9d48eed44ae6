"""python -m neva_jax.generate: asks a checkpoint, about one image or for a file of questions."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging as absl_logging

from neva_jax.compile_cache import use_compile_cache
from neva_jax.data.rows import BadRow
from neva_jax.errors import CommandParser, UserError, exit_with
from neva_jax.files import check_output
from neva_jax.inference.engine import Engine, Request, SamplingOptions
from neva_jax.inference.questions import answer_questions, read_questions, write_jsonl
from neva_jax.parallel.peers import Peers
from neva_jax.parallel.processes import add_process_arguments, connected


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and answers; returns the exit status."""
    parser = CommandParser(prog="python -m neva_jax.generate", description="Ask a trained model.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run, or a step in its checkpoints/")
    parser.add_argument(
        "--ema", action="store_true", help="the averaged weights (optimizer.ema_decay) of the checkpoint"
    )
    one = parser.add_argument_group("one prompt; the answer is printed as it grows")
    one.add_argument("--prompt", metavar="S")
    one.add_argument("--image", metavar="F", action="append", default=[], help="may be given several times")
    many = parser.add_argument_group("a file of questions")
    many.add_argument("--input", metavar="F.jsonl", help="lines of {question_id, image, text}")
    many.add_argument("--images", metavar="DIR", help="folder that the image paths are relative to")
    many.add_argument("--output", metavar="F.jsonl", help="answers, in LLaVA's format")
    many.add_argument("--batch-size", type=int, default=32, metavar="N")
    add_sampling_arguments(parser)
    add_process_arguments(parser)
    options = parser.parse_args(arguments)
    absl_logging.set_verbosity(absl_logging.ERROR)
    with connected(options, devices=False) as peers:
        return _answer(options, peers)


def _answer(options: argparse.Namespace, peers: Peers) -> int:
    if (options.prompt is None) == (options.input is None):
        raise UserError("give either --prompt (with --image) or --input (with --output)")
    if options.input is not None and (options.output is None or options.image):
        raise UserError("--input needs --output, and takes its images from --images, not --image")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: must be at least 1")
    sampling = sampling_options(options)
    use_compile_cache()
    if options.input is None:
        if peers.count > 1:
            raise UserError(f"--prompt is answered by one process, not {peers.count}; they share the lines of --input")
        return _one(options, sampling)
    check_output("--output", options.output, options.input)
    questions = read_questions(options.input)
    engine = Engine.from_checkpoint(options.checkpoint, options.ema)
    answers = answer_questions(
        engine, options.input, questions, options.images, sampling, options.batch_size, str(options.checkpoint), peers
    )
    count = write_jsonl(options.output, answers, writes=peers.first)
    if peers.first:
        print(f"{count} answers in {options.output}", file=sys.stderr)
    return 0


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `SamplingOptions`."""
    group = parser.add_argument_group("how tokens are chosen")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="X")
    group.add_argument("--seed", type=int, default=0, metavar="N")


def sampling_options(options: argparse.Namespace) -> SamplingOptions:
    """The parsed flags as `SamplingOptions`; raises UserError for a value out of range."""
    return SamplingOptions(options.max_new_tokens, options.temperature, options.top_p, options.seed)


def _file(name: str) -> str:
    if not Path(name).is_file():
        raise UserError(f"--image {name}: no such file")
    return name


def _one(options: argparse.Namespace, sampling: SamplingOptions) -> int:
    engine = Engine.from_checkpoint(options.checkpoint, options.ema)
    try:
        images = [engine.read_image(_file(name)) for name in options.image]
        shown = ""
        for replies in engine.stream([Request(options.prompt, tuple(images))], sampling):
            text = replies[0].settled_text
            if text.startswith(shown):
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except BadRow as error:
        raise UserError(f"--image or --prompt: {error}") from None
    print()
    return 0


if __name__ == "__main__":
    exit_with(main)
