"""python -m neva_jax.prepare: what is done once with data, before it is trained on."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from neva_jax.config import DataConfig, SourceConfig
from neva_jax.errors import CommandParser, UserError, exit_with
from neva_jax.interop.output import check_folder, readable, replacing_folder
from neva_jax.prepare_commands import check, check_flags, lengths, lengths_flags

_SHOWN = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and prepares; returns the exit status."""
    parser = CommandParser(prog="python -m neva_jax.prepare", description="Prepare data for training.")
    commands = parser.add_subparsers(dest="command", required=True)
    check_flags(commands.add_parser("check", help="read every row and image, and say what is wrong with which"))
    lengths_flags(commands.add_parser("lengths", help="measure the rows for data.pack=true"))
    _records_flags(commands.add_parser("records", help="rows and images together, as ArrayRecord or TFDS"))
    options = parser.parse_args(arguments)
    return {"check": check, "lengths": lengths, "records": _records}[options.command](options)


def _records_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", required=True, metavar="F", help="LLaVA JSON, JSON lines or SteerLM lines; .gz too")
    add("--images", metavar="DIR", help="the images that rows name: a folder, a .tar or a Parquet file")
    add("--format", choices=("array_record", "tfds"), default="array_record", help="default: array_record")
    add("--out", required=True, type=Path, metavar="DIR", help="the folder for data.train[0].records")
    add("--name", default="llava", help="of the TFDS data set, as in tfds.data_source(NAME, data_dir=DIR) (llava)")
    add("--shard-rows", type=int, default=10_000, metavar="N", help="most rows in one file (default: 10000)")
    add("--skip-bad", action="store_true", help="leave bad rows out, and count them, instead of stopping at the first")
    add("--cache", metavar="DIR", help="as data.cache: the folder of indexes")
    add("--force", action="store_true", help="replace what is in --out")


def _records(options: argparse.Namespace) -> int:
    from neva_jax.data.records import write_records

    if options.shard_rows < 1:
        raise UserError(f"--shard-rows {options.shard_rows}: must be at least 1")
    if not re.fullmatch("[a-z][a-z0-9_]*", options.name):
        raise UserError(f"--name {options.name}: must be small letters, digits and _, as TFDS wants it")
    check_folder(options.out, options.force, (Path(options.json), Path(options.images or options.json)))
    data = DataConfig(train=[SourceConfig(json=options.json, images=options.images)], cache=options.cache)
    with replacing_folder(options.out) as fresh:
        done = write_records(data, fresh, options.format, options.name, options.shard_rows, options.skip_bad)
    for message in done.bad[:_SHOWN]:
        print(f"left out {message}", file=sys.stderr)
    if len(done.bad) > _SHOWN:
        print(f"… and {len(done.bad) - _SHOWN} more", file=sys.stderr)
    print(
        f"{options.out}: {done.rows} rows, {done.images} images ({readable(done.image_bytes)}), "
        f"{len(done.bad)} bad rows left out"
    )
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Grain starts JAX, but nothing here is computed on a device
    exit_with(main)
