"""Exact match against counts by hand, and what `evaluate score` prints of them."""

import json

import pytest

from neva_jax import evaluate
from neva_jax.errors import UserError
from neva_jax.evaluation.exact import Score, exact_match
from neva_jax.evaluation.normalise import simple
from neva_jax.inference.questions import Question

# (id, category or None, expected, answered, right)
CASES = (
    (1, "color", "red", "Red.", True),
    (2, "color", "blue", "blu", False),
    ("2", "color", "dark blue", "  dark \n BLUE ", True),
    (4, "count", "3", "three", False),
    ("five", None, "yes", "yes", True),
    (6, None, "No.", "no", True),
    (7, None, "no", "no, it is not", False),
)
SCORE = Score(4, 7, {"all": (2, 3), "color": (2, 3), "count": (0, 1)})


def question(identity, **raw):
    return Question(identity, (), "?", {"question_id": identity, "text": "?", **raw}, 1)


def questions():
    for identity, category, expected, _, _ in CASES:
        yield question(identity, answer=expected, **({} if category is None else {"category": category}))


@pytest.mark.parametrize(
    ("text", "simplified"),
    [
        ("Yes", "yes"),
        ("  Two\t\nWords  here ", "two words here"),
        ("a\u00a0b", "a b"),
        ("yes.", "yes"),
        ("yes. ", "yes"),
        ("3.5", "3.5"),
        ("3.50.", "3.50"),
        ("no!", "no!"),
        ("ÄRGER", "ärger"),
        (".", ""),
        ("", ""),
        ("yes .", "yes"),
    ],
)
def test_simple(text, simplified):
    assert simple(text) == simplified


def test_right_answers_in_total_and_by_category():
    answers = {identity: answered for identity, _, _, answered, _ in CASES}
    score = exact_match(list(questions()), answers, "q.jsonl")
    assert score == SCORE
    assert score.right == sum(right for *_, right in CASES)
    assert score.accuracy == 4 / 7
    assert list(score.categories) == ["all", "color", "count"]


@pytest.mark.parametrize("wrong", range(len(CASES)))
def test_each_answer_counts_for_itself(wrong):
    expected = {row.id: row.raw["answer"] for row in questions()}
    score = exact_match(list(questions()), {**expected, CASES[wrong][0]: "?"}, "q.jsonl")
    assert (score.right, score.total) == (6, 7)
    category = CASES[wrong][1] or "all"
    assert {name: right - total for name, (right, total) in score.categories.items()} == {
        "all": 0,
        "color": 0,
        "count": 0,
        category: -1,
    }


def test_a_category_that_is_no_text():
    pair = [question(1, answer="a", category=2), question(2, answer="b", category="2")]
    assert exact_match(pair, {1: "a", 2: "a"}, "q.jsonl").categories == {"2": (1, 2)}


@pytest.mark.parametrize("raw", [{}, {"answer": 3}, {"answer": ["yes"]}, {"answer": None}])
def test_a_question_without_a_text_to_expect(raw):
    with pytest.raises(UserError, match=r"q\.jsonl: line 1: field answer must be text"):
        exact_match([question(1, **raw)], {1: "3"}, "q.jsonl")


@pytest.fixture
def scored(tmp_path, capsys):
    """What `evaluate score` prints, the answers in another order than the questions."""
    files = {"questions": [row.raw for row in questions()]}
    files["answers"] = [{"question_id": identity, "text": answered} for identity, _, _, answered, _ in CASES[::-1]]
    named = []
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        named += [f"--{name}", str(tmp_path / name)]

    def run(*flags):
        assert evaluate.main(["score", "--task", "exact", *named, *flags]) == 0
        return capsys.readouterr().out

    return run


def test_score_for_people(scored):
    lines = ["  all: 0.67 (2/3)", "  color: 0.67 (2/3)", "  count: 0.00 (0/1)", "exact match: 0.57 (4/7)"]
    assert scored().splitlines() == lines


def test_score_for_programs(scored):
    assert json.loads(scored("--json")) == {
        "task": "exact",
        "accuracy": 4 / 7,
        "right": 4,
        "total": 7,
        "categories": {"all": [2, 3], "color": [2, 3], "count": [0, 1]},
    }
