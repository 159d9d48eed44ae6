"""From what was found out about rows and images to a report: plain dictionaries, lists and numbers, for report.json.

Nothing in it depends on the time, the machine or the number of processes. All text in it is safe to print.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from neva_jax.data.inspection import BAD, DROPPED, GOOD, KINDS, Findings, duplicates
from neva_jax.data.packing import pack
from neva_jax.data.sources import RowRef
from neva_jax.data.tiles import tiles_per_row
from neva_jax.printable import printable

VERSION = 1
EXAMPLES = 5  # of each kind
BINS = 40
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def make_report(findings: Findings) -> dict[str, Any]:
    """The report; `problems` is its number of bad rows, which decides the exit status."""
    table = np.concatenate(findings.tables) if findings.tables else np.zeros(0)
    data, vision = findings.config.data, findings.config.model.vision
    parsed, good = table[table["parsed"]], table[table["state"] == GOOD]
    report: dict[str, Any] = {
        "version": VERSION,
        "problems": int((table["state"] == BAD).sum()),
        "settings": {
            "decoded": findings.decoded,
            "measured": findings.measured,
            "template": data.template,
            "max_length": data.max_length,
            "on_long_row": data.on_long_row,
            "image_mode": data.image_mode,
            "image_size": vision.image_size,
            "images_per_row": data.images_per_row,
        },
        "files": [
            {
                "file": _file(findings, source),
                "images": None if config.images is None else printable(config.images),
                **_states(findings.tables[source]),
            }
            for source, config in enumerate(findings.sources.configs)
        ],
        "rows": {
            **_states(table),
            "cut": int(table["cut"].sum()),
            "text_only": int(((parsed["images"] == 0) & ~parsed["video"]).sum()),
            "with_images": int((parsed["images"] > 0).sum()),
            "with_video": int(parsed["video"].sum()),
            "rounds": int(parsed["rounds"].sum(dtype=np.int64)),
        },
        "bad": _kinds(findings, BAD),
        "dropped": _kinds(findings, DROPPED),
        "images": _images(findings, int(parsed["images"].sum(dtype=np.int64))),
        "duplicate_ids": _duplicate_ids(findings, table),
        "duplicate_images": _duplicate_images(findings) if findings.decoded else None,
        "lengths": None,
        "packing": None,
    }
    if findings.measured:
        whole, supervised = table["tokens"][table["tokens"] > 0], good["supervised"]
        report["lengths"] = {
            "tokens": {**_distribution(whole), "histogram": _histogram(whole)},
            "supervised": {**_distribution(supervised), "histogram": _histogram(supervised)},
            "same_beginning": 0 if findings.beginning is None else len(findings.beginning),
        }
        report["packing"] = _packing(findings, good)
    return report


def _file(findings: Findings, source: int) -> str:
    config = findings.sources.configs[source]
    return printable(config.records or config.json)


def _states(table: np.ndarray) -> dict[str, int]:
    counts = np.bincount(table["state"], minlength=3) if len(table) else np.zeros(3, int)
    return {"rows": len(table), "good": int(counts[GOOD]), "bad": int(counts[BAD]), "dropped": int(counts[DROPPED])}


def _kinds(findings: Findings, state: int) -> dict[str, Any]:
    """Rows and examples of each kind that occurs, in the order of KINDS."""
    found: dict[str, dict[str, Any]] = {}
    for problem in findings.problems:
        if problem.state != state:
            continue
        kind = found.setdefault(problem.kind, {"meaning": KINDS[problem.kind], "rows": 0, "examples": []})
        kind["rows"] += 1
        if len(kind["examples"]) < EXAMPLES:
            kind["examples"].append(_line(findings, problem.ref, problem.id, problem.message))
    return {kind: found[kind] for kind in KINDS if kind in found}


def problem_lines(findings: Findings) -> Iterator[dict[str, Any]]:
    """The lines of problems.jsonl: every row that cannot be used, in the order of the files."""
    for problem in findings.problems:
        line = _line(findings, problem.ref, problem.id, problem.message)
        yield {"state": "bad" if problem.state == BAD else "dropped", "kind": problem.kind, **line}


def _line(findings: Findings, ref: RowRef, name: str, message: str) -> dict[str, Any]:
    return {"file": _file(findings, ref.source), "row": ref.row, "id": name, "message": message}


def _images(findings: Findings, named: int) -> dict[str, Any]:
    images = [one for item, one in zip(findings.items, findings.images, strict=True) if item.field == "image"]
    opened = [one for one in images if one.format]
    widths, heights = (np.array([getattr(one, side) for one in opened]) for side in ("width", "height"))
    sizes = Counter((one.width, one.height) for one in opened)
    return {
        "named": named,
        "distinct": len(images),
        "videos": len(findings.items) - len(images),
        "bad": _counted(one.kind for one in images if one.kind),
        "opened": len(opened),
        "formats": _counted(one.format for one in opened),
        "modes": _counted(one.mode for one in opened),
        "width": _distribution(widths),
        "height": _distribution(heights),
        "shorter_than_model": sum(
            min(one.width, one.height) < findings.config.model.vision.image_size for one in opened
        ),
        "sizes": [
            {"width": width, "height": height, "images": count}
            for (width, height), count in sorted(sizes.items(), key=lambda size: (-size[1], size[0]))[:10]
        ],
    }


def _counted(names: Iterator[str]) -> dict[str, int]:
    """Counts of names, the most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda one: (-one[1], one[0])))


def _duplicate_ids(findings: Findings, table: np.ndarray) -> dict[str, Any]:
    """Ids that several rows have, of all files together."""
    first = np.cumsum([0, *(len(table) for table in findings.tables)])

    def ref(place: int) -> RowRef:
        source = int(np.searchsorted(first, place, "right")) - 1
        return RowRef(source, int(place - first[source]))

    found: dict[str, Any] = {"ids": 0, "rows": 0, "examples": []}
    for places in duplicates(table["id"]):
        found["ids"] += 1
        found["rows"] += len(places)
        if len(found["examples"]) < EXAMPLES:
            refs = [ref(place) for place in places[:EXAMPLES]]
            rows = [{"file": _file(findings, one.source), "row": one.row} for one in refs]
            name = printable(findings.sources.row_id(refs[0]), most=80)
            found["examples"].append({"id": name, "count": len(places), "rows": rows})
    return found


def _duplicate_images(findings: Findings) -> dict[str, Any]:
    """Contents that stand under several names; rows of records that bring the same file are none."""
    names: dict[bytes, dict[str, None]] = {}
    for item, one in zip(findings.items, findings.images, strict=True):
        if one.digest:
            names.setdefault(one.digest, {})[item.name] = None
    groups = [list(group) for group in names.values() if len(group) > 1]
    return {
        "contents": len(groups),
        "files": sum(map(len, groups)),
        "examples": [
            {"count": len(group), "names": [printable(name, most=200) for name in group[:EXAMPLES]]}
            for group in groups[:EXAMPLES]
        ],
    }


def _distribution(values: np.ndarray) -> dict[str, Any]:
    """Numbers that some of the values really have: the p-th percentile is the smallest with p % at or below it."""
    if not len(values):
        return {"count": 0}
    percentiles = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {
        "count": len(values),
        "sum": int(values.sum(dtype=np.int64)),
        "min": int(values.min()),
        **{f"p{percent}": int(value) for percent, value in zip(PERCENTILES, percentiles, strict=True)},
        "max": int(values.max()),
    }


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """`counts[i]` values lie in `width * i` … `width * (i + 1) - 1`."""
    width = int(values.max()) // BINS + 1 if len(values) else 1
    return {"width": width, "counts": np.bincount(values // width, minlength=1).tolist() if len(values) else []}


def _packing(findings: Findings, good: np.ndarray) -> dict[str, Any] | None:
    """How full rows of `max_length` would be: of one pass over the usable rows, in the order of the files."""
    config, used = findings.config, good["used"].astype(np.int64)
    if not len(used):
        return None
    room = (config.data.max_length, tiles_per_row(config), config.data.segments_per_row)
    rows = int(pack(used, good["tiles"].astype(np.int64), *room).max()) + 1
    tokens = int(used.sum())
    return {
        "tiles_per_row": room[1],
        "samples": len(used),
        "tokens": tokens,
        "packed_rows": rows,
        "packed_useful": round(tokens / (rows * config.data.max_length), 4),
        "padded_useful": round(tokens / (len(used) * config.data.max_length), 4),
    }


def example_rows(rows: Sequence[dict[str, Any]]) -> str:
    """`a.json 3, 7; b.json 1`, for people."""
    files: dict[str, list[str]] = {}
    for row in rows:
        files.setdefault(row["file"], []).append(str(row["row"]))
    return "; ".join(f"{file} {', '.join(numbers)}" for file, numbers in files.items())
