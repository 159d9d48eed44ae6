"""Rows of LLaVA JSON: what a good one becomes, and what each bad one is told."""

import json

import pytest

from neva_jax.data.rows import BadRow, Row, Turn, parse_row, read_json
from neva_jax.errors import UserError

HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Hello"}


def row(*turns, **fields):
    return {"id": "a", "conversations": list(turns), **fields}


def asks(text, **fields):
    return row({"from": "human", "value": text}, GPT, **fields)


# --- parse_row -------------------------------------------------------------------------------------------------------


def test_a_row_with_an_image():
    assert parse_row(asks("<image>\nWhat?", image="0/a.jpg")) == Row(
        "a", ("0/a.jpg",), (Turn("user", "<image>\nWhat?"), Turn("assistant", "Hello"))
    )


def test_a_row_with_several_images_and_rounds():
    raw = row({"from": "human", "value": "<image><image>"}, GPT, {"from": "human", "value": "or <image>"}, GPT)
    assert parse_row({**raw, "image": ["a.jpg", "b.jpg", "a.jpg"]}) == Row(
        "a",
        ("a.jpg", "b.jpg", "a.jpg"),
        (
            Turn("user", "<image><image>"),
            Turn("assistant", "Hello"),
            Turn("user", "or <image>"),
            Turn("assistant", "Hello"),
        ),
    )


@pytest.mark.parametrize("fields", [{}, {"image": None}, {"image": []}])
def test_a_row_without_image(fields):
    assert parse_row(row(HUMAN, GPT, **fields)) == Row("a", (), (Turn("user", "Hi"), Turn("assistant", "Hello")))


def test_roles_have_two_names_each():
    turns = [{"from": name, "value": "x"} for name in ("user", "assistant", "human", "assistant", "user", "gpt")]
    assert [turn.role for turn in parse_row(row(*turns)).turns] == ["user", "assistant"] * 3


@pytest.mark.parametrize(("fields", "expected"), [({}, ""), ({"id": 17}, "17"), ({"id": "x/1"}, "x/1")])
def test_the_id_is_text(fields, expected):
    assert parse_row({"conversations": [HUMAN, GPT], **fields}).id == expected


def test_other_fields_and_empty_texts_do_no_harm():
    raw = row({"from": "human", "value": "", "weight": 1}, {"from": "gpt", "value": ""}, model="x")
    assert parse_row(raw).turns == (Turn("user", ""), Turn("assistant", ""))


def test_a_row_with_a_video():
    parsed = parse_row(asks("<video>\nWhat happens?", video="0/clip"))
    turns = (Turn("user", "<video>\nWhat happens?"), Turn("assistant", "Hello"))
    assert parsed == Row("a", (), turns, "0/clip")
    assert (parsed.count("<video>"), parsed.count("<image>")) == (1, 0)
    assert parsed.with_frames(2) == (Turn("user", "<image><image>\nWhat happens?"), Turn("assistant", "Hello"))


@pytest.mark.parametrize("fields", [{"image": None}, {"image": []}])
def test_empty_images_beside_a_video_do_no_harm(fields):
    assert parse_row(asks("<video>", video="clip", **fields)).video == "clip"


def test_a_video_mark_in_an_answer_is_text():
    turns = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "no <video> here"}]
    parsed = parse_row(row(*turns, video="clip"))
    assert parsed.with_frames(2) == (Turn("user", "<image><image>"), Turn("assistant", "no <video> here"))


@pytest.mark.parametrize("fields", [{}, {"video": None}])
def test_without_a_video_its_mark_is_text(fields):
    parsed = parse_row(asks("What does <video> do in HTML? <video>", **fields))
    assert (parsed.video, parsed.count("<video>")) == (None, 2)


BAD = [
    (None, "must be an object, not None"),
    ("x", "must be an object, not 'x'"),
    ([HUMAN, GPT], "must be an object, not [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value..."),
    ({"id": "a"}, "field conversations must be a list of turns, not None"),
    ({"conversations": []}, "field conversations must be a list of turns, not []"),
    ({"conversations": {}}, "field conversations must be a list of turns, not {}"),
    ({"conversations": "Hi"}, "field conversations must be a list of turns, not 'Hi'"),
    (row("Hi"), "field conversations[0] must be an object with from and value, not 'Hi'"),
    (row(HUMAN, None), "field conversations[1] must be an object with from and value, not None"),
    (row(HUMAN, {"value": "x"}), "field conversations[1].from must be human or gpt, not None"),
    (row(HUMAN, {"from": "bot", "value": "x"}), "field conversations[1].from must be human or gpt, not 'bot'"),
    (row(HUMAN, {"from": "GPT", "value": "x"}), "field conversations[1].from must be human or gpt, not 'GPT'"),
    (row({"from": 1, "value": "x"}), "field conversations[0].from must be human or gpt, not 1"),
    (row({"from": ["human"], "value": "x"}), "field conversations[0].from must be human or gpt, not ['human']"),
    (
        row({"from": "human", "value": "so \ud83d"}, GPT),
        "field conversations[0].value has '\\ud83d' at character 3, half a surrogate pair",
    ),
    (asks("<image>", image="\udc80.jpg"), "field image has '\\udc80' at character 0, half a surrogate pair"),
    (
        row({"from": "system", "value": "x"}, HUMAN, GPT),
        "field conversations[0].from must be human or gpt, not 'system'",
    ),
    (row({"from": "human"}, GPT), "field conversations[0].value must be text, not None"),
    (row(HUMAN, {"from": "gpt", "value": 4}), "field conversations[1].value must be text, not 4"),
    (row(HUMAN, {"from": "gpt", "value": ["x"]}), "field conversations[1].value must be text, not ['x']"),
    (row(GPT, HUMAN), "field conversations[0].from is gpt, but turns must alternate human, gpt, human, …"),
    (row(HUMAN, HUMAN), "field conversations[1].from is human, but turns must alternate human, gpt, human, …"),
    (row(HUMAN, GPT, GPT), "field conversations[2].from is gpt, but turns must alternate human, gpt, human, …"),
    (row(HUMAN), "field conversations has 1 turns; the last must be an answer of gpt"),
    (row(HUMAN, GPT, HUMAN), "field conversations has 3 turns; the last must be an answer of gpt"),
    (asks("<image>", image=""), "field image must be a path or a list of paths, not ''"),
    (asks("<image>", image=3), "field image must be a path or a list of paths, not 3"),
    (asks("<image>", image=False), "field image must be a path or a list of paths, not False"),
    (asks("<image>", image={"a": 1}), "field image must be a path or a list of paths, not {'a': 1}"),
    (asks("<image>", image=["a.jpg", None]), "field image must be a path or a list of paths, not ['a.jpg', None]"),
    (asks("<image>", image=[""]), "field image must be a path or a list of paths, not ['']"),
    (asks("<image>"), "field conversations has 1 <image> marks in human turns, but field image has 0"),
    (asks("Hi", image="a.jpg"), "field conversations has 0 <image> marks in human turns, but field image has 1"),
    (
        asks("<image><image>", image="a"),
        "field conversations has 2 <image> marks in human turns, but field image has 1",
    ),
    (
        row(HUMAN, {"from": "gpt", "value": "<image>"}, image="a.jpg"),
        "field conversations has 0 <image> marks in human turns, but field image has 1",
    ),
    (asks("<video>", video=""), "field video must be the path of a folder of frames, not ''"),
    (asks("<video>", video=["a"]), "field video must be the path of a folder of frames, not ['a']"),
    (asks("<video>", video=3), "field video must be the path of a folder of frames, not 3"),
    (asks("<video>", video="\udc80"), "field video has '\\udc80' at character 0, half a surrogate pair"),
    (
        asks("<video><image>", video="a", image="b.jpg"),
        "has both field image and field video; a row may have images or a video, not both",
    ),
    (
        asks("<video><image>", video="a"),
        "field conversations has 1 <image> marks in human turns, but field image has 0",
    ),
    (asks("Hi", video="a"), "field conversations has 0 <video> marks in human turns; field video needs one"),
    (
        asks("<video><video>", video="a"),
        "field conversations has 2 <video> marks in human turns; field video needs one",
    ),
]


@pytest.mark.parametrize(("raw", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_told_what_is_wrong(raw, message):
    with pytest.raises(BadRow) as error:
        parse_row(raw)
    assert str(error.value) == message


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(BadRow) as error:
        parse_row({"conversations": "x" * 1000})
    assert str(error.value) == f"field conversations must be a list of turns, not '{'x' * 56}..."


# --- read_json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_rows_are_read_as_they_stand(tmp_path, mark):
    rows = [asks("Grüße 🙂"), "no row, but that is found later", None]
    path = tmp_path / "rows.json"
    path.write_bytes(mark + json.dumps(rows, ensure_ascii=False).encode())
    assert read_json(path) == read_json(str(path)) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 column 1 is no JSON (Expecting value)"),
        (b'[{"id": 1},\n {"id" 2}]', "line 2 column 8 is no JSON (Expecting ':' delimiter)"),
        (b'[\n{"id": "a"},\n{"id": "b"}\n', "line 4 column 1 is no JSON (Expecting ',' delimiter)"),
        (b'{"id": 1}\n{"id": 2}\n', "line 2 column 1 is no JSON (Extra data)"),
        (b'[\n\n"caf\n"]', "line 3 column 5 is no JSON (Invalid control character at)"),
        (b"{}", "must hold a list of rows, but holds a dict"),
        (b'"rows"', "must hold a list of rows, but holds a str"),
        (b"null", "must hold a list of rows, but holds a NoneType"),
        (b"[]", "holds no rows"),
        (b"[" * 100_000, "cannot be read (it is nested too deeply for a list of rows)"),
        (
            b'["caf\xe9"]',
            "cannot be read ('utf-8' codec can't decode byte 0xe9 in position 5: invalid continuation byte)",
        ),
    ],
)
def test_a_file_that_is_no_llava_json(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(error.value) == f"{path}: {message}"


def test_a_file_that_cannot_be_read(tmp_path):
    for path, reason in ((tmp_path / "absent.json", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError) as error:
            read_json(path)
        assert str(error.value).startswith(f"{path}: cannot be read (")
        assert reason in str(error.value)
