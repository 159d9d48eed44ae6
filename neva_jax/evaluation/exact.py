"""Exact match: the share of questions whose answer is the expected one, after lower-casing and trimming."""

from collections import defaultdict
from dataclasses import dataclass

from neva_jax.errors import UserError
from neva_jax.evaluation.normalise import simple
from neva_jax.inference.questions import Question


@dataclass(frozen=True)
class Score:
    """Right answers of all, in total and by category."""

    right: int
    total: int
    categories: dict[str, tuple[int, int]]

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.right / self.total


def expected_answers(questions: list[Question], name: str) -> dict[str | int, str]:
    """The field `answer` of each question from file `name`, by question_id.

    Raises:
      UserError: a question without it.
    """
    for question in questions:
        if not isinstance(question.raw.get("answer"), str):
            raise UserError(
                f"{name}: line {question.line}: field answer must be text, not {question.raw.get('answer')!r}"
            )
    return {question.id: question.raw["answer"] for question in questions}


def exact_match(questions: list[Question], answers: dict[str | int, str], name: str) -> Score:
    """Compares answers (by question_id) with the field `answer` of the questions from file `name`.

    Raises:
      UserError: a question without `answer`.
    """
    by_category: dict[str, list[bool]] = defaultdict(list)
    expected = expected_answers(questions, name)
    for question in questions:
        hit = simple(answers[question.id]) == simple(expected[question.id])
        by_category[str(question.raw.get("category", "all"))].append(hit)
    hits = [hit for group in by_category.values() for hit in group]
    return Score(sum(hits), len(hits), {name: (sum(group), len(group)) for name, group in sorted(by_category.items())})
