"""What a probe is trained and judged on: recorded texts, or texts that the model writes itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.errors import UserError
from memshare.lab.bench.workloads import Source, build
from memshare.lab.problems import Family, generate
from memshare.lab.replay.traces import load_traces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST = 256
"""Tokens: shorter texts say little about what is needed much later."""
_SUM = "Now I add"  # begins the part of a solution that needs what was found before
_ROUND = 32


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and what a model wrote behind it.

    Attributes:
        name: tells it apart.
        tokens: of both.
        prompt: how many of them are the prompt.
        kind: what texts it belongs to, for tables and cards.
        cut: where it is natural to drop tokens; None if anywhere.
    """

    name: str
    tokens: tuple[int, ...]
    prompt: int
    kind: str
    cut: int | None = None

    @property
    def digest(self) -> str:
        """Tells in a probe's card that this text was trained on: by its beginning, so that one that
        was cut shorter or longer is the same."""
        beginning = self.tokens[:SHORTEST]
        return hashlib.sha256(repr(beginning).encode()).hexdigest()[:16]


def recorded_texts(
    folder: Path, tokenizer: PreTrainedTokenizerBase, shortest: int, kind: str
) -> list[Text]:
    """The texts below a folder (see :func:`load_traces`) that have so many tokens, or more.

    Raises:
        UserError: there is none.
    """
    source = Source(tokenizer, 0, 0)
    texts = []
    for trace in load_traces(folder):
        prompt = _ask(source, trace.problem) if trace.problem else []
        text = Text(trace.name, (*prompt, *source.ids(trace.reasoning)), len(prompt), kind)
        if len(text.tokens) >= max(shortest, SHORTEST):
            texts.append(text)
    if not texts:
        raise UserError(
            f"no text in {folder} has {max(shortest, SHORTEST)} tokens; give longer ones, or lower "
            "--prefix or --continuation"
        )
    return texts


def solutions(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
    families: Sequence[Family] = ("recall",),
) -> list[Text]:
    """Worked problems of the test reasoner, of one family after another.

    Those of ``recall`` are cut where the sum begins: every amount that it needs stands before
    that, and nowhere in the prompt.
    """
    source = Source(tokenizer, count, 0)
    texts = []
    for number in range(seed, seed + count):
        family = families[number % len(families)]
        problem = generate(family, number)
        prompt = _ask(source, problem.prompt)
        tokens = (*prompt, *source.ids(problem.solution))
        text = Text(f"{family}{number}", tokens, len(prompt), f"{family} solutions")
        if family == "recall":
            before = source.ids(problem.solution[: problem.solution.index(_SUM)])
            text = replace(text, cut=(len(prompt) + len(before)) // _ROUND * _ROUND)
        texts.append(text)
    return texts


def own_texts(
    tokenizer: PreTrainedTokenizerBase, count: int, write: Callable[[list[int], int], list[int]]
) -> Iterator[Text]:
    """Texts that the model writes itself.

    Args:
        tokenizer: the model's.
        count: texts.
        write: writes behind a prompt; takes the number of the text.
    """
    for number, prompt in enumerate(_questions(tokenizer, count)):
        tokens = (*prompt, *write(prompt, number))
        yield Text(f"own{number}", tokens, len(prompt), "texts of its own")


def folds(texts: Sequence[Text], count: int) -> list[list[int]]:
    """Split texts into groups of about equal size: indices, the same split every time."""
    return [list(range(start, len(texts), count)) for start in range(min(count, len(texts)))]


def _questions(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Token ids of questions that want long answers, then of others."""
    tasks = build("reasoning", Source(tokenizer, count, 0))
    if tokenizer.chat_template is None:
        return [task.prompt for task in tasks]
    source = Source(tokenizer, count, 0)
    return [source.chat(str(tokenizer.decode(task.prompt))) for task in tasks]


def _ask(source: Source, problem: str) -> list[int]:
    if source.tokenizer.chat_template is None:
        return source.ids(f"{problem}\n\n")
    return source.chat(problem)
