"""Rows by number from JSON files, against json.load; files that are broken in every way; what a worker is sent."""

import gzip
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from neva_jax.config import SourceConfig
from neva_jax.data import json_index, row_files
from neva_jax.data.row_files import JsonRows, open_rows
from neva_jax.data.rows import BadRow
from neva_jax.errors import UserError

ROWS = [
    {"id": "a", "conversations": [{"from": "human", "value": 'Grüße 🙂 "quoted\\" \\\\'}]},
    "no row, [but] {that}, is found later",
    None,
    17,
    [],
    {},
    [1, [2, {"a": '"]}'}]],
    {"id": "b|c", "text": "\\"},
]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def write(path, content):
    path.write_bytes(content)
    return path


def all_rows(rows):
    return [rows.raw(i) for i in range(len(rows))]


def refused(path, cache):
    with pytest.raises(UserError) as error:
        JsonRows(path, cache)
    return str(error.value).removeprefix(f"{path}: ")


# --- good files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_list(tmp_path, cache, mark, indent, ascii_only):
    content = mark + b" \n" + json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only).encode() + b"\r\n "
    rows = JsonRows(write(tmp_path / "rows.json", content), cache)
    assert not rows.lines
    assert all_rows(rows) == ROWS


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n  \n\t\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines(tmp_path, cache, end, mark):
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    for content in (end.join(lines), end.join(lines) + end, end + end.join(lines)):
        rows = JsonRows(write(tmp_path / "rows.jsonl", mark + content), cache)
        assert rows.lines
        assert all_rows(rows) == ROWS


def test_lines_are_told_by_what_they_are(tmp_path, cache):
    one, two = JsonRows(write(tmp_path / "rows.json", b'{"id": 1}\n{"id": 2}\n'), cache), None
    assert one.lines
    assert all_rows(one) == [{"id": 1}, {"id": 2}]
    two = JsonRows(write(tmp_path / "rows.jsonl", b'[{"id": 1},\n{"id": 2}]\n'), cache)
    assert not two.lines
    assert all_rows(two) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize("name", ["rows.json.gz", "rows.jsonl.gz", "rows"])
def test_packed_files(tmp_path, cache, name):
    lines = "jsonl" in name
    text = "\n".join(map(json.dumps, ROWS)) if lines else json.dumps(ROWS)
    path = write(tmp_path / name, gzip.compress(text.encode()))
    assert all_rows(JsonRows(path, cache)) == ROWS
    (unpacked,) = cache.glob("unpacked-*")
    before = unpacked.stat().st_ino
    assert all_rows(JsonRows(path, cache)) == ROWS
    assert unpacked.stat().st_ino == before  # not unpacked again; its time says when it was used
    assert list(cache.glob(".*.tmp")) == []


def random_value(rng, depth=0):
    text = "".join(rng.choice('a"\\{}[],: \n|é🙂\u2028') for _ in range(rng.randrange(12)))
    kind = rng.randrange(7 if depth < 3 else 4)
    if kind > 3:
        values = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return values if kind > 5 else {f"{text}{i}": value for i, value in enumerate(values)}
    return [text, rng.random(), None, rng.choice([True, -3])][kind]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1000])
def test_pieces_may_end_anywhere(tmp_path, cache, piece, monkeypatch):
    """A file is read in pieces: 40 random files, cut at every size."""
    monkeypatch.setattr(json_index, "_PIECE", piece)
    rng = random.Random(piece)
    for _ in range(40):
        values = [random_value(rng) for _ in range(rng.randrange(1, 9))]
        ascii_only, indent = rng.random() < 0.5, rng.choice([None, 1])
        content = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode()
        assert all_rows(JsonRows(write(tmp_path / "rows.json", content), cache)) == values
        values.insert(0, {})  # lines that begin with a list would be taken for a list
        lines = "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
        assert all_rows(JsonRows(write(tmp_path / "rows.jsonl", lines.encode()), cache)) == values


def test_the_index_of_a_large_file_is_kept(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(row_files, "SMALL", 10)
    path = write(tmp_path / "rows.json", json.dumps(ROWS).encode())
    assert all_rows(JsonRows(path, cache)) == ROWS
    monkeypatch.setattr(row_files, "index_list", None)  # would fail if it were called
    again = JsonRows(path, cache)
    assert all_rows(again) == ROWS
    assert not again.bounds.flags.writeable
    (tmp_path / "moved").mkdir()
    os.rename(path, moved := tmp_path / "moved" / "other.json")
    assert all_rows(JsonRows(moved, cache)) == ROWS


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_a_broken_index_is_made_again(tmp_path, cache, monkeypatch, content):
    monkeypatch.setattr(row_files, "SMALL", 10)
    path = write(tmp_path / "rows.json", json.dumps(ROWS).encode())
    JsonRows(path, cache)
    (index,) = cache.glob("rows-*.npy")
    index.write_bytes(index.read_bytes()[:-8] if content is None else content)
    assert all_rows(JsonRows(path, cache)) == ROWS


def test_a_changed_file_is_indexed_anew(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(row_files, "SMALL", 10)
    path = write(tmp_path / "rows.json", b'[{"id": 1}, {"id": 22}]')
    first = JsonRows(path, cache)
    write(path, b'[{"id": 11}, {"id": 2}]')
    os.utime(path, ns=(1, 1))
    second = JsonRows(path, cache)
    assert all_rows(second) == [{"id": 11}, {"id": 2}]
    assert first.key != second.key
    with pytest.raises(UserError, match="has changed since it was opened"):
        pickle.loads(pickle.dumps(first))
    write(path, b"[1]")
    with pytest.raises(UserError, match="has changed since it was opened"):
        second.raw(1)


def test_a_worker_is_sent_no_rows(tmp_path, cache):
    values = [{"id": i, "text": "x" * 100} for i in range(20_000)]
    for name, text in (("rows.json", json.dumps(values)), ("rows.jsonl", "\n".join(map(json.dumps, values)))):
        path = write(tmp_path / f"{name}.gz", gzip.compress(text.encode(), 1))
        sent = pickle.dumps(JsonRows(path, cache))
        assert len(sent) < 1000
        there = pickle.loads(sent)
        assert (len(there), there.raw(19_999)) == (20_000, values[-1])


def test_a_config_of_json_is_opened(tmp_path, cache):
    path = write(tmp_path / "rows.json", json.dumps(ROWS).encode())
    rows = open_rows(SourceConfig(json=str(path)), cache)
    assert all_rows(rows) == ROWS
    assert rows.images(0) is None


MEASURE = """
import resource, sys
from pathlib import Path
from neva_jax.data.row_files import JsonRows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = JsonRows(sys.argv[1], Path(sys.argv[2]))
for i in range(0, len(rows), 997):
    rows.raw(i)
print(len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz"])
def test_a_large_file_needs_little_memory(tmp_path, cache, name):
    """50 MB are indexed and read with less new memory than that; json.load takes several times as much."""
    row = json.dumps({"id": "x", "conversations": [{"from": "human", "value": 'a "b", [c] \\ ' * 60}]})
    count = 50_000_000 // len(row)
    text = "\n".join([row] * count) if "jsonl" in name else f"[{', '.join([row] * count)}]"
    content = text.encode()
    path = write(tmp_path / name, gzip.compress(content, 1) if name.endswith("gz") else content)
    run = subprocess.run([sys.executable, "-c", MEASURE, path, cache], capture_output=True, text=True, check=True)
    rows, kilobytes = map(int, run.stdout.split())
    assert rows == count
    assert kilobytes < 45_000


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b" \n\t ", "holds no rows"),
        (b"\xef\xbb\xbf", "holds no rows"),
        (b"[]", "holds no rows"),
        (b"[ \n]\n", "holds no rows"),
        (b'[{"id": 1},\n {"id" 2}]', "line 2 column 8 (byte 19) is no JSON (Expecting ':' delimiter)"),
        ('[{"é": 1},\n {"é" 2}]'.encode(), "line 2 column 7 (byte 19) is no JSON (Expecting ':' delimiter)"),
        (b'["\xff", {"id" 2}]', "line 1 column 13 (byte 12) is no JSON (Expecting ':' delimiter)"),
        (b'[{"\xff\xe9\xe9": "a" 2}]', "line 1 column 14 (byte 13) is no JSON (Expecting ',' delimiter)"),
        (b'[\n\n"caf\n"]', "line 3 column 5 (byte 7) is no JSON (Invalid control character at)"),
        (b"[1,]", "line 1 column 4 (byte 3) is no JSON (Expecting value)"),
        (b"[,1]", "line 1 column 2 (byte 1) is no JSON (Expecting value)"),
        (b"[1 2]", "line 1 column 4 (byte 3) is no JSON (Extra data)"),
        (b"[1, 2] x", "line 1 column 8 (byte 7) is no JSON (Extra data after the list)"),
        (b"[1, 2][3]", "line 1 column 7 (byte 6) is no JSON (Extra data after the list)"),
        (b"[1, 2]" + b" " * 10 + b"\0", "line 1 column 17 (byte 16) is no JSON (Extra data after the list)"),
        (b"[1, 2}", "line 1 column 6 (byte 5) is no JSON (the list ends with a wrong bracket)"),
        (b"[[1}, 2]", "line 1 column 4 (byte 3) is no JSON (Expecting ',' delimiter)"),
        (
            b'[{"id": 1},\n{"id": 2}\n',
            "line 3 column 1 (byte 22) is no JSON (the list does not end); the file is cut off",
        ),
        (b'[{"id": 1},\n{"id": "ab', "line 2 column 8 (byte 19) is no JSON (Unterminated string starting at)"),
        (
            b'[{"id": 1, {"id": 2}]',
            "line 1 column 12 (byte 11) is no JSON (Expecting property name enclosed in double quotes)",
        ),
        (b"[" * 100_000, "line 1 column 100001 (byte 100000) is no JSON (the list does not end); the file is cut off"),
        (b"{}\nx", None),
        (b'{\n "id": 1\n}', "holds an object; it must hold a list of rows, or one row a line"),
        (b'{"images": []}\n', "holds an object; it must hold a list of rows, or one row a line"),
        (b'{"images": []}\n{"images": []}\n', None),
        (b'{"a" 1}', "line 1 column 6 (byte 5) is no JSON (Expecting ':' delimiter)"),
        (b'"rows"', "must hold a list of rows, or one row a line"),
        (b"null", "must hold a list of rows, or one row a line"),
        (b"id,text\n", "line 1 column 1 (byte 0) is no JSON (Expecting value)"),
        (b"\xff\xfe[\0]\0", "line 1 column 1 (byte 0) is no JSON (Expecting value)"),
    ],
)
def test_a_file_that_is_no_json(tmp_path, cache, content, message):
    path = write(tmp_path / "rows.json", content)
    if message is None:
        assert len(JsonRows(path, cache)) == 2
    else:
        assert refused(path, cache) == message


@pytest.mark.parametrize("piece", [1, 3, 2**20])
def test_line_and_column_are_those_of_python(tmp_path, cache, monkeypatch, piece):
    monkeypatch.setattr(json_index, "_PIECE", piece)
    text = '[{"é": "🙂"},\n\n {"語": 1}, {"🙂é" 2}]'
    with pytest.raises(json.JSONDecodeError) as error:
        json.loads(text)
    where = f"line {error.value.lineno} column {error.value.colno} (byte {len(text[: error.value.pos].encode())})"
    assert refused(write(tmp_path / "rows.json", text.encode()), cache).startswith(f"{where} is no JSON")


BAD_ROWS = [
    (b'{"id" 2}', "byte {6} of the file is no JSON (Expecting ':' delimiter)"),
    ('{"é": "🙂" 2}'.encode(), "byte {14} of the file is no JSON (Expecting ',' delimiter)"),
    (b'{"a": "\xff"}', "byte {7} of the file is no UTF-8 (invalid start byte)"),
    (b'{"a": NaN}', "is no JSON (NaN is no JSON number)"),
    (b'{"a": [1, -Infinity]}', "is no JSON (-Infinity is no JSON number)"),
    (b"[" * 50_000 + b"]" * 50_000, "is nested too deeply"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "is nested too deeply"),
    (b'{"a": ' + b"1" * 5000 + b"}", "is no JSON (Exceeds the limit (4300 digits)"),
    (b'{"a": 1} {"a": 2}', "byte {9} of the file is no JSON (Extra data)"),
    (b'{"a": "cut', "byte {6} of the file is no JSON (Unterminated string starting at)"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_line_is_one_bad_row(tmp_path, cache, bad, message):
    first = b'{"id": 0}\n'
    rows = JsonRows(write(tmp_path / "rows.jsonl", first + bad + b'\n{"id": 2}'), cache)
    assert (rows.raw(0), rows.raw(2), len(rows)) == ({"id": 0}, {"id": 2}, 3)
    with pytest.raises(BadRow) as error:
        rows.raw(1)
    if "{" in message:
        before, rest = message.split("{")
        message = f"{before}{len(first) + int(rest.split('}')[0])}{rest.split('}')[1]}"
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 7])
def test_what_leaves_no_doubt_where_a_row_ends_is_one_bad_row_of_a_list(tmp_path, cache, number):
    rows = JsonRows(write(tmp_path / "rows.json", b'[{"id": 0},' + BAD_ROWS[number][0] + b',{"id": 2}]'), cache)
    assert (rows.raw(0), rows.raw(2), len(rows)) == ({"id": 0}, {"id": 2}, 3)
    with pytest.raises(BadRow):
        rows.raw(1)


@pytest.mark.parametrize("kind", ["list", "lines"])
def test_a_row_that_is_too_long_is_not_read(tmp_path, cache, kind, monkeypatch):
    monkeypatch.setattr(json_index, "_PIECE", 100)
    for module in (json_index, row_files):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    rows = ['{"id": 0}', f'{{"a": "{"x" * 2000}"}}', '{"id": 2}']
    path = write(tmp_path / "rows.json", ("\n".join(rows) if kind == "lines" else f"[{','.join(rows)}]").encode())
    opened = JsonRows(path, cache)
    assert (opened.raw(0), opened.raw(2)) == ({"id": 0}, {"id": 2})
    with pytest.raises(BadRow, match=r"^has 2,009 bytes, more than 1,000$"):
        opened.raw(1)
    with_open_end = write(tmp_path / "open.json", b'[{"id": 0}, {"a": "' + b"x" * 5000)
    assert (
        refused(with_open_end, cache)
        == "line 1 column 5020 (byte 5019) is no JSON (the list does not end); the file is cut off"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:-20], "cannot be unpacked after byte"),
        (lambda packed: packed[:-8] + bytes(8), "cannot be unpacked after byte"),
        (lambda packed: packed[:100] + bytes(50) + packed[150:], "cannot be unpacked after byte"),
        (lambda packed: packed + b"trailing", "cannot be unpacked after byte"),
    ],
)
def test_a_damaged_packed_file(tmp_path, cache, damage, message):
    content = json.dumps([random.Random(0).random() for _ in range(1000)]).encode()
    path = write(tmp_path / "rows.json.gz", damage(gzip.compress(content)))
    assert refused(path, cache).startswith(message)
    assert [file for file in cache.iterdir() if file.suffix != ".lock"] == []


def test_a_packed_file_that_unpacks_without_end(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 2**20)
    path = write(tmp_path / "rows.json.gz", gzip.compress(b"[" + b" " * 30_000_000 + b"1]"))
    assert "unpacks to more than 200 times" in refused(path, cache)
    assert [file for file in cache.iterdir() if file.suffix != ".lock"] == []


def test_files_that_cannot_be_read(tmp_path, cache):
    os.mkfifo(tmp_path / "pipe.json")
    for name, reason in {
        "absent.json": "No such file or directory",
        ".": "no regular file",
        "pipe.json": "no regular file",
    }.items():
        assert refused(tmp_path / name, cache) == f"cannot be read ({reason})"


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "SMALL", 10)
    write(tmp_path / "file", b"")
    path = write(tmp_path / "rows.json", json.dumps(ROWS).encode())
    with pytest.raises(UserError, match=r"^data\.cache=.*file: cannot be written to"):
        JsonRows(path, tmp_path / "file")


def test_bounds_are_those_of_the_file(tmp_path, cache):
    rows = JsonRows(write(tmp_path / "rows.json", b' [ 1, "a,b" ,{"c": [2]}] '), cache)
    np.testing.assert_array_equal(rows.bounds, [[2, 4], [5, 12], [13, 23]])
