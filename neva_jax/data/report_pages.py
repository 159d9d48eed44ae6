"""A report (`report.py`) for people: printed, as a page of HTML, and its histograms as a picture."""

import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from neva_jax.data.report import example_rows

matplotlib.use("Agg")
PICTURE = "lengths.png"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
vertical-align: top; border-bottom: 1px solid #ddd; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.bad { color: #a11; } .good { color: #171; } code { overflow-wrap: anywhere; } img { max-width: 100%; }
"""


# --- what both show: sections of lines, each a name, a value and a remark


def _sections(report: dict[str, Any]) -> Iterable[tuple[str, list[tuple[str, str, str]]]]:
    rows, images, lengths = report["rows"], report["images"], report["lengths"]
    yield "Files", [(one["file"], _n(one["rows"]), _remark(one)) for one in report["files"]]
    shown = [
        ("all", _n(rows["rows"]), ""),
        ("good", _n(rows["good"]), f"{_n(rows['cut'])} of them cut to fit" if rows["cut"] else ""),
        ("bad", _n(rows["bad"]), ""),
        ("dropped", _n(rows["dropped"]), ""),
        ("text only", _n(rows["text_only"]), ""),
        ("with images", _n(rows["with_images"]), ""),
        ("with a video", _n(rows["with_video"]), ""),
        ("rounds", _n(rows["rounds"]), ""),
    ]
    yield "Rows", shown
    for name, title in (("bad", "Bad rows"), ("dropped", "Dropped rows")):
        if report[name]:
            yield title, [(kind, _n(one["rows"]), one["meaning"]) for kind, one in report[name].items()]
    yield "Images", list(_image_lines(report, images))
    if lengths is not None:
        settings = report["settings"]
        yield (
            f"Tokens (template {settings['template']}, max_length {settings['max_length']})",
            [
                ("in a row", "", _spread(lengths["tokens"])),
                ("supervised", "", _spread(lengths["supervised"])),
                ("all begin alike", _n(lengths["same_beginning"]), "tokens without label (train.constant_prefix)"),
                *_packing_lines(report["packing"]),
            ],
        )
    yield "Duplicates", list(_duplicate_lines(report))


def _image_lines(report: dict[str, Any], images: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    how = "decoded" if report["settings"]["decoded"] else "only looked for; --decode opens them"
    if images["opened"] and not report["settings"]["decoded"]:
        how = "opened for their size; --decode decodes them"
    yield "named", _n(images["named"]), ""
    yield "distinct", _n(images["distinct"]), how if images["distinct"] else ""
    if images["videos"]:
        yield "videos", _n(images["videos"]), ""
    for kind, count in images["bad"].items():
        yield kind, _n(count), ""
    if images["opened"]:
        yield "formats", "", _counts(images["formats"])
        yield "modes", "", _counts(images["modes"])
        yield "width", "", _spread(images["width"])
        yield "height", "", _spread(images["height"])
        sizes = [f"{one['width']} x {one['height']}: {_n(one['images'])}" for one in images["sizes"][:5]]
        yield "frequent sizes", "", ", ".join(sizes)
        size = report["settings"]["image_size"]
        yield "enlarged", _n(images["shorter_than_model"]), f"a side is shorter than the model's {size} pixels"


def _packing_lines(packing: dict[str, Any] | None) -> Iterable[tuple[str, str, str]]:
    if packing is None:
        return
    padded, packed = (f"{100 * packing[name]:.1f} %" for name in ("padded_useful", "packed_useful"))
    yield "padded", padded, f"useful in {_n(packing['samples'])} rows of one sample each"
    most = f"of at most {_n(packing['tiles_per_row'])} image tiles each (data.images_per_row)"
    yield "packed", packed, f"useful in {_n(packing['packed_rows'])} rows with data.pack, {most}"


def _duplicate_lines(report: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    ids, images = report["duplicate_ids"], report["duplicate_images"]
    yield "ids", _n(ids["ids"]), f"that {_n(ids['rows'])} rows have" if ids["ids"] else ""
    for one in ids["examples"]:
        yield "", _n(one["count"]), f"'{one['id']}': {example_rows(one['rows'])}"
    if images is None:
        yield "images", "", "not looked for; --decode compares their content"
        return
    yield "images", _n(images["contents"]), f"under {_n(images['files'])} names" if images["contents"] else ""
    for one in images["examples"]:
        yield "", _n(one["count"]), ", ".join(one["names"])


def _n(number: int) -> str:
    return f"{number:,}"


def _remark(file: dict[str, Any]) -> str:
    parts = [f"{_n(file[name])} {name}" for name in ("bad", "dropped") if file[name]]
    return "; ".join([*parts, *([f"images in {file['images']}"] if file["images"] is not None else [])])


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_n(count)}" for name, count in counts.items())


def _spread(spread: dict[str, Any]) -> str:
    if not spread["count"]:
        return "none"
    mean = spread["sum"] / spread["count"]
    shown = [("min", "min"), ("p5", "5 %"), ("p50", "50 %"), ("p95", "95 %"), ("p99", "99 %"), ("max", "max")]
    return "   ".join([*(f"{title} {_n(spread[name])}" for name, title in shown), f"mean {mean:,.1f}"])


# --- printed


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    lines = []
    for title, content in _sections(report):
        lines.append(title)
        width = max((len(name) for name, _, _ in content), default=0)
        number = max((len(value) for _, value, _ in content), default=0)
        for name, value, remark in content:
            lines.append(f"  {name:<{width}}  {value:>{number}}  {remark}".rstrip())
        for kind, one in report.get({"Bad rows": "bad", "Dropped rows": "dropped"}.get(title, ""), {}).items():
            lines.append(f"  {kind}:")
            lines += [f"    {_where(line, report)}: {line['message']}" for line in one["examples"]]
            if (more := one["rows"] - len(one["examples"])) > 0:
                lines.append(f"    … and {_n(more)} more")
        lines.append("")
    return "\n".join([*lines, verdict(report)])


def verdict(report: dict[str, Any]) -> str:
    """The last line: whether there are problems."""
    bad, total = report["rows"]["bad"], report["rows"]["rows"]
    return f"{_n(bad)} of {_n(total)} rows are bad" if bad else f"no problems in {_n(total)} rows"


def _where(line: dict[str, Any], report: dict[str, Any]) -> str:
    """Names a row; its file only where there are several."""
    file = f"{line['file']}: " if len(report["files"]) > 1 else ""
    return f"{file}row {line['row']}" + (f" (id '{line['id']}')" if line["id"] else "")


# --- files


def as_html(report: dict[str, Any], picture: bool) -> str:
    """The report as one page without scripts; `picture`: whether PICTURE lies beside it."""
    escape = html.escape
    parts = [
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>",
        "<meta http-equiv=Content-Security-Policy "
        "content=\"default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'\">",
        f"<title>prepare check: {escape(verdict(report))}</title>\n<style>{_STYLE}</style>",
        f"<h1 class={'bad' if report['problems'] else 'good'}>{escape(verdict(report))}</h1>",
    ]
    for title, content in _sections(report):
        parts.append(f"<h2>{escape(title)}</h2>\n<table>")
        parts += [
            f"<tr><th>{escape(name)}<td class=n>{escape(value)}<td>{escape(remark)}" for name, value, remark in content
        ]
        parts.append("</table>")
        kinds = report.get({"Bad rows": "bad", "Dropped rows": "dropped"}.get(title, ""), {})
        for kind, one in kinds.items():
            parts.append(f"<h3>{escape(kind)}</h3>\n<ul>")
            parts += [
                f"<li><code>{escape(_where(line, report))}: {escape(line['message'])}</code>"
                for line in one["examples"]
            ]
            if (more := one["rows"] - len(one["examples"])) > 0:
                parts.append(f"<li>… and {_n(more)} more, in problems.jsonl")
            parts.append("</ul>")
        if title.startswith("Tokens") and picture:
            parts.append(f'<img src="{PICTURE}" alt="histograms of the tokens in a row, and of those supervised">')
    return "\n".join(parts) + "\n</html>\n"


def draw_lengths(report: dict[str, Any], path: Path) -> None:
    """Draws the histograms of tokens in a row and of supervised tokens into the PNG `path`."""
    lengths, longest = report["lengths"], report["settings"]["max_length"]
    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, title in zip(
        axes, ("tokens", "supervised"), ("tokens in a row", "supervised tokens in a row"), strict=True
    ):
        width, counts = lengths[name]["histogram"]["width"], lengths[name]["histogram"]["counts"]
        axis.bar([width * (i + 0.5) for i in range(len(counts))], counts, width)
        axis.set(xlabel=title, ylabel="rows", xlim=(0, None))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3, axis="y")
        if name == "tokens" and len(counts) * width >= longest:
            axis.axvline(longest, color="tab:red", linewidth=1, label=f"data.max_length = {longest}")
            axis.legend()
    figure.savefig(path, format="png")


def write_report(report: dict[str, Any], problems: Iterable[dict[str, Any]], folder: Path) -> None:
    """Writes report.json, report.html, problems.jsonl, and lengths.png where rows were measured."""
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with (folder / "problems.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in problems)
    picture = report["lengths"] is not None
    if picture:
        draw_lengths(report, folder / PICTURE)
    (folder / "report.html").write_text(as_html(report, picture), encoding="utf-8")
