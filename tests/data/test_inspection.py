"""What `prepare check` finds: exact kinds and counts for a folder with each damage, and numbers against brute force."""

import json
import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from neva_jax.data import inspection
from neva_jax.data.check_command import all_sources
from neva_jax.data.inspection import (
    BAD,
    DROPPED,
    GOOD,
    KINDS,
    ROW,
    Findings,
    ImageFinding,
    ImageItem,
    Inspector,
    duplicates,
    inspect,
)
from neva_jax.data.report import EXAMPLES, PERCENTILES, make_report, problem_lines
from neva_jax.data.rows import BadRow, DroppedRow
from neva_jax.data.samples import Samples
from neva_jax.data.sources import RowRef, Sources
from tests.data.damaged import EXPECTED, NEEDS_DECODING, ROWS, encoded, noise, write_damaged
from tests.data.rows import conversation


@pytest.fixture
def damaged(config, tmp_path):
    """Makes configuration and sources of the damaged folder."""

    def make(*overrides):
        if not (tmp_path / "rows.json").exists():
            write_damaged(tmp_path)
        source = f"data.train=[{{json: {tmp_path / 'rows.json'}, images: {tmp_path / 'images'}}}]"
        settings, _ = config(source, "data.val=[]", *overrides)
        return settings, all_sources(settings)

    return make


def found(settings, sources, tokenizer, decode=True, workers=0):
    findings = inspect(sources, settings, tokenizer, decode, workers)
    return findings, make_report(findings)


def kinds(findings):
    return {problem.ref.row: problem.kind for problem in findings.problems}


# --- every damage once -----------------------------------------------------------------------------------------------


def test_each_damage_is_found_under_its_kind(damaged, tokenizer):
    settings, sources = damaged()
    findings, report = found(settings, sources, tokenizer)
    assert kinds(findings) == EXPECTED
    counts = Counter(EXPECTED.values())
    assert {kind: one["rows"] for kind, one in report["bad"].items()} == counts
    assert list(report["bad"]) == [kind for kind in KINDS if kind in counts]
    assert report["problems"] == report["rows"]["bad"] == len(EXPECTED)
    assert report["rows"]["good"] == len(ROWS) - len(EXPECTED)
    assert report["dropped"] == {}


def test_without_decoding_images_are_only_looked_for(damaged, tokenizer):
    settings, sources = damaged()
    findings, report = found(settings, sources, tokenizer, decode=False)
    assert kinds(findings) == {row: kind for row, kind in EXPECTED.items() if kind not in NEEDS_DECODING}
    assert report["images"]["opened"] == 0
    assert report["duplicate_images"] is None


def test_without_a_tokenizer_nothing_is_measured(damaged):
    settings, sources = damaged()
    findings, report = found(settings, sources, None)
    assert kinds(findings) == {row: kind for row, kind in EXPECTED.items() if kind != "too_long"}
    assert report["lengths"] is report["packing"] is None


def test_settings_decide_what_is_bad(damaged, tokenizer):
    settings, sources = damaged("data.images_per_row=2", "data.max_length=4096", "data.max_pixels=50000000")
    findings, _ = found(settings, sources, tokenizer)
    for fine in ("too_many_images", "too_long", "image_too_large"):
        assert fine not in kinds(findings).values()


@pytest.mark.parametrize(
    ("policy", "state", "cut"), [("drop", DROPPED, 0), ("truncate_text", GOOD, 1), ("error", BAD, 0)]
)
def test_long_rows_by_policy(damaged, tokenizer, policy, state, cut):
    settings, sources = damaged(f"data.on_long_row={policy}")
    findings, report = found(settings, sources, tokenizer)
    row = next(row for row, kind in EXPECTED.items() if kind == "too_long")
    line = findings.tables[0][row]
    assert line["state"] == state
    assert report["rows"]["cut"] == cut
    assert {kind: one["rows"] for kind, one in report["dropped"].items()} == (
        {"too_long": 1} if policy == "drop" else {}
    )
    assert line["used"] == (settings.data.max_length if cut else 0)
    assert line["tokens"] > settings.data.max_length


def test_messages_name_the_row_and_say_what_training_says(damaged, tokenizer):
    settings, sources = damaged()
    findings, report = found(settings, sources, tokenizer)
    samples = Samples(sources, settings, tokenizer)
    lines = list(problem_lines(findings))
    assert [line["row"] for line in lines] == sorted(EXPECTED)
    for line in lines:
        if line["kind"] not in NEEDS_DECODING:
            with pytest.raises(BadRow) as error:
                samples.make(RowRef(0, line["row"]))
            assert line["message"] == str(error.value)
        assert line["file"] == sources.configs[0].json
        raw = ROWS[line["row"]][0]
        assert line["id"] == (raw["id"] if isinstance(raw, dict) else "")
        assert line["state"] == "bad"
    for kind, one in report["bad"].items():
        expected = [row for row, found_kind in EXPECTED.items() if found_kind == kind]
        assert [example["row"] for example in one["examples"]] == expected[:EXAMPLES]


def test_a_row_of_no_json(damaged, tokenizer, monkeypatch):
    settings, sources = damaged()
    plain = Sources.raw

    def raw(self, ref):
        if ref.row == 1:
            raise BadRow("byte 7 of the file is no JSON")
        return plain(self, ref)

    monkeypatch.setattr(Sources, "raw", raw)
    findings, _ = found(settings, sources, tokenizer, decode=False)
    assert kinds(findings)[1] == "no_json"


def test_nothing_supervised_and_a_refusing_template(damaged, tokenizer, monkeypatch):
    settings, sources = damaged()
    plain = Samples.measured

    def measured(self, ref):
        if ref.row == 0:
            raise DroppedRow("has nothing to learn")
        if ref.row == 1:
            raise BadRow("the template refuses it")
        return plain(self, ref)

    monkeypatch.setattr(Samples, "measured", measured)
    findings, report = found(settings, sources, tokenizer, decode=False)
    assert kinds(findings)[0] == "nothing_supervised"
    assert kinds(findings)[1] == "template"
    assert report["dropped"]["nothing_supervised"]["rows"] == report["rows"]["dropped"] == 1
    assert report["problems"] == sum(kind not in NEEDS_DECODING for kind in EXPECTED.values()) + 1


TURNS = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x <image>"}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"conversations": TURNS}, "marks"),
        ({"conversations": TURNS, "image": []}, "marks"),
        ({"conversations": TURNS, "image": None}, "marks"),
        ({"conversations": TURNS, "image": ["a.jpg", "a.jpg"]}, "marks"),
        ({"conversations": TURNS, "video": "v"}, "marks"),
        ({"conversations": TURNS, "image": ["a.jpg", ""]}, "structure"),
        ({"conversations": TURNS, "image": ["a.jpg", 3]}, "structure"),
        ({"conversations": TURNS, "image": {"path": "a.jpg"}}, "structure"),
        ({"conversations": TURNS, "image": "a\ud800.jpg"}, "structure"),
        ({"conversations": TURNS, "image": "a.jpg", "video": "v"}, "structure"),
        ({"conversations": TURNS, "video": 3}, "structure"),
        ({"conversations": TURNS[:1]}, "structure"),
        ({"conversations": [TURNS[1], TURNS[0]]}, "structure"),
        ({"conversations": []}, "structure"),
        ({"conversations": "<image>"}, "structure"),
        ({"conversations": [["human", "<image>"]]}, "structure"),
        ({"conversations": [{"from": "human", "value": None}, TURNS[1]]}, "structure"),
        ({}, "structure"),
        ([], "structure"),
        (None, "structure"),
        ("<image>", "structure"),
    ],
)
def test_marks_and_structure_are_told_apart(config, tmp_path, row, kind):
    path = tmp_path / "one.json"
    path.write_text(json.dumps([row]))
    settings, _ = config(f"data.train=[{{json: {path}, images: {tmp_path}}}]", "data.val=[]")
    (problem,) = inspect(all_sources(settings), settings, None, False, 0).problems
    assert problem.kind == kind


# --- videos and sizes ------------------------------------------------------------------------------------------------


def test_videos_are_looked_at_frame_by_frame(config, tokenizer, tmp_path):
    frames = {"good": 3, "torn": 3, "empty": 0}
    for name, count in frames.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            content = encoded(noise(i), "PNG")
            (tmp_path / "images" / name / f"{i}.png").write_bytes(
                content[:200] if (name, i) == ("torn", 2) else content
            )
    names = [*frames, "absent"]
    rows = [conversation(name, "<video>\nWhat?", "x", video=name) for name in names]
    path = tmp_path / "videos.json"
    path.write_text(json.dumps(rows))
    source = f"data.train=[{{json: {path}, images: {tmp_path / 'images'}}}]"
    settings, _ = config(source, "data.val=[]", "data.video_frames=3")
    findings, report = found(settings, all_sources(settings), tokenizer)
    assert kinds(findings) == {1: "image_broken", 2: "image_missing", 3: "image_missing"}
    assert report["images"]["videos"] == report["rows"]["with_video"] == 4
    assert report["images"]["distinct"] == report["images"]["named"] == 0
    findings, _ = found(settings, all_sources(settings), tokenizer, decode=False)
    assert kinds(findings) == {2: "image_missing", 3: "image_missing"}


def test_anyres_needs_sizes_so_it_opens_images_without_decoding_them(damaged, tokenizer):
    grids = ["data.image_grids=[[32, 64], [64, 32]]", "model.projector.newline=true", "data.image_mode=anyres"]
    settings, sources = damaged(*grids)
    findings, report = found(settings, sources, tokenizer, decode=False)
    seen = kinds(findings)
    assert {row: kind for row, kind in EXPECTED.items() if kind not in NEEDS_DECODING}.items() <= seen.items()
    broken = {row for row, kind in EXPECTED.items() if kind == "image_too_large"}
    assert all(seen[row] == "image_too_large" for row in broken)
    assert report["images"]["opened"] > 0
    samples = Samples(sources, settings, tokenizer)
    good = np.flatnonzero(findings.tables[0]["state"] == GOOD)
    for row in good:
        if findings.tables[0][row]["images"] and EXPECTED.get(row) is None:
            assert findings.tables[0][row]["used"] == len(samples.make(RowRef(0, int(row))).encoded.tokens) - 1


# --- numbers ---------------------------------------------------------------------------------------------------------


def spread(values):
    """The smallest value with p percent of the values at or below it, from the definition."""
    if not values:
        return {"count": 0}
    ordered = sorted(values)

    def percentile(percent):
        return ordered[max(math.ceil(percent * len(ordered) / 100), 1) - 1]

    shown = {f"p{percent}": percentile(percent) for percent in PERCENTILES}
    return {"count": len(values), "sum": sum(values), "min": ordered[0], **shown, "max": ordered[-1]}


def test_counts_and_lengths_are_those_of_brute_force(damaged, tokenizer):
    settings, sources = damaged()
    _, report = found(settings, sources, tokenizer)
    raw = [row for row, _ in ROWS]
    parsed = [row for row, kind in ROWS if kind not in ("structure", "marks")]
    images = [[row["image"]] if isinstance(row.get("image"), str) else row.get("image", []) for row in parsed]
    rows = report["rows"]
    assert rows["rows"] == len(raw)
    assert rows["rounds"] == sum(len(row["conversations"]) // 2 for row in parsed)
    assert rows["text_only"] == sum(not names and "video" not in row for names, row in zip(images, parsed, strict=True))
    assert rows["with_images"] == sum(bool(names) for names in images)
    assert rows["with_video"] == 1
    assert report["images"]["named"] == sum(map(len, images))
    ids = Counter(row["id"] for row in raw if isinstance(row, dict) and row["id"] is not None)
    several = {name: count for name, count in ids.items() if count > 1}
    assert report["duplicate_ids"]["ids"] == len(several) == 1
    assert report["duplicate_ids"]["rows"] == sum(several.values()) == 2
    assert report["duplicate_ids"]["examples"] == [
        {"id": "good", "count": 2, "rows": [{"file": sources.configs[0].json, "row": row} for row in (0, 21)]}
    ]
    assert report["duplicate_images"] == {
        "contents": 1,
        "files": 2,
        "examples": [{"count": 2, "names": ["a.jpg", "sub/copy.jpg"]}],
    }
    # Lengths from samples that are made in full, too long ones included.
    free = replace(settings, data=replace(settings.data, max_length=10**6))
    samples = Samples(sources, free, tokenizer)
    lengths, supervised, used = [], [], []
    for row, (_, kind) in enumerate(ROWS):
        if kind in ("structure", "marks", "too_many_images", "video_refused") or "absent" in json.dumps(raw[row]):
            continue
        if kind in (None, "too_long"):
            encoded_row = samples.make(RowRef(0, row)).encoded
            lengths.append((row, len(encoded_row.tokens) - 1))
            if kind is None:
                supervised.append(int((encoded_row.weights[1:] > 0).sum()))
                used.append(lengths[-1][1])
    table = inspect(sources, settings, tokenizer, False, 0).tables[0]
    assert [(row, int(table[row]["tokens"])) for row, _ in lengths] == lengths
    made = [samples.make(RowRef(0, row)).encoded for row, _ in lengths]
    alike = 0
    while all(
        one.tokens[alike] == made[0].tokens[alike] and one.slots[alike] == -1 and one.weights[alike + 1] == 0
        for one in made
    ):
        alike += 1
    assert report["lengths"]["same_beginning"] == alike > 0
    histogram = report["lengths"]["supervised"].pop("histogram")
    assert report["lengths"]["supervised"] == spread(supervised)
    counts = Counter(value // histogram["width"] for value in supervised)
    assert histogram["counts"] == [counts[i] for i in range(max(counts) + 1)]
    assert report["packing"]["tokens"] == sum(used)
    assert report["packing"]["padded_useful"] == round(sum(used) / (len(used) * settings.data.max_length), 4)
    assert 0 < report["packing"]["packed_rows"] <= len(used)


def test_sizes_formats_and_modes(damaged, tokenizer):
    settings, sources = damaged()
    _, report = found(settings, sources, tokenizer)
    images = report["images"]
    # a, copy, zeros: 50 x 40 JPEG; grey 50 x 40; b, half: 30 x 60 PNG
    assert images["formats"] == {"JPEG": 3, "PNG": 3}
    assert images["modes"] == {"RGB": 5, "L": 1}
    assert images["sizes"] == [
        {"width": 50, "height": 40, "images": 4},
        {"width": 30, "height": 60, "images": 2},
    ]
    assert images["width"] == spread([50] * 4 + [30] * 2)
    assert images["shorter_than_model"] == 2
    assert images["bad"] == {"image_missing": 3, "image_broken": 2, "image_incomplete": 1, "image_too_large": 1}
    assert images["distinct"] == 3 + 8


def test_one_name_in_several_records_is_no_duplicate(damaged):
    settings, sources = damaged()
    names = ["a", "b", "a", "c", "d"]
    digests = [b"1", b"1", b"1", b"2", b"2"]
    findings = Findings(settings, sources, measured=False, decoded=True)
    findings.tables = [np.zeros(1, ROW)]
    findings.items = [ImageItem(RowRef(0, row), name, "image") for row, name in enumerate(names)]
    findings.images = [ImageFinding(digest=digest) for digest in digests]
    assert make_report(findings)["duplicate_images"] == {
        "contents": 2,
        "files": 4,
        "examples": [{"count": 2, "names": ["a", "b"]}, {"count": 2, "names": ["c", "d"]}],
    }


def test_each_image_is_looked_at_once(damaged, tokenizer, monkeypatch):
    settings, sources = damaged()
    seen = []
    plain = Inspector.image
    monkeypatch.setattr(Inspector, "image", lambda self, item: (seen.append(item.name), plain(self, item))[1])
    found(settings, sources, tokenizer)
    assert len(seen) == len(set(seen)) == 11


def test_duplicates_against_brute_force():
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 50, 500):
        keys = rng.integers(0, max(size // 2, 1), size).astype(np.uint64)
        places = defaultdict(list)
        for place, key in enumerate(keys.tolist()):
            places[key].append(place)
        expected = [group for key, group in places.items() if key and len(group) > 1]
        assert [group.tolist() for group in duplicates(keys)] == expected


# --- processes -------------------------------------------------------------------------------------------------------


def test_the_number_of_workers_changes_nothing(damaged, tokenizer, monkeypatch):
    settings, sources = damaged()
    _, expected = found(settings, sources, tokenizer)
    for name, size in (("ROWS", 3), ("IMAGES", 2), ("NAMES", 2)):
        monkeypatch.setattr(inspection, name, size)
    monkeypatch.setattr(inspection, "usable_cores", lambda: 2)
    for workers in (0, 1, 2):
        findings, report = found(settings, sources, tokenizer, workers=workers)
        assert report == expected
        assert kinds(findings) == EXPECTED
