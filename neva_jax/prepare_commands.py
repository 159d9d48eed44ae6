"""`prepare check` and `prepare lengths`: their flags; what they do is `data/check_command.py`'s."""

import argparse
from pathlib import Path


def _data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of a run: its sources, template, tokenizer and image settings")
    add("--json", metavar="F", help="instead of the sources in --config: LLaVA JSON, or JSON lines; .gz too")
    add("--images", metavar="DIR", help="the images that the rows of --json name: a folder, a .tar or a Parquet file")
    add("--records", metavar="DIR", help="instead of --json and --images: rows and images together")
    add("--tokenizer", metavar="F", help="as model.tokenizer: tokenizer.model or tokenizer.json")
    add("--template", metavar="T", help="as data.template")
    add("--max-length", metavar="N", help="as data.max_length")
    add("--workers", metavar="N", help="as data.workers: processes")
    add("overrides", nargs="*", metavar="section.key=value", help="any other key of the configuration")


def check_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `prepare check`."""
    _data_flags(parser)
    add = parser.add_argument
    add("--decode", action="store_true", help="decode every image, instead of only looking for it")
    add("--out", type=Path, metavar="DIR", help="write report.json, report.html, problems.jsonl and lengths.png there")
    add("--force", action="store_true", help="replace what is in --out")
    add(
        "--show", type=int, default=0, metavar="N", help="print N samples as the model sees them, learned tokens marked"
    )
    add("--row", action="append", default=[], metavar="R", help="show row R (from 0) too; S:R, of the source number S")
    add("--color", choices=("auto", "always", "never"), default="auto", help="of shown samples (default: auto)")


def lengths_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `prepare lengths`."""
    _data_flags(parser)


def check(options: argparse.Namespace) -> int:
    """Runs `prepare check`; returns the exit status."""
    from neva_jax.data.check_command import check

    return check(options)


def lengths(options: argparse.Namespace) -> int:
    """Runs `prepare lengths`; returns the exit status."""
    from neva_jax.data.check_command import lengths

    return lengths(options)
