"""Work for an engine to do, as token ids: the same for every arm."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from memshare.errors import UserError
from memshare.lab.problems import FAMILIES, Family, generate
from memshare.lab.replay.traces import load_traces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arithmetic that goes on, for models that need not be right.
_REASONING = (
    "Add the numbers {numbers} one after another. Write every step as its own paragraph, check it, "
    "and go on.",
    "Sort the numbers {numbers}. Explain every comparison, then verify the result.",
    "Which of {numbers} are prime? Try each divisor and check your reasoning.",
)
# Short questions that have nothing in common, for the case in which there is nothing to gain.
_TOPICS = (
    "volcanoes", "bread", "chess", "the moon", "bicycles", "whales", "jazz", "glaciers", "bees",
    "bridges", "tea", "deserts", "printing", "owls", "rivers", "clocks", "silk", "maps", "salt",
    "lighthouses", "comets", "violins", "coral", "castles",
)  # fmt: skip
_CHATS = (
    "Tell me one surprising fact about {topic}.",
    "How would you explain {topic} to a child?",
    "Write a short poem about {topic}.",
    "Why do people care about {topic}?",
)


class Task(NamedTuple):
    """One request.

    Attributes:
        group: what it is counted under when accuracy is.
        prompt: token ids.
        max_tokens: generated tokens at most.
        forced: token ids that it writes whatever the model says; None lets the model write.
        answer: the right final answer; None if it has none.
        ends: whether it stops at the end of its answer, or goes on to ``max_tokens``.
        expected: tokens that it is likely to write, where it ends before ``max_tokens``.
    """

    group: str
    prompt: list[int]
    max_tokens: int
    forced: list[int] | None = None
    answer: int | None = None
    ends: bool = False
    expected: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer, at most."""
        return len(self.prompt) + self.max_tokens

    @property
    def need(self) -> int:
        """Tokens of prompt and answer, most likely."""
        return len(self.prompt) + (self.expected or self.max_tokens)


@dataclass(frozen=True, slots=True)
class Source:
    """Where tasks come from.

    Attributes:
        tokenizer: the model's.
        count: tasks.
        tokens: generated tokens of a task, at most.
        seed: number of the first problem.
        traces: folder of recorded texts, for ``traces``.
    """

    tokenizer: PreTrainedTokenizerBase
    count: int
    tokens: int
    seed: int = 0
    traces: Path | None = None

    def chat(self, text: str) -> list[int]:
        """Token ids of one user turn, up to where the answer begins.

        Raises:
            UserError: the model has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"--model {self.tokenizer.name_or_path} has no chat template, so that it can't be "
                "asked; use an instruct model"
            )
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return self.ids(str(rendered))

    def ids(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _reasoning(source: Source) -> Iterator[Task]:
    for i in range(source.count):
        numbers = ", ".join(str((7 * i + 13 * k + k * k) % 97) for k in range(8))
        text = _REASONING[i % len(_REASONING)].format(numbers=numbers)
        yield Task("reasoning", source.ids(text), source.tokens)


def _chat(source: Source) -> Iterator[Task]:
    draw = random.Random(source.seed)
    pairs = [(chat, topic) for chat in _CHATS for topic in _TOPICS]
    for chat, topic in draw.sample(pairs, source.count):
        yield Task("chat", source.chat(chat.format(topic=topic)), source.tokens)


def _problems(source: Source, families: Sequence[Family] = FAMILIES) -> Iterator[Task]:
    for i in range(source.count):
        family = families[i % len(families)]
        problem = generate(family, source.seed + i)
        prompt = source.chat(problem.prompt)
        # A model that was trained on such solutions writes one about as long.
        expected = min(len(source.ids(problem.solution)), source.tokens)
        yield Task(
            family, prompt, source.tokens, answer=problem.answer, ends=True, expected=expected
        )


def _solutions(source: Source) -> Iterator[Task]:
    """What the reasoner would write, for models that cannot: forced token by token."""
    for i in range(source.count):
        problem = generate(FAMILIES[i % len(FAMILIES)], source.seed + i)
        forced = source.ids(problem.solution)[: source.tokens]
        yield Task(problem.family, source.chat(problem.prompt), len(forced), forced=forced)


def _traces(source: Source) -> Iterator[Task]:
    if source.traces is None:
        raise UserError("the workload 'traces' wants a folder of recorded texts: --traces DIR")
    recorded = [(trace, source.ids(trace.reasoning)) for trace in load_traces(source.traces)]
    for i in range(source.count):
        # Fewer texts than tasks: the same ones again, from further on.
        trace, ids = recorded[i % len(recorded)]
        start = i // len(recorded) * source.tokens
        forced = ids[start : start + source.tokens]
        if len(forced) < source.tokens:
            continue
        yield Task("traces", source.chat(trace.problem), source.tokens, forced=forced)


WORKLOADS: dict[str, Callable[[Source], Iterator[Task]]] = {
    "problems": _problems,
    "recall": partial(_problems, families=("recall",)),
    "solutions": _solutions,
    "traces": _traces,
    "reasoning": _reasoning,
    "chat": _chat,
}

GRADED = frozenset({"problems", "recall"})
"""Workloads that ask the reasoner's problems: for a model that can answer them."""


def build(name: str, source: Source) -> list[Task]:
    """Return the tasks of workload ``name``.

    Raises:
        UserError: there is no such workload, or it has no task of the wanted length.
    """
    if name not in WORKLOADS:
        raise UserError(f"there is no workload {name!r}; choose of {', '.join(WORKLOADS)}")
    if source.count > len(_CHATS) * len(_TOPICS) and name == "chat":
        raise UserError(f"the workload 'chat' has {len(_CHATS) * len(_TOPICS)} different requests")
    tasks = list(WORKLOADS[name](source))
    if not tasks:
        raise UserError(f"no recorded text has {source.tokens} tokens; lower --tokens")
    return tasks
