"""Questions with known answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from memshare.errors import UserError
from memshare.lab.problems import FAMILIES, generate

Kind = Literal["reasoner", "math", "choice"]

_MATH = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_CHOICE = (
    "{question}\n\n{choices}\n\nPlease reason step by step, and put the letter of your final "
    "answer within \\boxed{{}}."
)
_LETTERS = "ABCD"


class Question(NamedTuple):
    """One question.

    Attributes:
        name: unique within a suite.
        kind: how answers are graded (:mod:`memshare.lab.evals.grading`).
        prompt: the user's turn.
        reference: the right answer: a number, a LaTeX expression or a letter.
    """

    name: str
    kind: Kind
    prompt: str
    reference: str


Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Suite:
    """A public benchmark on the Hugging Face hub.

    Attributes:
        path: its name there; ``config`` and ``split`` as ``datasets.load_dataset`` takes them.
        fields: that a line of it has, or of a local JSONL file in the same format.
        read: makes a question of one line and its number.
    """

    path: str
    config: str | None
    split: str
    fields: tuple[str, ...]
    read: Callable[[Fields, int], Question]


def _math(line: Fields, number: int) -> Question:
    prompt = _MATH.format(problem=line["problem"])
    return Question(str(number), "math", prompt, str(line["answer"]))


def _choice(line: Fields, number: int) -> Question:
    """The right answer comes first in the file: the order is drawn, the same for every run."""
    names = ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    order = random.Random(number).sample(range(len(names)), len(names))
    choices = "\n".join(
        f"{letter}) {str(line[names[i]]).strip()}"
        for letter, i in zip(_LETTERS, order, strict=True)
    )
    prompt = _CHOICE.format(question=str(line["Question"]).strip(), choices=choices)
    return Question(str(number), "choice", prompt, _LETTERS[order.index(0)])


_CHOICES = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
_PROBLEM = ("problem", "answer")
SUITES = {
    "math500": Suite("HuggingFaceH4/MATH-500", None, "test", _PROBLEM, _math),
    "aime24": Suite("HuggingFaceH4/aime_2024", None, "train", _PROBLEM, _math),
    "aime25": Suite("math-ai/aime25", None, "test", _PROBLEM, _math),
    "gpqa": Suite("Idavidrein/gpqa", "gpqa_diamond", "train", _CHOICES, _choice),
}
NAMES = (*FAMILIES, *SUITES)


def load(name: str, limit: int | None, data: Path | None = None, seed: int = 0) -> list[Question]:
    """Return the questions of a suite, or of a family of the reasoner's problems.

    Args:
        name: one of ``NAMES``.
        limit: questions at most; 200 of a family if None.
        data: a local JSONL file in the suite's format, instead of the hub.
        seed: number of a family's first problem.

    Raises:
        UserError: it cannot be loaded, or a line lacks a field.
    """
    if name in FAMILIES:
        if data is not None:
            raise UserError(f"problems of {name!r} are generated: leave --data away")
        problems = [generate(name, seed + i) for i in range(200 if limit is None else limit)]
        return [
            Question(str(seed + i), "reasoner", problem.prompt, str(problem.answer))
            for i, problem in enumerate(problems)
        ]
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}; choose of {', '.join(NAMES)}")
    suite = SUITES[name]
    questions = []
    for number, line in enumerate(_lines(suite, data)):
        if number == limit:
            break
        missing = [field for field in suite.fields if line.get(field) is None]
        if missing:
            raise UserError(f"{data or suite.path}, line {number + 1}: wants {missing[0]!r}")
        questions.append(suite.read(line, number))
    if not questions:
        raise UserError(f"{data or suite.path} has no questions")
    return questions


def _lines(suite: Suite, data: Path | None) -> list[Fields]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError
    except ImportError:
        raise UserError(
            "public benchmarks need 'datasets' and 'math-verify': pip install 'memshare[eval]'"
        ) from None
    try:
        if data is not None:
            return list(load_dataset("json", data_files=str(data), split="train"))
        return list(load_dataset(suite.path, suite.config, split=suite.split))
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise UserError(
            f"{data or suite.path} cannot be read: {error}\n"
            "Without the hub, name a local file in the same format with --data FILE.jsonl"
        ) from None
