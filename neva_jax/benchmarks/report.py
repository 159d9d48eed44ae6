"""Rebuilds the tables and plots of docs/performance.md from the lines in docs/results.

python -m neva_jax.bench report            rewrites the page and the plots
python -m neva_jax.bench report --check    only says whether the page is what the lines make of it; status 1 if not

A table stands between `<!-- bench: NAME -->` and `<!-- end -->`; what lies between is replaced, all else is kept. Plots
are not compared: another matplotlib draws other pixels.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from neva_jax.benchmarks.tables import TABLES, Row, curves, label, sweeps
from neva_jax.errors import UserError

HELP = "the tables of docs/performance.md, from the lines in docs/results"
MARKED = re.compile(r"(<!-- bench: ([a-z_]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m neva_jax.bench report`."""
    add = parser.add_argument
    add("--results", type=Path, default=Path("docs/results"), metavar="DIR", help="default: docs/results")
    add("--page", type=Path, default=Path("docs/performance.md"), metavar="F", help="default: docs/performance.md")
    add("--images", type=Path, default=Path("docs/images"), metavar="DIR", help="default: docs/images")
    add("--check", action="store_true", help="write nothing; status 1 if the page is not current")


def run(options: argparse.Namespace) -> int:
    """Writes or checks the page; returns the exit status.

    Raises:
      UserError: no page, an unknown table, or a line that is no JSON object.
    """
    rows = read_rows(options.results)
    try:
        text = options.page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--page {options.page}: cannot be read ({error.strerror})") from None
    made = filled(text, rows, str(options.page))
    if options.check:
        if made != text:
            print(f"{options.page} is not current: run python -m neva_jax.bench report", file=sys.stderr)
        return int(made != text)
    options.page.write_text(made, encoding="utf-8")
    drawn = draw(rows, options.images)
    print(
        f"{options.page}: {len(MARKED.findall(made))} tables of {len(rows)} rows; plots: {', '.join(drawn) or 'none'}"
    )
    return 0


def read_rows(folder: Path) -> list[Row]:
    """The rows of `bench` in all `*.jsonl` of a folder, in the order of the files' names.

    Raises:
      UserError: a line that is no JSON object, with file and number.
    """
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is no JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} must be an object of fields, not {type(row).__name__}")
            if "bench" in row:
                rows.append(row)
    return rows


def filled(text: str, rows: Sequence[Row], page: str) -> str:
    """The page with its tables made anew.

    Raises:
      UserError: a marker names no table, or the page has none.
    """

    def replace(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        if name not in TABLES:
            raise UserError(f"{page}: there is no table {name!r}; the tables are {', '.join(TABLES)}")
        return f"{start}{TABLES[name](list(rows))}\n{end}"

    if MARKED.search(text) is None:
        raise UserError(f"{page}: has no <!-- bench: NAME --> … <!-- end -->; the tables are {', '.join(TABLES)}")
    return MARKED.sub(replace, text)


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Draws what there are rows for; returns the files' names.

    `cost_NAME.png`: step time and peak memory against NAME. `losses_STAGE.png`: curves of runs on the same data.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    swept = sweeps(rows)
    for name in sorted({key[-1] for key in swept}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
        for key, points in swept.items():
            if key[-1] != name:
                continue
            sizes, found = [size for size, _ in points], [row for _, row in points]
            left.plot(sizes, [row["step_ms"] for row in found], "o-", label=", ".join(key[:-1]))
            right.plot(sizes, [row.get("peak_gib") for row in found], "o-")
        left.set(xlabel=name, ylabel="step, ms", xlim=(0, None), ylim=(0, None))
        right.set(xlabel=name, ylabel="peak memory per GPU, GiB", xlim=(0, None), ylim=(0, None))
        left.legend(fontsize=7)
        drawn.append(_save(figure, folder, f"cost_{name.replace('-', '_').replace('.', '_')}.png"))
    for key, group in curves(rows).items():
        figure, axes = pyplot.subplots(figsize=(8, 4.5))
        for row in group:
            axes.plot(range(1, len(row["losses"]) + 1), row["losses"], linewidth=1, label=label(row))
        axes.set(xlabel="step", ylabel="loss", title=", ".join((*key[:3], f"{key[3]} tokens", f"{key[4]} rows")))
        axes.legend(fontsize=8)
        drawn.append(_save(figure, folder, f"losses_{re.sub('[^a-z0-9]+', '_', ' '.join(key).lower())}.png"))
    return drawn


def _save(figure, folder: Path, name: str) -> str:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(folder / name, dpi=110)
    pyplot.close(figure)
    return name
