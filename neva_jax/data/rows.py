"""One row of LLaVA JSON, checked: a bad row raises `BadRow`, which names the field and says what is wrong."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neva_jax.errors import UserError

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


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
    video: str | None = None  # a folder of frames
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


def read_json(path: str | Path) -> list[Any]:
    """The list in a LLaVA JSON file.

    Raises:
      UserError: unreadable, no JSON (line and column are named), or not a list with at least one row.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} column {error.colno} is no JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read (it is nested too deeply for a list of rows)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of rows, but holds a {type(rows).__name__}")
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def parse_row(raw: Any) -> Row:
    """One element of the JSON list -> `Row`.

    Rules: `conversations` alternates human and gpt, starts with human and ends with gpt; `image` is a path, a list of
    paths or absent; `<image>` occurs once for each image in human turns, and is plain text in an answer. `video` is the
    path of a folder of frames or absent; with it, `<video>` occurs once in human turns, and there are no images.
    Without it, `<video>` is text.

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
        raise BadRow(f"field video must be the path of a folder of frames, not {_short(video)}")
    if video is not None and images:
        raise BadRow("has both field image and field video; a row may have images or a video, not both")
    row = Row(str(raw.get("id", "")), tuple(images), parsed, video)
    if (marks := row.count(IMAGE_MARK)) != len(images):
        raise BadRow(
            f"field conversations has {marks} {IMAGE_MARK} marks in human turns, but field image has {len(images)}"
        )
    if video is not None:
        check_characters("field video", video)
        if (marks := row.count(VIDEO_MARK)) != 1:
            raise BadRow(f"field conversations has {marks} {VIDEO_MARK} marks in human turns; field video needs one")
    return row


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
    return Turn(role, turn["value"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
