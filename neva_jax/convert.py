"""python -m neva_jax.convert: changes the form of tokenizers (and, with later versions, of checkpoints)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from neva_jax.data.tokenizer import add_tokens
from neva_jax.errors import CommandParser, UserError, exit_with
from neva_jax.files import check_output, replacing


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and converts; returns the exit status."""
    parser = CommandParser(prog="python -m neva_jax.convert", description="Convert files.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add-tokens", help="append special tokens to a SentencePiece model")
    add.add_argument("--input", required=True, metavar="F")
    add.add_argument("--output", required=True, metavar="F")
    add.add_argument(
        "--tokens", required=True, nargs="+", metavar="T", help="the new tokens, in the order of their ids"
    )
    add.add_argument(
        "--control", action="store_true", help="control pieces, which text never matches; default: user-defined pieces"
    )
    add.add_argument("--force", action="store_true", help="overwrite --output")
    return _add_tokens(parser.parse_args(arguments))


def _add_tokens(options: argparse.Namespace) -> int:
    output = Path(options.output)
    try:
        serialized = Path(options.input).read_bytes()
    except OSError as error:
        raise UserError(f"--input {options.input}: cannot be read ({error.strerror})") from None
    check_output("--output", output)
    if output.exists() and not options.force:
        raise UserError(f"--output {output}: exists; name another file, or add --force")
    serialized, ids = add_tokens(serialized, options.tokens, options.control, options.input)
    with replacing(output) as fresh:
        fresh.write_bytes(serialized)
    for token, identity in zip(options.tokens, ids, strict=True):
        print(f"{identity}  {token}")
    print(f"new size: {ids[-1] + 1}")
    return 0


if __name__ == "__main__":
    exit_with(main)
