"""One row of LLaVA JSON, checked: a bad row raises `BadRow`, which names the field and says what is wrong."""

import re
from dataclasses import dataclass, replace
from typing import Any

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
# SteerLM's lines write the last two.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "User": "user",
    "Assistant": "assistant",
}
_IMAGE_TAG = re.compile(r"""<img\s+src=(["'])(.*?)\1\s*/?>""", re.DOTALL)


class BadRow(Exception):
    """A row that cannot be used; the message names the field."""


class DroppedRow(BadRow):
    """A row left out on purpose (nothing to learn, or too long and `data.on_long_row=drop`): counted, but no error."""


@dataclass(frozen=True)
class Turn:
    """What one side says; the user's text may hold `<image>` marks, or one `<video>` mark in a row with a video.

    label: attributes of an answer (SteerLM: `quality:4,toxicity:0`), for the templates that show them.
    weight: of an answer in the loss.
    """

    role: str  # user or assistant
    text: str
    label: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Row:
    """A conversation and what its marks stand for: the images of the `<image>` marks in order, or one video.

    system: the row's own system text; None: the template's.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    video: str | None = None  # a folder of frames, or a video file
    system: str | None = None

    def count(self, mark: str) -> int:
        """How often a mark occurs in human turns."""
        return sum(turn.text.count(mark) for turn in self.turns if turn.role == "user")

    def with_frames(self, count: int) -> tuple[Turn, ...]:
        """The turns with the `<video>` mark replaced by `count` `<image>` marks, one for each frame."""
        return tuple(
            replace(turn, text=turn.text.replace(VIDEO_MARK, IMAGE_MARK * count)) if turn.role == "user" else turn
            for turn in self.turns
        )


def parse_row(raw: Any) -> Row:
    """One element of the JSON list -> `Row`.

    Rules: `conversations` alternates human and gpt, starts with human and ends with gpt; `image` is a path, a list of
    paths or absent; `<image>` occurs once for each image in human turns, and is plain text in an answer. `video` is the
    path of a folder of frames or of a video file, or absent; with it, `<video>` occurs once in human turns, and there
    are no images. Without it, `<video>` is text. `system` is text or absent. An answer may have a `label` (text) and a
    `weight` (a number from 0 up); in a human turn they mean nothing. Fields that are null count as absent.

    Raises:
      BadRow: a rule is broken.
    """
    if not isinstance(raw, dict):
        raise BadRow(f"must be an object, not {_short(raw)}")
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"field conversations must be a list of turns, not {_short(turns)}")
    parsed = tuple(_parse_turn(i, turn) for i, turn in enumerate(turns))
    if len(parsed) % 2:
        raise BadRow(f"field conversations has {len(parsed)} turns; the last must be an answer of gpt")
    images = raw.get("image", [])
    images = [images] if isinstance(images, str) else [] if images is None else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise BadRow(f"field image must be a path or a list of paths, not {_short(raw['image'])}")
    for name in images:
        check_characters("field image", name)
    video = raw.get("video")
    if video is not None and (not isinstance(video, str) or not video):
        raise BadRow(f"field video must be the path of a folder of frames or a video file, not {_short(video)}")
    if video is not None and images:
        raise BadRow("has both field image and field video; a row may have images or a video, not both")
    system = raw.get("system")
    if system is not None:
        if not isinstance(system, str):
            raise BadRow(f"field system must be text, not {_short(system)}")
        check_characters("field system", system)
    row = Row(str(raw.get("id", "")), tuple(images), parsed, video, system)
    if (marks := row.count(IMAGE_MARK)) != len(images):
        raise BadRow(
            f"field conversations has {marks} {IMAGE_MARK} marks in human turns, but field image has {len(images)}"
        )
    if video is not None:
        check_characters("field video", video)
        if (marks := row.count(VIDEO_MARK)) != 1:
            raise BadRow(f"field conversations has {marks} {VIDEO_MARK} marks in human turns; field video needs one")
    return row


def from_steerlm(raw: Any) -> Any:
    """One line of NeVA's SteerLM data -> an element of LLaVA JSON; what is none stays as it is.

    `<img src="…">` in a human turn becomes `<image>`; the image's name is what follows the last slash of the address.
    Rows with a field image or video are left alone. `mask` names the side that is not learned, as in

        {"system": "…", "mask": "User", "conversations": [{"from": "User", "value": "<img src=\"a/b.jpg\"> …"},
                                                          {"from": "Assistant", "value": "…", "label": "quality:4"}]}

    Raises:
      BadRow: a row that wants the human's turns learned, or the labels (`type` TEXT_TO_VALUE).
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        return raw
    mask = raw.get("mask")
    if mask is not None and (not isinstance(mask, str) or ROLES.get(mask) != "user"):
        raise BadRow(f"field mask must be User, the side that is not learned, not {_short(mask)}")
    if raw.get("type") == "TEXT_TO_VALUE":
        raise BadRow("field type is TEXT_TO_VALUE, whose labels would be learned; only answers are")
    if raw.get("image") or raw.get("video"):
        return raw
    names: list[str] = []
    humans = [name for name, role in ROLES.items() if role == "user"]

    def mark(tag: re.Match[str]) -> str:
        names.append(tag[2].rpartition("/")[2])
        return IMAGE_MARK

    turns = [
        {**turn, "value": _IMAGE_TAG.sub(mark, turn["value"])}
        if isinstance(turn, dict) and isinstance(turn.get("value"), str) and turn.get("from") in humans
        else turn
        for turn in raw["conversations"]
    ]
    return {**raw, "image": names, "conversations": turns}


def check_characters(where: str, text: str) -> None:
    """Raises BadRow for half a surrogate pair: JSON can hold it (`"\\ud83d"`), but it is no character, has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} has {text[error.start]!r} at character {error.start}, half a surrogate pair") from None


def _parse_turn(i: int, turn: Any) -> Turn:
    where = f"field conversations[{i}]"
    if not isinstance(turn, dict):
        raise BadRow(f"{where} must be an object with from and value, not {_short(turn)}")
    if not isinstance(turn.get("from"), str) or turn["from"] not in ROLES:
        raise BadRow(f"{where}.from must be human or gpt, not {_short(turn.get('from'))}")
    if not isinstance(turn.get("value"), str):
        raise BadRow(f"{where}.value must be text, not {_short(turn.get('value'))}")
    check_characters(f"{where}.value", turn["value"])
    role = ROLES[turn["from"]]
    expected = ("user", "assistant")[i % 2]
    if role != expected:
        raise BadRow(f"{where}.from is {turn['from']}, but turns must alternate human, gpt, human, …")
    if role == "user":
        return Turn(role, turn["value"])
    label, weight = turn.get("label"), turn.get("weight")
    if label is not None:
        if not isinstance(label, str):
            raise BadRow(f"{where}.label must be text, not {_short(label)}")
        check_characters(f"{where}.label", label)
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise BadRow(f"{where}.weight must be a number, not {_short(weight)}")
        if not 0 <= weight < 1e30:  # what fp32 holds with room; also refuses NaN
            raise BadRow(f"{where}.weight must be a number from 0 up, not {_short(weight)}")
    return Turn(role, turn["value"], label, 1.0 if weight is None else float(weight))


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
