"""What `prepare check` and `prepare lengths` do, from parsed flags to what is printed and written."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from neva_jax.checks import check_data
from neva_jax.config import Config, SourceConfig
from neva_jax.configfile import load_config
from neva_jax.data.inspection import inspect
from neva_jax.data.lengths import BAD, DROPPED, row_lengths
from neva_jax.data.plans import Plans
from neva_jax.data.report import make_report, problem_lines
from neva_jax.data.samples_shown import show, spread_refs
from neva_jax.data.sources import RowRef, Sources
from neva_jax.data.tiles import tiles_per_row
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError
from neva_jax.interop.output import check_folder, replacing_folder


def check(options: argparse.Namespace) -> int:
    """Looks at every row and image, and reports; returns 2 if a row is bad, else 0.

    Raises:
      UserError: the configuration, a file of rows, or --out cannot be used.
    """
    config = _config(options)
    tokenizer = None if config.model.tokenizer is None else Tokenizer.from_file(config.model.tokenizer)
    if options.out is not None:
        check_folder(options.out, options.force, _read_paths(config))
    if options.show < 0:
        raise UserError(f"--show {options.show}: must not be negative")
    if (options.show or options.row) and tokenizer is None:
        raise UserError("--show and --row need --tokenizer, or model.tokenizer in --config")
    sources = all_sources(config)
    refs = [*spread_refs(sources, options.show), *(_row(text, sources) for text in options.row)]
    if refs:
        color = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
        show(sources, config, tokenizer, refs, color, print)
    findings = inspect(sources, config, tokenizer, options.decode, config.data.workers)
    report = make_report(findings)
    from neva_jax.data.report_pages import as_text, write_report  # matplotlib takes a second to import

    print(as_text(report))
    if options.out is not None:
        with replacing_folder(options.out) as fresh:
            write_report(report, problem_lines(findings), fresh)
        print(f"written: {options.out / 'report.html'}, and report.json, problems.jsonl beside it")
    return 2 if report["problems"] else 0


def lengths(options: argparse.Namespace) -> int:
    """Measures the rows of the training and validation sources where no table is cached, and plans their packing.

    Raises:
      UserError: the configuration, a file of rows, or the cache folder cannot be used.
    """
    config = _config(options)
    if config.model.tokenizer is None:
        raise UserError("--tokenizer is not set; give it, or model.tokenizer in --config")
    tokenizer = Tokenizer.from_file(config.model.tokenizer)
    for split, sources in _splits(config):
        started, measured = time.monotonic(), []
        tables = row_lengths(sources, config, tokenizer, measured.append)
        seconds = time.monotonic() - started
        for source, name in enumerate(tables.names):
            table = tables[source]
            rows = sources.configs[source].records or sources.configs[source].json
            bad, dropped = (int((table["state"] == state).sum()) for state in (BAD, DROPPED))
            print(f"{split}: {rows}: {len(table):,} rows, {bad:,} bad, {dropped:,} dropped")
            print(f"  in {tables.folder / name}.npy")
        total = sum(len(tables[source]) for source in range(len(tables.names)))
        if measured:
            print(f"  measured in {seconds:.1f} s, {total / seconds:,.0f} rows/s")
        else:
            print("  all of it was there already")
        plan = Plans(sources, tables, config)[0]
        useful = 100 * plan.tokens / (plan.rows * config.data.max_length)
        print(
            f"  packed: {sources.epoch_size:,} samples in {plan.rows:,} rows of {config.data.max_length} tokens and at "
            f"most {tiles_per_row(config)} image tiles, {useful:.1f} % of the tokens useful"
            + ("" if config.data.pack else " (data.pack is false: not in use)")
        )
    return 0


# --- from flags to a configuration and its rows


def _config(options: argparse.Namespace) -> Config:
    given = {name: getattr(options, name) for name in ("json", "images", "records")}
    sources = []
    if any(value is not None for value in given.values()):
        if (options.json is None) == (options.records is None):
            raise UserError("give either --json (and --images), or --records")
        if options.records is not None and options.images is not None:
            raise UserError("--images is for --json; the rows of --records bring their images")
        source = {name: value for name, value in given.items() if value is not None}
        sources = [f"data.train={json.dumps([source])}", "data.val=[]", "data.val_fraction=0"]
    elif options.config is None and not any(text.startswith("data.train=") for text in options.overrides):
        raise UserError("give --config, or --json and --images")
    keys = {
        "model.tokenizer": options.tokenizer and json.dumps(options.tokenizer),
        "data.template": options.template and json.dumps(options.template),
        "data.max_length": options.max_length,
        "data.workers": options.workers,
    }
    flags = [f"{key}={value}" for key, value in keys.items() if value is not None]
    config = load_config(options.config, [*options.overrides, *sources, *flags])
    check_data(config)
    return config


def _read_paths(config: Config) -> tuple[Path, ...]:
    paths = [
        path
        for source in [*config.data.train, *config.data.val]
        for path in (source.json or None, source.images, source.records)
        if path is not None
    ]
    return tuple(map(Path, paths))


# The two places that know how sources are opened.


def all_sources(config: Config) -> Sources:
    """Every file of training and validation rows once, with all of its rows."""
    every: dict[tuple, SourceConfig] = {}
    for source in [*config.data.train, *config.data.val]:
        every.setdefault((source.json, source.images, source.records), replace(source, weight=1.0))
    data = replace(config.data, train=list(every.values()), val=[], val_fraction=0.0, sampling="epochs")
    return Sources(data, "train", seed=0, shuffle=False)


def _splits(config: Config) -> list[tuple[str, Sources]]:
    """The sources as training opens them, so that it finds their tables and plans."""
    found = [("training", Sources(config.data, "train", config.run.seed, shuffle=True))]
    if config.data.val or config.data.val_fraction:
        found.append(("validation", Sources(config.data, "val", config.run.seed, shuffle=False)))
    return found


def _row(text: str, sources: Sources) -> RowRef:
    source, _, row = text.rpartition(":")
    if not row.isdecimal() or not (source or "0").isdecimal():
        raise UserError(f"--row {text}: must be a row number from 0 on, or SOURCE:ROW")
    ref = RowRef(int(source or 0), int(row))
    if ref.source >= len(sources.configs):
        raise UserError(f"--row {text}: there is no source {ref.source}; there are {len(sources.configs)}")
    if ref.row >= sources.rows_in(ref.source):
        raise UserError(f"--row {text}: there is no row {ref.row}; the source has {sources.rows_in(ref.source)}")
    return ref
