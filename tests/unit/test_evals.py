"""Questions from generated problems and from files in the formats of public benchmarks; grading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memshare.errors import UserError
from memshare.evals.grading import is_right
from memshare.evals.questions import Question, load

GPQA = {
    "Question": "Which is a noble gas?", "Correct Answer": "Neon\n", "Incorrect Answer 1": "Iron",
    "Incorrect Answer 2": "Gold", "Incorrect Answer 3": "Lead", "Subdomain": "Chemistry",
}  # fmt: skip


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_math_is_read_from_a_file_in_the_hubs_format(tmp_path: Path) -> None:
    lines = [
        {"problem": f"What is {i}/2?", "answer": f"\\frac{{{i}}}{{2}}", "unique_id": str(i)}
        for i in (1, 3, 5)
    ]
    questions = load("math500", 2, write(tmp_path / "m.jsonl", *lines))
    assert [question.reference for question in questions] == ["\\frac{1}{2}", "\\frac{3}{2}"]
    assert "What is 1/2?" in questions[0].prompt
    assert "\\boxed{}" in questions[0].prompt
    assert is_right(questions[0], "It is one half, so \\boxed{0.5}.")
    assert not is_right(questions[0], "So \\boxed{2}.")


def test_numbers_as_answers_are_read_too(tmp_path: Path) -> None:
    (question,) = load("aime24", None, write(tmp_path / "a.jsonl", {"problem": "p", "answer": 204}))
    assert is_right(question, "\\boxed{204}")
    assert not is_right(question, "\\boxed{205}")


def test_choices_are_shuffled_the_same_way_every_time(tmp_path: Path) -> None:
    file = write(tmp_path / "g.jsonl", *[GPQA] * 12)
    questions = load("gpqa", None, file)
    assert questions == load("gpqa", None, file)
    assert len({question.reference for question in questions}) > 1, "not always the same letter"
    for question in questions:
        assert f"{question.reference}) Neon\n" in question.prompt + "\n"
        assert is_right(question, f"First \\boxed{{X}}, then \\boxed{{{question.reference}}}")
        other = "A" if question.reference != "A" else "B"
        assert not is_right(question, f"\\boxed{{{question.reference}}} or \\boxed{{{other}}}")
        assert is_right(question, f"\\boxed{{\\text{{({question.reference})}}}}")
        assert not is_right(question, "I do not know.")


def test_a_line_without_a_field_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "b.jsonl", {"problem": "p", "answer": "1"}, {"problem": "q"})
    with pytest.raises(UserError, match=r"line 2: wants 'answer'"):
        load("math500", None, file)


def test_a_file_that_is_no_jsonl_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("no json")
    with pytest.raises(UserError, match=r"c\.jsonl"):
        load("math500", None, tmp_path / "c.jsonl")
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        load("math500", None, tmp_path / "nowhere.jsonl")


def test_generated_problems_are_questions() -> None:
    questions = load("recall", 3, seed=7)
    assert [question.name for question in questions] == ["7", "8", "9"]
    right = f"Hm. The final answer is {questions[0].reference}."
    assert is_right(questions[0], right)
    assert not is_right(questions[0], right + " The final answer is 99.")
    assert len(load("chain", None)) == 200


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no suite 'mmlu'"):
        load("mmlu", None)
    with pytest.raises(UserError, match="leave --data away"):
        load("chain", None, tmp_path / "x.jsonl")


@pytest.mark.parametrize("text", ["", "\\boxed{", "$$$", "\\frac{1}{0}", "x" * 10000])
def test_odd_text_is_wrong_and_no_error(text: str) -> None:
    assert not is_right(Question("1", "math", "p", "17"), text)
