"""python -m neva_jax.bench: measurements. One JSON line per row on stdout, with all conditions in it.

Each sub-command is a module of `neva_jax/benchmarks`: `HELP`, `add_flags(parser)`, and `rows(options)`, which yields
the rows.
"""

import argparse
import json
from collections.abc import Sequence

from neva_jax.benchmarks import input as input_benchmark
from neva_jax.benchmarks import save as save_benchmark
from neva_jax.errors import CommandParser, exit_with

BENCHMARKS = {"input": input_benchmark, "save": save_benchmark}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and measures; returns the exit status."""
    parser = CommandParser(
        prog="python -m neva_jax.bench",
        description="Measurements: one JSON line per row, all conditions in it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in BENCHMARKS.items():
        module.add_flags(
            commands.add_parser(
                name,
                help=module.HELP,
                description=module.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    options = parser.parse_args(arguments)
    for row in BENCHMARKS[options.command].rows(options):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    exit_with(main)
