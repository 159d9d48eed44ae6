"""Rows of LLaVA JSON: what a good one becomes, and what each bad one is told."""

import pytest

from neva_jax.data.rows import BadRow, Row, Turn, from_steerlm, parse_row

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
    (asks("<video>", video=""), "field video must be the path of a folder of frames or a video file, not ''"),
    (asks("<video>", video=["a"]), "field video must be the path of a folder of frames or a video file, not ['a']"),
    (asks("<video>", video=3), "field video must be the path of a folder of frames or a video file, not 3"),
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


# --- system, labels, weights -----------------------------------------------------------------------------------------


def test_system_label_and_weight_are_taken():
    parsed = parse_row(row(HUMAN, {**GPT, "label": "quality:4", "weight": 0}, HUMAN, {**GPT, "weight": 2}, system="S"))
    assert parsed.system == "S"
    assert parsed.turns[1::2] == (Turn("assistant", "Hello", "quality:4", 0.0), Turn("assistant", "Hello", None, 2.0))


def test_null_counts_as_absent():
    assert parse_row(row(HUMAN, {**GPT, "label": None, "weight": None}, system=None)) == parse_row(row(HUMAN, GPT))


def test_a_label_or_weight_of_a_question_means_nothing():
    assert parse_row(row({**HUMAN, "label": 3, "weight": "x"}, GPT)) == parse_row(row(HUMAN, GPT))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"label": 4}, "field conversations[1].label must be text, not 4"),
        ({"label": "\ud83d"}, "field conversations[1].label has '\\ud83d' at character 0, half a surrogate pair"),
        ({"weight": "1"}, "field conversations[1].weight must be a number, not '1'"),
        ({"weight": True}, "field conversations[1].weight must be a number, not True"),
        ({"weight": -1}, "field conversations[1].weight must be a number from 0 up, not -1"),
        ({"weight": float("nan")}, "field conversations[1].weight must be a number from 0 up, not nan"),
        ({"weight": 10**40}, f"field conversations[1].weight must be a number from 0 up, not {10**40}"),
    ],
)
def test_a_wrong_label_or_weight(answer, message):
    with pytest.raises(BadRow) as error:
        parse_row(row(HUMAN, {**GPT, **answer}))
    assert str(error.value) == message


def test_a_wrong_system_text():
    with pytest.raises(BadRow, match=r"^field system must be text, not \['x'\]$"):
        parse_row(row(HUMAN, GPT, system=["x"]))


def test_a_deeply_nested_value_is_named_without_being_written_out():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(BadRow, match=r"^field conversations must be a list of turns, not a deeply nested dict$"):
        parse_row({"conversations": {"a": deep}})


# --- SteerLM ---------------------------------------------------------------------------------------------------------


def steerlm(question, **fields):
    turns = [
        {"from": "User", "value": question, "label": None},
        {"from": "Assistant", "value": 'It is <img src="x.jpg">.', "label": "quality:4,toxicity:0"},
    ]
    return {"system": "Be kind.", "mask": "User", "type": "VALUE_TO_TEXT", "conversations": turns, **fields}


@pytest.mark.parametrize(
    ("question", "text", "images"),
    [
        ('<img src="/data/a/b.jpg">\nWhat?', "<image>\nWhat?", ("b.jpg",)),
        ("<img src='b.jpg' /> and <img  src=\"c/d.png\"/>?", "<image> and <image>?", ("b.jpg", "d.png")),
        ('<img src="b.jpg"><img src="b.jpg">', "<image><image>", ("b.jpg", "b.jpg")),
        ('<img alt="no source"> <IMG SRC="b.jpg">', '<img alt="no source"> <IMG SRC="b.jpg">', ()),
        ("Hi", "Hi", ()),
    ],
)
def test_a_steerlm_line(question, text, images):
    answer = Turn("assistant", 'It is <img src="x.jpg">.', "quality:4,toxicity:0")
    assert parse_row(from_steerlm(steerlm(question))) == Row("", images, (Turn("user", text), answer), None, "Be kind.")


def test_a_line_of_llava_json_stays_as_it_is():
    raw = asks('<image> in <img src="b.jpg">', image="a.jpg")
    assert from_steerlm(raw) is raw
    video = asks('<video> in <img src="b.jpg">', video="a")
    assert from_steerlm(video) is video


@pytest.mark.parametrize(
    "raw", [None, "x", [1], {}, {"conversations": "x"}, {"conversations": [1, {"from": ["User"]}]}]
)
def test_a_bad_line_is_left_to_the_parser(raw):
    with pytest.raises(BadRow):
        parse_row(from_steerlm(raw))


def test_an_image_tag_without_a_name():
    with pytest.raises(BadRow, match="field image must be a path or a list of paths"):
        parse_row(from_steerlm(steerlm('<img src="a/">')))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": "Assistant"}, "field mask must be User, the side that is not learned, not 'Assistant'"),
        ({"mask": 3}, "field mask must be User, the side that is not learned, not 3"),
        ({"type": "TEXT_TO_VALUE"}, "field type is TEXT_TO_VALUE, whose labels would be learned; only answers are"),
    ],
)
def test_steerlm_that_is_not_understood(fields, message):
    with pytest.raises(BadRow) as error:
        from_steerlm(steerlm("Hi", **fields))
    assert str(error.value) == message
