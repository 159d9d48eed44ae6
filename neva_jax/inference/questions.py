"""Question and answer files, as LLaVA's evaluation has them: one JSON object a line.

question   {"question_id", "image"?, "text" (or "prompt", "question"), ...}
answer     {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from tqdm import tqdm

from neva_jax.data.rows import BadRow
from neva_jax.data.stores import find_image
from neva_jax.errors import UserError
from neva_jax.files import replacing
from neva_jax.inference.engine import Engine, Request, SamplingOptions
from neva_jax.parallel.peers import ALONE, Peers


@dataclass(frozen=True)
class Question:
    """A line of a question file; `raw` keeps the fields that only a benchmark knows."""

    id: str | int
    images: tuple[str, ...]
    text: str
    raw: dict[str, Any]
    line: int


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not empty.

    Raises:
      UserError: unreadable, or a line that is no JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is no JSON ({error.msg})") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}: line {number} must hold an object, not {line[:40]!r}")
        yield number, value


def read_questions(path: str | Path) -> list[Question]:
    """Reads a question file.

    Raises:
      UserError: a line without text, with an image that is no path, or with a question_id that stood before.
    """
    questions: list[Question] = []
    seen: dict[str | int, int] = {}
    for number, raw in read_jsonl(path):
        text = next((raw[name] for name in ("text", "prompt", "question") if name in raw), None)
        if not isinstance(text, str):
            raise UserError(f"{path}: line {number}: field text (or prompt, or question) must be text, not {text!r}")
        images = raw.get("image") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise UserError(f"{path}: line {number}: field image must be a path or a list of paths, not {images!r}")
        identity = raw.get("question_id", number)
        if not isinstance(identity, str | int):
            raise UserError(f"{path}: line {number}: field question_id must be a number or text, not {identity!r}")
        if identity in seen:
            raise UserError(f"{path}: line {number}: question_id {identity!r} stands in line {seen[identity]} already")
        seen[identity] = number
        questions.append(Question(identity, tuple(images), text, raw, number))
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def answer_questions(
    engine: Engine,
    path: str | Path,
    questions: Sequence[Question],
    images: str | Path | None,
    options: SamplingOptions,
    batch_size: int,
    model_id: str,
    peers: Peers = ALONE,
) -> Iterator[dict[str, Any]]:
    """Answers the questions of file `path` in batches, in order, with a progress bar.

    Several processes take one batch each in turn, and all get all answers. A batch is the same for any number of them.

    Raises:
      UserError: an image that is missing or broken, with the line of its question.
    """

    def answer(group: Sequence[Question]) -> Iterator[dict[str, Any]]:
        requests = [_request(engine, path, question, images) for question in group]
        # Rows that fill up the last batch keep its shape, so that nothing is compiled again.
        filled = requests + [requests[-1]] * (min(batch_size, len(questions)) - len(group))
        try:
            replies = engine.generate(filled, options)[: len(group)]
        except BadRow as error:  # a Jinja template may refuse a conversation
            raise UserError(f"{path}: lines {group[0].line} … {group[-1].line}: {error}") from None
        for question, reply in zip(group, replies, strict=True):
            yield {
                "question_id": question.id,
                "prompt": question.text,
                "text": reply.text.strip(),
                "answer_id": uuid5(NAMESPACE_URL, f"{model_id}/{question.id}/{reply.text}").hex,
                "model_id": model_id,
                "metadata": {"finish_reason": reply.finish_reason},
            }

    firsts = range(0, len(questions), batch_size)
    with tqdm(total=len(questions), unit="question", desc="answering", disable=not peers.first) as bar:
        for turn in range(0, len(firsts), peers.count):
            own = firsts[turn + peers.index : turn + peers.index + 1]
            answers = [row for first in own for row in answer(questions[first : first + batch_size])]
            for rows in peers.exchange(answers):
                yield from rows
                bar.update(len(rows))


def _request(engine: Engine, path: str | Path, question: Question, images: str | Path | None) -> Request:
    try:
        return Request(question.text, tuple(engine.read_image(find_image(images, name)) for name in question.images))
    except BadRow as error:
        raise UserError(f"{path}: line {question.line}: {error}") from None


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]], writes: bool = True) -> int:
    """Writes rows beside `path` and moves them there when all are written; returns their number.

    `writes`: a process that does not only counts them.
    """
    count = 0
    if not writes:
        return sum(1 for _ in rows)
    with replacing(path) as fresh, fresh.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
