"""python -m neva_jax.bench: measurements. One JSON line per row on stdout, with all conditions in it.

Each sub-command is a module of `neva_jax/benchmarks`: `HELP`, `add_flags(parser)`, and `rows(options)`, which yields
the rows. `report` makes the tables of docs/performance.md from rows.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from neva_jax.benchmarks import attention, report
from neva_jax.benchmarks import input as input_benchmark
from neva_jax.benchmarks import save as save_benchmark
from neva_jax.benchmarks import start as start_benchmark
from neva_jax.benchmarks import train as train_benchmark
from neva_jax.errors import CommandParser, exit_with

BENCHMARKS = {
    "input": input_benchmark,
    "train": train_benchmark,
    "attention": attention,
    "save": save_benchmark,
    "start": start_benchmark,
}
COMMANDS = {**BENCHMARKS, "report": report}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and measures; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    summary = "\n".join(f"  {name:10} {module.HELP}" for name, module in COMMANDS.items())
    parser = CommandParser(
        prog="python -m neva_jax.bench",
        description=f"Measurements: one JSON line per row, all conditions in it.\n\n{summary}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="each has its own --help")
    module = COMMANDS[parser.parse_args(arguments[:1]).command]
    # A parser of its own: those that argparse makes for sub-commands cannot mix flags and overrides.
    own = CommandParser(
        prog=f"{parser.prog} {arguments[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_flags(own)
    options = own.parse_intermixed_args(arguments[1:])
    if module is report:
        return report.run(options)
    for row in module.rows(options):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    exit_with(main)
